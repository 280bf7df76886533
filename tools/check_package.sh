#!/usr/bin/env bash
# Builds the wheel and the sdist, installs each into clean environments with the oldest
# and with the newest dependencies that it allows, and runs the first page of the docs.
#
#   tools/check_package.sh python3.11 python3.12 python3.13
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet --disable-pip-version-check build uv
PATH="$work/tools/bin:$PATH"
python -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 \
  || { cat "$work/build.log"; exit 1; }
sed -n '/^```python/,/^```/{/^```/!p}' docs/getting_started.md >"$work/page.py"
for python in "$@"; do
  for package in "$work"/dist/*; do
    for resolution in lowest-direct highest; do
      uv venv --quiet --clear --python "$python" "$work/env"
      export VIRTUAL_ENV="$work/env"
      uv pip install --quiet --resolution "$resolution" --requirement pyproject.toml
      uv pip install --quiet --no-deps "$package"
      (cd "$work" && env/bin/python page.py >/dev/null)
      echo "$python, $(basename "$package"), $resolution:" \
        "$(uv pip list --quiet | awk '/^(jax|jaxlib|flax|optax|chex|jaxtyping) /{printf "%s %s ", $1, $2}')"
    done
  done
done

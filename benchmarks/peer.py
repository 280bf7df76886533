"""Optimizers that run in environments of their own, as `benchmarks/peers` has them."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.networks import described
from benchmarks.problem import Task

FOLDER = Path(__file__).parent / "peers"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).parents[1]),
    # While this process computes, the threads of a peer that waits must not spin.
    "OMP_WAIT_POLICY": "passive",
}


class Peer(NamedTuple):
    """A peer that is running.

    Attributes:
      process: answers each line with one.
      folder: what it shares with this process.
      log: what it writes beside its answers.
      versions: of its packages.
    """

    process: subprocess.Popen[str]
    folder: Path
    log: Path
    versions: dict[str, str]

    def ask(self, **asked: Any) -> dict[str, Any]:
        """One answer, such as that to `steps=3` or `evaluate=True`.

        Raises:
          RuntimeError: if the peer has ended, with the last line that it wrote.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return _read(self.process, self.log)


def _read(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        last = log.read_text().strip().splitlines()[-1:]
        code = process.wait()
        raise RuntimeError(f"The peer has ended with code {code}. {''.join(last)}")
    return json.loads(line)


@contextmanager
def start(
    python: Path, script: str, task: Task, settings: Mapping[str, Any]
) -> Iterator[Peer]:
    """Starts a peer on a task, and ends it with the block.

    Args:
      python: the interpreter of its environment.
      script: its name in `benchmarks/peers`.
      task: what to train on.
      settings: what the script's docstring lists.
    """
    problem = task.problem
    arrays = {"order": task.order, "measured": np.asarray(problem.measured)}
    arrays["model"] = np.asarray(json.dumps(described(problem.model)))
    for name in ("train", "test"):
        for part, array in getattr(problem, name)._asdict().items():
            arrays[f"{name}_{part}"] = array
    for path, leaf in jax.tree.leaves_with_path(task.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        arrays[f"params/{name}"] = np.asarray(leaf)
    with launch(python, script, arrays, settings) as peer:
        yield peer


@contextmanager
def launch(
    python: Path,
    script: str,
    arrays: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
) -> Iterator[Peer]:
    """Starts a script of `benchmarks/peers`, and ends it with the block.

    Args:
      python: the interpreter of its environment.
      script: its name.
      arrays: what it reads.
      settings: what its docstring lists.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given: dict[str, Any] = dict(arrays)
        np.savez(folder / "start.npz", **given)
        command = [python, FOLDER / f"{script}.py", "--input", folder / "start.npz"]
        command += ["--settings", json.dumps(dict(settings))]
        pipe, log = subprocess.PIPE, folder / "log"
        with (
            log.open("w") as errors,
            subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=errors,
                text=True,
                env=ENVIRONMENT,
            ) as process,
        ):
            try:
                versions = _read(process, log)["versions"]
                yield Peer(process, folder, log, versions)
            finally:
                process.kill()

"""How a result was made: commit, versions, machine and command."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jax

_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "locoprop-optax")


def provenance() -> dict[str, object]:
    """What somebody needs to know to make the same result again."""
    module = sys.modules["__main__"].__spec__
    command = ["python", "-m", module.name] if module else [Path(sys.argv[0]).name]
    return {
        "command": " ".join([*command, *map(_without_folders, sys.argv[1:])]),
        "commit": _commit(),
        "machine": {
            "device": jax.devices()[0].device_kind,
            "platform": jax.devices()[0].platform,
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
    }


def _without_folders(argument: str) -> str:
    """An argument, a path in it cut to its last part."""
    return Path(argument).name if os.sep in argument else argument


def _commit() -> str:
    """The commit that ran, with a `+` if the working tree differed from it."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        result = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        return result.stdout.strip()

    code = git("status", "--porcelain", "--", "../src", "../benchmarks/*.py")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + "+" * bool(code)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    return next(names, platform.processor())

"""Training goes on where it was killed, in one process or in two."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import slow

ROOT = Path(__file__).parents[1]
STEPS = 40


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts `examples.resumable`, whose compiled programs are kept for the next."""
    cache = tmp_path_factory.mktemp("cache")
    shared = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
    }
    running = []

    def start(folder, *options):
        command = [sys.executable, "-m", "examples.resumable", "--folder", folder]
        process = subprocess.Popen(
            [*map(str, command), *map(str, options)],
            env={**os.environ, **shared},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def steps_of(output):
    """The number, the loss and the digest of each step."""
    return re.findall(r"^step (\d+) loss (\S+) (\w+)$", output, re.M)


def read_steps(process, count):
    """Waits until so many steps are printed."""
    while count:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        count -= line.startswith("step")


def ended(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return steps_of(output)


@pytest.mark.parametrize("kills", [3, slow(10)])
def test_a_run_that_is_killed_ends_as_one_that_was_not(start, tmp_path, kills):
    *_, expected = ended(start(tmp_path / "whole", "--steps", STEPS))
    draw, resumed = random.Random(0), 0
    for _ in range(kills):
        process = start(tmp_path / "killed", "--steps", STEPS)
        read_steps(process, draw.randint(1, 3))
        time.sleep(draw.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(tmp_path / "killed", "--steps", STEPS)
    output, errors = process.communicate(timeout=120)
    resumed = int(re.search(r"resumed at step (\d+)", output)[1])
    assert 0 < resumed < STEPS, errors
    assert steps_of(output)[-1] == expected


def test_a_checkpoint_of_another_model_is_refused(start, tmp_path):
    ended(start(tmp_path, "--steps", 1))
    process = start(tmp_path, "--steps", 2, "--hidden", 16, 8, 16)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "params/Dense_0/kernel: saved as float32[784, 32]" in errors


def pair(start, folder, steps):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    common = ["--steps", steps, "--processes", 2, "--timeout", 10]
    common += ["--coordinator", f"localhost:{port}"]
    return [start(folder, *common, "--process", number) for number in range(2)]


@pytest.mark.slow
def test_two_processes_agree_and_survive_the_death_of_one(start, tmp_path):
    first, second = map(ended, pair(start, tmp_path / "whole", 8))
    assert first == second
    assert [int(number) for number, *_ in first] == list(range(1, 9))
    survivor, victim = pair(start, tmp_path / "killed", 1000)
    read_steps(victim, 3)
    victim.send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, errors = survivor.communicate(timeout=90)
    assert survivor.returncode != 0, "it should not go on alone"
    assert errors
    assert time.monotonic() - began < 60
    again, too = map(ended, pair(start, tmp_path / "killed", 8))
    assert again == too
    assert len(again) < 8, "it resumes"
    assert again[-1] == first[-1]

"""Processes that share a machine: beside one another, or each alone in its turn.

A GPU that one small model leaves idle trains several in less time. What is timed runs
alone meanwhile.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(room: Path, *, alone: bool) -> Iterator[None]:
    """Waits until the block may run: alone, or beside others that are not.

    Nobody passes the door while one waits before the room, so that who wants to be
    alone waits no longer than for the blocks that had begun.

    Args:
      room: a file that the processes share, made if it is not there; its door is a
        second file beside it.
      alone: whether nobody else may be in the room.
    """
    with room.open("a") as inside, room.with_suffix(".door").open("a") as door:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(inside, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield

import threading
import time
from contextlib import ExitStack

import pytest

from benchmarks import sharing

WAIT = 10.0  # seconds; far more than a thread needs


@pytest.fixture
def enter(tmp_path):
    """Enters the room in a thread; the events say when it is in and may leave."""
    with ExitStack() as stack:

        def start(*, alone):
            entered, leave = threading.Event(), threading.Event()

            def stay():
                with sharing.turn(tmp_path / "room", alone=alone):
                    entered.set()
                    leave.wait(WAIT)

            thread = threading.Thread(target=stay)
            thread.start()
            stack.callback(thread.join)
            stack.callback(leave.set)
            return entered, leave

        yield start


def test_several_beside_one_another(enter):
    for entered, _ in [enter(alone=False) for _ in range(3)]:
        assert entered.wait(WAIT)


@pytest.mark.parametrize("alone", [False, True])
def test_nobody_beside_one_that_is_alone(enter, alone):
    first, leave = enter(alone=True)
    assert first.wait(WAIT)
    second, _ = enter(alone=alone)
    assert not second.wait(0.2)
    leave.set()
    assert second.wait(WAIT)


def test_one_that_wants_to_be_alone_is_not_passed(enter):
    beside, leave = enter(alone=False)
    assert beside.wait(WAIT)
    alone, leave_alone = enter(alone=True)
    time.sleep(0.2)  # until it stands in the door
    late, _ = enter(alone=False)
    assert not late.wait(0.2)
    assert not alone.is_set()
    leave.set()
    assert alone.wait(WAIT)
    assert not late.wait(0.2)
    leave_alone.set()
    assert late.wait(WAIT)

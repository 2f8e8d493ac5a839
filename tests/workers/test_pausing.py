"""pause() meets requests that run: it ends them, lets them end, or freezes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sparsecast.messages.errors import WaitTimeout
from sparsecast.workers.pausing import Gate

SOON_S = 5.0


class Loop:
    """A request of many small steps on a thread of its own, as a generator runs it."""

    def __init__(self, gate: Gate, steps: int) -> None:
        self.done = 0
        self.cancelled = False
        self.ended = threading.Event()
        self.completed = False
        self.gate, self.steps = gate, steps
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        with self.gate.request(lambda: self.cancelled) as step:
            for _ in range(self.steps):
                with step() as go:
                    if not go:
                        break
                    time.sleep(0.001)
                    self.done += 1
            else:
                self.completed = True
        self.ended.set()

    def reaches(self, steps: int) -> None:
        deadline = time.monotonic() + SOON_S
        while self.done < steps:
            assert time.monotonic() < deadline
            time.sleep(0.0005)


@pytest.fixture
def start() -> Iterator[Callable[[Gate, int], Loop]]:
    """Starts loops, and ends them when the test is over."""
    loops: list[Loop] = []

    def begin(gate: Gate, steps: int) -> Loop:
        loops.append(Loop(gate, steps))
        return loops[-1]

    yield begin
    for loop in loops:
        loop.cancelled = True
        loop.thread.join(SOON_S)
        assert not loop.thread.is_alive()


def test_abort_ends_the_running_request(start: Callable[[Gate, int], Loop]) -> None:
    """abort returns once the running request has ended, early; a new one waits for resume."""
    gate = Gate()
    loop = start(gate, 100_000)
    loop.reaches(3)
    gate.pause("abort", timeout_s=SOON_S)
    assert not loop.completed
    later = start(gate, 2)
    assert not later.ended.wait(0.05)
    assert later.done == 0
    gate.resume()
    assert later.ended.wait(SOON_S)
    assert later.completed


def test_wait_lets_the_running_request_finish(start: Callable[[Gate, int], Loop]) -> None:
    """wait returns once the running request is complete; a new one waits for resume."""
    gate = Gate()
    loop = start(gate, 30)
    loop.reaches(3)
    gate.pause("wait", timeout_s=SOON_S)
    assert loop.completed
    later = start(gate, 1)
    assert not later.ended.wait(0.05)
    gate.resume()
    assert later.ended.wait(SOON_S)


def test_keep_freezes_between_two_steps_and_goes_on(start: Callable[[Gate, int], Loop]) -> None:
    """keep returns with no step running, none starts until resume, and then nothing is lost."""
    gate = Gate()
    loop = start(gate, 60)
    loop.reaches(3)
    gate.pause("keep", timeout_s=SOON_S)
    frozen_at = loop.done
    time.sleep(0.05)
    assert loop.done == frozen_at
    assert not loop.ended.is_set()
    gate.resume()
    assert loop.ended.wait(SOON_S)
    assert loop.completed


def test_wait_past_its_deadline_says_so_and_stays_paused(
    start: Callable[[Gate, int], Loop],
) -> None:
    """A request that will not end costs pause() its deadline; abort then ends it."""
    gate = Gate()
    loop = start(gate, 100_000)
    loop.reaches(1)
    with pytest.raises(WaitTimeout, match=r'pause\("wait"\) not within 0.1 s: 1 request'):
        gate.pause("wait", timeout_s=0.1)
    assert gate.mode == "wait"
    gate.pause("abort", timeout_s=SOON_S)
    assert loop.ended.is_set()


def test_frozen_request_can_be_cancelled_or_aborted(start: Callable[[Gate, int], Loop]) -> None:
    """A caller that gives up on a frozen request gets it back without resume(), and so does
    whoever turns the freeze into an abort."""
    gate = Gate()
    first, second = start(gate, 100_000), start(gate, 100_000)
    first.reaches(1)
    second.reaches(1)
    gate.pause("keep", timeout_s=SOON_S)
    first.cancelled = True
    assert first.ended.wait(SOON_S)
    assert not second.ended.is_set()
    gate.pause("abort", timeout_s=SOON_S)
    assert second.ended.is_set()
    assert [first.completed, second.completed] == [False, False]


def test_request_cancelled_before_it_started_runs_no_step(
    start: Callable[[Gate, int], Loop],
) -> None:
    """A request that waited for resume until its caller gave up must not compute anything."""
    gate = Gate()
    gate.pause("wait", timeout_s=SOON_S)
    loop = start(gate, 10)
    time.sleep(0.03)
    loop.cancelled = True
    assert loop.ended.wait(SOON_S)
    assert loop.done == 0

"""The trainer of bench/recovery.py: one fault after the other in its workers, and what it costs."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from crew import Crew, Worker
from recovery_loop import Loop
from sparsecast import Policy
from sparsecast.messages.control import WindowKind
from training import PATIENCE_S, Setting, Training

#: What a survivor may take beyond the round's deadline: a new window of NCCL costs more to open.
SLACK_S: dict[WindowKind | str, float] = {"nccl": 1.5, "gloo": 1.0, "bus": 1.0}
#: How long survivors, and a worker that was resumed, are waited for before "never" is written.
NEVER_S = 30.0


@dataclass(frozen=True, slots=True)
class Case:
    """A fault: at which moment of a round, and which signal."""

    moment: str
    number: signal.Signals
    title: str


@dataclass(frozen=True, slots=True)
class Pace:
    """How the loop trains, and how long it is looked at around each fault."""

    density: float
    interval_s: float
    around_s: float


def deadline_s(case: Case, policy: Policy, nbytes: int) -> float:
    """The deadline that the fault runs into: not ready, or not received, in time."""
    return policy.ready_s if case.moment == "idle" else policy.send_deadline_s(nbytes)


class Trainer:
    """A run whose training loop goes on while workers of its crew fail."""

    def __init__(self, setting: Setting, pace: Pace, crew: Crew) -> None:
        self._setting = setting
        self._pace = pace
        self._training = Training(setting, crew)
        self._spares: list[Worker] = []
        self._stack = ExitStack()
        #: The kind of window that the last whole crew had, and the bytes of its update.
        self.window: str | None = None
        self.nbytes = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            training = stack.enter_context(self._training)
            pace, seed = self._pace, self._setting.seed
            self._loop = Loop(
                training.publisher, training.tensors, pace.density, pace.interval_s, seed
            )
            stack.callback(self._loop.end)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stack.close()

    # ---- faults

    def prepare(self, deaths: int) -> None:
        """Have ready whoever is to replace the dead: a start in mid-measurement would disturb."""
        missing = deaths - len(self._spares)
        if missing > 0:
            self._spares += self._training.start([self._victim.name] * missing)

    @property
    def _victim(self) -> Worker:
        """The last rank: with gloo, one that others receive through would be another case."""
        return self._training.workers[-1]

    @property
    def _survivors(self) -> list[Worker]:
        return self._training.workers[:-1]

    def once(self, case: Case) -> dict[str, Any]:
        """One fault, measured; all workers are in again afterwards, or will be soon."""
        self._whole()
        victim, survivors, calls = self._victim, self._survivors, self._loop.calls
        first = len(calls)
        time.sleep(self._pace.around_s)
        self.nbytes = calls[-1][3]
        if case.moment == "idle":
            # Between two rounds, and nobody in one.
            self._loop.pause()
            self._training.all_hold(self._training.publisher.version, self._training.workers)
        victim.doomed = True
        victim.tell("fault", case.moment, case.number.value)
        at, version = victim.wait("fault", PATIENCE_S)
        if case.moment == "idle":
            version = self._training.publisher.version + 1
            self._loop.go()
        held = self._held(survivors, version, at)
        # Of a fault in mid-round, a survivor may have had that version before: the next one counts.
        following = version if case.moment == "idle" else version + 1
        next_held = self._held(survivors, following, at)
        again = self._window_again(survivors, version, at)
        over = time.monotonic()
        time.sleep(self._pace.around_s)
        back = None
        if case.number == signal.SIGSTOP:
            back = self._resume(victim)
        self._loop.pause()
        self._loop.check()
        equal = self._training.equal(survivors if back is None else self._training.workers)
        until = over if again is None else at + again
        took = [(began, 1e3 * seconds) for began, seconds, _, _ in calls[first:]]
        result = {
            "held_s": held,
            "next_s": next_held,
            "window_again_s": again,
            "back_s": back,
            "road": self._road(survivors, version),
            "publish_ms": {
                "before": [ms for began, ms in took if began < at],
                "during": [ms for began, ms in took if at <= began < until],
                "after": [ms for began, ms in took if until <= began < until + 1.5],
            },
            "digests_equal": equal,
        }
        self._replace(case, back)
        return result

    def _held(self, survivors: list[Worker], version: int, at: float) -> float | None:
        """Seconds from the fault until all survivors hold this version or a later one."""

        def all_hold() -> float | None:
            times = [worker.held(version) for worker in survivors]
            return max(t for t in times if t is not None) if None not in times else None

        found = self._look(all_hold)
        return None if found is None else max(found - at, 0.0)

    def _window_again(self, survivors: list[Worker], version: int, at: float) -> float | None:
        """Seconds from the fault until a version after the round came to all by a window."""

        def by_window() -> int | None:
            published = range(version + 1, self._training.publisher.version + 1)
            return self._training.by_window(published, survivors)

        later = self._look(by_window)
        return None if later is None else self._held(survivors, later, at)

    def _look(self, condition: Any) -> Any:
        """The condition's first result, or None if it never comes."""
        try:
            return self._training.heard.wait(condition, NEVER_S, "")
        except TimeoutError:
            self._loop.check()
            return None

    def _road(self, survivors: list[Worker], version: int) -> str:
        """How the version of the fault came to the survivors: window, log, or merged with later."""
        told = [self._training.heard.worker(version, worker.name) for worker in survivors]
        return "+".join(sorted({"merged" if one is None else one.source for one in told}))

    def _resume(self, victim: Worker) -> float | None:
        """SIGCONT; seconds until it holds what was published by then."""
        version, at = self._training.publisher.version, time.monotonic()
        victim.resume()
        victim.doomed = False
        found = self._look(lambda: victim.held(version))
        return None if found is None else max(found - at, 0.0)

    def _replace(self, case: Case, back: float | None) -> None:
        victim = self._victim
        if case.number == signal.SIGSTOP and back is not None:
            return
        victim.kill()
        if not self._spares:
            self._spares = self._training.start([victim.name])
        self._training.workers[-1] = self._spares.pop()
        self._training.join(self._training.workers[-1])

    # ---- the crew as a whole

    def _whole(self) -> None:
        """Train until one version has come to every worker by the window."""
        training = self._training
        training.check()
        start = training.publisher.version
        self._loop.go()

        def whole() -> int | None:
            self._loop.check()
            published = range(start + 1, training.publisher.version + 1)
            return training.by_window(published, training.workers)

        training.heard.wait(whole, PATIENCE_S, "every worker is in the window")
        self.window = training.publisher.window

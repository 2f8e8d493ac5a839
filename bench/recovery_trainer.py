"""The trainer of bench/recovery.py: one fault after the other in its workers, and what it costs."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch

from crew import Crew, Worker, WorkerFailed
from heard import Heard
from models import empty, fill
from recovery_loop import Loop
from recovery_worker import Config as WorkerConfig
from sparsecast import Broker, Policy, Publisher, digest
from sparsecast.messages.control import WindowKind

RUN = "recovery"
#: What a survivor may take beyond the round's deadline: a new window of NCCL costs more to open.
SLACK_S: dict[WindowKind | str, float] = {"nccl": 1.5, "gloo": 1.0, "bus": 1.0}
#: For everything that is no measurement: processes that join, weights that catch up.
PATIENCE_S = 60.0
#: How long survivors, and a worker that was resumed, are waited for before "never" is written.
NEVER_S = 30.0


@dataclass(frozen=True, slots=True)
class Case:
    """A fault: at which moment of a round, and which signal."""

    moment: str
    number: signal.Signals
    title: str


@dataclass(frozen=True, slots=True)
class Config:
    """What is run."""

    shapes: dict[str, tuple[int, ...]]
    workers: int
    device: str
    density: float
    interval_s: float
    around_s: float
    threads: int
    seed: int
    policy: Policy


def deadline_s(case: Case, policy: Policy, nbytes: int) -> float:
    """The deadline that the fault runs into: not ready, or not received, in time."""
    return policy.ready_s if case.moment == "idle" else policy.send_deadline_s(nbytes)


class Trainer:
    """Broker, publisher and loop in this process, `config.workers` workers in theirs."""

    def __init__(self, config: Config, crew: Crew) -> None:
        self._config = config
        self._crew = crew
        self._spares: list[Worker] = []
        self._workers: list[Worker] = []
        self._stack = ExitStack()
        #: The kind of window that the last whole crew had, and the bytes of its update.
        self.window: str | None = None
        self.nbytes = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        # Workers leave before the broker and the publisher do.
        self._crew.end()
        self._stack.close()

    def _open(self, stack: ExitStack) -> None:
        config = self._config
        device = torch.device(config.device, 0) if config.device == "cuda" else torch.device("cpu")
        if config.device == "cuda":
            torch.cuda.set_device(device)
        self._tensors = empty(config.shapes, device)
        fill(self._tensors, config.seed)
        self._url = stack.enter_context(Broker())
        self._publisher = stack.enter_context(
            Publisher(self._tensors, run=RUN, bus=self._url, policy=config.policy)
        )
        self._heard = Heard(self._url, RUN)
        stack.callback(self._heard.close)
        self._loop = Loop(
            self._publisher, self._tensors, config.density, config.interval_s, config.seed
        )
        stack.callback(self._loop.end)
        self._workers = self._start([f"worker-{n}" for n in range(config.workers)])
        for worker in self._workers:
            self._join(worker)

    def _start(self, names: list[str]) -> list[Worker]:
        config = self._config
        told = []
        for name in names:
            device = config.device
            if device == "cuda":
                # Beside the trainer's; with fewer GPUs than ranks some share one.
                device = f"cuda:{(1 + int(name.split('-')[1])) % torch.cuda.device_count()}"
            told.append(
                (
                    name,
                    WorkerConfig(
                        url=self._url,
                        run=RUN,
                        name=name,
                        device=device,
                        shapes=config.shapes,
                        seed=config.seed,
                        threads=config.threads,
                        policy=config.policy,
                    ),
                )
            )
        return self._crew.start(told)

    def _join(self, worker: Worker) -> None:
        worker.tell("join")
        worker.wait("joined", PATIENCE_S)

    # ---- faults

    def prepare(self, deaths: int) -> None:
        """Have ready whoever is to replace the dead: a start in mid-measurement would disturb."""
        missing = deaths - len(self._spares)
        if missing > 0:
            self._spares += self._start([self._victim.name] * missing)

    @property
    def _victim(self) -> Worker:
        """The last rank: with gloo, one that others receive through would be another case."""
        return self._workers[-1]

    @property
    def _survivors(self) -> list[Worker]:
        return self._workers[:-1]

    def once(self, case: Case) -> dict[str, Any]:
        """One fault, measured; all workers are in again afterwards, or will be soon."""
        self._whole()
        victim, survivors, calls = self._victim, self._survivors, self._loop.calls
        first = len(calls)
        time.sleep(self._config.around_s)
        self.nbytes = calls[-1][3]
        if case.moment == "idle":
            # Between two rounds, and nobody in one.
            self._loop.pause()
            self._all_hold(self._publisher.version)
        victim.doomed = True
        victim.tell("fault", case.moment, case.number.value)
        at, version = victim.wait("fault", PATIENCE_S)
        if case.moment == "idle":
            version = self._publisher.version + 1
            self._loop.go()
        held = self._held(survivors, version, at)
        # Of a fault in mid-round, a survivor may have had that version before: the next one counts.
        following = version if case.moment == "idle" else version + 1
        next_held = self._held(survivors, following, at)
        again = self._window_again(survivors, version, at)
        over = time.monotonic()
        time.sleep(self._config.around_s)
        back = None
        if case.number == signal.SIGSTOP:
            back = self._resume(victim)
        self._loop.pause()
        self._loop.check()
        equal = self._equal(survivors if back is None else self._workers)
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
        names = [worker.name for worker in survivors]

        def by_window() -> int | None:
            for later in range(version + 1, self._publisher.version + 1):
                told = [self._heard.worker(later, name) for name in names]
                if all(one is not None and one.source == "window" for one in told):
                    return later
            return None

        later = self._look(by_window)
        return None if later is None else self._held(survivors, later, at)

    def _look(self, condition: Any) -> Any:
        """The condition's first result, or None if it never comes."""
        try:
            return self._heard.wait(condition, NEVER_S, "")
        except TimeoutError:
            self._loop.check()
            return None

    def _road(self, survivors: list[Worker], version: int) -> str:
        """How the version of the fault came to the survivors: window, log, or merged with later."""
        told = [self._heard.worker(version, worker.name) for worker in survivors]
        return "+".join(sorted({"merged" if one is None else one.source for one in told}))

    def _resume(self, victim: Worker) -> float | None:
        """SIGCONT; seconds until it holds what was published by then."""
        version, at = self._publisher.version, time.monotonic()
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
            self._spares = self._start([victim.name])
        self._workers[-1] = self._spares.pop()
        self._join(self._workers[-1])

    # ---- the crew as a whole

    def _whole(self) -> None:
        """Train until one version has come to every worker by the window."""
        for worker in self._workers:
            if worker.error:
                raise WorkerFailed(f"{worker.name}: {worker.error}")
        start = self._publisher.version
        self._loop.go()

        def whole() -> bool:
            self._loop.check()
            for version in range(start + 1, self._publisher.version + 1):
                told = [self._heard.worker(version, worker.name) for worker in self._workers]
                if all(one is not None and one.source == "window" for one in told):
                    return True
            return False

        self._heard.wait(whole, PATIENCE_S, "every worker is in the window")
        self.window = self._publisher.window

    def _all_hold(self, version: int, workers: list[Worker] | None = None) -> None:
        for worker in self._workers if workers is None else workers:
            what = f"{worker.name} holds version {version}"
            self._heard.wait(partial(worker.settled, version), PATIENCE_S, what)
            if worker.error:
                raise WorkerFailed(f"{worker.name}: {worker.error}")

    def _equal(self, workers: list[Worker]) -> bool:
        """Whether these workers hold, at the trainer's version, the trainer's bits."""
        version = self._publisher.version
        self._all_hold(version, workers)
        mine = digest(self._tensors)
        for worker in workers:
            worker.tell("digest")
        return all(worker.wait("digest", PATIENCE_S) == (version, mine, 0) for worker in workers)

"""A run to be measured: broker and publisher in this process, a crew of workers in theirs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import torch

from crew import Crew, Worker, WorkerFailed
from crew_worker import Config as WorkerConfig
from heard import Heard
from models import empty, fill
from sparsecast import Broker, Policy, Publisher, digest

RUN = "bench"
#: For everything that is no measurement: processes that join, weights that catch up.
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What is run, and on what."""

    shapes: dict[str, tuple[int, ...]]
    workers: int
    device: str
    threads: int
    seed: int
    policy: Policy


class Training:
    """The run; its workers are ended before its publisher and its broker."""

    def __init__(self, setting: Setting, crew: Crew) -> None:
        self._setting = setting
        self._crew = crew
        self._stack = ExitStack()

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
        self._crew.end()
        self._stack.close()

    def _open(self, stack: ExitStack) -> None:
        setting = self._setting
        torch.set_num_threads(setting.threads)
        cuda = setting.device == "cuda"
        device = torch.device("cuda", 0) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        self.tensors = empty(setting.shapes, device)
        fill(self.tensors, setting.seed)
        self._url = stack.enter_context(Broker())
        self.publisher = stack.enter_context(
            Publisher(self.tensors, run=RUN, bus=self._url, policy=setting.policy)
        )
        self.heard = Heard(self._url, RUN)
        stack.callback(self.heard.close)
        self.workers = self.start([f"worker-{n}" for n in range(setting.workers)])
        for worker in self.workers:
            self.join(worker)

    # ---- workers

    def start(self, names: Sequence[str]) -> list[Worker]:
        """A process for each of these names, ready to join."""
        setting = self._setting
        told = []
        for name in names:
            device = setting.device
            if device == "cuda":
                # Beside the trainer's; with fewer GPUs than ranks some share one.
                device = f"cuda:{(1 + int(name.split('-')[1])) % torch.cuda.device_count()}"
            config = WorkerConfig(
                url=self._url,
                run=RUN,
                name=name,
                device=device,
                shapes=setting.shapes,
                seed=setting.seed,
                threads=setting.threads,
                policy=setting.policy,
            )
            told.append((name, config))
        return self._crew.start(told)

    def join(self, worker: Worker) -> None:
        """Let it enter the run; it is no member yet when this returns."""
        worker.tell("join")
        worker.wait("joined", PATIENCE_S)

    def check(self) -> None:
        """WorkerFailed if a worker of the run has broken."""
        for worker in self.workers:
            if worker.error:
                raise WorkerFailed(f"{worker.name}: {worker.error}")

    # ---- versions

    def by_window(self, versions: Sequence[int], workers: Sequence[Worker]) -> int | None:
        """The first of these versions that a window has brought to all of these workers, proven."""
        for version in versions:
            told = [self.heard.worker(version, worker.name) for worker in workers]
            if all(one is not None and one.source == "window" for one in told):
                return version
        return None

    def all_hold(self, version: int, workers: Sequence[Worker]) -> None:
        """Wait until these workers hold this version; TimeoutError, WorkerFailed."""
        for worker in workers:
            what = f"{worker.name} holds version {version}"
            self.heard.wait(partial(worker.settled, version), PATIENCE_S, what)
            if worker.error:
                raise WorkerFailed(f"{worker.name}: {worker.error}")

    def equal(self, workers: Sequence[Worker]) -> bool:
        """Whether these workers hold, at the trainer's version, the trainer's bits."""
        version = self.publisher.version
        self.all_hold(version, workers)
        mine = digest(self.tensors)
        for worker in workers:
            worker.tell("digest")
        return all(worker.wait("digest", PATIENCE_S) == (version, mine, 0) for worker in workers)

"""What a bench hears of a run: its metrics, and how far its log has come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sparsecast.messages import codec
from sparsecast.messages.control import LogEntry
from sparsecast.messages.metrics import Event, Metric, TrainerMetrics, WorkerMetrics
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.bus.nats import NatsBus, connect
from sparsecast.pipeline.log.jetstream import JetStreamLog
from sparsecast.workers.connect import LoopThread

T = TypeVar("T")


class Heard:
    """Listens on a loop and a connection of its own; every method is for any thread.

    Without `workers` it hears the trainer alone: decoding what many tell is work of this process.
    """

    def __init__(self, url: str, run: str, *, workers: bool = True) -> None:
        self._thread = LoopThread("bench-heard")
        self._news = threading.Condition()
        self._trainer: dict[int, TrainerMetrics] = {}
        self._workers: dict[tuple[int, str], WorkerMetrics] = {}
        self._events: list[Event] = []
        self._bus: NatsBus = self._thread.call(connect(url, name="bench", timeout_s=5))
        self._log = JetStreamLog(self._bus, run)
        subjects = Subjects(run)
        metrics = subjects.metrics_all if workers else subjects.metrics_trainer
        for subject in (metrics, subjects.events):
            self._thread.call(self._bus.subscribe(subject, self._hear))

    def _hear(self, message: Any) -> None:
        metric: Metric = codec.decode_metric(message.data, subject=message.subject)
        with self._news:
            match metric:
                case TrainerMetrics():
                    self._trainer[metric.version] = metric
                case WorkerMetrics():
                    self._workers[metric.version, metric.worker] = metric
                case Event():
                    self._events.append(metric)
            self._news.notify_all()

    def trainer(self, version: int) -> TrainerMetrics | None:
        """What the trainer said of the round that brought a version."""
        with self._news:
            return self._trainer.get(version)

    def worker(self, version: int, name: str) -> WorkerMetrics | None:
        """What a worker said of a version that it has verified."""
        with self._news:
            return self._workers.get((version, name))

    def workers(self) -> list[WorkerMetrics]:
        """All that workers have said."""
        with self._news:
            return list(self._workers.values())

    def events(self) -> list[Event]:
        """All events."""
        with self._news:
            return list(self._events)

    def wait(self, condition: Callable[[], T | None], timeout_s: float, what: str) -> T:
        """The first result that is not None and not False; TimeoutError names `what`."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = condition()
            if found:
                return found
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"not within {timeout_s:g} s: {what}")
            with self._news:
                self._news.wait(min(left, 0.02))

    def entries(self) -> list[LogEntry]:
        """What the log holds, oldest first."""
        return self._thread.call(self._log.entries(timeout_s=5))

    def wait_stored(self, version: int, timeout_s: float) -> None:
        """Until the log holds a version, so that storing it disturbs nothing that follows."""

        def stored() -> bool:
            return any(entry.version >= version for entry in self.entries())

        self.wait(stored, timeout_s, f"version {version} is in the log")

    def close(self) -> None:
        """Leave the bus."""
        self._thread.call(self._bus.close())
        self._thread.stop()

"""Rounds of sparsecast itself, through its public face, and what the run tells of them."""

from __future__ import annotations

import threading
import time
from typing import Any

from sparsecast import Publisher
from sparsecast.messages import codec
from sparsecast.messages.metrics import Metric, TrainerMetrics, WorkerMetrics
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.bus.nats import NatsBus, connect
from sparsecast.pipeline.log.jetstream import JetStreamLog
from sparsecast.workers.connect import LoopThread

Round = dict[str, float]


class Ear:
    """Hears the run's metrics and looks into its log, on a loop and connection of its own."""

    def __init__(self, url: str, run: str, *, patience_s: float, store_s: float) -> None:
        self._patience_s = patience_s
        self._store_s = store_s
        self._thread = LoopThread("bench-ear")
        self._heard: list[Metric] = []
        self._news = threading.Condition()
        self._bus: NatsBus = self._thread.call(connect(url, name="bench", timeout_s=5))
        self._log = JetStreamLog(self._bus, run)
        self._thread.call(self._bus.subscribe(Subjects(run).metrics_all, self._hear))

    def _hear(self, message: Any) -> None:
        metric = codec.decode_metric(message.data, subject=message.subject)
        with self._news:
            self._heard.append(metric)
            self._news.notify_all()

    def round(self, version: int, workers: int) -> tuple[TrainerMetrics, list[WorkerMetrics]]:
        """What the trainer and every worker said of a version; then it forgets all."""

        def here() -> list[Metric]:
            return [
                m
                for m in self._heard
                if isinstance(m, TrainerMetrics | WorkerMetrics) and m.version == version
            ]

        with self._news:
            if not self._news.wait_for(lambda: len(here()) > workers, self._patience_s):
                raise TimeoutError(f"version {version} was not told whole: {here()}")
            found = here()
            self._heard.clear()
        (trainer,) = (m for m in found if isinstance(m, TrainerMetrics))
        return trainer, [m for m in found if isinstance(m, WorkerMetrics)]

    def wait_stored(self, version: int) -> None:
        """Until the log holds a version, so that storing it disturbs no other method."""
        deadline = time.monotonic() + self._store_s
        while time.monotonic() < deadline:
            entries = self._thread.call(self._log.entries(timeout_s=5))
            if any(entry.version >= version for entry in entries):
                return
            time.sleep(0.01)
        raise TimeoutError(f"version {version} is not in the log after {self._store_s:g} s")

    def close(self) -> None:
        """Leave the bus."""
        self._thread.call(self._bus.close())
        self._thread.stop()


def measure(publisher: Publisher, ear: Ear, workers: int, *, patience_s: float) -> Round:
    """One round, from publish() until wait_applied() returns; every figure in ms.

    Returns once all have verified and the log has stored it. RuntimeError if it is not everywhere.
    """
    began = time.perf_counter()
    update = publisher.publish()
    returned = time.perf_counter()
    report = update.wait_applied(timeout_s=patience_s)
    whole = 1e3 * (time.perf_counter() - began)
    if not report.complete or len(report.applied) != workers:
        raise RuntimeError(f"version {update.version} is not everywhere: {report}")
    told, theirs = ear.round(update.version, workers)
    ear.wait_stored(update.version)
    if told.verified != workers:
        raise RuntimeError(f"version {update.version} was not proven everywhere: {told}")
    # How much of the way to go was the journal's: none where go came before its answer.
    announce_us = min(told.announce_us - told.seal_us, told.ready_us)
    return {
        "whole": whole,
        "publish": 1e3 * (returned - began),
        "wire_apply": (told.broadcast_us + told.apply_us) / 1e3,
        "bus": told.ready_us / 1e3,
        "stage_diff": told.diff_us / 1e3,
        "stage_encode": told.encode_us / 1e3,
        "stage_seal": (told.seal_us - told.diff_us - told.encode_us) / 1e3,
        "stage_announce": announce_us / 1e3,
        "stage_ready": (told.ready_us - announce_us) / 1e3,
        "stage_broadcast": told.broadcast_us / 1e3,
        "stage_apply": told.apply_us / 1e3,
        "after_verify": told.verify_us / 1e3,
        "worker_receive": max(w.receive_us for w in theirs) / 1e3,
        "worker_check": max(w.check_us for w in theirs) / 1e3,
        "worker_staged_to_applied": max(w.staged_us for w in theirs) / 1e3,
        "worker_apply": max(w.apply_us for w in theirs) / 1e3,
        "worker_verify": max(w.verify_us for w in theirs) / 1e3,
        "changed": update.changed,
        "nbytes": update.nbytes,
        "by_window": float(all(w.source == "window" for w in theirs)),
        "attempt": told.attempt,
    }

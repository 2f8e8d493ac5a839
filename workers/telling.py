"""What a publisher and a replica tell the world: metrics of every round, events for operators."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..messages import codec
from ..messages.metrics import Event, EventKind, TrainerMetrics, WorkerMetrics
from ..messages.subjects import Subjects
from ..pipeline.core.commands import Compared
from ..pipeline.core.ledger import RoundRecord
from ..pipeline.core.replica import ReplicaCore
from .driver import Outbox, Ports
from .incoming import Staged

log = logging.getLogger("sparsecast.events")


class Telling:
    """Puts metrics and events of one run on the bus."""

    def __init__(self, run: str, ports: Ports, outbox: Outbox) -> None:
        self._run = run
        self._subjects = Subjects(run)
        self._wall = ports.wall
        self._outbox = outbox

    def event(
        self,
        kind: EventKind,
        member: str,
        reason: str,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Something that an operator may want to know."""
        log.info("%s %s: %s", kind, member, reason)
        event = Event(
            time_s=self._wall(),
            run=self._run,
            kind=kind,
            member=member,
            reason=reason,
            details=None if details is None else dict(details),
        )
        self._outbox.put(self._subjects.events, codec.encode_metric(event))

    def settled(self, record: RoundRecord, epoch: int) -> None:
        """A round is over for every member."""
        applied_at = max(record.applied.values(), default=0.0)
        verified_at = max(record.verified.values(), default=0.0)
        metrics = TrainerMetrics(
            time_s=self._wall(),
            run=self._run,
            epoch=epoch,
            version=record.version,
            base_version=record.base_version,
            changed=record.changed,
            density=record.changed / record.numel if record.numel else 0.0,
            nbytes=record.nbytes,
            dense_nbytes=record.dense_nbytes,
            encoding=record.encoding,
            window=record.window,
            transport=record.transport,
            attempt=record.attempt,
            members=len(record.members),
            applied=len(record.applied),
            verified=len(record.verified),
            diff_us=record.diff_us,
            encode_us=record.encode_us,
            seal_us=_us(record.published_at, record.sealed_at),
            announce_us=_us(record.published_at, record.announced_at),
            ready_us=_us(record.sealed_at, record.went_at),
            broadcast_us=_us(record.went_at, record.received_at) if record.window else 0,
            apply_us=_us(record.received_at, applied_at),
            verify_us=_us(applied_at, verified_at),
            total_us=_us(record.published_at, applied_at),
            step=record.step,
            tags=record.tags,
        )
        self._outbox.put(self._subjects.metrics_trainer, codec.encode_metric(metrics))

    def compared(self, worker: str, core: ReplicaCore, last: Staged, command: Compared) -> None:
        """A version's digest was compared on this worker."""
        metrics = WorkerMetrics(
            time_s=self._wall(),
            run=self._run,
            worker=worker,
            epoch=core.epoch,
            version=last.version,
            base_version=-1 if last.base_version is None else last.base_version,
            lag=max((core.head or 0) - last.version, 0),
            nbytes=last.nbytes,
            source="log" if last.transport == "log" else "window",
            window=last.window,
            transport=last.transport,
            attempt=last.attempt,
            receive_us=last.receive_us,
            check_us=last.check_us,
            staged_us=last.staged_us,
            apply_us=last.apply_us,
            verify_us=command.verify_us,
            verified=command.ok,
            mismatches=core.mismatches,
            step=last.step,
        )
        self._outbox.put(self._subjects.metrics(worker), codec.encode_metric(metrics))


def _us(start: float, end: float) -> int:
    """Microseconds between two times, 0 if either never was."""
    return max(round((end - start) * 1e6), 0) if start and end else 0

"""Metrics and events, in JSON: a person can read them with `nats sub`.

docs/metrics.md is the reference.

All times are whole microseconds (`_us`), all sizes bytes (`nbytes`).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .control import Tags


class TrainerMetrics(msgspec.Struct, frozen=True, kw_only=True, tag="trainer"):
    """One a round, from the trainer, once every member has verified or its time is over."""

    #: Unix time at which the message was made, in seconds.
    time_s: float
    run: str
    epoch: int
    #: The version that the round brought, and the one that its patch starts from.
    version: int
    base_version: int
    #: Elements whose bits changed, and their share of all elements (0 to 1).
    changed: int
    density: float
    #: Bytes of the patch, and of the same weights sent dense.
    nbytes: int
    dense_nbytes: int
    #: "none", "sparse", "bitmap" or "dense": the encoding of the most of the patch's bytes.
    encoding: str
    #: Number of the window, its kind ("log" if no window carried the round), and the attempt.
    window: int
    transport: str
    attempt: int
    #: Members that the round was for, that applied it, and that verified it.
    members: int
    applied: int
    verified: int
    #: Finding what changed, and laying it out as bytes.
    diff_us: int
    encode_us: int
    #: From the call of publish() until the patch's bytes and checksum were fixed.
    seal_us: int
    #: From the call of publish() until the journal had stored the announcement.
    announce_us: int
    #: From the sealed patch until go was said to all.
    ready_us: int
    #: From go until every member had the payload in staging, checked.
    broadcast_us: int
    #: From the last receipt until the last member had applied.
    apply_us: int
    #: From the last apply until the last digest was found right.
    verify_us: int
    #: From the call of publish() until the last member had applied, by the trainer's clock.
    total_us: int
    step: int | None = None
    tags: Tags | None = None


class WorkerMetrics(msgspec.Struct, frozen=True, kw_only=True, tag="worker"):
    """One a version, from each worker, once its digest has been compared."""

    time_s: float
    run: str
    worker: str
    epoch: int
    version: int
    base_version: int
    #: Versions between the newest that was announced and this one, when its digest was compared.
    lag: int
    nbytes: int
    #: "window" or "log": the road by which the patch came.
    source: str
    window: int
    transport: str
    attempt: int
    #: Receiving into staging; checking checksum, counts, bounds and order there.
    receive_us: int
    check_us: int
    #: From staged until the weights held it, waiting for readers included; and the writing alone.
    staged_us: int
    apply_us: int
    #: The digest of the whole state.
    verify_us: int
    #: Whether the digest was the announced one, and how many have not been since the start.
    verified: bool
    mismatches: int
    step: int | None = None


EventKind = Literal[
    "claim",
    "resume",
    "rollback",
    "join",
    "leave",
    "evict",
    "window-open",
    "window-abort",
    "log-only",
    "refused",
    "resync",
    "catch-up",
    "mismatch",
    "lagging",
    "log-failed",
    "fenced",
    "bye",
]


class Event(msgspec.Struct, frozen=True, kw_only=True, tag="event"):
    """Something that an operator may want to know, on `sparsecast.<run>.events`."""

    time_s: float
    run: str
    kind: EventKind
    #: Whom it concerns: a worker's name, or "trainer".
    member: str
    #: One sentence.
    reason: str
    details: dict[str, Any] | None = None


Metric = TrainerMetrics | WorkerMetrics | Event

"""What can happen to a core. `now` travels beside them, as the driver's clock in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...messages.control import Announce, Piece, Stamp, Tags, TrainerMessage, WorkerMessage

# ---- both sides


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; the driver sends it at `next_deadline()`."""


@dataclass(frozen=True, slots=True)
class WindowOpened:
    """This side's end of the window is open."""

    epoch: int
    window: int


@dataclass(frozen=True, slots=True)
class WindowFailed:
    """This side could not open the window."""

    epoch: int
    window: int
    reason: str


@dataclass(frozen=True, slots=True)
class Close:
    """The user is done."""

    reason: str


# ---- the trainer's side


@dataclass(frozen=True, slots=True)
class Claimed:
    """The journal has accepted our claim: the run is ours from `version` on."""

    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class Publishing:
    """A publish() has begun: Published follows, unless it fails."""


@dataclass(frozen=True, slots=True)
class Published:
    """The pending patch now reaches `version`."""

    version: int


@dataclass(frozen=True, slots=True)
class Sealed:
    """The pending patch was taken and its bytes are fixed: what an announcement says of it.

    `changed` counts elements, sizes are bytes; `published_at` is when publish() was called, on
    the driver's clock. `pieces`: of a trainer of several ranks, one of each. `routes`: what each
    root sends to each class of the window of this number; empty: the same to all.
    """

    base_version: int
    version: int
    nbytes: int
    checksum: int
    digest: int
    changed: int
    numel: int
    encoding: str
    dense_nbytes: int
    published_at: float
    diff_us: int
    encode_us: int
    step: int | None = None
    tags: Tags | None = None
    pieces: tuple[Piece, ...] = ()
    routes: tuple[tuple[Piece, ...], ...] = ()
    routed: int = 0


@dataclass(frozen=True, slots=True)
class NothingTaken:
    """No patch was pending: the publish() that was to make it has failed."""


@dataclass(frozen=True, slots=True)
class Announced:
    """The journal has stored the announcement of this version."""

    version: int


@dataclass(frozen=True, slots=True)
class AnnounceFailed:
    """The journal has not: another trainer holds it, the stream is gone, or the bus is away."""

    version: int
    cause: Literal["fenced", "lost", "unavailable"]
    reason: str


@dataclass(frozen=True, slots=True)
class ReclaimFailed:
    """The run could not be made anew yet: the bus is away."""

    reason: str


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The lease could not be renewed: it is another's, or has run out."""

    reason: str


@dataclass(frozen=True, slots=True)
class FromWorker:
    """A control message of a member."""

    message: WorkerMessage


@dataclass(frozen=True, slots=True)
class Sent:
    """Our part of the broadcast is over, well or with `error`."""

    window: int
    attempt: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LogStored:
    """The log holds everything up to `version`."""

    version: int


@dataclass(frozen=True, slots=True)
class LogFailed:
    """The log could not store `version`; it is still kept here."""

    version: int
    reason: str


TrainerEvent = (
    Tick
    | WindowOpened
    | WindowFailed
    | Close
    | Claimed
    | Publishing
    | Published
    | Sealed
    | NothingTaken
    | Announced
    | AnnounceFailed
    | ReclaimFailed
    | LeaseLost
    | FromWorker
    | Sent
    | LogStored
    | LogFailed
)


# ---- the replica's side


@dataclass(frozen=True, slots=True)
class FromTrainer:
    """A control message of the trainer, or what the journal republished."""

    message: TrainerMessage


@dataclass(frozen=True, slots=True)
class Proved:
    """Our model is the claim's by its manifest, and our weights have this digest."""

    epoch: int
    manifest_hash: str
    digest: int


@dataclass(frozen=True, slots=True)
class Unfit:
    """Our model is another one than the claim's."""

    epoch: int
    difference: str


@dataclass(frozen=True, slots=True)
class Staged:
    """A payload is in staging and checked against this announcement."""

    stamp: Stamp
    announce: Announce


@dataclass(frozen=True, slots=True)
class ReceiveFailed:
    """Nothing usable came. `corrupt`: bytes came and were refused; the window itself is sound."""

    epoch: int
    window: int
    attempt: int
    version: int
    reason: str
    corrupt: bool


@dataclass(frozen=True, slots=True)
class LogItem:
    """One entry of the log, now in staging and checked."""

    base_version: int | None
    version: int
    digest: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """The log gave these, in the order to apply; or it shows which version the weights are."""

    epoch: int
    items: tuple[LogItem, ...]
    shown: int | None = None


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """The log gave nothing; `hole`: it has no way to what was asked for."""

    epoch: int
    reason: str
    hole: bool = False


@dataclass(frozen=True, slots=True)
class AppliedHere:
    """The weights hold `version`."""

    version: int
    staged_us: int
    apply_us: int


@dataclass(frozen=True, slots=True)
class ApplyFailed:
    """The weights hold what they held, unless `torn`: then they are worth nothing.

    `waiting`: only readers were in the way, and the patches are still in staging.
    """

    reason: str
    torn: bool
    waiting: bool = False


@dataclass(frozen=True, slots=True)
class Digested:
    """The digest of the whole state at `version`."""

    version: int
    digest: int
    verify_us: int


@dataclass(frozen=True, slots=True)
class DigestFailed:
    """The state could not be read."""

    version: int
    reason: str


ReplicaEvent = (
    Tick
    | WindowOpened
    | WindowFailed
    | Close
    | FromTrainer
    | Proved
    | Unfit
    | Staged
    | ReceiveFailed
    | Fetched
    | FetchFailed
    | AppliedHere
    | ApplyFailed
    | Digested
    | DigestFailed
)

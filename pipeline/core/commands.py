"""What a core asks of its driver. Each command ends in at most one event."""

from __future__ import annotations

from dataclasses import dataclass

from ...messages.control import (
    Announce,
    Claim,
    Piece,
    Stamp,
    TrainerMessage,
    WindowKind,
    WorkerMessage,
)
from ...messages.errors import SparsecastError
from ...messages.metrics import EventKind
from .follow import Reach
from .ledger import RoundRecord

# ---- both sides


@dataclass(frozen=True, slots=True)
class OpenWindow:
    """Open this window and keep it; `rank` is the first one of this side's. Ends in WindowOpened or
    WindowFailed.

    It has an end for each root, a communicator of its own: `roots` are those to open here, in this
    order, of as many as `of` says. With `classes`, those of the ranks from 1 on, each end is but
    for the ranks of one class, and the trainer has one for each: `layouts` tells it what they hold.
    """

    stamp: Stamp
    kind: WindowKind
    rank: int
    size: int
    timeout_s: float
    roots: tuple[int, ...] = (0,)
    of: int = 1
    classes: tuple[int, ...] = ()
    layouts: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class AbortWindow:
    """Break the window off; what is in it ends by its own event, or by none."""

    window: int


@dataclass(frozen=True, slots=True)
class CloseWindow:
    """Leave the idle window in order."""

    window: int


@dataclass(frozen=True, slots=True)
class Tell:
    """Put an event on the bus for operators."""

    kind: EventKind
    member: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fail:
    """It is over: every wait of the user ends with this error."""

    error: SparsecastError


# ---- the trainer's side


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message to the members."""

    message: TrainerMessage


@dataclass(frozen=True, slots=True)
class Take:
    """Take the pending patch, or the one just being made, merged onto those of `unsafe` versions.

    Ends in Sealed or NothingTaken.
    """

    unsafe: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Append:
    """Store the announcement in the journal. Ends in Announced or AnnounceFailed."""

    announce: Announce


@dataclass(frozen=True, slots=True)
class Send:
    """Broadcast the payload of stamp.version; `routed`: to each class of the window what Sealed has
    for it. Ends in Sent."""

    stamp: Stamp
    timeout_s: float
    routed: bool = False


@dataclass(frozen=True, slots=True)
class Store:
    """Store these versions in the log, merged into one entry. Ends in LogStored or LogFailed.

    After LogFailed they are kept as one patch, under the last of them.
    """

    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mend:
    """A member holds nothing, and finds no way in the log: see to it that an anchor can be had."""


@dataclass(frozen=True, slots=True)
class Reclaim:
    """The bus has forgotten the run: make its streams anew at `epoch`, with anchor and claim.

    The claim stands at the newest published version; what was pending is in its anchor.
    Ends in Claimed, ReclaimFailed (tried again by the core) or LeaseLost.
    """

    epoch: int


@dataclass(frozen=True, slots=True)
class Settled:
    """A round is over for everyone: tell its metrics."""

    record: RoundRecord


# ---- the replica's side


@dataclass(frozen=True, slots=True)
class Report:
    """Send a message to the trainer."""

    message: WorkerMessage


@dataclass(frozen=True, slots=True)
class Prove:
    """Compare our model with the claim's manifest and compute our digest.

    Ends in Proved or Unfit.
    """

    claim: Claim


@dataclass(frozen=True, slots=True)
class Receive:
    """Receive the payload into staging and check it. Ends in Staged or ReceiveFailed.

    `scratch`: this version is here already; take part, check, and drop it. `routes`: what each root
    sends to each class of the window; empty: what is announced.
    """

    stamp: Stamp
    announce: Announce
    scratch: bool
    timeout_s: float
    routes: tuple[tuple[Piece, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Apply:
    """Apply these staged versions, in order, in one hold of the guard.

    Ends in AppliedHere (of the last) or ApplyFailed.
    """

    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Digest:
    """Compute the digest of the whole state, as a reader. Ends in Digested or DigestFailed."""

    version: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Stage what the log has from `held` (None: from an anchor) on, towards `target` and as far as
    `reach` says. Ends in Fetched/FetchFailed.

    `digest` is that of weights which are no version that was announced here: if the log knows which
    one they are, that is to be told, and nothing staged.
    """

    epoch: int
    held: int | None
    target: int
    reach: Reach = "newest"
    digest: int | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """These staged versions are not needed any more (None: all)."""

    versions: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Hold:
    """The weights are proven to be at `version` as they stand: serve them as such."""

    version: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The weights are wrong: serve nothing until the next apply is through."""

    reason: str


@dataclass(frozen=True, slots=True)
class Compared:
    """A version's digest was compared with the announced one: tell its metrics."""

    version: int
    ok: bool
    verify_us: int


TrainerCommand = (
    OpenWindow
    | AbortWindow
    | CloseWindow
    | Tell
    | Fail
    | Say
    | Take
    | Append
    | Send
    | Store
    | Mend
    | Reclaim
    | Settled
)
ReplicaCommand = (
    OpenWindow
    | AbortWindow
    | CloseWindow
    | Tell
    | Fail
    | Report
    | Prove
    | Receive
    | Apply
    | Digest
    | Fetch
    | Drop
    | Hold
    | Quarantine
    | Compared
)

"""Control messages: the small talk of a round. Encoded in msgpack by `codec`.

Each docstring says who sends the message, who receives it, and what its absence means.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from .manifest import Manifest

WindowKind = Literal["nccl", "gloo", "bus"]
#: What a worker is for: rollouts, which updates wait for, or evaluation, which nobody waits for.
Role = Literal["rollout", "evaluation"]
Tags = dict[str, str | int | float | bool]


class Stamp(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Which attempt of which round in which window: ordered, a higher one supersedes a lower.

    `window` 0 is "no window" (the log alone); `attempt` 0 is the opening of the window itself.
    """

    epoch: int
    window: int
    attempt: int = 0
    version: int = 0


class Sender(msgspec.Struct, frozen=True, array_like=True):
    """Who speaks: a name, and which life of it (new with every start of the process)."""

    name: str
    incarnation: str


class Control(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What every control message carries."""

    sender: Sender


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """What one root sends of an update: its size in bytes, and their checksum."""

    nbytes: int
    checksum: int


def added(shares: Iterable[int]) -> int:
    """The digest that shares of it add up to, or the checksum of several pieces: mod 2⁶⁴."""
    return sum(shares) & ((1 << 64) - 1)


# ---- trainer → journal → members (republished, in the order of the stream)


class Claim(Control, frozen=True, kw_only=True):
    """A trainer opens an epoch: from here on, only its word counts.

    `version` is where the epoch starts, above all that was announced before: with the contents of
    this digest, which an earlier epoch may have called otherwise. Whoever holds those holds it; all
    else that earlier epochs announced is void. `nonce` is that of the claim before: another one
    says that the journal was made anew, and counts its versions from there. `roots`: what each rank
    of a trainer of several sends, as the layout of its own tensors (in msgpack, deflated), whose
    coordinates its patches are in; empty: one root, which sends the tensors of the manifest.
    Absent: the run has no trainer yet.
    """

    epoch: int
    version: int
    digest: int
    manifest: Manifest
    nonce: str
    heartbeat_s: float
    roots: tuple[bytes, ...] = ()


class Announce(Control, frozen=True, kw_only=True):
    """One update is on its way: bytes and checksum are fixed from here on.

    Members of the window in the stamp answer Ready or NotReady, unless Go has come before; others
    take it from the log. `pieces`: one of each root, if the claim names several; `nbytes` and
    `checksum` are their sums then (mod 2⁶⁴). Absent: nothing new.
    """

    stamp: Stamp
    base_version: int
    manifest_hash: str
    nbytes: int
    checksum: int
    digest: int
    changed: int
    encoding: str
    dense_nbytes: int
    step: int | None = None
    tags: Tags | None = None
    pieces: tuple[Piece, ...] = ()

    @property
    def version(self) -> int:
        """The version that the update makes."""
        return self.stamp.version


# ---- trainer → members


class Welcome(Control, frozen=True, kw_only=True):
    """The trainer knows this member. Absent: the member says Join again with each heartbeat."""

    to: Sender
    epoch: int
    version: int


class Opening(Control, frozen=True, kw_only=True):
    """A window is to be opened with these members, members[i] with ranks[i] ranks: rank 0 is the
    trainer's, then come those of members[0], those of members[1], and so on.

    `enters_at` is the version J: the log up to J, rounds of this window from J + 1. `classes`: of
    each of the members' ranks, which of the payloads are its own; ranks that hold the same are of
    one class, and have ends of the window to themselves. Empty: all receive the same.
    Each member answers Ready (attempt 0) or NotReady. Absent: no window, the log alone.
    """

    stamp: Stamp
    kind: WindowKind
    members: tuple[Sender, ...]
    ranks: tuple[int, ...]
    enters_at: int
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.members) or any(ranks < 1 for ranks in self.ranks):
            raise ValueError(f"{len(self.members)} members have {self.ranks} ranks")
        if self.classes and len(self.classes) != sum(self.ranks):
            raise ValueError(f"{sum(self.ranks)} ranks are of {len(self.classes)} classes")

    @property
    def size(self) -> int:
        """How many ranks the window has."""
        return 1 + sum(self.ranks)

    def first_rank(self, member: Sender) -> int:
        """The first of a member's ranks."""
        return 1 + sum(self.ranks[: self.members.index(member)])


class Prepare(Control, frozen=True, kw_only=True):
    """A version is being made: who can take part in its first attempt answers Ready for this stamp.

    Who cannot says nothing, since NotReady would be taken for the answer to the announcement. A
    commitment that Go does not follow expires, and costs nobody anything. Absent: the announcement
    asks.
    """

    stamp: Stamp


class Call(Control, frozen=True, kw_only=True):
    """Another attempt of an announced round: answer Ready or NotReady for this stamp."""

    stamp: Stamp


class Go(Control, frozen=True, kw_only=True):
    """All have committed: enter the collective of this stamp now (attempt 0: open the window).

    `announce` is what comes through it. It may be here before the journal has stored it: what was
    received by it is applied only once the journal has made the same announcement. `routes`: what
    each root sends to each class of a window that has classes: its patch without what they do not
    hold; empty: the whole patch. Absent: the commitment expires on the member's own clock and go
    after that is refused.
    """

    stamp: Stamp
    announce: Announce | None = None
    routes: tuple[tuple[Piece, ...], ...] = ()


class Abort(Control, frozen=True, kw_only=True):
    """The window of this stamp is dead: leave it, wherever you are in it."""

    stamp: Stamp
    reason: str


class Stored(Control, frozen=True, kw_only=True):
    """The log now reaches this version. Absent: members that are behind ask the log themselves."""

    epoch: int
    version: int


class Probe(Control, frozen=True, kw_only=True):
    """Is this life of this name still there? Answered by Heartbeat; silence gives it away."""

    to: Sender


class Refuse(Control, frozen=True, kw_only=True):
    """The trainer will not have this member: its name is in use, or its model is another one."""

    to: Sender
    code: Literal["name-in-use", "manifest", "window"]
    reason: str


class Rejoin(Control, frozen=True, kw_only=True):
    """The trainer does not know this member (any more): say Join again."""

    to: Sender


class Resync(Control, frozen=True, kw_only=True):
    """The trainer found this member's digest wrong: start again from an anchor."""

    to: Sender
    reason: str


class Beat(Control, frozen=True, kw_only=True):
    """The trainer lives, at this head. Absent for offline_s: members may refuse to generate."""

    epoch: int
    version: int


class Bye(Control, frozen=True, kw_only=True):
    """The trainer leaves the run in order; workers go on serving what they hold."""

    epoch: int


# ---- member → trainer


class Join(Control, frozen=True, kw_only=True):
    """A member wants in: its model (by manifest hash), what it offers, what it holds.

    `version` is None until the digest has shown which version the weights are. `trainer` is the
    incarnation whose claim the member follows: another of the same epoch is not meant. `gpus` names
    the GPU of each of its ranks (by UUID), "" where weights are on none or it cannot be told: an
    nccl window takes one rank a GPU. Who evaluates takes versions from the log alone, and only
    those that it follows (`follow`: "latest", "every:K" or "version:N"). `layouts`: what each rank
    holds (packed), and `held_nbytes` how many bytes that is; empty, or of a rank b"" and 0: what is
    published, or it is not told.
    """

    epoch: int
    manifest_hash: str
    offers: tuple[WindowKind, ...]
    device: str
    host: str
    pid: int
    version: int | None = None
    trainer: str = ""
    gpus: tuple[str, ...] = ("",)
    role: Role = "rollout"
    follow: str = "latest"
    layouts: tuple[bytes, ...] = ()
    held_nbytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.gpus:
            raise ValueError("a worker without a rank")
        told = len(self.gpus) if self.layouts else 0
        if (len(self.layouts), len(self.held_nbytes)) != (told, told):
            raise ValueError(f"{len(self.gpus)} ranks hold {len(self.layouts)} layouts")


class Ready(Control, frozen=True, kw_only=True):
    """Committed to this stamp for `expires_s` from now: staging is allocated, go may come."""

    stamp: Stamp
    expires_s: float


class NotReady(Control, frozen=True, kw_only=True):
    """Not this round, and why; the member takes the version from the log."""

    stamp: Stamp
    reason: str


class Opened(Control, frozen=True, kw_only=True):
    """The window of this stamp is open here, or failed to open (`error`)."""

    stamp: Stamp
    error: str | None = None


class Received(Control, frozen=True, kw_only=True):
    """The payload of this stamp is in staging and checked, or was refused (`error`)."""

    stamp: Stamp
    error: str | None = None


class Applied(Control, frozen=True, kw_only=True):
    """The weights hold this version. Times in µs on the member's clock."""

    epoch: int
    version: int
    staged_us: int = 0
    apply_us: int = 0
    source: Literal["window", "log", "held"] = "window"


class Verified(Control, frozen=True, kw_only=True):
    """The digest of the whole state at this version; `ok` if it is the announced one."""

    epoch: int
    version: int
    digest: int
    ok: bool
    verify_us: int = 0


class Refused(Control, frozen=True, kw_only=True):
    """A member refused something from the trainer: which, and why. Nothing was changed."""

    epoch: int
    version: int
    reason: str


class Heartbeat(Control, frozen=True, kw_only=True):
    """Alive, and at these versions: counts as acknowledgement of both.

    `follow`: which versions it follows, if it evaluates. `stranded`: it holds nothing, and the log
    leads to nothing that it could hold. Absent for silence_s: the member is put out of the
    membership.
    """

    epoch: int
    version: int | None
    verified: int | None
    lagging: str | None = None
    follow: str | None = None
    stranded: bool = False


class Leave(Control, frozen=True, kw_only=True):
    """The member leaves in order."""

    epoch: int
    reason: str


TrainerMessage = (
    Claim
    | Announce
    | Welcome
    | Opening
    | Prepare
    | Call
    | Go
    | Abort
    | Stored
    | Probe
    | Refuse
    | Rejoin
    | Resync
    | Beat
    | Bye
)
WorkerMessage = (
    Join | Ready | NotReady | Opened | Received | Applied | Verified | Refused | Heartbeat | Leave
)


# ---- beside the conversation


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a run; stored with a time to live, renewed by compare-and-set (trainer)."""

    holder: Sender
    host: str
    pid: int
    lease_s: float


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One stored patch or anchor, written after its chunks: if the entry is there, they are.

    A patch carries weights at any version v with base_version ≤ v < version to `version`; an
    anchor (`base_version` None) is a full copy. `name` names its chunks. `writer` is the trainer's
    incarnation: when the bus has forgotten, two trainers may claim one epoch, each in a journal of
    its own, and what one stored is nothing to followers of the other. `merged` is how many entries
    were read from the log to become this one beside them; 0: this one was announced, or is an
    anchor.

    Of a trainer of several ranks each stores its own: `root` of `roots`, in the coordinates of the
    layout of this hash; `manifest_hash` names the tensors of that, `whole` those that are
    published, and `digest` is that of the whole state. Readers of the log see these as one entry
    once all are there (pipeline/log/pieces.py), with all of them in `pieces`.
    """

    name: str
    epoch: int
    base_version: int | None
    version: int
    nbytes: int
    checksum: int
    digest: int
    manifest_hash: str
    chunks: int
    writer: str = ""
    merged: int = 0
    step: int | None = None
    tags: Tags | None = None
    root: int = 0
    roots: int = 1
    layout: str = ""
    whole: str = ""
    pieces: tuple[LogEntry, ...] = ()

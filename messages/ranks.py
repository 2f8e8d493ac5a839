"""Messages between the ranks of one worker, or of a trainer: the first one leads, the others follow
its orders.

Each docstring says who sends the message, who receives it, and what its absence means.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .control import Tags, WindowKind
from .manifest import Manifest

#: What a rank can be told to do; what comes with it is typed in workers/orders.py. First what both
#: do, then what a worker's ranks do, then a trainer's.
Deed = Literal[
    "open", "abort", "close", "alert",
    "receive", "take", "drop", "prove", "hold", "quarantine", "apply", "digest",
    "publish", "recall", "begin", "since", "roll", "seal", "send", "join", "store", "release",
    "copy", "keep",
]  # fmt: skip


class RankMessage(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """What every message between ranks carries: the life of the first rank that is meant."""

    leader: str


class Lead(RankMessage, frozen=True, kw_only=True):
    """The first rank lives (first rank → others, with each heartbeat).

    Every order up to `done` was answered by all. While `gathering`, ranks say what they are. Absent
    for silence_s: others may follow another life of it.
    """

    done: int
    gathering: bool = False


class Over(RankMessage, frozen=True, kw_only=True):
    """The first rank leaves (first rank → others): nothing follows. Absent: they find out.

    `why` is what went wrong, where something did.
    """

    why: str = ""


class Order(RankMessage, frozen=True, kw_only=True):
    """The first rank wants something done (first rank → others), which all begin in the order of
    the numbers, from 1 on. Absent: said again when a rank tells that it has not begun it, and now
    and then while it is not answered."""

    number: int
    deed: Deed
    what: msgspec.Raw


class Answer(RankMessage, frozen=True, kw_only=True):
    """What came of an order (other rank → first rank). Absent: asked for again.

    `kind` names the event or error in `what`; "" is done, and nothing to tell.
    """

    rank: int
    number: int
    kind: str = ""
    what: msgspec.Raw = msgspec.Raw(b"\xc0")


class Here(RankMessage, frozen=True, kw_only=True):
    """A rank lives (other rank → first rank, with each heartbeat). `leader` is "" while it follows
    nobody; every order up to `begun` was begun, and may be under way.

    Absent for silence_s: what is asked of the worker fails, and says that this rank is silent.
    """

    rank: int
    incarnation: str
    begun: int = 0


class Fellow(RankMessage, frozen=True, kw_only=True):
    """What a rank is (other rank → first rank, which gathers): its part of the weights, the windows
    that it can open, and the GPU that it is on (by UUID; "" for none).

    Absent: the first rank waits, up to Policy.gather_s, and says Lead meanwhile.
    """

    rank: int
    incarnation: str
    #: A Layout in msgpack, deflated: with many experts it would be larger than a message may be.
    layout: bytes
    kinds: tuple[WindowKind, ...]
    gpu: str


class Publish(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranks of a trainer publish together: `roots` are their layouts, packed, in their
    order, and `manifest` the tensors that those make up. `writer` names the first rank's life."""

    manifest: Manifest
    roots: tuple[bytes, ...]
    writer: str


class At(msgspec.Struct, frozen=True, kw_only=True):
    """A version as the first rank has made it: up to then `failed` calls of publish() had failed
    there, and `old` are the versions that rollback() had made, each with the one it is of.

    Where that is otherwise on another rank, a version of this number is another step's.
    """

    version: int
    failed: int = 0
    old: tuple[tuple[int, int], ...] = ()


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """The run starts, or starts anew, with what is published now as `version`. `made`: only if this
    is what publish() has made here so far; None: whatever that is."""

    version: int
    made: At | None = None


class Roll(msgspec.Struct, frozen=True, kw_only=True):
    """What was made again last, which was `version` and has `digest`, is for this call of
    rollback(), numbered from 1 on. `go`: all ranks have it, and the call is to publish it; or, by
    `reason`, it is not."""

    call: int
    version: int
    digest: int = 0
    go: bool = False
    reason: str = ""


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """Fix the bytes of what leads to a version from version `base` on, with what is kept of it."""

    at: At
    base: int


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """Put all kept versions up to this one into the log as one entry, whose `digest` is the whole
    state's, and whose `step` and `tags` are those of the first rank."""

    version: int
    epoch: int
    digest: int
    step: int | None = None
    tags: Tags | None = None


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """The version that a rank has published, and its share of the digest. None: it is another one
    than was asked for, and nothing was done; or `spoilt` is the entry of the log that is not what
    it says."""

    version: int
    digest: int | None
    spoilt: str = ""


AnyRankMessage = Lead | Over | Order | Answer | Here | Fellow

"""The orders of a first rank, of a worker or of a trainer: given, taken and answered, each once.

The bus may lose, double and delay messages. No I/O and no clock here: who speaks and who waits is
in leading.py and following.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from ..messages.control import Claim, LogEntry, Stamp
from ..messages.errors import LogError, LogHole, PatchError, SparsecastError, brief
from ..messages.ranks import Answer, At, Begin, Deed, Held, Order, Publish, Roll, Seal, Store
from ..pipeline.core import commands as cmd
from ..pipeline.core import events as ev

#: What comes with each order.
DEEDS: dict[Deed, Any] = {
    "open": cmd.OpenWindow,
    "abort": int,
    "close": int,
    "alert": Stamp,
    "receive": cmd.Receive,
    "take": LogEntry,
    "drop": tuple[int, ...] | None,
    "prove": Claim,
    "hold": int,
    "quarantine": str,
    "apply": tuple[int, ...],
    "digest": int,
    "publish": Publish,
    "recall": tuple[LogEntry, ...],
    "begin": Begin,
    "since": tuple[int, int],
    "roll": Roll,
    "seal": Seal,
    "send": cmd.Send,
    "join": int,
    "store": Store,
    "release": int,
    "copy": At,
    "keep": tuple[int, int, int],
}
#: Those that are nothing to a rank for which nobody waits.
FLEETING = ("open", "alert", "receive", "take", "prove", "digest", "send", "copy")
#: Those that read or write the log.
LOGGING = ("take", "recall", "store", "copy", "keep")
NOTHING = msgspec.Raw(msgspec.msgpack.encode(()))
#: What may come of one.
EVENTS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        ev.WindowOpened,
        ev.WindowFailed,
        ev.Staged,
        ev.ReceiveFailed,
        ev.Proved,
        ev.Unfit,
        ev.AppliedHere,
        ev.ApplyFailed,
        ev.Digested,
        ev.DigestFailed,
        ev.Sealed,
        ev.NothingTaken,
        ev.Sent,
        Held,
    )
}
#: How the log may fail a rank, the narrower ones first: the first rank answers to each as if it had
#: met it itself.
ERRORS: dict[str, type[SparsecastError]] = {
    kind.__name__: kind for kind in (LogHole, LogError, PatchError, SparsecastError)
}


def answer_of(order: Order, rank: int, result: Any) -> Answer:
    """The answer to an order that ended in an event, in an error, or in None."""
    kind, what = "", None
    if isinstance(result, Exception):
        # What it does not know the first rank cannot answer to: it is a worker's failure then.
        known = (name for name, error in ERRORS.items() if isinstance(result, error))
        kind = next(known, SparsecastError.__name__)
        if order.deed in LOGGING and kind == SparsecastError.__name__:
            kind = LogError.__name__  # no memory, or no bus: the log gave nothing, or took nothing
        what = result.reason if isinstance(result, LogHole) else brief(result)
    elif result is not None:
        kind, what = type(result).__name__, result
    return Answer(
        leader=order.leader,
        rank=rank,
        number=order.number,
        kind=kind,
        what=msgspec.Raw(msgspec.msgpack.encode(what)),
    )


def result_of(answer: Answer) -> Any:
    """What an answer tells: an event, an error, or None (msgspec.DecodeError, KeyError).

    The rank is named in what has a reason.
    """
    if not answer.kind:
        return None
    who = f"rank {answer.rank}: "
    if answer.kind not in EVENTS:
        return ERRORS[answer.kind](who + msgspec.msgpack.decode(answer.what, type=str))
    event = msgspec.msgpack.decode(answer.what, type=EVENTS[answer.kind])
    for words in ("reason", "difference"):
        if hasattr(event, words):
            event = replace(event, **{words: who + getattr(event, words)})
    return event


@dataclass(slots=True)
class Given:
    """The first rank's side: orders, and who has still to answer each."""

    leader: str
    ranks: frozenset[int]
    _number: int = 0
    _open: dict[int, tuple[Order, set[int]]] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Every order up to this one was answered by all."""
        return min(self._open, default=self._number + 1) - 1

    @property
    def waiting(self) -> int:
        """How many orders wait for an answer."""
        return len(self._open)

    def give(self, deed: Deed, what: Any) -> Order:
        """The next order, for all ranks."""
        self._number += 1
        raw = msgspec.Raw(msgspec.msgpack.encode(what))
        order = Order(leader=self.leader, number=self._number, deed=deed, what=raw)
        self._open[order.number] = order, set(self.ranks)
        return order

    def answered(self, rank: int, number: int) -> bool:
        """A rank has answered; whether that is news."""
        order, left = self._open.get(number, (None, set()))
        if order is None or rank not in left:
            return False
        left.remove(rank)
        if not left:
            del self._open[number]
        return True

    def void(self, number: int) -> None:
        """Nobody waits for this order any more: who has not begun it is to do nothing for it, if it
        is one that matters to who waits alone."""
        order, left = self._open.get(number, (None, set()))
        if order is not None and order.deed in FLEETING:
            self._open[number] = msgspec.structs.replace(order, deed="drop", what=NOTHING), left

    def unanswered(self, rank: int) -> list[Order]:
        """What a rank is to be told again, for it or its answer may have been lost."""
        return [order for order, left in self._open.values() if rank in left]


@dataclass(slots=True)
class Taken:
    """Another rank's side: the orders of one life of the first rank, and what it was answered."""

    leader: str
    #: Every order up to this one was begun.
    begun: int = 0
    _early: dict[int, Order] = field(default_factory=dict)
    _answers: dict[int, Answer] = field(default_factory=dict)

    def hear(self, order: Order) -> list[Order]:
        """An order has come; those that are to be begun now, in their order."""
        if order.number > self.begun:
            self._early[order.number] = order
        now = []
        while self.begun + 1 in self._early:
            self.begun += 1
            now.append(self._early.pop(self.begun))
        return now

    def answer(self, answer: Answer) -> None:
        """Keep an answer until all have answered."""
        self._answers[answer.number] = answer

    def repeat(self, order: Order) -> Answer | None:
        """The answer that was given to an order, if it was."""
        return self._answers.get(order.number)

    def done(self, number: int) -> None:
        """Every order up to this one was answered by all."""
        for known in [one for one in self._answers if one <= number]:
            del self._answers[known]


def decode_what(order: Order) -> Any:
    """What comes with an order (msgspec.DecodeError)."""
    return msgspec.msgpack.decode(order.what, type=DEEDS[order.deed])

"""Old states that another rank of a trainer makes again, and the calls of rollback() they are for.

A state machine: no I/O and no clock here. Who waits, and for what, is in contributor.py.
"""

from __future__ import annotations

from ..messages.errors import LocalProtocolError
from ..messages.ranks import Roll
from .outgoing import Past


class Rolls:
    """What the first rank asks for and says, and the calls of rollback() on this rank.

    Calls are numbered on each rank by itself, from 1 on. A state is made again at an order, set
    aside for a call, and given to it once every rank has it. What the first rank has published
    after a call was given up here goes to the next one that asks; that it has failed, to nobody.
    """

    def __init__(self) -> None:
        #: The state that was asked for last, once it is made, and how often one was asked for.
        self._made: Past | None = None
        self._asked = 0
        #: What is set aside, and for which call.
        self._aside: tuple[int, Past] | None = None
        #: The first call of which the first rank has not said how it ended, and later ones of which
        #: it has.
        self._open = 1
        self._ended: set[int] = set()
        #: What is known of calls that have not gone on yet, by their numbers.
        self._ready: dict[int, tuple[Roll, Past | None]] = {}
        #: The last call here, and those that wait no more, though nothing has come of them.
        self._entered = 0
        self._given_up: set[int] = set()

    # ---- states

    def ask(self) -> int:
        """A state is to be made, and none that was asked for before is needed; its number."""
        self._made = None
        self._asked += 1
        return self._asked

    def made(self, number: int, past: Past) -> None:
        """It is made again; kept, unless something else was asked for meanwhile, or nothing."""
        if number == self._asked:
            self._made = past

    def take(self, digest: int) -> Past:
        """The state that was asked for last, if it has this digest (LocalProtocolError)."""
        past = self._made
        self.forget()
        if past is None or digest != past.digest:
            raise LocalProtocolError("that old state was not made again here")
        return past

    def forget(self) -> None:
        """No state is needed, nor what is being made of one."""
        self.ask()

    # ---- calls

    def hear(self, roll: Roll) -> None:
        """What the first rank says of a call (LocalProtocolError: it has nothing to publish)."""
        if not (roll.go or roll.reason):
            self._aside = roll.call, self.take(roll.digest)
            return
        call, past = self._aside or (0, None)
        if call == roll.call:
            self._aside = None
        elif roll.go:
            raise LocalProtocolError("what is to be published again was not made here")
        if roll.reason and roll.call == self._open:  # a later one's turn had not come
            self.forget()
        self._ended.add(roll.call)
        while self._open in self._ended:
            self._ended.remove(self._open)
            self._open += 1
        if roll.reason and roll.call in self._given_up:
            self._given_up.remove(roll.call)
        else:
            self._ready[roll.call] = roll, None if roll.reason else past

    def enter(self) -> int:
        """A call begins to wait; its number."""
        self._entered += 1
        return self._entered

    def next(self, call: int) -> tuple[Roll, Past | None] | None:
        """What a call that waits is to do, and what it is to publish; None: it is not known."""
        late = [one for one in self._ready if one in self._given_up]
        known = min([*late, *({call} & self._ready.keys())], default=None)
        if known is None:
            return None
        if known != call:
            self._given_up ^= {known, call}
        return self._ready.pop(known)

    def give_up(self, call: int) -> None:
        """A call waits no more."""
        roll, _ = self._ready.get(call, (None, None))
        if roll is not None and roll.reason:
            del self._ready[call]
        else:
            self._given_up.add(call)

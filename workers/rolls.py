"""Old states that another rank of a trainer makes again, and the calls of rollback() they are for.

A state machine: no I/O and no clock here. Who waits, and for what, is in contributor.py.
"""

from __future__ import annotations

from ..messages.errors import LocalProtocolError
from ..messages.ranks import Roll
from .outgoing import Past


class Rolls:
    """What the first rank asks for and says, and the call of rollback() that this rank is at.

    Calls are numbered on each rank by itself, from 1 on. A state is made again at an order, set
    aside for a call, and given to it once every rank has it.
    """

    def __init__(self) -> None:
        #: The state that was asked for last, once it is made, and how often one was asked for.
        self._made: Past | None = None
        self._asked = 0
        #: What is set aside, and for which call.
        self._aside: tuple[int, Past] | None = None
        #: What the calls may go on with, by their numbers; the last that did, and the one that was
        #: given up here.
        self._ready: dict[int, tuple[Roll, Past | None]] = {}
        self._called = 0
        self._given_up = 0

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
        if roll.reason and roll.call == self._called + 1:  # else another one's is being made
            self.forget()
        if roll.call > self._called:
            self._ready[roll.call] = roll, None if roll.reason else past
            self._pass_over()

    def next(self) -> tuple[Roll, Past | None] | None:
        """What the call that waits is to do, and what it is to publish; None: it is not known."""
        found = self._ready.pop(self._called + 1, None)
        if found is not None:
            self._called += 1
        return found

    def give_up(self) -> None:
        """The call that waits does so no more. Another one may still find what it waited for; but
        that it was not to be had is no answer to that."""
        self._given_up = self._called + 1
        self._pass_over()

    def _pass_over(self) -> None:
        """The call that was given up is over if it has failed on the first rank."""
        roll, _ = self._ready.get(self._given_up, (None, None))
        if roll is not None and roll.reason and roll.call == self._called + 1:
            del self._ready[roll.call]
            self._called = roll.call

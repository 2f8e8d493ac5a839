"""The calls of rollback() on another rank of a trainer: each finds what is meant for it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecast import LocalProtocolError
from sparsecast.messages.ranks import Roll
from sparsecast.workers.outgoing import Past
from sparsecast.workers.rolls import Rolls


def said(call: int, reason: str = "", *, go: bool = False) -> Roll:
    """What the first rank says of a call."""
    return Roll(call=call, version=call, digest=10 * call, go=go, reason=reason)


def past(call: int) -> Past:
    """The state that a call is to publish."""
    return Past(version=call, digest=10 * call, tensors={})


def hand_out(rolls: Rolls, call: int, *, fails: bool) -> None:
    """A call on the first rank, as it is heard here."""
    rolls.made(rolls.ask(), past(call))
    if not fails:
        rolls.hear(said(call))
    rolls.hear(said(call, "gone" if fails else "", go=not fails))


def test_a_state_is_kept_for_who_asked_last() -> None:
    """Another way was asked for while one was made; none is needed; another digest is meant."""
    rolls = Rolls()
    first, second = rolls.ask(), rolls.ask()
    rolls.made(second, past(2))
    rolls.made(first, past(1))
    assert rolls.take(20) == past(2)
    with pytest.raises(LocalProtocolError, match="not made again here"):
        rolls.take(20)
    number = rolls.ask()
    rolls.forget()
    rolls.made(number, past(1))
    with pytest.raises(LocalProtocolError):
        rolls.take(10)
    rolls.made(rolls.ask(), past(1))
    with pytest.raises(LocalProtocolError):
        rolls.take(20)


def test_a_call_goes_on_once_all_ranks_have_the_state() -> None:
    """Set aside is not enough; and who has set nothing aside has nothing to go on with."""
    rolls = Rolls()
    rolls.made(rolls.ask(), past(1))
    rolls.hear(said(1))
    assert rolls.next() is None
    rolls.hear(said(1, go=True))
    assert rolls.next() == (said(1, go=True), past(1))
    assert rolls.next() is None
    with pytest.raises(LocalProtocolError, match="was not made here"):
        rolls.hear(said(2, go=True))


def test_what_fails_once_it_is_set_aside() -> None:
    """Another rank does not have it: the call hears why, and the state is let go of."""
    rolls = Rolls()
    rolls.made(rolls.ask(), past(1))
    rolls.hear(said(1))
    rolls.hear(said(1, "rank 2 has it no more"))
    assert rolls.next() == (said(1, "rank 2 has it no more"), None)
    assert rolls._aside is None


def test_a_later_call_is_broken_off_while_a_state_is_made() -> None:
    """It waited its turn on the first rank: the state is another call's, and stays."""
    rolls = Rolls()
    number = rolls.ask()
    rolls.hear(said(2, "it was broken off"))
    rolls.made(number, past(1))
    rolls.hear(said(1))
    rolls.hear(said(1, go=True))
    assert rolls.next() == (said(1, go=True), past(1))
    assert rolls.next() == (said(2, "it was broken off"), None)


@given(
    fails=st.lists(st.booleans(), max_size=6),
    events=st.lists(st.sampled_from(["hear", "wait", "give up"]), max_size=20),
)
def test_no_state_is_missed_and_no_old_failure_is_an_answer(
    fails: list[bool], events: list[str]
) -> None:
    """Calls of the first rank that succeed and fail, heard at any time; a rank that waits, gives up
    and asks again: what succeeded it finds in its order, once, and of a call that it gave up it
    never hears that it has failed."""
    rolls, found, given_up = Rolls(), list[int](), set[int]()
    calls = iter(enumerate(fails, 1))

    def wait() -> bool:
        now = rolls.next()
        if now is None:
            return False
        roll, state = now
        assert not (roll.reason and roll.call in given_up)
        assert (state is None) == bool(roll.reason) == fails[roll.call - 1]
        found.extend([] if roll.reason else [roll.call])
        return True

    for event in events:
        if event == "hear":
            for call, failed in itertools.islice(calls, 1):
                hand_out(rolls, call, fails=failed)
        elif event == "wait":
            wait()
        else:
            given_up.add(rolls._called + 1)
            rolls.give_up()
    for call, failed in calls:
        hand_out(rolls, call, fails=failed)
    while wait():
        pass
    assert found == [call for call, failed in enumerate(fails, 1) if not failed]

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
    call = rolls.enter()
    rolls.made(rolls.ask(), past(1))
    rolls.hear(said(1))
    assert rolls.next(call) is None
    rolls.hear(said(1, go=True))
    assert rolls.next(call) == (said(1, go=True), past(1))
    assert rolls.next(rolls.enter()) is None
    with pytest.raises(LocalProtocolError, match="was not made here"):
        rolls.hear(said(2, go=True))


def test_what_fails_once_it_is_set_aside() -> None:
    """Another rank does not have it: the call hears why, and the state is let go of."""
    rolls = Rolls()
    rolls.made(rolls.ask(), past(1))
    rolls.hear(said(1))
    rolls.hear(said(1, "rank 2 has it no more"))
    assert rolls.next(rolls.enter()) == (said(1, "rank 2 has it no more"), None)
    assert rolls._aside is None


def test_a_later_call_is_broken_off_while_a_state_is_made() -> None:
    """It waited its turn on the first rank: the state is another call's, and stays."""
    rolls = Rolls()
    number = rolls.ask()
    rolls.hear(said(2, "it was broken off"))
    rolls.made(number, past(1))
    rolls.hear(said(1))
    rolls.hear(said(1, go=True))
    assert rolls.next(rolls.enter()) == (said(1, go=True), past(1))
    assert rolls.next(rolls.enter()) == (said(2, "it was broken off"), None)


def test_a_state_goes_with_the_call_it_is_for_though_this_rank_is_behind() -> None:
    """The first rank's second call fails before this rank has made its first: the state that was
    made for that is let go of all the same."""
    rolls = Rolls()
    hand_out(rolls, 1, fails=False)
    rolls.made(rolls.ask(), past(2))
    rolls.hear(said(2, "gone"))
    assert rolls._made is None
    assert rolls.next(rolls.enter()) == (said(1, go=True), past(1))


def test_calls_that_were_given_up_together() -> None:
    """Two calls were broken off on all ranks before a word of them was heard here: the third one
    finds its own."""
    rolls = Rolls()
    for call in (rolls.enter(), rolls.enter()):
        rolls.give_up(call)
    hand_out(rolls, 1, fails=True)
    hand_out(rolls, 2, fails=True)
    hand_out(rolls, 3, fails=False)
    assert rolls.next(rolls.enter()) == (said(3, go=True), past(3))


@given(
    fails=st.lists(st.booleans(), max_size=6),
    events=st.lists(st.sampled_from(["hear", "enter", "wait", "give up"]), max_size=24),
)
def test_no_state_is_missed_and_no_old_failure_is_an_answer(
    fails: list[bool], events: list[str]
) -> None:
    """Calls of the first rank that succeed and fail, heard at any time; calls here that wait, are
    given up and are made again: what succeeded they find in its order, once, and of a call that
    was given up none hears that it has failed."""
    rolls, found, given_up, waiting = Rolls(), list[int](), set[int](), list[int]()
    calls = iter(enumerate(fails, 1))

    def wait() -> bool:
        now = rolls.next(waiting[0]) if waiting else None
        if now is None:
            return False
        roll, state = now
        assert not (roll.reason and roll.call in given_up)
        assert (state is None) == bool(roll.reason) == fails[roll.call - 1]
        found.extend([] if roll.reason else [roll.call])
        waiting.pop(0)
        return True

    for event in events:
        if event == "hear":
            for call, failed in itertools.islice(calls, 1):
                hand_out(rolls, call, fails=failed)
        elif event == "enter":
            waiting.append(rolls.enter())
        elif event == "wait":
            wait()
        elif waiting:
            given_up.add(waiting[-1])
            rolls.give_up(waiting.pop())
    for call, failed in calls:
        hand_out(rolls, call, fails=failed)
    while wait() or rolls._ready:
        waiting = waiting or [rolls.enter()]
    assert found == [call for call, failed in enumerate(fails, 1) if not failed]
    assert rolls._aside is rolls._made is None

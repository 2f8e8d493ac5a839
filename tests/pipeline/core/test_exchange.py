"""The exchange as a table: which event moves it where, and the reason it gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecast.messages.control import Sender, Stamp
from sparsecast.messages.errors import LocalProtocolError
from sparsecast.pipeline.core.exchange import Exchange, Phase

A, B, C = (Sender(name, "1") for name in ("a", "b", "c"))
STRANGER = Sender("a", "2")


def gathering() -> Exchange:
    """An exchange of a, b and c that begins at 10 s."""
    return Exchange(Stamp(1, 2, 1, 3), (A, B, C), 10.0, 2.0, 5.0)


def working() -> Exchange:
    """The same once all are ready, at 11 s."""
    exchange = gathering()
    assert [exchange.ready(m, 11.0) for m in (A, B, C)] == [False, False, True]
    return exchange


def test_the_last_ready_is_the_one_that_says_go() -> None:
    """Two commit and are told to wait by name; the third one's commitment starts the work."""
    exchange = gathering()
    assert exchange.reason == "nobody has answered yet"
    assert not exchange.ready(A, 10.1)
    assert not exchange.ready(A, 10.2), "the same commitment twice counts once"
    assert exchange.reason == "1/3 ready, waiting for b, c"
    assert not exchange.ready(STRANGER, 10.2), "another life of the name is not in it"
    assert not exchange.ready(C, 10.3)
    assert exchange.ready(B, 10.4)
    assert (exchange.phase, exchange.reason) == (Phase.WORKING, "all 3 are ready")
    assert exchange.deadline == 15.4
    assert not exchange.ready(B, 10.5), "go is said once"


def test_silence_while_gathering_leaves_the_silent_out() -> None:
    """One never answers: at the deadline, not before, it alone is left out, by name."""
    exchange = gathering()
    exchange.ready(A, 10.1)
    exchange.ready(C, 10.1)
    exchange.tick(11.99)
    assert exchange.phase is Phase.GATHERING
    exchange.tick(12.0)
    assert (exchange.phase, exchange.left_out) == (Phase.FAILED, (B,))
    assert exchange.reason == "b not ready within 2 s"
    assert exchange.deadline is None


def impatient(straggler_s: float) -> Exchange:
    """An exchange of a, b and c that two are enough for."""
    exchange = gathering()
    exchange.quorum, exchange.straggler_s = 2, straggler_s
    return exchange


def test_once_the_quorum_has_committed_the_others_have_little_time_left() -> None:
    """Two of three are enough: the third has half a second from then on, not all of ready_s."""
    exchange = impatient(0.5)
    exchange.ready(A, 10.1)
    assert exchange.deadline == 12.0, "one is no quorum"
    exchange.ready(C, 10.4)
    assert exchange.deadline == 10.9
    exchange.tick(10.89)
    assert exchange.phase is Phase.GATHERING
    exchange.tick(10.9)
    assert (exchange.phase, exchange.left_out) == (Phase.FAILED, (B,))
    assert exchange.reason == "b not ready 0.5 s after 2 others were"


def test_who_commits_in_that_time_is_in() -> None:
    """The third one's commitment comes just in time: all are ready."""
    exchange = impatient(0.5)
    assert [exchange.ready(m, at) for m, at in ((A, 10.0), (B, 10.2), (C, 10.6))] == [
        False, False, True,
    ]  # fmt: skip


def test_stragglers_are_given_no_more_than_ready_s() -> None:
    """The quorum commits late, and the patience with the rest is long: ready_s ends it."""
    exchange = impatient(5.0)
    exchange.ready(A, 11.8)
    exchange.ready(B, 11.9)
    assert exchange.deadline == 12.0
    exchange.tick(12.0)
    assert (exchange.left_out, exchange.reason) == ((C,), "c not ready within 2 s")


def test_time_that_does_not_count_yet_is_not_taken_from_stragglers() -> None:
    """All but one commit before the journal has the announcement: from there on counts the time of
    the last one, with no patience at all too."""
    exchange = impatient(0.0)
    exchange.ready(A, 10.0)
    exchange.ready(B, 10.0)
    exchange.began = 10.7
    assert exchange.deadline == 10.7


def test_a_refusal_while_gathering_is_blamed_and_one_in_the_collective_is_not() -> None:
    """NotReady leaves its sender out; a failed receive may be the fault of a dead peer."""
    refused = gathering()
    refused.refuse(B, "its staging is full", 10.5)
    assert (refused.left_out, refused.reason) == ((B,), "b is out: its staging is full")
    failed = working()
    failed.refuse(B, "the connection broke", 11.5)
    assert (failed.phase, failed.left_out) == (Phase.FAILED, ())


def test_done_takes_every_report_and_the_trainers_own_part() -> None:
    """All members are through before our send returns: it is done only when that does too."""
    exchange = working()
    for member in (A, B):
        exchange.report(member, None, 11.1)
    assert exchange.reason == "2/3 through, waiting for c"
    exchange.report(C, "checksum", 11.2)
    assert exchange.reason == "3/3 through, waiting for the trainer"
    exchange.local(None, 11.3)
    assert (exchange.phase, exchange.reason) == (Phase.DONE, "refused by c")
    assert exchange.reports == {A: None, B: None, C: "checksum"}


def test_who_has_reported_may_leave() -> None:
    """A member that has the payload dies before the others have it: nothing is lost."""
    exchange = working()
    exchange.report(A, None, 11.1)
    exchange.refuse(A, "unheard for 4.0 s", 11.2)
    assert exchange.phase is Phase.WORKING


@pytest.mark.parametrize(("sent", "blamed"), [(True, (C,)), (False, ())], ids=["sent", "stuck"])
def test_blame_in_the_collective_needs_our_own_part_done(
    sent: bool, blamed: tuple[Sender, ...]
) -> None:
    """Where our own send hangs, a dead peer may be holding up sound ones: nobody is blamed."""
    exchange = working()
    if sent:
        exchange.local(None, 11.1)
    exchange.report(A, None, 11.2)
    exchange.report(B, None, 11.2)
    exchange.tick(16.0)
    assert (exchange.phase, exchange.left_out) == (Phase.FAILED, blamed)
    assert exchange.reason == "c not through within 5 s"


def test_our_own_failure_blames_nobody_and_out_of_turn_is_our_own_bug() -> None:
    """A failed send fails it at once; a result before go can only be a bug of ours."""
    exchange = working()
    exchange.local("the device is gone", 11.1)
    assert exchange.left_out == ()
    assert exchange.reason == "the trainer's side failed: the device is gone"
    with pytest.raises(LocalProtocolError, match="gathering"):
        gathering().local(None, 10.1)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["ready", "refuse", "report", "bad", "tick"]),
        st.sampled_from([A, B, C, STRANGER]),
        st.floats(0.0, 3.0),
    ),
    max_size=40,
)


@given(EVENTS)
def test_any_order_of_events_keeps_the_promises(events: list[tuple[str, Sender, float]]) -> None:
    """Go only after all three have committed; over is over; a deadline exists until then."""
    exchange, now, committed = gathering(), 10.0, set()
    for what, who, passed in events:
        now += passed
        over, before = exchange.over, exchange.reason
        match what:
            case "ready":
                late = exchange.phase is not Phase.GATHERING
                go = exchange.ready(who, now)
                committed |= set() if late else {who}
                assert not go or committed >= {A, B, C}
            case "refuse":
                exchange.refuse(who, "no", now)
            case "tick":
                exchange.tick(now)
            case _:
                exchange.report(who, None if what == "report" else "bad", now)
        assert not over or (exchange.over and exchange.reason == before)
        assert exchange.over == (exchange.deadline is None)
        assert exchange.phase is not Phase.WORKING or committed >= {A, B, C}
        assert set(exchange.left_out) <= {A, B, C}

"""Rounds that go before the journal is asked, seen by the trainer."""

from typing import Any

import pytest

from sparsecast.messages import control as msg
from sparsecast.messages.control import Sender, Stamp
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.core.trainer import State
from toytalk import POLICY, TRAINER, A, B, TrainerTalk

#: The first round of a trainer with two members goes through its second window.
STAMP = Stamp(1, 2, 1, 1)


def preparing(*ready: Sender, expires_s: float = 5.0) -> TrainerTalk:
    """A publish() has begun with members a and b, and these have committed to its round."""
    talk = TrainerTalk(A, B)
    talk.feed(ev.Publishing())
    assert [m.stamp for m in talk.said(msg.Prepare)] == [STAMP]
    assert talk.only(cmd.Take) is not None
    for member in ready:
        assert talk.hear(msg.Ready(sender=member, stamp=STAMP, expires_s=expires_s)) == []
    return talk


def under_way() -> tuple[TrainerTalk, msg.Announce]:
    """Both had committed: their collective runs, and the journal has not answered yet."""
    talk = preparing(A, B)
    append = talk.seal(1)
    assert append is not None
    return talk, append.announce


def received(talk: TrainerTalk) -> list[Any]:
    """The collective is over everywhere; all that was said of it."""
    out = talk.feed(ev.Sent(STAMP.window, STAMP.attempt))
    for member in (A, B):
        out += talk.hear(msg.Received(sender=member, stamp=STAMP))
    return out


def test_all_are_ready_when_the_patch_is() -> None:
    """Go leaves with the announcement, before the append; the round ends when both the collective
    is over and the journal has answered, and its times are those of what happened."""
    talk, announce = under_way()
    assert [type(command) for command in talk.out] == [cmd.Say, cmd.Send, cmd.Append]
    assert talk.said(msg.Go) == [msg.Go(sender=TRAINER, stamp=STAMP, announce=announce)]
    went = talk.now
    talk.feed(ev.Announced(1), 0.25)
    assert talk.core.head == 0
    talk.now += 0.5
    received(talk)
    assert (talk.core.head, talk.core.state) == (1, State.IDLE)
    record = talk.core.record(1)
    assert record is not None
    times = record.went_at, record.announced_at, record.received_at
    assert times == (went, went + 0.25, went + 0.75)


def test_the_journal_answers_after_the_collective_is_over() -> None:
    """Everyone has received: the round is not over, nothing new is taken, and nobody spins."""
    talk, _ = under_way()
    received(talk)
    over = talk.now
    talk.feed(ev.Published(2))
    out = talk.wait(1.0, alive=[A, B])
    assert [command for command in out if not isinstance(command, cmd.Say)] == []
    assert talk.core.state is State.ROUND
    talk.feed(ev.Announced(1))
    assert talk.core.head == 1
    assert talk.only(cmd.Take) is not None
    record = talk.core.record(1)
    assert record is not None
    assert (record.received_at, record.announced_at) == (over, talk.now)


def test_one_is_late() -> None:
    """One has not committed when the patch is there: it is asked by the announcement. Its answer to
    either lets all go, since Go brings the announcement along."""
    talk = preparing(A)
    append = talk.seal(1)
    assert [type(command) for command in talk.out] == [cmd.Append]
    talk.hear(msg.Ready(sender=B, stamp=STAMP, expires_s=5.0))
    assert append is not None
    assert [m.announce for m in talk.said(msg.Go)] == [append.announce]
    assert talk.only(cmd.Send).stamp == STAMP


def test_not_ready_while_the_patch_is_made_costs_nothing() -> None:
    """A member takes its word back, or says no: the announcement asks it again, and it is out only
    if it does not answer that."""
    talk = preparing(A, B)
    assert talk.hear(msg.NotReady(sender=B, stamp=STAMP, reason="a reader is in the way")) == []
    talk.seal(1)
    assert talk.said(msg.Go) == []
    talk.feed(ev.Announced(1))
    talk.hear(msg.Ready(sender=B, stamp=STAMP, expires_s=5.0))
    assert [m.stamp for m in talk.said(msg.Go)] == [STAMP]
    assert talk.core.membership.members["b"].strikes == 0


def test_silence_while_the_patch_is_made_costs_nothing() -> None:
    """The diff takes far longer than members have to answer: nobody is late before the journal has
    the announcement."""
    talk = preparing()
    out = talk.wait(3 * POLICY.ready_s, alive=[A, B])
    talk.seal(1)
    out += talk.wait(3 * POLICY.ready_s, alive=[A, B])
    assert talk.told("evict", out) == talk.told("window-abort", out) == []
    talk.feed(ev.Announced(1))
    out = talk.wait(POLICY.ready_s + 0.01, alive=[A, B])
    assert talk.told("evict", out) == [f"a, b not ready within 2 s; out for {n} s" for n in (1, 1)]


@pytest.mark.parametrize(("waited_s", "goes"), [(2.9, True), (3.1, False)])
def test_a_commitment_that_is_about_to_expire_does_not_count(waited_s: float, goes: bool) -> None:
    """A member said five seconds: less than ready_s of them is left when the patch is there."""
    talk = preparing(A, B, expires_s=5.0)
    talk.wait(waited_s, alive=[A, B])
    talk.seal(1)
    assert bool(talk.said(msg.Go)) == goes


def test_a_commitment_heard_twice_does_not_count_for_longer() -> None:
    """The network doubles a member's word, and the second one comes three seconds later."""
    talk = preparing(A, B)
    talk.hear(msg.Ready(sender=B, stamp=STAMP, expires_s=5.0), 3.1)
    talk.seal(1)
    assert talk.said(msg.Go) == []


def test_a_publish_that_fails() -> None:
    """Nothing was pending: no window goes, nobody is struck, and the next one prepares the same
    version again."""
    talk = preparing(A, B)
    assert talk.feed(ev.NothingTaken()) == []
    assert talk.core.state is State.IDLE
    talk.feed(ev.Publishing())
    assert [m.stamp for m in talk.said(msg.Prepare)] == [STAMP]
    talk.go(STAMP, A, B)
    talk.seal(1)
    assert [m.stamp for m in talk.said(msg.Go)] == [STAMP]


def test_two_publishes_merge_into_another_version_than_was_prepared() -> None:
    """The second one was done before the patch was taken: members commit to what is announced."""
    talk = preparing(A, B)
    talk.feed(ev.Published(1))
    talk.feed(ev.Publishing())
    talk.feed(ev.Published(2))
    append = talk.seal(2, base=0)
    assert [type(command) for command in talk.out] == [cmd.Append]
    assert append is not None
    talk.feed(ev.Announced(2))
    talk.go(append.announce.stamp, A, B)
    assert [m.stamp.version for m in talk.said(msg.Go)] == [2]


def test_what_waits_for_a_round_is_prepared_as_well() -> None:
    """Published while a round was in flight: members commit while its patches are merged."""
    talk, _ = under_way()
    talk.feed(ev.Publishing())
    assert talk.out == []
    talk.feed(ev.Published(2))
    talk.feed(ev.Published(3))
    talk.feed(ev.Announced(1))
    stamp = Stamp(1, 2, 1, 3)
    assert [m.stamp for m in talk.said(msg.Prepare, received(talk))] == [stamp]
    talk.go(stamp, A, B)
    talk.seal(3, base=1)
    assert [m.stamp for m in talk.said(msg.Go)] == [stamp]


@pytest.mark.parametrize("what", ["no window", "a window is called for", "an answer is due"])
def test_nothing_is_prepared_while_something_is_in_the_way(what: str) -> None:
    """A publish() begins, and its round could not: what is published is taken later."""
    talk = TrainerTalk(*[] if what == "no window" else [A])
    if what == "a window is called for":
        talk.hear(talk.join(B))
    elif what == "an answer is due":
        talk.feed(ev.Published(1))
        append = talk.seal(1)
        assert append is not None
        talk.deliver(append.announce.stamp, A)
    assert talk.core.state is (State.OPENING if what.startswith("a window") else State.IDLE)
    assert talk.feed(ev.Publishing()) == []


def test_a_member_leaves_while_the_patch_is_made() -> None:
    """Nobody waits for it: a window without it is opened at once, and the round called there."""
    talk = preparing(A, B)
    talk.hear(msg.Leave(sender=B, epoch=1, reason="done"))
    talk.seal(1)
    assert talk.said(msg.Go) == []
    assert talk.only(cmd.Append) is not None
    [opening] = talk.said(msg.Opening)
    assert opening.members == (A,)
    talk.open_window()
    assert talk.said(msg.Call) == []
    talk.feed(ev.Announced(1))
    [call] = talk.said(msg.Call)
    talk.deliver(call.stamp, A)
    assert talk.core.head == 1


def test_fenced_off_after_go() -> None:
    """The journal has another trainer's word: the window is aborted, and the version nobody's."""
    talk, _ = under_way()
    talk.feed(ev.AnnounceFailed(1, "fenced", "trainer t2 has it"))
    assert [m.stamp for m in talk.said(msg.Abort)] == [STAMP]
    assert talk.only(cmd.AbortWindow).window == STAMP.window
    assert talk.only(cmd.Fail) is not None
    assert received(talk) == []
    assert talk.core.head == 0


def test_the_run_is_forgotten_after_go() -> None:
    """The bus has lost the journal: the window is aborted, and the run claimed anew."""
    talk, _ = under_way()
    talk.feed(ev.AnnounceFailed(1, "lost", "no such stream"))
    assert [m.stamp for m in talk.said(msg.Abort)] == [STAMP]
    assert talk.only(cmd.Reclaim).epoch == 2


@pytest.mark.parametrize("early", [True, False])
def test_the_journal_is_away_after_go(early: bool) -> None:
    """The append fails and is tried again, while the collective runs or after it: the round ends
    when the journal has it."""
    talk, announce = under_way()
    if early:
        talk.feed(ev.AnnounceFailed(1, "unavailable", "no bus"))
        received(talk)
    else:
        received(talk)
        talk.feed(ev.AnnounceFailed(1, "unavailable", "no bus"))
    assert (
        talk.only(cmd.Append, talk.wait(POLICY.retry_s + 0.01, alive=[A, B])).announce == announce
    )
    assert talk.core.head == 0
    talk.feed(ev.Announced(1))
    assert talk.core.head == 1


@pytest.mark.parametrize(
    ("source", "version", "proves"), [("window", 1, True), ("log", 1, False), ("window", 0, False)]
)
def test_what_a_member_has_applied_was_announced(source: Any, version: int, proves: bool) -> None:
    """The journal's answer is lost: whoever has applied what came by the window has heard of it
    there, while an anchor brings what was published, announced or not."""
    talk, _ = under_way()
    received(talk)
    talk.hear(msg.Applied(sender=A, epoch=1, version=version, source=source))
    assert (talk.core.head == 1) == proves


def test_a_collective_that_fails_before_the_journal_answers() -> None:
    """The next window is opened meanwhile; the round is called there once the journal has it."""
    talk, _ = under_way()
    talk.feed(ev.Sent(STAMP.window, STAMP.attempt, "b is gone"))
    assert len(talk.said(msg.Opening)) == 1
    talk.open_window()
    assert talk.said(msg.Call) == []
    talk.feed(ev.Announced(1))
    [call] = talk.said(msg.Call)
    assert (call.stamp.attempt, call.stamp.version) == (2, 1)
    talk.go(call.stamp, A, B)
    assert [m.announce.version for m in talk.said(msg.Go)] == [1]


def test_sealed_before_published_is_heard() -> None:
    """The torch thread was quicker than the caller's: the version is published, and taken once."""
    talk, _ = under_way()
    talk.feed(ev.Announced(1))
    received(talk)
    assert talk.core.published == 1
    assert talk.feed(ev.Published(1)) == []

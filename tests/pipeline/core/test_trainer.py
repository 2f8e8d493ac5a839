"""The trainer's side, one misfortune at a time."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

from sparsecast.messages import control as msg
from sparsecast.messages.control import Sender, Stamp
from sparsecast.messages.errors import Fenced
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.core.policy import Policy
from sparsecast.pipeline.core.trainer import State
from toytalk import POLICY, A, B
from toytalk import TrainerTalk as Talk


def test_a_round_from_publish_to_settled() -> None:
    """Two members take a version through the window; its record says who, when and how."""
    talk = Talk(A, B)
    stamp = talk.announce(1)
    assert stamp == Stamp(1, 2, 1, 1)
    talk.deliver(stamp, A, B)
    assert talk.core.head == 1
    assert talk.core.progress(1)[1] == {}
    talk.hear(msg.Verified(sender=A, epoch=1, version=1, digest=1, ok=True))
    assert talk.only(cmd.Settled) is None
    talk.hear(msg.Verified(sender=B, epoch=1, version=1, digest=1, ok=True))
    record = talk.only(cmd.Settled).record
    assert (record.members, record.transport, record.attempt) == ((A, B), "gloo", 1)


def test_a_worker_dies_between_ready_and_go() -> None:
    """It has committed and is dead when go is said: the round fails without blame; in the next
    opening it does not commit, and the round reaches the other one without it."""
    talk = Talk(A, B)
    stamp = talk.announce(1)
    talk.go(stamp, A, B)
    talk.feed(ev.Sent(stamp.window, stamp.attempt, "connection reset by b"))
    assert talk.told("window-abort") == [
        "window 2: the trainer's side failed: connection reset by b"
    ]
    assert talk.told("evict") == []
    [opening] = talk.said(msg.Opening)
    assert opening.members == (A, B)
    talk.go(opening.stamp, A)
    out = talk.wait(POLICY.ready_s + 0.01, alive=[A])
    assert talk.told("evict", out) == ["b not ready within 2 s; out for 1 s"]
    [opening] = talk.said(msg.Opening, out)
    assert opening.members == (A,)
    talk.open_window()
    [call] = talk.said(msg.Call)
    assert call.stamp == Stamp(1, opening.stamp.window, 2, 1)
    talk.deliver(call.stamp, A)
    assert talk.core.head == 1


def test_a_silent_member_costs_one_deadline() -> None:
    """One of two does not commit: left out by name at the deadline, and a window without it."""
    talk = Talk(A, B)
    talk.go(talk.announce(1), A)
    out = talk.wait(POLICY.ready_s + 0.01, alive=[A, B])
    assert talk.told("evict", out) == ["b not ready within 2 s; out for 1 s"]
    [opening] = talk.said(msg.Opening, out)
    assert opening.members == (A,)


def test_whoever_is_not_ready_takes_the_log() -> None:
    """The only member says no: no window is left, and the version goes by the log alone."""
    talk = Talk(A)
    stamp = talk.announce(1)
    talk.hear(msg.NotReady(sender=A, stamp=stamp, reason="readers are in the way"))
    assert talk.told("evict") == ["a is out: readers are in the way; out for 1 s"]
    assert talk.told("log-only") == ["version 1 goes by the log"]
    assert talk.only(cmd.Store).versions == (1,)
    talk.feed(ev.LogStored(1))
    assert [m.version for m in talk.said(msg.Stored)] == [1]


def test_a_worker_that_never_receives_is_put_out_after_two_attempts() -> None:
    """It commits each time and fails each time: once anyone may be at fault, twice it is out, or
    every round would cost all of its attempts."""
    talk = Talk(A, B)
    stamp = talk.announce(1)
    for attempt in (1, 2):
        talk.go(stamp, A, B)
        talk.hear(msg.Received(sender=A, stamp=stamp))
        talk.hear(msg.NotReady(sender=B, stamp=stamp, reason="its link is broken"))
        if attempt == 1:
            assert talk.told("evict") == []
            talk.open_window()
            stamp = talk.said(msg.Call)[0].stamp
    assert talk.told("evict") == ["b is out: its link is broken; out for 1 s"]
    assert talk.said(msg.Opening)[0].members == (A,)


def test_a_window_that_never_opens_does_not_hold_every_round_up() -> None:
    """Opening fails again and again with nobody to blame: rounds go by the log, and the window is
    tried ever more rarely."""
    talk = Talk()
    talk.hear(talk.join(A))
    tries: list[float] = []
    for _ in range(200):
        if talk.core.state is State.OPENING:
            tries.append(talk.now)
            exchange = talk.core._windows.exchange
            assert exchange is not None
            talk.go(exchange.stamp, A)
            error = "no route between the hosts"
            talk.hear(msg.Opened(sender=A, stamp=exchange.stamp, error=error))
        talk.wait(0.25, alive=[A])
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    assert pauses[:2] == [0.25, 0.25], "three attempts at first"
    assert [round(pause) for pause in pauses[2:6]] == [1, 2, 4, 8]
    talk.announce(1)
    assert talk.core.head == 1


def test_publishing_meanwhile_merges_into_one() -> None:
    """Three publishes while a round is in flight: one patch is taken for all of them."""
    talk = Talk(A)
    stamp = talk.announce(1)
    for version in (2, 3, 4):
        assert talk.feed(ev.Published(version)) == []
    assert talk.core.busy
    talk.deliver(stamp, A)
    talk.feed(ev.LogStored(1))
    append = talk.seal(4, base=1)
    assert append is not None
    assert (append.announce.base_version, append.announce.version) == (1, 4)
    talk.feed(ev.Announced(4))
    talk.deliver(append.announce.stamp, A)
    for version in (2, 3, 4):
        record = talk.core.record(version)
        assert record is not None
        assert record.version == 4


def test_an_announcement_proven_by_a_member_is_still_confirmed_before_the_next() -> None:
    """A member has applied it before the journal's answer comes, and that answer is lost: the same
    announcement is appended again, and the next patch waits for it — else its place in the
    journal would be unknown, and the next append would look like another trainer's."""
    talk = Talk(A)
    talk.feed(ev.Published(1))
    append = talk.seal(1)
    assert append is not None
    talk.deliver(append.announce.stamp, A)
    assert talk.core.head == 1
    talk.feed(ev.Published(2))
    assert talk.only(cmd.Take) is None
    assert not talk.core.quiet
    talk.feed(ev.AnnounceFailed(1, "unavailable", "no answer"))
    again = talk.only(cmd.Append, talk.wait(POLICY.retry_s + 0.01, alive=[A]))
    assert again == append
    talk.feed(ev.Announced(1))
    assert talk.only(cmd.Take) is not None


def test_nobody_is_late_for_what_the_journal_has_not_stored() -> None:
    """The bus is slow to store an announcement: members' time does not run meanwhile."""
    talk = Talk(A)
    talk.feed(ev.Published(1))
    append = talk.seal(1)
    assert append is not None
    out = talk.wait(3 * POLICY.ready_s, alive=[A])
    assert talk.told("evict", out) == []
    talk.feed(ev.Announced(1))
    out = talk.wait(POLICY.ready_s + 0.01, alive=[A])
    assert talk.told("evict", out) == ["a not ready within 2 s; out for 1 s"]


def test_a_log_that_fails_and_recovers() -> None:
    """Nothing is lost while it fails, retries grow rarer, it is told once; then Stored goes out."""
    talk = Talk(A)
    talk.deliver(talk.announce(1), A)
    talk.feed(ev.LogFailed(1, "disk full"))
    assert talk.told("log-failed") == ["version 1: disk full"]
    talk.deliver(talk.announce(2), A)
    assert talk.only(cmd.Store, talk.wait(POLICY.retry_s, alive=[A])).versions == (1, 2)
    talk.feed(ev.LogFailed(2, "disk full"))
    assert talk.told("log-failed") == []
    assert talk.core._safekeeping.unsafe == (2,), "kept as one patch, under the last"
    assert talk.only(cmd.Store, talk.wait(2 * POLICY.retry_s, alive=[A])).versions == (2,)
    talk.feed(ev.LogStored(2))
    assert [m.version for m in talk.said(msg.Stored)] == [2]
    assert talk.core.quiet


def test_what_is_not_safe_is_merged_into_the_next_without_a_hole() -> None:
    """Version 1 reached nobody and the log fails; 2 reached everyone's staging: the next patch
    takes both along, since 1 → 3 cannot be made without 2."""
    talk = Talk(A)
    talk.hear(msg.NotReady(sender=A, stamp=talk.announce(1), reason="busy"))
    assert talk.only(cmd.Store).versions == (1,)
    talk.wait(POLICY.backoff_s + 0.1, alive=[A])
    talk.open_window()
    stamp = talk.announce(2)
    talk.go(stamp, A)
    talk.feed(ev.Sent(stamp.window, stamp.attempt))
    talk.feed(ev.Published(3))
    talk.feed(ev.LogFailed(1, "disk full"))
    talk.hear(msg.Received(sender=A, stamp=stamp))
    assert talk.only(cmd.Take).unsafe == (1, 2)


def test_the_journal_is_away_and_comes_back() -> None:
    """The same announcement is appended again and again, nothing new is taken meanwhile."""
    talk = Talk()
    talk.feed(ev.Published(1))
    append = talk.seal(1)
    for _ in range(3):
        talk.feed(ev.AnnounceFailed(1, "unavailable", "no bus"))
        talk.feed(ev.Published(2))
        assert talk.only(cmd.Append, talk.wait(POLICY.retry_s + 0.01)) == append
    talk.feed(ev.Announced(1))
    assert talk.core.head == 1
    assert talk.only(cmd.Take) is not None


def test_fenced_ends_everything() -> None:
    """Another trainer has spoken in the journal: Fenced, and not a word more but to close."""
    talk = Talk(A)
    talk.feed(ev.Published(1))
    talk.seal(1)
    talk.feed(ev.AnnounceFailed(1, "fenced", "trainer t2 has it"))
    error = talk.only(cmd.Fail).error
    assert isinstance(error, Fenced)
    assert talk.core.error is error
    assert talk.core.next_deadline() is None
    assert talk.feed(ev.Published(2)) == talk.feed(ev.Tick(), 9.0) == []
    assert talk.feed(ev.Close("done")) == []


def test_a_forgotten_run_is_claimed_anew_and_late_answers_do_not_count() -> None:
    """The bus forgets everything while an append is under way: a new epoch, tried until the bus
    is back; what the old append says afterwards fences nobody off."""
    talk = Talk(A)
    talk.feed(ev.Published(1))
    talk.seal(1)
    talk.feed(ev.AnnounceFailed(1, "lost", "the lease's stream is gone"))
    assert talk.only(cmd.Reclaim).epoch == 2
    talk.feed(ev.AnnounceFailed(1, "fenced", "the old append"))
    assert talk.core.state is State.RECLAIMING
    talk.feed(ev.ReclaimFailed("no bus"))
    assert talk.only(cmd.Reclaim, talk.wait(POLICY.retry_s + 0.01, alive=[])).epoch == 2
    talk.feed(ev.Claimed(2, 1))
    assert (talk.core.state, talk.core.epoch, talk.core.head) == (State.IDLE, 2, 1)
    talk.feed(ev.AnnounceFailed(1, "lost", "the old append again"))
    assert talk.core.state is State.IDLE
    talk.feed(ev.LogStored(1))
    assert talk.said(msg.Stored) == []


def test_a_member_from_a_later_epoch_makes_the_trainer_look() -> None:
    """The bus and the trainer were both lost; a worker still is in epoch 7: its word makes the
    trainer claim above that, since members refuse lower epochs."""
    talk = Talk()
    talk.hear(talk.join(A, epoch=7))
    assert talk.only(cmd.Reclaim).epoch == 8
    assert talk.hear(talk.join(A, epoch=8)) == []
    talk.feed(ev.LeaseLost("trainer t2 has the run"))
    assert talk.core.state is State.FENCED


def test_a_name_in_use_and_a_name_ceded() -> None:
    """Two workers of one name: the live holder answers, and the newcomer is refused; a dead one
    does not, and the newcomer is in after the probe's deadline."""
    talk = Talk(A)
    newcomer = Sender("a", "2")
    talk.hear(talk.join(newcomer))
    assert [m.to for m in talk.said(msg.Probe)] == [A]
    assert talk.core.window_kind == "gloo", "the holder's window stays"
    talk.hear(msg.Heartbeat(sender=A, epoch=1, version=0, verified=0), 0.1)
    assert [(m.to, m.code) for m in talk.said(msg.Refuse)] == [(newcomer, "name-in-use")]
    talk.hear(talk.join(newcomer))
    out = talk.wait(POLICY.probe_s + 0.01)
    assert [m.to for m in talk.said(msg.Welcome, out)] == [newcomer]
    assert talk.core.membership.get(A) is None


def test_a_member_that_was_put_out_is_told_to_join_again() -> None:
    """A worker stopped for longer than silence_s: evicted; when it speaks again it is told."""
    talk = Talk(A)
    out = talk.wait(POLICY.silence_s + 0.1)
    assert len(talk.told("evict", out)) == 1
    assert talk.core.progress(0) == ({}, {})
    talk.hear(msg.Heartbeat(sender=A, epoch=1, version=0, verified=0))
    assert [m.to for m in talk.said(msg.Rejoin)] == [A]


def test_a_wrong_digest_is_told_and_called_back() -> None:
    """A worker calls right what is not the trainer's: told as a mismatch, and sent to an anchor."""
    talk = Talk(A)
    talk.deliver(talk.announce(1), A)
    talk.hear(msg.Verified(sender=A, epoch=1, version=1, digest=99, ok=True))
    assert talk.told("mismatch") == ["digest 0000000000000063 at 1"]
    assert [m.to for m in talk.said(msg.Resync)] == [A]
    assert list(talk.core.progress(1)[1]) == ["a"]


def test_another_model_is_refused_before_any_byte_moves() -> None:
    """A worker with another manifest asks to join: refused, and nobody's member."""
    talk = Talk()
    talk.hear(changed(talk.join(A), manifest_hash="another"))
    assert [(m.to, m.code) for m in talk.said(msg.Refuse)] == [(A, "manifest")]
    assert talk.core.membership.members == {}


def test_who_can_never_have_a_place_in_a_window_is_told_once() -> None:
    """A worker offers nccl alone, and the trainer's GPU is not known: the event says so when it
    joins, and not with every Join; a worker that offers more as well is told nothing."""
    talk = Talk(policy=Policy(window="auto"))
    alone = changed(talk.join(A), offers=("nccl",), gpus=("GPU-1",))
    talk.hear(alone)
    assert [m.to for m in talk.said(msg.Welcome)] == [A]
    (reason,) = talk.told("log-only")
    assert "the trainer's weights are on" in reason
    talk.hear(alone)
    assert talk.told("log-only") == []
    talk.hear(changed(talk.join(B), offers=("nccl", "gloo"), gpus=("GPU-1",)))
    assert talk.told("log-only") == []


def test_the_log_is_looked_at_while_a_member_is_stranded() -> None:
    """A member holds nothing and finds no way in the log: the log is looked at, and again later,
    ever more rarely; a word of another epoch, or one that is well, has nobody look."""
    talk = Talk(A)

    def beat(after: float = 0.0, epoch: int = 1, stranded: bool = True) -> int:
        fields = {"version": None if stranded else 0, "verified": None, "stranded": stranded}
        out = talk.hear(msg.Heartbeat(sender=A, epoch=epoch, **fields), after)
        return sum(isinstance(command, cmd.Mend) for command in out)

    assert beat(stranded=False) == beat(epoch=0) == 0
    assert beat() == 1
    settle_s = talk.core.policy.settle_s
    assert beat(settle_s / 2) == 0
    assert beat(settle_s / 2) == 1
    assert beat(settle_s) == 0
    assert beat(settle_s) == 1
    assert beat(stranded=False) == 0
    assert beat() == 1


def test_a_member_may_have_several_ranks() -> None:
    """A worker of two ranks comes, then one of one: the window has a place for each rank, in the
    order of the members' names, and the trainer opens it with as many."""
    talk = Talk()
    talk.hear(changed(talk.join(B), gpus=("", "")))
    (alone,) = talk.said(msg.Opening)
    assert (alone.members, alone.ranks) == ((B,), (2,))
    talk.hear(msg.Ready(sender=B, stamp=alone.stamp, expires_s=5))
    opened = talk.only(cmd.OpenWindow)
    assert (opened.rank, opened.size) == (0, 3)
    talk.feed(ev.WindowOpened(1, 1))
    talk.hear(msg.Opened(sender=B, stamp=alone.stamp))
    talk.hear(talk.join(A))
    (both,) = talk.said(msg.Opening)
    assert (both.members, both.ranks) == ((A, B), (1, 2))
    for member in (A, B):
        talk.hear(msg.Ready(sender=member, stamp=both.stamp, expires_s=5))
    assert talk.only(cmd.OpenWindow).size == 4


def changed(join: msg.Join, **fields: Any) -> msg.Join:
    """The same Join but for these."""
    return msg.Join(**{name: getattr(join, name) for name in join.__struct_fields__} | fields)


def test_close_says_bye_in_every_state() -> None:
    """Closing while idle, in a round, opening or claiming anew: Bye, and silence after it."""
    opening = Talk()
    opening.hear(opening.join(A))
    in_round = Talk(A)
    in_round.announce(1)
    lost = Talk(A)
    lost.feed(ev.AnnounceFailed(0, "lost", "gone"))
    for talk in (Talk(), Talk(A), opening, in_round, lost):
        talk.feed(ev.Close("done"))
        assert len(talk.said(msg.Bye)) == 1
        assert talk.core.next_deadline() is None
        assert talk.feed(ev.Tick()) == talk.hear(talk.join(B)) == []


def test_settling_has_a_deadline() -> None:
    """A member applies and never verifies: the round's metrics are told without it in time."""
    talk = Talk(A, policy=replace(POLICY, settle_s=3.0))
    talk.deliver(talk.announce(1), A)
    member = talk.core.membership.members["a"]
    said = []
    for _ in range(7):
        member.heard = talk.now
        said += talk.wait(0.5)
    assert talk.only(cmd.Settled, said).record.verified == {}

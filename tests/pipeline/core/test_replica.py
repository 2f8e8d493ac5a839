"""The worker's side, one misfortune at a time."""

import pytest
from msgspec.structs import replace

from sparsecast.messages import control as msg
from sparsecast.messages.control import Sender, Stamp
from sparsecast.messages.errors import NameInUse, ReplicaRefused
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from toytalk import POLICY, TRAINER, announcement, claim
from toytalk import A as ME
from toytalk import B as OTHER
from toytalk import ReplicaTalk as Talk
from toyworld import MANIFEST


def test_a_join_says_what_the_trainer_must_know_to_choose_a_window() -> None:
    """The first Join: what this worker can open, where it is, and on which GPU its weights are."""
    (join,) = Talk().joined_with
    assert (join.offers, join.device, join.host) == (("gloo", "bus"), "cpu", "h")
    assert (join.gpus, join.version) == (("GPU-1",), 0)


def test_a_window_is_opened_at_an_end_for_each_root() -> None:
    """The claim names two roots: the member opens both ends of a window, in their order; of one
    that names none, the one end that there is."""
    for roots, ends in (((), (0,)), ((b"first", b"second"), (0, 1))):
        talk = Talk()
        talk.hear(replace(claim(epoch=2), roots=roots))
        stamp = Stamp(2, 1)
        talk.hear(
            msg.Opening(
                sender=TRAINER, stamp=stamp, kind="gloo", members=(ME,), ranks=(1,), enters_at=0
            )
        )
        talk.hear(msg.Go(sender=TRAINER, stamp=stamp))
        opening = talk.only(cmd.OpenWindow)
        assert (opening.roots, opening.of) == (ends, len(ends))
        assert (opening.rank, opening.size) == (1, 2)


def test_a_round_from_announcement_to_verified() -> None:
    """Announced, committed, received, applied, digested: each step is reported."""
    talk = Talk(window=True)
    stamp = talk.announce(1)
    assert [m.stamp for m in talk.said(msg.Ready)] == [stamp]
    talk.hear(msg.Go(sender=TRAINER, stamp=stamp))
    assert not talk.only(cmd.Receive).scratch
    talk.stage(stamp)
    assert [m.error for m in talk.said(msg.Received)] == [None]
    assert talk.only(cmd.Apply).versions == (1,)
    talk.feed(ev.AppliedHere(1, 5, 5))
    assert [(m.version, m.source) for m in talk.said(msg.Applied)] == [(1, "window")]
    talk.feed(ev.Digested(1, 1, 5))
    assert [m.ok for m in talk.said(msg.Verified)] == [True]
    assert (talk.core.version, talk.core.verified) == (1, 1)


def test_a_late_go_is_refused() -> None:
    """Go comes after the commitment has run out on the worker's own clock: it does not enter."""
    talk = Talk(window=True)
    stamp = talk.announce(1)
    talk.hear(msg.Go(sender=TRAINER, stamp=stamp), POLICY.commit_s)
    assert talk.only(cmd.Receive) is None
    assert [m.reason for m in talk.said(msg.NotReady)] == ["the commitment has run out"]


def test_what_is_said_twice_is_done_once() -> None:
    """Announce, Opening and Go arrive twice: one commitment answered, one receive, no refusal;
    and an old Go does not undo the commitment to a newer round."""
    talk = Talk(window=True)
    first = talk.announce(1)
    talk.hear(msg.Go(sender=TRAINER, stamp=first))
    assert talk.hear(msg.Go(sender=TRAINER, stamp=first)) == []
    talk.announce(1)
    assert talk.said(msg.NotReady) == []
    talk.stage(first)
    second = talk.announce(2)
    assert len(talk.said(msg.Ready)) == 1
    assert talk.hear(msg.Go(sender=TRAINER, stamp=first)) == []
    talk.hear(msg.Go(sender=TRAINER, stamp=second))
    assert talk.only(cmd.Receive).stamp == second


def test_the_ranks_of_others_come_before_ours() -> None:
    """A window is opened with a member of two ranks before us: our first rank is behind theirs."""
    talk = Talk()
    stamp = Stamp(1, 1)
    opening = msg.Opening(
        sender=TRAINER, stamp=stamp, kind="gloo", members=(OTHER, ME), ranks=(2, 3), enters_at=0
    )
    talk.hear(opening)
    talk.hear(msg.Go(sender=TRAINER, stamp=stamp))
    opened = talk.only(cmd.OpenWindow)
    assert (opened.rank, opened.size) == (3, 6)


def test_only_the_highest_window_counts() -> None:
    """A higher opening breaks the lower window off before it is committed to; words of the lower
    one find nobody, and neither do those of a window that it is not in."""
    talk = Talk(window=True)
    higher = Stamp(1, 3)
    opening = msg.Opening(
        sender=TRAINER, stamp=higher, kind="gloo", members=(ME, OTHER), ranks=(1, 1), enters_at=0
    )
    out = talk.hear(opening)
    assert [type(c) for c in out] == [cmd.AbortWindow, cmd.Report]
    lower = msg.Opening(
        sender=TRAINER, stamp=Stamp(1, 2), kind="gloo", members=(ME,), ranks=(1,), enters_at=0
    )
    assert talk.hear(lower) == talk.hear(msg.Go(sender=TRAINER, stamp=Stamp(1, 1))) == []
    without = msg.Opening(
        sender=TRAINER, stamp=Stamp(1, 4), kind="gloo", members=(OTHER,), ranks=(1,), enters_at=0
    )
    assert isinstance(talk.hear(without)[0], cmd.AbortWindow)
    assert talk.hear(msg.Go(sender=TRAINER, stamp=Stamp(1, 4))) == []


def test_an_abort_after_everything_was_received() -> None:
    """The payload is whole in staging when the window is aborted: it is applied all the same, and
    the next attempt is received into scratch."""
    talk = Talk(window=True)
    stamp = talk.announce(1)
    talk.hear(msg.Go(sender=TRAINER, stamp=stamp))
    talk.hear(msg.Abort(sender=TRAINER, stamp=stamp, reason="b is gone"))
    assert talk.only(cmd.AbortWindow) is not None
    talk.stage(stamp)
    assert talk.only(cmd.Apply).versions == (1,)
    talk.feed(ev.AppliedHere(1, 5, 5))
    talk.open_window(2)
    again = Stamp(1, 2, 2, 1)
    talk.hear(msg.Call(sender=TRAINER, stamp=again))
    talk.hear(msg.Go(sender=TRAINER, stamp=again))
    assert talk.only(cmd.Receive).scratch


def test_a_mismatch_resyncs_from_an_anchor_and_does_not_storm() -> None:
    """A digest is wrong: quarantine at once, and a fetch from an anchor. If that is wrong again
    and again, full copies are fetched ever more rarely."""
    talk = Talk()
    talk.announce(1, window=0)
    pauses = []
    for round_ in range(6):
        before = talk.now
        fetch = talk.only(cmd.Fetch)
        while fetch is None:
            fetch = talk.only(cmd.Fetch, talk.wait(0.05))
        pauses.append(talk.now - before)
        assert fetch.held is (0 if round_ == 0 else None)
        talk.fetched((0, 1) if round_ == 0 else (None, 1))
        talk.feed(ev.AppliedHere(1, 5, 5))
        talk.feed(ev.Digested(1, 666, 5))
        assert [m.ok for m in talk.said(msg.Verified)] == [False]
        assert "666" not in talk.only(cmd.Quarantine).reason
        assert talk.core.version is None
    assert pauses[1] == 0.0
    assert pauses[2] < pauses[3] < pauses[4] < pauses[5]
    assert talk.core.mismatches == 6
    assert talk.core.why() == "waiting for an anchor from the log"


def test_a_digest_that_nobody_announced_proves_nothing() -> None:
    """The applied version's digest is unknown: it is not called right, and an anchor decides."""
    talk = Talk(window=True)
    talk.receive(1)
    talk.core._announced.digests.clear()
    talk.feed(ev.AppliedHere(1, 5, 5))
    talk.feed(ev.Digested(1, 1, 5))
    assert [m.ok for m in talk.said(msg.Verified)] == [False]
    assert talk.only(cmd.Quarantine).reason.endswith("announced was nothing")


def test_a_torn_apply_is_quarantined_until_an_anchor_is_through() -> None:
    """The engine falls over half way: nothing is served, rounds are declined, and the way back
    starts at an anchor."""
    talk = Talk(window=True)
    talk.receive(1)
    talk.feed(ev.ApplyFailed("the engine fell over", torn=True))
    assert [m.reason for m in talk.said(msg.Refused)] == ["the engine fell over"]
    assert talk.only(cmd.Quarantine) is not None
    assert talk.only(cmd.Fetch).held is None
    talk.announce(2)
    assert [m.reason for m in talk.said(msg.NotReady)] == ["waiting for an anchor from the log"]
    talk.fetched((None, 1), (1, 2))
    assert talk.only(cmd.Apply).versions == (1, 2)


def test_readers_in_the_way_then_not() -> None:
    """A reader stays in: the worker is lagging, says so at once, and declines rounds; when the
    reader leaves, everything in staging goes in with one apply."""
    talk = Talk(window=True)
    talk.receive(1)
    talk.feed(ev.ApplyFailed("1 reader is in since 5.0 s", torn=False, waiting=True))
    assert [m.lagging for m in talk.said(msg.Heartbeat)] == ["1 reader is in since 5.0 s"]
    talk.announce(2)
    assert [m.reason for m in talk.said(msg.NotReady)] == ["1 reader is in since 5.0 s"]
    assert talk.only(cmd.Apply, talk.wait(POLICY.retry_s)).versions == (1,)
    talk.feed(ev.AppliedHere(1, 5, 5))
    assert talk.core.lagging is None


def test_a_member_left_behind_fetches_however_fast_versions_come() -> None:
    """It missed version 1; a new version is announced every 100 ms: the log is asked all the same,
    also while a later round is being received."""
    talk = Talk(window=True)
    stamp = talk.announce(1)
    talk.hear(msg.Go(sender=TRAINER, stamp=stamp))
    talk.feed(ev.ReceiveFailed(1, 1, 1, 1, "checksum", corrupt=True))
    asked = []
    for version in range(2, 8):
        talk.now += 0.1
        stamp = talk.announce(version)
        asked += [c for c in talk.out if isinstance(c, cmd.Fetch)]
        talk.hear(msg.Go(sender=TRAINER, stamp=stamp))
        asked += [c for c in talk.out if isinstance(c, cmd.Fetch)]
        talk.stage(stamp)
        asked += [c for c in talk.out if isinstance(c, cmd.Fetch)]
    assert asked == [cmd.Fetch(1, 0, 1)]
    talk.fetched((0, 1))
    assert talk.only(cmd.Apply).versions == (1, 2, 3, 4, 5, 6, 7)


def test_waiting_for_the_weights_does_not_spin() -> None:
    """Behind the head while an apply or a digest takes long: no tick is for what cannot start."""
    talk = Talk(window=True)
    talk.receive(1)
    talk.announce(2, window=0)
    talk.wait(10.0)
    talk.feed(ev.AppliedHere(1, 5, 5))
    talk.wait(10.0)
    talk.feed(ev.Digested(1, 1, 5))
    assert talk.only(cmd.Fetch).held == 1


def test_a_log_that_has_nothing_is_asked_ever_more_rarely_until_stored() -> None:
    """The log is late: back-off, which the trainer's Stored ends."""
    talk = Talk()
    talk.announce(1, window=0)
    times = []
    while len(times) < 6:
        if talk.only(cmd.Fetch, talk.wait(0.05)) is not None:
            times.append(talk.now)
            talk.feed(ev.FetchFailed(1, "no way there yet"))
    assert times[5] - times[4] > 3 * (times[1] - times[0])
    talk.hear(msg.Stored(sender=TRAINER, epoch=1, version=1))
    assert talk.only(cmd.Fetch) is not None


def test_who_holds_nothing_and_finds_no_way_says_so() -> None:
    """Weights of no version, and a log without an anchor: not the first time that it is asked,
    which may be too early, but from the second on heartbeats tell the trainer, until there is a
    way."""
    talk = Talk(digest=99)

    def stranded(event: ev.FetchFailed | ev.Fetched) -> list[bool]:
        talk.wait(5.0)
        talk.feed(event)
        talk.wait(1.0)
        return [beat.stranded for beat in talk.said(msg.Heartbeat)]

    assert not any(stranded(ev.FetchFailed(1, "none yet", hole=True)))
    assert all(stranded(ev.FetchFailed(1, "none yet", hole=True)))
    assert not any(stranded(ev.FetchFailed(1, "the disk is slow")))
    assert all(stranded(ev.FetchFailed(1, "none yet", hole=True)))
    assert not any(stranded(ev.Fetched(1, (ev.LogItem(None, 0, 0, 10),))))


def test_window_and_log_bring_the_same_version_with_different_bases() -> None:
    """The wider patch counts, whichever came last: the narrow one would not fit the weights."""
    talk = Talk(window=True)
    stamp = talk.announce(3, base=0)
    talk.hear(msg.Go(sender=TRAINER, stamp=stamp))
    talk.feed(ev.Fetched(1, (ev.LogItem(2, 3, 3, 10),)))
    assert talk.only(cmd.Apply) is None
    talk.stage(stamp, base=0)
    assert talk.only(cmd.Apply).versions == (3,)
    assert talk.core._lane.staging.patches[3].base_version == 0


def test_a_claim_while_the_weights_are_busy() -> None:
    """A successor claims the run while an apply runs, then while the proof runs: what was found
    for the old epoch does not count, and the last claim is the one that is proven."""
    talk = Talk(window=True)
    talk.receive(1)
    successor = Sender("trainer", "t2")
    out = talk.hear(claim(2, 2, successor))
    assert talk.only(cmd.Prove, out) is None
    talk.feed(ev.AppliedHere(1, 5, 5))
    assert talk.said(msg.Applied) == []
    assert talk.only(cmd.Prove).claim.epoch == 2
    talk.hear(claim(3, 4, successor))
    talk.feed(ev.Proved(2, MANIFEST.hash, 2))
    assert talk.said(msg.Join) == []
    assert talk.only(cmd.Prove).claim.epoch == 3
    talk.feed(ev.Proved(3, MANIFEST.hash, 1))
    assert [(m.epoch, m.version) for m in talk.said(msg.Join)] == [(3, None)]
    assert talk.only(cmd.Fetch) == cmd.Fetch(3, None, 4, digest=1)
    assert talk.hear(claim(2, 2, successor)) == [], "lower epochs are refused"


def test_the_log_knows_which_version_the_weights_are() -> None:
    """A worker comes back with the weights of version 3, which was announced before it listened:
    the log knows their digest, so that it holds version 3, and fetches from there."""
    talk = Talk(digest=3)
    talk.feed(ev.Fetched(1, (), shown=3))
    assert talk.only(cmd.Hold) == cmd.Hold(3)
    talk.announce(7, window=0)
    assert talk.only(cmd.Fetch, talk.wait(1.0)) == cmd.Fetch(1, 3, 4)
    assert (talk.core.version, talk.core.verified) == (3, 3)


def test_weights_that_were_written_to_meanwhile_are_no_version() -> None:
    """The log's word comes when a resync has made the weights worthless: it is not taken."""
    talk = Talk(digest=3)
    talk.core._lane._unnamed = None
    talk.feed(ev.Fetched(1, (), shown=3))
    assert talk.only(cmd.Hold) is None
    assert talk.core.version is None
    assert talk.only(cmd.Fetch) == cmd.Fetch(1, None, 0)


def test_weights_that_are_announced_again() -> None:
    """The worker holds what the trainer before had announced and not stored: the claim is of what
    was before, and an update brings the same contents again. It holds that one at once."""
    talk = Talk()
    successor = Sender("trainer", "t2")
    talk.hear(claim(2, 5, successor))
    talk.feed(ev.Proved(2, MANIFEST.hash, 6))
    assert talk.core.version is None
    assert talk.only(cmd.Fetch) == cmd.Fetch(2, None, 5, digest=6)
    again = replace(announcement(Stamp(2, 0, 0, 6)), sender=successor)
    assert talk.only(cmd.Hold, talk.hear(again)) == cmd.Hold(6)
    assert (talk.core.version, talk.core.verified) == (6, 6)
    talk.feed(ev.Fetched(2, (ev.LogItem(None, 5, 5, 10),)))
    assert talk.only(cmd.Drop) == cmd.Drop((5,))
    assert talk.only(cmd.Apply) is None


@pytest.mark.parametrize("what", ["an anchor is applied", "a resync is called for"])
def test_weights_that_were_written_to_are_no_version(what: str) -> None:
    """What their digest was does not count any more: an announcement of that names nothing."""
    talk = Talk()
    successor = Sender("trainer", "t2")
    talk.hear(claim(2, 5, successor))
    talk.feed(ev.Proved(2, MANIFEST.hash, 6))
    if what == "an anchor is applied":
        talk.feed(ev.Fetched(2, (ev.LogItem(None, 5, 5, 10),)))
        assert talk.only(cmd.Apply).versions == (5,)
        talk.feed(ev.ApplyFailed("readers", torn=False, waiting=True))
    else:
        talk.core._lane.resync("a fault", talk.now)
    again = replace(announcement(Stamp(2, 0, 0, 6)), sender=successor)
    assert talk.only(cmd.Hold, talk.hear(again)) is None
    assert talk.core.version is None


def test_words_of_a_trainer_that_was_replaced_are_ignored() -> None:
    """The old trainer does not know yet that it is fenced: nobody obeys it."""
    talk = Talk(window=True)
    talk.hear(claim(2, 1, Sender("trainer", "t2")))
    talk.feed(ev.Proved(2, MANIFEST.hash, 1))
    opening = msg.Opening(
        sender=TRAINER, stamp=Stamp(2, 9), kind="gloo", members=(ME,), ranks=(1,), enters_at=1
    )
    assert talk.hear(opening) == []
    assert talk.hear(msg.Resync(sender=TRAINER, to=ME, reason="it is wrong")) == []


def test_a_resync_while_an_apply_runs_stays_in_force() -> None:
    """The trainer calls for a resync in the middle of an apply: its commit must not serve the
    weights again, and the anchor that follows must count."""
    talk = Talk(window=True)
    talk.receive(1)
    talk.hear(msg.Resync(sender=TRAINER, to=ME, reason="digest is not the trainer's"))
    assert talk.only(cmd.Quarantine) is not None
    talk.feed(ev.AppliedHere(1, 5, 5))
    assert talk.only(cmd.Quarantine) is not None
    assert talk.core.version is None
    assert talk.only(cmd.Fetch).held is None
    assert talk.hear(msg.Resync(sender=TRAINER, to=ME, reason="said twice")) == []
    talk.fetched((None, 1))
    talk.feed(ev.AppliedHere(1, 5, 5))
    assert talk.core.version == 1


def test_refused_by_the_trainer() -> None:
    """A name in use and another model are errors of their own, and the end."""
    talk = Talk()
    talk.hear(msg.Refuse(sender=TRAINER, to=ME, code="name-in-use", reason="a lives"))
    assert isinstance(talk.only(cmd.Fail).error, NameInUse)
    assert talk.feed(ev.Tick(), 9.0) == []
    assert talk.core.next_deadline() is None
    other = Talk()
    other.hear(claim(2, 1))
    other.feed(ev.Unfit(2, "tensor 'w' has shape [8] there"))
    assert [m.reason for m in other.said(msg.Refused)] == ["tensor 'w' has shape [8] there"]
    assert isinstance(other.only(cmd.Fail).error, ReplicaRefused)


def test_put_out_and_told_to_join_again() -> None:
    """The trainer does not know it any more: it leaves its window and says Join until welcome."""
    talk = Talk(window=True)
    talk.hear(msg.Rejoin(sender=TRAINER, to=ME))
    assert talk.only(cmd.AbortWindow) is not None
    assert len(talk.said(msg.Join)) == 1
    assert len(talk.said(msg.Join, talk.wait(2.1 * POLICY.heartbeat_s))) >= 2
    talk.hear(msg.Welcome(sender=TRAINER, to=ME, epoch=1, version=0))
    assert len(talk.said(msg.Heartbeat, talk.wait(2.1 * POLICY.heartbeat_s))) >= 2


def test_bye_leaves_the_weights_as_they_are() -> None:
    """The trainer leaves in order: the window is left, the version stays and is served."""
    talk = Talk(window=True)
    talk.receive(1)
    talk.feed(ev.AppliedHere(1, 5, 5))
    talk.feed(ev.Digested(1, 1, 5))
    talk.hear(msg.Bye(sender=TRAINER, epoch=1))
    assert [type(c) for c in talk.out] == [cmd.AbortWindow]
    assert (talk.core.version, talk.core.verified) == (1, 1)
    assert talk.core.why() == "at version 1, the newest that was announced"


def test_close_leaves_in_order_and_is_the_last_word() -> None:
    """Closing in the middle of a receive: Leave, the window broken off, and silence."""
    talk = Talk(window=True)
    stamp = talk.announce(1)
    talk.hear(msg.Go(sender=TRAINER, stamp=stamp))
    talk.feed(ev.Close("done"))
    assert len(talk.said(msg.Leave)) == 1
    assert talk.only(cmd.AbortWindow) is not None
    assert talk.stage(stamp) == talk.feed(ev.Tick()) == []
    assert talk.core.next_deadline() is None


def test_staging_is_bounded() -> None:
    """Patches wait for a reader until staging is full: the next round is left to the log."""
    talk = Talk(window=True)
    stamp = talk.announce(1, nbytes=POLICY.staging_nbytes)
    talk.hear(msg.Go(sender=TRAINER, stamp=stamp))
    talk.feed(ev.Staged(stamp, announcement(stamp, nbytes=POLICY.staging_nbytes)))
    talk.announce(2)
    [answer] = talk.said(msg.NotReady)
    assert answer.reason == f"{POLICY.staging_nbytes} bytes of patches wait in staging"

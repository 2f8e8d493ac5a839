"""Rounds that go before the journal is asked, seen by a worker: it commits to what is being made,
and applies only what the journal has announced.
"""

from sparsecast.messages import control as msg
from sparsecast.messages.control import Sender, Stamp
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from toytalk import POLICY, TRAINER, ReplicaTalk, announcement, claim
from toyworld import MANIFEST

#: The first round, through the worker's first window.
ALONE = Stamp(1, 1, 1, 1)


def committed() -> ReplicaTalk:
    """A worker alone in a window, committed to version 1, of which it knows nothing."""
    talk = ReplicaTalk(window=True)
    talk.hear(msg.Prepare(sender=TRAINER, stamp=ALONE))
    assert [m.stamp for m in talk.said(msg.Ready)] == [ALONE]
    return talk


def gone(announce: msg.Announce | None = None) -> ReplicaTalk:
    """And that has received what Go announced."""
    talk = committed()
    announce = announce or announcement(ALONE)
    talk.hear(msg.Go(sender=TRAINER, stamp=ALONE, announce=announce))
    assert talk.only(cmd.Receive).announce == announce
    talk.feed(ev.Staged(ALONE, announce))
    return talk


def test_received_and_not_applied_before_the_journal_has_announced_it() -> None:
    """It says Received at once, and applies when the journal's word is here, without being asked
    for another commitment."""
    talk = gone()
    assert [m.error for m in talk.said(msg.Received)] == [None]
    assert talk.only(cmd.Apply) is None
    assert [c for c in talk.wait(20.0) if not isinstance(c, cmd.Report)] == []
    talk.announce(1)
    assert talk.only(cmd.Apply).versions == (1,)
    assert talk.said(msg.Ready) == []


def test_announced_before_the_receive_is_through() -> None:
    """The journal was quicker than the collective: applied as soon as it is staged."""
    talk = committed()
    talk.hear(msg.Go(sender=TRAINER, stamp=ALONE, announce=announcement(ALONE)))
    talk.announce(1)
    assert talk.out == []
    talk.stage(ALONE)
    assert talk.only(cmd.Apply).versions == (1,)


def test_announced_before_go() -> None:
    """The journal overtakes Go: it is committed all the same, and checks by the journal's word."""
    talk = committed()
    talk.announce(1)
    assert [m.stamp for m in talk.said(msg.Ready)] == [ALONE]
    talk.hear(msg.Go(sender=TRAINER, stamp=ALONE, announce=announcement(ALONE, checksum=666)))
    assert talk.only(cmd.Receive).announce == announcement(ALONE)


def test_the_journal_announces_another_patch_for_the_version() -> None:
    """What was received is dropped and told of, before it was staged or after; the log brings what
    was announced."""
    talk = gone()
    talk.announce(1, checksum=666)
    assert talk.only(cmd.Drop).versions == (1,)
    assert [m.reason for m in talk.said(msg.Refused)] == ["the journal has announced another patch"]
    assert talk.only(cmd.Apply) is None
    assert talk.only(cmd.Fetch, talk.wait(POLICY.retry_s + 0.01)).held == 0
    before = committed()
    before.hear(msg.Go(sender=TRAINER, stamp=ALONE, announce=announcement(ALONE)))
    before.announce(1, checksum=666)
    before.stage(ALONE)
    assert before.only(cmd.Drop).versions == (1,)
    assert [m.error for m in before.said(msg.Received)] == [
        "the journal has announced another patch"
    ]


def test_a_successor_claims_between_go_and_the_announcement() -> None:
    """The trainer was fenced off: what it broadcast is dropped, staged or still to come, and what
    the successor calls this version is another one."""
    successor = Sender("trainer", "t2")
    talk = gone()
    talk.hear(claim(2, 1, successor))
    assert talk.only(cmd.Drop).versions == (1,)
    coming = committed()
    coming.hear(msg.Go(sender=TRAINER, stamp=ALONE, announce=announcement(ALONE)))
    coming.hear(claim(2, 1, successor))
    coming.stage(ALONE)
    assert coming.only(cmd.Drop).versions == (1,)
    for each in (talk, coming):
        each.feed(ev.Proved(2, MANIFEST.hash, 0))
        assert each.only(cmd.Apply) is None
        assert each.only(cmd.Fetch).held is None


def test_the_journals_word_is_lost() -> None:
    """It learns of the version by a Beat: the log is asked, and what it has was announced."""
    talk = gone()
    talk.hear(msg.Beat(sender=TRAINER, epoch=1, version=1))
    assert talk.only(cmd.Fetch, talk.wait(POLICY.retry_s + 0.01)).held == 0
    talk.fetched((0, 1))
    assert talk.only(cmd.Apply).versions == (1,)


def test_what_awaits_the_journal_takes_room() -> None:
    """Staging is full of a patch that nobody announces: the next version is not committed to."""
    talk = gone(announcement(ALONE, nbytes=POLICY.staging_nbytes + 1))
    assert talk.hear(msg.Prepare(sender=TRAINER, stamp=Stamp(1, 1, 1, 2))) == []


def test_who_cannot_says_nothing() -> None:
    """A Prepare finds it receiving, lagging, without a version, or in another window."""
    receiving = committed()
    receiving.hear(msg.Go(sender=TRAINER, stamp=ALONE, announce=announcement(ALONE)))
    lagging = ReplicaTalk(window=True)
    lagging.receive(1)
    lagging.feed(ev.ApplyFailed("1 reader is in", torn=False, waiting=True))
    unproven = ReplicaTalk(window=True, digest=666)
    for talk in (receiving, lagging, unproven, ReplicaTalk()):
        assert talk.hear(msg.Prepare(sender=TRAINER, stamp=Stamp(1, 1, 1, 2))) == []


def test_prepare_and_go_twice_late_or_alone() -> None:
    """Prepare twice is one more commitment to the same; after Go, or once the journal has announced
    its version, it says nothing; Go without a commitment is refused, and so is one that announces
    nothing that is known here."""
    talk = committed()
    talk.hear(msg.Prepare(sender=TRAINER, stamp=ALONE))
    assert [m.stamp for m in talk.said(msg.Ready)] == [ALONE]
    go = msg.Go(sender=TRAINER, stamp=ALONE, announce=announcement(ALONE))
    talk.hear(go)
    assert talk.hear(go) == []
    talk.stage(ALONE)
    assert talk.hear(msg.Prepare(sender=TRAINER, stamp=ALONE)) == []
    talk.announce(1)
    assert talk.hear(msg.Prepare(sender=TRAINER, stamp=ALONE)) == []
    uncommitted = ReplicaTalk(window=True)
    uncommitted.hear(go)
    assert [m.reason for m in uncommitted.said(msg.NotReady)] == ["the commitment has run out"]
    unknown = committed()
    unknown.hear(msg.Go(sender=TRAINER, stamp=ALONE))
    assert [m.reason for m in unknown.said(msg.NotReady)] == ["version 1 was not announced here"]
    late = committed()
    late.hear(go, POLICY.commit_s)
    assert [m.reason for m in late.said(msg.NotReady)] == ["the commitment has run out"]


def test_a_commitment_that_no_go_follows() -> None:
    """The publish() has failed: the commitment ends by the worker's clock, and the next Prepare
    finds it free."""
    talk = committed()
    talk.wait(POLICY.commit_s + 0.1)
    assert talk.core._seat.commitment is None
    talk.hear(msg.Prepare(sender=TRAINER, stamp=ALONE))
    assert [m.stamp for m in talk.said(msg.Ready)] == [ALONE]

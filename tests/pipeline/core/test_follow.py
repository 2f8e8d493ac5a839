"""Workers that evaluate: which versions they want, and that nobody waits for them."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecast.messages import control as msg
from sparsecast.messages.control import Sender
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.core.follow import Follow
from toytalk import POLICY, A, B, ReplicaTalk, TrainerTalk, claim
from toyworld import MANIFEST


@pytest.mark.parametrize("text", ["latest", "every:2", "every:100", "version:0", "version:7"])
def test_what_is_typed_is_what_is_told(text: str) -> None:
    """What a worker says of itself is what its user typed."""
    assert str(Follow.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "newest", "every", "every:", "every:0", "every:-3", "version:x", "version:1.5",
             " latest", "every:\u0661", "version:" + "9" * 19],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(text: str) -> None:
    """A slip is named, and what could be typed."""
    with pytest.raises(ValueError, match=r"every:K"):
        Follow.parse(text)


@given(
    every=st.integers(1, 50),
    start=st.integers(0, 200),
    more=st.integers(0, 300),
)
def test_every_kth_is_the_newest_that_k_divides(every: int, start: int, more: int) -> None:
    """The goal is announced, never before the epoch, fewer than k behind the head, and moves only
    onwards, to multiples of k."""
    follow, head = Follow(every=every), start + more
    goal = follow.goal(start, head)
    assert goal is not None
    assert start <= goal <= head
    assert head - goal < every
    assert goal == start or goal % every == 0
    later = follow.goal(start, head + 1)
    assert later is not None
    assert later >= goal


@given(pinned=st.integers(0, 100), head=st.integers(0, 100))
def test_one_version_is_wanted_once_it_was_announced(pinned: int, head: int) -> None:
    """Before that nothing is; afterwards just that one, whatever else comes."""
    assert Follow(pinned=pinned).goal(0, head) == (pinned if pinned <= head else None)


# ---- the worker's side


def apply(talk: ReplicaTalk, version: int) -> None:
    """What was fetched is applied and proven."""
    assert talk.only(cmd.Apply).versions[-1] == version
    talk.feed(ev.AppliedHere(version, 5, 5))
    talk.feed(ev.Digested(version, version, 5))
    assert (talk.core.version, talk.core.verified) == (version, version)


def test_every_third_version_is_fetched_and_no_other() -> None:
    """Versions 1 to 7 are announced: the log is asked for 3 and for 6, and for nothing else."""
    talk = ReplicaTalk(follow="every:3")
    assert talk.joined_with[0].role == "evaluation"
    assert talk.joined_with[0].follow == "every:3"
    asked = []
    for version in range(1, 8):
        talk.announce(version, window=0)
        fetch = talk.only(cmd.Fetch, talk.wait(2.0))
        if fetch is not None:
            asked.append((version, fetch))
            held = fetch.held
            talk.fetched(*((base, base + 1) for base in range(held, fetch.target)))
            apply(talk, fetch.target)
    assert asked == [
        (3, cmd.Fetch(1, 0, 3, "nearest")),
        (6, cmd.Fetch(1, 3, 6, "nearest")),
    ]
    assert talk.core.why() == "at version 6: follows every:3, 7 is the newest"


def test_one_version_is_waited_for_and_kept() -> None:
    """Version 2 is followed: 1 is let pass, 2 is fetched, 3 is let pass, and a successor's epoch
    changes nothing: the weights are still what version 2 is."""
    talk = ReplicaTalk(follow="version:2")
    talk.announce(1, window=0)
    assert talk.only(cmd.Fetch, talk.wait(2.0)) is None
    talk.announce(2, window=0)
    assert talk.only(cmd.Fetch, talk.wait(2.0)) == cmd.Fetch(1, 0, 2, "exact")
    talk.fetched((0, 1), (1, 2))
    apply(talk, 2)
    talk.announce(3, window=0)
    assert talk.only(cmd.Fetch, talk.wait(2.0)) is None
    successor = Sender("trainer", "t2")
    talk.hear(claim(2, 5, successor))
    talk.feed(ev.Proved(2, MANIFEST.hash, 2))
    assert talk.only(cmd.Hold) == cmd.Hold(2)
    assert [(m.epoch, m.version) for m in talk.said(msg.Join)] == [(2, 2)]
    assert talk.only(cmd.Fetch, talk.wait(2.0)) is None


def test_a_run_that_begins_anew_has_versions_of_its_own() -> None:
    """Version 2 is held when the broker forgets; another trainer begins the run anew, at version 0:
    its version 2 is still to come, and is not what the weights are."""
    talk = ReplicaTalk(digest=0, follow="version:2")
    talk.announce(2, window=0, base=0)
    talk.wait(2.0)
    talk.fetched((0, 2))
    apply(talk, 2)
    anew = msgspec.structs.replace(claim(1, 0, Sender("trainer", "t2")), nonce="another")
    talk.hear(anew)
    talk.feed(ev.Proved(1, MANIFEST.hash, 2))
    assert talk.only(cmd.Hold) is None
    assert talk.core.version is None
    assert talk.core.why() == "waiting for version 2, 0 is the newest"


def test_newer_weights_are_not_the_version_that_is_followed() -> None:
    """The worker starts with the weights of version 5 and follows version 2: nothing leads back, so
    it starts from an anchor."""
    talk = ReplicaTalk(digest=5, follow="version:2")
    for version in range(1, 6):
        talk.announce(version, window=0)
    assert talk.core.version is None
    assert talk.only(cmd.Fetch, talk.wait(2.0)) == cmd.Fetch(1, None, 2, "exact", 5)


def test_what_is_not_there_yet_is_said() -> None:
    """Version 9 is followed and the run is at 0: nothing is asked for, and the status says why."""
    talk = ReplicaTalk(digest=77, follow="version:9")
    assert talk.only(cmd.Fetch, talk.wait(5.0)) is None
    assert talk.core.why() == "waiting for version 9, 0 is the newest"


# ---- the trainer's side

EVALUATOR = Sender("eval", "1")


def test_nobody_waits_for_who_evaluates() -> None:
    """A rollout worker and one that evaluates: the window is the first one's alone, the round is
    done when that one has verified it, and what everyone has need not be stored twice."""
    talk = TrainerTalk()
    talk.hear(talk.join(EVALUATOR, role="evaluation"))
    assert talk.told("join")[0].endswith("evaluates latest")
    assert talk.said(msg.Opening) == []
    talk.hear(talk.join(A))
    [opening] = talk.said(msg.Opening)
    assert opening.members == (A,)
    talk.open_window()
    stamp = talk.announce(1)
    talk.deliver(stamp, A)
    assert talk.core.progress(1) == ({"a": 0.0}, {})
    assert talk.core._roster.have(1)
    talk.hear(msg.Verified(sender=A, epoch=1, version=1, digest=1, ok=True))
    record = talk.only(cmd.Settled).record
    assert record.members == (A,)
    talk.hear(msg.Applied(sender=EVALUATOR, epoch=1, version=1, source="log"))
    assert talk.core.progress(1) == ({"a": 0.0}, {}), "it is in no report"


def test_who_evaluates_alone_is_no_run_for_the_log() -> None:
    """Nobody but an evaluator is in: no window, and no event that updates go by the log."""
    talk = TrainerTalk()
    talk.hear(talk.join(EVALUATOR, role="evaluation"))
    talk.feed(ev.Published(1))
    talk.seal(1)
    out = talk.feed(ev.Announced(1))
    assert talk.core.head == 1
    assert talk.told("log-only", out) == []
    assert talk.only(cmd.Settled, out).record.members == ()


def test_a_wrong_digest_of_an_evaluator_is_told() -> None:
    """It is waited for by nobody, and yet proven like everyone."""
    talk = TrainerTalk()
    talk.hear(talk.join(EVALUATOR, role="evaluation"))
    talk.feed(ev.Published(1))
    talk.seal(1)
    talk.feed(ev.Announced(1))
    talk.hear(msg.Applied(sender=EVALUATOR, epoch=1, version=1, source="log"))
    talk.hear(msg.Verified(sender=EVALUATOR, epoch=1, version=1, digest=9, ok=True))
    assert len(talk.told("mismatch")) == 1
    assert [m.to for m in talk.said(msg.Resync)] == [EVALUATOR]


# ---- stragglers


def test_a_straggler_is_put_out_once_the_quorum_has_committed() -> None:
    """One of two is enough, and the other has 50 ms: it is put out then, not at ready_s; the round
    reaches the first one by a window of its own, and the other comes back after its back-off."""
    policy = replace(POLICY, quorum=1, straggler_s=0.05)
    talk = TrainerTalk(A, B, policy=policy)
    stamp = talk.announce(1)
    talk.go(stamp, A)
    out = talk.wait(0.06, alive=[A, B])
    assert talk.told("evict", out) == ["b not ready 0.05 s after 1 others were; out for 1 s"]
    [opening] = talk.said(msg.Opening, out)
    assert opening.members == (A,)
    talk.open_window()
    [call] = talk.said(msg.Call)
    talk.deliver(call.stamp, A)
    assert talk.core.head == 1
    talk.hear(msg.Applied(sender=B, epoch=1, version=1, source="log"))
    out = talk.wait(policy.backoff_s + 0.1, alive=[A, B])
    assert [m.members for m in talk.said(msg.Opening, out)][:1] == [(A, B)]


def test_stragglers_are_waited_for_unless_told_otherwise() -> None:
    """The same two with a quorum of one and no straggler_s: all of ready_s is waited for."""
    talk = TrainerTalk(A, B, policy=replace(POLICY, quorum=1))
    talk.go(talk.announce(1), A)
    out = talk.wait(POLICY.ready_s - 0.1, alive=[A, B])
    assert talk.told("evict", out) == []


def test_nobody_is_a_straggler_before_the_journal_has_asked() -> None:
    """No patience at all, and the journal takes a second to store the announcement: who has not
    committed by then has heard of nothing, and is put out only when it has."""
    talk = TrainerTalk(A, B, policy=replace(POLICY, quorum=1, straggler_s=0.0))
    talk.feed(ev.Published(1))
    append = talk.seal(1)
    assert append is not None
    talk.go(append.announce.stamp, A)
    out = talk.wait(1.0, alive=[A, B])
    assert talk.told("evict", out) == []
    talk.feed(ev.Announced(1))
    out = talk.wait(0.01)
    assert talk.told("evict", out) == ["b not ready 0 s after 1 others were; out for 1 s"]


def test_an_opening_does_not_wait_long_for_a_straggler_that_comes_back() -> None:
    """B was put out, and is asked for the next window after its back-off; it does not answer: the
    others wait for straggler_s, and not for ready_s."""
    policy = replace(POLICY, quorum=1, straggler_s=0.05)
    talk = TrainerTalk(A, B, policy=policy)
    talk.go(talk.announce(1), A)
    talk.wait(0.06, alive=[A, B])
    talk.open_window()
    [call] = talk.said(msg.Call)
    talk.deliver(call.stamp, A)
    talk.hear(msg.Applied(sender=B, epoch=1, version=1, source="log"))
    out = talk.wait(policy.backoff_s + 0.01, alive=[A, B])
    [opening] = [m for m in talk.said(msg.Opening, out) if m.members == (A, B)]
    talk.go(opening.stamp, A)
    out = talk.wait(0.06, alive=[A, B])
    assert talk.told("evict", out) == ["b not ready 0.05 s after 1 others were; out for 2 s"]


def test_a_quorum_is_a_number() -> None:
    """A slip in the policy is told where it is made."""
    with pytest.raises(ValueError, match=r"Policy.quorum must be 'all' or a number, not 'most'"):
        replace(POLICY, quorum="most")

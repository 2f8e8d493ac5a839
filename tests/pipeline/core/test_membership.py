"""Who is in: names, silence, back-off, and who is fit for the next window."""

from dataclasses import replace

import pytest

from sparsecast.messages.control import Heartbeat, Join, Sender, WindowKind
from sparsecast.pipeline.core.membership import Membership
from sparsecast.pipeline.core.policy import Policy

POLICY = Policy(silence_s=4.0, probe_s=1.0, backoff_s=1.0, backoff_max_s=5.0, join_lag=1)
BOTH: tuple[WindowKind, ...] = ("gloo", "bus")


ALL: tuple[WindowKind, ...] = ("nccl", "gloo", "bus")


def join(
    name: str, life: str = "1", version: int | None = 7, offers: object = BOTH, gpu: str = ""
) -> Join:
    """A worker's Join."""
    return Join(
        sender=Sender(name, life), epoch=1, manifest_hash="m", offers=offers, device="cpu",
        host="h", pid=1, version=version, gpus=tuple(gpu.split(",")),
    )  # fmt: skip


def crew(*joins: Join, policy: Policy = POLICY, gpu: str = "") -> Membership:
    """These members, admitted at 0 s."""
    membership = Membership(policy, gpus=tuple(gpu.split(",")))
    for each in joins:
        membership.admit(each, 0.0)
    return membership


def names(found: tuple[object, tuple[Sender, ...]]) -> tuple[object, list[str]]:
    """The kind, and the members by name."""
    return found[0], [sender.name for sender in found[1]]


def test_silence_puts_out_whoever_is_unheard_and_nobody_else() -> None:
    """One of two stops speaking: it is silent at four seconds exactly."""
    membership = crew(join("a"), join("b"))
    membership.hear(Sender("a", "1"), 3.0)
    assert membership.silent(3.99) == []
    assert [m.sender.name for m in membership.silent(4.0)] == ["b"]
    assert membership.next_change(0.0) == 4.0
    assert membership.remove(Sender("b", "1"))
    assert not membership.remove(Sender("b", "1"))
    assert not membership.remove(Sender("a", "2")), "another life is another member"


def test_a_holder_that_speaks_keeps_its_name() -> None:
    """The challenger is handed back, so that it can be refused by name."""
    membership, newcomer = crew(join("a")), join("a", "2")
    membership.challenge(newcomer, 2.0)
    assert membership.next_change(2.0) == 3.0
    assert membership.hear(Sender("a", "2"), 2.5) is None, "the newcomer is no proof of life"
    assert membership.hear(Sender("a", "1"), 2.9) == newcomer
    assert membership.ceded(9.0) == []


def test_a_silent_holder_cedes_its_name() -> None:
    """Nobody answers the probe: the name passes on at its deadline."""
    membership, newcomer = crew(join("a")), join("a", "2")
    membership.challenge(newcomer, 2.0)
    assert membership.ceded(2.99) == []
    assert [(m.sender.incarnation, j) for m, j in membership.ceded(3.0)] == [("1", newcomer)]


def test_strikes_double_up_to_a_bound_and_are_pardoned() -> None:
    """Each strike keeps a member out for longer; a good round forgets them all."""
    membership, who = crew(join("a")), Sender("a", "1")
    assert [membership.strike(who, 0.0) for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    membership.pardon(who)
    assert membership.strike(who, 0.0) == 1.0
    assert membership.strike(Sender("a", "2"), 0.0) == 0.0


def test_who_is_fit_for_a_window() -> None:
    """In are those that hold nearly the head; back-off, no version, lag and readers keep out."""
    membership = crew(
        join("near", version=9), join("far", version=8), join("none", version=None),
        join("struck", version=10), join("slow", version=10), join("here", version=2),
    )  # fmt: skip
    membership.strike(Sender("struck", "1"), 0.0)
    membership.beat(
        Heartbeat(sender=Sender("slow", "1"), epoch=1, version=10, verified=9, lagging="readers")
    )
    inside = frozenset({Sender("here", "1")})
    assert names(membership.fit(BOTH, inside, 10, 0.5)) == ("gloo", ["here", "near"])
    assert names(membership.fit(BOTH, inside, 10, 1.0)) == ("gloo", ["here", "near", "struck"])


def test_who_cannot_catch_up_may_enter_further_behind() -> None:
    """The log brings a member on, and updates are faster: with each step it may be one version
    further behind, but not for ever; a round that it comes through sets it back."""
    membership, who = crew(join("slow", version=6)), Sender("slow", "1")
    for steps, lag in ((0, 1), (1, 2), (2, 3), (52, 9)):
        assert names(membership.fit(BOTH, frozenset(), 6 + lag, 0.0))[1] == ["slow"]
        assert names(membership.fit(BOTH, frozenset(), 6 + lag + 1, 0.0))[1] == []
        for _ in range(50 if steps == 2 else 1):
            membership.stepped(who, lag + 1)
    membership.stepped(who, 1)
    assert names(membership.fit(BOTH, frozenset(), 8, 0.0))[1] == [], "it came near"
    membership.stepped(who, 5)
    assert names(membership.fit(BOTH, frozenset(), 8, 0.0))[1] == ["slow"]
    membership.pardon(who)
    assert names(membership.fit(BOTH, frozenset(), 8, 0.0))[1] == []


def test_asking_for_a_name_does_not_break_the_holders_window() -> None:
    """A second worker of the same name turns up: the first stays in its window meanwhile, but
    would not enter one."""
    membership = crew(join("a"))
    membership.challenge(join("a", "2"), 0.0)
    assert names(membership.fit(BOTH, frozenset({Sender("a", "1")}), 7, 0.5)) == ("gloo", ["a"])
    assert membership.fit(BOTH, frozenset(), 7, 0.5) == (None, ())


@pytest.mark.parametrize(
    ("window", "offers", "expected"),
    [
        ("auto", [BOTH, BOTH], ("gloo", ["m0", "m1"])),
        ("auto", [BOTH, ("bus",)], ("bus", ["m0", "m1"])),
        ("auto", [("gloo",), ("gloo",), ("bus",)], ("gloo", ["m0", "m1"])),
        ("auto", [("gloo",), ("bus",)], ("gloo", ["m0"])),
        ("auto", [("nccl",)], (None, [])),
        ("gloo", [BOTH, ("bus",)], ("gloo", ["m0"])),
    ],
    ids=["all", "common", "most", "tie", "none", "fixed"],
)
def test_the_kind_is_the_best_for_the_most(
    window: str, offers: list[tuple[WindowKind, ...]], expected: tuple[object, list[str]]
) -> None:
    """Members offer different kinds: nobody is left without a window for the sake of another."""
    policy = replace(POLICY, window=window)
    membership = crew(
        *(join(f"m{i}", offers=offered) for i, offered in enumerate(offers)), policy=policy
    )
    assert names(membership.fit(BOTH, frozenset(), 7, 0.0)) == expected


@pytest.mark.parametrize(
    ("trainer", "gpus", "expected"),
    [
        ("GPU-0", ["GPU-1", "GPU-2"], ("nccl", ["m0", "m1"])),
        ("GPU-0", ["GPU-1", "GPU-1"], ("gloo", ["m0", "m1"])),
        ("GPU-0", ["GPU-1", "GPU-0"], ("gloo", ["m0", "m1"])),
        ("GPU-0", ["GPU-1", ""], ("gloo", ["m0", "m1"])),
        ("", ["GPU-1", "GPU-2"], ("gloo", ["m0", "m1"])),
        ("GPU-0", ["GPU-1,GPU-2", "GPU-3"], ("nccl", ["m0", "m1"])),
        ("GPU-0", ["GPU-1,GPU-2", "GPU-2"], ("gloo", ["m0", "m1"])),
        ("GPU-0", ["GPU-1,GPU-1", "GPU-2"], ("gloo", ["m0", "m1"])),
    ],
    ids=[
        "distinct",
        "two-workers",
        "with-the-trainer",
        "unknown",
        "trainer-unknown",
        "two-ranks",
        "two-ranks-one-shared",
        "two-ranks-on-one",
    ],
)
def test_nccl_wants_a_gpu_for_each_rank(
    trainer: str, gpus: list[str], expected: tuple[object, list[str]]
) -> None:
    """Two ranks share a GPU, or nobody knows: the next kind is taken, for all of them."""
    joins = [join(f"m{i}", offers=ALL, gpu=gpu) for i, gpu in enumerate(gpus)]
    membership = crew(*joins, gpu=trainer)
    assert names(membership.fit(ALL, frozenset(), 7, 0.0)) == expected
    assert [membership.unseated(j.sender) for j in joins] == [None, None]


def test_a_newcomer_on_a_taken_gpu_does_not_break_the_window() -> None:
    """nccl is all that is allowed, and "a" comes to the GPU of "b", who is in: "b" stays in, and
    "a" is told why it is out; once "b" has left, "a" has a place."""
    policy = replace(POLICY, window="nccl")
    holder, third = join("b", offers=ALL, gpu="GPU-1"), join("c", offers=ALL, gpu="GPU-2")
    newcomer = join("a", offers=ALL, gpu="GPU-1")
    membership = crew(holder, third, newcomer, policy=policy, gpu="GPU-0")
    inside = frozenset({holder.sender, third.sender})
    assert names(membership.fit(ALL, inside, 7, 0.0)) == ("nccl", ["b", "c"])
    reason = membership.unseated(newcomer.sender)
    assert reason is not None
    assert "shares GPU-1 with b" in reason
    membership.remove(holder.sender)
    assert names(membership.fit(ALL, inside, 7, 0.0)) == ("nccl", ["a", "c"])
    assert membership.unseated(newcomer.sender) is None


@pytest.mark.parametrize(
    ("trainer", "gpu", "why"),
    [
        ("GPU-0", "GPU-0", "shares GPU-0 with the trainer"),
        ("GPU-0", "", "not known which GPU its weights are on"),
        ("", "GPU-1", "not known which GPU the trainer's weights are on"),
        ("GPU-0", "GPU-1,GPU-1", "two of its 2 ranks share a GPU"),
        ("GPU-0", "GPU-1,", "not known which GPU its weights are on"),
    ],
    ids=["shared", "unknown", "trainer-unknown", "among-its-ranks", "unknown-of-one"],
)
def test_who_offers_nccl_alone_and_has_no_gpu_is_told(trainer: str, gpu: str, why: str) -> None:
    """A worker offers nothing but nccl: no window has a place for it, and the reason says why."""
    worker = join("m", offers=("nccl",), gpu=gpu)
    membership = crew(worker, gpu=trainer)
    assert membership.fit(ALL, frozenset(), 7, 0.0) == (None, ())
    reason = membership.unseated(worker.sender)
    assert reason is not None
    assert why in reason
    assert "by the log" in reason


def test_a_new_epoch_asks_everyone_anew() -> None:
    """What members hold, and who wants their names, was said of the old epoch."""
    membership = crew(join("a"))
    membership.challenge(join("a", "2"), 0.0)
    membership.reset()
    assert membership.members["a"].version is None
    assert membership.ceded(9.0) == []

"""Who is in: names, silence, back-off, and who is fit for the next window."""

from dataclasses import replace

import pytest

from sparsecast.messages.control import Heartbeat, Join, Sender, WindowKind
from sparsecast.pipeline.core.membership import Membership
from sparsecast.pipeline.core.policy import Policy

POLICY = Policy(silence_s=4.0, probe_s=1.0, backoff_s=1.0, backoff_max_s=5.0, join_lag=1)
BOTH: tuple[WindowKind, ...] = ("gloo", "bus")


def join(name: str, life: str = "1", version: int | None = 7, offers: object = BOTH) -> Join:
    """A worker's Join."""
    return Join(
        sender=Sender(name, life), epoch=1, manifest_hash="m", offers=offers, device="cpu",
        host="h", pid=1, version=version,
    )  # fmt: skip


def crew(*joins: Join, policy: Policy = POLICY) -> Membership:
    """These members, admitted at 0 s."""
    membership = Membership(policy)
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


def test_a_new_epoch_asks_everyone_anew() -> None:
    """What members hold, and who wants their names, was said of the old epoch."""
    membership = crew(join("a"))
    membership.challenge(join("a", "2"), 0.0)
    membership.reset()
    assert membership.members["a"].version is None
    assert membership.ceded(9.0) == []

"""What is remembered of announced rounds, and for whom each still waits."""

from sparsecast.pipeline.core.ledger import HISTORY, Ledger, RoundRecord


def record(version: int, base: int | None = None, received_at: float = 100.0) -> RoundRecord:
    """A round that is over."""
    return RoundRecord(
        base_version=version - 1 if base is None else base, version=version, published_at=99.0,
        nbytes=10, dense_nbytes=16, changed=1, numel=8, encoding="sparse", digest=version,
        diff_us=1, encode_us=1, step=None, tags=None, received_at=received_at,
    )  # fmt: skip


def ledger(*versions: int, awaited: str = "ab") -> Ledger:
    """A ledger of settle_s 3 with these rounds open, each waiting for the same members."""
    made = Ledger(settle_s=3.0)
    for version in versions:
        made.add(record(version), awaited)
    return made


def test_a_round_settles_when_all_have_verified_it() -> None:
    """Two members verify one after the other: the second one's word settles the round, once."""
    rounds = ledger(1)
    rounds.advanced("a", 1, 1, 100.5)
    rounds.advanced("b", 1, None, 100.6)
    assert rounds.settle(100.7) == []
    rounds.advanced("b", 1, 1, 100.8)
    [settled] = rounds.settle(100.9)
    assert settled.applied == {"a": 100.5, "b": 100.6}
    assert settled.verified == {"a": 100.5, "b": 100.8}
    assert (rounds.settle(101.0), len(rounds), rounds.next_change()) == ([], 0, None)


def test_who_never_verifies_is_waited_for_until_the_deadline() -> None:
    """Nobody says a word: the round settles at its deadline, not before."""
    rounds = ledger(1)
    assert rounds.next_change() == 103.0
    assert rounds.settle(102.99) == []
    assert [r.version for r in rounds.settle(103.0)] == [1]


def test_who_is_gone_is_not_waited_for() -> None:
    """One member verifies, the other leaves: nothing more is to be expected, of any round."""
    rounds = ledger(1, 2)
    rounds.advanced("a", 2, 2, 100.1)
    rounds.gone("b")
    assert [r.version for r in rounds.settle(100.2)] == [1, 2]


def test_a_later_version_counts_for_the_earlier_ones_and_the_first_time_stays() -> None:
    """A member says 2, then says it again with a heartbeat: 1 is applied as well, at the time of
    the first word; 3 is not."""
    rounds = ledger(1, 2, 3)
    rounds.advanced("a", 2, 1, 100.1)
    rounds.advanced("a", 2, 1, 100.9)
    one, two, three = (rounds.at(version) for version in (1, 2, 3))
    assert one is not None
    assert two is not None
    assert three is not None
    assert (one.applied, one.verified) == ({"a": 100.1}, {"a": 100.1})
    assert (two.applied, two.verified) == ({"a": 100.1}, {})
    assert (three.applied, three.verified) == ({}, {})


def test_who_applied_before_the_round_was_over_and_left_has_applied_it() -> None:
    """A worker is quicker than the trainer's own end of the window, says that it holds and has
    proven the version, and leaves; another one is two versions ahead. Both count once the rounds
    are over, and nobody waits for the first."""
    rounds = ledger(1)
    rounds.advanced("a", 2, 2, 100.1)
    rounds.advanced("b", 3, None, 100.1)
    rounds.gone("a")
    rounds.add(record(2, received_at=100.2), "b")
    rounds.add(record(3, received_at=100.3), "b")
    two, three = rounds.at(2), rounds.at(3)
    assert two is not None
    assert three is not None
    assert (two.applied, two.verified) == ({"a": 100.2, "b": 100.2}, {"a": 100.2})
    assert (three.applied, three.verified) == ({"b": 100.3}, {})
    assert rounds._early == {}


def test_a_merged_version_is_found_by_each_of_its_numbers() -> None:
    """1 was merged with 2 and 3: whoever waits for 2 finds the round of 3, open or settled."""
    rounds = Ledger(settle_s=3.0)
    rounds.add(record(3, base=0), "a")
    for _ in range(2):
        found = [rounds.bringing(version) for version in range(5)]
        assert [r.version if r else None for r in found] == [None, 3, 3, 3, None]
        assert rounds.at(2) is None, "no round ended there"
        rounds.settle(103.0)


def test_settled_rounds_are_forgotten_in_the_end() -> None:
    """More rounds settle than are remembered: the oldest goes, the newest stay."""
    rounds = ledger(*range(1, HISTORY + 2), awaited="")
    rounds.settle(100.0)
    assert rounds.at(1) is None
    assert rounds.at(2) is not None
    assert rounds.bringing(HISTORY + 1) is not None

"""Orders between the ranks of a worker, over a bus that loses, doubles and delays them."""

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecast import CorruptPatch, LogHole, PatchError
from sparsecast.messages.control import LogEntry, Stamp
from sparsecast.messages.errors import SparsecastError
from sparsecast.messages.ranks import Answer, Order
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from sparsecast.workers.orders import Given, Taken, answer_of, decode_what, result_of

PIECE = LogEntry(
    name="1-patch-2-3.0",
    epoch=1,
    base_version=2,
    version=3,
    nbytes=5,
    checksum=6,
    digest=2**64 - 1,
    manifest_hash="of its own tensors",
    chunks=1,
    roots=2,
    layout="its layout",
    whole="of the published ones",
)
GROUPED = msgspec.structs.replace(
    PIECE,
    name="1-patch-2-3",
    manifest_hash="of the published ones",
    layout="",
    pieces=(PIECE, msgspec.structs.replace(PIECE, name="1-patch-2-3.1", root=1)),
)


@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 3), orders=st.integers(1, 30))
def test_every_rank_begins_every_order_once_and_in_order(
    seed: int, ranks: int, orders: int
) -> None:
    """A third of all messages is lost, some are doubled, all come in any order: each rank begins
    each order once, in the order in which they were given, and in the end all are answered."""
    lots = random.Random(seed)
    leader = Given("a", frozenset(range(1, ranks + 1)))
    others = {rank: Taken("a") for rank in leader.ranks}
    begun: dict[int, list[int]] = {rank: [] for rank in others}
    answered: list[tuple[int, int]] = []
    air: list[tuple[int, Order | Answer]] = []
    left = orders

    def send(rank: int, message: Order | Answer) -> None:
        air.extend([(rank, message)] * lots.choice([0, 1, 1, 2]))

    for _ in range(100 * orders):
        if left and lots.random() < 0.3:
            left -= 1
            order = leader.give("hold", left)
            for rank in others:
                send(rank, order)
        elif air:
            rank, message = air.pop(lots.randrange(len(air)))
            if isinstance(message, Answer):
                if leader.answered(rank, message.number):
                    answered.append((rank, message.number))
                continue
            repeated = others[rank].repeat(message)
            if repeated is not None:
                send(rank, repeated)
            for now in others[rank].hear(message):
                begun[rank].append(now.number)
                answer = answer_of(now, rank, None)
                others[rank].answer(answer)
                send(rank, answer)
        else:
            rank = lots.choice(list(others))
            for order in leader.unanswered(rank):
                send(rank, order)
            others[rank].done(leader.done)
        if not left and not leader.waiting:
            break
    assert leader.waiting == 0
    assert leader.done == orders
    assert all(numbers == list(range(1, orders + 1)) for numbers in begun.values())
    assert len(answered) == len(set(answered)) == ranks * orders


def test_answers_are_forgotten_once_all_have_answered() -> None:
    """A rank keeps its answers for as long as they may have to be said again, and no longer."""
    leader, other = Given("a", frozenset({1, 2})), Taken("a")
    orders = [leader.give("drop", None) for _ in range(3)]
    for order in orders:
        other.hear(order)
        other.answer(answer_of(order, 1, None))
    assert leader.answered(1, 1)
    assert leader.answered(2, 1)
    assert leader.answered(1, 2)
    assert leader.done == 1
    other.done(leader.done)
    assert [other.repeat(order) is not None for order in orders] == [False, True, True]
    assert not leader.answered(1, 2)
    assert not leader.answered(7, 3)


@pytest.mark.parametrize(
    ("deed", "what"),
    [
        ("open", cmd.OpenWindow(Stamp(1, 2, 0, 3), "gloo", 1, 4, 5.0)),
        ("open", cmd.OpenWindow(Stamp(1, 2, 0, 3), "gloo", 1, 4, 5.0, (0, 1, 2), 3)),
        ("take", GROUPED),
        ("abort", 7),
        ("alert", Stamp(1, 2, 1, 3)),
        ("drop", None),
        ("drop", (1, 2)),
        ("quarantine", "it is torn"),
        ("apply", (3, 4)),
    ],
    ids=["open", "open-roots", "take", "abort", "alert", "drop-all", "drop", "quarantine", "apply"],
)
def test_what_comes_with_an_order_comes_as_it_was(deed: Any, what: Any) -> None:
    """Given, encoded and decoded: the same command or value."""
    order = Given("a", frozenset({1})).give(deed, what)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(order), type=Order)
    assert decode_what(again) == what


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (None, None),
        (ev.AppliedHere(3, 10, 20), ev.AppliedHere(3, 10, 20)),
        (ev.Proved(1, "hash", 2**64 - 1), ev.Proved(1, "hash", 2**64 - 1)),
        (ev.ApplyFailed("no", torn=True), ev.ApplyFailed("rank 2: no", torn=True)),
        (ev.Unfit(1, "differs"), ev.Unfit(1, "rank 2: differs")),
    ],
    ids=["nothing", "applied", "proved", "failed", "unfit"],
)
def test_an_event_is_told_with_the_rank_in_its_reason(result: Any, told: Any) -> None:
    """What came of an order on rank 2, as the first rank hears it."""
    order = Given("a", frozenset({2})).give("prove", None)
    assert result_of(answer_of(order, 2, result)) == told


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (CorruptPatch("3 bytes"), PatchError, "rank 2: corrupt patch: 3 bytes"),
        (LogHole("pruned"), LogHole, "the log has no unbroken way: rank 2: pruned"),
        (RuntimeError("out of memory"), SparsecastError, "rank 2: RuntimeError: out of memory"),
    ],
    ids=["patch", "hole", "other"],
)
def test_an_error_is_told_as_one_of_its_kind(error: Exception, kind: Any, words: str) -> None:
    """What a rank raised is raised at the first one: a refused patch as one, a hole of the log as
    one."""
    order = Given("a", frozenset({2})).give("take", None)
    told = result_of(answer_of(order, 2, error))
    assert isinstance(told, kind)
    assert str(told) == words

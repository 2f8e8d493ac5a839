"""The round in flight: whom it blames, and what its record says."""

import pytest

from sparsecast.messages.control import Sender, Stamp
from sparsecast.pipeline.core.events import Sealed
from sparsecast.pipeline.core.exchange import Exchange
from sparsecast.pipeline.core.round import Round, announcement, begin
from sparsecast.pipeline.core.window import Window

A, B, C = (Sender(name, "1") for name in "abc")


def sealed() -> Round:
    """Version 1, sealed at 10 s, in its first attempt."""
    event = Sealed(
        base_version=0, version=1, nbytes=10, checksum=1, digest=1, changed=1, numel=8,
        encoding="sparse", dense_nbytes=16, published_at=9.0, diff_us=1, encode_us=1,
    )  # fmt: skip
    announce = announcement(event, Stamp(1, 2, 1, 1), Sender("trainer", "t1"), "hash")
    return begin(event, announce, 10.0)


def attempt(number: int, *received: Sender, refused: tuple[Sender, ...] = ()) -> Exchange:
    """An attempt of a, b and c that all went into at 11 s and that failed on our side."""
    exchange = Exchange(Stamp(1, 2, number, 1), (A, B, C), 10.0, 2.0, 5.0)
    for member in (A, B, C):
        exchange.ready(member, 11.0)
    for member in received:
        exchange.report(member, None, 12.0)
    for member in refused:
        exchange.report(member, "its checksum is wrong", 12.0)
    exchange.local("the link broke", 13.0)
    return exchange


@pytest.mark.parametrize(
    ("first", "second", "blamed"),
    [
        ((A, B, C), (A, B, C), ()),
        ((A, B), (A, B), (C,)),
        # Each was without once: anyone may have held it up.
        ((A, B), (A, C), ()),
        ((A,), (A, B), (C,)),
        ((), (), (A, B, C)),
    ],
)
def test_who_has_nothing_after_two_attempts_is_left_out(
    first: tuple[Sender, ...], second: tuple[Sender, ...], blamed: tuple[Sender, ...]
) -> None:
    """Nobody is to blame for a single attempt that fails, whoever has received it."""
    round_ = sealed()
    assert round_.blamed(attempt(1, *first)) == ()
    assert round_.blamed(attempt(2, *second)) == blamed


def test_bytes_that_were_refused_are_as_good_as_none() -> None:
    """A member refuses what it has received, and then receives nothing: it is left out."""
    round_ = sealed()
    round_.blamed(attempt(1, A, B, refused=(C,)))
    assert round_.blamed(attempt(2, A, B)) == (C,)


def test_whom_the_exchange_has_named_is_left_out_at_once() -> None:
    """One member does not commit: the exchange knows who, and no second attempt is needed."""
    exchange = Exchange(Stamp(1, 2, 1, 1), (A, B, C), 10.0, 2.0, 5.0)
    exchange.refuse(B, "its staging is full", 10.5)
    assert sealed().blamed(exchange) == (B,)


def test_go_may_come_before_the_announcement_is_known() -> None:
    """All are ready before the journal's answer: the round goes, and is not announced by that; its
    payload is received when the collective is over, whenever the journal answers."""
    round_, exchange = sealed(), Exchange(Stamp(1, 2, 1, 1), (A,), 10.0, 2.0, 5.0)
    exchange.ready(A, 11.0)
    round_.follow(exchange)
    assert not round_.known
    exchange.report(A, None, 12.0)
    exchange.local(None, 13.0)
    round_.carried(exchange)
    round_.announced(14.0)
    round_.announced(15.0)
    record = round_.end(None, (A,), 15.0)
    times = record.went_at, record.received_at, record.announced_at
    assert times == (11.0, 13.0, 14.0)
    assert round_.known
    assert record.received == (A,)


def test_the_record_says_by_which_road_it_went() -> None:
    """Through a window it names window and kind; after attempts that failed, the log."""
    through, by_log = sealed(), sealed()
    record = through.end(Window(1, 2, "gloo", (A, B), (1, 1)), (A, B), 15.0)
    assert (record.window, record.transport, record.attempt) == (2, "gloo", 1)
    by_log.attempt = 3
    record = by_log.end(None, (A,), 15.0)
    assert (record.window, record.transport, record.attempt) == (0, "log", 3)
    assert (record.members, record.received_at) == ((A,), 15.0)

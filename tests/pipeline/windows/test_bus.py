"""What only the bus window has to withstand: chunks lost, doubled, out of order, or no chunks."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from sparsecast.messages.errors import WindowError, WindowTimeout, WindowUnavailable
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.windows import BusWindow, WindowSpec
from sparsecast.pipeline.windows.bus import CHUNK_NBYTES, IN_FLIGHT_NBYTES
from sparsecast.pipeline.windows.lifecycle import Deadline

Connect = Callable[..., Awaitable[NatsBus]]
Fault = Callable[[list[Any]], list[Any]]

NBYTES = 5 * CHUNK_NBYTES + 77


class _Faulty:
    """A courier that does something to the chunks before the window hears of them."""

    def __init__(self, bus: NatsBus, fault: Fault) -> None:
        self._bus = bus
        self._fault = fault
        self._held: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def subscribe(self, subject: str, handler: Callable[[Any], None], **kwargs: Any) -> Any:
        if not subject.endswith(".chunk"):
            return await self._bus.subscribe(subject, handler, **kwargs)

        def tamper(message: Any) -> None:
            self._held.append(message)
            if len(self._held) == 6:
                for one in self._fault(self._held):
                    handler(one)

        return await self._bus.subscribe(subject, tamper, **kwargs)


@pytest.fixture
def courier_pair(broker: Broker, connected: Connect) -> Callable[[], Awaitable[tuple[Any, Any]]]:
    """Two connections: for rank 0, and for rank 1."""

    async def connect_both() -> tuple[Any, Any]:
        return await connected(broker.url), await connected(broker.url)

    return connect_both


def _spec(run: str, rank: int, size: int = 2, window: int = 1) -> WindowSpec:
    return WindowSpec("bus", f"sparsecast.{run}.window.1.{window}", 1, window, rank, size)


async def _round_through(fault: Fault, couriers: tuple[Any, Any], run: str) -> torch.Tensor:
    """One round whose six chunks pass through `fault`; returns what was received."""
    payload = torch.arange(NBYTES, dtype=torch.int64).to(torch.uint8)
    staging = torch.zeros_like(payload)
    root = BusWindow(_spec(run, 0), couriers[0])
    member = BusWindow(_spec(run, 1), _Faulty(couriers[1], fault))
    try:
        await asyncio.gather(root.open(5), member.open(5))
        await asyncio.gather(
            root.send(payload, attempt=1, timeout_s=5),
            member.receive(staging, attempt=1, timeout_s=1),
        )
    finally:
        await root.abort()
        await member.abort()
    assert torch.equal(staging, payload)
    return staging


async def test_duplicates_are_ignored(courier_pair: Any, run: str) -> None:
    """Every chunk comes twice, some again later: the payload is whole."""
    await _round_through(
        lambda chunks: [c for c in chunks[:5] for _ in (1, 2)] + chunks[:2] + chunks[5:],
        await courier_pair(),
        run,
    )


async def test_a_lost_chunk_is_an_error_at_once(courier_pair: Any, run: str) -> None:
    """The third chunk is lost: the error says where the hole is; nothing waits for the deadline."""
    with pytest.raises(WindowError, match=rf"chunk at {2 * CHUNK_NBYTES} of {NBYTES} .* lost"):
        await _round_through(lambda chunks: chunks[:2] + chunks[3:], await courier_pair(), run)


async def test_the_last_chunk_lost_is_a_timeout(courier_pair: Any, run: str) -> None:
    """Nothing follows the last chunk that could show that it is lost: the deadline tells."""
    with pytest.raises(WindowTimeout, match=f"{5 * CHUNK_NBYTES} of {NBYTES} bytes came"):
        await _round_through(lambda chunks: chunks[:5], await courier_pair(), run)


async def test_reordered_chunks_are_an_error_and_never_garbage(courier_pair: Any, run: str) -> None:
    """Core NATS keeps the order, so another order is a fault: refused."""
    with pytest.raises(WindowError, match="was lost"):
        await _round_through(lambda c: [c[0], c[2], c[1], *c[3:]], await courier_pair(), run)


class _Message:
    def __init__(self, data: bytes) -> None:
        self.data = data


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "no chunk"),
        (lambda data: data[:20], "no chunk"),
        (lambda data: b"x" + data[1:], "no chunk"),
        (lambda data: data[:8] + b"\x07" + data[9:], "of 7.1"),
        (lambda data: data + bytes(1 << 22), "a chunk of"),
        (lambda data: data[:56], "a chunk of 0 bytes"),
    ],
    ids=["empty", "short", "magic", "epoch", "too long", "no data"],
)
async def test_a_damaged_chunk_is_refused(
    damage: Callable[[bytes], bytes], reason: str, courier_pair: Any, run: str
) -> None:
    """A chunk is empty, short, of another epoch, or larger than the payload: an error names it."""

    def fault(chunks: list[Any]) -> list[Any]:
        return [chunks[0], _Message(damage(chunks[1].data)), *chunks[2:]]

    with pytest.raises(WindowError, match=reason):
        await _round_through(fault, await courier_pair(), run)


async def test_rank_zero_keeps_a_bounded_number_of_bytes_ahead(courier_pair: Any, run: str) -> None:
    """A member does not call receive(): rank 0 stops within its bound, and goes on when it does."""
    ours, theirs = await courier_pair()
    root, member = BusWindow(_spec(run, 0), ours), BusWindow(_spec(run, 1), theirs)
    await asyncio.gather(root.open(5), member.open(5))
    payload = torch.randint(0, 256, (3 * IN_FLIGHT_NBYTES,), dtype=torch.uint8)
    sending = asyncio.ensure_future(root.send(payload, attempt=1, timeout_s=20))
    await asyncio.sleep(0.5)
    assert not sending.done()
    assert member._pending_nbytes <= IN_FLIGHT_NBYTES + CHUNK_NBYTES
    staging = torch.zeros_like(payload)
    await asyncio.gather(sending, member.receive(staging, attempt=1, timeout_s=20))
    assert torch.equal(staging, payload)
    await asyncio.gather(root.close(), member.close())


async def test_a_flood_ends_the_window_and_not_the_memory(courier_pair: Any, run: str) -> None:
    """Someone publishes without regard to acknowledgements: the member drops it and says so."""
    ours, theirs = await courier_pair()
    root, member = BusWindow(_spec(run, 0), ours), BusWindow(_spec(run, 1), theirs)
    await asyncio.gather(root.open(5), member.open(5))
    for _ in range(2 * IN_FLIGHT_NBYTES // CHUNK_NBYTES + 2):
        await ours.publish(f"{root.spec.prefix}.chunk", bytes(CHUNK_NBYTES))
        await ours.flush(5)
    await asyncio.sleep(0.2)
    assert member._pending_nbytes <= 2 * IN_FLIGHT_NBYTES + CHUNK_NBYTES
    with pytest.raises(WindowError, match="faster than"):
        await member.receive(torch.zeros(8, dtype=torch.uint8), attempt=1, timeout_s=5)
    await asyncio.gather(root.abort(), member.abort())


async def test_foreign_acknowledgements_are_ignored(courier_pair: Any, run: str) -> None:
    """Garbage on the subject of acknowledgements, or from a rank that is not: nothing changes."""
    ours, theirs = await courier_pair()
    root, member = BusWindow(_spec(run, 0), ours), BusWindow(_spec(run, 1), theirs)
    await asyncio.gather(root.open(5), member.open(5))
    for rank, data in (("1", b""), ("1", bytes(15)), ("9", bytes(16)), ("x", bytes(16))):
        await theirs.publish(f"{root.spec.prefix}.ack.{rank}", data)
    await theirs.flush(5)
    payload = torch.ones(1000, dtype=torch.uint8)
    staging = torch.zeros_like(payload)
    await asyncio.gather(
        root.send(payload, attempt=1, timeout_s=5), member.receive(staging, attempt=1, timeout_s=5)
    )
    assert torch.equal(staging, payload)
    await asyncio.gather(root.close(), member.close())


async def test_chunks_fit_into_the_servers_messages(
    tmp_path: Any, connected: Connect, run: str
) -> None:
    """The server takes 64 KiB a message: chunks are smaller, and the payload is whole."""
    with Broker(store_dir=tmp_path, max_payload=64 << 10) as url:
        couriers = await connected(url), await connected(url)
        assert couriers[0].max_payload == 64 << 10
        root, member = (BusWindow(_spec(run, rank), couriers[rank]) for rank in (0, 1))
        await asyncio.gather(root.open(5), member.open(5))
        payload = torch.randint(0, 256, (300_001,), dtype=torch.uint8)
        staging = torch.zeros_like(payload)
        await asyncio.gather(
            root.send(payload, attempt=1, timeout_s=5),
            member.receive(staging, attempt=1, timeout_s=5),
        )
        assert torch.equal(staging, payload)
        await asyncio.gather(root.close(), member.close())


async def test_a_broker_with_tiny_messages_is_refused(bus: NatsBus, run: str) -> None:
    """No header fits into a message: the window says that it cannot work here."""

    class Tiny:
        max_payload = 16

        def __getattr__(self, name: str) -> Any:
            return getattr(bus, name)

    window = BusWindow(_spec(run, 0), Tiny())  # type: ignore[arg-type]
    with pytest.raises(WindowUnavailable, match="takes 16 bytes"):
        await window.open(5)
    await window.abort()


async def test_a_broker_that_dies_ends_the_round_by_its_deadline(
    own_broker: Broker, connected: Connect, run: str
) -> None:
    """The broker goes away amid a round: both ends have an error within the deadline."""
    couriers = await connected(own_broker.url), await connected(own_broker.url)
    root, member = (BusWindow(_spec(run, rank), couriers[rank]) for rank in (0, 1))
    await asyncio.gather(root.open(5), member.open(5))
    payload = torch.zeros(4 * IN_FLIGHT_NBYTES, dtype=torch.uint8)
    sending = asyncio.ensure_future(root.send(payload, attempt=1, timeout_s=1))
    await asyncio.sleep(0.1)
    own_broker.close()
    deadline = Deadline(4)
    receiving = member.receive(torch.zeros_like(payload), attempt=1, timeout_s=1)
    ended = await asyncio.gather(sending, receiving, return_exceptions=True)
    assert not deadline.passed
    assert all(isinstance(error, WindowError) for error in ended)
    await asyncio.gather(root.abort(), member.abort())

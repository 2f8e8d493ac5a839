"""What only the gloo window decides: where it listens, and that no torch world comes of it."""

import asyncio
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed

from sparsecast.messages.errors import WindowError, WindowTimeout, WindowUnavailable
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.windows import WindowSpec, available_kinds, open_window
from sparsecast.pipeline.windows.addresses import INTERFACE_VARIABLE
from sparsecast.pipeline.windows.gloo import GlooWindow


def _spec(run: str, rank: int, size: int = 2) -> WindowSpec:
    return WindowSpec("gloo", f"sparsecast.{run}.window.1.1", 1, 1, rank, size)


async def _opened(bus: Any, run: str, size: int = 2, **options: Any) -> list[GlooWindow]:
    windows = [GlooWindow(_spec(run, rank, size), bus, **options) for rank in range(size)]
    await asyncio.gather(*(window.open(10) for window in windows))
    return windows


async def test_it_listens_where_the_broker_is_reached(bus: NatsBus, run: str) -> None:
    """The broker is on the loopback and so are all ranks: nobody else can connect."""
    windows = await _opened(bus, run)
    try:
        assert [window._endpoint[0] for window in windows] == ["127.0.0.1"] * 2  # type: ignore[index]
        assert not torch.distributed.is_initialized()
    finally:
        await asyncio.gather(*(window.close() for window in windows))


async def test_the_connections_can_be_seen(bus: NatsBus, run: str) -> None:
    """abort() within milliseconds rests on finding gloo's sockets: this torch's are found."""
    windows = await _opened(bus, run)
    try:
        assert [window._links for window in windows] == [1, 1]
    finally:
        await asyncio.gather(*(window.close() for window in windows))


async def test_the_environment_names_the_interface(
    bus: NatsBus, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SPARSECAST_GLOO_INTERFACE comes first; an interface that is not there is named."""
    monkeypatch.setenv(INTERFACE_VARIABLE, "lo")
    windows = await _opened(bus, run, address="192.0.2.77")
    await asyncio.gather(*(window.close() for window in windows))
    monkeypatch.setenv(INTERFACE_VARIABLE, "nosuch0")
    window = GlooWindow(_spec(run, 0), bus)
    with pytest.raises(WindowUnavailable, match=f"interface nosuch0.*{INTERFACE_VARIABLE}"):
        await window.open(5)
    await window.abort()


async def test_an_address_that_is_not_ours_is_unavailable(bus: NatsBus, run: str) -> None:
    """The address belongs to another machine: the window says that gloo cannot listen there."""
    windows = [GlooWindow(_spec(run, rank), bus, address="198.51.100.9") for rank in (0, 1)]
    ended = await asyncio.gather(*(w.open(5) for w in windows), return_exceptions=True)
    assert any("cannot listen on 198.51.100.9" in str(error) for error in ended)
    assert all(error is not None for error in ended)
    await asyncio.gather(*(window.abort() for window in windows))


async def test_a_courier_without_a_place_needs_an_address(bus: NatsBus, run: str) -> None:
    """Nothing says where the other ranks are: the window asks for the interface."""

    class Nowhere:
        max_payload = 1 << 20

    window = GlooWindow(_spec(run, 0), Nowhere())  # type: ignore[arg-type]
    with pytest.raises(WindowUnavailable, match=INTERFACE_VARIABLE):
        await window.open(5)
    await window.abort()


async def test_threads_end_with_the_window(bus: NatsBus, run: str) -> None:
    """Nothing of a closed or aborted window runs on, nor of one that never opened."""

    def lanes() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("sparsecast-gloo")]

    windows = await _opened(bus, run)
    assert len(lanes()) == 2
    await windows[0].close()
    await windows[1].abort()
    lonely = GlooWindow(_spec(f"{run}-2", 1), bus)
    with pytest.raises(WindowTimeout):
        await lonely.open(0.2)
    await lonely.abort()
    for _ in range(100):
        if not lanes():
            break
        await asyncio.sleep(0.02)
    assert lanes() == []


async def test_the_factory_makes_what_is_available(bus: NatsBus, run: str) -> None:
    """gloo before bus; a kind that cannot be opened here is refused by name."""
    assert available_kinds("cpu") == ("gloo", "bus")
    for kind in available_kinds("cpu"):
        spec = WindowSpec(kind, "p", 1, 1, 0, 2)
        window = open_window(spec, bus)
        assert window.spec == spec
        await window.abort()
    with pytest.raises(WindowUnavailable, match="no nccl window here, only gloo and bus"):
        open_window(WindowSpec("nccl", "p", 1, 1, 0, 2), bus)


async def test_a_rank_that_passes_nothing_on_costs_one_deadline(bus: NatsBus, run: str) -> None:
    """Of four ranks, the one that would pass the pieces on to another never enters: the others
    get an error at the deadline, and gloo lets go of all the pieces that were queued."""
    windows = await _opened(bus, run, size=4)
    memory = [torch.zeros(40_000_000, dtype=torch.uint8) for _ in windows]
    started = time.monotonic()
    works = [windows[0].send(memory[0], attempt=1, timeout_s=1.0)]
    works += [windows[rank].receive(memory[rank], attempt=1, timeout_s=1.0) for rank in (1, 3)]
    ended = await asyncio.gather(*works, return_exceptions=True)
    took_s = time.monotonic() - started
    assert isinstance(ended[2], WindowError), ended
    # Rank 1 hears from rank 0 itself: it may have it all.
    assert all(found is None or isinstance(found, WindowError) for found in ended), ended
    await asyncio.gather(*(window.abort() for window in windows))
    assert took_s < 4.0

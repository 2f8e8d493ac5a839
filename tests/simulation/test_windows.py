"""The simulated window keeps the contract of a window, and fails in the ways that it is told to."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
import torch

from sparsecast.messages.errors import WindowAborted, WindowError, WindowTimeout
from sparsecast.pipeline.windows.base import WindowSpec

from .loop import Process, VirtualLoop
from .windows import Fabric, SimWindow

PAYLOAD = torch.arange(100, dtype=torch.uint8)
Program = Callable[[Fabric, list[SimWindow]], Awaitable[None]]


def play(program: Program, size: int = 3) -> None:
    """Run a program with the ends of one window, each in a process of its own."""
    loop = VirtualLoop()
    fabric = Fabric(loop, random.Random(1))
    ends = []
    for rank in range(size):
        process = Process(loop, f"rank {rank}")
        spec = WindowSpec(kind="gloo", prefix="w", epoch=1, window=1, rank=rank, size=size)
        ends.append(SimWindow(fabric, process, spec))
    loop.run_until_complete(asyncio.wait_for(program(fabric, ends), 600))
    loop.finish()
    assert loop.complaints == []


async def open_all(ends: list[SimWindow]) -> list[BaseException | None]:
    """Open every end; how it went."""
    return await asyncio.gather(*(end.open(5) for end in ends), return_exceptions=True)


async def broadcast(
    ends: list[SimWindow], attempt: int = 1
) -> tuple[list[BaseException | None], list[torch.Tensor]]:
    """One round; how it went, and what came."""
    stagings = [torch.zeros_like(PAYLOAD) for _ in ends[1:]]
    results = await asyncio.gather(
        ends[0].send(PAYLOAD, attempt=attempt, timeout_s=5),
        *(
            end.receive(staging, attempt=attempt, timeout_s=5)
            for end, staging in zip(ends[1:], stagings, strict=True)
        ),
        return_exceptions=True,
    )
    return results, stagings


def test_rounds_bring_the_payload() -> None:
    """Three ranks meet, and the payload comes to both receivers, twice."""

    async def program(fabric: Fabric, ends: list[SimWindow]) -> None:
        assert await open_all(ends) == [None] * 3
        for _ in range(2):
            results, stagings = await broadcast(ends)
            assert results == [None] * 3
            assert all(torch.equal(staging, PAYLOAD) for staging in stagings)

    play(program)


def test_a_rank_that_does_not_come() -> None:
    """Rank 2 never opens: the others end at their deadlines."""

    async def program(fabric: Fabric, ends: list[SimWindow]) -> None:
        for error in await open_all(ends[:2]):
            assert isinstance(error, WindowTimeout)

    play(program)


def test_an_abort_breaks_what_is_pending() -> None:
    """Rank 1 waits for a payload that does not come, and breaks off."""

    async def program(fabric: Fabric, ends: list[SimWindow]) -> None:
        await open_all(ends)
        receiving = asyncio.ensure_future(ends[1].receive(PAYLOAD.clone(), attempt=1, timeout_s=50))
        await asyncio.sleep(1)
        await ends[1].abort()
        await ends[1].abort()
        with pytest.raises(WindowAborted):
            await receiving
        with pytest.raises(WindowAborted):
            await ends[1].open(1)

    play(program)


@pytest.mark.parametrize("notices", [0.0, 1.0])
def test_a_killed_rank(notices: float) -> None:
    """Rank 2 is killed in the round: the others fail at once, or at their deadlines."""

    async def program(fabric: Fabric, ends: list[SimWindow]) -> None:
        fabric.faults.notices = notices
        await open_all(ends)
        ends[2].process.kill()
        began = asyncio.get_running_loop().time()
        results, _ = await broadcast(ends[:2])
        elapsed = asyncio.get_running_loop().time() - began
        assert all(isinstance(error, WindowError) for error in results)
        assert (elapsed < 1) if notices else (elapsed >= 5)

    play(program)


@pytest.mark.parametrize(
    ("fault", "at_root", "at_others", "whole"),
    [
        ("send_fails", WindowError, WindowTimeout, False),
        ("send_hangs", WindowTimeout, type(None), True),
        ("loses", type(None), WindowTimeout, False),
        ("breaks", type(None), WindowError, False),
        ("flips", type(None), type(None), False),
    ],
)
def test_faults(fault: str, at_root: type, at_others: type, whole: bool) -> None:
    """Each fault shows where it should: an error, a deadline, or bytes that are not the payload."""

    async def program(fabric: Fabric, ends: list[SimWindow]) -> None:
        await open_all(ends)
        setattr(fabric.faults, fault, 1.0)
        results, stagings = await broadcast(ends)
        assert isinstance(results[0], at_root)
        assert all(isinstance(error, at_others) for error in results[1:])
        assert all(torch.equal(staging, PAYLOAD) is whole for staging in stagings)

    play(program)


@pytest.mark.parametrize("fault", ["open_fails", "open_hangs"])
def test_openings_fail(fault: str) -> None:
    """The first rank's opening fails or hangs: no rank gets a window."""

    async def program(fabric: Fabric, ends: list[SimWindow]) -> None:
        setattr(fabric.faults, fault, 1.0)
        for error in await open_all(ends):
            assert isinstance(error, WindowError)

    play(program)

"""The virtual loop: no time passes but on its clock; processes freeze, thaw and die."""

import asyncio
import contextlib
import itertools
import time

import pytest

from .loop import Gone, Hung, Process, Stuck, VirtualLoop


def test_an_hour_takes_no_time() -> None:
    """A program sleeps for an hour in steps and times out once: the clock says so, nobody waits."""
    loop = VirtualLoop()
    began = time.monotonic()

    async def program() -> float:
        for _ in range(60):
            await asyncio.sleep(60)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        return loop.time()

    assert loop.run_until_complete(program()) == pytest.approx(1000 + 3605)
    assert time.monotonic() - began < 5
    loop.finish()


def test_waiting_for_nothing_is_an_error() -> None:
    """A program waits for what cannot come: the loop says so instead of hanging."""
    loop = VirtualLoop()
    with pytest.raises(Stuck):
        loop.run_until_complete(asyncio.Event().wait())
    loop.finish()


@pytest.mark.parametrize("pause_s", [0.0, 1e-6])
def test_a_program_that_spins_is_ended(pause_s: float) -> None:
    """A program goes round without sleeping, or sleeps for so little that time hardly passes: the
    loop says so, and still ends what is left.
    """
    loop = VirtualLoop()
    ended: list[str] = []

    async def spin() -> None:
        try:
            for _ in itertools.count():
                await asyncio.sleep(pause_s)
        finally:
            ended.append("spin")

    with pytest.raises(Stuck, match="something spins"):
        loop.run_until_complete(spin())
    loop.finish()
    assert ended == ["spin"]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"limit_s": 60.0}, "no end after 60 s"),
        ({"limit_steps": 50}, "no end after 50 callbacks"),
    ],
)
def test_a_program_without_an_end_is_ended(limits: dict[str, float], words: str) -> None:
    """A program idles for ever, at its ease: nothing spins, and a bound ends it."""
    loop = VirtualLoop(**limits)

    async def idle() -> None:
        for _ in itertools.count():
            await asyncio.sleep(1)

    with pytest.raises(Stuck, match=words):
        loop.run_until_complete(idle())
    assert loop.time() <= 1000 + 61
    loop.finish()


def test_a_callback_that_does_not_return_is_ended() -> None:
    """A task never comes back to the loop; the alarm's Hung passes what answers exceptions."""
    loop = VirtualLoop()

    async def spin() -> None:
        for turns in itertools.count():
            with contextlib.suppress(Exception):
                if turns == 1000:
                    raise Hung("too long")

    with pytest.raises(Hung):
        loop.run_until_complete(spin())
    loop.finish()


def test_who_asks_a_process_that_ends_is_told() -> None:
    """A process does what it is asked; it is killed during the next request; then it is dead."""
    loop = VirtualLoop(0.0)
    process = Process(loop, "w0")

    async def main() -> None:
        assert await process.ask(asyncio.sleep(1, "done")) == "done"
        loop.call_at(3.0, process.kill)
        with pytest.raises(Gone, match="w0 ended meanwhile"):
            await process.ask(asyncio.sleep(5))
        assert loop.time() == 3.0
        with pytest.raises(Gone, match="w0 has ended"):
            await process.ask(asyncio.sleep(5))
        assert loop.time() == 3.0
        assert not process.on_exit

    loop.run_until_complete(main())
    loop.finish()


def test_a_frozen_process_runs_late_and_a_killed_one_never() -> None:
    """Three processes tick once a second; one is stopped for ten seconds, one is killed."""
    loop = VirtualLoop(0.0)
    ticks: dict[str, list[float]] = {"well": [], "stopped": [], "killed": []}
    processes = {name: Process(loop, name) for name in ticks}

    async def tick(name: str) -> None:
        while True:
            await asyncio.sleep(1)
            ticks[name].append(loop.time())

    async def main() -> None:
        for name, process in processes.items():
            process.spawn(tick(name))
        await asyncio.sleep(2.5)
        processes["stopped"].freeze()
        processes["killed"].kill()
        await asyncio.sleep(10)
        processes["stopped"].thaw()
        await asyncio.sleep(2)

    loop.run_until_complete(main())
    loop.finish()
    assert ticks["well"] == pytest.approx([float(n) for n in range(1, 15)])
    assert ticks["stopped"] == pytest.approx([1, 2, 12.5, 13.5, 14.5])
    assert ticks["killed"] == pytest.approx([1, 2])


def test_sets_of_tasks_keep_one_order() -> None:
    """Tasks end in the order in which a set of them is cancelled: the same in every run."""

    def order() -> list[int]:
        loop = VirtualLoop()
        ended: list[int] = []

        async def wait(number: int) -> None:
            try:
                await asyncio.sleep(100)
            finally:
                ended.append(number)

        async def main() -> None:
            tasks = {loop.create_task(wait(n)) for n in range(50)}
            await asyncio.sleep(1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        loop.run_until_complete(main())
        loop.finish()
        return ended

    assert order() == order()

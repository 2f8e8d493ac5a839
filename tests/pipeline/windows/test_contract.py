"""The contract of a window, for every kind: real processes, the real broker, real faults.

Each test runs a scenario in two or three processes; rank 0 sends. The bounds on time are generous:
they tell a bounded wait from a hang, not a fast machine from a slow one.
"""

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
import torch

from sparsecast.messages.errors import (
    LocalProtocolError,
    WindowAborted,
    WindowError,
    WindowTimeout,
)
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.windows import Window, WindowSpec, open_window
from spawn import KILLED, Processes, spawn
from windowranks import MARGIN_S, Outcome, Rank, digest, in_rank, outcome, pattern

Test = TypeVar("Test", bound=Callable[..., None])


def of(ranks: int) -> Callable[[Test], Test]:
    """The test has up to so many ranks: with nccl, each needs a GPU. Two, unless told."""

    def mark(test: Test) -> Test:
        test.ranks = ranks  # type: ignore[attr-defined]
        return test

    return mark


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test that wants a `window` every kind of it."""
    if "window" in metafunc.fixturenames:
        gpus = getattr(metafunc.function, "ranks", 2)
        nccl = pytest.param("nccl", marks=pytest.mark.gpu(gpus))
        metafunc.parametrize("window", ["gloo", "bus", nccl])


@pytest.fixture
def broker_url(broker: Broker) -> str:
    """Where the session's broker is."""
    return broker.url


@pytest.fixture
def prefix(run: str) -> str:
    """A prefix that no other test uses."""
    return f"sparsecast.{run}.window"


# ---- in order


SIZES = (1, 0, 1 << 20, 5_000_001, 1, 3)


@in_rank
async def _many_rounds(me: Rank) -> list[str]:
    window = me.window(1)
    await window.open(20)
    hashes = [await me.round(window, nbytes, attempt) for attempt, nbytes in enumerate(SIZES)]
    await window.close()
    return hashes


@pytest.mark.parametrize("ranks", [3, 4])
@of(4)
def test_rounds_of_all_sizes_arrive_whole(
    window: str, ranks: int, prefix: str, broker_url: str
) -> None:
    """One window carries a byte, nothing at all, a mebibyte, five megabytes and one, a byte; with
    four ranks gloo passes payloads on, in pieces."""
    expected = [digest(pattern(nbytes, attempt)) for attempt, nbytes in enumerate(SIZES)]
    results = spawn(ranks, _many_rounds, window, prefix, timeout_s=60, broker_url=broker_url)
    assert results == [expected] * ranks


def _weights(dtype: torch.dtype) -> torch.Tensor:
    bits = pattern(600_000, 7).clone()
    # NaNs with payloads, infinities, -0.0 and subnormals are among random bits; make sure of some.
    bits[:16] = torch.tensor([0, 0, 0, 128] + [255] * 8 + [0, 0, 128, 127], dtype=torch.uint8)
    return bits.view(dtype)


@in_rank
async def _same_as_dense(me: Rank, dtype: torch.dtype) -> tuple[bool, bool]:
    weights = _weights(dtype).to(me.device)
    dense, ours = torch.zeros_like(weights), torch.zeros_like(weights)
    window = me.window(1)
    await window.open(20)
    if me.rank == 0:
        dense, ours = weights.clone(), me.settled(weights.clone())
        await window.send(ours.view(torch.uint8), attempt=1, timeout_s=20)
    else:
        await window.receive(ours.view(torch.uint8), attempt=1, timeout_s=20)
        dense.copy_(weights)
    await window.close()
    same = torch.equal(ours.view(torch.uint8), dense.view(torch.uint8))
    return same, digest(ours.view(torch.uint8)) == digest(weights.view(torch.uint8))


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.int64],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_weights_equal_a_dense_copy(
    window: str, dtype: torch.dtype, prefix: str, broker_url: str
) -> None:
    """Weights of any dtype, NaN payloads and -0.0 among them, equal a dense copy bit for bit."""
    results = spawn(2, _same_as_dense, window, prefix, dtype, timeout_s=60, broker_url=broker_url)
    assert results == [(True, True)] * 2


class _Counting:
    """A courier that counts the subscriptions made through it."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus
        self.subscriptions = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def subscribe(self, *args: Any, **kwargs: Any) -> Any:
        self.subscriptions += 1
        return await self._bus.subscribe(*args, **kwargs)


@in_rank
async def _open_twice(me: Rank) -> tuple[int, int, str]:
    me.bus = counting = _Counting(me.bus)  # type: ignore[assignment]
    window = me.window(1)
    await asyncio.gather(window.open(20), window.open(20))
    once = counting.subscriptions
    await window.open(20)
    result = await me.round(window, 1000, 1)
    await window.close()
    await window.close()
    await window.abort()
    return once, counting.subscriptions, result


def test_ensure_open_opens_once(window: str, prefix: str, broker_url: str) -> None:
    """open() twice at the same time and once more later: one meeting, and the window works."""
    results = spawn(2, _open_twice, window, prefix, timeout_s=60, broker_url=broker_url)
    for once, after, found in results:
        assert after == once
        assert once <= 2
        assert found == digest(pattern(1000, 1))


@in_rank
async def _reopen(me: Rank) -> tuple[list[str], list[int], list[int]]:
    hashes, descriptors, threads = [], [], []
    for number in range(1, 7):
        window = me.window(number)
        await window.open(20)
        hashes.append(await me.round(window, 100_000, number))
        await window.close()
        gc.collect()
        # NCCL takes a communicator apart behind our back.
        await asyncio.sleep(0.5 if me.kind == "nccl" else 0.05)
        descriptors.append(len(os.listdir("/proc/self/fd")))
        threads.append(len(os.listdir("/proc/self/task")))
    return hashes, descriptors, threads


def test_reopen_after_close_leaves_nothing_behind(
    window: str, prefix: str, broker_url: str
) -> None:
    """Six windows one after the other: no descriptor and no thread is left of the earlier ones."""
    results = spawn(2, _reopen, window, prefix, timeout_s=60, broker_url=broker_url)
    for hashes, descriptors, threads in results:
        assert hashes == [digest(pattern(100_000, number)) for number in range(1, 7)]
        assert descriptors[-1] <= descriptors[1]
        assert threads[-1] <= threads[1]


@in_rank
async def _two_at_once(me: Rank) -> list[list[str]]:
    windows = [me.window(1), me.window(2)]
    await asyncio.gather(*(window.open(20) for window in windows))

    async def rounds(window: Window) -> list[str]:
        first = 10 * window.spec.window
        return [await me.round(window, 700_000, first + attempt) for attempt in range(3)]

    found = await asyncio.gather(*(rounds(window) for window in windows))
    await asyncio.gather(*(window.close() for window in windows))
    return list(found)


@of(3)
def test_two_windows_at_once(window: str, prefix: str, broker_url: str) -> None:
    """Two windows between the same processes carry rounds at the same time and do not mix."""
    results = spawn(3, _two_at_once, window, prefix, timeout_s=60, broker_url=broker_url)
    expected = [[digest(pattern(700_000, 10 * n + a)) for a in range(3)] for n in (1, 2)]
    assert results == [expected] * 3


@in_rank
async def _late(me: Rank) -> tuple[str, float]:
    window = me.window(1)
    if me.rank == me.context.size - 1:
        await asyncio.sleep(1.0)
    started = time.monotonic()
    await window.open(20)
    elapsed_s = time.monotonic() - started
    found = await me.round(window, 1000, 3)
    await window.close()
    return found, elapsed_s


@of(3)
def test_a_late_rank_is_waited_for(window: str, prefix: str, broker_url: str) -> None:
    """The last rank comes a second late: the others wait for it, and the window works."""
    results = spawn(3, _late, window, prefix, timeout_s=60, broker_url=broker_url)
    assert [found for found, _ in results] == [digest(pattern(1000, 3))] * 3
    assert results[0][1] > 0.5


@in_rank
async def _rank_zero_late(me: Rank) -> str:
    window = me.window(1)
    if me.rank == 0:
        await asyncio.sleep(0.5)
    await window.open(20)
    found = await me.round(window, 1000, 3)
    await window.close()
    return found


@of(3)
def test_rank_zero_may_come_last(window: str, prefix: str, broker_url: str) -> None:
    """The others ask before rank 0 listens: they ask again until it does."""
    results = spawn(3, _rank_zero_late, window, prefix, timeout_s=60, broker_url=broker_url)
    assert results == [digest(pattern(1000, 3))] * 3


# ---- refusals


async def _refusal(work: Awaitable[Any]) -> str:
    try:
        await work
    except (LocalProtocolError, WindowError) as exc:
        return f"{type(exc).__name__}: {exc}"
    return "accepted"


@in_rank
async def _misuse(me: Rank) -> dict[str, str]:
    window = me.window(1)
    tensor = me.memory(8)
    mine, theirs = window.send, window.receive
    if me.rank != 0:
        mine, theirs = theirs, mine
    found = {"before open": await _refusal(mine(tensor, attempt=1, timeout_s=5))}
    await window.open(20)
    found["other side"] = await _refusal(theirs(tensor, attempt=1, timeout_s=5))
    found["strided"] = await _refusal(mine(torch.zeros(16)[::2], attempt=1, timeout_s=5))
    found["strided bytes"] = await _refusal(
        mine(torch.zeros(16, dtype=torch.uint8)[::2], attempt=1, timeout_s=5)
    )
    found["2-d"] = await _refusal(mine(tensor.view(2, 4), attempt=1, timeout_s=5))
    elsewhere = torch.zeros(8, dtype=torch.uint8, device="meta")
    found["elsewhere"] = await _refusal(mine(elsewhere, attempt=1, timeout_s=5))
    running = asyncio.ensure_future(mine(tensor, attempt=1, timeout_s=5))
    await asyncio.sleep(0)
    found["busy"] = await _refusal(mine(tensor, attempt=2, timeout_s=5))
    await running
    await window.close()
    found["closed"] = await _refusal(mine(tensor, attempt=2, timeout_s=5))
    aborted = me.window(2)
    await aborted.abort()
    await aborted.abort()
    await aborted.close()
    found["open after abort"] = await _refusal(aborted.open(5))
    return found


def test_misuse_is_refused_and_harms_nothing(window: str, prefix: str, broker_url: str) -> None:
    """Wrong side, strided memory, another shape or device, two rounds at a time: each named, none
    sent."""
    results = spawn(2, _misuse, window, prefix, timeout_s=60, broker_url=broker_url)
    for found in results:
        assert "not open" in found["before open"]
        assert "rank 0 sends" in found["other side"]
        assert "contiguous" in found["strided"]
        assert "contiguous" in found["strided bytes"]
        assert "shape [2, 4]" in found["2-d"]
        assert "a tensor on meta cannot go through" in found["elsewhere"]
        assert "one round at a time" in found["busy"]
        assert "closed" in found["closed"]
        assert found["open after abort"].startswith("WindowAborted")


def test_a_window_needs_two_ranks_and_a_place(window: str) -> None:
    """A spec that no window can have is refused when the window is made."""
    device = "cuda" if window == "nccl" else "cpu"
    for rank, size in ((0, 1), (2, 2), (-1, 2)):
        with pytest.raises(LocalProtocolError, match=f"rank {rank} of {size}"):
            open_window(WindowSpec(window, "p", 1, 1, rank, size, device), None)  # type: ignore[arg-type]


@in_rank
async def _disagree(me: Rank, what: str) -> tuple[str, str, bool]:
    window = me.window(1)
    await window.open(20)
    await me.round(window, 2000, 1)
    attempt, nbytes = 2, 2_000_000
    if me.rank == 1:
        attempt, nbytes = (3, nbytes) if what == "attempt" else (2, 1_000_000)
    memory = me.memory(nbytes, 9)
    if me.rank == 0:
        work = window.send(memory, attempt=attempt, timeout_s=1.5)
    else:
        work = window.receive(memory, attempt=attempt, timeout_s=1.5)
    try:
        await work
        first, reason = "done", ""
    except WindowError as exc:
        first, reason = type(exc).__name__, str(exc)
    await me.context.meeting("disagreed")
    await window.abort()
    again = me.window(2)
    await again.open(20)
    works = await me.round(again, 2000, 5) == digest(pattern(2000, 5))
    await again.close()
    return first, reason, works


@pytest.mark.parametrize("what", ["attempt", "size"])
def test_a_rank_that_expects_another_round_gets_an_error(
    window: str, what: str, prefix: str, broker_url: str
) -> None:
    """Rank 1 is in another attempt, or knows another size: an error that names both, no garbage."""
    results = spawn(2, _disagree, window, prefix, what, timeout_s=60, broker_url=broker_url)
    kind, reason, _ = results[1]
    assert kind == "WindowError"
    assert "rank 0 sends attempt 2 of 1.1, 2000000 bytes" in reason
    expected = "attempt 3 of 1.1, 2000000" if what == "attempt" else "attempt 2 of 1.1, 1000000"
    assert f"expects {expected} bytes" in reason
    assert [works for _, _, works in results] == [True, True]


# ---- deadlines and aborts


@in_rank
async def _absent(me: Rank, absent: int, how: str) -> dict[str, Outcome]:
    if me.rank == absent:
        await me.context.waiting("over", rank=1 - absent)
        return {}
    window = me.window(1)
    found = {}
    opening = asyncio.ensure_future(outcome(window.open(0.6 if how == "deadline" else 20)))
    if how == "abort":
        await asyncio.sleep(0.3)
        found["abort"] = await outcome(window.abort())
    found["open"] = await opening
    found["abort after"] = await outcome(window.abort())
    me.context.mark("over")
    return found


@pytest.mark.parametrize("absent", [0, 1])
@pytest.mark.parametrize("how", ["deadline", "abort"])
def test_a_peer_that_never_comes(
    window: str, how: str, absent: int, prefix: str, broker_url: str
) -> None:
    """The other rank never opens its end: open() ends at its deadline, or with abort()."""
    results = spawn(2, _absent, window, prefix, absent, how, timeout_s=60, broker_url=broker_url)
    found = results[1 - absent]
    kind, elapsed_s = found["open"]
    if how == "deadline":
        assert kind == "WindowTimeout"
        assert 0.5 < elapsed_s < 0.6 + MARGIN_S
    else:
        assert kind == "WindowAborted"
        assert found["abort"][1] < MARGIN_S
        assert elapsed_s < 0.3 + MARGIN_S
    assert found["abort after"][0] == "done"


@in_rank
async def _abort_waiting(me: Rank) -> tuple[Outcome, Outcome, bool, str]:
    window = me.window(1)
    await window.open(20)
    memory = me.large(1)
    if me.rank == 0:
        await me.context.waiting("aborted", rank=1)
        # The round comes after all: nobody may write it into memory that was given back.
        sent = await outcome(window.send(memory, attempt=1, timeout_s=1))
        await me.context.waiting("aborted", rank=2)
        aborted = await outcome(window.abort())
        untouched = True
    else:
        receiving = asyncio.ensure_future(outcome(window.receive(memory, attempt=1, timeout_s=30)))
        await asyncio.sleep(0.3)
        if me.rank == 2:
            await me.context.waiting("aborted", rank=1)
            await asyncio.sleep(0.2)  # rank 0 is sending now
        aborted = await outcome(window.abort())
        memory.fill_(77)
        me.context.mark("aborted")
        sent = await receiving
        await asyncio.sleep(0.5)
        untouched = bool((memory == 77).all())
    await me.context.meeting("all aborted")
    again = me.window(2)
    await again.open(20)
    found = await me.round(again, 300_000, 4)
    await again.close()
    return sent, aborted, untouched, found


@of(3)
def test_abort_while_receivers_wait(window: str, prefix: str, broker_url: str) -> None:
    """Receivers abort, one while nothing comes and one amid the payload: at once, and for good.

    What they put into the staging afterwards stays, though rank 0 sends; a new window works.
    """
    results = spawn(3, _abort_waiting, window, prefix, timeout_s=60, broker_url=broker_url)
    for rank, (ended, aborted, untouched, found) in enumerate(results):
        assert aborted[0] == "done"
        assert aborted[1] < MARGIN_S
        assert untouched
        assert found == digest(pattern(300_000, 4))
        if rank:
            # Rank 2 may learn of the abort of rank 1 before its own.
            assert ended[0] in ("WindowAborted", "WindowError")[:rank]
            assert ended[1] < 5.0 + MARGIN_S
        else:
            # A receiver that is broken off within NCCL gives way: the sender may come to its end.
            through = ["done"] if window == "nccl" else []
            assert ended[0] in ("WindowTimeout", "WindowError", *through)
            assert ended[1] < 1.0 + MARGIN_S


@in_rank
async def _stopped(me: Rank, how: str) -> tuple[Outcome, Outcome, str] | None:
    window = me.window(1)
    await window.open(20)
    memory = me.large()
    if me.rank == 2:
        me.context.mark("ready to be stopped")
        await me.context.waiting("go on", rank=-1, timeout_s=60)
        await window.abort()
        return None
    await me.context.waiting("go", rank=-1)
    # Rank 0 is the first to give up: the abort of a receiver may let it through (base.Window.send).
    later_s = 0.0 if me.rank == 0 else 0.5
    timeout_s = 1.0 + later_s if how == "deadline" else 30.0
    work = window.send if me.rank == 0 else window.receive
    running = asyncio.ensure_future(outcome(work(memory, attempt=1, timeout_s=timeout_s)))
    if how == "abort":
        await asyncio.sleep(1.0 + later_s)
    else:
        await running
    aborted = await outcome(window.abort())
    ended = await running
    memory.fill_(0)
    await asyncio.sleep(0.05)
    # Rank 1 may have had all; then it waits here for the sender to see its deadline.
    again = me.window(2, size=2)
    await again.open(20)
    found = await me.round(again, 300_000, 4)
    await again.close()
    me.context.mark("survived")
    return ended, aborted, found


@pytest.mark.parametrize("how", ["deadline", "abort"])
@of(3)
def test_a_stopped_peer_costs_one_deadline(
    window: str, how: str, prefix: str, broker_url: str
) -> None:
    """A peer is alive but stands still, and the payload does not fit into the connections.

    The sender ends at its deadline, or with abort(); the two ranks left open a window of two.
    """
    with Processes(
        3, _stopped, window, prefix, how, timeout_s=60, broker_url=broker_url
    ) as processes:
        processes.wait("ready to be stopped", rank=2)
        processes.stop(2)
        processes.mark("go")
        processes.wait("survived", rank=0)
        processes.wait("survived", rank=1)
        processes.resume(2)
        processes.mark("go on")
        results = processes.results()
    ended, aborted, _ = results[0]
    assert ended[0] == ("WindowTimeout" if how == "deadline" else "WindowAborted")
    assert ended[1] < 1.0 + MARGIN_S
    for _, (_, elapsed_s), found in results[:2]:
        assert elapsed_s < MARGIN_S
        assert found == digest(pattern(300_000, 4))
    assert aborted[0] == "done"


# ---- deaths


@in_rank
async def _killed(me: Rank, when: str) -> tuple[Outcome, Outcome, str] | None:
    window = me.window(1)
    if when == "open":
        if me.rank == 2:
            await me.context.waiting("never", timeout_s=60)
        me.context.mark("ready")
        ended = await outcome(window.open(1.5))
    else:
        await window.open(20)
        memory = me.large()
        if me.rank == 2:
            me.context.mark("ready")
            if when == "receive":
                await window.receive(memory, attempt=1, timeout_s=60)
            await me.context.waiting("never", timeout_s=60)
        if when == "receive" and me.rank == 0:
            await me.context.waiting("killed", rank=-1)
        me.context.mark("ready")
        if when == "idle":
            await me.context.waiting("killed", rank=-1)
        work = window.send if me.rank == 0 else window.receive
        # Rank 0 begins last and gives up first: see _stopped.
        timeout_s = 1.5 if me.rank == 0 else 3.0
        ended = await outcome(work(memory, attempt=1, timeout_s=timeout_s))
    aborted = await outcome(window.abort())
    await me.context.waiting("killed", rank=-1)
    again = me.window(2, size=2)
    await again.open(20)
    found = await me.round(again, 300_000, 4)
    await again.close()
    return ended, aborted, found


@pytest.mark.parametrize("when", ["open", "idle", "receive"])
@of(3)
def test_survivors_of_a_killed_peer_open_a_new_window(
    window: str, when: str, prefix: str, broker_url: str
) -> None:
    """Rank 2 is SIGKILLed before it opens, idle, or while it receives: one deadline at most.

    The sender does not succeed by accident; the ranks left abort and carry on in a window of two.
    """
    with Processes(
        3, _killed, window, prefix, when, timeout_s=60, broker_url=broker_url
    ) as processes:
        processes.wait("ready", rank=1 if when == "open" else 2)
        time.sleep(0.3)
        processes.kill(2)
        processes.mark("killed")
        results = processes.results()
    assert results[2] == KILLED
    ended, _, _ = results[0]
    assert ended[0] in ("WindowTimeout", "WindowError")
    for rank, (ended, aborted, found) in enumerate(results[:2]):
        assert ended[1] < (3.0 if rank else 1.5) + MARGIN_S
        assert aborted[0] == "done"
        assert aborted[1] < MARGIN_S
        assert found == digest(pattern(300_000, 4))


@in_rank
async def _faulty_root(me: Rank) -> tuple[Outcome, Outcome, bool] | None:
    window = me.window(1)
    await window.open(20)
    memory = me.large()
    if me.rank == 0:
        me.context.mark("ready")
        await me.context.waiting("go", rank=1)
        try:
            while True:  # many rounds: the parent kills or stops this rank amid one of them
                await window.send(memory, attempt=1, timeout_s=3)
        except WindowError:
            await window.abort()
            return None
    started = False
    me.context.mark("go")
    ended = ("done", 0.0)
    while ended[0] == "done":
        ended = await outcome(window.receive(memory, attempt=1, timeout_s=1.5))
        if not started:
            started = True
            me.context.mark("under way")
    aborted = await outcome(window.abort())
    memory.fill_(77)
    me.context.mark("given up")
    await me.context.waiting("root goes on", rank=-1)
    await asyncio.sleep(0.3)
    return ended, aborted, bool((memory == 77).all())


@pytest.mark.parametrize("fault", ["kill", "stop"])
@of(3)
def test_rank_zero_fails_amid_its_payloads(
    window: str, fault: str, prefix: str, broker_url: str
) -> None:
    """The trainer is SIGKILLed or SIGSTOPped while it sends: receivers end by the deadline.

    What they put into the staging after abort() stays, though the stopped trainer goes on.
    """
    with Processes(
        3, _faulty_root, window, prefix, timeout_s=60, broker_url=broker_url
    ) as processes:
        processes.wait("under way", rank=1)
        processes.wait("under way", rank=2)
        if fault == "kill":
            processes.kill(0)
        else:
            processes.stop(0)
        processes.wait("given up", rank=1)
        processes.wait("given up", rank=2)
        if fault == "stop":
            processes.resume(0)
        processes.mark("root goes on")
        results = processes.results()
    for ended, aborted, untouched in results[1:]:
        assert ended[0] in ("WindowTimeout", "WindowError")
        assert ended[1] < 1.5 + MARGIN_S
        assert aborted[1] < MARGIN_S
        assert untouched


@in_rank
async def _cancelled(me: Rank) -> tuple[str, Outcome, bool]:
    window = me.window(1)
    await window.open(20)
    memory = me.memory(1 << 20)
    if me.rank == 0:
        await me.context.meeting("cancelled")
        await window.abort()
        return "", ("done", 0.0), True
    receiving = asyncio.ensure_future(window.receive(memory, attempt=1, timeout_s=30))
    await asyncio.sleep(0.1)
    receiving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await receiving
    refused = await _refusal(window.receive(memory, attempt=2, timeout_s=5))
    aborted = await outcome(window.abort())
    memory.fill_(77)
    await me.context.meeting("cancelled")
    await asyncio.sleep(0.3)
    return refused, aborted, bool((memory == 77).all())


def test_a_cancelled_caller_leaves_a_window_to_abort(
    window: str, prefix: str, broker_url: str
) -> None:
    """The task that awaits receive() is cancelled: the window refuses more, and aborts cleanly."""
    results = spawn(2, _cancelled, window, prefix, timeout_s=60, broker_url=broker_url)
    refused, aborted, untouched = results[1]
    assert "abort it" in refused
    assert aborted[0] == "done"
    assert aborted[1] < MARGIN_S
    assert untouched


def test_the_errors_are_of_one_tree() -> None:
    """Who catches WindowError catches timeouts and aborts as well."""
    assert issubclass(WindowTimeout, WindowError)
    assert issubclass(WindowAborted, WindowError)

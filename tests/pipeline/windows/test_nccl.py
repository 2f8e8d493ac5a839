"""What only the nccl window decides: when it is there, where memory lies, and who is lost."""

import asyncio
import importlib.metadata
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecast.messages.errors import WindowError, WindowUnavailable
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.windows import (
    WindowSpec,
    available_kinds,
    bounce,
    envelope,
    gpu_identity,
    nccl,
)
from spawn import KILLED, Processes, spawn
from windowranks import MARGIN_S, Outcome, Rank, digest, in_rank, outcome, pattern


@pytest.fixture
def prefix(run: str) -> str:
    """A prefix that no other test uses."""
    return f"sparsecast.{run}.window"


# ---- whether it is there


class _Loads:
    def version(self) -> str:
        return "2.28.9"


class _Lacks:
    def __init__(self) -> None:
        raise ImportError("No module named 'cuda.bindings'")


@pytest.mark.parametrize(
    ("version", "library", "gpu", "expected"),
    [
        (None, _Loads, True, (False, "pip install 'sparsecast[nccl]'", "", "")),
        ("0.6.0", _Lacks, True, (False, "No module named 'cuda.bindings'", "", "0.6.0")),
        ("0.6.0", _Loads, False, (False, "no NVIDIA GPU", "2.28.9", "0.6.0")),
        ("0.6.0", _Loads, True, (True, "", "2.28.9", "0.6.0")),
    ],
    ids=["not-installed", "does-not-load", "no-gpu", "there"],
)
def test_the_probe_says_what_is_missing(
    version: str | None,
    library: type,
    gpu: bool,
    expected: tuple[bool, str, str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Something that nccl windows need is not here: the reason names it, and what to type."""

    def look(name: str) -> str:
        assert name == "nccl4py"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", look)
    monkeypatch.setattr(nccl, "Library", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = nccl.probe.__wrapped__()
    assert (found.available, found.nccl, found.nccl4py) == (expected[0], *expected[2:])
    assert expected[1] in found.reason


def test_a_cpu_rank_touches_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights on the CPU: neither nccl4py nor CUDA is asked for anything."""

    def never() -> Any:
        raise AssertionError("asked for nccl")

    monkeypatch.setattr(nccl, "probe", never)
    monkeypatch.setattr(torch.cuda, "is_available", never)
    assert "nccl" not in available_kinds("cpu")
    assert gpu_identity("cpu") == ""


def test_two_ranks_on_one_gpu_are_named() -> None:
    """Ranks 0 and 2 are on the same GPU: seen at the rendezvous, before NCCL is asked; ranks whose
    GPU cannot be told are left to NCCL."""
    spec = WindowSpec("nccl", "p", 1, 1, 0, 3, "cuda:0")
    window = nccl.NcclWindow(spec, None)  # type: ignore[arg-type]
    window._check_apart(["h GPU-a", "h GPU-b", "i GPU-c"])
    window._check_apart(["h ", "h ", "h GPU-a"])
    with pytest.raises(WindowUnavailable, match="ranks 0 and 2 are both on GPU-a of h"):
        window._check_apart(["h GPU-a", "h GPU-b", "h GPU-a"])


def test_every_rank_cuts_a_payload_alike() -> None:
    """Broadcasts must agree in size: the pieces follow from the payload's size alone."""
    step = bounce.PIECE_NBYTES
    assert list(bounce.pieces(0)) == []
    assert list(bounce.pieces(1)) == [(0, 1)]
    assert list(bounce.pieces(2 * step)) == [(0, step), (step, 2 * step)]
    assert list(bounce.pieces(2 * step + 5))[-1] == (2 * step, 2 * step + 5)


@in_rank
async def _same_gpu(me: Rank) -> str:
    me.use("cuda:0")
    window = me.window(1)
    try:
        await window.open(10)
        return "open"
    except WindowUnavailable as exc:
        return str(exc)
    finally:
        await window.abort()


@pytest.mark.gpu(1)
def test_a_shared_gpu_is_refused_before_nccl_sees_it(prefix: str, broker: Broker) -> None:
    """Two processes use cuda:0: both are told which ranks share which GPU, within a moment."""
    found = spawn(2, _same_gpu, "nccl", prefix, timeout_s=60, broker_url=broker.url)
    for text in found:
        assert "ranks 0 and 1 are both on GPU-" in text


# ---- where memory lies


#: In the envelope, as much as it takes, and a byte more; and of several pieces.
_SIZES = (1, 0, 5_000_001, envelope.CAPACITY, envelope.CAPACITY + 1, 3 << 20, 40)


@in_rank
async def _memories(me: Rank, root: str, other: str) -> list[bool]:
    mine = root if me.rank == 0 else other
    bounce.PIECE_NBYTES, bounce._SLICE_NBYTES = 1 << 20, 1 << 18
    window = me.window(1)
    await window.open(20)
    found = []
    for attempt, nbytes in enumerate(_SIZES):
        expected = pattern(nbytes, attempt)
        memory = expected if me.rank == 0 else torch.full((nbytes,), 255, dtype=torch.uint8)
        if mine == "pinned":
            memory = memory.pin_memory()
        elif mine == "other GPU":
            memory = memory.to(f"cuda:{1 - me.rank}")
        elif mine == "device":
            memory = memory.to(me.device)
        me.settled(memory)
        work = window.send if me.rank == 0 else window.receive
        await work(memory, attempt=attempt, timeout_s=20)
        found.append(digest(memory) == digest(expected))
    await window.close()
    return found


@pytest.mark.gpu(2)
@pytest.mark.parametrize(
    ("root", "other"),
    [
        ("device", "device"),
        ("pageable", "device"),
        ("device", "pageable"),
        ("pinned", "pinned"),
        ("other GPU", "other GPU"),
    ],
    ids=["device", "from-pageable", "to-pageable", "pinned", "other-gpu"],
)
def test_payload_and_staging_may_lie_anywhere(
    root: str, other: str, prefix: str, broker: Broker
) -> None:
    """A payload of many pieces from host memory to the GPU, the other way round, and between
    GPUs: all bytes come, whatever memory each rank has."""
    found = spawn(2, _memories, "nccl", prefix, root, other, timeout_s=60, broker_url=broker.url)
    assert found == [[True] * len(_SIZES)] * 2


@in_rank
async def _busy_stream(me: Rank) -> tuple[bool, bool]:
    window = me.window(1)
    await window.open(20)
    nbytes = 8 << 20
    expected = pattern(nbytes, 1)
    memory = expected.to(me.device) if me.rank == 0 else me.memory(nbytes, 255)
    me.settled(memory)
    torch.cuda._sleep(4_000_000_000)  # some 2 s
    await me.round_of(window, memory, 1)
    busy = not torch.cuda.current_stream().query()
    found = digest(memory) == digest(expected)
    await window.close()
    return busy, found


@pytest.mark.gpu(2)
def test_a_round_waits_for_no_stream_of_the_callers(prefix: str, broker: Broker) -> None:
    """An engine's forward pass is queued on the stream that is current on the window's loop: the
    payload comes all the same, and whole, before that is done."""
    found = spawn(2, _busy_stream, "nccl", prefix, timeout_s=60, broker_url=broker.url)
    assert found == [(True, True)] * 2


class _Following:
    """Work behind a payload: what it found of the bytes, and in which order it was asked."""

    def __init__(self, memory: torch.Tensor, *, fails: bool) -> None:
        self.asked: list[str] = []
        self.total = torch.zeros(1, dtype=torch.int64, device=memory.device)
        self._memory = memory
        self._fails = fails

    def prepare(self) -> None:
        self.asked.append("prepare")
        if self._fails:
            raise torch.cuda.OutOfMemoryError("no memory")

    def enqueue(self) -> None:
        self.asked.append("enqueue")
        self.total += self._memory.to(torch.int64).sum()


@in_rank
async def _followed(me: Rank) -> list[tuple[list[str], bool, bool]]:
    window = me.window(1)
    await window.open(20)
    found = []
    for attempt, (nbytes, fails) in enumerate([(1000, False), (9 << 20, False), (9 << 20, True)]):
        expected = pattern(nbytes, attempt)
        if me.rank == 0:
            await window.send(expected.to(me.device), attempt=attempt, timeout_s=20)
            continue
        memory = me.memory(nbytes, 255)
        me.settled(memory)
        behind = _Following(memory, fails=fails)
        await window.receive(memory, attempt=attempt, timeout_s=20, behind=behind)
        seen = int(behind.total.item()) == int(expected.to(torch.int64).sum().item())
        found.append((behind.asked, seen, digest(memory) == digest(expected)))
    await window.close()
    return found


@pytest.mark.gpu(2)
def test_work_follows_a_payload_on_its_stream(prefix: str, broker: Broker) -> None:
    """In the envelope or behind it, work that was prepared before sees all bytes, and is over when
    the receive is. Work without memory is left out: the payload comes all the same."""
    found = spawn(2, _followed, "nccl", prefix, timeout_s=60, broker_url=broker.url)
    both = ["prepare", "enqueue"]
    assert found[1] == [(both, True, True), (both, True, True), (["prepare"], False, True)]


# ---- beside others


@in_rank
async def _beside_torch(me: Rank, meeting: str) -> tuple[list[float], str]:
    import torch.distributed as dist

    def reduce() -> float:
        torch.cuda.set_device(me.device)  # it is a thread's own
        tensor = torch.full((1 << 20,), float(me.rank + 1), device=me.device)
        dist.all_reduce(tensor)
        return float(tensor[-1])

    def begin() -> float:
        torch.cuda.set_device(me.device)
        dist.init_process_group(
            "nccl", f"file://{meeting}", rank=me.rank, world_size=2,
            device_id=torch.device(me.device),
        )  # fmt: skip
        return reduce()

    sums = [await asyncio.to_thread(begin)]
    window = me.window(1)
    await window.open(20)
    found = await me.round(window, 5_000_000, 3)
    sums.append(await asyncio.to_thread(reduce))
    await window.abort()
    sums.append(await asyncio.to_thread(reduce))
    await asyncio.to_thread(dist.destroy_process_group)
    return sums, found


@pytest.mark.gpu(2)
def test_a_torch_world_goes_on_beside_it(prefix: str, broker: Broker, tmp_path: Path) -> None:
    """The trainer has its own NCCL world on the same GPUs: both work, and it outlives abort()."""
    meeting = str(tmp_path / "world")
    found = spawn(2, _beside_torch, "nccl", prefix, meeting, timeout_s=90, broker_url=broker.url)
    assert found == [([3.0, 3.0, 3.0], digest(pattern(5_000_000, 3)))] * 2


@in_rank
async def _captures(me: Rank) -> tuple[bool, list[float]]:
    window = me.window(1)
    await window.open(20)
    memory = me.memory(1 << 20, 5)
    tensor = torch.zeros(1024, device=me.device)
    tensor.add_(1)  # warm: a capture must not be the first to load it
    torch.cuda.synchronize()
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def capture() -> float:
        torch.cuda.set_device(me.device)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="global"):
            tensor.add_(1)
            loop.call_soon_threadsafe(begun.set)
            time.sleep(0.5)
            tensor.add_(1)
        graph.replay()
        torch.cuda.synchronize()
        return float(tensor[0])

    capturing = asyncio.ensure_future(asyncio.to_thread(capture))
    await begun.wait()
    ends = [await outcome(me.round_of(window, memory, attempt)) for attempt in range(3)]
    total = await capturing
    await window.close()
    return [kind for kind, _ in ends] == ["done"] * 3, [total]


@pytest.mark.gpu(2)
def test_a_graph_is_captured_meanwhile(prefix: str, broker: Broker) -> None:
    """An engine captures a CUDA graph, in the mode that forbids other threads most, while rounds
    go through the window: both come through."""
    found = spawn(2, _captures, "nccl", prefix, timeout_s=60, broker_url=broker.url)
    assert found == [(True, [3.0])] * 2


@in_rank
async def _environment(me: Rank) -> bool:
    def settings() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}

    before = settings()
    window = me.window(1)
    try:
        await window.open(20)
    except WindowError:
        return False
    finally:
        await window.abort()
    return settings() == before


@pytest.mark.gpu(2)
def test_the_environment_is_left_alone(prefix: str, broker: Broker) -> None:
    """NVLink multicast stays as whoever set it wants it: a window changes no NCCL setting."""
    found = spawn(2, _environment, "nccl", prefix, timeout_s=60, broker_url=broker.url)
    assert found == [True, True]


# ---- who is lost


@in_rank
async def _lost(me: Rank, how: str) -> dict[str, Any] | None:
    # On two GPUs process 1 stands in for the one that is lost: rank 1 of the second window is on
    # the GPU that rank 1 of the first was on.
    spare = torch.cuda.device_count() < 3
    if spare:
        me.use(f"cuda:{min(me.rank, 1)}")
    left = torch.ones(64, 64, device=me.device)
    inside = not (spare and me.rank == 1)
    memory = me.large(1)
    ended: Outcome | None = None
    aborted: Outcome | None = None
    if inside:
        window = me.window(1, rank=1 if spare and me.rank == 2 else me.rank, size=2 if spare else 3)
        await window.open(20)
        me.context.mark("open")
        if me.rank == 2:
            await me.context.waiting("over", rank=-1, timeout_s=60)
            await window.abort()
            return None
        if how != "killed while others wait":
            await me.context.waiting("lost", rank=-1)
        work = window.send if me.rank == 0 else window.receive
        # Rank 0 gives up first: the abort of a receiver may let it through.
        timeout_s = 1.5 if me.rank == 0 else 2.0
        running = asyncio.ensure_future(outcome(work(memory, attempt=1, timeout_s=timeout_s)))
        await asyncio.sleep(0.2)
        me.context.mark("entered")
        ended = await running
        aborted = await outcome(window.abort())
    memory.fill_(7)
    product = float((left @ left).sum()) + float(memory[-1])
    await me.context.waiting("lost", rank=-1)
    started = time.monotonic()
    again = me.window(2, size=2)
    await again.open(20)
    reopened_s = time.monotonic() - started
    found = await me.round(again, 5_000_000, 4)
    await again.close()
    me.context.mark("survived")
    return {
        "ended": ended, "aborted": aborted, "product": product, "found": found,
        "reopened_s": reopened_s,
    }  # fmt: skip


@pytest.mark.gpu(2)
@pytest.mark.parametrize(
    "how",
    ["killed idle", "killed while others wait", "absent", "stopped"],
    ids=lambda how: how.replace(" ", "-"),
)
def test_a_lost_peer_costs_one_deadline_and_one_window(
    how: str, prefix: str, broker: Broker
) -> None:
    """A peer is SIGKILLed idle, or while the others wait for it, or does not come, or stands still.

    The others end by the deadline and abort; their GPU's other work goes on, and they carry a
    payload through a window of their own (with two GPUs: with one that takes the lost peer's).
    """
    with Processes(3, _lost, "nccl", prefix, how, timeout_s=90, broker_url=broker.url) as processes:
        processes.wait("open", rank=0)
        processes.wait("open", rank=2)
        if how == "killed while others wait":
            processes.wait("entered", rank=0)
        if how.startswith("killed"):
            processes.kill(2)
        elif how == "stopped":
            processes.stop(2)
        processes.mark("lost")
        processes.wait("survived", rank=0)
        processes.wait("survived", rank=1)
        if how == "stopped":
            processes.resume(2)
        processes.mark("over")
        results = processes.results()
    assert results[2] == (KILLED if how.startswith("killed") else None)
    assert results[0]["ended"][0] in ("WindowTimeout", "WindowError")
    for found in results[:2]:
        if found["ended"] is not None:
            assert found["ended"][1] < 2.0 + MARGIN_S
            assert found["aborted"][0] == "done"
            assert found["aborted"][1] < MARGIN_S
        assert found["product"] == 64.0**3 + 7
        assert found["found"] == digest(pattern(5_000_000, 4))
        assert found["reopened_s"] < 5

"""What checks and diffs by kernels use again and again is nobody else's meanwhile."""

import gc
import threading
import weakref
from typing import Any

import pytest
import torch

from sparsecast.pipeline.delta import (
    Patch,
    Payload,
    Shadow,
    apply_checked,
    check,
    diff,
    digest,
    manifest_of,
    ready,
)
from sparsecast.pipeline.delta.timing import Mark
from spawn import Context, spawn
from states import bits
from twins import DEVICE, by_kernels, by_torch, copied, model, require_same


def rooms() -> dict[Any, list[Any]]:
    """The rooms that nobody uses."""
    from sparsecast.pipeline.delta import readied

    return readied._rooms


def test_a_checked_patch_keeps_its_room() -> None:
    """Four patches are checked before the first is applied: each comes to its own tensors. Of the
    rooms that are not needed any more two are kept, and used again."""
    old = model(torch.bfloat16, w=(2_100,))
    news = [copied(old) for _ in range(4)]
    for at, new in enumerate(news):
        bits(new["w"])[at::97] ^= 1 + at
    with by_torch():
        patches = [diff(old, new, base_version=0, version=1) for new in news]
    mine = [copied(old) for _ in news]
    gc.collect()
    rooms().clear()
    with by_kernels():
        checked = [check(Patch.from_buffer(p.buffer), p.manifest) for p in patches]
        assert not any(rooms().values())
        for one, tensors in zip(checked, mine, strict=True):
            apply_checked(one, tensors)
        one = None
        checked.clear()
        gc.collect()
        kept = [room for found in rooms().values() for room in found]
        assert len(kept) == 2
        again = check(Patch.from_buffer(patches[0].buffer), patches[0].manifest)
        assert again.readied is not None
        assert again.readied.checking.room in kept
    for tensors, new in zip(mine, news, strict=True):
        require_same(tensors, new)


def test_models_come_and_go() -> None:
    """Ten models are checked one after the other: the rooms of the last few are remembered."""
    rooms().clear()
    for size in range(10):
        old = model(torch.uint8, w=(100 + size,))
        new = copied(old)
        bits(new["w"])[:9] ^= 1
        with by_torch():
            patch = diff(old, new, base_version=0, version=1)
        with by_kernels():
            check(patch, patch.manifest)
    gc.collect()
    assert len(rooms()) == 8


def test_rooms_of_what_comes_together_stay() -> None:
    """Three roots send patches of tensors that are called and shaped alike, and one others: a room
    for each is made before, no round makes any, and other models come and go beside them."""
    rooms().clear()
    alike, other = model(torch.uint8, w=(300,)), model(torch.uint8, v=(200,))
    models = [alike, alike, alike, other]
    with by_kernels():
        ready([manifest_of(tensors) for tensors in models], DEVICE)
        gc.collect()
        made = {id(room) for found in rooms().values() for room in found}
        assert len(made) == 4
        for at, old in enumerate([model(torch.uint8, w=(100 + size,)) for size in range(10)]):
            new = copied(old)
            bits(new["w"])[:9] ^= 1
            with by_torch():
                patch = diff(old, new, base_version=at, version=at + 1)
            check(patch, manifest_of(old))
        for _ in range(2):
            patches = [diff(old, copied(old), base_version=0, version=1) for old in models]
            together = [
                Payload(patch.buffer, manifest_of(old))
                for patch, old in zip(patches, models, strict=True)
            ]
            for payload in together:
                payload.enqueue()
            used = {id(payload.check().readied.checking.room) for payload in together}  # type: ignore[union-attr]
            assert used == made
            payload = None
            together.clear()
            gc.collect()


class _Slow(Mark):
    """A mark that is waited for until it is let go."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.waited, self.let_go = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.waited.set()
        assert self.let_go.wait(10)


def test_graphs_go_with_what_they_are_of() -> None:
    """A shadow and a check that nobody needs any more, with the garbage collector off: that might
    come while a thread captures a graph of its own, and to let go of one then breaks it off."""
    old = model(torch.bfloat16, w=(2_100,))
    new = copied(old)
    bits(new["w"])[::7] ^= 3
    gc.disable()
    try:
        with by_kernels():
            shadow = Shadow(old)
            for version in range(3):  # the second time a GPU makes graphs of it
                state = old if version % 2 else new
                patch = shadow.diff(state, base_version=version, version=version + 1).patch
            checked = check(Patch.from_buffer(patch.buffer), shadow.manifest)
            assert shadow._fused is not None
            assert checked.readied is not None
            held = weakref.ref(shadow._fused._work), weakref.ref(checked.readied.checking.room)
            assert all(each() is not None for each in held)
            del shadow, checked
            rooms().clear()
        assert all(each() is None for each in held)
    finally:
        gc.enable()


class _Work:
    """Sums that are another diff's once they were taken."""

    taken = 0

    def sums(self) -> tuple[int, int]:
        self.taken += 1
        return self.taken, 0


def test_two_threads_ask_for_the_same_sums() -> None:
    """One has waited for the device and not read yet when the next diff asks: both get the same,
    and the numbers are read once."""
    from sparsecast.pipeline.delta.fused import Found

    mark, work = _Slow(), _Work()
    found = Found(8, mark, mark, mark, work, 0)  # type: ignore[arg-type]
    told: list[tuple[int, int]] = []
    threads = [threading.Thread(target=lambda: told.append(found.sums())) for _ in range(2)]
    for thread in threads:
        thread.start()
        assert mark.waited.wait(10)
    mark.let_go.set()
    for thread in threads:
        thread.join(10)
    assert told[0] == told[1]
    assert told[0][0] == 1
    assert work.taken == 1


@pytest.mark.gpu(1)
def test_a_room_is_read_before_it_is_used_again() -> None:
    """Two patches are applied on two streams, the first behind long work: the check of the second
    takes the room of the first, and waits for its way into the weights."""
    old = model(torch.bfloat16, w=(1 << 20,))
    news = [copied(old) for _ in range(2)]
    bits(news[0]["w"])[::7] ^= 3
    bits(news[1]["w"])[3::11] ^= 5
    patches = [diff(old, new, base_version=0, version=1) for new in news]
    mine = [copied(old) for _ in news]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(DEVICE) for _ in news]
    long = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    for patch, tensors, stream in zip(patches, mine, streams, strict=True):
        with torch.cuda.stream(stream):
            checked = check(Patch.from_buffer(patch.buffer), patch.manifest)
            for _ in range(200 if stream is streams[0] else 0):
                long = (long @ long).clamp_(-1, 1)
            apply_checked(checked, tensors)
            checked = None
    torch.cuda.synchronize()
    for tensors, new in zip(mine, news, strict=True):
        assert digest(tensors) == digest(new)


def _let_go_while_capturing(context: Context) -> None:
    """A process's part: of two rooms that it has used another thread lets one go while it captures
    a graph, and one is garbage by then."""
    from sparsecast.pipeline.delta.graphs import Repeated

    device = torch.device("cuda:0")
    manifest = manifest_of(model(torch.bfloat16, w=(70_000,)))
    ready([manifest, manifest], device)
    count = torch.zeros((), dtype=torch.int64, device=device)

    def work() -> None:
        count.add_(1)
        if torch.cuda.is_current_stream_capturing():
            garbage: list[Any] = [rooms()[manifest.hash, device].pop()]
            garbage.append(garbage)
            del garbage
            thread = threading.Thread(target=rooms().clear)
            thread.start()
            thread.join()
            for _ in range(100):
                _ = [[] for _ in range(100)]  # a collection is due
            count.add_(1)

    repeated = Repeated(device)
    gc.set_threshold(1, 1, 1)
    for _ in range(3):
        repeated.queue(work)
    assert gc.isenabled()
    # Torch now asks if the device is through with the memory that came back.
    for power in range(20):
        torch.empty(1 << power, dtype=torch.uint8, pin_memory=True)
    assert repeated._graph is not None
    assert count.item() == 1 + 2 * 2
    ready([manifest], device)


@pytest.mark.gpu(1)
def test_rooms_go_while_a_graph_is_captured() -> None:
    """Torch lets go of pinned memory by an event on every stream that was told to have used it;
    were one of them the stream of captures, the process would end here. Hence one of its own."""
    spawn(1, _let_go_while_capturing, timeout_s=60)

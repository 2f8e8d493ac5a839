"""Streams, the guard's fence and the rehearsal, as far as they can be seen without a GPU."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from ranks import split
from runs import same_bits, step, weights
from sparsecast import Layout, Part
from sparsecast.messages.manifest import TensorSpec
from sparsecast.pipeline.delta import Shadow
from sparsecast.pipeline.delta.rehearsal import rehearse_parts, rehearse_whole
from sparsecast.workers import rehearsal
from sparsecast.workers.guard import Guard
from sparsecast.workers.rehearsal import Kind, kinds_of, rehearse
from sparsecast.workers.streams import device_for, devices_of, finish, to_host


class Recorder:
    """A fence that writes down what it hears, and who was in the guard then."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.heard: list[tuple[str, int, int | None]] = []
        self.broken: Exception | None = None

    def _note(self, what: str) -> None:
        self.heard.append((what, self.guard.readers, self.guard.version))
        if self.broken is not None:
            raise self.broken

    def reader_leaves(self) -> None:
        self._note("leaves")

    def writer_enters(self) -> None:
        self._note("enters")

    def writer_commits(self) -> None:
        self._note("commits")


def _fenced() -> tuple[Guard, Recorder]:
    guard = Guard(0)
    fence = guard.fence = Recorder(guard)
    return guard, fence


def test_readers_mark_their_end_while_they_still_hold_the_weights() -> None:
    """A mark that came after the hold was given up would come too late for a writer that waits;
    an inner hold may be left on another stream, so it marks as well."""
    guard, fence = _fenced()
    with guard.reading(), guard.reading():
        assert fence.heard == []
    assert fence.heard == [("leaves", 1, 0), ("leaves", 1, 0)]
    with guard.holding(1) as held:
        assert not held
    assert len(fence.heard) == 2, "nothing was read, and nothing is to be waited for"
    with guard.holding(0) as held:
        assert held
    assert len(fence.heard) == 3


def test_a_version_is_told_once_the_device_is_through() -> None:
    """The writer is ordered behind the readers before it writes; the version flips behind the
    device's end."""
    guard, fence = _fenced()
    with guard.writing(1.0) as writer:
        assert fence.heard == [("enters", 0, 0)]
        writer.begin_write()
        writer.commit(1)
        assert fence.heard[1:] == [("commits", 0, 0)]
    assert guard.version == 1


def test_a_device_that_does_not_come_to_its_end_tears_the_replica() -> None:
    """What was written is not known to be there: no reader is let in, and the version stays."""
    guard, fence = _fenced()

    def write() -> None:
        with guard.writing(1.0) as writer:
            writer.begin_write()
            fence.broken = RuntimeError("the device does not come to its end")
            writer.commit(1)

    with pytest.raises(RuntimeError, match="device"):
        write()
    assert guard.torn is not None
    assert guard.version == 0


@pytest.mark.parametrize("who", ["reader", "writer"])
def test_a_fence_that_fails_leaves_nobody_in_the_guard(who: str) -> None:
    """A broken CUDA context answers every call with an error: the lock itself must not be lost."""
    guard, fence = _fenced()
    fence.broken = RuntimeError("CUDA error")
    with pytest.raises(RuntimeError), guard.reading() if who == "reader" else guard.writing(1.0):
        pass
    assert guard.readers == 0
    assert guard.torn is None
    fence.broken = None
    entered = threading.Event()

    def write() -> None:
        with guard.writing(1.0):
            entered.set()

    thread = threading.Thread(target=write)
    thread.start()
    thread.join(5)
    assert entered.is_set()


def test_host_tensors_need_no_device() -> None:
    """On a machine without GPUs everything is where it is, and nothing is waited for."""
    tensors = weights()
    assert devices_of(tensors.values()) == ()
    buffer = torch.arange(8, dtype=torch.uint8)
    assert to_host(buffer) is buffer
    finish(buffer.device)
    assert device_for("cpu", lambda: tensors) == "cpu"
    assert device_for("cuda:1", lambda: tensors) == "cuda:1"
    assert device_for(None, lambda: tensors) == "cpu"


def test_a_rehearsal_leaves_weights_and_chance_alone() -> None:
    """The user's tensors, and what the next random number is, are as they were."""
    tensors = weights()
    torch.manual_seed(7)
    rehearse(tensors, torch.device("cpu"), dtype=torch.bfloat16)
    rehearse_whole(torch.device("cpu"), torch.float32, torch.bfloat16)
    rehearse_parts(torch.device("cpu"), torch.bfloat16, 2)
    after = torch.rand(4)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(4), after)
    assert same_bits(tensors, weights())


def test_what_several_roots_may_bring_is_rehearsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two roots' patches come by parts of one and of two dimensions: each kind on the GPU is
    rehearsed once, and nothing for what has no parts or lies on the host."""
    cuda, host, number = torch.device("cuda:0"), torch.device("cpu"), torch.bfloat16
    first, second = split(weights(), 2)
    known = {
        first.hash: [Kind(cuda, number, number, 2), Kind(cuda, torch.int64, torch.int64, 0)],
        second.hash: [Kind(cuda, number, number, 2), Kind(cuda, number, number, 1)],
    }
    known[second.hash].append(Kind(host, number, number, 2))
    rehearsed: list[Any] = []
    monkeypatch.setattr(rehearsal, "kinds_of", lambda tensors, *, layout: known[layout.hash])
    monkeypatch.setattr(rehearsal, "rehearse_parts", lambda *kind: rehearsed.append(kind))
    rehearsal.rehearse_layouts({}, [first, second])
    assert rehearsed == [(cuda, number, 1), (cuda, number, 2)]


def test_what_a_layout_may_bring_is_rehearsed() -> None:
    """A rank holds stacked experts in bf16, a scale in fp32, and a counter that nobody publishes:
    parts of up to three dimensions and of one are rehearsed, and none for the counter."""
    cpu = torch.device("cpu")
    local = {
        "experts": torch.zeros(2, 4, 3, dtype=torch.bfloat16),
        "norm": torch.zeros(3, dtype=torch.bfloat16),
        "scale": torch.zeros(()),
        "steps": torch.zeros(2, dtype=torch.int64),
    }
    layout = Layout(
        tensors=(
            TensorSpec("experts", "bfloat16", (2, 4, 3)), TensorSpec("norm", "bfloat16", (3,)),
            TensorSpec("scale", "float32", ()), TensorSpec("steps", "int64", (2,)),
        ),
        parts=(
            Part(tensor="n", begin=(0,), shape=(3,), local="norm", at=(0,), axes=(0,)),
            Part(tensor="e", begin=(2, 0, 0), shape=(2, 4, 3), local="experts", at=(0, 0, 0),
                 axes=(0, 1, 2)),
            Part(tensor="s", begin=(), shape=(), local="scale", at=(), axes=()),
        ),
    )  # fmt: skip
    bf16, fp32, int64 = torch.bfloat16, torch.float32, torch.int64
    assert set(kinds_of(local, layout=layout)) == {
        Kind(cpu, bf16, bf16, 3), Kind(cpu, fp32, fp32, 1), Kind(cpu, int64, int64, 0)
    }  # fmt: skip
    assert kinds_of({"w": torch.zeros(2)}, dtype=bf16) == [Kind(cpu, fp32, bf16, 0)]


def test_kinds_on_a_gpu_are_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tensors of every kind that lies on a GPU, and parts where a rank holds some."""
    rehearsed: list[Any] = []

    def whole(*kind: Any, host: bool) -> None:
        rehearsed.append((*kind, host))

    gpu, cpu, bf16, fp32 = (
        torch.device("cuda:0"),
        torch.device("cpu"),
        torch.bfloat16,
        torch.float32,
    )
    kinds = [Kind(gpu, fp32, bf16, 0), Kind(gpu, bf16, bf16, 2), Kind(cpu, bf16, bf16, 2)]
    monkeypatch.setattr(rehearsal, "kinds_of", lambda tensors, *, dtype, layout: kinds)
    monkeypatch.setattr(rehearsal, "rehearse_whole", whole)
    monkeypatch.setattr(rehearsal, "rehearse_parts", lambda *kind: rehearsed.append(kind))
    rehearse(weights(), cpu, host=True)
    assert rehearsed == [(gpu, fp32, bf16, True), (gpu, bf16, bf16, True), (gpu, bf16, 2)]


def test_an_anchor_is_made_where_it_is_wanted() -> None:
    """The copy for the log need not lie where the shadow does; the bits are those of the shadow."""
    tensors = weights()
    shadow = Shadow(tensors)
    step(tensors, 1)
    shadow.diff(tensors, base_version=0, version=1)
    anchor = shadow.anchor(1, device=torch.device("cpu"))
    assert anchor.buffer.device.type == "cpu"
    assert torch.equal(anchor.buffer, shadow.anchor(1).buffer)

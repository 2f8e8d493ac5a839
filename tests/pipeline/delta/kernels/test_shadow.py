"""A shadow diffed by kernels, whatever becomes of the tensors, the streams and the memory."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layouts import contents
from ranks import split
from sparsecast.messages.errors import LocalProtocolError
from sparsecast.pipeline.delta import (
    Lookup,
    Shadow,
    apply,
    apply_checked,
    check,
    digest,
    manifest_of,
)
from states import bits, laid_out
from twins import (
    DEVICE,
    Twins,
    by_kernels,
    by_torch,
    copied,
    model,
    placed,
    require_same,
    require_same_patch,
    step,
)


def module(name: str) -> Any:
    """A module of the data path; some share their names with functions of the package."""
    __import__(f"sparsecast.pipeline.delta.{name}")
    return sys.modules[f"sparsecast.pipeline.delta.{name}"]


def test_tensors_that_move() -> None:
    """Between updates the trainer replaces a tensor's memory, transposes it, lets it start at an
    odd place, and brings it back: what is published follows."""
    twins = Twins(model(torch.bfloat16, w=(50, 41), b=(77,)))
    home = dict(twins.state)
    for seed, layout in enumerate(["plain", "transposed", "askew", "columns"]):
        twins.state["w"] = placed(laid_out(twins.state["w"].cpu(), layout))
        step(twins.state, 0.03, seed)
        twins.deliver(twins.publish())
    twins.state.update(home)
    assert twins.publish().patch.changed > 0
    assert twins.publish().patch.changed == 0


def test_kernels_and_torch_by_turns() -> None:
    """Masters turn to another dtype, which the kernels do not read, and back: torch takes over in
    between, and digests stay right across both changes."""
    masters = {"w": torch.linspace(-3, 3, 700, device=DEVICE), "b": torch.ones(9, device=DEVICE)}
    twins = Twins(dict(masters), dtype=torch.bfloat16)
    for fused in (True, False, False, True, True):
        dtype = torch.float32 if fused else torch.float64
        twins.state["w"] = (twins.state["w"] * 1.01).to(dtype)
        found = twins.publish(fused=fused)
        assert 0 < found.patch.changed <= 700
    with by_torch():
        assert digest({n: t.bfloat16() for n, t in twins.state.items()}) == found.digest


def test_a_shadow_in_host_memory() -> None:
    """The copy lies in pinned host memory and kernels write it there; an anchor of it is exact."""
    twins = Twins(model(torch.float16, w=(2_100,), s=()), host=True)
    for seed, density in enumerate([0.01, 0.3, 1.0]):
        step(twins.state, density, seed)
        twins.deliver(twins.publish())
    fresh = copied(twins.state)
    step(fresh, 0.5, 9)
    apply(twins.shadow.anchor(4), fresh)
    require_same(fresh, twins.state)


# numpy, with which the interpreter casts, warns of what is too large for float16.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("target", ["bfloat16", "float16"])
def test_masters_are_cast(target: str) -> None:
    """fp32 masters: ties, subnormals, overflow, infinities and -0.0 round as torch rounds them on
    the same device; what has the published dtype already, or is no float, goes as it is."""
    dtype = getattr(torch, target)
    edges = [0.0, -0.0, float("inf"), -float("inf"), 1e-40, -3e-8, 5.9e-8, 6.2e-5, 65_519.0]
    edges += [65_520.0, -65_536.0, 3.3895e38, 3.4028e38, 1 + 2.0**-8, 1 + 3 * 2.0**-8]
    edges += [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1.00390625001, -1.0009765]
    generator = torch.Generator().manual_seed(1)
    state = {
        "w": torch.cat([torch.full((19,), 7.0), torch.randn(2_200, generator=generator)]).to(
            DEVICE
        ),
        "own": torch.randn(300, generator=generator).to(dtype).to(DEVICE),
        "steps": torch.tensor(7, device=DEVICE),
    }
    state["askew"] = placed(laid_out(torch.randn(65, generator=generator), "askew"))
    twins = Twins(state, dtype=dtype)
    state["w"][:19] = torch.tensor(edges, device=DEVICE)
    assert twins.publish().patch.changed == 19
    for share, factor in ((1.0, 1 + 2.0**-13), (0.5, -1.0)):
        for name in ("w", "own", "askew"):
            mask = torch.rand(state[name].shape, generator=generator) < share
            state[name].mul_(torch.where(mask, factor, 1.0).to(DEVICE).to(state[name].dtype))
        state["steps"] += 1
        found = twins.publish()
    assert found.patch.changed > 1_000


def test_every_kind_at_once() -> None:
    """Every itemsize, both casts, each aligned and askew: as many launches as there can be, and
    in each of them a tile has more changes than slots."""
    generator = torch.Generator().manual_seed(6)
    sources = {
        "to_bfloat16": torch.randn(400, generator=generator),
        "to_float16": torch.randn(400, generator=generator),
        "bfloat16": torch.randn(400, generator=generator).bfloat16(),
        "float32": torch.randn(400, generator=generator),
        "float64": torch.randn(400, generator=generator).double(),
        "uint8": torch.arange(400).to(torch.uint8),
    }
    state, dtypes = {}, {}
    for name, source in sources.items():
        for layout in ("plain", "askew"):
            state[f"{name}.{layout}"] = placed(laid_out(source, layout))
            if name.startswith("to_"):
                dtypes[f"{name}.{layout}"] = getattr(torch, name.removeprefix("to_"))
    twins = Twins(state, dtype=dtypes)
    for tensor in state.values():
        tensor[::3] += 1
    found = twins.publish()
    assert found.patch.changed == 12 * 134
    twins.deliver(found)


@pytest.mark.parametrize("target", ["bfloat16", "float16"])
def test_cast_nans(target: str) -> None:
    """A master becomes NaN: so does what is published. Its bits are torch's on a GPU; torch's on
    a CPU depend on where in a vector the NaN is."""
    state = {"w": torch.zeros(300, device=DEVICE)}
    with by_kernels():
        shadow = Shadow(state, dtype=getattr(torch, target))
    state["w"][7:30] = float("nan")
    bits(state["w"])[20:25] ^= 0x123
    worker = {"w": torch.zeros(300, dtype=getattr(torch, target), device=DEVICE)}
    with by_kernels():
        found = shadow.diff(state, base_version=0, version=1)
        assert found.patch.changed == 23
        apply(found.patch, worker)
        assert digest(worker) == found.digest
    assert torch.equal(worker["w"].isnan(), state["w"].isnan())
    if DEVICE.type == "cuda":
        require_same(worker, {"w": state["w"].to(getattr(torch, target))})


def test_a_lookup_sees_what_moves() -> None:
    """With a Lookup the addresses are remembered: a parameter whose storage is replaced, under the
    trainer and under the worker, is read and written where it lies now; and a strided buffer, of
    which each diff reads a copy, is copied anew."""

    def layer() -> nn.Linear:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            layer = nn.Linear(40, 30).requires_grad_(False)
            layer.register_buffer("strided", torch.zeros(7, 30).t())
            return layer.to(DEVICE)

    trained, served = layer(), layer()
    source, target = Lookup(trained), Lookup(served)
    taken: list[Tensor] = []
    with by_kernels():
        shadow = Shadow(source.tensors())
        for version in range(1, 6):
            if version == 3:
                stale = trained.weight.data
                trained.weight.data = stale.clone()
                stale.fill_(9)
            if version == 4:
                stale_served = served.weight.data
                served.weight.data = stale_served.clone()
            trained.weight[version] += 1
            trained.bias[version] = -version
            trained.strided[:, 3] = version
            # Takes the place of whatever copy of `strided` the last diff has let go of.
            taken.append(torch.full((30, 7), 9.0, device=DEVICE))
            found = shadow.diff(source.tensors(), base_version=version - 1, version=version)
            assert found.patch.changed == 71
            apply_checked(check(found.patch, shadow.manifest), target.tensors())
            require_same(dict(served.state_dict()), dict(trained.state_dict()))
            assert digest(target.tensors(), manifest=shadow.manifest) == found.digest
    assert not torch.equal(stale_served, served.weight)


def test_a_large_model_lets_go_of_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its diffs, of a few elements and of many: what else they take is kept while slots
    are as many as before, and made anew where they are not."""
    monkeypatch.setattr(module("fused"), "_SMALL", 0)
    twins = Twins(model(torch.bfloat16, w=(70_001,), b=(9,)))
    works = []
    for seed, share in enumerate([0.001, 0.001, 0.2, 0.9, 0.001, 0.001, 0.001]):
        step(twins.state, share, seed)
        twins.deliver(twins.publish())
        work = twins.shadow._fused._work
        assert work._scratch == []
        works.append(work)
    assert works[-1] is works[-2]
    assert len(set(map(id, works))) > 2
    step(twins.state, 0.001, 7)
    with monkeypatch.context() as patched, by_kernels():
        patched.setattr(module("steps"), "frame", _fails)
        with pytest.raises(MemoryError):
            twins.shadow.diff(twins.state, base_version=7, version=8)
    assert twins.shadow._fused._work._scratch == []


def _fails(*args: object, **kwargs: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("small", [1 << 14, 0])
def test_memory_runs_out_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    """Scratch cannot be allocated: the diff fails, nothing was taken over, and the same one works
    later, with the right digest."""
    monkeypatch.setattr(module("fused"), "_SMALL", small)
    twins = Twins(model(torch.bfloat16, w=(2_050,)))
    step(twins.state, 0.02, 1)
    twins.publish()
    step(twins.state, 0.02, 2)
    before = twins.shadow.digest
    with monkeypatch.context() as patched, by_kernels():
        patched.setattr(module("steps"), "_Scratch", _fails)
        with pytest.raises(MemoryError):
            twins.shadow.diff(twins.state, base_version=1, version=2)
    assert twins.shadow.digest == before
    assert twins.publish().patch.changed > 0


def test_memory_runs_out_for_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has no room for the patch, and the shadow has moved: host memory takes it."""
    twins = Twins(model(torch.bfloat16, w=(2_050,)))
    step(twins.state, 0.2, 1)
    empty = torch.empty

    def picky(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if kwargs.get("dtype") == torch.uint8 and not pin_memory:
            raise torch.cuda.OutOfMemoryError
        return empty(*args, pin_memory=pin_memory and DEVICE.type == "cuda", **kwargs)

    with monkeypatch.context() as patched, by_kernels():
        patched.setattr(torch, "empty", picky)
        found = twins.shadow.diff(twins.state, base_version=0, version=1)
        assert found.patch.buffer.device.type == "cpu"
        facts = found.digest, found.checksum
    with by_torch():
        expected = twins.reference.diff(twins.state, base_version=0, version=1)
    require_same_patch(found.patch, expected.patch)
    assert facts == (expected.digest, expected.checksum)


def test_an_interrupt_while_taking_over_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when kernels have begun to write: the shadow holds neither state, and says so."""
    twins = Twins(model(torch.bfloat16, w=(2_050,)))
    step(twins.state, 0.02, 1)

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, by_kernels():
        patched.setattr(module("steps"), "tally", interrupted)
        with pytest.raises(KeyboardInterrupt):
            twins.shadow.diff(twins.state, base_version=0, version=1)
    for call in (lambda: twins.publish(), lambda: twins.shadow.anchor(1)):
        with pytest.raises(LocalProtocolError, match="anchor"):
            call()


@pytest.mark.gpu(1)
def test_weights_change_in_the_order_of_streams() -> None:
    """The optimizer's next step is enqueued as soon as diff() returns, on one stream and another:
    each patch holds what was there when it was called."""
    state = model(torch.bfloat16, w=(1 << 23,), b=(4_097,))
    worker = copied(state)
    shadow = Shadow(state)
    streams = [torch.cuda.Stream(), torch.cuda.default_stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for version in range(6):
        with torch.cuda.stream(streams[version % 3]):
            bits(state["w"])[version::50] += 1
            bits(state["b"]).add_(1)
            expected = copied(state)
            found = shadow.diff(state, base_version=version, version=version + 1)
            bits(state["w"]).bitwise_xor_(0x55)  # at once, behind what reads it
            bits(state["w"]).bitwise_xor_(0x55)
            bits(state["w"])[version + 7 :: 1_000] += 3
            found.checksum  # noqa: B018 - waits until the patch is whole
        torch.cuda.synchronize()
        apply(found.patch, worker)
        require_same(worker, expected)
        assert found.digest == digest(worker)


@pytest.mark.parametrize("host", [False, True] if DEVICE.type == "cuda" else [False])
def test_the_shares_of_shards(host: bool) -> None:
    """Two ranks hold rows and columns of tensors, some from a block of the published one on, some
    not, and one of them what is small. A little changes, then so much that tiles are looked at
    again: each time their digests add up to that of the whole."""
    random = torch.Generator().manual_seed(3)
    whole = {
        "blocks": torch.randn(512, 256, generator=random).bfloat16(),
        "askew": torch.randn(301, 111, generator=random).bfloat16(),
        "layer": torch.randn(64, 40, generator=random),
        "norm": torch.randn(40, generator=random),
    }
    manifest, layouts = manifest_of(whole), split(whole, 2)
    held = [placed_all(contents(layout, whole)) for layout in layouts]
    shadows = [
        Shadow(mine, host=host, layout=layout, published=manifest)
        for mine, layout in zip(held, layouts, strict=True)
    ]
    for version, density in enumerate([0.001, 0.6], 1):
        for tensor in whole.values():
            some = torch.rand(tensor.shape, generator=random) < density
            tensor[some] = torch.randn(int(some.sum()), generator=random).to(tensor.dtype)
        found = []
        for mine, layout, shadow in zip(held, layouts, shadows, strict=True):
            for name, tensor in contents(layout, whole).items():
                mine[name].copy_(tensor)
            with by_kernels():
                found.append(shadow.diff(mine, base_version=version - 1, version=version))
            assert shadow._fused is not None
        with by_torch():
            assert sum(one.digest for one in found) % 2**64 == digest(whole)


def placed_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same where the kernels work."""
    return {name: placed(tensor) for name, tensor in tensors.items()}

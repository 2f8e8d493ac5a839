"""What changed is found and carried over, bit for bit."""

import sys
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layouts import contents
from ranks import split
from sparsecast.messages.errors import LocalProtocolError, ManifestMismatch, UnsupportedTensor
from sparsecast.pipeline.delta import Patch, Shadow, apply, diff, digest, manifest_of
from sparsecast.pipeline.delta.search import Taking
from states import (
    DTYPES,
    bits,
    changed,
    clone,
    densities,
    laid_out,
    random_tensor,
    same,
    seeds,
    states,
)

# The package names functions as their modules are named, so these are not attributes of it.
diff_module = sys.modules["sparsecast.pipeline.delta.diff"]
search_module = sys.modules["sparsecast.pipeline.delta.search"]
decode_module = sys.modules["sparsecast.pipeline.delta.decode"]


def carried(patch: Patch, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`old` after the patch has gone over the wire and been applied."""
    target = clone(old)
    apply(Patch.from_bytes(patch.to_bytes()), target, version=patch.base_version)
    return target


def differing(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> int:
    """How many elements have other bits."""
    return sum(int((bits(old[name]) != bits(new[name])).sum()) for name in old)


@settings(max_examples=60, deadline=None)
@given(states(), densities, seeds)
def test_applying_a_diff_gives_the_new_state(
    old: dict[str, Tensor], density: float, seed: int
) -> None:
    """Any dtypes, shapes and strides: diff → bytes → apply is the identity, and so is a shadow."""
    new = changed(old, density, seed)
    patch = diff(old, new, base_version=4, version=5)
    assert (patch.base_version, patch.version) == (4, 5)
    assert patch.changed == differing(old, new)
    assert patch.numel == sum(tensor.numel() for tensor in old.values())
    assert same(carried(patch, old), new)
    shadow = Shadow(old)
    found = shadow.diff(new, base_version=4, version=5)
    assert found.patch.to_bytes() == patch.to_bytes()
    assert found.digest == shadow.digest == digest(new)
    assert shadow.diff(new, base_version=5, version=6).patch.encoding == "none"
    assert same(carried(shadow.anchor(6), changed(old, 0.5, seed + 1)), new)


@pytest.mark.parametrize("density", [0.0001, 0.01, 0.06, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("dtype", ["bool", "float8_e5m2", "bfloat16", "float32", "complex64"])
def test_tensors_of_many_chunks(
    dtype: str, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every road through the search: words, lanes, masks, joined and split chunks, an odd end."""
    monkeypatch.setattr(search_module, "CHUNK", 1 << 17)
    monkeypatch.setattr(search_module, "JOIN", 5000)
    monkeypatch.setattr(decode_module, "SPAN_VALUES", 30_000)
    generator = torch.Generator().manual_seed(5)
    numel = 5 * (1 << 17) + 4_099
    tensor = random_tensor(DTYPES[dtype], (numel,), generator)
    old = {"w": tensor, "odd": laid_out(tensor[:200_001], "askew")}
    new = changed(old, density, 6)
    # A stretch without any change, one of full change and a change in the very last element.
    bits(new["w"])[1 << 17 : 2 << 17] = bits(old["w"])[1 << 17 : 2 << 17]
    bits(new["w"])[3 << 17 : (3 << 17) + 70_000] = bits(old["w"])[3 << 17 : (3 << 17) + 70_000] ^ 1
    bits(new["w"])[-1] = bits(old["w"])[-1] ^ 1
    patch = diff(old, new, base_version=0, version=1)
    assert patch.changed == differing(old, new)
    assert same(carried(patch, old), new)
    found = Shadow(old).diff(new, base_version=0, version=1)
    assert found.patch.to_bytes() == patch.to_bytes()
    assert found.digest == digest(new)


@pytest.mark.parametrize("apart", [8, 64, 512])
def test_changes_that_are_each_alone_in_their_words(apart: int) -> None:
    """Elements far apart, at even distances, change: no word of a mask has two of them."""
    old = {"w": torch.zeros(1 << 20, dtype=torch.bfloat16), "b": torch.zeros(1 << 17).bool()}
    new = clone(old)
    for tensor in new.values():
        tensor[::apart] = 1
    patch = diff(old, new, base_version=0, version=1)
    assert patch.changed == ((1 << 20) + (1 << 17)) // apart
    assert same(carried(patch, old), new)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_are_compared_as_bits(dtype: torch.dtype) -> None:
    """0.0 to -0.0 is a change, a NaN with the same payload is none, one with another is."""
    old = {"w": torch.tensor([0.0, float("nan"), float("nan"), float("inf"), 1.0], dtype=dtype)}
    new = clone(old)
    new["w"][0] = -0.0
    bits(new["w"])[2] ^= 1
    new["w"][3] = float("-inf")
    patch = diff(old, new, base_version=0, version=1)
    assert patch.changed == 3
    assert same(carried(patch, old), new)


def test_masters_are_cast_to_what_inference_runs() -> None:
    """fp32 masters and an integer buffer, published as bf16: only floats are cast, and a change
    below bf16's resolution is none."""
    masters = {"w": torch.randn(300, 700), "steps": torch.tensor(7), "t": torch.randn(50, 40).t()}
    worker = {"w": masters["w"].bfloat16(), "steps": torch.tensor(7), "t": masters["t"].bfloat16()}
    shadow = Shadow(masters, dtype=torch.bfloat16)
    assert shadow.manifest == manifest_of(worker)
    assert shadow.digest == digest(worker)
    stepped = {"w": masters["w"] * (1 + 2.0**-20), "steps": torch.tensor(8), "t": masters["t"] + 1}
    expected = {name: tensor.to(worker[name].dtype) for name, tensor in stepped.items()}
    found = shadow.diff(stepped, base_version=0, version=1)
    assert 0 < found.patch.changed == differing(worker, expected) < 300 * 700
    assert same(carried(found.patch, worker), expected)
    direct = diff(masters, stepped, base_version=0, version=1, dtype=torch.bfloat16)
    assert direct.to_bytes() == found.patch.to_bytes()


def test_dtypes_by_name() -> None:
    """A map casts the tensors that it names; one that it names and nobody has is an error."""
    masters = {"a": torch.randn(9), "b": torch.randn(9)}
    shadow = Shadow(masters, dtype={"a": torch.float16})
    assert [spec.dtype for spec in shadow.manifest.tensors] == ["float16", "float32"]
    with pytest.raises(UnsupportedTensor, match="'c'"):
        Shadow(masters, dtype={"c": torch.float16})
    with pytest.raises(UnsupportedTensor, match=r"'a'.*floating"):
        Shadow(masters, dtype={"a": torch.int8})


def test_a_refused_state_leaves_the_shadow_as_it_was() -> None:
    """A publish with a reshaped, retyped, missing or meta tensor fails; the next one is right."""
    old = {"a": torch.randn(70_000), "b": torch.randn(30)}
    new = changed(old, 0.1, 1)
    shadow = Shadow(old)
    bad: list[dict[str, Tensor]] = [
        {**new, "b": new["b"].view(5, 6)},
        {**new, "b": new["b"].double()},
        {"a": new["a"]},
        {**new, "c": torch.zeros(1)},
        {**new, "b": torch.empty(30, device="meta")},
    ]
    for state in bad:
        with pytest.raises((ManifestMismatch, UnsupportedTensor)):
            shadow.diff(state, base_version=0, version=1)
        assert shadow.digest == digest(old)
    with pytest.raises(ValueError, match="higher"):
        shadow.diff(new, base_version=1, version=1)
    found = shadow.diff(new, base_version=0, version=1)
    assert same(carried(found.patch, old), new)


def test_memory_runs_out_while_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch cannot be allocated: nothing was taken over, and the same publish works later."""
    old = {"a": torch.randn(70_000)}
    new = changed(old, 0.1, 1)
    shadow = Shadow(old)
    with monkeypatch.context() as patched:

        def fails(*args: object, **kwargs: object) -> Patch:
            raise MemoryError

        patched.setattr(diff_module, "assemble", fails)
        with pytest.raises(MemoryError):
            shadow.diff(new, base_version=0, version=1)
    assert shadow.digest == digest(old)
    assert same(carried(shadow.diff(new, base_version=0, version=1).patch, old), new)


def test_an_interrupt_while_taking_over_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between two writes of the shadow: it holds neither state, and says so from then on."""
    shadow = Shadow({"a": torch.zeros(9), "b": torch.zeros(9)})
    new = {"a": torch.ones(9), "b": torch.ones(9)}
    take = Taking.take

    def interrupted(taking: Taking) -> None:
        take(taking)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Taking, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shadow.diff(new, base_version=0, version=1)
    with pytest.raises(LocalProtocolError, match="anchor"):
        shadow.diff(new, base_version=0, version=1)
    with pytest.raises(LocalProtocolError, match="anchor"):
        shadow.anchor(1)


def test_the_models_of_a_diff_must_agree() -> None:
    """Old and new with another name, dtype, shape or order: refused, naming the difference."""
    old = {"a": torch.zeros(3), "b": torch.zeros(3)}
    with pytest.raises(ManifestMismatch, match="'b' is missing"):
        diff(old, {"a": old["a"]}, base_version=0, version=1)
    with pytest.raises(ManifestMismatch, match="'a' has dtype"):
        diff(old, {**old, "a": torch.zeros(3).half()}, base_version=0, version=1)
    with pytest.raises(ValueError, match="higher"):
        diff(old, old, base_version=1, version=0)
    swapped = {"b": torch.ones(3), "a": torch.zeros(3)}
    assert carried(diff(old, swapped, base_version=0, version=1), old)["b"].tolist() == [1, 1, 1]


def test_publishing_under_inference_mode_and_autograd() -> None:
    """Weights that require grad, or were made under inference mode: diff and shadow take both."""
    with torch.inference_mode():
        frozen = torch.randn(500)
        shadow = Shadow({"w": frozen})
        frozen[3] = 5
        first = shadow.diff({"w": frozen}, base_version=0, version=1)
    weight = torch.nn.Parameter(frozen.clone())
    with torch.no_grad():
        weight[4] = 6
    second = shadow.diff({"w": weight}, base_version=1, version=2)
    assert (first.patch.changed, second.patch.changed) == (1, 1)
    assert not second.patch.buffer.requires_grad
    second.patch.buffer[0] = 0  # an ordinary tensor: windows may write to it


@settings(max_examples=25, deadline=None)
@given(states(), st.lists(st.tuples(densities, seeds), min_size=1, max_size=4))
def test_a_shadow_follows_many_updates(
    state: dict[str, Tensor], steps: list[tuple[float, int]]
) -> None:
    """Version after version, sparse and dense by turns: digest and weights stay exact."""
    shadow = Shadow(state)
    worker = clone(state)
    for version, (density, seed) in enumerate(steps, 1):
        state = changed(state, density, seed)
        found = shadow.diff(state, base_version=version - 1, version=version)
        apply(found.patch, worker, version=version - 1)
        assert same(worker, state)
        assert found.digest == digest(worker)


@given(states(), densities, seeds)
@settings(max_examples=50, deadline=None)
def test_what_a_shadow_differs_in_from_an_old_state(
    old: dict[str, Tensor], density: float, seed: int
) -> None:
    """The patch from a state that was made again to what the shadow holds: as diff() makes it."""
    new = changed(old, density, seed)
    shadow = Shadow(new)
    patch = shadow.since(old, base_version=4, version=5)
    assert patch.to_bytes() == diff(old, new, base_version=4, version=5).to_bytes()
    assert shadow.digest == digest(new)
    assert shadow.diff(new, base_version=5, version=6).patch.changed == 0


def test_times_are_reported() -> None:
    """Metrics get the time of finding and of encoding, in µs."""
    old = {"w": torch.randn(1_000_000)}
    found = Shadow(old).diff(changed(old, 0.01, 1), base_version=0, version=1)
    assert found.diff_us > 0
    assert found.encode_us > 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), ranks=st.integers(1, 4))
def test_the_shadows_of_shards_know_their_shares(seed: int, ranks: int) -> None:
    """Each rank diffs what it holds of some tensors, rows or columns or copies: after every step
    the digests of the shadows add up to that of the whole, and local patches bring it."""
    random = torch.Generator().manual_seed(seed)
    whole = {
        "rows": torch.randn(37, 3001, generator=random).bfloat16(),
        "layer": torch.randn(19, 31, generator=random),
        "norm": torch.randn(5, generator=random).double(),
    }
    manifest = manifest_of(whole)
    layouts = split(whole, ranks)
    shadows = [
        Shadow(dict(contents(layout, whole)), layout=layout, published=manifest)
        for layout in layouts
    ]
    held = [{n: t.clone() for n, t in contents(layout, whole).items()} for layout in layouts]
    for version in range(1, 4):
        for tensor in whole.values():
            some = torch.rand(tensor.shape, generator=random) < 10.0**-version
            tensor[some] = torch.randn(int(some.sum()), generator=random).to(tensor.dtype)
        total = 0
        for shadow, layout, mine in zip(shadows, layouts, held, strict=True):
            wanted = contents(layout, whole)
            found = shadow.diff(wanted, base_version=version - 1, version=version)
            total += found.digest
            assert found.digest == shadow.digest
            apply(found.patch, mine, version=version - 1)
            assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
        assert total % 2**64 == digest(whole)

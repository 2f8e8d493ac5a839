"""A patch is written whole or not at all, wherever and however the weights lie."""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from sparsecast.messages.errors import (
    CorruptPatch,
    ManifestMismatch,
    PatchError,
    UnsupportedTensor,
    WrongBase,
)
from sparsecast.pipeline.delta import (
    Patch,
    apply,
    apply_checked,
    check,
    checksum,
    diff,
    digest,
    manifest_of,
)
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

State = dict[str, Tensor]


@pytest.mark.parametrize("density", [0.0005, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float32", "int64"])
def test_strided_targets(dtype: str, density: float) -> None:
    """Transposed weights, columns of a fused matrix, channels-last filters: patched where they
    lie, and what lies between their elements is left alone."""
    generator = torch.Generator().manual_seed(3)
    plain = {
        "t": random_tensor(DTYPES[dtype], (300, 257), generator),
        "c": random_tensor(DTYPES[dtype], (4, 8, 5, 6), generator),
        "x": random_tensor(DTYPES[dtype], (90, 1000), generator),
    }
    new = changed(plain, density, 4)
    fused = random_tensor(DTYPES[dtype], (90, 3000), generator)
    beside = fused[:, :1000].clone(), fused[:, 2000:].clone()
    held = {
        "t": laid_out(plain["t"], "transposed"),
        "c": bits(plain["c"]).to(memory_format=torch.channels_last).view(DTYPES[dtype]),
        "x": fused[:, 1000:2000],
    }
    bits(held["x"]).copy_(bits(plain["x"]))
    assert not any(tensor.is_contiguous() for tensor in held.values())
    apply(diff(plain, new, base_version=0, version=1), held)
    assert same(held, new)
    assert same({"0": fused[:, :1000], "1": fused[:, 2000:]}, {"0": beside[0], "1": beside[1]})


def test_parameters_and_inference_tensors() -> None:
    """A parameter that requires grad stays a leaf that trains; a tensor made under inference mode
    is patched too."""
    with torch.inference_mode():
        frozen = torch.zeros(100)
    weight = nn.Parameter(torch.zeros(100))
    held = {"f": frozen, "w": weight}
    new = {"f": torch.ones(100), "w": torch.arange(100.0)}
    patch = diff({"f": torch.zeros(100), "w": torch.zeros(100)}, new, base_version=0, version=1)
    assert apply(patch, held) == ["f", "w"]
    assert same(new, {"f": frozen, "w": weight.detach()})
    (weight * 2).sum().backward()
    assert weight.is_leaf
    assert weight.grad is not None


def test_only_changed_names_are_returned_and_twice_is_harmless() -> None:
    """Absolute values: the same patch again changes nothing more."""
    old = {"a": torch.zeros(5), "b": torch.zeros(5), "e": torch.empty(0)}
    new = {**old, "b": torch.ones(5)}
    patch = diff(old, new, base_version=0, version=1)
    held = clone(old)
    assert apply(patch, held) == ["b"]
    assert apply(patch, held) == ["b"]
    assert same(held, new)


def test_a_patch_for_another_version_is_refused() -> None:
    """Weights at 3, a patch from 2: WrongBase says both, nothing changes; an anchor fits any."""
    old, new = {"w": torch.zeros(5)}, {"w": torch.ones(5)}
    patch = diff(old, new, base_version=2, version=4)
    held = clone(old)
    with pytest.raises(WrongBase, match=r"2 → 4.*version 3") as caught:
        apply(patch, held, version=3)
    assert (caught.value.base_version, caught.value.version, caught.value.held) == (2, 4, 3)
    assert same(held, old)
    apply(patch, held, version=2)
    assert same(held, new)


@pytest.mark.parametrize(
    ("name", "held", "reason"),
    [
        pytest.param("w", torch.zeros(3, 4), "manifest", id="shape"),
        pytest.param("w", torch.zeros(4, 3).half(), "manifest", id="dtype"),
        pytest.param("v", torch.zeros(4, 3), "manifest", id="name"),
    ],
)
def test_a_patch_for_another_model_is_refused(name: str, held: Tensor, reason: str) -> None:
    """Another shape, dtype or name: the hash of the manifest tells, nothing changes."""
    old, new = {"w": torch.zeros(4, 3)}, {"w": torch.ones(4, 3)}
    with pytest.raises(ManifestMismatch, match=reason):
        apply(diff(old, new, base_version=0, version=1), {name: held})
    assert not held.any()


def replaced(state: State, name: str, tensor: Tensor | None) -> State:
    """The state with one tensor replaced, or without it."""
    rest = {key: value for key, value in state.items() if key != name}
    return rest if tensor is None else {**rest, name: tensor}


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        pytest.param(None, ManifestMismatch, "'z' is missing", id="missing"),
        pytest.param(torch.zeros(6), ManifestMismatch, "'z' has shape", id="shape"),
        pytest.param(torch.zeros(5).half(), ManifestMismatch, "'z' has dtype", id="dtype"),
        pytest.param(
            torch.zeros(1).expand(5), UnsupportedTensor, "'z': is expanded", id="expanded"
        ),
        pytest.param(torch.zeros(5, device="meta"), UnsupportedTensor, "'z'.*meta", id="meta"),
    ],
)
def test_all_targets_are_checked_before_the_first_write(
    bad: Tensor | None, error: type[PatchError], match: str
) -> None:
    """The engine replaced its last tensor by one that cannot be patched: the first one, which
    could, is not touched, and the write is never announced."""
    old = {"a": torch.zeros(5), "z": torch.zeros(5)}
    patch = diff(old, {"a": torch.ones(5), "z": torch.ones(5)}, base_version=0, version=1)
    checked = check(patch, manifest_of(old))
    held = replaced(clone(old), "z", bad)
    begun: list[bool] = []
    with pytest.raises(error, match=match):
        apply_checked(checked, held, begin=lambda: begun.append(True))
    assert not held["a"].any()
    assert not begun


def test_the_write_is_announced_before_it_happens() -> None:
    """`begin` sees the old weights; if it raises, they stay."""
    old = {"a": torch.zeros(5)}
    checked = check(diff(old, {"a": torch.ones(5)}, base_version=0, version=1), manifest_of(old))
    held = clone(old)

    def refuses() -> None:
        assert not held["a"].any()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        apply_checked(checked, held, begin=refuses)
    assert same(held, old)
    apply_checked(checked, held)
    assert held["a"].all()


# ---- what check() finds


def spoilt(patch: Patch, spoil: Callable[[Patch], None]) -> Patch:
    """A copy of a patch, spoilt in place."""
    copy = Patch.from_bytes(patch.to_bytes())
    spoil(copy)
    return copy


def sparse_patch() -> tuple[Patch, State]:
    """Three blocks, the last one short; changes at 1, 2, 3 and last of block 0, none in block 1."""
    old = {"w": torch.zeros(2 * 65_536 + 10, dtype=torch.int16), "v": torch.zeros(4)}
    new = clone(old)
    new["w"][[1, 2, 3, 65_535, 2 * 65_536, 2 * 65_536 + 9]] = 7
    patch = diff(old, new, base_version=0, version=1)
    assert patch.encoding == "sparse"
    return patch, old


def bitmap_patch() -> tuple[Patch, State]:
    """A bitmap of 65,536 + 13 elements."""
    old = {"w": torch.zeros(65_536 + 13, dtype=torch.int16)}
    new = clone(old)
    new["w"][::4] = 7
    patch = diff(old, new, base_version=0, version=1)
    assert patch.encoding == "bitmap"
    return patch, old


def put(array: str, at: int, value: int) -> Callable[[Patch], None]:
    """Overwrite one item of an array of the first section."""

    def spoil(patch: Patch) -> None:
        getattr(patch, array)(patch.sections[0])[at] = value

    return spoil


@pytest.mark.parametrize(
    ("make", "spoil", "match"),
    [
        pytest.param(sparse_patch, put("positions", 1, 1), "ascending", id="repeated"),
        pytest.param(sparse_patch, put("positions", 1, 9), "ascending", id="descending"),
        pytest.param(sparse_patch, put("positions", 3, 0), "ascending", id="unsigned"),
        pytest.param(sparse_patch, put("positions", 5, 10), "beyond", id="beyond"),
        pytest.param(sparse_patch, put("positions", 5, -1), "beyond", id="far beyond"),
        pytest.param(sparse_patch, put("counts", 1, 1), "have 7 elements", id="too many"),
        pytest.param(sparse_patch, put("counts", 0, 3), "have 5 elements", id="too few"),
        pytest.param(sparse_patch, put("counts", 0, -1), "elements", id="huge"),
        pytest.param(bitmap_patch, put("mask_bits", 8, 0), "not as many", id="bit gone"),
        pytest.param(bitmap_patch, put("mask_bits", -1, 0x40), "beyond", id="bit beyond"),
        pytest.param(bitmap_patch, put("counts", 0, 0), "have 4 elements", id="bitmap count"),
    ],
)
def test_arrays_that_cannot_be_are_named(
    make: Callable[[], tuple[Patch, State]], spoil: Callable[[Patch], None], match: str
) -> None:
    """Positions repeated, out of order or out of range, counts that do not add up, bits without
    values: refused before anything is written, naming the tensor."""
    patch, held = make()
    before = clone(held)
    with pytest.raises(CorruptPatch, match=match) as caught:
        apply(spoilt(patch, spoil), held)
    assert caught.value.tensor == "w"
    assert same(held, before)


def test_counts_that_move_elements_between_blocks() -> None:
    """The sum of the counts is right but a block claims more elements than it has, or positions
    run over from one block into the next."""
    old = {"w": torch.zeros(65_536 + 4, dtype=torch.int16)}
    new = clone(old)
    new["w"][[5, 6, 7, 8, 9, 65_536]] = 7
    patch = diff(old, new, base_version=0, version=1)

    def crowd(patch: Patch) -> None:
        patch.counts(patch.sections[0]).copy_(torch.tensor([1, 5]))

    def run_over(patch: Patch) -> None:
        patch.counts(patch.sections[0]).copy_(torch.tensor([6, 0]))

    with pytest.raises(CorruptPatch, match="more changed elements than elements"):
        check(spoilt(patch, crowd), manifest_of(old))
    with pytest.raises(CorruptPatch, match="ascending"):
        check(spoilt(patch, run_over), manifest_of(old))


def test_the_spoilt_tensor_is_named_among_many() -> None:
    """Positions of many tensors are checked together; the error still finds the one."""
    old = {f"t{i}": torch.zeros(3000, dtype=torch.int16) for i in range(9)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    for tensor in new.values():
        tensor[[10, 20, 30]] = 1
    patch = diff(old, new, base_version=0, version=1)
    for index in range(9):
        copy = Patch.from_bytes(patch.to_bytes())
        copy.positions(copy.sections[index])[2] = 20
        with pytest.raises(CorruptPatch) as caught:
            check(copy, manifest_of(old))
        assert caught.value.tensor == f"t{index}"


@settings(max_examples=60, deadline=None)
@given(states(max_tensors=3), densities, seeds)
def test_flipped_bits_never_write_half(old: State, density: float, seed: int) -> None:
    """One bit of the payload flipped: the checksum differs, and whoever skips it gets a refusal
    that changed nothing or weights that the digest shows to be wrong; never another error."""
    rng = random.Random(seed)
    new = changed(old, density, seed)
    patch = diff(old, new, base_version=0, version=1)
    data = patch.to_bytes()
    manifest = manifest_of(old)
    right = checksum(patch.buffer)
    for _ in range(10):
        at = rng.randrange(len(data) * 8) if rng.random() < 0.5 else rng.randrange(80 * 8)
        flipped = bytearray(data)
        flipped[at >> 3] ^= 1 << (at & 7)
        buffer = torch.frombuffer(flipped, dtype=torch.uint8)
        assert checksum(buffer) != right
        held = clone(old)
        try:
            checked = check(Patch.from_buffer(buffer), manifest)
        except (CorruptPatch, ManifestMismatch):
            continue
        apply_checked(checked, held)
        # What passes has the right shape: a flipped value, or a position moved to a free place,
        # or a field of the header (version, changed) that no structure contradicts.
        header_or_padding = at < 80 * 8 or same(held, new)
        assert header_or_padding or digest(held) != digest(new)

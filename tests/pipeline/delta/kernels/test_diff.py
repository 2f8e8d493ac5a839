"""Diffs by kernels are those by torch, to the bit: patch, digest, checksum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsecast.pipeline.delta import Encoding, Shadow, diff
from states import DTYPES, bits, densities, laid_out, random_tensor, seeds
from twins import (
    WIDE,
    Twins,
    by_kernels,
    by_torch,
    copied,
    model,
    placed,
    require_same_patch,
    step,
)

#: One tensor for each encoding; the bitmap's tiles have more changes than slots.
MIXED = {"sparse": 0.01, "bitmap": 0.25, "dense": 1.0, "scalar": 1.0, "askew": 0.3}


def mixed(dtype: torch.dtype) -> dict[str, Tensor]:
    """An empty tensor, a 0-dim one, and one that starts at an odd place; beside one an encoding."""
    state = model(dtype, sparse=(3_000,), bitmap=(30, 61), dense=(259,), none=(0, 3), scalar=())
    generator = torch.Generator().manual_seed(9)
    state["askew"] = placed(laid_out(random_tensor(dtype, (1_025,), generator), "askew"))
    return state


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype(dtype: str) -> None:
    """Random bits of every dtype, in sparse, bitmap and dense sections at once: published, applied
    by a worker, and proven by its digest."""
    twins = Twins(model(DTYPES[dtype], sparse=(3_000,), bitmap=(30, 61), dense=(259,)))
    step(twins.state, MIXED, 1)
    found = twins.publish()
    encodings = [section.encoding for section in found.patch.sections]
    assert encodings == [Encoding.SPARSE, Encoding.BITMAP, Encoding.DENSE]
    twins.deliver(found)


@pytest.mark.parametrize("dtype", ["float8_e5m2", "bfloat16", "float32", "complex64"])
def test_every_shape(dtype: str) -> None:
    """Nothing has changed, then something in every tensor that has elements: an empty one, a 0-dim
    one, and one that does not start at a multiple of 16 bytes."""
    twins = Twins(mixed(DTYPES[dtype]))
    assert twins.publish().patch.encoding == "none"
    step(twins.state, MIXED, 1)
    found = twins.publish()
    assert len(found.patch.sections) == 5
    assert "scatter" in twins.deliver(found)


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "float64"])
def test_more_changes_than_slots_and_fewer_again(dtype: str) -> None:
    """Densities rise and fall from diff to diff: slots sized for the last one overflow in some
    tiles and not in others, and the sums of the digest follow all of it."""
    twins = Twins(model(DTYPES[dtype], wide=(4_099,)))
    for seed, density in enumerate([0.002, 0.12, 0.02, 1.0, 0.0005]):
        step(twins.state, density, seed)
        # A stretch of full change: its tiles overflow whatever the average is.
        bits(twins.state["wide"])[1_000:1_200] ^= 1
        twins.publish()


@pytest.mark.parametrize("dtype", ["bool", "float16", "float64"])
def test_blocks(dtype: str) -> None:
    """A tensor of more than one block, one of exactly one, one that ends one element later."""
    shapes = {"wide": (WIDE,)} if dtype == "float64" else {"one": (65_536,), "more": (65_537,)}
    twins = Twins(model(DTYPES[dtype], **shapes))
    step(twins.state, 0.002, 1)
    for tensor in twins.state.values():
        bits(tensor)[-1] ^= 1
        bits(tensor)[65_535] ^= 1
    found = twins.publish()
    assert found.patch.encoding == "sparse"
    twins.deliver(found)
    step(twins.state, 0.13, 2)
    twins.deliver(twins.publish())


def test_itemsizes_together() -> None:
    """A model of several dtypes, in an order that mixes them: canonical order all the same."""
    generator = torch.Generator().manual_seed(4)
    names = ["float32", "bfloat16", "uint8", "float64", "bool", "float16", "float32"]
    state = {
        f"{at}.{name}": random_tensor(DTYPES[name], (600 + 77 * at,), generator)
        for at, name in enumerate(names)
    }
    twins = Twins(copied(state))
    for seed, density in enumerate([0.01, 0.2]):
        step(twins.state, density, seed)
        found = twins.publish()
        assert [section.index for section in found.patch.sections] == list(range(len(names)))
        twins.deliver(found)


def test_nan_payloads_zeros_and_infinities() -> None:
    """0.0 to -0.0 and one NaN to another are changes; the same NaN again is none."""
    special = torch.tensor([0.0, float("nan"), float("nan"), float("inf"), 1.0])
    for dtype in (torch.bfloat16, torch.float32):
        twins = Twins({"w": placed(special.to(dtype))})
        twins.state["w"][0] = -0.0
        bits(twins.state["w"])[2] ^= 1
        twins.state["w"][3] = float("-inf")
        found = twins.publish()
        assert found.patch.changed == 3
        twins.deliver(found)


def test_the_full_form() -> None:
    """All elements of very many small tensors change: a patch without a table, then sections."""
    twins = Twins(model(torch.uint8, **{f"t{at}": (17 + at % 3,) for at in range(24)}))
    step(twins.state, 1.0, 1)
    found = twins.publish()
    assert found.patch.full
    twins.deliver(found)
    bits(twins.state["t7"])[3] ^= 1
    found = twins.publish()
    assert not found.patch.full
    twins.deliver(found)


def test_nothing_to_diff() -> None:
    """A model without any element, and one without tensors: torch does it, and all is well."""
    for state in ({}, model(torch.float32, a=(0,), b=(3, 0))):
        with by_kernels() as launched:
            found = Shadow(state).diff(state, base_version=0, version=1)
            assert (found.patch.changed, found.digest) == (0, 0)
        assert "find" not in launched


@settings(max_examples=6)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["uint8", "bfloat16", "float32", "int64"]),
            st.sampled_from([(), (0,), (1,), (255,), (16, 33), (1_023,), (2_049,)]),
            st.sampled_from(["plain", "askew", "columns"]),
        ),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.tuples(densities, seeds), min_size=1, max_size=2),
)
def test_any_model(
    tensors: list[tuple[str, tuple[int, ...], str]], steps: list[tuple[float, int]]
) -> None:
    """Any mix of sizes, shapes, strides and densities, one update after the other."""
    generator = torch.Generator().manual_seed(len(tensors))
    state = {
        f"t{at}": laid_out(random_tensor(DTYPES[dtype], shape, generator), layout)
        for at, (dtype, shape, layout) in enumerate(tensors)
    }
    twins = Twins(copied(state))
    some = any(tensor.numel() for tensor in state.values())
    for density, seed in steps:
        step(twins.state, density, seed)
        found = twins.publish(fused=some)
        if some:
            twins.deliver(found)


def test_two_states_without_a_shadow() -> None:
    """diff() of two states, strided and askew ones among them: neither is changed."""
    old = mixed(torch.bfloat16)
    old["strided"] = placed(laid_out(old["bitmap"].cpu(), "transposed"))
    new = copied(old)
    step(new, {**MIXED, "strided": 0.1}, 2)
    kept = copied(old), copied(new)
    with by_kernels() as launched:
        found = diff(old, new, base_version=3, version=7)
    assert "find" in launched
    with by_torch():
        require_same_patch(found, diff(kept[0], kept[1], base_version=3, version=7))
        assert diff(old, kept[0], base_version=0, version=1).changed == 0
        assert diff(new, kept[1], base_version=0, version=1).changed == 0

"""Sparse sections are parted all at once, and come out as if it had been one by one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dealt import layouts, published
from sparsecast.messages.layout import Layout, Part
from sparsecast.messages.manifest import Manifest, TensorSpec
from sparsecast.pipeline.delta import Encoding, Patch, check, diff, manifest_of, routing, sieve
from sparsecast.pipeline.delta.encode import Draft, assemble, begin, index_piece, write
from sparsecast.pipeline.delta.layout import Table
from sparsecast.pipeline.delta.parts import parts_of
from sparsecast.pipeline.delta.routing import restrict
from states import DTYPES, State, changed, random_tensor, seeds


def one_by_one(patch: Patch, parts: Layout, manifest: Manifest) -> Patch:
    """What restrict() makes where every section goes the way of bitmap and dense ones."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(routing, "_stay_sparse", lambda table: np.zeros(len(table), np.bool_))
        patched.setattr(routing, "Sifted", None)
        return restrict(patch, parts, manifest)


def require_same(patch: Patch, parts: Layout, manifest: Manifest) -> Patch:
    """The patch of parts, after it was found to be that of the other way, byte for byte."""
    found, expected = restrict(patch, parts, manifest), one_by_one(patch, parts, manifest)
    check(found, manifest)
    assert found.to_bytes() == expected.to_bytes()
    assert (found is patch) == (expected is patch)
    return found


def boxes(spec: TensorSpec, begins: Sequence[Sequence[int]], shape: Sequence[int]) -> Layout:
    """Boxes of one tensor, all of one shape, each held by a tensor of its own; no more is held."""
    box = tuple(shape)
    tensors = [TensorSpec(f"{at}", spec.dtype, box) for at in range(len(begins))]
    parts = [
        Part(tensor=spec.name, begin=tuple(begin), shape=box, local=local.name,
             at=(0,) * len(box), axes=tuple(range(len(box))))
        for begin, local in zip(begins, tensors, strict=True)
    ]  # fmt: skip
    return Layout(tensors=tuple(tensors), parts=tuple(parts), partial=True)


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    published(most=6),
    st.sampled_from([0.0, 0.0005, 0.01, 0.05, 0.3]),
    seeds,
    st.sampled_from([1, 40, 1000, 1 << 20]),
    st.sampled_from([0, 1 << 31]),
)
def test_all_at_once_is_as_one_by_one(
    data: Any, old: State, density: float, seed: int, chunk: int, narrow: int
) -> None:
    """Tensors of 1, 2, 4 and 8 bytes, empty ones among them, cut, fused, stacked and transposed in
    any way: each rank's patch is the same, byte for byte, whichever way the sparse sections go,
    wherever chunks end, and in a buffer in which places take 32 bits or 64."""
    ranks, manifest = data.draw(layouts(old)), manifest_of(old)
    patch = diff(old, changed(old, density, seed), base_version=0, version=1)
    if chunk == 1 and patch.changed > 500:
        chunk = 40
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sieve, "CHUNK_CPU", chunk)
        patched.setattr(sieve, "NARROW_NBYTES", narrow)
        for rank in ranks:
            require_same(patch, rank, manifest)


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "float64"])
def test_a_stack_of_experts(dtype: str) -> None:
    """A rank stacks 128 experts of which a receiver holds every other one, or some columns of each;
    the experts lie many in a block, or across its ends."""
    for shape in ((128, 6, 7), (128, 30, 50)):
        old = {
            "a": random_tensor(DTYPES[dtype], shape, torch.Generator().manual_seed(1)),
            "b": torch.zeros(3000),
        }
        manifest = manifest_of(old)
        patch = diff(old, changed(old, 0.01, 2), base_version=0, version=1)
        assert Encoding.SPARSE.value in patch.table.encoding
        some = boxes(manifest.tensors[0], [(at, 0, 0) for at in range(0, 128, 2)], (1, *shape[1:]))
        thin = boxes(manifest.tensors[0], [(at, 0, 2) for at in range(128)], (1, shape[1], 3))
        for parts in (some, thin):
            assert 0 < require_same(patch, parts, manifest).changed < patch.changed


def test_boxes_of_three_dimensions_that_overlap() -> None:
    """Boxes that are cut along each of three dimensions share elements, and blocks: an element that
    two have is there once."""
    old = {"w": torch.zeros(40, 50, 60, dtype=torch.int16)}
    manifest = manifest_of(old)
    patch = diff(old, changed(old, 0.02, 1), base_version=0, version=1)
    begins = [(0, 0, 0), (3, 5, 7), (20, 30, 40), (19, 29, 39)]
    made = require_same(patch, boxes(manifest.tensors[0], begins, (20, 20, 20)), manifest)
    assert 0 < made.changed < patch.changed


def test_nothing_and_everything_of_sparse_sections() -> None:
    """A receiver has none of the elements that changed: no section is left. It has all of them, in
    two halves: the patch is not made anew."""
    old = {"a": torch.zeros(400, 300), "b": torch.zeros(100_000, dtype=torch.uint8)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["a"][::9, 3] = 1.0
    patch, manifest = diff(old, new, base_version=0, version=1), manifest_of(old)
    assert (patch.table.encoding == Encoding.SPARSE).all()
    spec = manifest.tensors[0]
    assert require_same(patch, boxes(spec, [(0, 4)], (400, 296)), manifest).members == 0
    assert require_same(patch, boxes(spec, [(0, 0), (0, 150)], (400, 150)), manifest) is patch


def draft_of(spec: TensorSpec, idx_N: Tensor) -> Draft:
    """A tensor of int16 of which these elements changed to 1, 2, 3 …"""
    values_N = torch.arange(1, idx_N.numel() + 1, dtype=torch.int16)
    piece = index_piece(0, spec.numel, idx_N, values_N)
    return Draft(0, spec.itemsize, spec.numel, idx_N.numel(), [piece], None)


def facts_of(manifest: Manifest) -> dict[str, Any]:
    """What a patch of one tensor says of it."""
    (spec,) = manifest.tensors
    return {
        "manifest_hash": manifest.hash,
        "numel": spec.numel,
        "dense_nbytes": spec.numel * spec.itemsize,
        "base_version": 0,
        "version": 1,
        "device": torch.device("cpu"),
    }


@pytest.mark.parametrize("shape", [(3, 2**31 + 5), (2**32, 2)], ids=["columns", "rows"])
def test_tensors_of_more_elements_than_32_bits_count(shape: tuple[int, int]) -> None:
    """Rows that are longer than 2³¹ elements, and more rows than that: elements around the edges of
    a box beyond them are kept or left out as they lie."""
    spec = TensorSpec("w", "int16", shape)
    manifest = Manifest(tensors=(spec,))
    rows, columns = shape
    begin = (1, columns - 4) if rows == 3 else (rows - 9, 1)
    extent = (2, 3) if rows == 3 else (8, 1)
    edges = [
        row * columns + column
        for row in range(begin[0] - 1, min(begin[0] + extent[0] + 1, rows))
        for column in range(max(begin[1] - 1, 0), min(begin[1] + extent[1] + 1, columns))
    ]
    patch = assemble([draft_of(spec, torch.tensor(edges))], **facts_of(manifest))
    parts = boxes(spec, [begin], extent)
    table = sieve.sieve_of(parts_of(parts, manifest), patch.buffer.device).table
    assert table.dtype == (torch.int64 if rows == 3 else torch.int32)
    assert require_same(patch, parts, manifest).changed == extent[0] * extent[1]


def test_a_section_that_should_not_have_been_sparse() -> None:
    """Someone else's patch has a sparse section that would be smaller as bits: what is kept of it
    is encoded as it should be."""
    spec = TensorSpec("w", "int16", (1000, 10))
    manifest = Manifest(tensors=(spec,))
    draft = draft_of(spec, torch.arange(0, 10_000, 2))
    one = np.ones(1, np.int64)
    table = Table(0 * one, Encoding.SPARSE * one, 2 * one, 10_000 * one, 5_000 * one, 128 * one)
    patch = begin(table, changed=5_000, **facts_of(manifest))
    write(patch, table.sections[0], draft)
    check(patch, manifest)
    made = require_same(patch, boxes(spec, [(0, 0)], (900, 10)), manifest)
    assert made.table.encoding.tolist() == [Encoding.BITMAP]


class Counted(TorchDispatchMode):
    """Counts the operations inside it."""

    ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        return func(*args, **(kwargs or {}))


def test_a_hundred_times_the_tensors_take_no_more_operations() -> None:
    """Rows of every matrix, columns of every other one and their biases, a hundred times as many of
    them: they are parted by as many operations, the first time and the next."""
    found = []
    for many in (4, 400):
        shapes = [((64, 64), (96, 40), (50,))[at % 3] for at in range(many)]
        old = {f"t{at}": torch.zeros(shape, dtype=torch.int16) for at, shape in enumerate(shapes)}
        new = {name: tensor.clone() for name, tensor in old.items()}
        for tensor in new.values():
            tensor.view(-1)[::50] = 1
        tensors = tuple(
            TensorSpec(f"t{at}", "int16", ((32, 64), (96, 20), (25,))[at % 3]) for at in range(many)
        )
        parts = Layout(
            tensors=tensors,
            parts=tuple(
                Part(tensor=spec.name, begin=(0,) * len(spec.shape), shape=spec.shape,
                     local=spec.name, at=(0,) * len(spec.shape), axes=tuple(range(len(spec.shape))))
                for spec in tensors
            ),
        )  # fmt: skip
        patch, manifest = diff(old, new, base_version=0, version=1), manifest_of(old)
        for _ in range(2):
            with Counted() as counted:
                made = restrict(patch, parts, manifest)
            assert made.members == many
            found.append(counted.ops)
    assert max(found) <= min(found) + 10

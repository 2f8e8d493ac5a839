"""A rank of a trainer sends each receiver what that holds of its patch, and no more."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dealt import fill, held, layouts, published
from sparsecast.messages.compose import published_by, shared_out, through
from sparsecast.messages.errors import ManifestMismatch
from sparsecast.messages.layout import Layout, Padding, Part, identity, require_whole
from sparsecast.messages.manifest import Manifest, TensorSpec
from sparsecast.pipeline.delta import (
    Encoding,
    Patch,
    Shadow,
    apply,
    check,
    decode,
    diff,
    manifest_of,
    merge,
    routing,
    sieve,
)
from sparsecast.pipeline.delta.routing import restrict
from states import DTYPES, State, bits, changed, clone, random_tensor, same, seeds

densities = st.sampled_from([0.0, 0.0005, 0.01, 0.1, 0.5, 1.0])


def roots_of(ranks: Sequence[Layout]) -> list[Layout]:
    """Ranks of which each element is published once: what a part does not count is padding."""
    return [
        Layout(
            tensors=rank.tensors,
            parts=tuple(part for part in rank.parts if part.counted),
            padding=rank.padding
            + tuple(
                Padding(local=part.local, at=part.at, shape=part.local_box.shape)
                for part in rank.parts
                if not part.counted
            ),
        )
        for rank in ranks
    ]


def laid(layout: Layout, whole: State, seed: int) -> State:
    """The local tensors of a layout, filled; what no part holds is the same for the same seed."""
    local = held(layout, torch.Generator().manual_seed(seed))
    fill(layout, local, whole)
    return local


def written(patch: Patch, manifest: Manifest) -> dict[str, Tensor]:
    """Which elements a patch writes, told from what becomes of zeros and of ones: bool."""
    zeros = {
        spec.name: torch.zeros((*spec.shape, spec.itemsize), dtype=torch.uint8)
        .view(DTYPES[spec.dtype])
        .view(spec.shape)
        for spec in manifest.tensors
    }
    ones = clone(zeros)
    for tensor in ones.values():
        bits(tensor).bitwise_not_()
    apply(patch, zeros)
    apply(patch, ones)
    return {name: bits(tensor) == bits(ones[name]) for name, tensor in zeros.items()}


def inside(layout: Layout, manifest: Manifest) -> dict[str, Tensor]:
    """Which elements lie in a layout's parts: bool."""
    found = {spec.name: torch.zeros(spec.shape, dtype=torch.bool) for spec in manifest.tensors}
    for part in layout.parts:
        box = tuple(
            slice(begin, begin + n) for begin, n in zip(part.begin, part.shape, strict=True)
        )
        found[part.tensor][box] = True
    return found


def small_spans(patched: pytest.MonkeyPatch) -> None:
    """Spans of one block and a few hundred values, so that a test's tensors have many."""
    patched.setattr(decode, "SPAN_VALUES", 300)
    patched.setattr(decode, "SPAN_BLOCKS", 1)
    patched.setattr(routing, "SPAN_BLOCKS", 1)
    patched.setattr(sieve, "CHUNK_CPU", 300)


# ---- a patch of parts


@settings(max_examples=60, deadline=None)
@given(st.data(), published(), densities, seeds, st.booleans())
def test_every_worker_has_what_whole_patches_give(
    data: Any, old: State, density: float, seed: int, in_spans: bool
) -> None:
    """Roots and workers that hold tensors of any dtype cut, fused, stacked, transposed and padded,
    each in its own way: the restricted patches of all roots leave in every worker, bit for bit,
    what their whole patches leave, and what cutting the new tensors gives. Each carries the
    elements of its patch that lie in the worker's boxes and no other, passes check(), and is as it
    is when restricted once more."""
    roots, workers = roots_of(data.draw(layouts(old))), data.draw(layouts(old))
    require_whole(roots, manifest_of(old))
    new = changed(old, density, seed)
    patches = []
    for root in roots:
        root.require_fit(manifest_of(old))
        before, after = laid(root, old, seed), laid(root, new, seed)
        assert manifest_of(before).hash == root.local.hash
        patches.append(diff(before, after, base_version=6, version=7))
    with pytest.MonkeyPatch.context() as patched:
        if in_spans:
            small_spans(patched)
        for worker in workers:
            alone, filtered = laid(worker, old, seed), laid(worker, old, seed)
            for root, patch in zip(roots, patches, strict=True):
                parts, manifest = through(root, worker), root.local
                mine = restrict(patch, parts, manifest)
                check(mine, manifest)
                assert Patch.from_bytes(mine.to_bytes()).changed == mine.changed
                assert (mine.base_version, mine.version) == (6, 7)
                assert restrict(mine, parts, manifest).to_bytes() == mine.to_bytes()
                kept, sent = written(mine, manifest), written(patch, manifest)
                for name, mask in inside(parts, manifest).items():
                    assert torch.equal(kept[name], sent[name] & mask)
                for tensors, one in ((alone, mine), (filtered, patch)):
                    apply(one, tensors, version=6, layout=parts, manifest=manifest)
            assert same(alone, filtered)
            assert same(alone, laid(worker, new, seed))


@settings(max_examples=40, deadline=None)
@given(st.data(), published(), st.sampled_from([0.0, 0.0005, 0.01]), seeds)
def test_a_patch_of_parts_is_the_diff_of_parts(
    data: Any, old: State, density: float, seed: int
) -> None:
    """Where only the elements in a worker's boxes changed, their diff is the restricted patch, byte
    for byte: encodings and order are those that diff chooses."""
    (root, *_), worker = roots_of(data.draw(layouts(old))), data.draw(layouts(old))[0]
    before, manifest = laid(root, old, seed), root.local
    after = laid(root, changed(old, density, seed), seed)
    patch = diff(before, after, base_version=0, version=1)
    parts = through(root, worker)
    mine = restrict(patch, parts, manifest)
    only = clone(before)
    apply(mine, only)
    expected = diff(before, only, base_version=0, version=1)
    dense = Encoding.DENSE.value
    if dense not in patch.table.encoding and dense not in expected.table.encoding:
        assert not patch.full
        assert mine.to_bytes() == expected.to_bytes()


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("density", [0.001, 0.3, 1.0], ids=["sparse", "bitmap", "dense"])
def test_every_encoding_is_parted(
    dtype: str, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elements of 1, 2, 4 and 8 bytes in sparse, bitmap and dense sections of several blocks: two
    halves by columns carry what the whole one does."""
    small_spans(monkeypatch)
    old = {"w": random_tensor(DTYPES[dtype], (700, 300), torch.Generator().manual_seed(1))}
    new = changed(old, density, 2)
    manifest = manifest_of(old)
    patch = diff(old, new, base_version=0, version=1)
    halves = [restrict(patch, columns("w", dtype, 700, at, at + 150), manifest) for at in (0, 150)]
    told = written(patch, manifest)["w"]
    for half, (start, stop) in zip(halves, ((0, 150), (150, 300)), strict=True):
        assert half.changed == int(told[:, start:stop].sum())
        mask = written(half, manifest)["w"]
        assert torch.equal(mask[:, start:stop], told[:, start:stop])
        assert mask.sum() == half.changed
    state = clone(old)
    for half in halves:
        apply(half, state)
    assert same(state, new)


def columns(name: str, dtype: str, rows: int, start: int, stop: int) -> Layout:
    """Columns of a matrix."""
    shape = (rows, stop - start)
    part = Part(tensor=name, begin=(0, start), shape=shape, local="l", at=(0, 0), axes=(0, 1))
    return Layout(tensors=(TensorSpec("l", dtype, shape),), parts=(part,))


OLD: State = {"a": torch.zeros(6, 4), "z": torch.zeros(5, dtype=torch.float64)}
MANIFEST = manifest_of(OLD)


def partial(*parts: Part) -> Layout:
    """A receiver of parts of OLD that has only them."""
    dtypes = {spec.name: spec.dtype for spec in MANIFEST.tensors}
    shapes = {part.local: (dtypes[part.tensor], part.local_box.end) for part in parts}
    tensors = tuple(TensorSpec(name, *spec) for name, spec in shapes.items())
    return Layout(tensors=tensors, parts=parts, partial=True)


ROWS = Part(tensor="a", begin=(1, 0), shape=(2, 4), local="la", at=(0, 0), axes=(0, 1))


def test_scales_in_a_stack_go_to_tensors_without_dimensions() -> None:
    """A root stacks scales, of which each is a 0-dim tensor of the worker's: what is fixed in the
    stack runs along no dimension there."""
    names = ("s0", "s1", "s2")
    worker = identity(Manifest(tensors=tuple(TensorSpec(name, "float32", ()) for name in names)))
    root = Layout(
        tensors=(TensorSpec("stack", "float32", (3, 1)),),
        parts=tuple(
            Part(tensor=name, begin=(), shape=(), local="stack", at=(at, 0), axes=())
            for at, name in enumerate(names)
        ),
    )
    old, new = {"stack": torch.zeros(3, 1)}, {"stack": torch.tensor([[0.0], [1.0], [2.0]])}
    parts = through(root, worker)
    patch = restrict(diff(old, new, base_version=0, version=1), parts, root.local)
    local = {name: torch.zeros(()) for name in names}
    apply(patch, local, layout=parts, manifest=root.local)
    assert [tensor.item() for tensor in local.values()] == [0.0, 1.0, 2.0]


def test_nothing_of_a_patch_is_a_patch_of_nothing() -> None:
    """None of the changed elements is a worker's, or it has none of the tensors: the patch has no
    section, and brings the worker from base to version all the same."""
    new = clone(OLD)
    new["a"][5, 0] = 1.0
    patch = diff(OLD, new, base_version=3, version=5)
    for layout in (partial(ROWS), partial()):
        nothing = restrict(patch, layout, MANIFEST)
        assert (nothing.members, nothing.changed, nothing.nbytes) == (0, 0, 80)
        assert (nothing.base_version, nothing.version) == (3, 5)
        check(Patch.from_bytes(nothing.to_bytes()), MANIFEST)


def test_a_patch_of_everything_is_itself() -> None:
    """A worker has all that is published, whole or in rows: nothing is made anew, whatever the form
    of the patch."""
    rows = [msgspec.structs.replace(ROWS, begin=(at, 0), local=f"{at}") for at in (0, 2, 4)]
    thirds = partial(*rows, identity(MANIFEST).parts[1])
    for density in (0.3, 1.0):
        patch = diff(OLD, changed(OLD, density, 1), base_version=0, version=1)
        for layout in (identity(MANIFEST), thirds):
            assert restrict(patch, layout, MANIFEST) is patch


def test_an_anchor_stays_whole() -> None:
    """A full copy fits any weights because it has them all: it is sent as it is."""
    anchor = Shadow(OLD).anchor(4)
    assert restrict(anchor, partial(ROWS), MANIFEST) is anchor


def test_the_full_form_is_parted() -> None:
    """Every element of many small tensors changed, and the patch has no table: what a worker holds
    comes in sections, in the order of the manifest, not by the size of elements."""
    old = {f"t{at}": torch.zeros(2, dtype=(torch.int8, torch.float64)[at % 2]) for at in range(60)}
    new = {name: torch.ones_like(tensor) for name, tensor in old.items()}
    patch, manifest = diff(old, new, base_version=0, version=1), manifest_of(old)
    assert patch.full
    some = identity(Manifest(tensors=manifest.tensors[10:20]))
    mine = restrict(patch, some, manifest)
    assert mine.table.index.tolist() == list(range(10, 20))
    state = clone(old)
    apply(mine, state)
    assert same(state, old | {f"t{at}": new[f"t{at}"] for at in range(10, 20)})


def test_an_element_that_is_held_twice_is_sent_once() -> None:
    """A worker has a row in two places: it is in the patch once, and arrives in both."""
    new = clone(OLD)
    new["a"][1:4] = 2.0
    layout = partial(ROWS, msgspec.structs.replace(ROWS, begin=(2, 0), local="again"))
    patch = diff(OLD, new, base_version=0, version=1)
    assert restrict(patch, layout, MANIFEST).changed == 3 * 4
    local = {"la": torch.zeros(2, 4), "again": torch.zeros(2, 4)}
    apply(restrict(patch, layout, MANIFEST), local, layout=layout, manifest=MANIFEST)
    assert all(bool((tensor == 2.0).all()) for tensor in local.values())


def test_another_models_patch_or_layout_is_refused() -> None:
    """The patch is for other tensors, or the layout has boxes that these do not: it is named."""
    patch = diff(OLD, OLD, base_version=0, version=1)
    with pytest.raises(ManifestMismatch, match="is for manifest"):
        restrict(patch, partial(), Manifest(tensors=MANIFEST.tensors[:1]))
    with pytest.raises(ManifestMismatch, match=r"\[5, 0\] .* of tensor 'a', which has shape"):
        restrict(patch, partial(msgspec.structs.replace(ROWS, begin=(5, 0))), MANIFEST)


def test_patches_that_were_merged_are_parted() -> None:
    """Two patches wait and go out as one, in which a dense section meets a sparse one."""
    middle, last = changed(OLD, 1.0, 1), changed(OLD, 1.0, 1)
    last["a"][1, 1] = 7.0
    patches = [
        diff(OLD, middle, base_version=0, version=1),
        diff(middle, last, base_version=1, version=2),
    ]
    local = {"la": torch.zeros(2, 4)}
    mine = restrict(merge(patches, manifest=MANIFEST), partial(ROWS), MANIFEST)
    apply(mine, local, version=0, layout=partial(ROWS), manifest=MANIFEST)
    assert same(local, {"la": last["a"][1:3]})


# ---- sizes


def tensor_parallel(hidden: int, layers: int, place: int, of: int) -> Layout:
    """A worker of a few: for each layer the rows of one matrix, and the columns of another."""
    share = hidden // of
    tensors, parts = [], []
    for layer in range(layers):
        for name, begin, shape in (
            (f"{layer}.up", (place * share, 0), (share, hidden)),
            (f"{layer}.down", (0, place * share), (hidden, share)),
        ):
            tensors.append(TensorSpec(name, "bfloat16", shape))
            parts.append(
                Part(tensor=name, begin=begin, shape=shape, local=name, at=(0, 0), axes=(0, 1))
            )
    return Layout(tensors=tuple(tensors), parts=tuple(parts))


def row_shards(manifest: Manifest, place: int, of: int) -> Layout:
    """A rank of FSDP: rows of every matrix."""
    tensors, parts = [], []
    for spec in manifest.tensors:
        rows = spec.shape[0] // of
        shape = (rows, *spec.shape[1:])
        tensors.append(TensorSpec(spec.name, spec.dtype, shape))
        parts.append(
            Part(tensor=spec.name, begin=(place * rows, 0), shape=shape,
                 local=spec.name, at=(0, 0), axes=(0, 1))
        )  # fmt: skip
    return Layout(tensors=tuple(tensors), parts=tuple(parts))


@pytest.mark.parametrize("density", [0.003, 0.01, 0.03])
def test_a_worker_gets_a_tenth_more_than_it_owns_at_most(density: float) -> None:
    """Four ranks of FSDP, four of tensor parallelism, bf16: what a worker is sent is at most 1.1
    times 4 bytes for each changed element that it has, 4.1 bytes but for the counts of blocks and
    the table."""
    hidden, layers, many = 1024, 3, 4
    workers = [tensor_parallel(hidden, layers, place, many) for place in range(many)]
    manifest = published_by(workers)
    roots = shared_out([row_shards(manifest, place, many) for place in range(many)])
    generator = torch.Generator().manual_seed(1)
    old = {
        spec.name: random_tensor(torch.bfloat16, spec.shape, generator) for spec in manifest.tensors
    }
    new = changed(old, density, 2)
    patches = [
        diff(laid(root, old, 0), laid(root, new, 0), base_version=0, version=1) for root in roots
    ]
    sizes = []
    for root, patch in zip(roots, patches, strict=True):
        mine = [restrict(patch, through(root, worker), root.local) for worker in workers]
        for part in mine:
            fixed = 80 + sum(40 + 4 * section.blocks + 48 for section in part.sections)
            assert part.nbytes <= 4.1 * part.changed + fixed
        assert sum(part.changed for part in mine) == patch.changed
        sizes.append([part.nbytes for part in mine])
    for place, worker in enumerate(workers):
        before, after = laid(worker, old, 0), laid(worker, new, 0)
        owned = sum(int((bits(before[name]) != bits(after[name])).sum()) for name in before)
        assert sum(each[place] for each in sizes) <= 1.1 * 4 * owned


def test_parting_a_patch_costs_what_it_carries() -> None:
    """A hundred times the elements, as many of them changed: it takes about as many operations, and
    hardly more memory."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Made(TorchDispatchMode):
        ops = numel = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            self.ops += 1
            self.numel += result.numel() if isinstance(result, Tensor) else 0
            return result

    found = []
    for rows in (128, 12_800):
        old = {"w": torch.zeros(rows, 1024, dtype=torch.int16)}
        new = clone(old)
        new["w"].view(-1)[:: rows * 1024 // 4000] = 1
        patch, manifest = diff(old, new, base_version=0, version=1), manifest_of(old)
        with Made() as made:
            restrict(patch, columns("w", "int16", rows, 0, 512), manifest)
        found.append((made.ops, made.numel))
    (few, little), (many, much) = found
    assert many < few + 50
    assert much < 2 * little

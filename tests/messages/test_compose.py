"""Layouts of several ranks: who publishes what, and where it lies on whoever takes it."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecast.messages.boxes import Box
from sparsecast.messages.compose import published_by, shared_out, through
from sparsecast.messages.errors import ManifestMismatch
from sparsecast.messages.layout import (
    NO_AXIS,
    Layout,
    Padding,
    Part,
    identity,
    require_whole,
)
from sparsecast.messages.manifest import Manifest, TensorSpec

Index = tuple[int, ...]
#: The elements of some tensors, by name and index.
Elements = dict[tuple[str, Index], object]


def moves(part: Part) -> Iterator[tuple[Index, Index]]:
    """Where each element of a part comes from, and where it lies: as the docstring of Part says."""
    for ahead in itertools.product(*map(range, part.shape)):
        local = list(part.at)
        for axis, d in zip(part.axes, ahead, strict=True):
            if axis != NO_AXIS:
                local[axis] += d
        yield tuple(b + d for b, d in zip(part.begin, ahead, strict=True)), tuple(local)


def taken(layout: Layout, source: Elements) -> Elements:
    """The local elements that a layout says come from these."""
    return {
        (part.local, local): source[part.tensor, index]
        for part in layout.parts
        for index, local in moves(part)
        if (part.tensor, index) in source
    }


def elements(manifest: Manifest) -> Elements:
    """Every element of some tensors, each of a value of its own."""
    return {
        key: key
        for spec in manifest.tensors
        for index in itertools.product(*map(range, spec.shape))
        if (key := (spec.name, index))
    }


# ---- what is drawn


@st.composite
def cells(draw: st.DrawFn, spec: TensorSpec) -> list[Box]:
    """A tensor cut along each dimension, now and then into empty boxes, too."""
    along = []
    for size in spec.shape:
        cuts = draw(st.lists(st.integers(0, size), max_size=2))
        along.append(list(itertools.pairwise(sorted([0, size, *cuts]))))
    return [
        Box(tuple(b for b, _ in cell), tuple(e - b for b, e in cell))
        for cell in itertools.product(*along)
    ]


@st.composite
def laid(draw: st.DrawFn, boxes: list[tuple[str, Box]], prefix: str) -> Layout:
    """A layout that holds these boxes: a few in a local tensor, turned, in a stack or in none of
    its dimensions, with room around them."""
    tensors, parts = [], []
    while boxes:
        some = draw(st.integers(1, len(boxes)))
        name = f"{prefix}{len(tensors)}"
        extra = draw(st.integers(0, 1))
        dims = extra + max((n > 1 for _, box in boxes[:some] for n in box.shape), default=0)
        dims = max(dims, *(sum(n != 1 for n in box.shape) for _, box in boxes[:some]))
        row, reach = 0, [0] * dims
        for tensor, box in boxes[:some] if dims else boxes[:1]:
            room = draw(st.permutations(range(dims)))
            axes = []
            for n in box.shape:
                # Whatever is not one thick needs a dimension; there are as many as it takes.
                needed = sum(m != 1 for m in box.shape[len(axes) + 1 :])
                runs = n != 1 or (len(room) > needed and draw(st.booleans()))
                axes.append(room.pop() if runs else NO_AXIS)
            at = [draw(st.integers(0, 1)) for _ in range(dims)]
            if dims:
                at[0] += row
            part = Part(
                tensor=tensor, begin=box.begin, shape=box.shape,
                local=name, at=tuple(at), axes=tuple(axes), counted=draw(st.booleans()),
            )  # fmt: skip
            parts.append(part)
            reach = list(map(max, reach, part.local_box.end))
            row = reach[0] if dims else 0
        boxes = boxes[some if dims else 1 :]
        shape = tuple(n + draw(st.integers(0, 1)) for n in reach)
        tensors.append(TensorSpec(name, "int8", shape))
    return Layout(tensors=tuple(tensors), parts=tuple(parts), partial=True)


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Manifest, list[Layout], list[Layout]]:
    """Published tensors, the ranks of a trainer that hold each element once, and those of workers
    that hold what they like, some of it twice."""
    sizes = draw(st.lists(shapes, min_size=1, max_size=3))
    manifest = Manifest(
        tensors=tuple(TensorSpec(f"t{at}", "int8", shape) for at, shape in enumerate(sizes))
    )
    roots: list[list[tuple[str, Box]]] = [[] for _ in range(draw(st.integers(1, 3)))]
    workers: list[list[tuple[str, Box]]] = [[] for _ in range(draw(st.integers(1, 2)))]
    for spec in manifest.tensors:
        for box in draw(cells(spec)):
            draw(st.sampled_from(roots)).append((spec.name, box))
        for box in draw(cells(spec)):
            draw(st.sampled_from(workers)).append((spec.name, box))
        if draw(st.booleans()):
            draw(st.sampled_from(workers)).append(
                (spec.name, Box((0,) * len(spec.shape), spec.shape))
            )
    return (
        manifest,
        [draw(laid(draw(st.permutations(boxes)), f"r{at}.")) for at, boxes in enumerate(roots)],
        [draw(laid(draw(st.permutations(boxes)), f"w{at}.")) for at, boxes in enumerate(workers)],
    )


# ---- through


@given(world=worlds())
def test_what_goes_through_arrives_as_if_it_came_whole(
    world: tuple[Manifest, list[Layout], list[Layout]],
) -> None:
    """Tensors cut, turned, stacked and flattened by the ranks of a trainer, and otherwise by those
    of workers: each worker has from all the roots together, element by element, what it would
    take of the whole tensors, and nothing twice."""
    manifest, roots, workers = world
    published = elements(manifest)
    for worker in workers:
        worker.require_fit(manifest)
        arrived: Elements = {}
        for root in roots:
            root.require_fit(manifest)
            layout = through(root, worker)
            layout.require_fit(root.local)
            assert layout.tensors == worker.tensors
            part = taken(layout, taken(root, published))
            assert not part.keys() & arrived.keys()
            assert len(part) == sum(math.prod(p.shape) for p in layout.parts)
            arrived |= part
        assert arrived == taken(worker, published)


@given(world=worlds())
def test_what_a_worker_counts_stays_counted(
    world: tuple[Manifest, list[Layout], list[Layout]],
) -> None:
    """Of each local tensor of a worker as many elements count as before."""
    _, roots, workers = world
    for worker in workers:

        def counts(*layouts: Layout) -> Counter[tuple[str, bool]]:
            found: Counter[tuple[str, bool]] = Counter()
            for part in (part for layout in layouts for part in layout.parts):
                found[part.local, part.counted] += math.prod(part.shape)
            return +found

        assert counts(*(through(root, worker) for root in roots)) == counts(worker)


def test_a_column_shard_goes_to_a_transposed_stack() -> None:
    """A root holds columns of a matrix; a worker has some of them as rows, the third of a stack."""
    root = Layout(
        tensors=(TensorSpec("shard", "int8", (4, 3)),),
        parts=(part_of("w", (0, 3), (4, 3), "shard", (0, 0), (0, 1)),),
    )
    worker = Layout(
        tensors=(TensorSpec("stack", "int8", (5, 4, 2)),),
        parts=(part_of("w", (1, 2), (2, 4), "stack", (2, 0, 0), (2, 1)),),
        partial=True,
    )
    (part,) = through(root, worker).parts
    assert part == part_of("shard", (1, 0), (2, 3), "stack", (2, 1, 0), (2, 1))


def test_a_stack_goes_to_what_lies_flat() -> None:
    """A root stacks biases in three dimensions, a worker has them one behind the other: what the
    stack fixes runs along no dimension there."""
    root = Layout(
        tensors=(TensorSpec("stack", "int8", (2, 1, 3)),),
        parts=tuple(part_of(f"b{at}", (0,), (3,), "stack", (at, 0, 0), (2,)) for at in range(2)),
    )
    worker = Layout(
        tensors=(TensorSpec("flat", "int8", (6,)),),
        parts=tuple(part_of(f"b{at}", (0,), (3,), "flat", (3 * at,), (0,)) for at in range(2)),
    )
    layout = through(root, worker)
    assert layout.parts == tuple(
        part_of("stack", (at, 0, 0), (1, 1, 3), "flat", (3 * at,), (NO_AXIS, NO_AXIS, 0))
        for at in range(2)
    )
    layout.require_fit(root.local)


def test_layouts_with_nothing_in_common_make_one_of_no_parts() -> None:
    """A root has none of what a worker takes: the worker's tensors stay, and no part is left."""
    root = identity(Manifest(tensors=(TensorSpec("a", "int8", (2,)),)))
    worker = identity(Manifest(tensors=(TensorSpec("b", "int8", (2,)),)))
    layout = through(root, worker)
    assert layout == Layout(tensors=worker.tensors, parts=(), partial=True)
    layout.require_fit(root.local)


@pytest.mark.parametrize("together", [True, False])
def test_many_experts_are_composed_quickly(together: bool) -> None:
    """18,432 matrices of experts, published one by one or 128 together, of which a root has a
    quarter of the rows and a worker stacks half of them, take a time that nobody notices."""
    specs, root, worker, shards, stacks = [], [], [], [], []
    experts = 128
    for layer, matrix in itertools.product(range(48), ("gate", "up", "down")):
        name = f"{layer}.{matrix}"
        stacks.append(TensorSpec(f"w.{name}", "bfloat16", (experts, 64, 32)))
        shards.append(TensorSpec(f"r.{name}", "bfloat16", (experts, 32, 32)))
        if together:
            specs.append(TensorSpec(name, "bfloat16", (experts, 128, 32)))
        for at in range(experts):
            begin: Index = (at, 32, 0) if together else (32, 0)
            lead, axes = ((1,), (0, 1, 2)) if together else ((), (1, 2))
            tensor = name if together else f"{name}.{at}"
            if not together:
                specs.append(TensorSpec(tensor, "bfloat16", (128, 32)))
            root.append(part_of(tensor, begin, (*lead, 32, 32), f"r.{name}", (at, 0, 0), axes))
            begin = (*begin[:-2], 0, 0)
            worker.append(part_of(tensor, begin, (*lead, 64, 32), f"w.{name}", (at, 0, 0), axes))
    source = Layout(tensors=tuple(shards), parts=tuple(root))
    target = Layout(tensors=tuple(stacks), parts=tuple(worker))
    source.require_fit(Manifest(tensors=tuple(specs)))
    target.require_fit(Manifest(tensors=tuple(specs)))
    began = time.process_time()
    layout = through(source, target)
    layout.require_fit(source.local)
    assert time.process_time() - began < 5
    assert len(layout.parts) == 18_432


def part_of(
    tensor: str, begin: Index, shape: Index, local: str, at: Index, axes: Index, **fields: bool
) -> Part:
    """A part, its fields in their order."""
    return Part(tensor=tensor, begin=begin, shape=shape, local=local, at=at, axes=axes, **fields)


# ---- partial layouts


def test_a_partial_layout_may_leave_out_but_not_hold_twice() -> None:
    """Elements from other sources are no gap; those of two parts, and parts that reach beyond the
    local tensor, are refused as ever."""
    manifest = Manifest(tensors=(TensorSpec("w", "int8", (4, 4)),))
    local = (TensorSpec("l", "int8", (4, 4)),)

    def layout(*parts: Part) -> Layout:
        return Layout(tensors=local, parts=parts, partial=True)

    rows = part_of("w", (0, 0), (2, 4), "l", (0, 0), (0, 1))
    column = part_of("w", (2, 1), (2, 1), "l", (1, 3), (0, 1))
    layout(rows).require_fit(manifest)
    with pytest.raises(ManifestMismatch, match="of local tensor 'l' is in no part"):
        msgspec.structs.replace(layout(rows), partial=False).require_fit(manifest)
    with pytest.raises(ManifestMismatch, match=r"element \[1, 3\] of local tensor 'l' .* and in"):
        layout(rows, column).require_fit(manifest)
    with pytest.raises(ManifestMismatch, match=r"would be the box at \[3, 3\] .* tensor 'l'"):
        layout(msgspec.structs.replace(column, at=(3, 3))).require_fit(manifest)


def test_only_what_is_one_thick_runs_along_no_dimension() -> None:
    """Two rows cannot lie in one place, nor can none."""
    part_of("w", (1, 0), (1, 4), "l", (0,), (NO_AXIS, 0))
    for rows in (0, 2):
        with pytest.raises(ValueError, match=r"axes \[-1, 0\], which are not distinct dimensions"):
            part_of("w", (1, 0), (rows, 4), "l", (0,), (NO_AXIS, 0))


# ---- what all hold


@given(world=worlds())
def test_what_the_ranks_hold_makes_up_what_is_published(
    world: tuple[Manifest, list[Layout], list[Layout]],
) -> None:
    """From the ranks' parts alone come the tensors that they were cut from, in the order in which
    the ranks name them."""
    manifest, roots, _ = world
    found = published_by(roots)
    assert [spec.name for spec in found.tensors] == list(
        dict.fromkeys(part.tensor for root in roots for part in root.parts)
    )
    assert set(found.tensors) == set(manifest.tensors)


@pytest.mark.parametrize(
    ("dtype", "part", "names"),
    [
        ("int16", part_of("w", (0,), (2,), "l", (0,), (0,)), "'w' has dtype int8, and int16 .*'l'"),
        ("int8", part_of("w", (0, 0), (2, 1), "l", (0,), (0, -1)), "'w' has 1 dimensions, and 2"),
        ("int8", part_of("w", (0,), (2,), "q", (0,), (0,)), "'w' lies in no local .* rank 1"),
    ],
    ids=["dtype", "dimensions", "local"],
)
def test_ranks_that_disagree_are_refused(dtype: str, part: Part, names: str) -> None:
    """Two ranks hold one tensor, and not as the same: it is named."""
    one = identity(Manifest(tensors=(TensorSpec("w", "int8", (2,)),)))
    other = Layout(tensors=(TensorSpec("l", dtype, (2,)),), parts=(part,))
    with pytest.raises(ManifestMismatch, match=names):
        published_by([one, other])


# ---- who publishes it


def sharded(name: str, rows: int, columns: int, place: int, of: int) -> tuple[TensorSpec, Part]:
    """The rows of a matrix that one of several ranks has, cut as torch.chunk cuts; perhaps none."""
    size = -(-rows // of)
    begin = min(place * size, rows)
    shape = (min(size, rows - begin), columns)
    spec = TensorSpec(name, "bfloat16", shape)
    return spec, part_of(name, (begin, 0), shape, name, (0, 0), (0, 1), counted=False)


def mesh(copies: int, shards: int, matrices: list[Index], norms: list[int]) -> list[Layout]:
    """The ranks of HSDP, copy by copy: matrices in shards by rows, norms held whole by all."""
    layouts = []
    for _, place in itertools.product(range(copies), range(shards)):
        held = [
            sharded(f"m{at}", rows, columns, place, shards)
            for at, (rows, columns) in enumerate(matrices)
        ]
        for at, size in enumerate(norms):
            spec = TensorSpec(f"n{at}", "float32", (size,))
            held.append((spec, part_of(spec.name, (0,), (size,), spec.name, (0,), (0,))))
        scale = TensorSpec("scale", "float32", ())
        held.append((scale, part_of("scale", (), (), "scale", (), ())))
        layouts.append(Layout(tensors=tuple(s for s, _ in held), parts=tuple(p for _, p in held)))
    return layouts


counts = st.integers(1, 4)
sizes = st.integers(0, 9)


@given(counts, counts, st.lists(st.tuples(sizes, sizes), max_size=4), st.lists(sizes, max_size=3))
def test_copies_share_out_what_they_hold(
    copies: int, shards: int, matrices: list[Index], norms: list[int]
) -> None:
    """Uneven shards, some of them empty, in a few copies, and norms that all hold: everything is
    published once, of local tensors that a rank has, none without elements, and every time by the
    same ranks."""
    layouts = mesh(copies, shards, matrices, norms)
    result = shared_out(layouts)
    manifest = published_by(layouts)
    require_whole(result, manifest)
    require_whole(result, Manifest(tensors=manifest.tensors))
    for layout, mine in zip(layouts, result, strict=True):
        mine.require_fit(manifest)
        assert [spec for spec in layout.tensors if spec in mine.tensors] == list(mine.tensors)
        assert all(spec.numel for spec in mine.tensors)
        assert all(part.counted for part in mine.parts)
    assert sum(layout.local.nbytes for layout in result) == manifest.nbytes
    assert shared_out(layouts) == result


@given(counts, counts, st.integers(0, 9), st.integers(0, 9))
def test_equal_tensors_are_shared_evenly(
    copies: int, shards: int, matrices: int, norms: int
) -> None:
    """Of equal matrices in even shards the copies of a shard publish as many, but for one; norms
    go to whoever has the least."""
    result = shared_out(mesh(copies, shards, [(4 * shards, 8)] * matrices, [16] * norms))
    shard, nbytes = 4 * 8 * 2, [layout.local.nbytes for layout in result]
    if not norms:
        for place in range(shards):
            same = nbytes[place::shards]
            assert max(same) - min(same) <= shard + 4  # the scale is somewhere, too
    if not matrices:
        assert max(nbytes) - min(nbytes) <= 16 * 4 + 4
    # Norms fill up what the matrices left uneven before anyone has one too many.
    assert max(nbytes) - min(nbytes) <= shard + 4


def test_one_rank_publishes_all_that_it_holds() -> None:
    """Of one rank, whatever it counts, all is published, and it is the same layout."""
    manifest = Manifest(tensors=(TensorSpec("w", "int8", (3, 2)), TensorSpec("s", "int8", ())))
    assert shared_out([identity(manifest)]) == [identity(manifest)]


def test_tensors_tied_on_one_rank_are_published_once() -> None:
    """A rank holds one box under two names: it publishes the first."""
    parts = [part_of("w", (0,), (2,), name, (0,), (0,)) for name in ("one", "other")]
    tensors = tuple(TensorSpec(part.local, "int8", (2,)) for part in parts)
    (layout,) = shared_out([Layout(tensors=tensors, parts=tuple(parts))])
    assert layout == Layout(tensors=tensors[:1], parts=(parts[0],))


ROWS = TensorSpec("rows", "int8", (2, 4))


def rows_from(begin: int, padding: tuple[Padding, ...] = ()) -> Layout:
    """A rank that holds two rows of "w"."""
    part = part_of("w", (begin, 0), (2, 4), "rows", (0, 0), (0, 1))
    return Layout(tensors=(ROWS,), parts=(part,), padding=padding)


@pytest.mark.parametrize(
    ("layouts", "names"),
    [
        ([rows_from(0), rows_from(1)], r"element \[1, 0\] of tensor 'w' is counted by rank 0"),
        (
            [rows_from(0), rows_from(3)],
            r"\[2, 0\] of shape \[1, 4\] of tensor 'w' is counted by no",
        ),
        (
            [rows_from(0, (Padding(local="rows", at=(0, 0), shape=(2, 1)),)), rows_from(2)],
            "rank 0 is to publish local tensor 'rows', which has padding",
        ),
    ],
    ids=["overlap", "gap", "padding"],
)
def test_what_cannot_be_published_once_is_refused(layouts: list[Layout], names: str) -> None:
    """Boxes of two ranks overlap, rows are on no rank, or a tensor is padded: it is named."""
    with pytest.raises(ManifestMismatch, match=names):
        shared_out(layouts)

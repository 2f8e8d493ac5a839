"""A layout says of every local element where it comes from, once, or is refused by name."""

from __future__ import annotations

import contextlib
import itertools
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecast.messages import codec
from sparsecast.messages.boxes import Box, first_meeting, first_miscount, gap_at, meetings
from sparsecast.messages.errors import ManifestMismatch, RemoteProtocolError
from sparsecast.messages.layout import Layout, Padding, Part, identity, require_whole
from sparsecast.messages.manifest import Manifest, TensorSpec

Index = tuple[int, ...]

EMBED = TensorSpec("embed", "bfloat16", (6, 4))
SCALE = TensorSpec("scale", "float32", ())
PUBLISHED = Manifest(tensors=(EMBED, SCALE))


def rows(first: int, count: int, to: int = 0, /, **fields: object) -> Part:
    """Rows of "embed" in the local tensor "rows", but for what `fields` change."""
    given = {
        "tensor": "embed", "begin": (first, 0), "shape": (count, 4),
        "local": "rows", "at": (to, 0), "axes": (0, 1),
    }  # fmt: skip
    return Part(**given | fields)


def held(count: int, *parts: Part, padding: tuple[Padding, ...] = ()) -> Layout:
    """A rank with one local tensor, "rows", of `count` rows."""
    local = TensorSpec("rows", "bfloat16", (count, 4))
    return Layout(tensors=(local,), parts=parts, padding=padding)


def elements(box: Box) -> Iterator[Index]:
    """The indices of a box, in C order."""
    return itertools.product(*(range(b, e) for b, e in zip(box.begin, box.end, strict=True)))


def counted(boxes: Iterable[Box]) -> Counter[Index]:
    """How many boxes hold each element, one by one."""
    return Counter(index for box in boxes for index in elements(box))


@st.composite
def boxes_within(draw: st.DrawFn, shape: Index) -> Box:
    """Any box of a tensor, an empty one too."""
    ends = [sorted(draw(st.tuples(*[st.integers(0, size)] * 2))) for size in shape]
    return Box(tuple(b for b, _ in ends), tuple(e - b for b, e in ends))


@st.composite
def tilings(draw: st.DrawFn, box: Box) -> list[Box]:
    """Boxes that make up a box, by cutting it again and again."""
    dims = [d for d, size in enumerate(box.shape) if size > 1]
    if not dims or draw(st.integers(0, 3)) == 0:
        return [box]
    d = draw(st.sampled_from(dims))
    left = draw(st.integers(1, box.shape[d] - 1))
    begin, shape = list(box.begin), list(box.shape)
    begin[d], shape[d] = begin[d] + left, shape[d] - left
    first = Box(box.begin, tuple(left if i == d else n for i, n in enumerate(box.shape)))
    return draw(tilings(first)) + draw(tilings(Box(tuple(begin), tuple(shape))))


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


# ---- boxes


@given(data=st.data(), shape=shapes)
def test_the_first_element_that_is_not_covered_once_is_found(
    data: st.DataObject, shape: Index
) -> None:
    """Boxes of a tensor at random: the count of each element, one by one, says what is wrong."""
    boxes = data.draw(st.lists(boxes_within(shape), max_size=5))
    count = counted(boxes)
    wrong = [i for i in elements(Box((0,) * len(shape), shape)) if count[i] != 1]
    found = first_miscount(shape, boxes)
    assert found == ((wrong[0], count[wrong[0]]) if wrong else None)
    if wrong and not count[wrong[0]]:
        gap = gap_at(wrong[0], shape, boxes)
        assert gap.begin == wrong[0]
        assert gap.within(shape)
        assert not any(count[i] for i in elements(gap))
        assert min(gap.shape, default=1) > 0


@given(data=st.data(), shape=shapes)
def test_a_tensor_cut_into_pieces_is_covered_once(data: st.DataObject, shape: Index) -> None:
    """However a tensor is cut, its pieces make it up; without one of them, that one is missing,
    and with one of them again, it is there twice."""
    pieces = data.draw(st.permutations(data.draw(tilings(Box((0,) * len(shape), shape)))))
    assert first_miscount(shape, pieces) is None
    one = pieces[0]
    if 0 not in one.shape:
        assert first_miscount(shape, pieces[1:]) == (one.begin, 0)
        assert gap_at(one.begin, shape, pieces[1:]) == one
        assert first_miscount(shape, [*pieces, one]) == (one.begin, 2)


@given(data=st.data(), shape=shapes)
def test_boxes_that_meet_are_found(data: st.DataObject, shape: Index) -> None:
    """Boxes of a tensor at random: the pairs that have an element in common, one by one, and one of
    the elements that several have."""
    boxes = data.draw(st.lists(boxes_within(shape), max_size=6))
    held = [set(elements(box)) for box in boxes]
    pairs = [
        (one, other)
        for one, other in itertools.combinations(range(len(boxes)), 2)
        if held[one] & held[other]
    ]
    assert sorted(meetings(boxes)) == pairs
    for one, other in pairs:
        assert set(elements(boxes[one].shared(boxes[other]))) == held[one] & held[other]
    found = first_meeting(boxes)
    assert (found is None) == (not pairs)
    assert found is None or counted(boxes)[found] > 1


# ---- one rank


@st.composite
def fitting(draw: st.DrawFn) -> tuple[Manifest, Layout]:
    """A local tensor made up of boxes of published ones, turned at will, and of padding."""
    size = st.integers(0, 4)
    local = TensorSpec("local", "int8", tuple(draw(st.lists(size, max_size=3))))
    specs, parts, padding = [], [], []
    for number, box in enumerate(draw(tilings(Box((0,) * len(local.shape), local.shape)))):
        if draw(st.integers(0, 4)) == 0:
            padding.append(Padding(local="local", at=box.begin, shape=box.shape))
            continue
        # A dimension of extent 1 need not be one of the published tensor; they come in any order.
        axes = [d for d, n in enumerate(box.shape) if n != 1 or draw(st.booleans())]
        axes = draw(st.permutations(axes))
        before = tuple(draw(st.integers(0, 2)) for _ in axes)
        shape = tuple(box.shape[d] for d in axes)
        after = tuple(draw(st.integers(0, 2)) for _ in axes)
        whole = tuple(sum(sizes) for sizes in zip(before, shape, after, strict=True))
        specs.append(TensorSpec(f"tensor{number}", "int8", whole))
        parts.append(
            Part(
                tensor=f"tensor{number}", begin=before, shape=shape,
                local="local", at=box.begin, axes=tuple(axes), counted=draw(st.booleans()),
            )
        )  # fmt: skip
    layout = Layout(tensors=(local,), parts=tuple(parts), padding=tuple(padding))
    return Manifest(tensors=tuple(specs)), layout


@given(made=fitting())
def test_what_fills_a_local_tensor_fits(made: tuple[Manifest, Layout]) -> None:
    """Parts of any published tensors, turned and offset, that make up a local tensor are taken."""
    manifest, layout = made
    layout.require_fit(manifest)


@given(made=fitting(), data=st.data())
def test_a_part_too_few_or_too_many_is_refused(
    made: tuple[Manifest, Layout], data: st.DataObject
) -> None:
    """A rank loses a part, or has it twice: the local tensor is named, and the part."""
    manifest, layout = made
    solid = [n for n, part in enumerate(layout.parts) if 0 not in part.shape]
    if not solid:
        return
    number = data.draw(st.sampled_from(solid))
    part = layout.parts[number]
    fewer = msgspec.structs.replace(
        layout, parts=layout.parts[:number] + layout.parts[number + 1 :]
    )
    with pytest.raises(ManifestMismatch, match="of local tensor 'local' is in no part"):
        fewer.require_fit(manifest)
    more = msgspec.structs.replace(layout, parts=(*layout.parts, part))
    with pytest.raises(ManifestMismatch, match=f"and in .* of tensor '{part.tensor}'"):
        more.require_fit(manifest)


def test_tensors_without_dimensions_or_elements_fit() -> None:
    """A 0-dim tensor lies in a local one of any rank; an empty one may have a part."""
    empty = TensorSpec("empty", "float32", (0, 3))
    manifest = Manifest(tensors=(SCALE, TensorSpec("shift", "float32", ()), empty))
    stacked = [
        Part(tensor=name, begin=(), shape=(), local="both", at=(place, 0), axes=())
        for place, name in enumerate(("scale", "shift"))
    ]
    nothing = Part(tensor="empty", begin=(0, 1), shape=(0, 2), local="none", at=(2, 0), axes=(1, 0))
    both, none = TensorSpec("both", "float32", (2, 1)), TensorSpec("none", "float32", (5, 0))
    for parts in (stacked, [*stacked, nothing]):
        layout = Layout(tensors=(both, none), parts=tuple(parts))
        layout.require_fit(manifest)
        require_whole([layout], manifest)


PAD = Padding(local="rows", at=(2, 0), shape=(1, 4))


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (held(2, rows(0, 2, tensor="other")), "hold tensor 'other', which is not published"),
        (held(2, rows(5, 2)), r"box at \[5, 0\] of shape \[2, 4\] of tensor 'embed', which has"),
        (held(2, rows(0, 2, begin=(0,), shape=(2,), axes=(0,))), "of tensor 'embed', which has"),
        (held(2, rows(0, 2, local="others")), "lies in no local tensor"),
        (held(2, rows(0, 2, at=(1, 0))), r"would be the box at \[1, 0\] .* of local tensor 'rows'"),
        (held(2, rows(0, 2, at=(0, 0, 0))), "of local tensor 'rows', which has shape"),
        (held(2, rows(0, 2, axes=(1, 0))), r"\[4, 2\] of local tensor 'rows', which has shape"),
        (held(2, rows(0, 1), rows(3, 1, 1), padding=(PAD,)), "padding, the box at .* would be"),
        (held(2, rows(0, 1)), r"box at \[1, 0\] of shape \[1, 4\] of local tensor 'rows' is in no"),
        (held(3, rows(0, 3), padding=(PAD,)), r"element \[2, 0\] .*'embed' and in padding"),
        (
            Layout(tensors=(TensorSpec("rows", "float32", (2, 4)),), parts=(rows(0, 2),)),
            "'embed' has dtype bfloat16, and float32 in local tensor 'rows'",
        ),
    ],
    ids=[
        "tensor", "box", "dimensions", "local", "place", "rank", "turned", "padding", "gap",
        "twice", "dtype",
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(layout: Layout, names: str) -> None:
    """A layout made for another model or by a slip is refused with the tensor and the box."""
    with pytest.raises(ManifestMismatch, match=names):
        layout.require_fit(PUBLISHED)


def test_a_model_of_many_experts_is_checked_quickly() -> None:
    """18,432 matrices of experts, stacked, are checked in a time that nobody notices."""
    specs, parts, local = [], [], []
    for layer, expert in itertools.product(range(48), range(128)):
        for matrix, (height, width), name, row in (
            ("gate", (192, 2048), f"{layer}.w13", 0),
            ("up", (192, 2048), f"{layer}.w13", 192),
            ("down", (2048, 192), f"{layer}.w2", 0),
        ):
            tensor = f"{layer}.{expert}.{matrix}"
            specs.append(TensorSpec(tensor, "bfloat16", (height, width)))
            parts.append(
                Part(
                    tensor=tensor, begin=(0, 0), shape=(height, width),
                    local=name, at=(expert, row, 0), axes=(1, 2),
                )
            )  # fmt: skip
    for layer in range(48):
        local.append(TensorSpec(f"{layer}.w13", "bfloat16", (128, 384, 2048)))
        local.append(TensorSpec(f"{layer}.w2", "bfloat16", (128, 2048, 192)))
    manifest = Manifest(tensors=tuple(specs))
    layout = Layout(tensors=tuple(local), parts=tuple(parts))
    began = time.process_time()
    layout.require_fit(manifest)
    require_whole([layout], manifest)
    # All pairs of one layer's parts alone would be 48 × 256²: seconds upon seconds.
    assert time.process_time() - began < 3
    with pytest.raises(ManifestMismatch, match=r"box at \[127, 0, 0\] .* of local tensor '47.w2'"):
        msgspec.structs.replace(layout, parts=layout.parts[:-1]).require_fit(manifest)


# ---- all ranks


def test_what_is_published_is_its_own_layout() -> None:
    """The identity fits, is whole, and is told from all others, whatever the order."""
    layout = identity(PUBLISHED)
    layout.require_fit(PUBLISHED)
    require_whole([layout], PUBLISHED)
    assert layout.is_identity(PUBLISHED)
    turned = Layout(tensors=layout.tensors[::-1], parts=layout.parts[::-1])
    assert turned.is_identity(PUBLISHED)
    uncounted = msgspec.structs.replace(layout.parts[0], counted=False)
    renamed = msgspec.structs.replace(EMBED, name="rows")
    for other in (
        held(6, rows(0, 6)),
        Layout(tensors=layout.tensors, parts=layout.parts[:1]),
        Layout(tensors=layout.tensors, parts=(uncounted, layout.parts[1])),
        Layout(tensors=(renamed, SCALE), parts=layout.parts),
        Layout(tensors=layout.tensors, parts=layout.parts, padding=(PAD,)),
    ):
        assert not other.is_identity(PUBLISHED)


ONE = Manifest(tensors=(EMBED,))


@given(data=st.data())
def test_ranks_that_share_a_tensor_are_whole(data: st.DataObject) -> None:
    """Cut into pieces that some rank counts each, a tensor is whole; uncounted copies do no harm;
    with a piece less it is not."""
    pieces = data.draw(tilings(Box((0, 0), EMBED.shape)))
    ranks: list[list[Part]] = [[], [], []]
    for number, piece in enumerate(pieces):
        for rank, counts in enumerate(data.draw(st.permutations([True, False, None]))):
            if counts is not None:
                part = rows(
                    0, 0, begin=piece.begin, shape=piece.shape, local=f"piece{number}",
                    at=(0, 0), counted=counts,
                )  # fmt: skip
                ranks[rank].append(part)

    def layouts() -> list[Layout]:
        return [
            Layout(
                tensors=tuple(TensorSpec(p.local, "bfloat16", p.shape) for p in parts),
                parts=tuple(parts),
            )
            for parts in ranks
        ]

    for layout in layouts():
        layout.require_fit(ONE)
    require_whole(layouts(), ONE)
    counting = [rank for rank in ranks if any(part.counted for part in rank)]
    loser = data.draw(st.sampled_from(counting))
    lost = next(part for part in loser if part.counted)
    loser.remove(lost)
    with pytest.raises(ManifestMismatch, match="of tensor 'embed' is counted by no rank") as caught:
        require_whole(layouts(), ONE)
    assert str(lost.box) in str(caught.value)


def test_what_two_ranks_count_is_named() -> None:
    """Both ranks of a replicated tensor count it: its digest would come twice."""
    with pytest.raises(ManifestMismatch, match=r"element \[2, 0\] .* by rank 0 .* and by rank 1"):
        require_whole([held(4, rows(0, 4)), held(4, rows(2, 4))], ONE)


def test_a_stranger_among_the_ranks_is_refused() -> None:
    """A rank of another model counts for nothing: its tensor and its box are named."""
    for part, names in ((rows(0, 6, tensor="other"), "'other'"), (rows(3, 6), r"\[3, 0\]")):
        with pytest.raises(ManifestMismatch, match=names):
            require_whole([held(6, part)], ONE)


# ---- the wire


@given(made=fitting())
def test_layouts_round_trip(made: tuple[Manifest, Layout]) -> None:
    """A rank's layout arrives as it was sent."""
    assert codec.decode_layout(codec.encode(made[1])) == made[1]


@given(made=fitting(), data=st.data())
def test_truncated_and_flipped_layouts_never_crash(
    made: tuple[Manifest, Layout], data: st.DataObject
) -> None:
    """A layout that lost its tail is refused; one with a flipped bit is refused or decodes."""
    encoded = codec.encode(made[1])
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(RemoteProtocolError):
        codec.decode_layout(encoded[:cut])
    bit = data.draw(st.integers(0, len(encoded) * 8 - 1))
    flipped = bytearray(encoded)
    flipped[bit // 8] ^= 1 << bit % 8
    decoded = None
    with contextlib.suppress(RemoteProtocolError):
        decoded = codec.decode_layout(bytes(flipped))
    assert decoded is None or isinstance(decoded, Layout)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"begin": (0,)}, "'embed' has 1 first indices, 2 extents and 2 axes"),
        ({"begin": (0, -1)}, "'embed' has a negative"),
        ({"at": (-1, 0)}, "'embed' has a negative"),
        ({"axes": (0, 0)}, r"axes \[0, 0\], which are not distinct dimensions of 'rows'"),
        ({"axes": (0, 2)}, r"axes \[0, 2\]"),
        ({"axes": (0, -1)}, r"axes \[0, -1\]"),
    ],
    ids=["lengths", "begin", "at", "twice", "beyond", "below"],
)
def test_impossible_parts_are_refused(changes: dict[str, object], names: str) -> None:
    """A part that no tensor can have is refused where it is made, and from the wire."""
    with pytest.raises(ValueError, match=names):
        rows(0, 2, **changes)
    encoded = msgspec.to_builtins(held(2, rows(0, 2)))
    encoded["parts"] = [encoded["parts"][0] | changes]
    with pytest.raises(RemoteProtocolError, match=names):
        codec.decode_layout(msgspec.msgpack.encode(encoded))


def test_impossible_layouts_are_refused() -> None:
    """Local tensors listed twice or of no known dtype, and padding of no shape, are refused."""
    layout = held(2, rows(0, 2))
    with pytest.raises(ValueError, match="'rows' is listed twice"):
        Layout(tensors=layout.tensors * 2, parts=layout.parts)
    with pytest.raises(ValueError, match="float31"):
        Layout(tensors=(TensorSpec("rows", "float31", (2, 4)),), parts=())
    with pytest.raises(ValueError, match="1 first indices and 2 extents"):
        Padding(local="rows", at=(0,), shape=(1, 4))
    with pytest.raises(ValueError, match="negative"):
        Padding(local="rows", at=(0, 0), shape=(-1, 4))


def test_a_packed_layout_comes_back_and_garbage_is_refused() -> None:
    """What a message carries is the layout; cut, damaged or blown up beyond bounds it is none."""
    layout = identity(Manifest(tensors=(TensorSpec("w", "bfloat16", (3, 4)),)))
    packed = codec.pack_layout(layout)
    assert codec.unpack_layout(packed) == layout
    assert codec.unpack_layout(packed).hash == layout.hash
    bomb = zlib.compress(bytes(codec.LAYOUT_NBYTES + 1))
    for garbage in (b"", packed[:-1], packed[:5] + b"\xff" + packed[6:], bomb):
        with pytest.raises(RemoteProtocolError):
            codec.unpack_layout(garbage)

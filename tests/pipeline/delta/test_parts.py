"""What a rank holds of published tensors is patched and proven where it lies."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dealt import fill, held, layouts, published
from sparsecast.messages.compose import through
from sparsecast.messages.errors import (
    CorruptPatch,
    ManifestMismatch,
    PatchError,
    UnsupportedTensor,
    WrongBase,
)
from sparsecast.messages.layout import Layout, Part
from sparsecast.messages.manifest import TensorSpec
from sparsecast.pipeline.delta import apply, apply_checked, check, decode, diff, digest, manifest_of
from states import DTYPES, State, changed, clone, random_tensor, same, seeds

M = (1 << 64) - 1
densities = st.sampled_from([0.0, 0.0005, 0.01, 0.1, 0.5, 1.0])
strides = st.sampled_from(["plain", "plain", "transposed", "columns", "askew"])


@settings(max_examples=150, deadline=None)
@given(st.data(), published(), densities, seeds, strides, st.booleans())
def test_a_rank_takes_what_its_parts_hold(
    data: Any, old: State, density: float, seed: int, laid: str, in_spans: bool
) -> None:
    """Tensors cut anywhere, dealt to ranks, fused, stacked, transposed, padded, some held twice: a
    patch of the whole ones leaves in every rank what cutting the patched ones would, and padding
    as it was; the shares of the digest add up to that of the whole."""
    ranks = data.draw(layouts(old))
    new = changed(old, density, seed)
    manifest = manifest_of(old)
    generator = torch.Generator().manual_seed(seed)
    patch = diff(old, new, base_version=0, version=1)
    told = {section.index for section in patch.sections_of(manifest)}
    touched = {manifest.tensors[at].name for at in told}
    share = 0
    with pytest.MonkeyPatch.context() as patched:
        if in_spans:
            patched.setattr(decode, "SPAN_VALUES", 300)
            patched.setattr(decode, "SPAN_BLOCKS", 1)
        for layout in ranks:
            local = held(layout, generator, laid)
            fill(layout, local, old)
            expected = clone(local)
            fill(layout, expected, new)
            names = apply(patch, local, version=0, layout=layout, manifest=manifest)
            assert same(local, expected)
            holding = {p.local for p in layout.parts if p.tensor in touched and math.prod(p.shape)}
            assert names == [spec.name for spec in layout.tensors if spec.name in holding]
            share += digest(local, manifest=manifest, layout=layout)
    assert share & M == digest(new)


@settings(max_examples=100, deadline=None)
@given(st.data(), published(), densities, seeds, strides)
def test_a_rank_takes_from_each_root_what_it_holds_of_it(
    data: Any, old: State, density: float, seed: int, laid: str
) -> None:
    """Ranks of a trainer hold the tensors in any way, those of a worker in any other: the patches
    of what each of the former holds, each through both layouts, leave in every one of the latter
    what cutting the new tensors would, and padding as it was."""
    roots, ranks = data.draw(layouts(old)), data.draw(layouts(old))
    new = changed(old, density, seed)
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for root in roots:
        before = held(root, generator)
        fill(root, before, old)
        after = clone(before)
        fill(root, after, new)
        pieces.append(diff(before, after, base_version=0, version=1))
    for layout in ranks:
        local = held(layout, generator, laid)
        fill(layout, local, old)
        expected = clone(local)
        fill(layout, expected, new)
        for root, piece in zip(roots, pieces, strict=True):
            apply(piece, local, version=0, layout=through(root, layout), manifest=root.local)
        assert same(local, expected)


# ---- shapes that engines have


def columns(spec: TensorSpec, start: int, stop: int) -> Layout:
    """A rank that holds columns of a matrix, and nothing else."""
    shape = (spec.shape[0], stop - start)
    part = Part(tensor=spec.name, begin=(0, start), shape=shape, local="l", at=(0, 0), axes=(0, 1))
    return Layout(tensors=(TensorSpec("l", spec.dtype, shape),), parts=(part,))


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "edges"),
    [
        ((5, 200_003), [0, 1, 3, 200_002, 200_003]),
        ((2_700, 1_000), [0, 1, 257, 900, 1_000]),
    ],
)
def test_columns_near_and_far_apart(dtype: str, shape: tuple[int, int], edges: list[int]) -> None:
    """Columns of rows that are several blocks long, where hardly a block has an element, and more
    columns than are digested at a time: the shares add up, and the patch arrives."""
    old = {"w": random_tensor(DTYPES[dtype], shape, torch.Generator().manual_seed(1))}
    new = changed(old, 0.02, 2)
    manifest = manifest_of(old)
    patch = diff(old, new, base_version=0, version=1)
    share = 0
    for start, stop in pairwise(edges):
        layout = columns(manifest.tensors[0], start, stop)
        local = {"l": old["w"][:, start:stop].clone()}
        apply(patch, local, layout=layout, manifest=manifest)
        assert same(local, {"l": new["w"][:, start:stop]})
        share += digest(local, manifest=manifest, layout=layout)
    assert share & M == digest(new)


class Counting(TorchDispatchMode):
    """How many operations torch is asked for within, and how many elements come of them."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[str(func)] += 1
        result = func(*args, **(kwargs or {}))
        self.numel += result.numel() if isinstance(result, Tensor) else 0
        return result


def experts(count: int, rows: int, *, together: bool) -> tuple[State, Layout]:
    """Experts, published together or one by one, of whose rows a rank stacks the second half."""
    half = rows // 2
    shape = (count, rows, 16)
    weights = random_tensor(torch.bfloat16, shape, torch.Generator().manual_seed(rows))
    parts = []
    for at in range(count):
        name, begin, size = ("w", (at, half, 0), (1, half, 16))
        axes: tuple[int, ...] = (0, 1, 2)
        if not together:
            name, begin, size, axes = f"w{at}", begin[1:], size[1:], (1, 2)
        parts.append(
            Part(tensor=name, begin=begin, shape=size, local="l", at=(at, 0, 0), axes=axes)
        )
    layout = Layout(tensors=(TensorSpec("l", "bfloat16", (count, half, 16)),), parts=tuple(parts))
    state = {"w": weights} if together else {f"w{at}": weights[at] for at in range(count)}
    return state, layout


@pytest.mark.parametrize("together", [True, False])
def test_thousands_of_experts(together: bool) -> None:
    """3,000 experts stacked, each of them a part: the patch arrives, and each is in the share."""
    old, layout = experts(3_000, 8, together=together)
    new = changed(old, 0.1, 2)
    manifest = manifest_of(old)
    local = {"l": torch.zeros(layout.tensors[0].shape, dtype=torch.bfloat16)}
    expected = clone(local)
    fill(layout, local, old)
    fill(layout, expected, new)
    apply(diff(old, new, base_version=0, version=1), local, layout=layout, manifest=manifest)
    assert same(local, expected)
    share = digest(local, manifest=manifest, layout=layout)
    assert share == M & sum(
        digest(local, manifest=manifest, layout=counting(layout, half))
        for half in (range(1_500), range(1_500, 3_000))
    )


def counting(layout: Layout, some: range) -> Layout:
    """The layout of a rank that counts some of its parts."""
    replace = msgspec.structs.replace
    parts = (replace(part, counted=at in some) for at, part in enumerate(layout.parts))
    return replace(layout, parts=tuple(parts))


@pytest.mark.parametrize("together", [True, False])
def test_no_step_for_each_row(together: bool) -> None:
    """Parts of many rows take as many operations as parts of few: nothing goes through rows or
    elements one by one."""
    ops = []
    for rows in (8, 256):
        old, layout = experts(100, rows, together=together)
        manifest = manifest_of(old)
        patch = diff(old, changed(old, 0.1, 2), base_version=0, version=1)
        checked = check(patch, manifest)
        local = held(layout, torch.Generator().manual_seed(1))
        with Counting() as counting:
            apply_checked(checked, local, layout=layout)
            digest(local, manifest=manifest, layout=layout)
        ops.append(counting.ops.total())
    assert ops[0] < 100 * 100
    assert ops[1] < ops[0] + 100


def test_a_quarter_of_the_rows_costs_a_quarter() -> None:
    """Of a patch of 32 blocks the rank that holds rows of 8 looks at theirs alone."""
    old = {"w": random_tensor(torch.bfloat16, (1024, 2048), torch.Generator().manual_seed(1))}
    checked = check(diff(old, changed(old, 0.02, 2), base_version=0, version=1), manifest_of(old))
    whole, quarter = Counting(), Counting()
    with whole:
        apply_checked(checked, clone(old))
    part = Part(tensor="w", begin=(256, 0), shape=(256, 2048), local="l", at=(0, 0), axes=(0, 1))
    layout = Layout(tensors=(TensorSpec("l", "bfloat16", (256, 2048)),), parts=(part,))
    local = {"l": old["w"][256:512].clone()}
    with quarter:
        apply_checked(checked, local, layout=layout)
    assert whole.numel / 8 < quarter.numel < whole.numel / 3


# ---- refusals


OLD = {"a": torch.zeros(6, 4), "z": torch.zeros(5)}
LAYOUT = Layout(
    tensors=(TensorSpec("la", "float32", (4, 3)), TensorSpec("lz", "float32", (5,))),
    parts=(
        Part(tensor="a", begin=(3, 0), shape=(3, 4), local="la", at=(0, 0), axes=(1, 0)),
        Part(tensor="z", begin=(0,), shape=(5,), local="lz", at=(0,), axes=(0,)),
    ),
)


def refused(
    fields: dict[str, Any],
    spoil: Callable[[State], State],
    error: type[Exception] | tuple[type[Exception], ...],
    match: str,
) -> None:
    """Something is wrong with the last part of the layout, or with the tensors: apply raises, and
    changes nothing."""
    new = {name: torch.ones_like(tensor) for name, tensor in OLD.items()}
    checked = check(diff(OLD, new, base_version=0, version=1), manifest_of(OLD))
    local = {"la": torch.zeros(4, 3), "lz": torch.zeros(5)}
    begun: list[bool] = []
    with pytest.raises(error, match=match):
        apply_checked(
            checked, spoil(local), layout=with_part(fields), begin=lambda: begun.append(True)
        )
    assert not begun
    assert not any(tensor.any() for tensor in local.values())


def with_part(fields: dict[str, Any]) -> Layout:
    """The layout, something about its last part being otherwise."""
    first, last = LAYOUT.parts
    part = Part(**{name: getattr(last, name) for name in Part.__struct_fields__} | fields)
    return Layout(tensors=LAYOUT.tensors, parts=(first, part))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        pytest.param({"tensor": "q"}, "'q'", id="tensor"),
        pytest.param({"local": "q"}, "'z' lies in no local tensor", id="local"),
        pytest.param({"begin": (0, 0)}, "'z'", id="rank"),
        pytest.param({"local": "la"}, "'z'", id="local rank"),
        pytest.param({"axes": (1,)}, "'z'", id="axis"),
        pytest.param({"axes": (-1,)}, "'z'", id="no axis"),
        pytest.param(
            {"tensor": "a", "begin": (0, 0), "shape": (2, 2), "local": "la", "at": (0, 0),
             "axes": (1, 1)}, "'a'", id="axes",
        ),
        pytest.param({"begin": (1,)}, "'z'", id="beyond"),
        pytest.param({"begin": (-1,)}, "'z'", id="before"),
        pytest.param({"shape": (-1,)}, "'z'", id="negative"),
        pytest.param({"shape": (4,)}, r"box at \[4\] of shape \[1\] .*'lz' is in no", id="gap"),
        pytest.param({"at": (1,)}, "'z'", id="local beyond"),
        pytest.param({"at": (-1,)}, "'z'", id="local before"),
    ],
)  # fmt: skip
def test_a_layout_that_does_not_fit_is_refused(fields: dict[str, Any], match: str) -> None:
    """A part of a tensor that is not published, out of bounds, along dimensions that are not there:
    or that leaves out an element that the rank has: it is named where it is made or where it is
    used, and nothing is written or announced."""
    refused(fields, lambda local: local, (ManifestMismatch, ValueError), match)


def test_no_share_is_given_by_a_layout_that_does_not_fit() -> None:
    """The digest asks the same of a layout, and of the local tensors, as apply does."""
    local = {"la": torch.zeros(4, 3), "lz": torch.zeros(5)}
    manifest = manifest_of(OLD)
    with pytest.raises(ManifestMismatch, match="'z'"):
        digest(local, manifest=manifest, layout=with_part({"begin": (1,)}))
    with pytest.raises(ManifestMismatch, match="'lz' has shape"):
        digest({**local, "lz": torch.zeros(4)}, manifest=manifest, layout=LAYOUT)
    halves = manifest_of({**OLD, "z": OLD["z"].half()})
    with pytest.raises(ManifestMismatch, match="float16"):
        digest(local, manifest=halves, layout=LAYOUT)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        pytest.param(None, ManifestMismatch, "'lz' is missing", id="missing"),
        pytest.param(torch.zeros(6), ManifestMismatch, "'lz' has shape", id="shape"),
        pytest.param(torch.zeros(5).half(), ManifestMismatch, "'lz' has dtype", id="dtype"),
        pytest.param(
            torch.zeros(1).expand(5), UnsupportedTensor, "'lz': is expanded", id="expanded"
        ),
    ],
)
def test_local_tensors_are_checked_before_the_first_write(
    bad: Tensor | None, error: type[PatchError], match: str
) -> None:
    """The engine replaced its last tensor by one that is not the layout's or cannot be patched: the
    first one, which could, is not touched."""

    def spoil(local: State) -> State:
        rest = {"la": local["la"]}
        return rest if bad is None else {**rest, "lz": bad}

    refused({}, spoil, error, match)


def test_what_is_refused_of_a_whole_model_is_refused_of_its_parts() -> None:
    """A spoilt patch, another base version, a patch of another model: nothing changes; and the
    manifest must be given, for a layout does not tell it."""
    new = {name: torch.ones_like(tensor) for name, tensor in OLD.items()}
    patch = diff(OLD, new, base_version=0, version=1)
    manifest = manifest_of(OLD)
    local = {"la": torch.zeros(4, 3), "lz": torch.zeros(5)}
    with pytest.raises(WrongBase):
        apply(patch, local, version=3, layout=LAYOUT, manifest=manifest)
    with pytest.raises(ManifestMismatch):
        apply(patch, local, layout=LAYOUT, manifest=manifest_of(local))
    with pytest.raises(CorruptPatch):
        apply(
            type(patch).from_bytes(patch.to_bytes()[:-16]), local, layout=LAYOUT, manifest=manifest
        )
    with pytest.raises(TypeError, match="takes the manifest"):
        apply(patch, local, layout=LAYOUT)
    with pytest.raises(TypeError, match="takes the manifest"):
        digest(local, layout=LAYOUT)
    assert not any(tensor.any() for tensor in local.values())
    assert apply(patch, local, version=0, layout=LAYOUT, manifest=manifest) == ["la", "lz"]
    assert all(tensor.all() for tensor in local.values())


def test_the_write_is_announced_before_it_happens() -> None:
    """`begin` sees the old weights; if it raises, they stay."""
    new = {name: torch.ones_like(tensor) for name, tensor in OLD.items()}
    checked = check(diff(OLD, new, base_version=0, version=1), manifest_of(OLD))
    local = {"la": torch.zeros(4, 3), "lz": torch.zeros(5)}

    def refuses() -> None:
        assert not any(tensor.any() for tensor in local.values())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        apply_checked(checked, local, layout=LAYOUT, begin=refuses)
    assert not any(tensor.any() for tensor in local.values())


def test_nothing_changed_and_nothing_held() -> None:
    """An empty patch, a rank that holds nothing of what changed, and one that holds nothing."""
    new = {**OLD, "z": torch.ones(5)}
    manifest = manifest_of(OLD)
    only = Layout(tensors=LAYOUT.tensors[:1], parts=LAYOUT.parts[:1])
    local = {"la": torch.zeros(4, 3)}
    empty = diff(OLD, OLD, base_version=0, version=1)
    assert apply(empty, local, layout=only, manifest=manifest) == []
    patch = diff(OLD, new, base_version=0, version=1)
    assert apply(patch, local, layout=only, manifest=manifest) == []
    assert not local["la"].any()
    nothing = Layout(tensors=(), parts=())
    assert apply(patch, {}, layout=nothing, manifest=manifest) == []
    assert digest({}, manifest=manifest, layout=nothing) == 0

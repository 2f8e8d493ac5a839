"""What a rank holds of published tensors is patched and digested by kernels as by torch."""

from functools import partial as bound
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dealt import fill, held, layouts
from sparsecast.messages.compose import through
from sparsecast.messages.errors import UnsupportedTensor
from sparsecast.messages.layout import Layout, Padding, Part
from sparsecast.messages.manifest import TensorSpec
from sparsecast.pipeline.delta import apply_checked, check, diff, digest, manifest_of
from sparsecast.pipeline.delta.parts import parts_of
from states import DTYPES, State, laid_out, random_tensor, seeds
from twins import DEVICE, by_kernels, by_torch, copied, placed, require_same, step

MASK = (1 << 64) - 1
WRITERS = {"scatter_parts", "bitmap_parts", "dense_parts"}
SHAPES = [(), (0, 3), (40,), (7, 9), (30, 17), (4, 5, 6), (65_536 + 100,), (2, 3, 4, 5, 6)]


@st.composite
def small(draw: Any) -> State:
    """One or two tensors of any dtype: in the interpreter a block takes its time."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return {
        f"t{at}": random_tensor(
            DTYPES[draw(st.sampled_from(sorted(DTYPES)))], draw(st.sampled_from(SHAPES)), generator
        )
        for at in range(draw(st.integers(1, 2)))
    }


@settings(max_examples=10, deadline=None)
@given(st.data(), small(), st.sampled_from([0.01, 0.2, 1.0]), seeds)
def test_a_rank_takes_what_its_parts_hold(data: Any, old: State, density: float, seed: int) -> None:
    """Any cut, any dtype, every encoding: the bits that the reference leaves, and its shares."""
    ranks = data.draw(layouts(old))
    old = copied(old)
    new = copied(old)
    step(new, density, seed)
    manifest = manifest_of(old)
    generator = torch.Generator().manual_seed(seed)
    with by_torch():
        patch = diff(old, new, base_version=0, version=1)
    share = 0
    for layout in ranks:
        local = copied(held(layout, generator))
        fill(layout, local, old)
        expected = copied(local)
        fill(layout, expected, new)
        with by_kernels():
            names = apply_checked(check(patch, manifest), local, layout=layout)
            found = digest(local, manifest=manifest, layout=layout)
        require_same(local, expected)
        with by_torch():
            assert apply_checked(check(patch, manifest), local, layout=layout) == names
            assert digest(local, manifest=manifest, layout=layout) == found
        share += found
    assert share & MASK == digest(new)


@settings(max_examples=10, deadline=None)
@given(st.data(), small(), st.sampled_from([0.01, 0.2, 1.0]), seeds)
def test_a_rank_takes_from_each_root_what_it_holds_of_it(
    data: Any, old: State, density: float, seed: int
) -> None:
    """The patches of what each rank of a trainer holds, each through its layout and a worker's:
    together they leave what cutting the new tensors would, in two ranks of a worker."""
    roots, ranks = data.draw(layouts(old)), data.draw(layouts(old))[:2]
    new = copied(old)
    step(new, density, seed)
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for root in roots:
        before = held(root, generator)
        fill(root, before, old)
        after = {name: tensor.clone() for name, tensor in before.items()}
        fill(root, after, {name: tensor.cpu() for name, tensor in new.items()})
        with by_torch():
            pieces.append(diff(copied(before), copied(after), base_version=0, version=1))
    for layout in ranks:
        local = copied(held(layout, generator))
        fill(layout, local, copied(old))
        expected = copied(local)
        fill(layout, expected, new)
        with by_kernels():
            for root, piece in zip(roots, pieces, strict=True):
                checked = check(piece, root.local)
                apply_checked(checked, local, layout=through(root, layout))
        require_same(local, expected)


def model(dtype: str) -> tuple[State, Layout]:
    """A sparse, a bitmap and a dense tensor and one that stays, of which a rank has rows, columns,
    a transposed half of another and a fused one, all within larger local tensors: padding."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"s": (70, 1_000), "b": (40, 50), "d": (3, 7, 11), "still": (9,)}
    state = {name: random_tensor(DTYPES[dtype], shape, generator) for name, shape in shapes.items()}
    parts = (
        Part(tensor="s", begin=(0, 250), shape=(70, 250), local="x", at=(0, 0), axes=(0, 1)),
        Part(tensor="s", begin=(60, 0), shape=(10, 1_000), local="y", at=(2, 0), axes=(0, 1)),
        Part(tensor="b", begin=(20, 0), shape=(20, 50), local="x", at=(72, 0), axes=(1, 0)),
        Part(tensor="d", begin=(0, 2, 0), shape=(3, 4, 11), local="z", at=(1, 0, 0, 0),
             axes=(3, 1, 2), counted=False),
        Part(tensor="still", begin=(4,), shape=(3,), local="n", at=(2,), axes=(0,)),
    )  # fmt: skip
    tensors = (
        TensorSpec("x", dtype, (122, 250)), TensorSpec("y", dtype, (12, 1_000)),
        TensorSpec("z", dtype, (2, 4, 11, 3)), TensorSpec("n", dtype, (7,)),
    )  # fmt: skip
    padding = (
        Padding(local="x", at=(70, 0), shape=(2, 250)),
        Padding(local="x", at=(72, 20), shape=(50, 230)),
        Padding(local="y", at=(0, 0), shape=(2, 1_000)),
        Padding(local="z", at=(0, 0, 0, 0), shape=(1, 4, 11, 3)),
        Padding(local="n", at=(0,), shape=(2,)), Padding(local="n", at=(5,), shape=(2,)),
    )  # fmt: skip
    return copied(state), Layout(tensors=tensors, parts=parts, padding=padding)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float32", "float64"])
def test_shapes_that_engines_have(dtype: str) -> None:
    """All encodings through rows, columns, transposed and stacked parts, one of them a replica that
    is not counted; all by kernels, and bits beside the boxes stay."""
    old, layout = model(dtype)
    new = copied(old)
    step(new, {"s": 0.01, "b": 0.25, "d": 1.0}, 3)
    manifest = manifest_of(old)
    with by_torch():
        patch = diff(old, new, base_version=0, version=1)
    assert [section.encoding.name for section in patch.sections] == ["SPARSE", "BITMAP", "DENSE"]
    local = copied(held(layout, torch.Generator().manual_seed(2)))
    fill(layout, local, old)
    expected = copied(local)
    fill(layout, expected, new)
    with by_torch():
        share = digest(expected, manifest=manifest, layout=layout)
    with by_kernels() as launched:
        checked = check(patch, manifest)
        assert checked.readied is not None
        assert not checked.readied.beyond_parts(local, parts_of(layout, manifest))
        assert apply_checked(checked, local, layout=layout) == ["x", "y", "z"]
        assert set(launched) >= WRITERS
        require_same(local, expected)
        launched.clear()
        assert digest(local, manifest=manifest, layout=layout) == share
        assert set(launched) == {"digest_parts"}


def test_what_a_root_stacks_goes_to_what_a_worker_turns() -> None:
    """The patch of a root's stack, through its layout and a worker's: columns of each matrix lie
    transposed in one tensor, and what the stack fixes runs along none of its dimensions."""
    places = range(6)
    root = Layout(
        tensors=(TensorSpec("stack", "bfloat16", (2, 3, 40, 50)),),
        parts=tuple(
            Part(tensor=f"t{at}", begin=(0, 0), shape=(40, 50), local="stack",
                 at=(at // 3, at % 3, 0, 0), axes=(2, 3))
            for at in places
        ),
    )  # fmt: skip
    worker = Layout(
        tensors=(TensorSpec("flat", "bfloat16", (60, 40)),),
        parts=tuple(
            Part(tensor=f"t{at}", begin=(0, 30), shape=(40, 10), local="flat",
                 at=(10 * at, 0), axes=(1, 0))
            for at in places
        ),
    )  # fmt: skip
    layout, manifest = through(root, worker), root.local
    old = copied({"stack": random_tensor(torch.bfloat16, (2, 3, 40, 50), torch.Generator())})
    for density in (0.01, 0.25, 1.0):
        new = copied(old)
        step(new, density, 3)
        with by_torch():
            patch = diff(old, new, base_version=0, version=1)
        local = copied({"flat": old["stack"].view(6, 40, 50)[:, :, 30:40].mT.reshape(60, 40)})
        expected = {"flat": new["stack"].view(6, 40, 50)[:, :, 30:40].mT.reshape(60, 40)}
        with by_kernels() as launched:
            checked = check(patch, manifest)
            assert checked.readied is not None
            assert not checked.readied.beyond_parts(local, parts_of(layout, manifest))
            assert apply_checked(checked, local, layout=layout) == ["flat"]
            assert set(launched) & WRITERS
        require_same(local, expected)


def test_what_kernels_cannot_write_goes_by_torch() -> None:
    """Local tensors that are strided or askew, beside one that is not: the kernels leave out just
    their boxes, and the update and the share are whole."""
    old, layout = model("bfloat16")
    new = copied(old)
    step(new, {"s": 0.01, "b": 0.25, "d": 1.0}, 3)
    manifest = manifest_of(old)
    with by_torch():
        patch = diff(old, new, base_version=0, version=1)
    plain = held(layout, torch.Generator().manual_seed(2))
    strides = {"x": "plain", "y": "columns", "z": "askew", "n": "plain"}
    local = {name: placed(laid_out(plain[name], strides[name])) for name in plain}
    fill(layout, local, old)
    expected = copied(local)
    fill(layout, expected, new)
    with by_torch():
        share = digest(expected, manifest=manifest, layout=layout)
    with by_kernels() as launched:
        checked = check(patch, manifest)
        assert checked.readied is not None
        assert checked.readied.beyond_parts(local, parts_of(layout, manifest)) == {1, 3}
        apply_checked(checked, local, layout=layout)
        require_same(local, expected)
        assert digest(local, manifest=manifest, layout=layout) == share
    assert set(launched) >= WRITERS


def test_too_many_dimensions_go_by_torch() -> None:
    """A box of five dimensions that cannot be joined is left to torch."""
    old = {"w": placed(random_tensor(torch.float32, (3, 4, 3, 4, 3), torch.Generator()))}
    part = Part(
        tensor="w", begin=(1,) * 5, shape=(2,) * 5, local="l", at=(0,) * 5, axes=(0, 1, 2, 3, 4)
    )
    layout = Layout(tensors=(TensorSpec("l", "float32", (2,) * 5),), parts=(part,))
    new = copied(old)
    step(new, 0.5, 1)
    manifest = manifest_of(old)
    local = {"l": torch.zeros((2,) * 5, device=DEVICE)}
    fill(layout, local, old)
    expected = copied(local)
    fill(layout, expected, new)
    with by_torch():
        patch = diff(old, new, base_version=0, version=1)
        share = digest(expected, manifest=manifest, layout=layout)
    with by_kernels():
        apply_checked(check(patch, manifest), local, layout=layout)
        require_same(local, expected)
        assert digest(local, manifest=manifest, layout=layout) == share


def test_a_target_that_cannot_be_written_is_refused_before_the_others_are() -> None:
    """One local tensor is expanded: no kernel that writes is launched, and nothing is announced."""
    old, layout = model("bfloat16")
    new = copied(old)
    step(new, 1.0, 3)
    manifest = manifest_of(old)
    with by_torch():
        patch = diff(old, new, base_version=0, version=1)
    local = copied(held(layout, torch.Generator().manual_seed(2)))
    before = copied(local)
    local["z"] = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE).expand(2, 4, 11, 3)
    begun: list[bool] = []
    with by_kernels() as launched:
        checked = check(patch, manifest)
        with pytest.raises(UnsupportedTensor, match="'z': is expanded"):
            apply_checked(checked, local, layout=layout, begin=lambda: begun.append(True))
    assert not WRITERS & set(launched)
    assert not begun
    require_same({"x": local["x"]}, {"x": before["x"]})


def test_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large share is read slice by slice, and `pause` is called between them."""
    from sparsecast.pipeline.delta import slices

    old, layout = model("bfloat16")
    manifest = manifest_of(old)
    local = copied(held(layout, torch.Generator().manual_seed(2)))
    with by_torch():
        expected = digest(local, manifest=manifest, layout=layout)
    monkeypatch.setattr(slices, "_SLICE_NBYTES", 2 * 65_536)
    pauses: list[int] = []
    with by_kernels() as launched:
        found = digest(local, manifest=manifest, layout=layout, pause=bound(pauses.append, 1))
    assert found == expected
    # Columns of two blocks, rows at the end of the first and in the second, one block, one block.
    assert len(launched) == 6
    assert len(pauses) == 5

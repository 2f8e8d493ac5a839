"""Patches are written by kernels where they can, by torch where they cannot, and nowhere else."""

import pytest
import torch
from torch import Tensor

from sparsecast.messages.errors import UnsupportedTensor
from sparsecast.pipeline.delta import Patch, apply_checked, check, diff, manifest_of
from states import DTYPES, State, bits, laid_out
from twins import DEVICE, by_kernels, by_torch, copied, model, placed, require_same, step

WRITERS = {"scatter", "bitmap", "dense"}


def update(old: State, density: float | dict[str, float]) -> tuple[Patch, State]:
    """A patch by torch from `old` to a changed copy, and that copy."""
    new = copied(old)
    step(new, density, 3)
    with by_torch():
        return diff(old, new, base_version=0, version=1), new


def among_others(tensor: Tensor, guard: int = 64) -> tuple[Tensor, Tensor]:
    """The same elements with `guard` bytes of another tensor before and behind; all of it as
    bytes."""
    nbytes = tensor.numel() * tensor.element_size()
    memory = torch.full((guard + nbytes + guard,), 0xA5, dtype=torch.uint8, device=DEVICE)
    inside = memory[guard : guard + nbytes].view(tensor.dtype).view(tensor.shape)
    bits(inside).copy_(bits(tensor))
    return inside, memory


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float32", "float64"])
def test_only_what_changed_is_touched(dtype: str) -> None:
    """Sparse, bitmap and dense sections, and a tensor without any: bits that did not change, and
    the memory around each tensor, stay as they were."""
    old = model(DTYPES[dtype], sparse=(3_001,), bitmap=(29, 61), dense=(257,), still=(100,))
    patch, new = update(old, {"sparse": 0.01, "bitmap": 0.25, "dense": 1.0})
    held, memories = {}, []
    for name, tensor in old.items():
        held[name], memory = among_others(tensor)
        memories.append(memory)
    with by_kernels() as launched:
        checked = check(patch, patch.manifest)
        names = apply_checked(checked, held)
        assert set(launched) >= WRITERS
        assert names == ["sparse", "bitmap", "dense"]
        require_same(held, new)
        assert apply_checked(checked, held) == names
    require_same(held, new)
    for memory in memories:
        assert (memory[:64] == 0xA5).all()
        assert (memory[-64:] == 0xA5).all()


def test_across_blocks() -> None:
    """Positions and bits of the second block of a tensor go there, blocks without changes too."""
    old = model(torch.uint8, sparse=(131_080,), bitmap=(65_536 + 70,))
    new = copied(old)
    new["sparse"][[5, 131_072, 131_079]] ^= 1
    bits(new["bitmap"])[::6] ^= 1
    new["bitmap"][-1] ^= 2
    with by_torch():
        patch = diff(old, new, base_version=0, version=1)
    assert [section.encoding.name for section in patch.sections] == ["SPARSE", "BITMAP"]
    with by_kernels():
        apply_checked(check(patch, patch.manifest), old)
    require_same(old, new)


@pytest.mark.parametrize("density", [0.01, 0.25, 1.0])
def test_what_kernels_cannot_write_goes_by_torch(density: float) -> None:
    """A transposed tensor, columns of a wide one and one at an odd place, beside a plain one: all
    of them hold the update, and only the plain one was left to the kernels."""
    old = model(torch.bfloat16, plain=(700,), t=(30, 23), c=(30, 24), askew=(300,))
    patch, new = update(old, density)
    layouts = {"plain": "plain", "t": "transposed", "c": "columns", "askew": "askew"}
    held = {name: placed(laid_out(old[name].cpu(), layout)) for name, layout in layouts.items()}
    with by_kernels():
        checked = check(patch, patch.manifest)
        assert checked.readied is not None
        assert list(checked.readied.beyond(held, patch.manifest)) == [1, 2, 3]
        apply_checked(checked, held)
    require_same(held, new)


def test_the_full_form_goes_by_torch() -> None:
    """Values without alignment: none of them is left to the kernels."""
    old = model(torch.uint8, **{f"t{at}": (17 + at % 3,) for at in range(24)})
    patch, new = update(old, 1.0)
    assert patch.full
    with by_kernels() as launched:
        checked = check(patch, patch.manifest)
        launched.clear()
        apply_checked(checked, old)
    assert not WRITERS & set(launched)
    require_same(old, new)


def test_a_target_that_cannot_be_written_is_refused_before_the_others_are() -> None:
    """The engine replaced one tensor by an expanded one: nothing is written, nothing announced."""
    old = model(torch.float32, a=(300,), z=(5,))
    patch, _ = update(old, 1.0)
    held = {**copied(old), "z": torch.zeros(1, device=DEVICE).expand(5)}
    begun: list[bool] = []
    with by_kernels() as launched:
        checked = check(patch, patch.manifest)
        with pytest.raises(UnsupportedTensor, match="'z': is expanded"):
            apply_checked(checked, held, begin=lambda: begun.append(True))
    assert not WRITERS & set(launched)
    assert not begun
    require_same({"a": held["a"]}, {"a": old["a"]})


def test_the_write_is_announced_before_it_happens() -> None:
    """`begin` sees the old weights, and no kernel that writes has been launched; if it raises,
    they stay."""
    old = model(torch.bfloat16, a=(300,), b=(90,), c=(40,))
    patch, new = update(old, {"a": 0.02, "b": 0.25, "c": 1.0})
    held = copied(old)

    def refuses() -> None:
        require_same(held, old)
        assert not WRITERS & set(launched)
        raise RuntimeError

    with by_kernels() as launched:
        checked = check(patch, manifest_of(held))
        with pytest.raises(RuntimeError):
            apply_checked(checked, held, begin=refuses)
        require_same(held, old)
        apply_checked(checked, held)
    require_same(held, new)


def test_a_patch_on_another_device_than_the_weights() -> None:
    """Weights that lie where the patch does not (here: nowhere near) are found out by address."""
    old = model(torch.bfloat16, a=(300,))
    patch, _ = update(old, 0.02)
    with by_kernels():
        checked = check(patch, patch.manifest)
        assert checked.readied is not None
        there = {"a": torch.zeros(300, dtype=torch.bfloat16, device="meta")}
        assert list(checked.readied.beyond(there, patch.manifest)) == [0]

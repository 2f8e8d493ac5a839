"""What check() refuses, the kernels refuse too, and never read beyond the patch to find out."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from reach import reached
from sparsecast.messages.errors import CorruptPatch
from sparsecast.pipeline.delta import Encoding, Patch, check, diff
from states import State, bits
from twins import DEVICE, by_kernels, by_torch, copied, model


def patch_of(dtype: str = "uint8") -> Patch:
    """Sparse over two blocks, bitmap over two blocks with an odd end, dense: changed by torch."""
    old = model(getattr(torch, dtype), s=(70_001,), b=(65_536 + 61,), d=(99,), k=(5_000,))
    new: State = copied(old)
    bits(new["s"])[[3, 9, 700, 65_535, 65_536, 65_540, 70_000]] ^= 1
    bits(new["b"])[::6] ^= 1
    bits(new["d"])[:] ^= 1
    bits(new["k"])[[0, 4_999]] ^= 1
    with by_torch():
        patch = diff(old, new, base_version=0, version=1)
    encodings = [section.encoding for section in patch.sections]
    assert encodings == [Encoding.SPARSE, Encoding.BITMAP, Encoding.DENSE, Encoding.SPARSE]
    return patch


def set_counts(*counts: int) -> Callable[[Patch, int], None]:
    """A fault: a section's counts are these."""

    def spoil(patch: Patch, at: int) -> None:
        found = patch.counts(patch.sections[at])
        found.copy_(torch.from_numpy(np.array(counts, np.uint32).view(np.int32)))

    return spoil


def set_positions(**positions: int) -> Callable[[Patch, int], None]:
    """A fault: some positions of a section are these."""

    def spoil(patch: Patch, at: int) -> None:
        found = patch.positions(patch.sections[at])
        for place, position in positions.items():
            found[int(place[1:])] = position - 65_536 if position > 32_767 else position

    return spoil


def flip_bits(*places: int) -> Callable[[Patch, int], None]:
    """A fault: these bits of a bitmap, or of the padding behind it, are flipped."""

    def spoil(patch: Patch, at: int) -> None:
        section = patch.sections[at]
        packed = patch.buffer[section.places_offset : section.values_offset]
        for place in places:
            packed[place >> 3] ^= 1 << (place & 7)

    return spoil


FAULTS = [
    pytest.param(0, set_counts(5, 3), "have 8 elements", id="too many"),
    pytest.param(0, set_counts(4, 2), "have 6 elements", id="too few"),
    pytest.param(0, set_counts(0, 0), "have 0 elements", id="none"),
    pytest.param(0, set_counts(3, 4), "not strictly ascending", id="of another block"),
    pytest.param(0, set_counts(5, 2), "not strictly ascending", id="of the next block"),
    pytest.param(0, set_counts(2**32 - 1, 8), "have 4294967303", id="wraps at 2^32"),
    pytest.param(0, set_counts(2**31, 2**31 + 7), "have 4294967303", id="halves"),
    pytest.param(0, set_counts(7, 2**32 - 1), "have 4294967302", id="minus one"),
    pytest.param(1, set_counts(65_537, 2**32 - 1), "elements", id="bitmap near 2^32"),
    pytest.param(1, set_counts(10_922, 11), "not as many", id="bits of another block"),
    pytest.param(3, set_counts(2**32 - 2), "have 4294967294", id="last section"),
    pytest.param(0, set_positions(p1=3), "not strictly ascending", id="twice"),
    pytest.param(0, set_positions(p0=10), "not strictly ascending", id="out of order"),
    pytest.param(0, set_positions(p3=5), "not strictly ascending", id="as signed"),
    pytest.param(0, set_positions(p6=4_465), "beyond its 70001", id="beyond the end"),
    pytest.param(0, set_positions(p6=65_535), "beyond its 70001", id="far beyond"),
    pytest.param(3, set_positions(p1=5_000), "beyond its 5000", id="one block"),
    pytest.param(1, flip_bits(1), "not as many", id="one bit more"),
    pytest.param(1, flip_bits(6), "not as many", id="one bit less"),
    pytest.param(1, flip_bits(6, 65_537), "not as many", id="moved to the next block"),
    pytest.param(1, flip_bits(65_597), "a bit is beyond", id="first bit beyond"),
    pytest.param(1, flip_bits(65_599), "a bit is beyond", id="last bit beyond"),
    pytest.param(1, flip_bits(65_538, 65_597), "a bit is beyond", id="moved beyond"),
    pytest.param(1, flip_bits(65_538, 65_601), "padding", id="moved into padding"),
    pytest.param(1, flip_bits(65_600), "padding", id="first bit of padding"),
    pytest.param(1, flip_bits(65_600 + 63), "padding", id="last bit of padding"),
]


def by_kernels_alone(patch: Patch) -> bool:
    """Whether the kernels found nothing wrong."""
    from sparsecast.pipeline.delta.readied import Checking
    from sparsecast.pipeline.delta.timing import Mark

    with by_kernels():
        checking = Checking(patch.buffer, patch.manifest)
        checking.enqueue()
        Mark(DEVICE).wait()
        return checking.passed(patch) is not None


@pytest.mark.parametrize(("at", "spoil", "reason"), FAULTS)
def test_every_fault_is_found(at: int, spoil: Callable[[Patch, int], None], reason: str) -> None:
    """Counts that lie, positions out of order or beyond the end, bits too many: the kernels see
    it, and the error is the reference's, naming the tensor."""
    patch = patch_of()
    manifest = patch.manifest
    spoil(patch, at)
    with by_torch(), pytest.raises(CorruptPatch, match=reason) as expected:
        check(patch, manifest)
    with by_kernels(), pytest.raises(CorruptPatch, match=reason) as found:
        check(patch, manifest)
    assert str(found.value) == str(expected.value)
    assert f"'{'sbdk'[at]}'" in str(found.value)
    assert not by_kernels_alone(patch)


def test_what_is_right_passes() -> None:
    """The same patch as it was made, and read from its bytes: the kernels have nothing to say."""
    patch = patch_of()
    assert by_kernels_alone(patch)
    with by_kernels():
        assert check(patch, patch.manifest).readied is not None


def test_garbage_is_judged_as_torch_judges_it() -> None:
    """One bit of counts, positions or bitmaps is flipped anywhere: both refuse, or neither."""
    rng = random.Random(2)
    old = model(torch.bfloat16, s=(1_500,), b=(1_003,))
    new = copied(old)
    bits(new["s"])[::70] ^= 1
    bits(new["b"])[::5] ^= 1
    with by_torch():
        patch = diff(old, new, base_version=0, version=1)
    verdicts = set()
    for _ in range(24):
        section = rng.choice(patch.sections)
        at = rng.randrange(section.offset * 8, section.values_offset * 8)
        patch.buffer[at >> 3] ^= 1 << (at & 7)
        with by_torch():
            try:
                check(patch, patch.manifest)
                right = True
            except CorruptPatch:
                right = False
        assert by_kernels_alone(patch) == right, (section, at)
        verdicts.add(right)
        patch.buffer[at >> 3] ^= 1 << (at & 7)
    assert False in verdicts


@pytest.mark.skipif(DEVICE.type == "cuda", reason="addresses are seen in the interpreter alone")
@pytest.mark.parametrize(
    ("at", "counts"),
    [
        pytest.param(0, (2**32 - 1, 8), id="wraps"),
        pytest.param(0, (2**31, 2**31 + 7), id="halves"),
        pytest.param(0, (7, 2**32 - 1), id="last block"),
        pytest.param(0, (70_000, 1), id="more than the section"),
        pytest.param(1, (2**32 - 1, 2**32 - 1), id="bitmap"),
        pytest.param(3, (2**32 - 1,), id="last section"),
        pytest.param(3, (4_000,), id="beyond the end"),
    ],
)
def test_no_count_leads_out_of_the_patch(at: int, counts: tuple[int, ...]) -> None:
    """Hostile counts: every address that the kernels read lies in an array that they were given."""
    patch = patch_of()
    set_counts(*counts)(patch, at)
    with reached() as reach:
        assert not by_kernels_alone(patch)
    assert reach.require_within(patch.buffer) > 1_000

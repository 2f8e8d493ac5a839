"""The wire format: read by an independent reader, refused when it is not itself."""

import re
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsecast.messages.errors import CorruptPatch
from sparsecast.pipeline.delta import Patch, Section, Shadow, check, checksum, diff, manifest_of
from sparsecast.pipeline.delta.decode import Span, block_limits, spans_of
from sparsecast.pipeline.delta.encode import global_index, pack_mask, unpack_mask
from sparsecast.pipeline.delta.layout import Encoding, blocks_of, lay_out
from states import bits, changed, densities, raw, seeds, states

PAGE = Path(__file__).parents[3] / "docs" / "patch-format.md"
ENTRY = struct.Struct("<IBBHQQQQ")


def up(nbytes: int) -> int:
    """The next multiple of 16."""
    return -(-nbytes // 16) * 16


def read(data: bytes, state: dict[str, Tensor]) -> dict[str, dict[int, bytes]]:
    """A patch after docs/patch-format.md, in plain Python: {tensor: {element: bytes}}."""
    names = list(state)
    magic, version, form, zero, sections, zero2 = struct.unpack_from("<4sBBHII", data)
    assert (magic, version, zero, zero2) == (b"SPCP", 1, 0, 0)
    found: dict[str, dict[int, bytes]] = {}
    if form == 1:
        at = 80
        for size in (8, 4, 2, 1):
            for name, tensor in state.items():
                if tensor.element_size() == size:
                    found[name] = {i: data[at + i * size :][:size] for i in range(tensor.numel())}
                    at += tensor.numel() * size
        assert len(data) == up(at)
        return found
    expected_at = up(80 + 40 * sections)
    for k in range(sections):
        tensor, encoding, size, _, numel, count, at, values_at = ENTRY.unpack_from(
            data, 80 + 40 * k
        )
        assert at == expected_at
        blocks = -(-numel // 65_536)
        where: list[int] = []
        if encoding == 3:
            where = list(range(numel))
            assert values_at == at
        else:
            counts = struct.unpack_from(f"<{blocks}I", data, at)
            after = at + 4 * blocks
            if encoding == 1:
                positions = list(struct.unpack_from(f"<{count}H", data, after))
                for block, of_block in enumerate(counts):
                    where += [65_536 * block + p for p in positions[:of_block]]
                    positions = positions[of_block:]
                assert values_at == up(after + 2 * count)
            else:
                after = up(after)
                where = [i for i in range(numel) if data[after + i // 8] >> (i % 8) & 1]
                assert values_at == up(after + -(-numel // 8))
                for block, of_block in enumerate(counts):
                    assert of_block == sum(1 for i in where if i // 65_536 == block)
            assert len(where) == count
        assert where == sorted(set(where))
        found[names[tensor]] = {i: data[values_at + n * size :][:size] for n, i in enumerate(where)}
        expected_at = up(values_at + len(where) * size)
    assert len(data) == expected_at
    return found


def brute_force_nbytes(tensor: Tensor, count: int) -> int:
    """The smallest section for `count` changed elements, by the arithmetic of the document."""
    numel, size = tensor.numel(), tensor.element_size()
    counts = 4 * -(-numel // 65_536)
    sparse = up(counts + 2 * count) + up(count * size)
    bitmap = up(counts) + up(-(-numel // 8)) + up(count * size)
    return min(sparse, bitmap, up(numel * size))


@settings(max_examples=40, deadline=None)
@given(states(max_tensors=4, max_side=20), densities, seeds)
def test_another_implementation_can_read_it(
    old: dict[str, Tensor], density: float, seed: int
) -> None:
    """A reader written from the document finds every changed element, the smallest encodings, and
    no more bytes than promised."""
    new = changed(old, density, seed)
    patch = diff(old, new, base_version=0, version=1)
    data = patch.to_bytes()
    assert len(data) == patch.nbytes
    found = read(data, old)
    sizes = 0
    sections = 0
    for name, tensor in new.items():
        size = tensor.element_size()
        now, was = raw(tensor), raw(old[name])
        elements = [now[i : i + size] for i in range(0, len(now), size)]
        differing = {
            i: element for i, element in enumerate(elements) if element != was[i * size :][:size]
        }
        carried = found.get(name, {})
        assert differing.items() <= carried.items()
        assert all(elements[i] == element for i, element in carried.items())
        if differing:
            sections += 1
            sizes += brute_force_nbytes(tensor, len(differing))
    sectioned = up(80 + 40 * sections) + sizes
    dense = patch.dense_nbytes
    full = up(80 + dense)
    if sectioned > dense + dense // 100 + 1024 and full < sectioned:
        assert patch.full
        assert patch.nbytes == full
    else:
        assert patch.nbytes == sectioned
    assert patch.nbytes <= dense * 1.01 + 1024


def test_the_example_of_the_document() -> None:
    """The worked example of docs/patch-format.md, byte for byte, with its checksum."""
    page = PAGE.read_text()
    block = re.search(r"```hex\n(.*?)```", page, re.S)
    assert block
    data = bytes.fromhex("".join(line.split("#")[0] for line in block[1].splitlines()))
    old = {"w": torch.zeros(40, dtype=torch.bfloat16), "b": torch.tensor([1.0, 2.0])}
    new = {"w": old["w"].clone(), "b": torch.tensor([1.0, -0.0])}
    new["w"][3] = 1.0
    new["w"][39] = -2.0
    patch = diff(old, new, base_version=6, version=7)
    assert patch.to_bytes() == data
    found = re.search(r"checksum `([0-9a-f]{16})`", page)
    assert found
    assert f"{checksum(patch.buffer):016x}" == found[1]
    assert re.search(r"manifest hash `([0-9a-f]{32})`", page)[1] == patch.manifest_hash  # type: ignore[index]


def test_bytes_a_changed_element() -> None:
    """At 1 %, a changed bf16 element costs at most 4.1 bytes; at any density, a patch is at most
    the dense weights and 1 %."""
    old = {
        "embed": torch.zeros(1_000_000, dtype=torch.bfloat16),
        "proj": torch.zeros(896, 896, dtype=torch.bfloat16),
        "norm": torch.zeros(20_000, dtype=torch.bfloat16),
    }
    patch = diff(old, changed(old, 0.01, 1), base_version=0, version=1)
    assert patch.encoding == "sparse"
    assert patch.nbytes <= 4.1 * patch.changed
    for density in (0.05, 0.1, 0.5, 0.9, 0.93, 0.95, 1.0):
        patch = diff(old, changed(old, density, 1), base_version=0, version=1)
        assert patch.nbytes <= 1.01 * patch.dense_nbytes


def test_facts_of_a_patch() -> None:
    """What a metric reads off a patch: versions, counts, sizes, density, encoding."""
    old = {"a": torch.zeros(4000, dtype=torch.int16), "b": torch.zeros(4000, dtype=torch.int16)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    assert diff(old, new, base_version=0, version=1).encoding == "none"
    new["a"][7] = 1
    patch = diff(old, new, base_version=8, version=9)
    assert (patch.base_version, patch.version, patch.changed, patch.numel) == (8, 9, 1, 8000)
    assert (patch.density, patch.dense_nbytes, patch.encoding) == (1 / 8000, 16_000, "sparse")
    new["b"][:] = 1
    assert diff(old, new, base_version=8, version=9).encoding == "dense", "most of the bytes"
    anchor = Shadow(new).anchor(9)
    assert (anchor.base_version, anchor.encoding, anchor.density) == (None, "dense", 1.0)
    assert "8 → 9" in repr(patch)
    assert "anchor → 9" in repr(anchor)
    assert diff({}, {}, base_version=0, version=1).density == 0.0


def test_a_patch_is_read_where_it_lies() -> None:
    """Staging is viewed, not copied; at an odd address it is copied once, and still right."""
    old = {"w": torch.zeros(400)}
    patch = diff(old, {"w": torch.ones(400)}, base_version=0, version=1)
    staging = patch.buffer.clone()
    assert Patch.from_buffer(staging).buffer.data_ptr() == staging.data_ptr()
    askew = torch.zeros(patch.nbytes + 3, dtype=torch.uint8)[3:]
    askew.copy_(staging)
    assert Patch.from_buffer(askew).to_bytes() == patch.to_bytes()
    assert Patch.from_bytes(memoryview(patch.to_bytes())).to_bytes() == patch.to_bytes()


# ---- what is not a patch


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_garbage_is_refused(data: bytes, dressed: bool) -> None:
    """Any bytes, with and without the right start: CorruptPatch, never another error."""
    with pytest.raises(CorruptPatch):
        Patch.from_bytes(b"SPCP\x01" + data if dressed else data)


@settings(max_examples=30, deadline=None)
@given(states(max_tensors=3, max_side=12), densities, seeds)
def test_truncated_and_extended_patches_are_refused(
    old: dict[str, Tensor], density: float, seed: int
) -> None:
    """Every shorter prefix of a small patch, and anything longer, is refused."""
    data = diff(old, changed(old, density, seed), base_version=0, version=1).to_bytes()
    step = max(1, len(data) // 200)
    for length in [*range(0, len(data), step), len(data) - 1]:
        with pytest.raises(CorruptPatch):
            Patch.from_bytes(data[:length])
    with pytest.raises(CorruptPatch):
        Patch.from_bytes(data + bytes(16))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([(0, "I"), (4, "B"), (5, "B"), (6, "H"), (8, "I"), (12, "I"), (32, "q"),
                             (40, "q"), (48, "Q"), (56, "Q"), (64, "Q"), (72, "Q"), (80, "I"),
                             (84, "B"), (85, "B"), (86, "H"), (88, "Q"), (96, "Q"), (104, "Q"),
                             (112, "Q"), (120, "I"), (128, "Q"), (136, "Q")]),
            st.one_of(st.integers(0, 200), st.integers(0, 63).map(lambda shift: (1 << shift) - 1),
                      st.integers(0, 62).map(lambda shift: 1 << shift)),
        ),
        min_size=1,
        max_size=4,
    )
)  # fmt: skip
def test_lying_headers_are_refused_without_allocating(
    lies: list[tuple[tuple[int, str], int]],
) -> None:
    """Sizes up to 2⁶³ in any field: refused, or so harmless that check() accepts; never another
    error, never an allocation of what the header claims."""
    old = {"w": torch.zeros(40, dtype=torch.bfloat16), "b": torch.tensor([1.0, 2.0])}
    data = bytearray(diff(old, changed(old, 0.3, 1), base_version=0, version=1).to_bytes())
    for (at, code), value in lies:
        width = 8 * struct.calcsize(code) - (code == "q")
        struct.pack_into("<" + code, data, at, value % (1 << width))
    try:
        patch = Patch.from_bytes(data)
        assert patch.nbytes == len(data)
        check(patch, manifest_of(old))
    except CorruptPatch:
        pass


@pytest.mark.parametrize("sections", [1, 1636, 1637, 4000])
def test_tables_longer_than_one_copy_to_the_host(sections: int) -> None:
    """Header and table of up to 1,636 sections come in one copy of 64 KiB, longer ones in two."""
    old = {f"t{at}": torch.zeros(80, dtype=torch.int16) for at in range(sections)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    for tensor in new.values():
        tensor[7] = 1
    patch = diff(old, new, base_version=0, version=1)
    assert not patch.full
    read = Patch.from_bytes(patch.to_bytes())
    assert read.sections == patch.sections
    assert len(read.table) == sections


def test_what_is_not_a_buffer_is_refused() -> None:
    """A tensor of floats, of two dimensions or with gaps holds no patch."""
    for wrong in (torch.zeros(80), torch.zeros(8, 80).to(torch.uint8), torch.zeros(
        160, dtype=torch.uint8)[::2]):  # fmt: skip
        with pytest.raises(CorruptPatch, match="contiguous 1-D uint8"):
            Patch.from_buffer(wrong)


# ---- arithmetic beyond 2³¹, without the memory


def test_sections_beyond_two_to_the_31() -> None:
    """A tensor of 5 · 2³¹ elements, all figures exact."""
    numel = 5 << 31
    counts = (numel // 100, numel // 4, numel)
    columns = [[0, 1, 2], [2] * 3, [numel] * 3, list(counts)]
    table = lay_out(*(np.array(column, np.int64) for column in columns))
    sparse, bitmap, dense = table.sections
    assert [section.encoding for section in table.sections] == [1, 2, 3]
    assert [section.blocks for section in table.sections] == [5 << 15, 5 << 15, 0]
    assert sparse.places_offset == 208 + 4 * (5 << 15)
    assert sparse.values_offset == up(sparse.places_offset + 2 * (numel // 100))
    assert sparse.end == up(sparse.values_offset + 2 * (numel // 100)) == bitmap.offset
    assert table.nbytes == dense.end == dense.offset + 2 * numel
    assert blocks_of(numel + 1) == (5 << 15) + 1
    assert int(block_limits(Section(0, Encoding.SPARSE, 2, (1 << 31) + 7, 1, 0))[-1]) == 7


def test_indices_beyond_two_to_the_31() -> None:
    """Positions in far blocks become 64-bit indices; u16 positions are not taken as negative."""
    positions = torch.tensor([0, -1, 5], dtype=torch.int16)
    counts = torch.tensor([1, 0, 1, 1], dtype=torch.int32)
    first = 1 << 20
    expected = [first << 16, ((first + 2) << 16) + 65_535, ((first + 3) << 16) + 5]
    assert global_index(positions, counts, first).tolist() == expected
    single = torch.tensor([2], dtype=torch.int32)
    assert global_index(positions[:2], single, first).tolist() == [
        first << 16,
        (first << 16) + 65_535,
    ]


def test_spans_bound_what_is_held_at_once() -> None:
    """A section of 3 · 2³¹ elements with 2³¹ changes is cut into spans of about 2²⁰ values, at
    block borders, without a gap."""
    blocks = 3 << 15
    counts = torch.full((blocks,), 21_845, dtype=torch.int64)
    count = int(counts.sum())
    section = Section(0, Encoding.SPARSE, 2, 3 << 31, count, 0)
    spans = spans_of(section, counts)
    assert spans[0].first_block == 0
    assert spans[-1] == Span(spans[-1].first_block, blocks, spans[-1].first_value, count)
    for before, after in pairwise(spans):
        assert (before.stop_block, before.stop_value) == (after.first_block, after.first_value)
    assert max(span.stop_value - span.first_value for span in spans) <= (1 << 20) + 65_536
    assert all(span.first_value == 21_845 * span.first_block for span in spans)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), max_size=300))
def test_masks_are_packed_lowest_bit_first(mask: list[bool]) -> None:
    """bool to bits and back."""
    packed = pack_mask(torch.tensor(mask, dtype=torch.bool))
    assert packed.tolist() == [
        sum(bit << k for k, bit in enumerate(mask[i : i + 8])) for i in range(0, len(mask), 8)
    ]
    assert unpack_mask(packed, len(mask)).tolist() == mask


def test_equal_updates_are_equal_bytes() -> None:
    """Padding included, whatever lay in the memory before."""
    old = {"a": torch.zeros(77_777, dtype=torch.int8), "b": torch.zeros(1001)}
    new = changed(old, 0.1, 1)
    seen = set()
    for _ in range(20):
        torch.full((200_000,), 255, dtype=torch.uint8)  # dirties what the allocator hands out next
        seen.add(diff(old, new, base_version=0, version=1).to_bytes())
    assert len(seen) == 1
    assert bits(new["a"]).any()

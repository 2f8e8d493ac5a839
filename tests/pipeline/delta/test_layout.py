"""Section tables as columns, against a scalar reading of the same rules."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecast.messages.errors import CorruptPatch
from sparsecast.pipeline.delta.layout import (
    ANCHOR,
    Encoding,
    Form,
    Header,
    Section,
    Table,
    lay_out,
    table_end,
)

ENTRY = struct.Struct("<IBBHQQQQ")


def smallest(
    index: int, itemsize: int, numel: int, count: int, offset: int, *, dense: bool
) -> Section:
    """The section with the smallest encoding; ties go to the higher one."""
    encodings = list(Encoding) if dense else [Encoding.SPARSE, Encoding.BITMAP]
    return min(
        (Section(index, encoding, itemsize, numel, count, offset) for encoding in encodings),
        key=lambda section: (section.end, -section.encoding),
    )


def parse(data: bytes, header: Header) -> tuple[Section, ...]:
    """The table, entry after entry, in integers that cannot overflow."""
    sections: list[Section] = []
    offset = table_end(header.sections)
    last = -1
    changed = numel = nbytes = 0
    for index, encoding, itemsize, zero, size, count, at, values_at in ENTRY.iter_unpack(data):
        where = f"section {len(sections)}"
        if index <= last:
            raise CorruptPatch(f"{where} names tensor {index} after {last}")
        if encoding not in (1, 2, 3) or itemsize not in (1, 2, 4, 8) or zero:
            raise CorruptPatch(f"{where} has encoding {encoding}, itemsize {itemsize}, {zero}")
        if not 1 <= count <= size <= header.numel:
            raise CorruptPatch(f"{where} has {count} of {size} elements, of {header.numel} in all")
        section = Section(index, Encoding(encoding), itemsize, size, count, offset)
        if at != offset or values_at != section.values_offset:
            raise CorruptPatch(f"{where} lies at {at} and {values_at}, not where it must")
        if section.end > header.nbytes:
            raise CorruptPatch(f"{where} ends at byte {section.end} of {header.nbytes}")
        offset, last = section.end, index
        changed += count
        numel += size
        nbytes += size * itemsize
        sections.append(section)
    if offset != header.nbytes:
        raise CorruptPatch(f"the sections end at byte {offset} of {header.nbytes}")
    if changed != header.changed:
        raise CorruptPatch(f"the sections have {changed} changed elements, not {header.changed}")
    if numel > header.numel or nbytes > header.dense_nbytes:
        raise CorruptPatch(f"the sections span {numel} elements of {header.numel}")
    if header.base_version == ANCHOR and (
        numel != header.numel or any(s.encoding is not Encoding.DENSE for s in sections)
    ):
        raise CorruptPatch("an anchor must be a dense copy of every tensor")
    return tuple(sections)


def outcome(read: object, data: bytes, header: Header) -> object:
    """The sections, or what is said to be wrong."""
    try:
        found = read(data, header)  # type: ignore[operator]
    except CorruptPatch as exc:
        return str(exc)
    return found.sections if isinstance(found, Table) else found


@st.composite
def tensors(draw: st.DrawFn, most: int) -> list[tuple[int, int, int, int, bool, bool]]:
    """Ascending (index, itemsize, numel, count, dense, whole), counts near where encodings tie."""
    found = []
    index = -1
    for _ in range(draw(st.integers(0, 6))):
        index += draw(st.integers(1, 3))
        numel = draw(st.integers(1, 200) | st.integers(1, most))
        count = draw(
            st.integers(1, numel)
            | st.sampled_from([max(1, numel // part) for part in (1, 2, 8, 16, 100)])
        )
        itemsize = draw(st.sampled_from([1, 2, 4, 8]))
        found.append((index, itemsize, numel, count, draw(st.booleans()), draw(st.booleans())))
    return found


def laid_out(of: list[tuple[int, int, int, int, bool, bool]]) -> Table:
    index, itemsize, numel, count, dense, whole = (
        np.array(column) for column in (zip(*of, strict=True) if of else [[]] * 6)
    )
    figures = (column.astype(np.int64) for column in (index, itemsize, numel, count))
    return lay_out(*figures, dense=dense.astype(np.bool_), whole=whole.astype(np.bool_))


@settings(max_examples=300, deadline=None)
@given(tensors(1 << 40))
def test_columns_are_the_sections_one_by_one(
    of: list[tuple[int, int, int, int, bool, bool]],
) -> None:
    """Encodings, places and ends of all sections at once are those of the scalar arithmetic, and
    the packed table is what struct packs."""
    table = laid_out(of)
    offset = table_end(len(of))
    packed = b""
    for at, (index, itemsize, numel, count, dense, whole) in enumerate(of):
        section = smallest(index, itemsize, numel, count, offset, dense=dense)
        if whole:
            section = Section(index, Encoding.DENSE, itemsize, numel, count, offset)
        assert table.sections[at] == section
        for column in ("blocks", "places_offset", "places_nbytes", "values_offset", "carried"):
            assert getattr(table, column)[at] == getattr(section, column)
        assert table.end[at] == section.end
        packed += ENTRY.pack(
            index, section.encoding, itemsize, 0, numel, count, offset, section.values_offset
        )
        offset = section.end
    assert len(table) == len(of)
    assert table.nbytes == offset
    assert table.pack() == packed
    for encoding in Encoding:
        assert table.nbytes_of(encoding) == sum(
            s.end - s.offset for s in table.sections if s.encoding is encoding
        )


def test_one_choice_for_all() -> None:
    """dense and whole are given for all sections by one bool."""
    figures = [np.array(column, np.int64) for column in ([0, 4], [2, 2], [100, 9000], [99, 9])]
    assert lay_out(*figures).encoding.tolist() == [3, 1]
    assert lay_out(*figures, dense=False).encoding.tolist() == [2, 1]
    assert lay_out(*figures, whole=True).encoding.tolist() == [3, 3]


U64 = st.integers(0, 40) | st.integers(0, (1 << 64) - 1) | st.integers(0, 63).map(lambda b: 1 << b)
FIELDS = [("<I", 0), ("<B", 4), ("<B", 5), ("<H", 6), ("<Q", 8), ("<Q", 16), ("<Q", 24), ("<Q", 32)]


@settings(max_examples=600, deadline=None)
@given(
    tensors(3000),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(FIELDS), U64), max_size=3),
    st.tuples(*[st.sampled_from([0, 0, 0, 0, 0, 1, -1, 1 << 50])] * 4),
    st.sampled_from([ANCHOR, 0, 0, 0]),
)
def test_a_lying_table_is_refused_as_the_scalar_reading_refuses_it(
    of: list[tuple[int, int, int, int, bool, bool]],
    lies: list[tuple[int, tuple[str, int], int]],
    off: tuple[int, int, int, int],
    base: int,
) -> None:
    """Any figure of any entry or of the header replaced: the same sections, or the same refusal,
    word for word; sizes near 2⁶⁴ neither overflow into sense nor allocate."""
    table = laid_out(of)
    data = bytearray(table.pack())
    for at, (code, place), value in lies:
        if at < len(of):
            value %= 1 << (8 * struct.calcsize(code))
            struct.pack_into(code, data, ENTRY.size * at + place, value)
    numel = max(0, int(table.numel.sum()) + off[0])
    header = Header(
        Form.SECTIONS, len(of), "0" * 32, base, 1,
        max(0, int(table.count.sum()) + off[1]), numel,
        max(0, int((table.numel * table.itemsize).sum()) + off[2]),
        table.nbytes + off[3] % 4096,
    )  # fmt: skip
    assert outcome(Table.parse, bytes(data), header) == outcome(parse, bytes(data), header)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 4).flatmap(lambda n: st.binary(min_size=40 * n, max_size=40 * n)),
    st.sampled_from([0, 1, 1 << 20, (1 << 62) - 1]),
    st.integers(80, 1 << 30),
)
def test_noise_is_refused_as_the_scalar_reading_refuses_it(
    data: bytes, numel: int, nbytes: int
) -> None:
    """Arbitrary bytes for a table, under a header of any size."""
    header = Header(Form.SECTIONS, len(data) // 40, "0" * 32, 0, 1, 0, numel, numel, nbytes)
    assert outcome(Table.parse, data, header) == outcome(parse, data, header)


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("numel", [1 << 40, (1 << 61) + 3, (1 << 62) - 1])
def test_huge_sections_do_not_wrap_around(encoding: Encoding, itemsize: int, numel: int) -> None:
    """A section whose bytes pass 2⁶³, or wrap to a small number, does not pass for a small one,
    not even behind a good one."""
    good = Section(0, Encoding.DENSE, 1, 16, 16, table_end(2))
    huge = Section(1, encoding, itemsize, numel, numel, good.end)
    data = b"".join(
        ENTRY.pack(s.index, s.encoding, s.itemsize, 0, s.numel, s.count, s.offset,
                   s.values_offset % (1 << 64))
        for s in (good, huge)
    )  # fmt: skip
    header = Header(Form.SECTIONS, 2, "0" * 32, 0, 1, numel, (1 << 62) - 1, (1 << 62) - 1, 4096)
    with pytest.raises(CorruptPatch, match=r"section 1 (ends at|lies at)"):
        Table.parse(data, header)
    assert outcome(Table.parse, data, header) == outcome(parse, data, header)

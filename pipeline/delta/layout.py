"""The wire format of a patch, as numbers: docs/patch-format.md tells it in words.

Everything is little-endian; arrays start at multiples of 16 bytes, gaps are zero.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from ...messages.errors import CorruptPatch

#: One figure a section.
Column: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]

MAGIC = b"SPCP"
FORMAT = 1
ALIGN = 16
#: magic, format, form, reserved; sections, reserved; manifest; base, version; changed, numel,
#: dense nbytes, nbytes
HEADER = struct.Struct("<4sBBHII16sqqQQQQ")
#: tensor, encoding, itemsize, reserved; numel, count; offset of the section, of its values
ENTRY = np.dtype(
    [
        ("index", "<u4"), ("encoding", "u1"), ("itemsize", "u1"), ("zero", "<u2"),
        ("numel", "<u8"), ("count", "<u8"), ("offset", "<u8"), ("values_offset", "<u8"),
    ]
)  # fmt: skip
#: The sectioned form is kept up to dense · 1.01 + this; above it the full form is used.
ALLOWANCE_NBYTES = 1024
ANCHOR = -1
_LIMIT = 1 << 62
_NO_ITEMSIZE = ~np.isin(np.arange(256), (1, 2, 4, 8))


class Form(IntEnum):
    """How a patch is laid out as a whole."""

    SECTIONS = 0
    FULL = 1


class Encoding(IntEnum):
    """How one section says which elements changed; ties in size go to the higher one."""

    SPARSE = 1
    BITMAP = 2
    DENSE = 3


def aligned(nbytes: int) -> int:
    """The next multiple of 16."""
    return (nbytes + ALIGN - 1) & ~(ALIGN - 1)


def blocks_of(numel: int) -> int:
    """How many blocks of 65,536 elements a tensor has."""
    return (numel + 0xFFFF) >> 16


@dataclass(frozen=True, slots=True)
class Section:
    """One changed tensor in a patch: its place in the manifest, and where its arrays lie.

    Offsets are bytes from the start of the buffer; `count` elements differ from the base. Sparse
    and bitmap sections carry `count` values, dense ones `numel`.
    """

    index: int
    encoding: Encoding
    itemsize: int
    numel: int
    count: int
    offset: int

    @property
    def blocks(self) -> int:
        """How many u32 counts the section starts with; none if it is dense."""
        return 0 if self.encoding is Encoding.DENSE else blocks_of(self.numel)

    @property
    def places_offset(self) -> int:
        """Where the u16 positions, or the bits, start."""
        counts_end = self.offset + 4 * self.blocks
        return aligned(counts_end) if self.encoding is Encoding.BITMAP else counts_end

    @property
    def places_nbytes(self) -> int:
        """Bytes of the positions, or of the bits."""
        if self.encoding is Encoding.SPARSE:
            return 2 * self.count
        return (self.numel + 7) >> 3 if self.encoding is Encoding.BITMAP else 0

    @property
    def values_offset(self) -> int:
        """Where the values start."""
        if self.encoding is Encoding.DENSE:
            return self.offset
        return aligned(self.places_offset + self.places_nbytes)

    @property
    def carried(self) -> int:
        """How many values the section carries."""
        return self.numel if self.encoding is Encoding.DENSE else self.count

    @property
    def values_nbytes(self) -> int:
        """Bytes of the values."""
        return self.carried * self.itemsize

    @property
    def end(self) -> int:
        """Where the next section starts."""
        return aligned(self.values_offset + self.values_nbytes)


def table_end(sections: int) -> int:
    """Where the first section starts."""
    return aligned(HEADER.size + ENTRY.itemsize * sections)


def full_nbytes(dense_nbytes: int) -> int:
    """Bytes of a patch in the full form."""
    return aligned(HEADER.size + dense_nbytes)


def fits_sections(nbytes: int, dense_nbytes: int) -> bool:
    """Whether a patch of `nbytes` keeps the sectioned form."""
    return nbytes <= dense_nbytes + dense_nbytes // 100 + ALLOWANCE_NBYTES


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed start of a patch."""

    form: Form
    sections: int
    manifest_hash: str
    base_version: int
    version: int
    changed: int
    numel: int
    dense_nbytes: int
    nbytes: int

    def pack(self) -> bytes:
        """The 80 bytes of it."""
        return HEADER.pack(
            MAGIC, FORMAT, self.form, 0, self.sections, 0, bytes.fromhex(self.manifest_hash),
            self.base_version, self.version, self.changed, self.numel, self.dense_nbytes,
            self.nbytes,
        )  # fmt: skip


def parse_header(data: bytes, nbytes: int) -> Header:
    """Read and validate the header of a buffer of `nbytes`; CorruptPatch says what is wrong."""
    if len(data) < HEADER.size:
        raise CorruptPatch(f"{nbytes} bytes are shorter than the header of {HEADER.size}")
    (magic, version_byte, form, zero1, sections, zero2, manifest, base_version, version, changed,
     numel, dense_nbytes, total) = HEADER.unpack_from(data)  # fmt: skip
    if magic != MAGIC:
        raise CorruptPatch(f"starts with {magic!r}, not with {MAGIC!r}")
    if version_byte != FORMAT:
        raise CorruptPatch(f"format {version_byte} is unknown here; this build reads {FORMAT}")
    if form not in (Form.SECTIONS, Form.FULL) or zero1 or zero2:
        raise CorruptPatch(f"form {form} or a reserved field that is not zero")
    if total != nbytes:
        raise CorruptPatch(f"the header says {total} bytes, there are {nbytes}")
    if not (ANCHOR <= base_version < version and version >= 0):
        raise CorruptPatch(f"version {version} does not follow base version {base_version}")
    if not (changed <= numel <= dense_nbytes <= 8 * numel) or dense_nbytes >= _LIMIT:
        raise CorruptPatch(
            f"{changed} changed of {numel} elements in {dense_nbytes} dense bytes cannot be"
        )
    if base_version == ANCHOR and changed != numel:
        raise CorruptPatch(f"an anchor must carry all {numel} elements, it says {changed}")
    if form == Form.FULL and (sections or nbytes != full_nbytes(dense_nbytes)):
        raise CorruptPatch(f"{nbytes} bytes are not a full form of {dense_nbytes} dense bytes")
    if form == Form.SECTIONS and HEADER.size + ENTRY.itemsize * sections > nbytes:
        raise CorruptPatch(f"a table of {sections} sections does not fit {nbytes} bytes")
    return Header(
        Form(form), sections, manifest.hex(), base_version, version, changed, numel,
        dense_nbytes, total,
    )  # fmt: skip


class Table:
    """The sections of a patch as columns: int64 arrays [sections], which nobody may change.

    Each column is what Section calls so. `nbytes` is where the last section ends: the bytes of a
    patch in the sectioned form.
    """

    __slots__ = (
        "_sections", "blocks", "carried", "count", "encoding", "end", "index", "itemsize", "nbytes",
        "numel", "offset", "places_nbytes", "places_offset", "values_offset",
    )  # fmt: skip

    index: Column
    encoding: Column
    itemsize: Column
    numel: Column
    count: Column
    offset: Column
    blocks: Column
    places_offset: Column
    places_nbytes: Column
    values_offset: Column
    carried: Column
    end: Column

    def __init__(
        self,
        index: Column,
        encoding: Column,
        itemsize: Column,
        numel: Column,
        count: Column,
        offset: Column,
    ) -> None:
        sparse = encoding == Encoding.SPARSE
        bitmap = encoding == Encoding.BITMAP
        dense = encoding == Encoding.DENSE
        self.index = index
        self.encoding = encoding
        self.itemsize = itemsize
        self.numel = numel
        self.count = count
        self.offset = offset
        self.blocks = np.where(dense, 0, (numel + 0xFFFF) >> 16)
        counts_end = offset + 4 * self.blocks
        self.places_offset = np.where(bitmap, _aligned(counts_end), counts_end)
        self.places_nbytes = np.where(sparse, 2 * count, np.where(bitmap, (numel + 7) >> 3, 0))
        places_end = self.places_offset + self.places_nbytes
        self.values_offset = np.where(dense, offset, _aligned(places_end))
        self.carried = np.where(dense, numel, count)
        self.end = _aligned(self.values_offset + self.carried * itemsize)
        self.nbytes = int(self.end[-1]) if len(index) else table_end(0)
        self._sections: tuple[Section, ...] | None = None

    @classmethod
    def empty(cls) -> Table:
        """A table of no sections, as the full form has."""
        none = np.zeros(0, np.int64)
        return cls(none, none, none, none, none, none)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def sections(self) -> tuple[Section, ...]:
        """The same, one object a section; built when first asked for."""
        if self._sections is None:
            columns = (
                self.index,
                self.encoding,
                self.itemsize,
                self.numel,
                self.count,
                self.offset,
            )
            self._sections = tuple(
                Section(index, Encoding(encoding), itemsize, numel, count, offset)
                for index, encoding, itemsize, numel, count, offset in zip(
                    *(column.tolist() for column in columns), strict=True
                )
            )
        return self._sections

    def nbytes_of(self, encoding: Encoding) -> int:
        """Bytes of the sections that have this encoding."""
        return int(((self.end - self.offset) * (self.encoding == encoding)).sum())

    def pack(self) -> bytes:
        """The section table of the wire, 40 bytes a section."""
        entries = np.zeros(len(self), ENTRY)
        for name in ("index", "encoding", "itemsize", "numel", "count", "offset", "values_offset"):
            entries[name] = getattr(self, name)
        return entries.tobytes()

    @classmethod
    def parse(cls, data: bytes | memoryview | npt.NDArray[np.uint8], header: Header) -> Table:
        """Read and validate the section table against its header; CorruptPatch says what is wrong.

        `header` comes from parse_header(): its nbytes are those that there are.
        """
        entries = np.frombuffer(data, ENTRY)
        size, count = entries["numel"], entries["count"]
        dense = entries["encoding"] == Encoding.DENSE
        wrong = np.zeros(len(entries), np.bool_)
        wrong[1:] = entries["index"][1:] <= entries["index"][:-1]
        wrong |= (entries["encoding"] < 1) | (entries["encoding"] > 3)
        wrong |= _NO_ITEMSIZE[entries["itemsize"]] | (entries["zero"] != 0)
        wrong |= (count < 1) | (count > size) | (size > np.uint64(header.numel))
        # A block of 65,536 elements takes 4 bytes at the least, a changed element 1. What claims
        # more cannot end in time, and with the rest nothing below passes 2^63.
        wrong |= (size > np.uint64(header.nbytes << 14)) | (count > np.uint64(header.nbytes))
        wrong |= dense & (size > np.uint64(header.nbytes))
        index = entries["index"].astype(np.int64)
        encoding = np.where(wrong, Encoding.DENSE, entries["encoding"]).astype(np.int64)
        itemsize = np.where(wrong, 1, entries["itemsize"]).astype(np.int64)
        numel = np.where(wrong, 0, size).astype(np.int64)
        changed = np.where(wrong, 0, count).astype(np.int64)
        each = np.choose(encoding - 1, _nbytes(itemsize, numel, changed))
        each[each > header.nbytes] = header.nbytes
        table = cls(index, encoding, itemsize, numel, changed, _starts(each))
        wrong |= entries["offset"] != table.offset.astype(np.uint64)
        wrong |= entries["values_offset"] != table.values_offset.astype(np.uint64)
        wrong |= table.end > header.nbytes
        if wrong.any():
            # Those before the first wrong one are right, so its place is, too.
            at = int(wrong.argmax())
            last = int(index[at - 1]) if at else -1
            _refuse(at, entries[at].tolist(), last, int(table.offset[at]), header)
        table._require_sums(header)
        return table

    def _require_sums(self, header: Header) -> None:
        if self.nbytes != header.nbytes:
            raise CorruptPatch(f"the sections end at byte {self.nbytes} of {header.nbytes}")
        changed, numel = int(self.count.sum()), int(self.numel.sum())
        if changed != header.changed:
            raise CorruptPatch(
                f"the sections have {changed} changed elements, not {header.changed}"
            )
        if numel > header.numel or int((self.numel * self.itemsize).sum()) > header.dense_nbytes:
            raise CorruptPatch(f"the sections span {numel} elements of {header.numel}")
        if header.base_version == ANCHOR and (
            numel != header.numel or bool((self.encoding != Encoding.DENSE).any())
        ):
            raise CorruptPatch("an anchor must be a dense copy of every tensor")


def _refuse(at: int, entry: tuple[int, ...], last: int, offset: int, header: Header) -> NoReturn:
    """Say what is wrong with entry `at`, which starts at `offset`, after tensor `last`."""
    index, encoding, itemsize, zero, numel, count, claimed, values_claimed = entry
    where = f"section {at}"
    if index <= last:
        raise CorruptPatch(f"{where} names tensor {index} after {last}")
    if encoding not in (1, 2, 3) or itemsize not in (1, 2, 4, 8) or zero:
        raise CorruptPatch(f"{where} has encoding {encoding}, itemsize {itemsize}, {zero}")
    if not 1 <= count <= numel <= header.numel:
        raise CorruptPatch(f"{where} has {count} of {numel} elements, of {header.numel} in all")
    section = Section(index, Encoding(encoding), itemsize, numel, count, offset)
    if claimed != offset or values_claimed != section.values_offset:
        raise CorruptPatch(f"{where} lies at {claimed} and {values_claimed}, not where it must")
    raise CorruptPatch(f"{where} ends at byte {section.end} of {header.nbytes}")


def lay_out(
    index: Column,
    itemsize: Column,
    numel: Column,
    count: Column,
    *,
    dense: Flags | bool = True,
    whole: Flags | bool = False,
) -> Table:
    """Lay changed tensors (int64 columns, ascending by index) out as the sections of a patch.

    Each takes its smallest encoding, ties going to the higher one: of all three where `dense`,
    else of sparse and bitmap; where `whole`, it is dense whatever its size.
    """
    sparse, bitmap, whole_nbytes = _nbytes(itemsize, numel, count)
    each = np.minimum(sparse, bitmap)
    to_dense = ((whole_nbytes <= each) & dense) | whole
    encoding = np.where(
        to_dense, Encoding.DENSE, np.where(bitmap <= sparse, Encoding.BITMAP, Encoding.SPARSE)
    ).astype(np.int64)
    each = np.where(to_dense, whole_nbytes, each)
    return Table(index, encoding, itemsize, numel, count, _starts(each))


def _aligned(nbytes: Column) -> Column:
    return (nbytes + (ALIGN - 1)) & -ALIGN


def _nbytes(itemsize: Column, numel: Column, count: Column) -> tuple[Column, Column, Column]:
    """Bytes of each section if it were sparse, bitmap, dense."""
    counts = 4 * ((numel + 0xFFFF) >> 16)
    values = _aligned(count * itemsize)
    sparse = _aligned(counts + 2 * count) + values
    bitmap = _aligned(counts) + _aligned((numel + 7) >> 3) + values
    return sparse, bitmap, _aligned(numel * itemsize)


def _starts(each: Column) -> Column:
    """Where sections of so many bytes start: behind the table, one after the other."""
    ends = each.cumsum()
    return ends - each + table_end(len(each))

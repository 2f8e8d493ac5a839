"""The wire format of a patch, as numbers: docs/patch-format.md tells it in words.

Everything is little-endian; arrays start at multiples of 16 bytes, gaps are zero.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from ...messages.errors import CorruptPatch

MAGIC = b"SPCP"
FORMAT = 1
ALIGN = 16
#: magic, format, form, reserved; sections, reserved; manifest; base, version; changed, numel,
#: dense nbytes, nbytes
HEADER = struct.Struct("<4sBBHII16sqqQQQQ")
#: tensor, encoding, itemsize, reserved; numel, count; offset of the section, of its values
ENTRY = struct.Struct("<IBBHQQQQ")
#: The sectioned form is kept up to dense · 1.01 + this; above it the full form is used.
ALLOWANCE_NBYTES = 1024
ANCHOR = -1
_LIMIT = 1 << 62


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


def smallest(
    index: int, itemsize: int, numel: int, count: int, offset: int = 0, *, dense: bool = True
) -> Section:
    """The section with the smallest encoding for `count` of `numel` elements."""
    encodings = list(Encoding) if dense else [Encoding.SPARSE, Encoding.BITMAP]
    return min(
        (Section(index, encoding, itemsize, numel, count, offset) for encoding in encodings),
        key=lambda section: (section.end, -section.encoding),
    )


def table_end(sections: int) -> int:
    """Where the first section starts."""
    return aligned(HEADER.size + ENTRY.size * sections)


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
    if form == Form.SECTIONS and HEADER.size + ENTRY.size * sections > nbytes:
        raise CorruptPatch(f"a table of {sections} sections does not fit {nbytes} bytes")
    return Header(
        Form(form), sections, manifest.hex(), base_version, version, changed, numel,
        dense_nbytes, total,
    )  # fmt: skip


def pack_table(sections: tuple[Section, ...]) -> bytes:
    """The section table."""
    return b"".join(
        ENTRY.pack(s.index, s.encoding, s.itemsize, 0, s.numel, s.count, s.offset, s.values_offset)
        for s in sections
    )


def parse_table(data: bytes, header: Header) -> tuple[Section, ...]:
    """Read and validate the section table against its header; CorruptPatch says what is wrong."""
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

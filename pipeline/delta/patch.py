"""A patch: the changed elements of one update, in one buffer that is the wire format itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...messages.errors import CorruptPatch
from ...messages.manifest import Manifest
from .bits import bits_dtype, quiet
from .layout import (
    ANCHOR,
    ENTRY,
    HEADER,
    Column,
    Encoding,
    Form,
    Header,
    Section,
    Table,
    parse_header,
)

EncodingName = Literal["none", "sparse", "bitmap", "dense"]

Found = TypeVar("Found")

#: Manifests that are remembered: a process has one or two, and one for each rank of a trainer that
#: has several.
_KNOWN = 64
#: Header and table come to the host in one copy of so many bytes: tables of up to 1,636 sections.
START_NBYTES = 1 << 16
_NAMES: dict[Encoding, EncodingName] = {
    Encoding.SPARSE: "sparse",
    Encoding.BITMAP: "bitmap",
    Encoding.DENSE: "dense",
}


class Patch:
    """A view over one contiguous 1-D uint8 tensor, on any device; made by diff, merge, from_….

    The buffer must not change while the patch is in use. Of a patch that is still being written the
    header is known; `table`, or what gives it, must not need the buffer then, and `shares` are the
    bytes of the sections of each encoding.
    """

    __slots__ = ("_header", "_shares", "_table", "buffer", "manifest")

    buffer: Tensor
    #: The manifest, where whoever made the patch had it; it does not travel.
    manifest: Manifest | None

    def __init__(
        self,
        buffer: Tensor,
        header: Header,
        table: Table | Callable[[], Table],
        manifest: Manifest | None = None,
        shares: Mapping[Encoding, int] | None = None,
    ) -> None:
        self.buffer = buffer
        self.manifest = manifest
        self._table = table
        self._header = header
        self._shares = shares

    # ---- in and out

    @classmethod
    def from_buffer(cls, buffer: Tensor) -> Patch:
        """Read a patch where it lies (uint8, 1-D, contiguous; copied only if not 16-aligned).

        Header and section table are validated: CorruptPatch. check() validates the rest. Waits for
        the current stream of the buffer's device: one copy to the host, two if the table is long.
        """
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
            raise CorruptPatch(
                f"a patch is a contiguous 1-D uint8 tensor, not {buffer.dtype} of shape "
                f"{list(buffer.shape)}"
            )
        with quiet():
            if buffer.numel() and (buffer.storage_offset() % 16 or buffer.data_ptr() % 16):
                buffer = buffer.clone()
            patch = cls.from_start(buffer, buffer[:START_NBYTES].cpu())
            _ = patch.table
            return patch

    @classmethod
    def from_start(cls, buffer: Tensor, start: Tensor) -> Patch:
        """from_buffer() with some of the buffer's first bytes, the header at least, on the host.

        The buffer is 16-aligned. The section table is validated when it is first asked for.
        """
        header = parse_header(start[: HEADER.size].numpy().tobytes(), buffer.numel())
        return cls(buffer, header, partial(_read_table, buffer, header, start))

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Patch:
        """Read a patch from a copy of `data`; CorruptPatch as in from_buffer."""
        with quiet():
            if not len(data):
                raise CorruptPatch("0 bytes")
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return cls.from_buffer(buffer)

    def start(self) -> bytes:
        """Header and section table, as bytes."""
        return self._header.pack() + self.table.pack()

    def to_bytes(self) -> bytes:
        """The wire format, as bytes."""
        with quiet():
            return self.buffer.cpu().numpy().tobytes()

    # ---- facts

    @property
    def manifest_hash(self) -> str:
        """The manifest that section indices refer to, by its hash."""
        return self._header.manifest_hash

    @property
    def base_version(self) -> int | None:
        """The version that the patch applies to; None for an anchor, which fits anything."""
        base = self._header.base_version
        return None if base == ANCHOR else base

    @property
    def version(self) -> int:
        """The version after it."""
        return self._header.version

    @property
    def changed(self) -> int:
        """Elements that differ from the base; all of them for an anchor.

        In a merged patch: elements that any of its patches changed.
        """
        return self._header.changed

    @property
    def numel(self) -> int:
        """Elements of the whole model."""
        return self._header.numel

    @property
    def density(self) -> float:
        """changed / numel; 0.0 for an empty model."""
        return self.changed / self.numel if self.numel else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the patch."""
        return self._header.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the whole model."""
        return self._header.dense_nbytes

    @property
    def members(self) -> int:
        """Sections of its table; 0 in the full form."""
        return self._header.sections

    @property
    def full(self) -> bool:
        """Whether it has the full form: every tensor, no section table."""
        return self._header.form is Form.FULL

    @property
    def encoding(self) -> EncodingName:
        """The encoding that carries the most of its bytes; "none" if nothing changed."""
        if self.full:
            return "dense"
        nbytes = self._shares or {each: self.table.nbytes_of(each) for each in Encoding}
        most = max(nbytes, key=lambda encoding: nbytes[encoding])
        return _NAMES[most] if nbytes[most] else "none"

    def __repr__(self) -> str:
        base = "anchor" if self.base_version is None else self.base_version
        return (
            f"Patch({base} → {self.version}, {self.changed} of {self.numel} elements, "
            f"{self.nbytes} of {self.dense_nbytes} bytes, {self.encoding})"
        )

    # ---- parts

    @property
    def table(self) -> Table:
        """The section table as it was read or made; empty in the full form, where
        table_of(manifest) gives the places."""
        if not isinstance(self._table, Table):
            self._table = self._table()
        return self._table

    @property
    def sections(self) -> tuple[Section, ...]:
        """The table, one object a section."""
        return self.table.sections

    def table_of(self, manifest: Manifest) -> Table:
        """Its table; in the full form, one dense section a tensor, in order of the buffer."""
        return full_table(manifest) if self.full else self.table

    def sections_of(self, manifest: Manifest) -> tuple[Section, ...]:
        """table_of(), one object a section."""
        return self.table_of(manifest).sections

    def counts(self, section: Section) -> Tensor:
        """Changed elements of each block: int32 [blocks], to be read as u32."""
        at = section.offset
        return self.buffer[at : at + 4 * section.blocks].view(torch.int32)

    def positions(self, section: Section) -> Tensor:
        """Positions within their blocks, of a sparse section: int16 [count], to be read as u16."""
        at = section.places_offset
        return self.buffer[at : at + section.places_nbytes].view(torch.int16)

    def mask_bits(self, section: Section) -> Tensor:
        """The bits of a bitmap section: uint8 [ceil(numel / 8)], lowest bit first."""
        at = section.places_offset
        return self.buffer[at : at + section.places_nbytes]

    def values(self, section: Section) -> Tensor:
        """The values of a section as integers of its itemsize: [carried]."""
        at = section.values_offset
        return self.buffer[at : at + section.values_nbytes].view(bits_dtype(section.itemsize))


def _read_table(buffer: Tensor, header: Header, start: Tensor) -> Table:
    if header.form is Form.FULL:
        return Table.empty()
    end = HEADER.size + ENTRY.itemsize * header.sections
    with quiet():
        read = start if end <= start.numel() else buffer[:end].cpu()
        return Table.parse(read.numpy()[HEADER.size : end], header)


# ---- of a manifest, computed once


@dataclass(frozen=True, slots=True)
class Columns:
    """Every tensor of a manifest, in its order, the empty ones too: int64 [tensors]."""

    itemsize: Column
    numel: Column


class _Known(Generic[Found]):
    """What was computed for the last few manifests, by their hash."""

    def __init__(self, compute: Callable[[Manifest], Found]) -> None:
        self._compute = compute
        self._found: dict[str, Found] = {}

    def __call__(self, manifest: Manifest) -> Found:
        found = self._found.get(manifest.hash)
        if found is None:
            found = self._compute(manifest)
            if len(self._found) >= _KNOWN:
                self._found = {}
            self._found[manifest.hash] = found
        return found


def _columns_of(manifest: Manifest) -> Columns:
    tensors = manifest.tensors
    return Columns(
        np.array([spec.itemsize for spec in tensors], np.int64),
        np.array([spec.numel for spec in tensors], np.int64),
    )


def _full_table(manifest: Manifest) -> Table:
    """Larger items first, so that nothing needs padding."""
    columns = columns_of(manifest)
    index = np.argsort(-columns.itemsize, kind="stable")
    index = index[columns.numel[index] > 0]
    itemsize, numel = columns.itemsize[index], columns.numel[index]
    ends = HEADER.size + (numel * itemsize).cumsum()
    encoding = np.full_like(index, Encoding.DENSE)
    return Table(index, encoding, itemsize, numel, numel, ends - numel * itemsize)


#: Itemsizes and element counts of a manifest's tensors.
columns_of = _Known(_columns_of)
#: Where the tensors lie in the full form.
full_table = _Known(_full_table)

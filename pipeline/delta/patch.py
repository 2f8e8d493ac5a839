"""A patch: the changed elements of one update, in one buffer that is the wire format itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...messages.errors import CorruptPatch
from ...messages.manifest import Manifest
from .bits import bits_dtype, quiet
from .layout import (
    ANCHOR,
    ENTRY,
    HEADER,
    Encoding,
    Form,
    Header,
    Section,
    parse_header,
    parse_table,
)

EncodingName = Literal["none", "sparse", "bitmap", "dense"]


class Patch:
    """A view over one contiguous 1-D uint8 tensor, on any device; made by diff, merge, from_….

    The buffer must not change while the patch is in use. `sections` is the table as it was read;
    it is empty in the full form, where sections_of(manifest) gives the places.
    """

    __slots__ = ("_header", "buffer", "manifest", "sections")

    buffer: Tensor
    sections: tuple[Section, ...]
    #: The manifest, where whoever made the patch had it; it does not travel.
    manifest: Manifest | None

    def __init__(
        self,
        buffer: Tensor,
        header: Header,
        sections: tuple[Section, ...],
        manifest: Manifest | None = None,
    ) -> None:
        self.buffer = buffer
        self.sections = sections
        self.manifest = manifest
        self._header = header

    # ---- in and out

    @classmethod
    def from_buffer(cls, buffer: Tensor) -> Patch:
        """Read a patch where it lies (uint8, 1-D, contiguous; copied only if not 16-aligned).

        Header and section table are validated: CorruptPatch. check() validates the rest.
        """
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
            raise CorruptPatch(
                f"a patch is a contiguous 1-D uint8 tensor, not {buffer.dtype} of shape "
                f"{list(buffer.shape)}"
            )
        with quiet():
            if buffer.numel() and (buffer.storage_offset() % 16 or buffer.data_ptr() % 16):
                buffer = buffer.clone()
            nbytes = buffer.numel()
            header = parse_header(bytes(buffer[: HEADER.size].tolist()), nbytes)
            sections: tuple[Section, ...] = ()
            if header.form is Form.SECTIONS:
                table = buffer[HEADER.size : HEADER.size + ENTRY.size * header.sections]
                sections = parse_table(table.cpu().numpy().tobytes(), header)
            return cls(buffer, header, sections)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Patch:
        """Read a patch from a copy of `data`; CorruptPatch as in from_buffer."""
        with quiet():
            if not len(data):
                raise CorruptPatch("0 bytes")
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return cls.from_buffer(buffer)

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
    def full(self) -> bool:
        """Whether it has the full form: every tensor, no section table."""
        return self._header.form is Form.FULL

    @property
    def encoding(self) -> EncodingName:
        """The encoding that carries the most of its bytes; "none" if nothing changed."""
        if self.full:
            return "dense"
        names: dict[Encoding, EncodingName] = {
            Encoding.SPARSE: "sparse",
            Encoding.BITMAP: "bitmap",
            Encoding.DENSE: "dense",
        }
        nbytes = dict.fromkeys(names, 0)
        for section in self.sections:
            nbytes[section.encoding] += section.end - section.offset
        most = max(names, key=lambda encoding: nbytes[encoding])
        return names[most] if nbytes[most] else "none"

    def __repr__(self) -> str:
        base = "anchor" if self.base_version is None else self.base_version
        return (
            f"Patch({base} → {self.version}, {self.changed} of {self.numel} elements, "
            f"{self.nbytes} of {self.dense_nbytes} bytes, {self.encoding})"
        )

    # ---- parts

    def sections_of(self, manifest: Manifest) -> tuple[Section, ...]:
        """Its sections; in the full form, one dense section a tensor, in order of the buffer."""
        if not self.full:
            return self.sections
        return full_sections(manifest)

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


def full_sections(manifest: Manifest) -> tuple[Section, ...]:
    """Where the tensors lie in the full form: larger items first, so that nothing needs padding."""
    order = sorted(range(len(manifest.tensors)), key=lambda i: (-manifest.tensors[i].itemsize, i))
    sections = []
    at = HEADER.size
    for index in order:
        spec = manifest.tensors[index]
        if spec.numel:
            sections.append(
                Section(index, Encoding.DENSE, spec.itemsize, spec.numel, spec.numel, at)
            )
            at += spec.nbytes
    return tuple(sections)

"""From what changed to the one buffer: per tensor the smallest encoding, in canonical order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...messages.manifest import Manifest
from .bits import BLOCK, bits_dtype, indices
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
    blocks_of,
    fits_sections,
    full_nbytes,
    lay_out,
    table_end,
)
from .patch import Patch, full_table
from .timing import to_device

# Σ 2^(56 - 7i): multiplies eight bytes of 0 or 1 so that their bits meet in the top byte.
_GATHER_BITS = sum(1 << (56 - 7 * i) for i in range(8))


@dataclass(frozen=True, slots=True)
class Piece:
    """What changed in elements start … start + numel - 1 of a tensor (start: a whole block).

    `counts`: int32 [blocks]. Either `positions` (int16 [count]) or `mask_bits` (uint8,
    [ceil(numel / 8)]) says where; `values`: integer bits [count].
    """

    start: int
    numel: int
    counts: Tensor
    positions: Tensor | None
    mask_bits: Tensor | None
    values: Tensor


@dataclass(frozen=True, slots=True)
class Draft:
    """One changed tensor on its way into a patch.

    `dense` gives the whole tensor's bits, in order, should that be the smallest; None if they are
    not known. `whole` says that there are no pieces, only that.
    """

    index: int
    itemsize: int
    numel: int
    count: int
    pieces: Sequence[Piece]
    dense: Callable[[], Iterable[Tensor]] | None
    whole: bool = False


@lru_cache(maxsize=16)
def _spread(device: torch.device) -> Tensor:
    """For each byte its eight bits as eight bytes: int64 [256]."""
    rows = [sum(((byte >> i) & 1) << (8 * i) for i in range(8)) for byte in range(256)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def pack_mask(mask_N: Tensor) -> Tensor:
    """bool [N] to uint8 [ceil(N / 8)], lowest bit first."""
    numel = mask_N.numel()
    if numel % 8 or mask_N.data_ptr() % 8 or mask_N.storage_offset() % 8:
        padded = torch.zeros((numel + 7) & ~7, dtype=torch.bool, device=mask_N.device)
        padded[:numel] = mask_N
        mask_N = padded
    words = mask_N.view(torch.uint8).view(torch.int64)
    return ((words * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack_mask(bits_B: Tensor, numel: int) -> Tensor:
    """uint8 [ceil(N / 8)] to bool [N]: what pack_mask undoes."""
    words = _spread(bits_B.device).index_select(0, bits_B.to(torch.int32))
    return words.view(torch.bool)[:numel]


def counts_of(idx_N: Tensor, blocks: int) -> Tensor:
    """How many of the ascending `idx_N` (int64) fall into each block of 65,536: int32 [blocks]."""
    if blocks == 1:
        return torch.full((1,), idx_N.numel(), dtype=torch.int32, device=idx_N.device)
    edges = torch.arange(0, (blocks + 1) << 16, BLOCK, dtype=torch.int64, device=idx_N.device)
    return torch.searchsorted(idx_N, edges).diff().to(torch.int32)


def global_index(positions_N: Tensor, counts_K: Tensor, first_block: int) -> Tensor:
    """Positions in blocks to element indices: int64 [N], block 0 of `counts_K` is `first_block`."""
    idx_N = positions_N.to(torch.int64).bitwise_and_(BLOCK - 1)
    blocks = counts_K.numel()
    if blocks == 1:
        return idx_N.add_(first_block << 16) if first_block else idx_N
    bases_K = torch.arange(
        first_block << 16,
        (first_block + blocks) << 16,
        BLOCK,
        dtype=torch.int64,
        device=idx_N.device,
    )
    return idx_N.add_(
        torch.repeat_interleave(bases_K, counts_K.to(torch.int64), output_size=idx_N.numel())
    )


def index_piece(start: int, numel: int, idx_N: Tensor, values_N: Tensor) -> Piece:
    """The piece whose elements idx_N (int64, ascending, counted from `start`) have new values."""
    counts = counts_of(idx_N, blocks_of(numel))
    return Piece(start, numel, counts, idx_N.to(torch.int16), None, values_N)


def piece_of_mask(start: int, mask_N: Tensor, new_N: Tensor) -> Piece:
    """mask_piece or index_piece, whichever is smaller to hold."""
    idx_N = indices(mask_N)
    numel = mask_N.numel()
    counts = counts_of(idx_N, blocks_of(numel))
    values_N = new_N.index_select(0, idx_N)
    if idx_N.numel() * 16 > numel:
        return Piece(start, numel, counts, None, pack_mask(mask_N), values_N)
    return Piece(start, numel, counts, idx_N.to(torch.int16), None, values_N)


def _positions(piece: Piece) -> Tensor:
    if piece.positions is not None:
        return piece.positions
    assert piece.mask_bits is not None
    return indices(unpack_mask(piece.mask_bits, piece.numel)).to(torch.int16)


def _mask_bits(piece: Piece) -> Tensor:
    if piece.mask_bits is not None:
        return piece.mask_bits
    assert piece.positions is not None
    mask = torch.zeros(piece.numel, dtype=torch.bool, device=piece.values.device)
    mask.index_fill_(0, global_index(piece.positions, piece.counts, 0), True)
    return pack_mask(mask)


def _join(parts: Sequence[Tensor], out: Tensor) -> None:
    if len(parts) == 1:
        out.copy_(parts[0])
    else:
        torch.cat([part.to(out.device) for part in parts], out=out)


def _write_dense(patch: Patch, section: Section, parts: Iterable[Tensor]) -> None:
    out = patch.values(section)
    at = 0
    for part in parts:
        out[at : at + part.numel()].copy_(part)
        at += part.numel()
    assert at == section.numel


def write(patch: Patch, section: Section, draft: Draft) -> None:
    """Write the arrays of a section that was laid out for this draft."""
    if section.encoding is Encoding.DENSE:
        assert draft.dense is not None
        _write_dense(patch, section, draft.dense())
        return
    counts = patch.counts(section)
    if len(draft.pieces) == 1 and draft.pieces[0].numel == section.numel:
        counts.copy_(draft.pieces[0].counts)
    else:
        counts.zero_()
        for piece in draft.pieces:
            first = piece.start >> 16
            counts[first : first + piece.counts.numel()].copy_(piece.counts)
    if section.encoding is Encoding.SPARSE:
        _join([_positions(piece) for piece in draft.pieces], patch.positions(section))
    else:
        places = patch.mask_bits(section)
        if sum(piece.numel for piece in draft.pieces) != section.numel:
            places.zero_()
        for piece in draft.pieces:
            found = _mask_bits(piece)
            places[piece.start >> 3 : (piece.start >> 3) + found.numel()].copy_(found)
    _join([piece.values for piece in draft.pieces], patch.values(section))


def _gaps(table: Table) -> Column:
    """The bytes of a patch that no array covers, by their places.

    Equal patches are equal bytes only if these are zero.
    """
    first = np.concatenate(
        [
            [table_end(0) + ENTRY.itemsize * len(table)],
            table.offset + 4 * table.blocks,
            table.places_offset + table.places_nbytes,
            table.values_offset + table.carried * table.itemsize,
        ]
    )
    stop = np.concatenate(
        [[table_end(len(table))], table.places_offset, table.values_offset, table.end]
    )
    sizes = stop - first
    ends = sizes.cumsum()
    return np.repeat(first - ends + sizes, sizes) + np.arange(ends[-1])


def begin(
    table: Table,
    *,
    manifest_hash: str,
    numel: int,
    dense_nbytes: int,
    base_version: int,
    version: int,
    changed: int,
    device: torch.device,
    manifest: Manifest | None = None,
    full: bool = False,
) -> Patch:
    """A patch on `device` with header, section table (none if it is `full`) and zeros between its
    arrays; these are still to be written."""
    header = Header(
        form=Form.FULL if full else Form.SECTIONS,
        sections=0 if full else len(table),
        manifest_hash=manifest_hash,
        base_version=base_version,
        version=version,
        changed=changed,
        numel=numel,
        dense_nbytes=dense_nbytes,
        nbytes=full_nbytes(dense_nbytes) if full else table.nbytes,
    )
    buffer = torch.empty(header.nbytes, dtype=torch.uint8, device=device)
    patch = Patch(buffer, header, Table.empty() if full else table, manifest)
    start = np.frombuffer(patch.start(), np.int64)
    gaps = np.zeros(0, np.int64) if full else _gaps(table)
    start_on, gaps_on = to_device(device, start, gaps)
    buffer[: start.nbytes].view(torch.int64).copy_(start_on)
    if full:
        buffer[HEADER.size + dense_nbytes :].zero_()
    else:
        buffer.index_fill_(0, gaps_on, 0)
    return patch


def assemble(
    drafts: Sequence[Draft],
    *,
    manifest_hash: str,
    numel: int,
    dense_nbytes: int,
    base_version: int,
    version: int,
    device: torch.device,
    manifest: Manifest | None = None,
    dense_of: Callable[[int], Iterable[Tensor]] | None = None,
) -> Patch:
    """Lay out drafts (ascending by index) as a patch on `device`.

    The full form is taken where the sectioned one would be larger than dense · 1.01 + 1024 bytes;
    `dense_of` then gives the bits of any tensor (by its index in `manifest`).
    """
    figures = np.array(
        [(draft.index, draft.itemsize, draft.numel, draft.count) for draft in drafts], np.int64
    ).reshape(-1, 4)
    table = lay_out(
        *figures.T,
        dense=np.array([draft.dense is not None for draft in drafts], np.bool_),
        whole=np.array([draft.whole for draft in drafts], np.bool_),
    )
    changed = numel if base_version == ANCHOR else sum(draft.count for draft in drafts)
    full = (
        dense_of is not None
        and manifest is not None
        and table.nbytes > full_nbytes(dense_nbytes)
        and not fits_sections(table.nbytes, dense_nbytes)
    )
    patch = begin(
        table,
        manifest_hash=manifest_hash,
        numel=numel,
        dense_nbytes=dense_nbytes,
        base_version=base_version,
        version=version,
        changed=changed,
        device=device,
        manifest=manifest,
        full=full,
    )
    if full:
        assert manifest is not None
        assert dense_of is not None
        for section in full_table(manifest).sections:
            _write_dense(patch, section, dense_of(section.index))
    else:
        for section, draft in zip(table.sections, drafts, strict=True):
            write(patch, section, draft)
    return patch


def empty_bits(numel: int, itemsize: int, device: torch.device) -> Tensor:
    """Uninitialised integer bits [numel], aligned for any view."""
    return torch.empty(numel, dtype=bits_dtype(itemsize), device=device)

"""What a receiver needs of a patch.

A rank of a trainer has a patch in the coordinates of its local tensors; a worker takes of these the
parts of a composed layout (messages.compose.through). Either all get the whole patch and take their
parts of it, or each gets a patch of its parts alone.

N: elements of a patch that are looked at together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...messages.layout import Layout
from ...messages.manifest import Manifest
from .bits import indices, quiet
from .decode import SPAN_BLOCKS, section_counts, span_index, span_values, spans_within
from .encode import Draft, Piece, begin, index_piece, write
from .layout import Column, Encoding, Flags, Section, Table, lay_out
from .parts import Parts, Region, Run, parts_of
from .patch import Patch
from .sieve import Sifted, sieve_of
from .tensors import require_hash


def restrict(patch: Patch, parts: Layout, manifest: Manifest) -> Patch:
    """The elements of a patch that lie in the parts of a layout, as a patch of the same manifest.

    `manifest` is the patch's, and the layout fits it (ManifestMismatch). The result has its base
    and version and lies on its device; each element that a part holds is in it once, and encodings
    are chosen anew. Applied by that layout it leaves what the whole patch would. Of a dense section
    all elements in the parts count as changed, for which of them were is not known. Where nothing
    is left out it is the patch itself; so it is for an anchor, which carries everything or is none.

    The patch must be sound: check() one that came from elsewhere. O(elements that it carries); but
    for what is kept and a byte for each element looked at, temporaries stay within a chunk or span.
    Runs on the current stream of the patch's device, and waits for it: once for all sparse
    sections, whose operations are as many for many tensors as for few, and a few times for each
    other one.
    """
    require_hash(patch.manifest_hash, manifest, f"patch {patch.base_version} → {patch.version}")
    known = parts_of(parts, manifest)
    if patch.base_version is None:
        return patch
    device = patch.buffer.device
    table = patch.table_of(manifest)
    runs = [known.runs.get(at) for at in table.index.tolist()]
    if all(some and some[0].whole for some in runs):
        return patch
    held = np.array([some is not None for some in runs])
    sparse = held & _stay_sparse(table)
    with quiet():
        drafts = _drafts(patch, np.flatnonzero(held & ~sparse), known, manifest)
        count = np.zeros_like(table.count)
        for row, draft in drafts.items():
            count[row] = draft.count
        sifted = None
        if sparse.any():
            sifted = Sifted(patch, np.flatnonzero(sparse), sieve_of(known, device))
            count[sifted.rows] = sifted.kept_S
        whole = np.zeros_like(held)
        whole[[row for row, draft in drafts.items() if draft.whole]] = True
        everything = whole | (table.encoding != Encoding.DENSE)
        if everything.all() and (count == table.count).all():
            return patch
        # In the full form they come by itemsize.
        rows = np.argsort(table.index)
        rows = rows[count[rows] > 0]
        figures = (column[rows] for column in (table.index, table.itemsize, table.numel, count))
        made = begin(
            lay_out(*figures, dense=False, whole=whole[rows]),
            manifest_hash=patch.manifest_hash,
            numel=patch.numel,
            dense_nbytes=patch.dense_nbytes,
            base_version=patch.base_version,
            version=patch.version,
            changed=int(count.sum()),
            device=device,
            manifest=manifest,
        )
        places = np.zeros_like(rows, shape=len(table))
        places[rows] = np.arange(len(rows))
        for row, draft in drafts.items():
            if draft.count:
                write(made, made.sections[places[row]], draft)
        if sifted is not None:
            sifted.write(made, places[sifted.rows])
        return made


def _stay_sparse(table: Table) -> Flags:
    """The sections that are sparse, and will be whatever is left out: bool [sections].

    With fewer elements sparse stays the smallest encoding, if it was so.
    """
    small = lay_out(table.index, table.itemsize, table.numel, table.count, dense=False)
    found: Flags = (table.encoding == Encoding.SPARSE) & (small.encoding == Encoding.SPARSE)
    return found


def _drafts(patch: Patch, rows: Column, known: Parts, manifest: Manifest) -> dict[int, Draft]:
    """What the regions have of the sections in these rows of the table, one by one."""
    if not len(rows):
        return {}
    sections = [patch.sections_of(manifest)[row] for row in rows.tolist()]
    drafts = {}
    counts = section_counts(patch, sections)
    for row, section, counts_K in zip(rows.tolist(), sections, counts, strict=True):
        kept = _kept(patch, section, counts_K, known.runs[section.index])
        drafts[row] = _as_it_was(patch, section) if kept is None else _draft(section, kept)
    return drafts


def _kept(
    patch: Patch, section: Section, counts_K: Tensor, runs: Sequence[Run]
) -> list[Piece] | None:
    """What the regions of these runs have of a section; None if that is all of it."""
    if runs[0].whole:
        return None
    pieces, count = [], 0
    for run in runs:
        for start, numel, idx_N, values_N in _spans(patch, section, counts_K, run):
            kept = indices(_in_regions(idx_N, run.regions))
            if kept.numel():
                here_N = idx_N.index_select(0, kept).sub_(start)
                pieces.append(index_piece(start, numel, here_N, values_N.index_select(0, kept)))
                count += kept.numel()
    return None if count == section.carried else pieces


def _spans(
    patch: Patch, section: Section, counts_K: Tensor, run: Run
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """The blocks of a run, a few at a time: their first element, how many they have, and of those
    that the section carries the indices (int64, ascending) and the values (integer bits)."""
    device = patch.buffer.device

    def within(first_block: int, stop_block: int) -> tuple[int, int]:
        return first_block << 16, min(stop_block << 16, section.numel)

    if section.encoding is Encoding.DENSE:
        values = patch.values(section)
        for first_block in range(run.first_block, run.stop_block, SPAN_BLOCKS):
            start, stop = within(first_block, min(first_block + SPAN_BLOCKS, run.stop_block))
            idx_N = torch.arange(start, stop, dtype=torch.int64, device=device)
            yield start, stop - start, idx_N, values[start:stop]
        return
    for span in spans_within(section, counts_K, run.first_block, run.stop_block):
        start, stop = within(span.first_block, span.stop_block)
        idx_N = span_index(patch, section, span, device)
        yield start, stop - start, idx_N, span_values(patch, section, span, device)


def _in_regions(idx_N: Tensor, regions: Sequence[Region]) -> Tensor:
    """Which of some elements (int64, ascending) any of the regions has: bool [N]."""
    kept_N = torch.zeros(idx_N.numel(), dtype=torch.bool, device=idx_N.device)
    edges_R2 = torch.tensor([(region.low, region.high) for region in regions], device=idx_N.device)
    ends: list[tuple[int, int]] = torch.searchsorted(idx_N, edges_R2).tolist()
    for region, (start, stop) in zip(regions, ends, strict=True):
        if start < stop:
            found, _ = region.find(idx_N[start:stop])
            here_N = kept_N[start:stop]
            if found is None:
                here_N.fill_(True)
            else:
                here_N.index_fill_(0, found, True)
    return kept_N


def _draft(section: Section, pieces: Sequence[Piece]) -> Draft:
    count = sum(piece.values.numel() for piece in pieces)
    # What was left out is not known here, so dense cannot be had.
    return Draft(section.index, section.itemsize, section.numel, count, pieces, None)


def _as_it_was(patch: Patch, section: Section) -> Draft:
    values = patch.values(section)
    index, itemsize, numel, count = section.index, section.itemsize, section.numel, section.count
    if section.encoding is Encoding.DENSE:
        return Draft(index, itemsize, numel, count, (), lambda: (values,), whole=True)
    sparse = section.encoding is Encoding.SPARSE
    piece = Piece(
        0,
        numel,
        patch.counts(section),
        patch.positions(section) if sparse else None,
        None if sparse else patch.mask_bits(section),
        values,
    )
    return Draft(index, itemsize, numel, count, (piece,), None)

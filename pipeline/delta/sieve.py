"""What a layout's regions have of the sparse sections of a patch, found for all tensors at once.

How many operations that takes depends on how many elements there are, not on how many tensors hold
them: on a GPU a launch costs more than the elements of most tensors.

S: sections; K: their blocks; N: elements that are looked at together, a chunk; M: those of them
that are kept; C: cuts, each what one chunk has of one section; P: pairs of a block and a region
that reaches into it; B, T: blocks and tensors of the manifest.
"""

from __future__ import annotations

from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .bits import BLOCK, bits_dtype, indices
from .layout import Column, blocks_of
from .parts import Parts, Region
from .patch import Patch, columns_of
from .timing import Mark, to_device

#: Elements of a chunk: their temporaries take some 250 MB of a device, or a few of a CPU's cache.
CHUNK = 1 << 22
CHUNK_CPU = 1 << 18
#: A position in a block is added to an index of an inner dimension in 32 bits.
_MOST_INNER = 1 << 30
#: In a smaller buffer 32 bits say where something lies.
NARROW_NBYTES = 1 << 31


class Sieve:
    """Which elements of each block the regions of a layout have, as tables on a device.

    Let x be an element's C-order index less that of a region's first element. The region has it if
    the digits of x, in the mixed radix of the inner dimensions' sizes, are all below the region's
    extents. The tables have the digits of a block's first element, to which positions are added
    with carry.

    `table`: int32, or int64 where an inner dimension asks for it, [2 + 3 · (levels - 1), P], by
    block: the outermost digit has what is carried into it between two bounds; then digit, size and
    extent of each inner dimension, outer ones first. `pairs_B`: int64 [2, B], the first pair of
    each block, and how many follow it.
    """

    def __init__(self, parts: Parts, device: torch.device) -> None:
        numel_T = columns_of(parts.manifest).numel
        blocks_T = (numel_T + (BLOCK - 1)) >> 16
        blocks = int(blocks_T.sum())
        #: The first block of each tensor, where those of all are numbered through.
        self.block_T = starts(blocks_T)
        #: The most dimensions by which a region of a tensor is found.
        self.levels_T = np.ones_like(numel_T)
        for region in parts.regions:
            self.levels_T[region.tensor] = max(self.levels_T[region.tensor], len(region.dims))
        levels = int(self.levels_T.max(initial=1))
        blocks_P = [self.block_T[region.tensor] + _reached(region) for region in parts.regions]
        many_B = np.zeros(blocks, np.int64)
        for reached in blocks_P:
            many_B[reached] += 1
        # A block that no region reaches has a pair for which every element is out of bounds.
        bare = np.flatnonzero(many_B == 0)
        many_B[bare] = 1
        #: The most pairs that a block of a tensor has.
        self.depth_T = np.ones_like(numel_T)
        if blocks:
            some_T = numel_T > 0
            self.depth_T[some_T] = np.maximum.reduceat(many_B, self.block_T[some_T])
        nothing = np.ones((2 + 3 * (levels - 1), len(bare)), np.int64)
        table = np.concatenate([*(_pairs(region, levels) for region in parts.regions), nothing], 1)
        table = table[:, np.argsort(np.concatenate([*blocks_P, bare]), kind="stable")]
        pairs_B = np.stack([starts(many_B), many_B - 1])
        self.pairs_B, self.table = to_device(device, pairs_B, table)
        if table[3::3].max(initial=0) < _MOST_INNER:
            self.table = self.table.to(torch.int32)
        Mark(device).wait()  # other streams will read the tables

    def kind(self, tensor_S: Column) -> Column:
        """A number for tensors of which looking at an element costs the same: below 2^16."""
        depth_S = np.ceil(np.log2(self.depth_T[tensor_S])).astype(np.int64)
        return self.levels_T[tensor_S] << 8 | depth_S

    def mask(self, tensor_S: Column, pairs_K: Tensor, block_N: Tensor, x_N: Tensor) -> Tensor:
        """Which of some elements any region has: bool [N].

        They are elements of the tensors tensor_S, at positions x_N (int32) of the blocks whose
        places in `pairs_K` (columns of pairs_B) are block_N (int32).
        """
        depth, levels = int(self.depth_T[tensor_S].max()), int(self.levels_T[tensor_S].max())
        kept_N: Tensor | None = None
        for at in range(depth):
            first_K, more_K = pairs_K
            pair_K = first_K + more_K.clamp(max=at) if at else first_K
            rows = self.table[: 3 * levels - 1].index_select(1, pair_K)
            low_N, high_N, *inner = (row.index_select(0, block_N) for row in rows)
            carry_N, inside_N = x_N, None
            for level in reversed(range(levels - 1)):
                digit_N, size_N, extent_N = inner[3 * level : 3 * level + 3]
                digit_N += carry_N
                carry_N = torch.div(digit_N, size_N, rounding_mode="trunc")
                here_N = digit_N.sub_(carry_N * size_N) < extent_N
                inside_N = here_N if inside_N is None else inside_N.logical_and_(here_N)
            here_N = (carry_N >= low_N).logical_and_(carry_N < high_N)
            inside_N = here_N if inside_N is None else inside_N.logical_and_(here_N)
            kept_N = inside_N if kept_N is None else kept_N.logical_or_(inside_N)
        assert kept_N is not None
        return kept_N


def _reached(region: Region) -> Column:
    """The blocks of its tensor that a region reaches into."""
    return np.arange(region.low >> 16, blocks_of(region.high))


def _pairs(region: Region, levels: int) -> npt.NDArray[np.int64]:
    """The columns of a region's table, one for each block that it reaches into."""
    x_P = (_reached(region) << 16) - region.low
    inner: list[Column] = []
    for dim in reversed(region.dims[1:]):
        x_P, digit_P = np.divmod(x_P, dim.size)
        inner = [digit_P, np.full_like(x_P, dim.size), np.full_like(x_P, dim.extent), *inner]
    # Where it has fewer dimensions: of size 1, so that all is carried, and 0 is below 1.
    while len(inner) < 3 * (levels - 1):
        inner += [np.zeros_like(x_P), np.ones_like(x_P), np.ones_like(x_P)]
    low_P, high_P = (np.clip(edge - x_P, 0, BLOCK) for edge in (0, region.dims[0].extent))
    return np.stack([low_P, high_P, *inner])


_sieves: WeakKeyDictionary[Parts, dict[torch.device, Sieve]] = WeakKeyDictionary()


def sieve_of(parts: Parts, device: torch.device) -> Sieve:
    """The sieve of a layout's parts, remembered as long as they are."""
    of_device = _sieves.setdefault(parts, {})
    if device not in of_device:
        of_device[device] = Sieve(parts, device)
    return of_device[device]


class Sifted:
    """Some sparse sections of a patch, and which of their elements the regions of a layout have.

    `rows`: the places in the patch's table of one section at least. It waits for the device once.
    While it lives it holds a byte for each element that the sections carry; other temporaries stay
    within a chunk. The patch must be sound.
    """

    def __init__(self, patch: Patch, rows: Column, sieve: Sieve) -> None:
        table = patch.table
        kind_S = table.itemsize[rows] << 16 | sieve.kind(table.index[rows])
        order = np.argsort(kind_S, kind="stable")
        #: Their places in the table: sections whose elements are looked at alike are together.
        self.rows = rows = rows[order]
        self._patch = patch
        self._blocks_S = table.blocks[rows]
        self._block_S = starts(self._blocks_S)
        self._element_S = starts(table.count[rows])
        # What leads from an element's number to where its position and its value lie.
        self._positions_S = table.places_offset[rows] // 2 - self._element_S
        self._values_S = table.values_offset[rows] // table.itemsize[rows] - self._element_S
        self._cut(kind_S[order], int(table.count[rows].sum()))
        self._sift(sieve)

    def _cut(self, kind_S: Column, numel: int) -> None:
        """Cut the elements, numbered through all sections, to chunks of one kind, these to cuts."""
        each = CHUNK_CPU if self._patch.buffer.device.type == "cpu" else CHUNK
        edges = [*self._element_S[np.flatnonzero(np.diff(kind_S, prepend=0))].tolist(), numel]
        #: The first element of each chunk, and the end of the last.
        self._edges = [at for ends in pairwise(edges) for at in range(*ends, each)] + [numel]
        edges_C = np.union1d(self._element_S, self._edges)
        self._section_C = np.searchsorted(self._element_S, edges_C[:-1], "right") - 1
        #: The first cut of each section, and the cuts of each chunk.
        self._cut_S = np.searchsorted(edges_C, self._element_S)
        first_cuts = np.searchsorted(edges_C, self._edges)
        self._cuts = [slice(*ends) for ends in pairwise(first_cuts.tolist())]
        #: Elements of a chunk that lie before a cut, and up to its end.
        base_C = np.repeat(self._edges[:-1], np.diff(first_cuts))
        self._base_C, self._stop_C = base_C, edges_C[1:] - base_C

    def _sift(self, sieve: Sieve) -> None:
        table, buffer = self._patch.table, self._patch.buffer
        device, tensor_S = buffer.device, table.index[self.rows]
        counts_S = table.offset[self.rows] // 4 - self._block_S
        blocks_S = sieve.block_T[tensor_S] - self._block_S
        shift_S, stop_C, many_S = to_device(
            device,
            np.stack([counts_S, blocks_S, self._positions_S]),
            self._stop_C,
            self._blocks_S,
        )
        shift_K, at_K = _spread(shift_S, many_S, int(self._blocks_S.sum()))
        ends_K = buffer.view(torch.int32).index_select(0, at_K + shift_K[0]).cumsum(0)
        pairs_K = sieve.pairs_B.index_select(1, at_K.add_(shift_K[1]))
        address = torch.int32 if buffer.numel() < NARROW_NBYTES else torch.int64
        positions_K = shift_K[2].to(address)
        #: Of each block how many elements are kept.
        self._kept_K = torch.zeros_like(ends_K, dtype=torch.int32)
        self._masks: list[Tensor] = []
        kept: list[Tensor] = []
        for cuts, (start, stop) in zip(self._cuts, pairwise(self._edges), strict=True):
            first, last = self._section_C[cuts.start], self._section_C[cuts.stop - 1]
            blocks = slice(self._block_S[first], self._block_S[last] + self._blocks_S[last])
            stop_K = ends_K[blocks].clamp(start, stop).sub_(start)
            here_K = _sizes(stop_K).to(torch.int32)
            block_N = torch.repeat_interleave(here_K, output_size=stop - start)
            at_N = positions_K[blocks].index_select(0, block_N)
            at_N += torch.arange(start, stop, dtype=address, device=device)
            x_N = buffer.view(torch.int16).index_select(0, at_N).to(torch.int32)
            x_N &= BLOCK - 1
            mask_N = sieve.mask(tensor_S[first : last + 1], pairs_K[:, blocks], block_N, x_N)
            before_N = torch.zeros(stop - start + 1, dtype=torch.int32, device=device)
            torch.cumsum(mask_N, 0, dtype=torch.int32, out=before_N[1:])
            self._kept_K[blocks].add_(_sizes(before_N.index_select(0, stop_K)))
            kept.append(before_N.index_select(0, stop_C[cuts]))
            self._masks.append(mask_N)
        upto_C = torch.cat(kept).cpu().numpy().astype(np.int64)
        #: How many elements of each cut are kept, and of those of its chunk before it.
        self._before_C = np.append(0, upto_C[:-1])
        self._before_C[[cuts.start for cuts in self._cuts]] = 0
        self._kept_C = upto_C - self._before_C
        #: How many of each section, in the order of `rows`.
        self.kept_S: Column = np.add.reduceat(self._kept_C, self._cut_S)

    def write(self, out: Patch, rows: Column) -> None:
        """Write what is kept to a patch on the same device, whose table has it as sparse sections.

        `rows`: the place there of each section that keeps something; those of others are not used.
        Enqueued on the current stream.
        """
        some_S = self.kept_S > 0
        if not some_S.any():
            return
        device, table, section_C = out.buffer.device, out.table, self._section_C
        rows = np.where(some_S, rows, 0)
        blocks_S, row_C = self._blocks_S[some_S], rows[section_C]
        starts_S = starts(blocks_S)
        # What earlier cuts of a section keep lies before what a cut does.
        rank_C = starts(self._kept_C)
        rank_C = rank_C - rank_C[self._cut_S][section_C] - self._before_C
        moves_C = (
            self._positions_S[section_C] + self._base_C,
            table.places_offset[row_C] // 2 + rank_C,
            self._values_S[section_C] + self._base_C,
            table.values_offset[row_C] // table.itemsize[row_C] + rank_C,
        )
        counts_S = self._block_S[some_S], table.offset[rows[some_S]] // 4
        shift_C, kept_C, shift_S, many_S = to_device(
            device, np.stack(moves_C), self._kept_C, np.stack(counts_S) - starts_S, blocks_S
        )
        shift_K, at_K = _spread(shift_S, many_S, int(blocks_S.sum()))
        kept_K = self._kept_K.index_select(0, at_K + shift_K[0])
        out.buffer.view(torch.int32).scatter_(0, at_K.add_(shift_K[1]), kept_K)
        for cuts, mask_N in zip(self._cuts, self._masks, strict=True):
            kept = int(self._kept_C[cuts].sum())
            if not kept:
                continue
            from_M, to_M = _places(mask_N, kept), torch.arange(kept, device=device)
            cut_M = torch.repeat_interleave(kept_C[cuts], output_size=kept)
            itemsize = int(self._patch.table.itemsize[self.rows[section_C[cuts.start]]])
            for row, dtype in ((0, torch.int16), (2, bits_dtype(itemsize))):
                source_M = shift_C[row, cuts].index_select(0, cut_M).add_(from_M)
                target_M = shift_C[row + 1, cuts].index_select(0, cut_M).add_(to_M)
                moved_M = self._patch.buffer.view(dtype).index_select(0, source_M)
                out.buffer.view(dtype).scatter_(0, target_M, moved_M)


def starts(sizes: Column) -> Column:
    """Where each begins that lies behind those before it."""
    found: Column = sizes.cumsum() - sizes
    return found


def _sizes(ends_K: Tensor) -> Tensor:
    """How much lies between each end and the one before it."""
    return torch.cat([ends_K[:1], ends_K.diff()])


def _spread(rows_S: Tensor, blocks_S: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """What sections have, for each of their blocks, and the blocks' numbers."""
    section_K = torch.repeat_interleave(blocks_S, output_size=blocks)
    return rows_S.index_select(1, section_K), torch.arange(blocks, device=rows_S.device)


def _places(mask_N: Tensor, kept: int) -> Tensor:
    """Where a mask is set that is at `kept` places: int64. The host does not wait."""
    if mask_N.device.type == "cpu":
        return indices(mask_N)
    return torch.nonzero_static(mask_N, size=kept).view(-1)

"""What a layout's regions have of the sparse sections of a patch, found for all tensors at once.

How many operations that takes depends on how many elements there are, not on how many tensors hold
them: on a GPU a launch costs more than the elements of most tensors.

S: sections; K: their blocks; N: elements that are looked at together, a chunk; C: cuts, each what
one chunk has of one section; P: pairs of a block and a region that reaches into it; B, T: blocks
and tensors of the manifest; M: elements of a chunk that are kept.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from .bits import BLOCK, bits_dtype, indices
from .layout import Column, blocks_of
from .parts import Parts, Region
from .patch import Patch, columns_of
from .timing import Mark, to_device

#: Elements of a chunk: their temporaries fit a CPU's cache, or some 250 MB of a device.
CHUNK_CPU = 1 << 16
CHUNK = 1 << 22
#: A position in a block is added to an index of an inner dimension in 32 bits.
_MOST_INNER = 1 << 30


class Sieve:
    """Which elements of each block the regions of a layout have, as tables on a device.

    An element is in a region if x, its C-order index less that of the region's first element, has
    in the mixed radix of the inner dimensions' sizes only digits below the region's extents. Of a
    block's first element the digits are in the table; a position is added to them with carry.

    Blocks of all tensors are numbered through; block b has the pairs `first_B`[b] and on,
    `many_B`[b] of them, at least one (int64). `table`: int32, or int64 if a dimension asks for it,
    [2 + 3 · (levels - 1), P]: bounds of what may be carried into the outermost digit; then of each
    inner dimension, outer ones first, digit, size, extent.
    """

    def __init__(self, parts: Parts, device: torch.device) -> None:
        numel_T = columns_of(parts.manifest).numel
        blocks_T = (numel_T + (BLOCK - 1)) >> 16
        tensors = len(blocks_T)
        #: The number of a tensor's first block: int64 [T].
        self.block_T = starts(blocks_T)
        #: The most regions that reach into one block of a tensor, and the most dimensions that one
        #: of its regions is found by: int64 [T].
        self.depth_T = np.ones(tensors, np.int64)
        self.levels_T = np.ones(tensors, np.int64)
        for region in parts.regions:
            self.levels_T[region.tensor] = max(self.levels_T[region.tensor], len(region.dims))
        levels = max(self.levels_T, default=1)
        found = [_pairs(region, levels) for region in parts.regions]
        blocks = int(blocks_T.sum())
        block_P = [
            self.block_T[region.tensor] + np.arange(region.low >> 16, blocks_of(region.high))
            for region in parts.regions
        ]
        bare = np.setdiff1d(np.arange(blocks), np.concatenate([[], *block_P]))
        nothing = np.ones((2 + 3 * (levels - 1), len(bare)), np.int64)
        order = np.argsort(np.concatenate([*block_P, bare]), kind="stable")
        table = np.concatenate([*found, nothing], axis=1)[:, order]
        many_B = np.bincount(np.concatenate([*block_P, bare]).astype(np.int64), minlength=blocks)
        if blocks:
            some = blocks_T > 0
            self.depth_T[some] = np.maximum.reduceat(many_B, self.block_T[some])
        self.first_B = torch.from_numpy(starts(many_B)).to(device)
        self.many_B = torch.from_numpy(many_B).to(device)
        narrow = max(table[3::3].max(initial=0), 0) < _MOST_INNER
        self.table = torch.from_numpy(table.astype(np.int32 if narrow else np.int64)).to(device)
        Mark(device).wait()  # other streams will read the tables

    def mask(
        self, first_K: Tensor, many_K: Tensor, block_N: Tensor, x_N: Tensor, depth: int, levels: int
    ) -> Tensor:
        """Which of the elements at positions x_N (int32) of blocks block_N any region has: bool.

        `block_N` are places in `first_K` and `many_K`, the pairs of some blocks, of which none has
        more than `depth`, nor their regions more dimensions than `levels`.
        """
        table = self.table[: 2 + 3 * (levels - 1)]
        kept_N: Tensor | None = None
        for at in range(depth):
            pair_K = first_K + (many_K - 1).clamp(max=at) if at else first_K
            rows = table.index_select(1, pair_K)
            low_N, high_N, *inner = (row.index_select(0, block_N) for row in rows)
            carry_N, found_N = x_N, None
            for level in reversed(range(levels - 1)):
                digit_N, size_N, extent_N = inner[3 * level : 3 * level + 3]
                digit_N += carry_N
                carry_N = torch.div(digit_N, size_N, rounding_mode="trunc")
                inside_N = digit_N.sub_(carry_N * size_N) < extent_N
                found_N = inside_N if found_N is None else found_N.logical_and_(inside_N)
            inside_N = (carry_N >= low_N).logical_and_(carry_N < high_N)
            found_N = inside_N if found_N is None else found_N.logical_and_(inside_N)
            kept_N = found_N if kept_N is None else kept_N.logical_or_(found_N)
        assert kept_N is not None
        return kept_N


def _pairs(region: Region, levels: int) -> np.ndarray:
    """The columns of a region's table, one for each block that it reaches into."""
    x_P = (np.arange(region.low >> 16, blocks_of(region.high)) << 16) - region.low
    inner: list[Column] = []
    for dim in reversed(region.dims[1:]):
        x_P, digit_P = np.divmod(x_P, dim.size)
        inner = [digit_P, np.full_like(x_P, dim.size), np.full_like(x_P, dim.extent), *inner]
    # No dimension: of size 1 all is carried, and 0 is below 1.
    while len(inner) < 3 * (levels - 1):
        inner += [np.zeros_like(x_P), np.ones_like(x_P), np.ones_like(x_P)]
    bounds = (np.clip(edge - x_P, 0, BLOCK) for edge in (0, region.dims[0].extent))
    return np.stack([*bounds, *inner])


_sieves: WeakKeyDictionary[Parts, dict[torch.device, Sieve]] = WeakKeyDictionary()


def sieve_of(parts: Parts, device: torch.device) -> Sieve:
    """The sieve of a layout's parts, remembered as long as they are."""
    of_device = _sieves.setdefault(parts, {})
    if device not in of_device:
        of_device[device] = Sieve(parts, device)
    return of_device[device]


class Sifted:
    """Some sparse sections of a patch, and which of their elements the regions of a layout have.

    `rows`: their places in the patch's table. Finding it waits for the device once, and takes one
    byte for each element that the sections carry; other temporaries stay within a chunk.
    """

    def __init__(self, patch: Patch, rows: Column, sieve: Sieve) -> None:
        table = patch.table
        rows = rows[np.argsort(table.itemsize[rows], kind="stable")]
        #: Their places in the table: a chunk has elements of one size.
        self.rows = rows
        self._buffer = patch.buffer
        self._itemsize_S = table.itemsize[rows]
        self._blocks_S = table.blocks[rows]
        self._block_S = starts(self._blocks_S)
        self._element_S = starts(table.count[rows])
        self._places_S = table.places_offset[rows] // 2 - self._element_S
        self._values_S = table.values_offset[rows] // self._itemsize_S - self._element_S
        self._cut(int(table.count[rows].sum()))
        self._sift(sieve, table.index[rows], table.offset[rows] // 4 - self._block_S)

    def _cut(self, numel: int) -> None:
        """Cut the elements, numbered through all sections, to chunks and these to cuts."""
        each = CHUNK_CPU if self._buffer.device.type == "cpu" else CHUNK
        sizes = np.flatnonzero(np.diff(self._itemsize_S, prepend=0))
        edges = [*self._element_S[sizes].tolist(), numel]
        #: The first element of each chunk, and the end of the last.
        self._chunks = [
            at
            for start, stop in zip(edges[:-1], edges[1:], strict=True)
            for at in range(start, stop, each)
        ]
        starts_C = np.union1d(self._element_S, np.array(self._chunks, np.int64))
        self._section_C = np.searchsorted(self._element_S, starts_C, "right") - 1
        self._stop_C = np.append(starts_C[1:], numel)
        #: The first cut of each chunk, and of each section; behind the chunks the end of all.
        self._first_cut = np.searchsorted(starts_C, [*self._chunks, numel])
        self._cut_S = np.searchsorted(starts_C, self._element_S)
        self._chunks.append(numel)

    def _sift(self, sieve: Sieve, index_S: Column, counts_S: Column) -> None:
        buffer, device = self._buffer, self._buffer.device
        first_cut, chunks = self._first_cut, self._chunks
        base_C = np.repeat(chunks[:-1], np.diff(first_cut))
        shift_S, stop_C = to_device(
            device,
            np.stack([counts_S, sieve.block_T[index_S] - self._block_S, self._places_S]),
            self._stop_C - base_C,
        )
        shift_K, at_K = self._spread(shift_S, self._blocks_S)
        ends_K = buffer.view(torch.int32).index_select(0, at_K + shift_K[0]).cumsum(0)
        block_K = at_K.add_(shift_K[1])
        first_K = sieve.first_B.index_select(0, block_K)
        many_K = sieve.many_B.index_select(0, block_K)
        places_K = shift_K[2]
        positions = buffer.view(torch.int16)
        #: Of each block how many elements are kept.
        self._kept_K = torch.zeros_like(ends_K, dtype=torch.int32)
        self._masks: list[Tensor] = []
        kept: list[Tensor] = []
        for at, (start, stop) in enumerate(zip(chunks[:-1], chunks[1:], strict=True)):
            cuts = slice(first_cut[at], first_cut[at + 1])
            first, last = self._section_C[cuts][[0, -1]]
            blocks = slice(self._block_S[first], self._block_S[last] + self._blocks_S[last])
            here_S = index_S[first : last + 1]
            stop_K = ends_K[blocks].clamp(start, stop).sub_(start)
            block_N = torch.repeat_interleave(
                _steps(stop_K).to(torch.int32), output_size=stop - start
            )
            at_N = torch.arange(start, stop, device=device)
            at_N += places_K[blocks].index_select(0, block_N)
            x_N = positions.index_select(0, at_N).to(torch.int32).bitwise_and_(BLOCK - 1)
            mask_N = sieve.mask(
                first_K[blocks],
                many_K[blocks],
                block_N,
                x_N,
                int(sieve.depth_T[here_S].max()),
                int(sieve.levels_T[here_S].max()),
            )
            before_N = torch.zeros(stop - start + 1, dtype=torch.int32, device=device)
            torch.cumsum(mask_N, 0, dtype=torch.int32, out=before_N[1:])
            self._kept_K[blocks] += _steps(before_N.index_select(0, stop_K))
            kept.append(before_N.index_select(0, stop_C[cuts]))
            self._masks.append(mask_N)
        ends_C = torch.cat(kept).cpu().numpy().astype(np.int64)
        self._kept_C = np.diff(ends_C, prepend=0)
        self._kept_C[first_cut[:-1]] = ends_C[first_cut[:-1]]
        #: Of each section, in the order of `rows`: int64.
        self.kept_S = np.add.reduceat(self._kept_C, self._cut_S)

    def write(self, out: Patch, rows: Column) -> None:
        """Write what is kept to a patch on the same device, whose table has it as sparse sections.

        `rows`: for each section its place there; of one that keeps nothing it does not matter.
        Enqueued on the current stream.
        """
        buffer, device, to = self._buffer, self._buffer.device, out.table
        some = self.kept_S > 0
        if not some.any():
            return
        rows = np.where(some, rows, rows[some][0])
        blocks_S = self._blocks_S[some]
        from_block_S = self._block_S[some] - starts(blocks_S)
        to_block_S = to.offset[rows[some]] // 4 - starts(blocks_S)
        # From a place among the kept ones of a chunk to that among those of the section.
        before_C = starts(self._kept_C)
        rank_C = -before_C[self._cut_S][self._section_C]
        firsts, chunks = self._first_cut, np.array(self._chunks[:-1])
        many = np.diff(firsts)
        rank_C = rank_C + np.repeat(before_C[firsts[:-1]], many)
        base_C = np.repeat(chunks, many)
        row_C = rows[self._section_C]
        shift_S, shift_C, kept_C = to_device(
            device,
            np.stack([from_block_S, to_block_S]),
            np.stack(
                [
                    self._places_S[self._section_C] + base_C,
                    to.places_offset[row_C] // 2 + rank_C,
                    self._values_S[self._section_C] + base_C,
                    to.values_offset[row_C] // to.itemsize[row_C] + rank_C,
                ]
            ),
            self._kept_C,
        )
        shift_K, at_K = self._spread(shift_S, blocks_S)
        kept_K = self._kept_K.index_select(0, at_K + shift_K[0])
        out.buffer.view(torch.int32).index_copy_(0, at_K.add_(shift_K[1]), kept_K)
        for at, mask_N in enumerate(self._masks):
            cuts = slice(firsts[at], firsts[at + 1])
            kept = int(self._kept_C[cuts].sum())
            if not kept:
                continue
            from_M, to_M = _places(mask_N, kept), torch.arange(kept, device=device)
            cut_M = torch.repeat_interleave(kept_C[cuts], output_size=kept)
            itemsize = int(self._itemsize_S[self._section_C[cuts.start]])
            for row, dtype in ((0, torch.int16), (2, bits_dtype(itemsize))):
                source_M = shift_C[row, cuts].index_select(0, cut_M).add_(from_M)
                target_M = shift_C[row + 1, cuts].index_select(0, cut_M).add_(to_M)
                moved_M = buffer.view(dtype).index_select(0, source_M)
                out.buffer.view(dtype).index_copy_(0, target_M, moved_M)

    def _spread(self, columns_S: Tensor, blocks_S: Column) -> tuple[Tensor, Tensor]:
        """Columns of sections as those of their blocks, and the blocks' numbers: both int64."""
        device, blocks = columns_S.device, int(blocks_S.sum())
        (many_S,) = to_device(device, blocks_S)
        section_K = torch.repeat_interleave(many_S, output_size=blocks)
        return columns_S.index_select(1, section_K), torch.arange(blocks, device=device)


def starts(sizes: Column) -> Column:
    """Where each begins that lies behind those before it."""
    found: Column = sizes.cumsum() - sizes
    return found


def _steps(ends_K: Tensor) -> Tensor:
    """From ends to sizes."""
    return torch.cat([ends_K[:1], ends_K.diff()])


def _places(mask_N: Tensor, kept: int) -> Tensor:
    """Where a mask of so many set elements is set: int64. The host does not wait."""
    if mask_N.device.type == "cpu":
        return indices(mask_N)
    return torch.nonzero_static(mask_N, size=kept).view(-1)

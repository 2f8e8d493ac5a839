"""Searching one tensor for changed bits, chunk by chunk, against the bits that were held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bits import BLOCK, Source, indices
from .encode import Piece, index_piece, piece_of_mask

#: Elements; whole blocks, and few enough for a chunk's temporaries to stay in cache.
CHUNK = 1 << 20
#: Chunks with few changes are joined up to about so many, lest small arrays cost their calls.
JOIN = 1 << 18
_WORDS_FROM = 1 << 14


@dataclass(frozen=True, slots=True)
class Taking:
    """How the held bits of a chunk become the new ones: target[at] = put; all of them without `at`.

    `at` is int32, to hold little for long.
    """

    target: Tensor
    at: Tensor | None
    put: Tensor

    def take(self) -> None:
        """Write the new bits over the held ones."""
        if self.at is None:
            self.target.copy_(self.put)
        else:
            self.target.scatter_(0, self.at.to(torch.int64), self.put)


@dataclass(frozen=True, slots=True)
class Change:
    """A piece of the patch, with what the digest needs: the bits before and after.

    With `idx_N` (int64, from the piece's start) those of the changed elements, else all.
    """

    piece: Piece
    idx_N: Tensor | None
    old_N: Tensor
    new_N: Tensor


@dataclass(frozen=True, slots=True)
class _Few:
    """Few elements of a chunk changed: which (int64, from the chunk's start), and their bits."""

    start: int
    idx_N: Tensor
    old_N: Tensor
    new_N: Tensor
    taking: Taking


@dataclass(frozen=True, slots=True)
class _Many:
    """Much of a chunk changed: a mask over all of it, and its bits before and after."""

    start: int
    mask_N: Tensor
    old_N: Tensor
    new_N: Tensor


def chunks(numel: int) -> Iterator[tuple[int, int]]:
    """The bounds of a tensor's chunks."""
    for start in range(0, numel, CHUNK):
        yield start, min(start + CHUNK, numel)


def _words(bits_N: Tensor, lanes: int) -> Tensor | None:
    """The bits as 64-bit words without the odd end, or None if they lie askew."""
    if bits_N.data_ptr() % 8 or bits_N.storage_offset() % lanes:
        return None
    whole = bits_N.numel() // lanes * lanes
    return (bits_N if whole == bits_N.numel() else bits_N[:whole]).view(torch.int64)


def _find(old_N: Tensor, new_N: Tensor, start: int) -> _Few | _Many | None:
    """What changed between two equally long contiguous 1-D chunks of integer bits."""
    numel = old_N.numel()
    lanes = 8 // old_N.element_size()
    if lanes > 1 and numel >= _WORDS_FROM:
        # Comparing words reads the same bytes and leaves 1/lanes of the mask to search.
        old_W, new_W = _words(old_N, lanes), _words(new_N, lanes)
        if old_W is not None and new_W is not None:
            end = old_W.numel() * lanes
            at_W = indices(old_W != new_W)
            if end == numel or torch.equal(old_N[end:], new_N[end:]):
                if not at_W.numel():
                    return None
                if at_W.numel() * 2 <= old_W.numel():
                    was, now = old_W.index_select(0, at_W), new_W.index_select(0, at_W)
                    lane_N = indices((was ^ now).view(old_N.dtype) != 0)
                    shift = lanes.bit_length() - 1
                    idx_N = at_W.index_select(0, lane_N >> shift).bitwise_left_shift_(shift)
                    idx_N.bitwise_or_(lane_N & (lanes - 1))
                    return _Few(
                        start, idx_N, was.view(old_N.dtype).index_select(0, lane_N),
                        now.view(old_N.dtype).index_select(0, lane_N),
                        Taking(old_W, at_W.to(torch.int32), now),
                    )  # fmt: skip
    mask_N = old_N != new_N
    if numel > BLOCK and int(mask_N.count_nonzero().item()) * 8 > numel:
        return _Many(start, mask_N, old_N, new_N)
    idx_N = indices(mask_N)
    if not idx_N.numel():
        return None
    put = new_N.index_select(0, idx_N)
    taking = Taking(old_N, idx_N.to(torch.int32), put)
    return _Few(start, idx_N, old_N.index_select(0, idx_N), put, taking)


def _joined(few: Sequence[_Few], stop: int) -> Change:
    """Chunks of few changes as one piece: what comes after works on larger arrays."""
    start = few[0].start
    if len(few) == 1:
        idx_N, old_N, new_N = few[0].idx_N, few[0].old_N, few[0].new_N
    else:
        idx_N = torch.cat([found.idx_N + (found.start - start) for found in few])
        old_N = torch.cat([found.old_N for found in few])
        new_N = torch.cat([found.new_N for found in few])
    return Change(index_piece(start, stop - start, idx_N, new_N), idx_N, old_N, new_N)


def scan(
    old: Callable[[int, int], Tensor], new: Source, taken: list[Taking] | None
) -> Iterator[Change]:
    """What changed in one tensor, in pieces that ascend; into `taken` goes what to take over."""
    few: list[_Few] = []
    held = 0
    end = 0
    for start, stop in chunks(new.numel):
        old_N = old(start, stop)
        found = _find(old_N, new.piece(start, stop).to(old_N.device), start)
        if found is None:
            continue
        if isinstance(found, _Few):
            few.append(found)
            if taken is not None:
                taken.append(found.taking)
            held += found.idx_N.numel()
            end = stop
        if few and (held >= JOIN or not isinstance(found, _Few)):
            yield _joined(few, end)
            few, held = [], 0
        if isinstance(found, _Many):
            if taken is not None:
                taken.append(Taking(found.old_N, None, found.new_N))
            piece = piece_of_mask(start, found.mask_N, found.new_N)
            yield Change(piece, None, found.old_N, found.new_N)
    if few:
        yield _joined(few, end)

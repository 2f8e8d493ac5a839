"""Which elements of a tensor a coordinate of a mesh holds, by the placements of a DTensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, product

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from ...messages.boxes import Box

#: Indices along one dimension, in the order in which they are held: neighbours make one range.
Indices = list[range]


def held(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> tuple[Indices, ...]:
    """The indices that one coordinate of a mesh holds, for each dimension of a tensor of `shape`.

    `placements` has one entry for each dimension of the mesh, applied from the first to the last
    as torch does (torch.distributed.tensor._utils.compute_local_shape_and_global_offset): Shard(d)
    cuts what is held along d as torch.chunk does, the last pieces shorter or empty;
    _StridedShard(d, split_factor=k), which FSDP2 over tensor parallelism makes, first chunks it k
    times and takes its piece of each. ValueError for any other placement than these and Replicate.
    """
    found = [[range(size)] for size in shape]
    for count, place, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if isinstance(placement, _StridedShard):
            splits = int(placement.split_factor)
            whole = found[placement.dim]
            pieces = [_chunk(_chunk(whole, splits, s), count, place) for s in range(splits)]
            found[placement.dim] = _joined(run for piece in pieces for run in piece)
        elif isinstance(placement, Shard):
            found[placement.dim] = _chunk(found[placement.dim], count, place)
        elif not isinstance(placement, Replicate):
            raise ValueError(f"its placement {placement} is neither Shard nor Replicate")
    return tuple(found)


def is_first_copy(coordinate: Sequence[int], placements: Sequence[Placement]) -> bool:
    """Whether no coordinate before this one holds the same: one of the copies counts."""
    return not any(
        place
        for place, placement in zip(coordinate, placements, strict=True)
        if isinstance(placement, Replicate)
    )


def boxes_of(indices: Sequence[Indices]) -> Iterator[tuple[Box, tuple[int, ...]]]:
    """The boxes that hold these indices, each with where it begins in the local tensor."""
    starts = [accumulate(map(len, runs), initial=0) for runs in indices]
    along = [list(zip(runs, at, strict=False)) for runs, at in zip(indices, starts, strict=True)]
    for places in product(*along):
        box = Box(tuple(run.start for run, _ in places), tuple(len(run) for run, _ in places))
        yield box, tuple(at for _, at in places)


def _chunk(indices: Indices, count: int, place: int) -> Indices:
    """The piece at `place` of `count`, cut as torch.chunk cuts."""
    size = -(-sum(map(len, indices)) // count)
    begin, end = place * size, (place + 1) * size
    piece = []
    for run in indices:
        if taken := run[max(begin, 0) : max(end, 0)]:
            piece.append(taken)
        begin, end = begin - len(run), end - len(run)  # from the next run's first index
    return piece


def _joined(runs: Iterable[range]) -> Indices:
    joined: Indices = []
    for run in runs:
        if joined and joined[-1].stop == run.start:
            joined[-1] = range(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return joined

"""A small model over several ranks, cut as an engine cuts it: rows, columns, copies."""

import torch

from layouts import contents
from runs import Tensors
from sparsecast import Layout
from sparsecast.messages.layout import box_part
from sparsecast.messages.manifest import Manifest, TensorSpec
from sparsecast.pipeline.delta import manifest_of


def split(tensors: Tensors, ranks: int) -> list[Layout]:
    """The layout of each rank: of what has two dimensions and is no parameter of a layer the rows
    are split, of a layer's weight the columns, and all else every rank has."""
    manifest = manifest_of(tensors)
    return [_rank(manifest, rank, ranks) for rank in range(ranks)]


def fully_sharded(tensors: Tensors, ranks: int) -> list[Layout]:
    """The layout of each rank of a trainer as FSDP cuts it: rows in equal chunks, the last ones
    with less or none; what has no rows every rank has."""
    manifest = manifest_of(tensors)
    layouts = []
    for rank in range(ranks):
        specs, parts = [], []
        for spec in manifest.tensors:
            begin, shape = [0] * len(spec.shape), list(spec.shape)
            if spec.shape:
                chunk = -(-spec.shape[0] // ranks)
                begin[0] = min(rank * chunk, spec.shape[0])
                shape[0] = min(chunk, spec.shape[0] - begin[0])
            specs.append(TensorSpec(spec.name, spec.dtype, tuple(shape)))
            parts.append(box_part(spec.name, begin, shape, spec.name))
        layouts.append(Layout(tensors=tuple(specs), parts=tuple(parts)))
    return layouts


def held(layout: Layout, tensors: Tensors) -> Tensors:
    """What the rank of this layout holds of these weights."""
    return contents(layout, tensors)


def _rank(manifest: Manifest, rank: int, ranks: int) -> Layout:
    specs, parts = [], []
    for spec in manifest.tensors:
        begin, shape, counted = [0] * len(spec.shape), list(spec.shape), rank == 0
        if len(spec.shape) == 2 and spec.numel:
            dim, counted = (1 if spec.name.startswith("layer") else 0), True
            begin[dim] = spec.shape[dim] * rank // ranks
            shape[dim] = spec.shape[dim] * (rank + 1) // ranks - begin[dim]
        local = f"mine.{spec.name}"
        specs.append(TensorSpec(local, spec.dtype, tuple(shape)))
        parts.append(box_part(spec.name, begin, shape, local, counted=counted))
    return Layout(tensors=tuple(specs), parts=tuple(parts))


def same(layouts: list[Layout], theirs: list[Tensors], tensors: Tensors) -> bool:
    """Whether every rank holds just what its layout says of these weights."""
    return all(
        torch.equal(_bytes(mine[name]), _bytes(wanted))
        for layout, mine in zip(layouts, theirs, strict=True)
        for name, wanted in held(layout, tensors).items()
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)

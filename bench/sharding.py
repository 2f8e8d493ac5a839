"""How ranks of a trainer and of an engine share a model, and what of a patch is whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shapes import Cut, Model, Shapes, Tensors, make_weights, train_step
from sparsecast import Layout, diff, engine_layout
from sparsecast.messages.compose import through
from sparsecast.messages.layout import box_part
from sparsecast.messages.manifest import Manifest, TensorSpec
from sparsecast.pipeline.delta.parts import parts_of
from sparsecast.pipeline.delta.routing import restrict

#: Rows of the embedding come in such multiples: every rank has as many, and nothing is padded.
ROWS = 64
#: Key-value heads, so that up to four ranks of an engine have one of their own. With the 64 rows a
#: head that Qwen2.5-0.5B has there would be two of them, and 14 heads of queries.
KEY_VALUE_HEADS = 4


def even_cut(elements: int, model: Model) -> Cut:
    """As Cut.of_elements, with a number of rows that all numbers of ranks divide."""
    cut = Cut.of_elements(elements, model)
    return Cut(cut.layers, cut.rows // ROWS * ROWS, model)


def manifest_of_shapes(shapes: Shapes) -> Manifest:
    """What a trainer publishes of such a model."""
    return Manifest(tensors=tuple(TensorSpec(n, "bfloat16", shape) for n, shape in shapes.items()))


def rows_of(tensor: Tensor, ranks: int) -> Sequence[Tensor]:
    """The tensor as FSDP2 shards it, as views: rows, or what a tensor of one dimension has."""
    return tensor.chunk(ranks)


def by_rows(manifest: Manifest, ranks: int) -> list[Layout]:
    """What each rank of the trainer has, as placements of DTensors say it (rows_of)."""
    return [_rows(manifest, ranks, rank) for rank in range(ranks)]


def _rows(manifest: Manifest, ranks: int, rank: int) -> Layout:
    specs, parts = [], []
    for spec in manifest.tensors:
        each, odd = divmod(spec.shape[0], ranks)
        if odd:
            raise ValueError(f"{ranks} ranks cannot have as many rows each of {spec.name}")
        shape = (each, *spec.shape[1:])
        at = (0,) * len(shape)
        specs.append(TensorSpec(spec.name, spec.dtype, shape))
        parts.append(box_part(spec.name, (rank * each, *at[1:]), shape, spec.name))
    return Layout(tensors=tuple(specs), parts=tuple(parts))


def by_engine(manifest: Manifest, model: Model, ranks: int) -> list[Layout]:
    """What each rank of an engine has: q, k, v and gate, up fused, as vLLM and SGLang hold them."""
    from transformers import Qwen2Config

    config = Qwen2Config(
        hidden_size=model.hidden,
        num_attention_heads=model.hidden * KEY_VALUE_HEADS // model.key_value,
        num_key_value_heads=KEY_VALUE_HEADS,
    )
    return [
        engine_layout(config, manifest, tp_size=ranks, tp_rank=rank, vocabulary_multiple=ROWS)
        for rank in range(ranks)
    ]


class Holding:
    """What a rank holds by a layout of some published tensors, and how it is filled from them."""

    def __init__(self, layout: Layout, manifest: Manifest, device: torch.device | str) -> None:
        parts = parts_of(layout, manifest)
        self.tensors: Tensors = {
            spec.name: torch.zeros(spec.shape, dtype=torch.bfloat16, device=device)
            for spec in layout.tensors
        }
        #: By the published tensor: the box of it that is held, and where, as a view.
        self._places: dict[str, list[tuple[tuple[slice, ...], Tensor]]] = {}
        for region in parts.regions:
            place = region.of(self.tensors[region.part.local])
            self._places.setdefault(region.part.tensor, []).append((region.slices, place))

    def take(self, name: str, published: Tensor) -> None:
        """Copy what is held of a published tensor."""
        for box, place in self._places.get(name, ()):
            place.copy_(published[box])

    def take_all(self, published: Mapping[str, Tensor]) -> None:
        """Copy what is held of each."""
        for name, tensor in published.items():
            self.take(name, tensor)


def count_bytes(
    cut: Cut, trainer: Sequence[Layout], worker: Sequence[Layout], density: float, seed: int
) -> dict[str, Any]:
    """What each rank of a worker owns of one step, and what either way brings it, in bytes.

    `own` is the patch between the rank's own tensors before and after: what nobody could leave out.
    `broadcast`: the patches of all ranks of the trainer, whole; `all_to_all`: of each what lies in
    the rank's parts (routing.restrict).
    """
    manifest = manifest_of_shapes(cut.shapes)
    before = make_weights(cut, seed)
    after = {name: tensor.clone() for name, tensor in before.items()}
    train_step(after, density, torch.Generator().manual_seed(seed + 1))

    def patch_of(layout: Layout) -> Any:
        held = []
        for state in (before, after):
            holding = Holding(layout, manifest, "cpu")
            holding.take_all(state)
            held.append(holding.tensors)
        return diff(*held, base_version=0, version=1)

    patches = [patch_of(layout) for layout in trainer]
    own = [patch_of(layout).nbytes for layout in worker]
    parted = [
        [restrict(patch, through(root, layout), root.local).nbytes for layout in worker]
        for root, patch in zip(trainer, patches, strict=True)
    ]
    received = [sum(of_worker) for of_worker in zip(*parted, strict=True)]
    whole = [patch.nbytes for patch in patches]
    return {
        "own": own,
        "broadcast": sum(whole),
        "all_to_all": received,
        "broadcast_to_own": round(max(sum(whole) / mine for mine in own), 4),
        "all_to_all_to_own": round(
            max(got / mine for got, mine in zip(received, own, strict=True)), 4
        ),
    }

"""A layout read off a rank's tensors: modules, mappings and DTensors, every shard where it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from layouts import contents
from sparsecast import layout_of
from sparsecast.messages.errors import UnsupportedTensor
from sparsecast.messages.layout import Layout, Part, require_whole
from sparsecast.messages.manifest import Manifest, TensorSpec
from sparsecast.pipeline.delta import manifest_of
from sparsecast.workers.layouts.placements import boxes_of, held, is_first_copy


@contextmanager
def mesh_of(rank: int, shape: Sequence[int], names: Sequence[str]) -> Iterator[DeviceMesh]:
    """A mesh as one of its ranks sees it, in a world where nobody else is."""
    world = math.prod(shape)
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", tuple(shape), mesh_dim_names=tuple(names))
    finally:
        dist.destroy_process_group()


def shard(whole: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """What this rank has of a tensor, cut by torch itself and sent to nobody."""
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


# ---- plain tensors


def test_a_module_is_what_it_publishes() -> None:
    """Parameters and buffers under their own names, tied ones once: the identity."""
    module = nn.Sequential(nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5, bias=False))
    module[2].weight = module[0].weight
    layout = layout_of(module)
    assert [spec.name for spec in layout.tensors] == [
        "0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var",
        "1.num_batches_tracked",
    ]  # fmt: skip
    manifest = Manifest(tensors=layout.tensors)
    assert layout.is_identity(manifest)
    layout.require_fit(manifest)
    require_whole([layout], manifest)


def test_names_are_mapped_to_those_of_the_trainer() -> None:
    """A worker whose names have a prefix keeps them; its parts are of the trainer's tensors."""
    tensors = {"engine.a": torch.zeros(2, 3), "engine.b": torch.zeros(()), "extra": torch.zeros(1)}
    manifest = manifest_of({"a": torch.zeros(2, 3), "b": torch.zeros(())})
    for rename in (lambda name: name.removeprefix("engine."), {"engine.a": "a", "engine.b": "b"}):
        layout = layout_of(tensors, exclude=["extra"], rename=rename)
        assert [(part.tensor, part.local) for part in layout.parts] == [
            ("a", "engine.a"),
            ("b", "engine.b"),
        ]
        layout.require_fit(manifest)
        require_whole([layout], manifest)


# ---- placements


def torch_held(
    index: Tensor, mesh_shape: Sequence[int], coordinate: Sequence[int], placements: list[Placement]
) -> Tensor:
    """What a coordinate holds of a tensor, by torch.chunk on the tensor."""

    def piece(tensor: Tensor, dim: int, count: int, place: int) -> Tensor:
        if tensor.shape[dim] == 0:
            return tensor
        chunks = tensor.chunk(count, dim)
        return chunks[place] if place < len(chunks) else tensor.narrow(dim, 0, 0)

    for count, place, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if isinstance(placement, _StridedShard):
            dim, splits = placement.dim, placement.split_factor
            split = [piece(index, dim, splits, s) for s in range(splits)]
            index = torch.cat([piece(part, dim, count, place) for part in split], dim)
        elif isinstance(placement, Shard):
            index = piece(index, placement.dim, count, place)
    return index


@given(data=st.data())
def test_every_coordinate_of_a_mesh_holds_what_torch_gives_it(data: st.DataObject) -> None:
    """Any placements on any mesh, uneven and empty shards too: each coordinate's boxes hold, in
    their places, what cutting the tensor itself gives; together they count every element once."""
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple))
    mesh_shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    dims = st.integers(0, len(shape) - 1)
    placement = st.one_of(
        st.just(Replicate()),
        st.builds(Shard, dims),
        st.builds(lambda dim, k: _StridedShard(dim, split_factor=k), dims, st.integers(1, 3)),
    )
    placements = data.draw(st.tuples(*[placement] * len(mesh_shape)))
    whole = {"t": torch.arange(math.prod(shape)).reshape(shape)}
    layouts = []
    for coordinate in itertools.product(*map(range, mesh_shape)):
        expected = torch_held(whole["t"], mesh_shape, coordinate, list(placements))
        indices = held(shape, mesh_shape, coordinate, placements)
        parts = tuple(
            Part(
                tensor="t", begin=box.begin, shape=box.shape, local="t", at=at,
                axes=tuple(range(len(at))), counted=is_first_copy(coordinate, placements),
            )
            for box, at in boxes_of(indices)
        )  # fmt: skip
        spec = TensorSpec("t", "int64", tuple(expected.shape))
        layouts.append(Layout(tensors=(spec,), parts=parts))
        layouts[-1].require_fit(manifest_of(whole))
        assert torch.equal(contents(layouts[-1], whole)["t"], expected)
    require_whole(layouts, manifest_of(whole))


def test_what_fsdp_over_tensor_parallelism_holds_is_one_box() -> None:
    """Rows cut among tensor-parallel ranks first and then by FSDP: contiguous again, each rank's
    at its own place."""
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    rows = [
        held((8, 3), (2, 2), coordinate, placements)[0]
        for coordinate in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert rows == [[range(0, 2)], [range(4, 6)], [range(2, 4)], [range(6, 8)]]


# ---- DTensors


WHOLE = {
    "rows": torch.arange(35.0).reshape(7, 5),
    "columns": torch.arange(12.0).reshape(3, 4) + 100,
    "few": torch.arange(2.0) + 200,
    "plain": torch.arange(3.0) + 300,
}

SHARES = {
    "fsdp": ((4,), ("dp",), [[Shard(0)], [Shard(1)], [Shard(0)]]),
    "hsdp": (
        (2, 2), ("replica", "dp"),
        [[Replicate(), Shard(0)], [Replicate(), Shard(0)], [Replicate(), Replicate()]],
    ),
    "fsdp-tp": (
        (2, 2), ("dp", "tp"),
        [[_StridedShard(0, split_factor=2), Shard(0)], [Shard(0), Shard(1)], [Shard(0), Shard(0)]],
    ),
    "uneven": ((3, 2), ("dp", "tp"), [[Shard(0), Shard(0)], [Shard(1), Shard(0)], [Shard(0)] * 2]),
}  # fmt: skip


@pytest.mark.parametrize("share", SHARES)
def test_a_sharded_state_dict_is_laid_out_as_it_lies(share: str) -> None:
    """Torch shards a model over FSDP, HSDP and two-dimensional meshes, with uneven and empty
    shards and a plain tensor: each rank's layout gives what it has, and copies count once."""
    shape, names, placements = SHARES[share]
    manifest = manifest_of(WHOLE)
    layouts = []
    for rank in range(math.prod(shape)):
        with mesh_of(rank, shape, names) as mesh:
            state: dict[str, Tensor] = {
                name: shard(WHOLE[name], mesh, *placed)
                for name, placed in zip(("rows", "columns", "few"), placements, strict=True)
            }
            state["plain"] = WHOLE["plain"].clone()
            layout = layout_of(state)
            layout.require_fit(manifest)
            layouts.append(layout)
            found = contents(layout, WHOLE)
            assert list(found) == list(state)
            for name, tensor in state.items():
                here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                assert torch.equal(found[name], here), name
    require_whole(layouts, manifest)


def test_tensors_on_several_meshes_are_counted_once_over_the_whole_one() -> None:
    """One tensor lies on the tensor-parallel mesh alone, a copy for each data-parallel rank: with
    the whole mesh given it counts once; without it, or with a stranger's, it is refused."""
    manifest = manifest_of(WHOLE)
    layouts = []
    for rank in range(4):
        with mesh_of(rank, (2, 2), ("dp", "tp")) as mesh:
            state = {
                "rows": shard(WHOLE["rows"], mesh, Shard(0), Shard(1)),
                "columns": shard(WHOLE["columns"], mesh["tp"], Shard(0)),
                "few": shard(WHOLE["few"], mesh["dp"], Replicate()),
                "plain": WHOLE["plain"].clone(),
            }
            layouts.append(layout_of(state, mesh=mesh))
            with pytest.raises(UnsupportedTensor, match="'columns': lies on another mesh"):
                layout_of(state)
            with pytest.raises(UnsupportedTensor, match=r"'rows': .* no part of the mesh of all"):
                layout_of(state, mesh=mesh["dp"])
    require_whole(layouts, manifest)


def test_sums_not_yet_made_are_refused() -> None:
    """A Partial tensor holds what has still to be added up: no element of it can be patched."""
    with mesh_of(0, (2,), ("dp",)) as mesh:
        partial = DTensor.from_local(torch.zeros(2), mesh, [Partial()], run_check=False)
        with pytest.raises(UnsupportedTensor, match=r"'sum': its placement .* redistribute"):
            layout_of({"sum": partial})

"""The layout of the tensors that a rank holds, read off the tensors: plain ones and DTensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...messages.errors import UnsupportedTensor
from ...messages.layout import Layout, Part, box_part
from ...pipeline.delta import manifest_of
from ...pipeline.delta.tensors import Model, Rename, choose, distinct, renamed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def layout_of(
    source: Model,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    rename: Rename | None = None,
    mesh: DeviceMesh | None = None,
) -> Layout:
    """The layout of a model as this rank holds it: plain tensors whole, DTensors by placement.

    A Module means its state_dict; names, ties, `include` and `exclude` are as in a Publisher.
    `rename` (a function or a mapping) says under which name the trainer publishes a local tensor.
    Local tensors are what to_local() of a DTensor gives; uneven and empty shards are torch's own.

    Of what several ranks hold, the one at the lowest coordinate counts it. `mesh` is the mesh of
    all ranks; it is needed where DTensors lie on different meshes, and then has theirs as named
    dimensions: over the dimensions that a tensor's own mesh lacks, it is held by each. Plain
    tensors are held by each over the whole mesh. Without any DTensor and mesh all is counted here.

    UnsupportedTensor names what cannot be published, a tensor with a Partial placement, and one
    whose mesh is not part of `mesh` or has not this rank.
    """
    chosen = choose(source, include=include, exclude=exclude)
    dtensor = _dtensor()
    sharded = {
        name: value
        for name, value in chosen.items()
        if dtensor is not None and isinstance(value, dtensor)
    }
    local = _local(chosen)
    specs = manifest_of(local).tensors
    published = dict(zip(local, renamed(local, rename), strict=True))
    whole = mesh if mesh is not None else _only_mesh(sharded)
    parts: list[Part] = []
    for spec in specs:
        tensor = published[spec.name]
        if spec.name in sharded:
            parts += _parts(spec.name, tensor, sharded[spec.name], whole)
        else:
            counted = whole is None or not any(_coordinate(spec.name, whole))
            zeros = (0,) * len(spec.shape)
            parts.append(box_part(tensor, zeros, spec.shape, spec.name, counted=counted))
    return Layout(tensors=specs, parts=tuple(parts))


def local_tensors(
    source: Model,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors that layout_of() describes: plain ones, and what this rank has of DTensors."""
    return _local(choose(source, include=include, exclude=exclude))


def _local(chosen: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return distinct(dict(zip(chosen, here(list(chosen.values())), strict=True)))


def here(values: Sequence[Any]) -> list[Any]:
    """Of DTensors what this rank has; anything else as it is."""
    dtensor = _dtensor()
    if dtensor is None:
        return list(values)
    with torch.no_grad():
        return [value.to_local() if isinstance(value, dtensor) else value for value in values]


def _dtensor() -> type[DTensor] | None:
    """The class, unless there can be none of it."""
    # It takes nearly a second to import; where nobody has, no tensor is one.
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor

    return DTensor


def _parts(name: str, tensor: str, value: DTensor, whole: DeviceMesh | None) -> Iterator[Part]:
    from .placements import boxes_of, held, is_first_copy

    mesh = value.device_mesh
    coordinate = _coordinate(name, mesh)
    try:
        indices = held(value.shape, mesh.shape, coordinate, value.placements)
    except ValueError as exc:
        raise UnsupportedTensor(name, f"{exc}: redistribute() it first") from exc
    counted = is_first_copy(coordinate, value.placements) and _is_first_mesh(name, mesh, whole)
    for box, at in boxes_of(indices):
        yield Part(
            tensor=tensor,
            begin=box.begin,
            shape=box.shape,
            local=name,
            at=at,
            axes=tuple(range(len(at))),
            counted=counted,
        )


def _only_mesh(sharded: Mapping[str, DTensor]) -> DeviceMesh | None:
    """The mesh of all DTensors."""
    found: DeviceMesh | None = None
    for name, value in sharded.items():
        if found is not None and value.device_mesh != found:
            raise UnsupportedTensor(
                name, "lies on another mesh than those before it: give mesh=, the mesh of all ranks"
            )
        found = value.device_mesh
    return found


def _is_first_mesh(name: str, mesh: DeviceMesh, whole: DeviceMesh | None) -> bool:
    """Whether this rank lies in the first of the meshes that together make up the whole one."""
    if whole is None or whole == mesh:
        return True
    own, names = mesh.mesh_dim_names, whole.mesh_dim_names
    if own is None or names is None or not set(own) <= set(names):
        raise UnsupportedTensor(
            name, f"lies on a mesh of {own}, which is no part of the mesh of all ranks, {names}"
        )
    places = zip(names, _coordinate(name, whole), strict=True)
    return not any(place for dim, place in places if dim not in own)


def _coordinate(name: str, mesh: DeviceMesh) -> Sequence[int]:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UnsupportedTensor(name, "lies on a mesh that does not have this rank")
    return list(coordinate)

"""Where a model's tensors lie, as the kernels read it, and which of them they can take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...messages.manifest import Manifest
from .digest import GAMMA, seed_of
from .parts import Parts
from .patch import columns_of
from .timing import Mark, host_numbers

if TYPE_CHECKING:
    from .kernels.plan import Plan
    from .kernels.regions import Regions

#: Sets of addresses and plans that are remembered: a process has one or two models, each perhaps in
#: as many pieces as its trainer has ranks.
_KNOWN = 1024


def plan_of(manifest: Manifest, device: torch.device) -> Plan:
    """The plan of plain, aligned tensors of a manifest; remembered."""
    from .kernels.plan import Kind, Plan

    key = (manifest.hash, device)
    plan = _plans.get(key)
    if plan is None:
        columns = columns_of(manifest)
        plan = Plan(
            columns.numel.tolist(),
            seeds_of(manifest),
            [Kind(itemsize) for itemsize in columns.itemsize.tolist()],
            device,
        )
        _remember(_plans, key, plan)
    return plan


def regions_of(parts: Parts, device: torch.device) -> Regions:
    """The kernels' tables of a layout's parts; remembered."""
    from .kernels.regions import Regions

    key = (parts, device)
    regions = _regions.get(key)
    if regions is None:
        regions = Regions(parts, plan_of(parts.manifest, device))
        Mark(device).wait()  # other streams will read the tables
        _remember(_regions, key, regions)
    return regions


def beyond(tensors: Mapping[str, Tensor], parts: Parts, device: torch.device) -> frozenset[int]:
    """The regions that the kernels cannot take, by number: where their local tensors lie elsewhere,
    strided or not at a multiple of 16 bytes, or those of regions_of() that they never can."""
    others = addresses_of(tensors, parts.local, device).others
    askew = (region.number for region in parts.regions if region.local in others) if others else ()
    return regions_of(parts, device).others.union(askew)


def seeds_of(manifest: Manifest) -> list[int]:
    """The digest's seeds of all tensors, as signed 64-bit integers."""
    return [seed_at(spec.name, 0) for spec in manifest.tensors]


def seed_at(name: str, block: int) -> int:
    """The digest's seed of what begins at a block of a tensor, as a signed 64-bit integer: its own
    block b then has the factor of block + b, since G takes seed + b · GAMMA."""
    seed = (seed_of(name) + block * GAMMA) & ((1 << 64) - 1)
    return seed - (1 << 64) if seed >> 63 else seed


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses of a manifest's tensors: int64 [tensors] on their device.

    `others`: the places in the manifest of those that the kernels cannot take: elsewhere, strided,
    or not at a multiple of 16 bytes. Their addresses are 0.
    """

    table: Tensor
    others: frozenset[int]


def addresses_of(
    tensors: Mapping[str, Tensor], manifest: Manifest, device: torch.device
) -> Addresses:
    """Where tensors, which are those of the manifest, lie; remembered while nothing moves."""
    token = getattr(tensors, "token", None)
    key = (manifest.hash, device)
    if token is not None:
        known = _addresses.get(key)
        if known is not None and known[0] is token:
            return known[1]
    pointers: list[int] = []
    others: set[int] = set()
    for at, spec in enumerate(manifest.tensors):
        tensor = tensors[spec.name]
        pointer = tensor.data_ptr()
        if tensor.numel() and (
            tensor.device != device or not tensor.is_contiguous() or pointer % 16
        ):
            others.add(at)
            pointer = 0
        pointers.append(pointer)
    found = Addresses(table_of(pointers, device), frozenset(others))
    if token is not None:
        Mark(device).wait()  # other streams will read the table
        _remember(_addresses, key, (token, found))
    return found


def table_of(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64 [n] on the device, enqueued; the host does not wait."""
    host = host_numbers(len(numbers), device)
    host.numpy()[:] = numbers
    return host.to(device, non_blocking=True)


_plans: dict[tuple[str, torch.device], Plan] = {}
_regions: dict[tuple[Parts, torch.device], Regions] = {}
_addresses: dict[tuple[str, torch.device], tuple[object, Addresses]] = {}


def _remember(known: dict[Any, Any], key: object, value: object) -> None:
    if len(known) >= _KNOWN and key not in known:
        known.pop(next(iter(known)))
    known[key] = value

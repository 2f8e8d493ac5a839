"""Digest and checksum by kernels: what goes through all bytes, in slices that let others pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ...messages.manifest import Manifest
from .addresses import addresses_of, beyond, plan_of, regions_of, table_of
from .kernels.checksum import checksum
from .kernels.digest import PROGRAMS, digest, digest_parts
from .kernels.find import SUMS
from .parts import Parts
from .timing import Mark, to_host

#: Bytes of a slice: 16 blocks of bf16 for each program, a quarter of a millisecond at 4.4 TB/s.
_SLICE_NBYTES = PROGRAMS * (1 << 20)


def digest_in_slices(
    tensors: Mapping[str, Tensor],
    manifest: Manifest,
    device: torch.device,
    pause: Callable[[], None] | None,
) -> tuple[int, Sequence[int]]:
    """The digest's share of the tensors that the kernels can read, and the places of the others.

    Waits for every slice, at most one ahead of the device, and calls `pause` then.
    """
    plan = plan_of(manifest, device)
    addresses = addresses_of(tensors, manifest, device)
    sums = torch.zeros(SUMS, dtype=torch.int64, device=device)
    slices = [
        partial(digest, plan, group, addresses.table, sums, first=first, blocks=blocks)
        for group in plan.groups
        for first, blocks in _sliced(group.blocks, group.kind.itemsize)
    ]
    _one_by_one(slices, device, pause)
    return _total(sums), sorted(addresses.others)


def digest_parts_in_slices(
    tensors: Mapping[str, Tensor],
    parts: Parts,
    device: torch.device,
    pause: Callable[[], None] | None,
) -> tuple[int, frozenset[int]]:
    """The same of the counted parts of a layout, and the numbers of the regions that are left."""
    regions = regions_of(parts, device)
    weights = addresses_of(tensors, parts.local, device).table
    sums = torch.zeros(SUMS, dtype=torch.int64, device=device)
    slices = [
        partial(digest_parts, regions, group, weights, sums, first=first, tasks=tasks)
        for group in regions.groups
        for first, tasks in _sliced(group.counted, group.itemsize)
    ]
    _one_by_one(slices, device, pause)
    return _total(sums), beyond(tensors, parts, device)


def queue_parts(
    tensors: Mapping[str, Tensor], parts: Parts, device: torch.device
) -> tuple[Callable[[], int], frozenset[int]]:
    """digest_parts_in_slices(), in one go and without a wait: the share is for asking later, on any
    thread, when the tensors may be others."""
    regions = regions_of(parts, device)
    weights = addresses_of(tensors, parts.local, device).table
    sums = torch.zeros(SUMS, dtype=torch.int64, device=device)
    for group in regions.groups:
        if group.counted:
            digest_parts(regions, group, weights, sums, first=0, tasks=group.counted)
    host, mark = to_host(sums), Mark(device)

    def share() -> int:
        mark.wait()
        return total(host)

    return share, beyond(tensors, parts, device)


def _sliced(blocks: int, itemsize: int) -> list[tuple[int, int]]:
    """The first block of each slice, and how many it has."""
    step = _SLICE_NBYTES // (65_536 * itemsize)
    return [(first, min(step, blocks - first)) for first in range(0, blocks, step)]


def _one_by_one(
    slices: Sequence[Callable[[], None]], device: torch.device, pause: Callable[[], None] | None
) -> None:
    last: Mark | None = None
    for queue in slices:
        queue()
        # One slice ahead: else the device would idle while the host takes notice.
        mark = Mark(device)
        if last is not None:
            last.wait()
            if pause is not None:
                pause()
        last = mark


def checksum_on(buffer: Tensor) -> int:
    """The sum over a payload's words, without its length; waits for it."""
    sums = torch.zeros(SUMS, dtype=torch.int64, device=buffer.device)
    spot = table_of([buffer.data_ptr(), buffer.numel()], buffer.device)
    checksum(spot, spot[1:], sums, largest=buffer.numel())
    return _total(sums)


def total(sums: Tensor) -> int:
    """The sum mod 2⁶⁴ of a few int64 on the host."""
    found: list[int] = sums.tolist()
    return sum(found) & ((1 << 64) - 1)


def _total(sums: Tensor) -> int:
    host = to_host(sums)
    Mark(sums.device).wait()
    return total(host)

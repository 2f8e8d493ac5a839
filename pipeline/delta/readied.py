"""Check and apply by kernels, for a patch on a device: all its tensors in a few launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...messages.manifest import Manifest
from .addresses import addresses_of, plan_of
from .kernels import places
from .kernels.bitmap import bitmap
from .kernels.check import check, counts_of
from .kernels.dense import dense
from .kernels.plan import Plan
from .kernels.scatter import scatter
from .layout import Encoding, Table
from .patch import Patch
from .timing import Mark, host_numbers, to_host


@dataclass(frozen=True, slots=True)
class Readied:
    """A patch whose counts, positions and bits are as they must be, and where they lie.

    On the patch's device: `where`, places() of its table; `counts`, the changed elements of every
    block of the manifest, and `ends`, their running sum: int64 [blocks].
    """

    patch: Patch
    table: Table
    plan: Plan
    where: Tensor
    counts: Tensor
    ends: Tensor

    def beyond(self, tensors: Mapping[str, Tensor], manifest: Manifest) -> Sequence[int]:
        """The sections that the kernels cannot write, by their places in the table.

        Their tensors lie elsewhere, strided, or not at a multiple of 16 bytes; and those of the
        full form, which packs values without alignment.
        """
        if self.patch.full:
            return range(len(self.table))
        others = addresses_of(tensors, manifest, self.plan.device).others
        if not others:
            return ()
        return np.isin(self.table.index, list(others)).nonzero()[0].tolist()

    def write(self, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
        """Enqueue the writing of all other sections on the device's current stream."""
        if self.patch.full:
            return
        plan, table = self.plan, self.table
        for tensor in (self.where, self.counts, self.ends):
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        weights = addresses_of(tensors, manifest, plan.device).table
        address = self.patch.buffer.data_ptr()
        present = set(table.encoding.tolist())
        for group in plan.groups:
            if Encoding.SPARSE in present:
                scatter(plan, group, weights, self.where, address, self.counts, self.ends)
            if Encoding.BITMAP in present:
                bitmap(plan, group, weights, self.where, address, self.counts, self.ends)
            if Encoding.DENSE in present:
                dense(plan, group, weights, self.where, address, into=True)


def ready(patch: Patch, manifest: Manifest) -> Readied | None:
    """Check what only the bytes of the arrays tell; None if anything of it is wrong.

    The table was validated against the manifest. Waits for the device once.
    """
    device = patch.buffer.device
    plan = plan_of(manifest, device)
    table = patch.table_of(manifest)
    laid = host_numbers(places.ROWS * plan.tensors, device)
    places.places(table, laid.numpy().reshape(places.ROWS, -1))
    where = laid.to(device, non_blocking=True)
    counts = torch.empty(plan.blocks, dtype=torch.int64, device=device)
    address = patch.buffer.data_ptr()
    counts_of(plan, where, address, counts)
    ends = counts.cumsum(0)
    wrong = torch.zeros(1, dtype=torch.int32, device=device)
    if bool((table.encoding != Encoding.DENSE).any()):
        check(plan, where, address, counts, ends, wrong)
    found = to_host(wrong)
    Mark(device).wait()
    if int(found.item()):
        return None
    return Readied(patch, table, plan, where, counts, ends)

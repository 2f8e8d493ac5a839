"""Check and apply by kernels, for a patch on a device: all its tensors in a few launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...messages.manifest import Manifest
from .addresses import addresses_of, plan_of
from .kernels import sections as fact
from .kernels.bitmap import bitmap
from .kernels.check import check, counts_of
from .kernels.dense import dense
from .kernels.find import SUMS
from .kernels.places import ROWS
from .kernels.plan import Plan
from .kernels.scatter import scatter
from .kernels.sections import sections
from .layout import ENTRY, HEADER, Column, Encoding
from .patch import Patch
from .slices import total


class Checking:
    """The check of a patch's section table, counts, positions and bits. All memory is made here;
    enqueue() queues the work, and passed() is for when the host has waited for that.

    `buffer` should be a patch of the sectioned form for weights of this manifest; of whatever it is
    instead, nothing beyond its end is read. `start` is its header and section table, on the host.
    On the device lie `table` (see kernels/places.py) and `counts`, the changed elements of every
    block of the manifest, with `ends`, their running sum: int64 [blocks]. `sums` (int64 [SUMS]) is
    for a checksum, and comes to the host as well.
    """

    def __init__(self, buffer: Tensor, manifest: Manifest) -> None:
        device = buffer.device
        self.plan: Plan = plan_of(manifest, device)
        plan = self.plan
        self._buffer = buffer
        empty = partial(torch.empty, dtype=torch.int64, device=device)
        sizes = [SUMS, fact.FACTS, ROWS * plan.tensors]
        numbers = empty(sum(sizes))
        self.sums, self._facts, self.table = torch.split(numbers, sizes)
        self._told = numbers[: SUMS + fact.FACTS]
        self.counts, self.ends = empty(plan.blocks), empty(plan.blocks)
        size = min(HEADER.size + ENTRY.itemsize * plan.tensors, buffer.numel())
        pinned = buffer.is_cuda
        self.start = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._host = torch.empty(SUMS + fact.FACTS, dtype=torch.int64, pin_memory=pinned)

    def enqueue(self) -> None:
        """Queue the work on the current stream of the buffer's device, which is the thread's."""
        plan, buffer, address = self.plan, self._buffer, self._buffer.data_ptr()
        sections(plan, self.table, self._facts, address, buffer.numel())
        counts_of(plan, self.table, address, self.counts)
        torch.cumsum(self.counts, 0, out=self.ends)
        check(plan, self.table, address, self.counts, self.ends, self._facts)
        self._host.copy_(self._told, non_blocking=True)
        self.start.copy_(buffer[: self.start.numel()], non_blocking=True)

    @property
    def total(self) -> int:
        """The sum of `sums` mod 2⁶⁴."""
        return total(self._host[:SUMS])

    def passed(self, patch: Patch) -> Readied | None:
        """What the patch is applied by, read from the same buffer; None if anything is wrong."""
        if patch.full:
            return Readied(patch, self, frozenset())
        facts = self._host[SUMS:].tolist()
        members = facts[fact.MEMBERS : fact.MEMBERS + len(Encoding)]
        anchor = patch.base_version is None
        if (
            facts[fact.FAULTS]
            or facts[fact.CHANGES] != patch.changed
            or (anchor and (sum(members[:-1]) or patch.changed != patch.numel))
        ):
            return None
        present = (each for each, count in zip(Encoding, members, strict=True) if count)
        return Readied(patch, self, frozenset(present))


@dataclass(frozen=True, slots=True)
class Readied:
    """A patch whose table, counts, positions and bits are as they must be.

    `present`: the encodings of its sections; none in the full form, which packs values without
    alignment and is not for the kernels.
    """

    patch: Patch
    checking: Checking
    present: frozenset[Encoding]

    def index(self, manifest: Manifest) -> Column:
        """The places in the manifest of the tensors that it changes, in the order of its table."""
        if self.patch.full:
            return self.patch.table_of(manifest).index
        end = HEADER.size + ENTRY.itemsize * self.patch.members
        return np.frombuffer(self.checking.start.numpy()[HEADER.size : end], ENTRY)["index"]

    def beyond(self, tensors: Mapping[str, Tensor], manifest: Manifest) -> Sequence[int]:
        """The sections that the kernels cannot write, by their places in the table.

        Their tensors lie elsewhere, strided, or not at a multiple of 16 bytes; and those of the
        full form.
        """
        index = self.index(manifest)
        if self.patch.full:
            return range(len(index))
        others = addresses_of(tensors, manifest, self.checking.plan.device).others
        if not others:
            return ()
        return np.isin(index, list(others)).nonzero()[0].tolist()

    def write(self, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
        """Enqueue the writing of all other sections on the device's current stream."""
        if not self.present:
            return
        checking = self.checking
        plan, table, counts, ends = checking.plan, checking.table, checking.counts, checking.ends
        for tensor in (table, counts, ends):
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        weights = addresses_of(tensors, manifest, plan.device).table
        address = self.patch.buffer.data_ptr()
        for group in plan.groups:
            if Encoding.SPARSE in self.present:
                scatter(plan, group, weights, table, address, counts, ends)
            if Encoding.BITMAP in self.present:
                bitmap(plan, group, weights, table, address, counts, ends)
            if Encoding.DENSE in self.present:
                dense(plan, group, weights, table, address, into=True)

"""Check and apply by kernels, for a patch on a device: all its tensors in a few launches."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...messages.manifest import Manifest
from .addresses import addresses_of, beyond, plan_of, regions_of
from .digest import LENGTH_FACTOR
from .graphs import Repeated
from .kernels import sections as fact
from .kernels.bitmap import bitmap, bitmap_parts
from .kernels.check import check, counts_of
from .kernels.checksum import checksum
from .kernels.dense import dense, dense_parts
from .kernels.ends import ends_of
from .kernels.find import SUMS
from .kernels.places import ROWS
from .kernels.plan import Plan
from .kernels.scatter import scatter, scatter_parts
from .kernels.sections import sections
from .layout import ENTRY, HEADER, Column, Encoding
from .parts import Parts
from .patch import Patch
from .slices import total
from .timing import Mark, host_numbers


class _Room:
    """Memory for one check at a time, and the work on it: made once, used again and again.

    On the device: `spot`, where the patch is and how many bytes it has; `table` (see
    kernels/places.py); `counts`, the changed elements of every block of the manifest, and `ends`,
    the same up to the end of each within its tensor: int64 [blocks]. On the host, pinned: `start`,
    header and section table of the patch, and `told`, the sums of its checksum and the facts of its
    table.
    """

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        self.plan: Plan = plan_of(manifest, device)
        plan = self.plan
        self._device = device
        self._largest = manifest.nbytes
        empty = partial(torch.empty, dtype=torch.int64, device=device)
        sizes = [SUMS, fact.FACTS, ROWS * plan.tensors]
        numbers = empty(sum(sizes))
        self._sums, self._facts, self.table = torch.split(numbers, sizes)
        self._numbers = numbers[: SUMS + fact.FACTS]
        self.spot, self.counts, self.ends = empty(2), empty(plan.blocks), empty(plan.blocks)
        pinned = device.type == "cuda"
        self._place = host_numbers(2, device)
        self.told = host_numbers(SUMS + fact.FACTS, device)
        size = HEADER.size + ENTRY.itemsize * plan.tensors
        self.start = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._checking = Repeated(device)
        #: When what was checked last has been read, for its way into the weights.
        self.read: Mark | None = None
        if pinned:
            # A graph is made, and run once, before anything can be pending on the device.
            nothing = torch.zeros(HEADER.size, dtype=torch.uint8, device=device)
            for _ in range(2):
                self.enqueue(nothing)
            Mark(device).wait()

    def enqueue(self, buffer: Tensor) -> None:
        """Queue checksum and check of what lies there on the device's current stream."""
        if self.read is not None:
            self.read.precede()
        size = min(self.start.numel(), buffer.numel())
        self.start[:size].copy_(buffer[:size], non_blocking=True)
        self._place.numpy()[:] = buffer.data_ptr(), buffer.numel()
        self.spot.copy_(self._place, non_blocking=True)
        self._checking.queue(self._check)
        self.told.copy_(self._numbers, non_blocking=True)

    def _check(self) -> None:
        plan, spot = self.plan, self.spot
        self._sums.zero_()
        checksum(spot, spot[1:], self._sums, largest=self._largest)
        sections(plan, self.table, self._facts, spot)
        counts_of(plan, self.table, spot, self.counts)
        ends_of(plan, self.counts, self.ends)
        check(plan, self.table, spot, self.counts, self.ends, self._facts)


class Checking:
    """The check of one payload's checksum, section table, counts, positions and bits.

    `buffer` should be a patch of the sectioned form for weights of this manifest; of whatever it is
    instead, nothing beyond its end is read. All memory is there when this is made; what is asked
    for is for when the host has waited for what enqueue() has queued.
    """

    def __init__(self, buffer: Tensor, manifest: Manifest) -> None:
        self._buffer = buffer
        key = manifest.hash, buffer.device
        try:
            self.room = _rooms[key].pop()
        except (KeyError, IndexError):
            self.room = _Room(manifest, buffer.device)
        # Whoever holds a checked patch holds this, until its bytes are in the weights.
        weakref.finalize(self, _keep, key, self.room).atexit = False

    def enqueue(self) -> None:
        """Queue the work on the current stream of the buffer's device, which is the thread's."""
        self.room.enqueue(self._buffer)

    @property
    def start(self) -> Tensor:
        """The buffer's first bytes on the host: header and section table."""
        return self.room.start[: self._buffer.numel()]

    @property
    def checksum(self) -> int:
        """The checksum of the buffer."""
        sums = total(self.room.told[:SUMS])
        return (sums + self._buffer.numel() * LENGTH_FACTOR) & ((1 << 64) - 1)

    def passed(self, patch: Patch) -> Readied | None:
        """What the patch is applied by, read from the same buffer; None if anything is wrong."""
        if patch.full:
            return Readied(patch, self, frozenset())
        facts = self.room.told[SUMS:].tolist()
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


#: Rooms that nobody uses just now, by manifest and device: of a few, as many as a round needs.
_rooms: dict[tuple[str, torch.device], list[_Room]] = {}
_KNOWN, _SPARE = 8, 2
#: Of as many manifests as a trainer has ranks, or a few of them.
_RESERVED = 1024
#: How many payloads of these come together: so many of their rooms stay.
_reserved: dict[tuple[str, torch.device], int] = {}


def reserve(manifests: Sequence[Manifest], device: torch.device) -> None:
    """Make the rooms of payloads that come together, each for weights of one of these manifests,
    which have elements; they stay, for the next that come."""
    _reserved.update(Counter((manifest.hash, device) for manifest in manifests))
    for oldest in list(_reserved)[:-_RESERVED]:
        del _reserved[oldest]
    nothing = torch.zeros(HEADER.size, dtype=torch.uint8, device=device)
    # All of them at a time: two of one manifest need a room each.
    together = [Checking(nothing, manifest) for manifest in manifests]
    together.clear()


def _keep(key: tuple[str, torch.device], room: _Room) -> None:
    rooms = _rooms.pop(key, [])
    if len(rooms) < max(_SPARE, _reserved.get(key, 0)):
        rooms.append(room)
    _rooms[key] = rooms  # the one that was used last stays longest
    for oldest in [other for other in list(_rooms) if other not in _reserved][:-_KNOWN]:
        _rooms.pop(oldest, None)


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
        others = addresses_of(tensors, manifest, self.checking.room.plan.device).others
        if not others:
            return ()
        return np.isin(index, list(others)).nonzero()[0].tolist()

    def write(self, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
        """Enqueue the writing of all other sections on the device's current stream."""
        if not self.present:
            return
        room = self.checking.room
        plan, table, spot, counts, ends = room.plan, room.table, room.spot, room.counts, room.ends
        weights = addresses_of(tensors, manifest, plan.device).table
        for group in plan.groups:
            if Encoding.SPARSE in self.present:
                scatter(plan, group, weights, table, spot, counts, ends)
            if Encoding.BITMAP in self.present:
                bitmap(plan, group, weights, table, spot, counts, ends)
            if Encoding.DENSE in self.present:
                dense(plan, group, weights, table, spot, into=True)
        room.read = Mark(plan.device)

    def beyond_parts(self, tensors: Mapping[str, Tensor], parts: Parts) -> frozenset[int]:
        """A layout's regions that the kernels cannot write to, by number: in the full form all."""
        if self.patch.full:
            return frozenset(range(len(parts.regions)))
        return beyond(tensors, parts, self.checking.room.plan.device)

    def write_parts(self, tensors: Mapping[str, Tensor], parts: Parts) -> None:
        """Enqueue the writing to all other regions on the device's current stream."""
        if not self.present:
            return
        room = self.checking.room
        table, spot, counts, ends = room.table, room.spot, room.counts, room.ends
        regions = regions_of(parts, room.plan.device)
        weights = addresses_of(tensors, parts.local, room.plan.device).table
        for group in regions.groups:
            if Encoding.SPARSE in self.present:
                scatter_parts(regions, group, weights, table, spot, counts, ends)
            if Encoding.BITMAP in self.present:
                bitmap_parts(regions, group, weights, table, spot, counts, ends)
            if Encoding.DENSE in self.present:
                dense_parts(regions, group, weights, table, spot)
        room.read = Mark(room.plan.device)

"""The diff of a whole model by kernels: one pass, one wait for the counts, one buffer.

    find ─▶ tally ─▶ counts to the host ─▶ layout ─▶ place, emit, dense ─▶ checksum

Everything is enqueued on the caller's current stream, so the weights may change in stream order as
soon as diff() returns. Scratch has room for the changes that are to be expected after the last
diff; tiles that exceed it are looked at twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from operator import is_not

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...messages.manifest import Manifest
from .addresses import seeds_of, table_of
from .digest import LENGTH_FACTOR
from .kernels import places
from .kernels.checksum import checksum
from .kernels.dense import dense
from .kernels.digest import digest
from .kernels.emit import emit
from .kernels.fill import clear, fill
from .kernels.find import SUMS, find
from .kernels.place import place
from .kernels.plan import Group, Kind, Plan, castable
from .kernels.tally import tally
from .layout import (
    Encoding,
    Form,
    Header,
    Table,
    fits_sections,
    full_nbytes,
    lay_out,
    table_end,
)
from .patch import Patch, columns_of
from .tensors import dtype_of
from .timing import Mark, Sent, host_numbers, to_host

_MASK = (1 << 64) - 1
#: The share of a tile that has slots before anything is known of the run: 1 in 32.
_FIRST_SHARE = 32
_FEWEST_SLOTS = 8
#: More kinds of tensors than a plan can have: sizes, casts, alignments.
_KINDS = 16
#: Beyond 1 in 16 a bitmap is smaller than positions for 2-byte elements, and a second look is dear
#: only to memory that would be needed anyway.
_LARGEST_SHARE = 16


@dataclass(frozen=True, slots=True)
class Found:
    """A patch that may still be written in stream order, and how to learn what it came to.

    The callables wait for the device: `sums()` gives the digest of what was updated and the
    checksum of the patch, `times_us()` what diff and encode took.
    """

    patch: Patch
    sums: Callable[[], tuple[int, int]]
    times_us: Callable[[], tuple[int, int]]


class Differ:
    """Finds what changed between two sets of tensors on one device. Not for several threads.

    `held`: the digest of what diff() is to update.
    """

    def __init__(self, manifest: Manifest, device: torch.device, *, held: int = 0) -> None:
        self._manifest = manifest
        self._device = device
        self._columns = columns_of(manifest)
        self._dtypes = [dtype_of(spec) for spec in manifest.tensors]
        self._seeds = seeds_of(manifest)
        self._plan: Plan | None = None
        self._old: _Pointers | None = None
        self._new: _Pointers | None = None
        #: Changed elements of each group in the last diff, by its kind.
        self._changed: dict[Kind, int] = {}
        #: What goes to and fro in every diff, in memory that is made once.
        tensors = len(manifest.tensors)
        self._where = Sent(places.ROWS * tensors, device)
        self._tallied = Sent(tensors + _KINDS, device)
        self._held = held
        #: Sums of the digest's changes since the beginning, and of one checksum: int64 [2, SUMS].
        self._sums = torch.zeros((2, SUMS), dtype=torch.int64, device=device)

    # ---- one diff

    def takes(self, tensors: Sequence[Tensor], token: object = None) -> bool:
        """Whether the kernels read all of these, the manifest's once or more, as it has them.

        With the `token` of the last diff they do: nothing has moved.
        """
        if token is not None and self._new is not None and token is self._new.token:
            return True
        return all(
            tensor.device == self._device and castable(tensor.dtype, dtype)
            for tensor, dtype in zip(tensors, cycle(self._dtypes), strict=False)
        )

    def diff(
        self,
        old: Sequence[Tensor],
        new: Sequence[Tensor],
        *,
        base_version: int,
        version: int,
        begin: Callable[[], None] | None = None,
        token: object = None,
    ) -> Found:
        """The patch from `old` to `new`, one tensor each for every one in the manifest.

        With `begin`, `old` holds the new bits from then on: it is integer bits, contiguous, aligned
        to 16 bytes, where the device can write; `begin` is called before the first write, and what
        is raised before has changed nothing. `token`: the same object while `new` lies where it
        lay, and everything in it is contiguous.
        """
        update = begin is not None
        began = Mark(self._device)
        # Strided tensors are copied; the copies are kept until all that reads them is enqueued.
        sources = [_contiguous(tensor) for tensor in new]
        if not update:
            old = [_contiguous(tensor) for tensor in old]
        if any(map(is_not, sources, new)):
            token = None
        plan, olds, news = self._tables(old, sources, token)
        counts = self._empty(plan.tiles, torch.int32)
        block_counts = self._empty(plan.blocks, torch.int32)
        tallied = self._tallied.there
        tallied.zero_()
        scratch = [_Scratch(group, self._slots(group), self._device) for group in plan.groups]
        if begin is not None:
            begin()
        for at, (group, room) in enumerate(zip(plan.groups, scratch, strict=True)):
            find(
                plan, group, olds, news, room.records, room.values, counts, self._sums[0],
                slots=room.slots, update=update,
            )  # fmt: skip
            tally(plan, group, counts, block_counts, tallied, plan.tensors + at, slots=room.slots)
        ends = block_counts.cumsum(0, dtype=torch.int64)
        self._tallied.fetch()
        found = Mark(self._device)
        found.wait()
        totals = self._tallied.here[: plan.tensors]
        over_G = self._tallied.here[plan.tensors :].tolist()
        patch = self._lay_out(totals, base_version, version)
        table = patch.table_of(self._manifest)
        places.places(table, self._where.here.reshape(places.ROWS, -1))
        where = self._where.send()
        address = patch.buffer.data_ptr()
        encodings = set(table.encoding.tolist())
        if Encoding.BITMAP in encodings:
            clear(plan, where, address)
        for group, room in zip(plan.groups, scratch, strict=True):
            if not patch.full:
                place(
                    plan, group, counts, block_counts, ends, where, room.records, room.values,
                    address, slots=room.slots,
                )  # fmt: skip
        self._write_frame(patch, table)
        for group, room, over_here in zip(plan.groups, scratch, over_G, strict=False):
            if over_here:
                emit(
                    plan, group, olds, news, counts, block_counts, ends, where, address,
                    slots=room.slots, update=update,
                )  # fmt: skip
        if update and any(over_G):
            self._digest_anew(plan, olds)
        if Encoding.DENSE in encodings:
            self._write_dense(
                plan, patch, table, where, old if update else sources, olds, news, update
            )
        self._sums[1].zero_()
        checksum(patch.buffer, self._sums[1])
        sums = to_host(self._sums)
        written = Mark(self._device)
        for group in plan.groups:
            self._changed[group.kind] = int(totals[plan.members(group)].sum())

        def totalled() -> tuple[int, int]:
            written.wait()
            changes, payload = sums.numpy().astype(np.uint64).sum(1, dtype=np.uint64).tolist()
            checksum = (payload + patch.nbytes * LENGTH_FACTOR) & _MASK
            return (self._held + changes) & _MASK, checksum

        def times_us() -> tuple[int, int]:
            written.wait()
            return began.until_us(found), found.until_us(written)

        return Found(patch, totalled, times_us)

    def _digest_anew(self, plan: Plan, olds: Tensor) -> None:
        """Put the digest's change since the beginning right by reading all that is held."""
        changes = self._sums[0]
        changes.zero_()
        for group in plan.groups:
            kind = replace(group.kind, cast="", aligned=True)
            digest(plan, replace(group, kind=kind), olds, changes, first=0, blocks=group.blocks)
        changes[:1].sub_(self._held - (1 << 64) if self._held >> 63 else self._held)

    # ---- tables

    def _tables(
        self, old: Sequence[Tensor], new: Sequence[Tensor], token: object
    ) -> tuple[Plan, Tensor, Tensor]:
        if token is None or self._new is None or self._new.token is not token or self._plan is None:
            kinds = [
                Kind.of(tensor, itemsize, dtype)
                for tensor, itemsize, dtype in zip(
                    new, self._columns.itemsize.tolist(), self._dtypes, strict=True
                )
            ]
            kinds = [
                replace(kind, aligned=False) if tensor.data_ptr() % 16 else kind
                for kind, tensor in zip(kinds, old, strict=True)
            ]
            if self._plan is None or self._plan.kinds != tuple(kinds):
                numels = self._columns.numel.tolist()
                self._plan = Plan(numels, self._seeds, kinds, self._device)
            self._new = _Pointers.of(new, self._device, token, self._new)
        if self._old is None or self._old.token is not old:
            self._old = _Pointers.of(old, self._device, old, self._old)
        return self._plan, self._old.table, self._new.table

    def _slots(self, group: Group) -> int:
        """Room for a tile's changes: what they were on average last time, and six deviations."""
        tile = group.kind.tile
        elements = group.blocks << 16
        changed = self._changed.get(group.kind)
        if changed is None:
            return tile // _FIRST_SHARE
        mean = changed / elements * tile
        wanted = mean + 6 * math.sqrt(mean) + 4
        slots = 1 << max(math.ceil(math.log2(wanted)), 3)
        return min(max(slots, _FEWEST_SLOTS), tile // _LARGEST_SHARE)

    def _empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self._device)

    # ---- the buffer

    def _lay_out(self, totals: npt.NDArray[np.int64], base_version: int, version: int) -> Patch:
        manifest = self._manifest
        index = totals.nonzero()[0]
        columns = self._columns
        table = lay_out(index, columns.itemsize[index], columns.numel[index], totals[index])
        full = table.nbytes > full_nbytes(manifest.nbytes) and not fits_sections(
            table.nbytes, manifest.nbytes
        )
        if full:
            table = Table.empty()
        header = Header(
            form=Form.FULL if full else Form.SECTIONS,
            sections=len(table),
            manifest_hash=manifest.hash,
            base_version=base_version,
            version=version,
            changed=int(totals.sum()),
            numel=manifest.numel,
            dense_nbytes=manifest.nbytes,
            nbytes=full_nbytes(manifest.nbytes) if full else table.nbytes,
        )
        return Patch(_buffer(header.nbytes, self._device), header, table, manifest)

    def _write_frame(self, patch: Patch, table: Table) -> None:
        """Header, section table and padding."""
        start = patch.start()
        if patch.full:
            gaps = np.array([[len(start) + patch.dense_nbytes], [patch.nbytes]], np.int64)
        else:
            start = start.ljust(table_end(len(table)), b"\0")
            gaps = places.gaps(table)
        runs, head = gaps.size, len(start) // 8
        together = host_numbers(runs + head, self._device)
        numbers = together.numpy()
        numbers[:runs] = gaps.ravel()
        numbers[runs:] = np.frombuffer(start, np.int64)
        there = together.to(self._device, non_blocking=True)
        patch.buffer[: len(start)].view(torch.int64).copy_(there[runs:], non_blocking=True)
        fill(there[:runs].view(2, -1), patch.buffer.data_ptr())

    def _write_dense(
        self,
        plan: Plan,
        patch: Patch,
        table: Table,
        where: Tensor,
        sources: Sequence[Tensor],
        olds: Tensor,
        news: Tensor,
        update: bool,
    ) -> None:
        if patch.full:
            # The full form packs tensors without alignment: torch's copies see to that.
            for section in table.sections:
                bits = sources[section.index].reshape(-1)
                patch.values(section).copy_(
                    bits.view(patch.values(section).dtype), non_blocking=True
                )
            return
        for group in plan.groups:
            # The old copy holds the new bits by now, cast and aligned.
            kind = replace(group.kind, cast="", aligned=True) if update else group.kind
            dense(
                plan, replace(group, kind=kind), olds if update else news, where,
                patch.buffer.data_ptr(), into=False,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Pointers:
    """Addresses of tensors, and the same on the device."""

    numbers: tuple[int, ...]
    table: Tensor
    token: object

    @classmethod
    def of(
        cls, tensors: Sequence[Tensor], device: torch.device, token: object, last: _Pointers | None
    ) -> _Pointers:
        numbers = tuple(map(Tensor.data_ptr, tensors))
        if last is not None and last.numbers == numbers:
            return cls(numbers, last.table, token)
        return cls(numbers, table_of(numbers, device), token)


class _Scratch:
    """Where a group's tiles put what they find: `slots` records each."""

    def __init__(self, group: Group, slots: int, device: torch.device) -> None:
        self.slots = slots
        size = group.tiles * slots
        itemsize = group.kind.itemsize
        wide = torch.int64 if itemsize == 4 else torch.int32
        self.records = torch.empty(size, dtype=wide, device=device)
        self.values = torch.empty(size if itemsize == 8 else 1, dtype=torch.int64, device=device)


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.detach().contiguous()


def _buffer(nbytes: int, device: torch.device) -> Tensor:
    """Memory of a patch: on the device, or pinned on the host where the device has no room.

    The shadow has moved by now: to raise here would lose an update.
    """
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.cuda.OutOfMemoryError:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

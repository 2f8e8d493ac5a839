"""The diff of a whole model by kernels: one pass, one buffer, and one wait, for the counts.

    find ─▶ tally ─▶ frame ─▶ place ─▶ checksum     then, where the counts call for it: emit, dense

Everything is enqueued on the caller's current stream, so the weights may change in stream order as
soon as diff() returns. Scratch and buffer have room for what is to be expected after the last diff,
so that the device goes on while the host learns the counts; tiles that exceed it are looked at
twice, and a patch that does is laid out once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from operator import is_not

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...messages.manifest import Manifest
from .addresses import seeds_of, table_of
from .digest import LENGTH_FACTOR
from .kernels import frame as fact
from .kernels.checksum import checksum
from .kernels.dense import dense
from .kernels.digest import digest
from .kernels.emit import emit
from .kernels.find import SUMS, find
from .kernels.frame import frame
from .kernels.place import place
from .kernels.places import ROWS
from .kernels.plan import Group, Kind, Plan, castable
from .kernels.tally import tally
from .layout import Encoding, Form, Header, Table, full_nbytes, lay_out
from .patch import Columns, Patch, columns_of, full_table
from .tensors import dtype_of
from .timing import Mark, host_numbers, to_host

_MASK = (1 << 64) - 1
#: The share of a tile that has slots before anything is known of the run: 1 in 32.
_FIRST_SHARE = 32
_FEWEST_SLOTS = 8
#: More kinds of tensors than a plan can have: sizes, casts, alignments.
_KINDS = 16
#: Beyond 1 in 16 a bitmap is smaller than positions for 2-byte elements, and a second look is dear
#: only to memory that would be needed anyway.
_LARGEST_SHARE = 16
#: Bytes that no patch fits into.
_NO_ROOM = 16
#: By how much a patch may exceed the last one without being laid out twice: a quarter, and bytes.
_MORE_NBYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Found:
    """A patch that may still be written in stream order, whole at `written`, and how to learn what
    it came to.

    The callables wait for the device: `sums()` gives the digest of what was updated and the
    checksum of the patch, `times_us()` what diff and encode took.
    """

    patch: Patch
    written: Mark
    sums: Callable[[], tuple[int, int]]
    times_us: Callable[[], tuple[int, int]]


class _Work:
    """One diff under way: what it reads, and on the device what it has found so far.

    `slots` of each group's tiles have room in `records` and `values`; `counts` int32 [tiles],
    `block_counts` int32 and `ends` int64 [blocks].
    """

    def __init__(
        self, plan: Plan, olds: Tensor, news: Tensor, slots: Sequence[int], *, update: bool
    ) -> None:
        self.plan = plan
        self.olds = olds
        self.news = news
        self.update = update
        self.scratch = [
            _Scratch(group, each, plan.device)
            for group, each in zip(plan.groups, slots, strict=True)
        ]
        empty = partial(torch.empty, device=plan.device)
        self.counts = empty(plan.tiles, dtype=torch.int32)
        self.block_counts = empty(plan.blocks, dtype=torch.int32)
        self.ends = empty(plan.blocks, dtype=torch.int64)

    def find(self, changes: Tensor, totals: Tensor, changed: Tensor, over: Tensor) -> None:
        plan = self.plan
        for group, room in zip(plan.groups, self.scratch, strict=True):
            find(
                plan, group, self.olds, self.news, room.records, room.values, self.counts, changes,
                slots=room.slots, update=self.update,
            )  # fmt: skip
            tally(
                plan, group, self.counts, self.block_counts, totals, changed, over,
                slots=room.slots,
            )  # fmt: skip
        torch.cumsum(self.block_counts, 0, dtype=torch.int64, out=self.ends)

    def place(self, table: Tensor, buffer: Tensor) -> None:
        for group, room in zip(self.plan.groups, self.scratch, strict=True):
            place(
                self.plan, group, self.counts, self.block_counts, self.ends, table, room.records,
                room.values, buffer.data_ptr(), slots=room.slots,
            )  # fmt: skip

    def emit(self, over: Sequence[int], table: Tensor, buffer: Tensor) -> None:
        for group, room, any_over in zip(self.plan.groups, self.scratch, over, strict=False):
            if any_over:
                emit(
                    self.plan, group, self.olds, self.news, self.counts, self.block_counts,
                    self.ends, table, buffer.data_ptr(), slots=room.slots, update=self.update,
                )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Told:
    """What the host is told of a diff: facts of the patch (kernels/frame.py); of each group what
    has changed, and whether any tile had more than slots; of each tensor what has changed."""

    facts: Sequence[int]
    changed: Sequence[int]
    over: Sequence[int]
    totals: npt.NDArray[np.int64]

    @property
    def full(self) -> bool:
        """Whether the full form is smaller."""
        return bool(self.facts[fact.FULL])

    @property
    def written(self) -> bool:
        """Whether the patch has fitted the buffer that was there for it."""
        return bool(self.facts[fact.WRITTEN])

    @property
    def dense(self) -> bool:
        """Whether whole tensors are in it."""
        return self.full or bool(self.facts[fact.MEMBERS + Encoding.DENSE - 1])

    @property
    def whole(self) -> bool:
        """Whether place() has written all of it."""
        return self.written and not self.dense and not any(self.over)

    def shares(self) -> dict[Encoding, int]:
        """Bytes of the sections of each encoding."""
        return {encoding: self.facts[fact.SHARES + encoding - 1] for encoding in Encoding}


class Differ:
    """Finds what changed between two sets of tensors on one device. Not for several threads.

    `held`: the digest of what diff() is to update.
    """

    def __init__(self, manifest: Manifest, device: torch.device, *, held: int = 0) -> None:
        self._manifest = manifest
        self._hash = manifest.hash
        self._numel, self._dense_nbytes = manifest.numel, manifest.nbytes
        self._device = device
        self._columns = columns_of(manifest)
        self._dtypes = [dtype_of(spec) for spec in manifest.tensors]
        self._seeds = seeds_of(manifest)
        self._plan: Plan | None = None
        self._old: _Pointers | None = None
        self._new: _Pointers | None = None
        #: Changed elements of each group in the last diff, by its kind.
        self._changed: dict[Kind, int] = {}
        #: Bytes of the last patch; 0 before the first.
        self._nbytes = 0
        self._held = held
        tensors = len(manifest.tensors)
        #: Where each tensor's section lies, as kernels/places.py has it.
        self._table = torch.empty(ROWS * tensors, dtype=torch.int64, device=device)
        # Together, so that they are zeroed, and come to the host, in one go.
        sizes = [SUMS, SUMS, fact.FACTS, _KINDS, _KINDS, tensors]
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        #: Sums of the digest's changes since the beginning, and of one checksum.
        self._sums = self._numbers[: 2 * SUMS].view(2, SUMS)
        _, _, self._facts, self._group_changed, self._over, self._totals = torch.split(
            self._numbers, sizes
        )
        self._told = host_numbers(sum(sizes[2:]), device)
        self._here = self._told.numpy()

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
        waiting: Callable[[], None] | None = None,
        token: object = None,
    ) -> Found:
        """The patch from `old` to `new`, one tensor each for every one in the manifest.

        With `begin`, `old` holds the new bits from then on: it is integer bits, contiguous, aligned
        to 16 bytes, where the device can write; `begin` is called before the first write, and what
        is raised before has changed nothing. `waiting` is called when all is enqueued that can be
        before the counts are known. `token`: the same object while `new` lies where it lay, and
        everything in it is contiguous.
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
        slots = [self._slots(group) for group in plan.groups]
        work = _Work(plan, olds, news, slots, update=update)
        room = self._nbytes + self._nbytes // 4 + _MORE_NBYTES if self._nbytes else _NO_ROOM
        buffer = _buffer(room, self._device)
        self._numbers[SUMS:].zero_()
        if begin is not None:
            begin()
        work.find(self._sums[0], self._totals, self._group_changed, self._over)
        self._frame(plan, buffer, base_version, version)
        self._told.copy_(self._numbers[2 * SUMS :], non_blocking=True)
        found = Mark(self._device)
        work.place(self._table, buffer)
        checksum(buffer, self._sums[1], self._facts[fact.WRITTEN :])
        sums, written = to_host(self._sums), Mark(self._device)
        if waiting is not None:
            waiting()
        found.wait()
        told = self._heard(plan)
        nbytes = full_nbytes(self._dense_nbytes) if told.full else told.facts[fact.NBYTES]
        if not told.written:
            buffer = _buffer(nbytes, self._device)
        patch = self._patch(told, buffer[:nbytes], base_version, version)
        if not told.whole:
            self._complete(work, told, patch, old if update else sources)
            sums, written = to_host(self._sums), Mark(self._device)
        self._nbytes = nbytes

        def totalled() -> tuple[int, int]:
            written.wait()
            changes, payload = sums.numpy().astype(np.uint64).sum(1, dtype=np.uint64).tolist()
            checksum = (payload + nbytes * LENGTH_FACTOR) & _MASK
            return (self._held + changes) & _MASK, checksum

        def times_us() -> tuple[int, int]:
            written.wait()
            return began.until_us(found), found.until_us(written)

        return Found(patch, written, totalled, times_us)

    def _frame(self, plan: Plan, buffer: Tensor, base_version: int, version: int) -> None:
        frame(
            plan, self._totals, self._table, self._facts, buffer,
            manifest_hash=self._hash, base_version=base_version, version=version,
            numel=self._numel, dense_nbytes=self._dense_nbytes,
        )  # fmt: skip

    def _heard(self, plan: Plan) -> _Told:
        """What has come to the host, which has waited for it."""
        numbers = self._here[: fact.FACTS + 2 * _KINDS].tolist()
        facts, rest = numbers[: fact.FACTS], numbers[fact.FACTS :]
        totals = self._here[len(numbers) :].copy()
        told = _Told(facts, rest[:_KINDS], rest[_KINDS:], totals)
        for group, each in zip(plan.groups, told.changed, strict=False):
            self._changed[group.kind] = each
        return told

    def _complete(self, work: _Work, told: _Told, patch: Patch, sources: Sequence[Tensor]) -> None:
        """Write what place() has not: all of it, if there was no room; tiles with more changes than
        slots; whole tensors."""
        plan, buffer = work.plan, patch.buffer
        if told.full:
            head = torch.frombuffer(bytearray(patch.start()), dtype=torch.uint8)
            buffer[: len(head)].copy_(head)
            buffer[len(head) + self._dense_nbytes :].zero_()
            # For emit(): what it looks at moves to the old copy, and nowhere else.
            self._table[: plan.tensors].fill_(Encoding.DENSE)
        elif not told.written:
            assert patch.base_version is not None
            self._frame(plan, buffer, patch.base_version, patch.version)
            work.place(self._table, buffer)
        work.emit(told.over, self._table, buffer)
        if work.update and any(told.over):
            self._digest_anew(plan, work.olds)
        if told.full:
            for section in full_table(self._manifest).sections:
                values = patch.values(section)
                bits = sources[section.index].reshape(-1)
                values.copy_(bits.view(values.dtype), non_blocking=True)
        elif told.dense:
            for group in plan.groups:
                # The old copy holds the new bits by now, cast and aligned.
                kind = replace(group.kind, cast="", aligned=True) if work.update else group.kind
                dense(
                    plan, replace(group, kind=kind), work.olds if work.update else work.news,
                    self._table, buffer.data_ptr(), into=False,
                )  # fmt: skip
        self._sums[1].zero_()
        checksum(buffer, self._sums[1])

    def _digest_anew(self, plan: Plan, olds: Tensor) -> None:
        """Put the digest's change since the beginning right by reading all that is held."""
        changes = self._sums[0]
        changes.zero_()
        for group in plan.groups:
            kind = replace(group.kind, cast="", aligned=True)
            digest(plan, replace(group, kind=kind), olds, changes, first=0, blocks=group.blocks)
        changes[:1].sub_(self._held - (1 << 64) if self._held >> 63 else self._held)

    def _patch(self, told: _Told, buffer: Tensor, base_version: int, version: int) -> Patch:
        header = Header(
            form=Form.FULL if told.full else Form.SECTIONS,
            sections=0 if told.full else told.facts[fact.SECTIONS],
            manifest_hash=self._hash,
            base_version=base_version,
            version=version,
            changed=told.facts[fact.CHANGES],
            numel=self._numel,
            dense_nbytes=self._dense_nbytes,
            nbytes=buffer.numel(),
        )
        if told.full:
            return Patch(buffer, header, Table.empty(), self._manifest)
        table = partial(_table_of, self._columns, told.totals)
        return Patch(buffer, header, table, self._manifest, told.shares())

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


def _table_of(columns: Columns, totals: npt.NDArray[np.int64]) -> Table:
    """The section table of a patch in which so many elements of each tensor changed."""
    index = totals.nonzero()[0]
    return lay_out(index, columns.itemsize[index], columns.numel[index], totals[index])


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

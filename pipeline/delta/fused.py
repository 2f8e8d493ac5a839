"""The diff of a whole model by kernels: one pass, one buffer, and one wait, for the counts.

    find ─▶ tally ─▶ frame ─▶ place ─▶ checksum     then, where the counts call for it: emit, dense

Everything is enqueued on the caller's current stream, so the weights may change in stream order as
soon as diff() returns. Scratch and buffer have room for what is to be expected after the last diff,
so that the device goes on while the host learns the counts; tiles that exceed it are looked at
twice, and a patch that does is laid out once more.
"""

from __future__ import annotations

import math
import threading
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
from .addresses import seed_at, seeds_of, table_of
from .bits import plain
from .digest import LENGTH_FACTOR
from .kernels import frame as fact
from .kernels.find import SUMS
from .kernels.plan import Group, Kind, Plan, castable
from .layout import Form, Header, Table, lay_out
from .patch import Columns, Patch, columns_of
from .steps import Told, Work
from .tensors import dtype_of
from .timing import Mark

_MASK = (1 << 64) - 1
#: The share of a tile that has slots before anything is known of the run: 1 in 32.
_FIRST_SHARE = 32
_FEWEST_SLOTS = 8
#: Beyond 1 in 16 a bitmap is smaller than positions for 2-byte elements, and a second look is dear
#: only to memory that would be needed anyway.
_LARGEST_SHARE = 16
#: Blocks of 65,536 elements of a small model: a milliard elements, a diff of 1.2 ms.
_SMALL = 1 << 14
#: Bytes that no patch fits into.
_NO_ROOM = 16
#: By how much a patch may exceed the last one without being laid out twice: a quarter, and bytes.
_MORE_NBYTES = 1 << 16


class Found:
    """What a diff came to: sums() and times_us() wait until its patch is whole, at `written`; on
    any thread."""

    def __init__(
        self, nbytes: int, began: Mark, found: Mark, written: Mark, work: Work, held: int
    ) -> None:
        self.written = written
        self._nbytes = nbytes
        self._began = began
        self._found = found
        self._held = held
        self._asking = threading.Lock()
        #: None once its sums are known: it goes on to other diffs.
        self._work: Work | None = work
        self._sums = (0, 0)

    def sums(self) -> tuple[int, int]:
        """The digest of what was updated, and the checksum of the patch."""
        # The next diff takes its work over: it must not come between the wait and the reading.
        with self._asking:
            if self._work is not None:
                self.written.wait()
                change, payload = self._work.sums()
                checksum = (payload + self._nbytes * LENGTH_FACTOR) & _MASK
                self._sums = (self._held + change) & _MASK, checksum
                self._work = None
            return self._sums

    def times_us(self) -> tuple[int, int]:
        """What diff and encode took."""
        self.written.wait()
        return self._began.until_us(self._found), self._found.until_us(self.written)


class Differ:
    """Finds what changed between two sets of tensors on one device. Not for several threads.

    `held`: the digest of what diff() is to update. `places`: of each tensor, under which name it
    counts for the digest, and from which block of that on; None: not at all.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: torch.device,
        *,
        held: int = 0,
        places: Sequence[tuple[str, int] | None] | None = None,
    ) -> None:
        self._manifest = manifest
        self._hash = manifest.hash
        self.device = device
        self._columns = columns_of(manifest)
        self._dtypes = [dtype_of(spec) for spec in manifest.tensors]
        self._seeds = seeds_of(manifest)
        self._counted = [True] * len(self._seeds)
        if places is not None:
            self._seeds = [0 if place is None else seed_at(*place) for place in places]
            self._counted = [place is not None for place in places]
        self._plan: Plan | None = None
        self._old: _Pointers | None = None
        self._new: _Pointers | None = None
        #: Changed elements of each group in the last diff, by its kind.
        self._changed: dict[Kind, int] = {}
        #: Bytes of the last patch; 0 before the first.
        self._nbytes = 0
        self._held = held
        #: Sums of the digest's changes since the beginning, and of one checksum: int64 [2, SUMS].
        self._sums = torch.zeros((2, SUMS), dtype=torch.int64, device=device)
        self._no_room = torch.zeros(_NO_ROOM, dtype=torch.uint8, device=device)
        #: For the next diff; of a large model without its scratch.
        self._work: Work | None = None
        self._last: Found | None = None

    def begin(self, held: int) -> None:
        """Before the first diff: the digest of what it is to update, of what counts."""
        self._held = held

    # ---- one diff

    def knows(self, token: object) -> bool:
        """Whether this is the token of the last diff: all lies where it lay."""
        return token is not None and self._new is not None and token is self._new.token

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the kernels read all of these, the manifest's once or more, as it has them."""
        return all(
            tensor.device == self.device and castable(tensor.dtype, dtype)
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
    ) -> tuple[Patch, Found]:
        """The patch from `old` to `new`, one tensor each for every one in the manifest.

        It may still be written in stream order.

        With `begin`, `old` holds the new bits from then on: it is integer bits, contiguous, aligned
        to 16 bytes, where the device can write; `begin` is called before the first write, and what
        is raised before has changed nothing. `waiting` is called when all is enqueued that can be
        before the counts are known. `token`: the same object while `new` lies where it lay, and
        everything in it is contiguous; `new` is not looked at if knows(token).
        """
        update = begin is not None
        if self._last is not None:
            _ = self._last.sums()  # while its work is what it was
        began = Mark(self.device)
        # Strided tensors are copied; the copies are kept until all that reads them is enqueued.
        sources: Sequence[Tensor] = ()
        if not self.knows(token):
            sources = [_contiguous(tensor) for tensor in new]
            if any(map(is_not, sources, new)):
                token = None
        if not update:
            old = [_contiguous(tensor) for tensor in old]
        plan, *pointers = self._tables(old, sources, token)
        work = self._work_on(plan, (pointers[0], pointers[1]), update=update)
        # Of a small model it is queued as a graph, for it is over sooner than the host could queue
        # it; the scratch that it keeps for that is small, too.
        again = plan.blocks <= _SMALL
        buffer = self._expected()
        work.direct(buffer, base_version, version)
        try:
            if begin is not None:
                begin()
            work.find(again=again)
            found = Mark(self.device)
            work.write(again=again)
            written = Mark(self.device)
            if waiting is not None:
                waiting()
            found.wait()
            told = work.told()
            for group, each in zip(plan.groups, told.changed, strict=False):
                self._changed[group.kind] = each
            self._nbytes = nbytes = told.nbytes(work.dense_nbytes)
            if not told.written:
                buffer = _buffer(nbytes, self.device)
            patch = self._patch(told, buffer[:nbytes], base_version, version)
            if not told.whole:
                work.complete(told, patch, self._held, old if update else sources)
                written = Mark(self.device)
        finally:
            if not again:
                work.let_go()
        self._last = Found(nbytes, began, found, written, work, self._held)
        return patch, self._last

    def _expected(self) -> Tensor:
        """Memory that should do for the patch; if the device has no room for it, next to none."""
        if not self._nbytes:
            return self._no_room
        wanted = (self._nbytes + self._nbytes // 4 + _MORE_NBYTES) & -16
        try:
            return torch.empty(wanted, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError:
            return self._no_room

    def _work_on(self, plan: Plan, pointers: tuple[Tensor, Tensor], *, update: bool) -> Work:
        """The last diff's work, if this one's is the same, else a new one; with its scratch."""
        slots = [self._slots(group) for group in plan.groups]
        work = self._work
        if (
            work is None
            or work.plan is not plan
            or work.olds is not pointers[0]
            or work.news is not pointers[1]
            or work.slots != slots
            or work.update != update
        ):
            # The last one's memory goes first.
            self._work = work = None
            work = Work(self._manifest, plan, pointers, slots, self._sums, update=update)
        work.prepare()
        self._work = work
        return work

    def _patch(self, told: Told, buffer: Tensor, base_version: int, version: int) -> Patch:
        header = Header(
            form=Form.FULL if told.full else Form.SECTIONS,
            sections=0 if told.full else told.facts[fact.SECTIONS],
            manifest_hash=self._hash,
            base_version=base_version,
            version=version,
            changed=told.facts[fact.CHANGES],
            numel=self._manifest.numel,
            dense_nbytes=self._manifest.nbytes,
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
                self._plan = Plan(numels, self._seeds, kinds, self.device, self._counted)
            self._new = _Pointers.of(new, self.device, token, self._new)
        if self._old is None or self._old.token is not old:
            self._old = _Pointers.of(old, self.device, old, self._old)
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


def _contiguous(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous():
        return tensor
    return plain(tensor.detach()).contiguous().view(tensor.dtype)


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

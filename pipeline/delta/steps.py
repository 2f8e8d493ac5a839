"""The steps of a diff by kernels, and the memory that they work in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...messages.manifest import Manifest
from .graphs import Repeated
from .kernels import frame as fact
from .kernels.checksum import checksum
from .kernels.dense import dense
from .kernels.digest import digest
from .kernels.emit import emit
from .kernels.ends import ends_of
from .kernels.find import SUMS, find
from .kernels.frame import frame
from .kernels.place import place
from .kernels.places import ROWS
from .kernels.plan import KINDS, Group, Plan
from .kernels.tally import tally
from .layout import Encoding, full_nbytes
from .patch import Patch, full_table
from .timing import host_numbers


@dataclass(frozen=True, slots=True)
class Told:
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
        return bool(self.facts[fact.WHOLE])

    def nbytes(self, dense_nbytes: int) -> int:
        """Bytes of the patch, of a model of so many."""
        return full_nbytes(dense_nbytes) if self.full else self.facts[fact.NBYTES]

    def shares(self) -> dict[Encoding, int]:
        """Bytes of the sections of each encoding."""
        return {encoding: self.facts[fact.SHARES + encoding - 1] for encoding in Encoding}


class Work:
    """What a diff reads, what it writes to, and the queueing of its steps.

    Made for tensors that lie where they lie, and slots that suffice; from one diff to the next only
    `spot` changes, and with it nothing that the host has to say. So many `slots` has each tile of a
    group in its scratch; `counts` int32 [tiles], `block_counts` int32 and `ends` int64 [blocks];
    `table`: where each tensor's section lies, as kernels/places.py has it.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        pointers: tuple[Tensor, Tensor],
        slots: Sequence[int],
        sums: Tensor,
        *,
        update: bool,
    ) -> None:
        self.plan = plan
        self.olds, self.news = pointers
        self.slots = slots
        self.update = update
        device = plan.device
        self._manifest = manifest
        self._hash, self._numel, self.dense_nbytes = manifest.hash, manifest.numel, manifest.nbytes
        self._scratch: list[_Scratch] = []
        empty = partial(torch.empty, device=device)
        self._counts = empty(plan.tiles, dtype=torch.int32)
        self._block_counts = empty(plan.blocks, dtype=torch.int32)
        self._ends = empty(plan.blocks, dtype=torch.int64)
        self.table = empty(ROWS * plan.tensors, dtype=torch.int64)
        self.spot = empty(4, dtype=torch.int64)
        self._place = host_numbers(4, device)
        #: The digest's changes since the beginning; beside them, the sums of this patch's checksum.
        self._sums = sums
        # Together, so that they are zeroed, and come to the host, in one go.
        sizes = [fact.FACTS, KINDS, KINDS, plan.tensors]
        self._numbers = empty(sum(sizes), dtype=torch.int64)
        self._facts, self._changed, self._over, self._totals = torch.split(self._numbers, sizes)
        self._told = host_numbers(sum(sizes), device)
        self._host_sums = host_numbers(2 * SUMS, device)
        self._stream = _current_stream(device)
        self._finding = Repeated(device)
        self._writing = Repeated(device)

    def prepare(self) -> None:
        """Have scratch, if it was let go, and all memory for use on the current stream."""
        if not self._scratch:
            self._scratch = [
                _Scratch(group, each, self.plan.device)
                for group, each in zip(self.plan.groups, self.slots, strict=True)
            ]
        stream = _current_stream(self.plan.device)
        if stream is not None and stream != self._stream:
            self._stream = stream
            parts = self._counts, self._block_counts, self._ends, self.table, self.spot
            kept = (each for room in self._scratch for each in (room.records, room.values))
            for tensor in (*parts, self._numbers, *kept):
                tensor.record_stream(stream)  # or it would be given away with work queued there

    def direct(self, buffer: Tensor, base_version: int, version: int) -> None:
        """Say where the patch goes, and what it is; the device is through with the last one."""
        self._place.numpy()[:] = buffer.data_ptr(), buffer.numel(), base_version, version

    def find(self, *, again: bool) -> None:
        """Queue all up to what the host waits for. `again`: as it was, or will be, once more."""
        self.spot.copy_(self._place, non_blocking=True)
        if again:
            self._finding.queue(self._find)
        else:
            self._find()
        self._told.copy_(self._numbers, non_blocking=True)

    def write(self, *, again: bool) -> None:
        """Queue what follows: the patch, if it fits, and its checksum."""
        if again:
            self._writing.queue(self._write)
        else:
            self._write()
        self._tell_sums()

    def _find(self) -> None:
        plan = self.plan
        self._numbers.zero_()
        self._sums[1].zero_()
        for group, room in zip(plan.groups, self._scratch, strict=True):
            find(
                plan, group, self.olds, self.news, room.records, room.values, self._counts,
                self._sums[0], slots=room.slots, update=self.update,
            )  # fmt: skip
            tally(
                plan, group, self._counts, self._block_counts, self._totals, self._changed,
                self._over, slots=room.slots,
            )  # fmt: skip
        ends_of(plan, self._block_counts, self._ends)
        self._frame()

    def _frame(self) -> None:
        frame(
            self.plan, self._totals, self._over, self.table, self._facts, self.spot,
            manifest_hash=self._hash, numel=self._numel, dense_nbytes=self.dense_nbytes,
        )  # fmt: skip

    def _write(self) -> None:
        self._put()
        # Of none that complete() is to complete: it will be summed up then.
        self._sum_up(self._facts[fact.WHOLE :])

    def _put(self) -> None:
        for group, room in zip(self.plan.groups, self._scratch, strict=True):
            place(
                self.plan, group, self._counts, self._block_counts, self._ends, self.table,
                room.records, room.values, self.spot, slots=room.slots,
            )  # fmt: skip

    def _sum_up(self, nbytes: Tensor) -> None:
        checksum(self.spot, nbytes, self._sums[1], largest=self.dense_nbytes)

    def _tell_sums(self) -> None:
        self._host_sums.copy_(self._sums.view(-1), non_blocking=True)

    def let_go(self) -> None:
        """Nothing more is queued: what is, has its memory in stream order."""
        self._scratch = []

    def told(self) -> Told:
        """What has come to the host, which has waited for it."""
        here = self._told.numpy()
        numbers = here[: fact.FACTS + 2 * KINDS].tolist()
        facts, rest = numbers[: fact.FACTS], numbers[fact.FACTS :]
        return Told(facts, rest[:KINDS], rest[KINDS:], here[len(numbers) :].copy())

    def sums(self) -> tuple[int, int]:
        """The digest's change and the sum of the patch's checksum mod 2⁶⁴, likewise."""
        sums = self._host_sums.tolist()
        return sum(sums[:SUMS]), sum(sums[SUMS:])

    def complete(self, told: Told, patch: Patch, held: int, sources: Sequence[Tensor]) -> None:
        """Queue what write() has not written: all of it, if there was no room; tiles with more
        changes than slots; whole tensors."""
        plan, buffer = self.plan, patch.buffer
        assert patch.base_version is not None
        self.direct(buffer, patch.base_version, patch.version)
        self.spot.copy_(self._place, non_blocking=True)
        if told.full:
            head = torch.frombuffer(bytearray(patch.start()), dtype=torch.uint8)
            buffer[: len(head)].copy_(head)
            buffer[len(head) + self.dense_nbytes :].zero_()
            # For emit(): what it looks at moves to the old copy, and nowhere else.
            self.table[: plan.tensors].fill_(Encoding.DENSE)
        elif not told.written:
            self._frame()
            self._put()
        for group, room, any_over in zip(plan.groups, self._scratch, told.over, strict=False):
            if any_over:
                emit(
                    plan, group, self.olds, self.news, self._counts, self._block_counts, self._ends,
                    self.table, self.spot, slots=room.slots, update=self.update,
                )  # fmt: skip
        if self.update and any(told.over):
            self._digest_anew(held)
        if told.full:
            for section in full_table(self._manifest).sections:
                values = patch.values(section)
                bits = sources[section.index].reshape(-1)
                values.copy_(bits.view(values.dtype), non_blocking=True)
        elif told.dense:
            for group in plan.groups:
                # The old copy holds the new bits by now, cast and aligned.
                kind = replace(group.kind, cast="", aligned=True) if self.update else group.kind
                dense(
                    plan, replace(group, kind=kind), self.olds if self.update else self.news,
                    self.table, self.spot, into=False,
                )  # fmt: skip
        self._sums[1].zero_()
        self._sum_up(self.spot[1:])
        self._tell_sums()

    def _digest_anew(self, held: int) -> None:
        """Put the digest's change since the beginning right by reading all that is held."""
        changes = self._sums[0]
        changes.zero_()
        counted = self.olds * self.plan.counted
        for group in self.plan.groups:
            kind = replace(group.kind, cast="", aligned=True)
            own = replace(group, kind=kind)
            digest(self.plan, own, counted, changes, first=0, blocks=group.blocks)
        changes[:1].sub_(held - (1 << 64) if held >> 63 else held)


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class _Scratch:
    """Where a group's tiles put what they find: `slots` records each."""

    def __init__(self, group: Group, slots: int, device: torch.device) -> None:
        self.slots = slots
        size = group.tiles * slots
        itemsize = group.kind.itemsize
        wide = torch.int64 if itemsize == 4 else torch.int32
        self.records = torch.empty(size, dtype=wide, device=device)
        self.values = torch.empty(size if itemsize == 8 else 1, dtype=torch.int64, device=device)

"""Read the section table of a patch that has come, and check it against the manifest.

On the device, so that a payload is checked whole in one wait for it. What is wrong with a table,
layout.Table.parse() finds out; here it is only seen that something is, and then no section is.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .launch import kernel
from .places import (
    CHANGED,
    COUNTS,
    ENCODING,
    ENTRY_NBYTES,
    HEAD,
    PLACES,
    ROWS,
    VALUES,
    aligned,
    extent,
)
from .plan import Plan

#: What is to know of a table: int64 [FACTS]. Faults; sections and, of all together, changed
#: elements, elements, bytes if they were dense, and bytes up to the last one's end; sections of
#: each encoding from SPARSE on.
FAULTS, SECTIONS, CHANGES, NUMEL, DENSE, END, MEMBERS = 0, 1, 2, 3, 4, 5, 6
FACTS = 16
#: Entries that it takes at a time.
_LANES = 256


@kernel(numbers=["tensors"])
def _sections(
    numels, itemsizes, table, facts, tensors, spot,
    LANES: tl.constexpr, ROWS: tl.constexpr,
    ENCODING: tl.constexpr, COUNTS: tl.constexpr, PLACES: tl.constexpr, VALUES: tl.constexpr,
    CHANGED: tl.constexpr,
    FAULTS: tl.constexpr, SECTIONS: tl.constexpr, CHANGES: tl.constexpr, NUMEL: tl.constexpr,
    DENSE: tl.constexpr, END: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    patch, nbytes = tl.load(spot), tl.load(spot + 1)
    lane = tl.arange(0, LANES)
    kind = tl.arange(0, 4)
    at = 0
    while at < tensors * ROWS:
        tl.store(table + at + lane, tl.zeros((LANES,), tl.int64), mask=at + lane < tensors * ROWS)
        at += LANES
    sections = tl.load((patch + 8).to(tl.pointer_type(tl.uint32))).to(tl.int64)
    room = (nbytes - HEAD) // ENTRY_NBYTES
    faults = ((sections > tensors) | (sections > room)).to(tl.int64)
    sections = tl.where(faults > 0, 0, sections)
    entries = (patch + HEAD).to(tl.pointer_type(tl.int64))
    changes = tl.zeros((LANES,), dtype=tl.int64)
    numel = tl.zeros((LANES,), dtype=tl.int64)
    dense = tl.zeros((LANES,), dtype=tl.int64)
    members = tl.zeros((4,), dtype=tl.int64)
    start = aligned(HEAD + ENTRY_NBYTES * sections)
    at = 0
    while at < sections:
        live = at + lane < sections
        entry = entries + (at + lane) * 5
        head = tl.load(entry, mask=live, other=0)
        before = tl.load(entry - 5, mask=live & (at + lane > 0), other=-1)
        index = head & 0xFFFFFFFF
        # -1 & 0xFFFFFFFF would be the largest index: nothing comes before the first.
        previous = tl.where(at + lane > 0, before & 0xFFFFFFFF, -1)
        encoding = (head >> 32) & 0xFF
        itemsize = head >> 40
        known = live & (index < tensors)
        size = tl.load(entry + 1, mask=live, other=0)
        count = tl.load(entry + 2, mask=live, other=0)
        wrong = (index <= previous) | (index >= tensors)
        wrong |= (encoding < 1) | (encoding > 3)
        wrong |= itemsize != tl.load(itemsizes + index, mask=known, other=-1)
        wrong |= size != tl.load(numels + index, mask=known, other=-1)
        wrong |= (count < 1) | (count > size)
        good = live & (wrong == 0)
        encoding = tl.where(good, encoding, 0)
        size = tl.where(good, size, 0)
        count = tl.where(good, count, 0)
        itemsize = tl.where(good, itemsize, 0)
        _, _, _, values, end = extent(encoding, size, itemsize, count)
        each = aligned(end)
        offset = start + tl.cumsum(each, 0) - each
        wrong |= tl.load(entry + 3, mask=live, other=0) != offset
        wrong |= tl.load(entry + 4, mask=live, other=0) != offset + values
        faults += tl.sum((live & wrong).to(tl.int64), axis=0)
        changes += count
        numel += size
        dense += size * itemsize
        members += tl.sum((encoding[:, None] == kind[None, :]).to(tl.int64), axis=0)
        start += tl.sum(each, axis=0)
        at += LANES
    faults += (start != nbytes).to(tl.int64)
    tl.store(facts + FAULTS, faults)
    tl.store(facts + SECTIONS, sections)
    tl.store(facts + CHANGES, tl.sum(changes, axis=0))
    tl.store(facts + NUMEL, tl.sum(numel, axis=0))
    tl.store(facts + DENSE, tl.sum(dense, axis=0))
    tl.store(facts + END, start)
    tl.store(facts + MEMBERS + kind - 1, members, mask=kind > 0)
    # The zeros are all there before a section takes its tensor's place.
    tl.debug_barrier()
    at = 0
    while (at < sections) & (faults == 0):
        live = at + lane < sections
        entry = entries + (at + lane) * 5
        head = tl.load(entry, mask=live, other=0)
        encoding = (head >> 32) & 0xFF
        size = tl.load(entry + 1, mask=live, other=0)
        count = tl.load(entry + 2, mask=live, other=0)
        offset = tl.load(entry + 3, mask=live, other=0)
        _, first, _, values, _ = extent(encoding, size, head >> 40, count)
        row = table + (head & 0xFFFFFFFF)
        tl.store(row + ENCODING * tensors, encoding, mask=live)
        tl.store(row + COUNTS * tensors, offset, mask=live)
        tl.store(row + PLACES * tensors, offset + first, mask=live)
        tl.store(row + VALUES * tensors, offset + values, mask=live)
        tl.store(row + CHANGED * tensors, count, mask=live)
        at += LANES


def sections(plan: Plan, table: Tensor, facts: Tensor, spot: Tensor) -> None:
    """Read the table of a patch in the sectioned form; `spot`: int64, its address and its bytes.

    Written are `facts` (int64 [FACTS]) and `table` (int64 [ROWS · tensors], see places.py), all of
    it zero if anything is wrong. Nothing beyond its end is read.
    """
    _sections[(1,)](
        plan.numels, plan.itemsizes, table, facts, plan.tensors, spot,
        LANES=_LANES, ROWS=ROWS,
        ENCODING=ENCODING, COUNTS=COUNTS, PLACES=PLACES, VALUES=VALUES, CHANGED=CHANGED,
        FAULTS=FAULTS, SECTIONS=SECTIONS, CHANGES=CHANGES, NUMEL=NUMEL, DENSE=DENSE, END=END,
        MEMBERS=MEMBERS, num_warps=8,
    )  # fmt: skip

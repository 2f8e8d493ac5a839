"""Lay a patch out by what each tensor's changes came to, and write all of it that is no array:
header, section table, padding.

On the device, because to ask the host for it would cost a small round a third of its time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..layout import ALLOWANCE_NBYTES, FORMAT, MAGIC, full_nbytes
from .launch import kernel
from .places import (
    CHANGED,
    COUNTS,
    ENCODING,
    ENTRY_NBYTES,
    HEAD,
    PLACES,
    VALUES,
    aligned,
    choice,
    extent,
)
from .plan import KINDS, Plan

#: What is to know of a patch: int64 [FACTS]. Bytes; bytes that were written, 0 where they did not
#: fit; changed elements; sections; whether the full form is smaller; sections and bytes of each
#: encoding from SPARSE on; and bytes again, 0 where place() does not write all of them.
NBYTES, WRITTEN, CHANGES, SECTIONS, FULL, MEMBERS, SHARES, WHOLE = 0, 1, 2, 3, 4, 5, 8, 11
FACTS = 16
#: Tensors that it takes at a time.
_LANES = 256
#: A buffer that is larger than twice the patch, by more than this, does not fit either.
_SLACK = 1 << 20
_START = int.from_bytes(MAGIC + bytes([FORMAT]), "little")


@triton.jit
def _columns(totals, numels, itemsizes, tensor, live):
    """What is to know of some tensors: changed elements, elements, bytes of one."""
    count = tl.load(totals + tensor, mask=live, other=0)
    size = tl.load(numels + tensor, mask=live, other=0)
    return count, size, tl.load(itemsizes + tensor, mask=live, other=1)


@kernel(
    numbers=[
        "tensors", "largest", "manifest_low", "manifest_high", "numel", "dense_nbytes",
    ]
)  # fmt: skip
def _frame(
    totals, numels, itemsizes, over, table, facts, tensors, spot, largest,
    manifest_low, manifest_high, numel, dense_nbytes,
    START: tl.constexpr, SLACK: tl.constexpr, LANES: tl.constexpr,
    ENCODING: tl.constexpr, COUNTS: tl.constexpr, PLACES: tl.constexpr, VALUES: tl.constexpr,
    CHANGED: tl.constexpr,
    NBYTES: tl.constexpr, WRITTEN: tl.constexpr, CHANGES: tl.constexpr, SECTIONS: tl.constexpr,
    FULL: tl.constexpr, MEMBERS: tl.constexpr, SHARES: tl.constexpr, WHOLE: tl.constexpr,
    KINDS: tl.constexpr,
):  # fmt: skip
    patch, capacity = tl.load(spot), tl.load(spot + 1)
    lane = tl.arange(0, LANES)
    kind = tl.arange(0, 4)
    changed = tl.zeros((LANES,), dtype=tl.int64)
    members = tl.zeros((4,), dtype=tl.int64)
    shares = tl.zeros((4,), dtype=tl.int64)
    at = 0
    while at < tensors:
        live = at + lane < tensors
        count, size, itemsize = _columns(totals, numels, itemsizes, at + lane, live)
        encoding = choice(size, itemsize, count)
        _, _, _, _, end = extent(encoding, size, itemsize, count)
        is_of = encoding[:, None] == kind[None, :]
        changed += count
        members += tl.sum(is_of.to(tl.int64), axis=0)
        shares += tl.sum(tl.where(is_of, aligned(end)[:, None], 0), axis=0)
        at += LANES
    members = tl.where(kind > 0, members, 0)
    sections = tl.sum(members, axis=0)
    total = aligned(HEAD + ENTRY_NBYTES * sections) + tl.sum(shares, axis=0)
    full = total > largest
    fits = (total <= capacity) & (capacity <= 2 * total + SLACK) & (full == 0)
    tl.store(facts + NBYTES, total)
    tl.store(facts + WRITTEN, tl.where(fits, total, 0))
    beyond = tl.sum(tl.where(kind == 3, members, 0), axis=0)
    beyond += tl.sum(tl.load(over + tl.arange(0, KINDS)), axis=0)
    tl.store(facts + WHOLE, tl.where(fits & (beyond == 0), total, 0))
    tl.store(facts + CHANGES, tl.sum(changed, axis=0))
    tl.store(facts + SECTIONS, sections)
    tl.store(facts + FULL, full.to(tl.int64))
    tl.store(facts + MEMBERS + kind - 1, members, mask=kind > 0)
    tl.store(facts + SHARES + kind - 1, shares, mask=kind > 0)
    if fits:
        words = patch.to(tl.pointer_type(tl.int64))
        tl.store(words, START)
        tl.store(words + 1, sections)
        tl.store(words + 2, manifest_low)
        tl.store(words + 3, manifest_high)
        tl.store(words + 4, tl.load(spot + 2))
        tl.store(words + 5, tl.load(spot + 3))
        tl.store(words + 6, tl.sum(changed, axis=0))
        tl.store(words + 7, numel)
        tl.store(words + 8, dense_nbytes)
        tl.store(words + 9, total)
        # An odd number of entries ends 8 bytes short of the first section.
        table_end = patch + HEAD + ENTRY_NBYTES * sections
        tl.store(table_end.to(tl.pointer_type(tl.int64)), 0, mask=sections % 2 == 1)
    byte = tl.arange(0, 16)
    bytes_at = patch.to(tl.pointer_type(tl.uint8))
    nothing = tl.zeros((LANES, 16), dtype=tl.uint8)
    start = aligned(HEAD + ENTRY_NBYTES * sections)
    rank = sections - sections
    at = 0
    while at < tensors:
        live = at + lane < tensors
        count, size, itemsize = _columns(totals, numels, itemsizes, at + lane, live)
        encoding = tl.where(fits, choice(size, itemsize, count), 0)
        counts, first, places, values, end = extent(encoding, size, itemsize, count)
        each = aligned(end)
        present = encoding > 0
        offset = tl.where(present, start + tl.cumsum(each, 0) - each, 0)
        row = table + at + lane
        tl.store(row + ENCODING * tensors, encoding.to(tl.int64), mask=live)
        tl.store(row + COUNTS * tensors, offset, mask=live)
        tl.store(row + PLACES * tensors, offset + first, mask=live)
        tl.store(row + VALUES * tensors, offset + values, mask=live)
        tl.store(row + CHANGED * tensors, tl.where(present, count, 0), mask=live)
        if fits:
            place = rank + tl.cumsum(present.to(tl.int64), 0) - 1
            entry = (patch + HEAD + ENTRY_NBYTES * place).to(tl.pointer_type(tl.int64))
            head = (at + lane).to(tl.int64) | (encoding.to(tl.int64) << 32) | (itemsize << 40)
            tl.store(entry, head, mask=present)
            tl.store(entry + 1, size, mask=present)
            tl.store(entry + 2, count, mask=present)
            tl.store(entry + 3, offset, mask=present)
            tl.store(entry + 4, offset + values, mask=present)
            gap = (offset + counts)[:, None] + byte[None, :]
            tl.store(bytes_at + gap, nothing, mask=gap < (offset + first)[:, None])
            gap = (offset + places)[:, None] + byte[None, :]
            tl.store(bytes_at + gap, nothing, mask=gap < (offset + values)[:, None])
            gap = (offset + end)[:, None] + byte[None, :]
            tl.store(bytes_at + gap, nothing, mask=gap < (offset + each)[:, None])
        start += tl.sum(each, axis=0)
        rank += tl.sum(present.to(tl.int64), axis=0)
        at += LANES


def frame(
    plan: Plan,
    totals: Tensor,
    over: Tensor,
    table: Tensor,
    facts: Tensor,
    spot: Tensor,
    *,
    manifest_hash: str,
    numel: int,
    dense_nbytes: int,
) -> None:
    """Write the frame of a patch.

    `spot`: int64 [4], the address of its buffer, the bytes that are there, the version that it
    applies to and the one that it makes.

    `totals`, `over`: tally()'s, 0 where it added nothing. Written are `facts` (int64 [FACTS]) and
    `table` (int64 [ROWS · tensors], see places.py). Where the patch does not fit, or takes the full
    form, nothing of it is written, and `table` says that no tensor has a section.
    """
    low, high = (
        int.from_bytes(bytes.fromhex(half), "little", signed=True)
        for half in (manifest_hash[:16], manifest_hash[16:])
    )
    most = dense_nbytes + dense_nbytes // 100 + ALLOWANCE_NBYTES
    _frame[(1,)](
        totals, plan.numels, plan.itemsizes, over, table, facts, plan.tensors, spot,
        max(most, full_nbytes(dense_nbytes)), low, high, numel, dense_nbytes,
        START=_START, SLACK=_SLACK, LANES=_LANES,
        ENCODING=ENCODING, COUNTS=COUNTS, PLACES=PLACES, VALUES=VALUES, CHANGED=CHANGED,
        NBYTES=NBYTES, WRITTEN=WRITTEN, CHANGES=CHANGES, SECTIONS=SECTIONS, FULL=FULL,
        MEMBERS=MEMBERS, SHARES=SHARES, WHOLE=WHOLE, KINDS=KINDS, num_warps=8,
    )  # fmt: skip

"""Find what changed in all tensors of a group, in one pass over old and new.

A tile compares, packs its changes to words, counts them and walks the set bits: position and new
value go to the tile's own slots in scratch, the new value to the old copy, and new - old into the
digest. A tile with more changes than slots only counts: emit.py looks at it again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bits import (
    addend,
    block_factor,
    changed_words,
    changed_words_of_pairs,
    lowest,
    popcount,
    published,
)
from .launch import kernel
from .plan import Group, Plan, factors, word

#: Sums of the digest's change, so that programs do not queue for one address.
SUMS = 64
#: Tiles that a program looks at, one after the other.
_CHAIN = 2
#: Registers of a thread: with more, too few warps are there to hide the memory's latency.
_REGISTERS = 96


@triton.jit
def _total_and_most(total, most, other_total, other_most):
    return total + other_total, tl.maximum(most, other_most)


@triton.jit
def _take(
    words, old, new, inside, tile, records, values, counts, rows, columns, slots,
    BITS: tl.constexpr, ITEMSIZE: tl.constexpr, CAST: tl.constexpr, NATIVE: tl.constexpr,
    T: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """Count a tile's changes and, if they fit its slots, take them; the digest's change / G."""
    W: tl.constexpr = T // 32
    count = popcount(words)
    through = tl.cumsum(count, 0)
    total, most = tl.reduce((count, count), 0, _total_and_most)
    tl.store(counts + tile, total)
    sums = tl.zeros((W,), dtype=tl.uint64)
    if (total > 0) & (total <= slots):
        slot = tile.to(tl.int64) * slots + through - count
        base = tl.arange(0, W) * 32
        while most > 0:
            live = words != 0
            at = base + lowest(words)
            value = published(tl.load(new + at, mask=live, other=0), CAST, NATIVE)
            if UPDATE:
                before = tl.load(old + at, mask=live, other=0)
                factor = tl.load(columns + (at & 255), mask=live, other=0)
                if ITEMSIZE <= 2:
                    change = (value.to(tl.int32) - before.to(tl.int32)).to(tl.int64)
                    sums += change.to(tl.uint64, bitcast=True) * factor.to(tl.uint64, bitcast=True)
                else:
                    change = addend(value, ITEMSIZE) - addend(before, ITEMSIZE)
                    sums += change * factor.to(tl.uint64, bitcast=True)
            words = words & (words - 1)
            place = (inside + at).to(tl.uint32)
            if ITEMSIZE <= 2:
                tl.store(records + slot, place | (value.to(tl.uint32) << 16), mask=live)
            elif ITEMSIZE == 4:
                tl.store(
                    records + slot, place.to(tl.uint64) | (value.to(tl.uint64) << 32), mask=live
                )
            else:
                tl.store(records + slot, place, mask=live)
                tl.store(values + slot, value, mask=live)
            if UPDATE:
                tl.store(old + at, value, mask=live)
            slot += 1
            most -= 1
        if UPDATE:
            factor = tl.load(rows + ((inside + base) >> 8))
            sums *= factor.to(tl.uint64, bitcast=True)
    return sums


@kernel(numbers=["first", "slots"])
def _find(
    block_tensor, first_block, numels, seeds, counted, rows, columns, olds, news,
    records, values, counts, changes, first, slots,
    BITS: tl.constexpr, ITEMSIZE: tl.constexpr, CAST: tl.constexpr, NATIVE: tl.constexpr,
    RAW: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr, CHAIN: tl.constexpr,
    UPDATE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = 65536 // T
    PAIRED: tl.constexpr = (ITEMSIZE == 2) and (CAST == "") and ALIGNED
    tile = tl.program_id(0) * CHAIN
    block = first + tile // TILES
    inside = (tile % TILES) * T
    tensor = tl.load(block_tensor + block)
    index = block - tl.load(first_block + tensor)
    start = index.to(tl.int64) * 65536 + inside
    left = tl.load(numels + tensor) - start
    old = tl.load(olds + tensor).to(tl.pointer_type(BITS)) + start
    new = tl.load(news + tensor).to(tl.pointer_type(RAW)) + start
    if ALIGNED:
        old = tl.multiple_of(old, 16)
        new = tl.multiple_of(new, 16)
    lane = tl.arange(0, T)
    sums = tl.zeros((T // 32,), dtype=tl.uint64)
    step = 0
    if left <= 0:
        tl.store(counts + tile + tl.arange(0, CHAIN), tl.zeros((CHAIN,), dtype=tl.int32))
    elif left >= CHAIN * T:
        while step < CHAIN:
            if PAIRED:
                pair = step * (T // 2) + tl.arange(0, T // 2)
                words = changed_words_of_pairs(
                    tl.load(old.to(tl.pointer_type(tl.uint32)) + pair),
                    tl.load(new.to(tl.pointer_type(tl.uint32)) + pair),
                    T,
                )
            else:
                here = step * T + lane
                words = changed_words(
                    tl.load(old + here), published(tl.load(new + here), CAST, NATIVE), T
                )
            sums += _take(
                words, old + step * T, new + step * T, inside + step * T, tile + step,
                records, values, counts, rows, columns, slots,
                BITS, ITEMSIZE, CAST, NATIVE, T, UPDATE,
            )  # fmt: skip
            step += 1
    else:
        while step < CHAIN:
            here = step * T + lane
            live = here < left
            words = changed_words(
                tl.load(old + here, mask=live, other=0),
                published(tl.load(new + here, mask=live, other=0), CAST, NATIVE),
                T,
            )
            sums += _take(
                words, old + step * T, new + step * T, inside + step * T, tile + step,
                records, values, counts, rows, columns, slots,
                BITS, ITEMSIZE, CAST, NATIVE, T, UPDATE,
            )  # fmt: skip
            step += 1
    if UPDATE:
        change = tl.sum(sums, axis=0) * block_factor(tl.load(seeds + tensor), index)
        change *= tl.load(counted + tensor).to(tl.uint64, bitcast=True)
        if change != 0:
            tl.atomic_add(
                changes + tl.program_id(0) % SUMS, change.to(tl.int64, bitcast=True), sem="relaxed"
            )


def find(
    plan: Plan,
    group: Group,
    olds: Tensor,
    news: Tensor,
    records: Tensor,
    values: Tensor,
    counts: Tensor,
    changes: Tensor,
    *,
    slots: int,
    update: bool,
) -> None:
    """Find the changes of a group's tensors.

    `olds`, `news`: int64 [tensors], addresses of contiguous elements; what `olds` points to takes
    the new bits where a tile's changes fit its slots, if `update`. `records`: uint32 or uint64
    [tiles · slots], the position in its block in the low 16 bits and the value above it (`values`
    has it for elements of 8 bytes). `counts`: int32 [tiles], every one is written. `changes`: int64
    [SUMS], to which the digest's change is added.
    """
    kind = group.kind
    rows, columns = factors(plan.device)
    _find[(group.tiles // _CHAIN,)](
        plan.block_tensor, plan.first_block, plan.numels, plan.seeds, plan.counted, rows, columns,
        olds, news,
        records, values, counts[group.first_tile :], changes, group.first, slots,
        BITS=word(kind.itemsize), ITEMSIZE=kind.itemsize, CAST=kind.cast,
        NATIVE=plan.device.type == "cuda", RAW=tl.float32 if kind.cast else word(kind.itemsize),
        ALIGNED=kind.aligned, T=kind.tile, CHAIN=_CHAIN, UPDATE=update, SUMS=SUMS,
        num_warps=2 if kind.cast or kind.itemsize == 1 else 1, maxnreg=_REGISTERS,
    )  # fmt: skip

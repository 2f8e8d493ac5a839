"""Look at the tiles again that had more changes than slots, and write theirs into the patch.

By now it is known where they belong, so no scratch is needed however much has changed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bits import addend, block_factor, changed_words, lowest, popcount, published
from .find import SUMS
from .places import ENCODING, PLACES, VALUES
from .plan import Group, Plan, factors, word


@triton.jit
def _emit(
    block_tensor, first_block, numels, seeds, rows, columns, olds, news,
    tile_counts, block_counts, ends, table, tensors, changes, patch, first, slots,
    BITS: tl.constexpr, ITEMSIZE: tl.constexpr, CAST: tl.constexpr, NATIVE: tl.constexpr,
    RAW: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr, UPDATE: tl.constexpr,
    SUMS: tl.constexpr, ENCODING: tl.constexpr, PLACES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = 65536 // T
    W: tl.constexpr = T // 32
    tile = tl.program_id(0)
    if tl.load(tile_counts + tile) > slots:
        here = tile // TILES
        block = first + here
        inside = (tile % TILES) * T
        tensor = tl.load(block_tensor + block)
        first_here = tl.load(first_block + tensor)
        index = block - first_here
        start = index.to(tl.int64) * 65536 + inside
        left = tl.minimum(tl.load(numels + tensor) - start, T).to(tl.int32)
        old = tl.load(olds + tensor).to(tl.pointer_type(BITS)) + start
        new = tl.load(news + tensor).to(tl.pointer_type(RAW)) + start
        if ALIGNED:
            old = tl.multiple_of(old, 16)
            new = tl.multiple_of(new, 16)
        lane = tl.arange(0, T)
        if left == T:
            words = changed_words(
                tl.load(old + lane), published(tl.load(new + lane), CAST, NATIVE), T
            )
        else:
            words = changed_words(
                tl.load(old + lane, mask=lane < left, other=0),
                published(tl.load(new + lane, mask=lane < left, other=0), CAST, NATIVE),
                T,
            )
        count = popcount(words)
        encoding = tl.load(table + ENCODING * tensors + tensor)
        places = patch + tl.load(table + PLACES * tensors + tensor)
        positions = places.to(tl.pointer_type(tl.uint16))
        out = (patch + tl.load(table + VALUES * tensors + tensor)).to(tl.pointer_type(BITS))
        before = tl.load(ends + block) - tl.load(block_counts + block)
        before -= tl.load(ends + first_here) - tl.load(block_counts + first_here)
        row = tl.arange(0, TILES)
        earlier = tl.load(tile_counts + here * TILES + row, mask=row < tile % TILES, other=0)
        at = before + tl.sum(earlier, axis=0) + tl.cumsum(count, 0) - count
        base = tl.arange(0, W) * 32
        if encoding == 2:
            mask = places.to(tl.pointer_type(tl.uint32)) + start // 32
            tl.store(mask + tl.arange(0, W), words, mask=base < left)
        sums = tl.zeros((W,), dtype=tl.uint64)
        most = tl.max(count, axis=0)
        while most > 0:
            live = words != 0
            spot = base + lowest(words)
            value = published(tl.load(new + spot, mask=live, other=0), CAST, NATIVE)
            words = words & (words - 1)
            if encoding == 1:
                tl.store(positions + at, (inside + spot).to(tl.uint16), mask=live)
            if encoding != 3:
                tl.store(out + at, value, mask=live)
            if UPDATE:
                previous = tl.load(old + spot, mask=live, other=0)
                factor = tl.load(columns + (spot & 255), mask=live, other=0)
                change = addend(value, ITEMSIZE) - addend(previous, ITEMSIZE)
                sums += change * factor.to(tl.uint64, bitcast=True)
                tl.store(old + spot, value, mask=live)
            at += 1
            most -= 1
        if UPDATE:
            sums *= tl.load(rows + ((inside + base) >> 8)).to(tl.uint64, bitcast=True)
            change = tl.sum(sums, axis=0) * block_factor(tl.load(seeds + tensor), index)
            tl.atomic_add(changes + tile % SUMS, change.to(tl.int64, bitcast=True), sem="relaxed")


def emit(
    plan: Plan,
    group: Group,
    olds: Tensor,
    news: Tensor,
    tile_counts: Tensor,
    block_counts: Tensor,
    ends: Tensor,
    table: Tensor,
    changes: Tensor,
    patch: int,
    *,
    slots: int,
    update: bool,
) -> None:
    """Write the tiles with more than `slots` changes: arguments as for find() and place()."""
    kind = group.kind
    rows, columns = factors(plan.device)
    _emit[(group.tiles,)](
        plan.block_tensor, plan.first_block, plan.numels, plan.seeds, rows, columns, olds, news,
        tile_counts[group.first_tile :], block_counts, ends, table, plan.tensors, changes, patch,
        group.first, slots,
        BITS=word(kind.itemsize), ITEMSIZE=kind.itemsize, CAST=kind.cast,
        NATIVE=plan.device.type == "cuda", RAW=tl.float32 if kind.cast else word(kind.itemsize),
        ALIGNED=kind.aligned, T=kind.tile, UPDATE=update, SUMS=SUMS,
        ENCODING=ENCODING, PLACES=PLACES, VALUES=VALUES, num_warps=1,
    )  # fmt: skip

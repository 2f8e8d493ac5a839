"""Look at the tiles again that had more changes than slots, and write theirs into the patch.

By now it is known where they belong, so no scratch is needed however much has changed. Their share
of the digest is left to digest.py, which reads all for less than it would cost here.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .bits import popcount, published
from .launch import kernel
from .places import ENCODING, PLACES, VALUES
from .plan import Group, Plan, word

#: Elements that a program takes at a time: as many as one warp needs no barrier for.
_PART = 512
#: Registers of a thread, for enough warps to hide the memory's latency.
_REGISTERS = 64


@kernel(numbers=["tensors", "first", "slots"])
def _emit(
    block_tensor, first_block, numels, olds, news,
    tile_counts, block_counts, ends, table, tensors, spot, first, slots,
    BITS: tl.constexpr, CAST: tl.constexpr, NATIVE: tl.constexpr,
    RAW: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr, PART: tl.constexpr,
    UPDATE: tl.constexpr, ENCODING: tl.constexpr, PLACES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = 65536 // T
    W: tl.constexpr = PART // 32
    counts = tile_counts + tl.program_id(0) * TILES
    if tl.max(tl.load(counts + tl.arange(0, TILES)), axis=0) > slots:
        block = first + tl.program_id(0)
        tensor = tl.load(block_tensor + block)
        index = block - tl.load(first_block + tensor)
        start = index.to(tl.int64) * 65536
        limit = tl.minimum(tl.load(numels + tensor) - start, 65536).to(tl.int32)
        old = tl.load(olds + tensor).to(tl.pointer_type(BITS)) + start
        new = tl.load(news + tensor).to(tl.pointer_type(RAW)) + start
        if ALIGNED:
            old = tl.multiple_of(old, 16)
            new = tl.multiple_of(new, 16)
        patch = tl.load(spot)
        encoding = tl.load(table + ENCODING * tensors + tensor)
        places = patch + tl.load(table + PLACES * tensors + tensor)
        positions = places.to(tl.pointer_type(tl.uint16))
        masks = places.to(tl.pointer_type(tl.uint32)) + start // 32
        out = (patch + tl.load(table + VALUES * tensors + tensor)).to(tl.pointer_type(BITS))
        at = tl.load(ends + block) - tl.load(block_counts + block)
        base = tl.arange(0, W) * 32
        lane = tl.arange(0, 32)
        below = (tl.full((32,), 1, tl.uint32) << lane.to(tl.uint32)) - 1
        tile = 0
        while tile < TILES:
            found = tl.load(counts + tile)
            if found > slots:
                inside = tile * T
                here = at
                while inside < tile * T + T:
                    cell = inside + base[:, None] + lane[None, :]
                    if inside + PART <= limit:
                        before = tl.load(old + cell)
                        value = published(tl.load(new + cell), CAST, NATIVE)
                        if UPDATE:
                            tl.store(old + cell, value)
                    else:
                        live = cell < limit
                        before = tl.load(old + cell, mask=live, other=0)
                        value = published(tl.load(new + cell, mask=live, other=0), CAST, NATIVE)
                        if UPDATE:
                            tl.store(old + cell, value, mask=live)
                    if encoding != 3:
                        differ = before != value
                        words = differ.to(tl.uint32) << lane.to(tl.uint32)[None, :]
                        words = tl.sum(words, axis=1).to(tl.uint32)
                        count = popcount(words)
                        rank = (tl.cumsum(count, 0) - count)[:, None]
                        rank += popcount(words[:, None] & below[None, :])
                        tl.store(out + here + rank, value, mask=differ)
                        if encoding == 1:
                            tl.store(positions + here + rank, cell.to(tl.uint16), mask=differ)
                        else:
                            word = inside // 32 + tl.arange(0, W)
                            tl.store(masks + word, words, mask=inside + base < limit)
                        here += tl.sum(count, axis=0)
                    inside += PART
            at += found
            tile += 1


def emit(
    plan: Plan,
    group: Group,
    olds: Tensor,
    news: Tensor,
    tile_counts: Tensor,
    block_counts: Tensor,
    ends: Tensor,
    table: Tensor,
    spot: Tensor,
    *,
    slots: int,
    update: bool,
) -> None:
    """Write the tiles with more than `slots` changes: arguments as for find() and place().

    With `update` the old copy takes the new bits; the digest's change is nobody's here.
    """
    kind = group.kind
    _emit[(group.blocks,)](
        plan.block_tensor, plan.first_block, plan.numels, olds, news,
        tile_counts[group.first_tile :], block_counts, ends, table, plan.tensors, spot,
        group.first, slots,
        BITS=word(kind.itemsize), CAST=kind.cast,
        NATIVE=plan.device.type == "cuda", RAW=tl.float32 if kind.cast else word(kind.itemsize),
        ALIGNED=kind.aligned, T=kind.tile, PART=_PART, UPDATE=update,
        ENCODING=ENCODING, PLACES=PLACES, VALUES=VALUES, num_warps=1, maxnreg=_REGISTERS,
    )  # fmt: skip

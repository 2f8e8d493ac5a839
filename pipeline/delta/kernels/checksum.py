"""The checksum of a payload: its 64-bit words under the name "payload"."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ..digest import PAYLOAD, seed_of
from .bits import addend, block_factor
from .launch import kernel
from .plan import factors

#: Programs, each of which takes every _PROGRAMS-th block of 65,536 words.
_PROGRAMS = 132 * 8


@kernel(numbers=["seed", "programs"])
def _checksum(
    spot, nbytes, seed, rows, columns, sums, programs,
    R: tl.constexpr,
):  # fmt: skip
    whole = tl.load(nbytes) >> 3
    words = tl.multiple_of(tl.load(spot).to(tl.pointer_type(tl.uint64)), 16)
    column = tl.arange(0, 256)
    row = tl.arange(0, R)
    acc = tl.zeros((R, 256), dtype=tl.uint64)
    # A program takes a sixteenth of a block at a time: 16 rows of 256 words, 32 KiB.
    part = tl.program_id(0)
    parts = (whole + 4095) // 4096
    while part < parts:
        start = part.to(tl.int64) * 4096
        g = block_factor(seed, part.to(tl.int64) // 16)
        first = (part % 16) * 16
        for step in tl.static_range(16 // R):
            at = start + (step * R + row)[:, None] * 256 + column[None, :]
            if start + 4096 <= whole:
                word = tl.load(words + at)
            else:
                word = tl.load(words + at, mask=at < whole, other=0)
            factor = tl.load(rows + first + step * R + row).to(tl.uint64, bitcast=True) * g
            acc += addend(word, 8) * factor[:, None]
        part += programs
    acc *= tl.load(columns + column).to(tl.uint64, bitcast=True)[None, :]
    total = tl.sum(tl.sum(acc, axis=1), axis=0)
    tl.atomic_add(sums + tl.program_id(0) % 64, total.to(tl.int64, bitcast=True), sem="relaxed")


def checksum(spot: Tensor, nbytes: Tensor, sums: Tensor, *, largest: int) -> None:
    """Add Σ words · h of a payload to `sums` (int64 [64]); its length is the caller's to add.

    `spot` and `nbytes`, int64, say in their first elements where it is, at a multiple of 16, and
    how many bytes it has, a multiple of 8 and not many more than `largest`.
    """
    rows, columns = factors(sums.device)
    seed = seed_of(PAYLOAD)
    programs = min(_PROGRAMS, (largest >> 15) + 1)
    _checksum[(programs,)](
        spot, nbytes, seed - (1 << 64) if seed >> 63 else seed, rows, columns, sums, programs,
        R=4, num_warps=4,
    )  # fmt: skip

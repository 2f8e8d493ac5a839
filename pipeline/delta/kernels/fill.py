"""Zero what no kernel writes whole: a patch's padding, and its bitmaps before bits are set."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .places import ENCODING, PLACES, VALUES
from .plan import Plan

_ROWS = 64


@triton.jit(do_not_specialize=["count"])
def _fill(runs, count, buffer, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.load(runs + row, mask=row < count, other=0)
    end = tl.load(runs + count + row, mask=row < count, other=0)
    at = start[:, None] + tl.arange(0, 16)[None, :]
    zero = tl.zeros((ROWS, 16), dtype=tl.uint8)
    tl.store(buffer.to(tl.pointer_type(tl.uint8)) + at, zero, mask=at < end[:, None])


@triton.jit(do_not_specialize=["tensors"])
def _clear(
    block_tensor, first_block, table, tensors, patch,
    ENCODING: tl.constexpr, PLACES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    tensor = tl.load(block_tensor + block)
    if tl.load(table + ENCODING * tensors + tensor) == 2:
        start = tl.load(table + PLACES * tensors + tensor)
        start += (block - tl.load(first_block + tensor)).to(tl.int64) * 8192
        left = tl.load(table + VALUES * tensors + tensor) - start
        at = tl.arange(0, 2048)
        words = (patch + start).to(tl.pointer_type(tl.uint32))
        tl.store(words + at, tl.zeros((2048,), dtype=tl.uint32), mask=at * 4 < left)


def fill(runs: Tensor, buffer: int) -> None:
    """Zero bytes runs[0, i] … runs[1, i] - 1 of a buffer, at most 16 each; int64 [2, n]."""
    count = runs.shape[1]
    if count:
        _fill[(triton.cdiv(count, _ROWS),)](runs, count, buffer, ROWS=_ROWS, num_warps=2)


def clear(plan: Plan, table: Tensor, patch: int) -> None:
    """Zero the bits, and the padding behind them, of every bitmap section."""
    _clear[(plan.blocks,)](
        plan.block_tensor, plan.first_block, table, plan.tensors, patch,
        ENCODING=ENCODING, PLACES=PLACES, VALUES=VALUES, num_warps=4,
    )  # fmt: skip

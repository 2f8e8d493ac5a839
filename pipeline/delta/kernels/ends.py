"""The running sum of counts, in one program: no temporary memory, unlike torch's cumsum()."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .launch import kernel

#: Counts that it takes at a time; a model of 7 G elements has 116,000 blocks.
_LANES = 4096


@kernel(numbers=["blocks"])
def _ends(counts, ends, blocks, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    before = tl.sum(tl.zeros((LANES,), dtype=tl.int64), axis=0)
    at = 0
    while at < blocks:
        live = at + lane < blocks
        count = tl.load(counts + at + lane, mask=live, other=0).to(tl.int64)
        tl.store(ends + at + lane, before + tl.cumsum(count, 0), mask=live)
        before += tl.sum(count, axis=0)
        at += LANES


def ends_of(counts: Tensor, ends: Tensor) -> None:
    """Write the sum of `counts` (int32 or int64 [n]) up to each into `ends`, int64 [n]."""
    _ends[(1,)](counts, ends, counts.numel(), LANES=_LANES, num_warps=16)

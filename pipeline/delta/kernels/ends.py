"""The running sums of what each tensor's blocks have, in one launch and without temporary memory,
unlike torch's cumsum()."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .launch import kernel
from .plan import Plan

#: Blocks that a program takes at a time; the largest tensors of 7 G elements have 8,300.
_LANES = 1024


@kernel()
def _ends(first_block, numels, counts, ends, LANES: tl.constexpr):
    tensor = tl.program_id(0)
    first = tl.load(first_block + tensor)
    blocks = (tl.load(numels + tensor) + 65535) // 65536
    lane = tl.arange(0, LANES)
    before = tl.sum(tl.zeros((LANES,), dtype=tl.int64), axis=0)
    at = 0
    while at < blocks:
        live = at + lane < blocks
        count = tl.load(counts + first + at + lane, mask=live, other=0).to(tl.int64)
        tl.store(ends + first + at + lane, before + tl.cumsum(count, 0), mask=live)
        before += tl.sum(count, axis=0)
        at += LANES


def ends_of(plan: Plan, counts: Tensor, ends: Tensor) -> None:
    """Write the sum of a tensor's `counts` (int32 or int64 [blocks]) up to each of its blocks, that
    one's too, into `ends`, int64 [blocks]."""
    _ends[(plan.tensors,)](plan.first_block, plan.numels, counts, ends, LANES=_LANES, num_warps=4)

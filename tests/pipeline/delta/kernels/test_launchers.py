"""Each launcher by itself, against a few lines of torch."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsecast.pipeline.delta import checksum, digest
from sparsecast.pipeline.delta.addresses import seeds_of, table_of
from sparsecast.pipeline.delta.tensors import manifest_of
from states import DTYPES, State, bits
from twins import DEVICE, by_torch, copied, model, require_same, step

MASK = (1 << 64) - 1


def planned(state: State) -> tuple[Any, Tensor]:
    """A plan of contiguous, aligned tensors, and their addresses."""
    from sparsecast.pipeline.delta.kernels.plan import Kind, Plan

    kinds = [Kind(tensor.element_size()) for tensor in state.values()]
    numels = [tensor.numel() for tensor in state.values()]
    plan = Plan(numels, seeds_of(manifest_of(state)), kinds, DEVICE)
    return plan, table_of([tensor.data_ptr() for tensor in state.values()], DEVICE)


def total(sums: Tensor) -> int:
    """The sum of sums, as an unsigned 64-bit integer."""
    return int(sums.cpu().numpy().astype(np.uint64).sum(dtype=np.uint64))


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("dtype", ["float8_e5m2", "bfloat16", "float32", "float64"])
def test_find_and_tally(dtype: str, update: bool) -> None:
    """Counts of tiles, blocks and tensors; records in the slots of tiles that have room, none of
    the others; and the old copy, which moves where there is room, if it is to move at all."""
    from sparsecast.pipeline.delta.kernels.find import SUMS, find
    from sparsecast.pipeline.delta.kernels.tally import tally

    slots = 8
    old = model(DTYPES[dtype], w=(4_500,), s=(3,))
    new = copied(old)
    step(new, 0.004, 1)
    bits(new["w"])[:40] ^= 1  # more in a tile than it has slots
    kept = copied(old)
    plan, olds = planned(old)
    _, news = planned(new)
    (group,) = plan.groups
    itemsize, tile = group.kind.itemsize, group.kind.tile
    wide = torch.int64 if itemsize == 4 else torch.int32
    records = torch.zeros(plan.tiles * slots, dtype=wide, device=DEVICE)
    values = torch.zeros(plan.tiles * slots, dtype=torch.int64, device=DEVICE)
    counts = torch.full((plan.tiles,), -1, dtype=torch.int32, device=DEVICE)
    changes = torch.zeros(SUMS, dtype=torch.int64, device=DEVICE)
    find(
        plan, group, olds, news, records, values, counts, changes, slots=slots, update=update
    )  # fmt: skip
    differ = torch.zeros(2, 65_536, dtype=torch.bool)
    for at, name in enumerate(kept):
        here = (bits(kept[name]) != bits(new[name])).cpu()
        differ[at, : here.numel()] = here
    expected = differ.view(-1, tile).sum(1)
    assert counts.tolist() == expected.tolist()
    assert int(expected.max()) > slots

    moved = copied(kept)
    fits = (expected <= slots).repeat_interleave(tile).view(2, -1)
    for at, name in enumerate(kept):
        where = (differ & fits)[at, : kept[name].numel()].to(DEVICE)
        bits(moved[name]).copy_(torch.where(where, bits(new[name]), bits(kept[name])))
    require_same(old, moved if update else kept)
    with by_torch():
        change = (digest(moved) - digest(kept)) & MASK if update else 0
    assert total(changes) == change

    size = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF, 8: MASK}[itemsize]
    for at in (expected <= slots).nonzero().flatten().tolist():
        name, inside = ("w", "s")[at * tile >> 16], at * tile & 65_535
        spots = differ.view(-1, tile)[at].nonzero().flatten() + inside
        found = records[at * slots : at * slots + len(spots)].tolist()
        assert [record & 0xFFFF for record in found] == spots.tolist()
        held = values[at * slots :].tolist() if itemsize == 8 else None
        for nth, spot in enumerate(spots.tolist()):
            shift = 32 if itemsize == 4 else 16
            value = held[nth] if held else found[nth] >> shift
            assert value & size == int(bits(new[name])[spot]) & size

    block_counts = torch.full((plan.blocks,), -1, dtype=torch.int32, device=DEVICE)
    totals, changed, over = (torch.zeros(2, dtype=torch.int64, device=DEVICE) for _ in range(3))
    tally(plan, group, counts, block_counts, totals, changed, over, slots=slots)
    assert block_counts.tolist() == totals.tolist() == differ.sum(1).tolist()
    assert changed.tolist() == [int(differ.sum()), 0]
    assert over.tolist() == [1, 0]
    tally(plan, group, counts, block_counts, totals, changed, over, slots=4_096)
    assert over.tolist() == [1, 0]


def test_dense_goes_by_the_table() -> None:
    """dense() copies dense sections there and back, and leaves alone what the table says is of
    another kind, and a tensor whose address is 0."""
    from sparsecast.pipeline.delta.kernels.dense import dense
    from sparsecast.pipeline.delta.kernels.places import ENCODING, PLACES, ROWS, VALUES
    from sparsecast.pipeline.delta.layout import lay_out

    state = model(torch.bfloat16, b=(65_536 + 61,), d=(66_000,), e=(999,), s=(400,))
    plan, addresses = planned(state)
    (group,) = plan.groups
    numel = np.array([tensor.numel() for tensor in state.values()])
    table = lay_out(np.arange(4), np.full(4, 2), numel, np.array([9_000, 66_000, 999, 4]))
    assert table.encoding.tolist() == [2, 3, 3, 1]
    where = torch.zeros(ROWS, 4, dtype=torch.int64, device=DEVICE)
    columns = ((ENCODING, table.encoding), (PLACES, table.places_offset))
    for row, column in (*columns, (VALUES, table.values_offset)):
        where[row] = torch.from_numpy(column)
    patch = torch.full((table.nbytes,), 0xA5, dtype=torch.uint8, device=DEVICE)
    expected = patch.clone()
    spot = table_of([patch.data_ptr()], DEVICE)
    dense(plan, group, addresses, where, spot, into=False)
    for at, name in ((1, "d"), (2, "e")):
        start = int(table.values_offset[at])
        nbytes = state[name].nbytes
        expected[start : start + nbytes] = bits(state[name]).view(torch.uint8)
    assert torch.equal(patch, expected)
    other = model(torch.bfloat16, 5, b=(65_536 + 61,), d=(66_000,), e=(999,), s=(400,))
    kept = copied(other)
    _, there = planned(other)
    there[2] = 0
    dense(plan, group, there, where, spot, into=True)
    require_same(other, {**kept, "d": state["d"]})


def test_checksum_adds_up() -> None:
    """Sums are added to, so that a caller may zero them when it likes; of a buffer that is longer
    than the payload only so many bytes count as the device is told."""
    from sparsecast.pipeline.delta.digest import LENGTH_FACTOR
    from sparsecast.pipeline.delta.kernels.checksum import checksum as by_kernel

    payload = torch.arange(4_000, device=DEVICE).to(torch.uint8)
    sums = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    spot = table_of([payload.data_ptr(), 4_000], DEVICE)
    by_kernel(spot, spot[1:], sums, largest=4_000)
    by_kernel(spot, spot[1:], sums, largest=1 << 20)
    with by_torch():
        expected = checksum(payload) - 4_000 * LENGTH_FACTOR
        first = checksum(payload[:1_008]) - 1_008 * LENGTH_FACTOR
    assert total(sums) == 2 * expected & MASK
    by_kernel(spot, torch.tensor([1_008], device=DEVICE), sums.zero_(), largest=4_000)
    assert total(sums) == first & MASK


def test_ends_are_the_running_sum_of_each_tensor() -> None:
    """More blocks than are taken at a time, none at all, a sum beyond 32 bits, and counts of either
    width by turns: what is compiled for one must not be launched for the other."""
    from sparsecast.pipeline.delta.kernels.ends import ends_of
    from sparsecast.pipeline.delta.kernels.plan import Kind, Plan

    # Of a plan the blocks of one kind come first, whatever the order of the tensors.
    blocks, kinds = [3, 5, 0, 9_001, 2, 1], [2, 4, 2, 2, 4, 2]
    plan = Plan([each << 16 for each in blocks], [0] * 6, [Kind(each) for each in kinds], DEVICE)
    counts = torch.randint(0, 2**20, (sum(blocks),), generator=torch.Generator().manual_seed(1))
    expected = torch.cat([part.cumsum(0) for part in counts.split([3, 9_001, 1, 5, 2])])
    for dtype in (torch.int32, torch.int64, torch.int32, torch.int64):
        ends = torch.full((sum(blocks),), -1, device=DEVICE)
        ends_of(plan, counts.to(dtype).to(DEVICE), ends)
        assert torch.equal(ends.cpu(), expected)
    assert int(ends.max()) > 1 << 32

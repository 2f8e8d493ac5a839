"""The section table of a patch, written and read on the device as layout.py has it."""

import contextlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reach import reached
from sparsecast.messages.errors import CorruptPatch
from sparsecast.pipeline.delta.addresses import table_of
from sparsecast.pipeline.delta.layout import (
    ENTRY,
    HEADER,
    Form,
    Header,
    Table,
    full_nbytes,
    lay_out,
    parse_header,
    table_end,
)
from twins import DEVICE

#: Of the kernel's facts: changed elements.
CHANGES = 2
HASH = "0123456789abcdef" * 2


def planned(numels: list[int], itemsizes: list[int]) -> Any:
    """A plan of tensors of these sizes; nothing reads their elements."""
    from sparsecast.pipeline.delta.kernels.plan import Kind, Plan

    return Plan(numels, [1] * len(numels), [Kind(itemsize) for itemsize in itemsizes], DEVICE)


def laid_out(numels: list[int], itemsizes: list[int], counts: list[int]) -> Table:
    """What layout.py makes of it."""
    index = np.array(counts).nonzero()[0]
    columns = [np.array(column, np.int64)[index] for column in (itemsizes, numels, counts)]
    return lay_out(index, *columns)


def columns_of(table: Table, tensors: int) -> np.ndarray:
    """The table as the kernels have it."""
    found = np.zeros((5, tensors), np.int64)
    parts = (table.encoding, table.offset, table.places_offset, table.values_offset, table.count)
    for row, part in enumerate(parts):
        found[row, table.index] = part
    return found


def framed(
    numels: list[int], itemsizes: list[int], counts: list[int], room: int, over: int = 0
) -> tuple[Tensor, Tensor, list[int]]:
    """What the kernel writes of a patch, over 0xA5: buffer, table, facts. `over`: how often a tile
    of some group had too many changes."""
    from sparsecast.pipeline.delta.kernels.frame import FACTS, frame
    from sparsecast.pipeline.delta.kernels.plan import KINDS

    plan = planned(numels, itemsizes)
    totals = torch.tensor(counts, dtype=torch.int64, device=DEVICE)
    table = torch.full((5 * len(numels),), -1, dtype=torch.int64, device=DEVICE)
    facts = torch.full((FACTS,), -1, dtype=torch.int64, device=DEVICE)
    overs = torch.zeros(KINDS, dtype=torch.int64, device=DEVICE)
    overs[-1] = over
    buffer = torch.full((room,), 0xA5, dtype=torch.uint8, device=DEVICE)
    frame(
        plan, totals, overs, table, facts, table_of([buffer.data_ptr(), room, 6, 1 << 40], DEVICE),
        manifest_hash=HASH, numel=sum(numels), dense_nbytes=dense(numels, itemsizes),
    )  # fmt: skip
    return buffer, table.view(5, -1), facts.tolist()


def dense(numels: list[int], itemsizes: list[int]) -> int:
    """Bytes of all tensors."""
    return sum(n * size for n, size in zip(numels, itemsizes, strict=True))


def header_of(numels: list[int], itemsizes: list[int], table: Table, nbytes: int) -> Header:
    """The header that such a patch has."""
    return Header(
        form=Form.SECTIONS, sections=len(table), manifest_hash=HASH, base_version=6,
        version=1 << 40, changed=int(table.count.sum()), numel=sum(numels),
        dense_nbytes=dense(numels, itemsizes), nbytes=nbytes,
    )  # fmt: skip


models = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 4, 8]),
        st.sampled_from([1, 3, 17, 1_000, 65_535, 65_536, 65_537, 300_000]),
        st.sampled_from([0.0, 0.0001, 0.01, 0.07, 0.3, 1.0]),
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=10)
@given(models)
def test_it_is_laid_out_as_by_layout(tensors: list[tuple[int, int, float]]) -> None:
    """Any mix of sizes and densities: header, table, places and padding are layout.py's, no byte
    of an array is touched; and read again it is the same."""
    from sparsecast.pipeline.delta.kernels import frame as fact

    itemsizes, numels = [t[0] for t in tensors], [t[1] for t in tensors]
    counts = [min(round(n * share + 0.4), n) if share else 0 for _, n, share in tensors]
    expected = laid_out(numels, itemsizes, counts)
    all_dense = dense(numels, itemsizes)
    limit = max(full_nbytes(all_dense), all_dense + all_dense // 100 + 1024)
    buffer, table, facts = framed(numels, itemsizes, counts, expected.nbytes + 40)
    assert facts[fact.NBYTES] == expected.nbytes
    assert facts[fact.FULL] == (expected.nbytes > limit)
    assert facts[fact.SECTIONS] == len(expected)
    assert facts[fact.CHANGES] == sum(counts)
    if facts[fact.FULL]:
        assert facts[fact.WRITTEN] == 0
        assert not table[0].any()
        assert bool((buffer == 0xA5).all())
        return
    assert facts[fact.WRITTEN] == expected.nbytes
    whole = not (expected.encoding == 3).any()
    assert facts[fact.WHOLE] == expected.nbytes * whole
    assert table.cpu().numpy().tolist() == columns_of(expected, len(numels)).tolist()
    for encoding in (1, 2, 3):
        members = int((expected.encoding == encoding).sum())
        assert facts[fact.MEMBERS + encoding - 1] == members
        assert facts[fact.SHARES + encoding - 1] == expected.nbytes_of(encoding)
    image = np.full(expected.nbytes + 40, 0xA5, np.uint8)
    start = header_of(numels, itemsizes, expected, expected.nbytes).pack() + expected.pack()
    start = start.ljust(table_end(len(expected)), b"\0")
    image[: len(start)] = np.frombuffer(start, np.uint8)
    for section in expected.sections:
        arrays_end = section.values_offset + section.values_nbytes
        image[section.offset + 4 * section.blocks : section.places_offset] = 0
        image[section.places_offset + section.places_nbytes : section.values_offset] = 0
        image[arrays_end : section.end] = 0
    assert buffer.cpu().numpy().tobytes() == image.tobytes()
    found, facts = read(buffer[: expected.nbytes], numels, itemsizes)
    assert found is not None
    assert found.tolist() == columns_of(expected, len(numels)).tolist()


def read(
    buffer: Tensor, numels: list[int], itemsizes: list[int]
) -> tuple[np.ndarray | None, list[int]]:
    """What the kernel reads of a patch: the table, or None if it found a fault, and facts."""
    from sparsecast.pipeline.delta.kernels import sections as fact

    table = torch.full((5 * len(numels),), -1, dtype=torch.int64, device=DEVICE)
    facts = torch.full((fact.FACTS,), -1, dtype=torch.int64, device=DEVICE)
    plan = planned(numels, itemsizes)
    spot = table_of([buffer.data_ptr(), buffer.numel()], DEVICE)
    fact.sections(plan, table, facts, spot)
    told = facts.tolist()
    found = table.view(5, -1).cpu().numpy()
    if told[fact.FAULTS]:
        assert not found.any()
    return None if told[fact.FAULTS] else found, told


@pytest.mark.parametrize(("room", "written"), [(0, 0), (-16, 0), (1 << 20, 1), (1 << 22, 0)])
def test_a_buffer_that_does_not_fit_is_left_alone(room: int, written: int) -> None:
    """Too small by one byte, or much too large: nothing is written, and the table is empty, so that
    place() writes nothing either. The facts say how much it would have been."""
    from sparsecast.pipeline.delta.kernels import frame as fact

    sizes = [70_000, 9], [2, 4], [700, 1]
    nbytes = laid_out(*sizes).nbytes
    buffer, table, facts = framed(*sizes, nbytes + room - (0 if written else room == 0))
    assert facts[fact.NBYTES] == nbytes
    assert facts[fact.WRITTEN] == facts[fact.WHOLE] == written * nbytes
    assert bool((buffer != 0xA5).any()) == bool(written)
    assert bool(table.any()) == bool(written)


def test_tiles_that_are_looked_at_again_are_not_summed_up_before() -> None:
    """Where any tile had too many changes the patch is not whole yet, and the facts say so."""
    from sparsecast.pipeline.delta.kernels import frame as fact

    sizes = [70_000, 9], [2, 4], [700, 1]
    nbytes = laid_out(*sizes).nbytes
    _, _, facts = framed(*sizes, nbytes, over=2)
    assert (facts[fact.WRITTEN], facts[fact.WHOLE]) == (nbytes, 0)


def test_more_tensors_than_are_taken_at_a_time() -> None:
    """600 tensors: offsets and ranks go on from one batch to the next."""
    rng = random.Random(3)
    numels = [rng.choice([5, 300, 70_000]) for _ in range(600)]
    counts = [rng.choice([0, 1, n // 50 + 1, n]) for n in numels]
    itemsizes = [rng.choice([1, 2, 4, 8]) for _ in numels]
    expected = laid_out(numels, itemsizes, counts)
    buffer, table, _ = framed(numels, itemsizes, counts, expected.nbytes)
    assert table.cpu().numpy().tolist() == columns_of(expected, 600).tolist()
    size = HEADER.size + 40 * len(expected)
    start = header_of(numels, itemsizes, expected, expected.nbytes).pack() + expected.pack()
    assert bytes(buffer[:size].tolist()) == start
    found, _ = read(buffer, numels, itemsizes)
    assert found is not None
    assert found.tolist() == columns_of(expected, 600).tolist()


#: What hostile fields are set to, beside their neighbours and each other.
HOSTILE = [0, 1, 2, 3, 4, 5, 8, 80, 65_536, 2**31 - 1, 2**31, 2**32, 2**48, 2**63 - 1, 2**63, 2**64]
FIELDS = ("index", "encoding", "itemsize", "zero", "numel", "count", "offset", "values_offset")


@pytest.mark.parametrize("seed", range(16))
def test_a_hostile_table_is_judged_as_by_layout(seed: int) -> None:
    """Some fields of some entries are anything, and the header may lie about their number: the
    kernel finds a fault wherever layout.py does, and nowhere else; without a GPU it is also seen
    that no address beyond the patch is read."""
    rng = random.Random(seed)
    tensors = rng.randint(1, 5)
    numels = [rng.choice([1, 9, 500, 1_000, 65_536, 70_000]) for _ in range(tensors)]
    itemsizes = [rng.choice([1, 2, 4, 8]) for _ in numels]
    counts = [rng.choice([1, n // 100 + 1, n // 5 + 1, n]) for n in numels]
    table = laid_out(numels, itemsizes, counts)
    header = header_of(numels, itemsizes, table, table.nbytes)
    data = bytearray((header.pack() + table.pack()).ljust(table.nbytes, b"\0"))
    entries = np.frombuffer(data, ENTRY, tensors, HEADER.size).copy()
    for _ in range(rng.randint(0, 3)):
        field, at = rng.choice(FIELDS), rng.randrange(tensors)
        value = int(entries[field][at])
        near = rng.choice([-16, -1, 1, 16])
        other = int(entries[field][rng.randrange(tensors)])
        value = rng.choice([rng.choice(HOSTILE), value + near, other])
        entries[field][at] = value & int(np.iinfo(entries[field].dtype).max)
    data[HEADER.size : HEADER.size + 40 * tensors] = entries.tobytes()
    claimed = rng.choice([tensors] * 4 + [0, tensors - 1, tensors + 1, 2**31, 2**32 - 1])
    data[8:12] = claimed.to_bytes(4, "little")
    expected = parsed(bytes(data), numels, itemsizes)
    buffer = torch.frombuffer(data, dtype=torch.uint8).to(DEVICE)
    with contextlib.ExitStack() as stack:
        reach = stack.enter_context(reached()) if DEVICE.type == "cpu" else None
        found, facts = read(buffer, numels, itemsizes)
    if reach is not None:
        assert reach.require_within(buffer) > 5
    if expected is None:
        assert found is None or facts[CHANGES] != header.changed
    else:
        assert found is not None
        assert found.tolist() == columns_of(expected, tensors).tolist()


def parsed(data: bytes, numels: list[int], itemsizes: list[int]) -> Table | None:
    """The table of a patch for these tensors, as layout.py reads it; None if it refuses it."""
    try:
        header = parse_header(data[: HEADER.size], len(data))
        entries = data[HEADER.size : HEADER.size + 40 * header.sections]
        table = Table.parse(entries, header)
    except CorruptPatch:
        return None
    if (table.index >= len(numels)).any():
        return None
    fits = (table.numel == np.array(numels)[table.index]).all()
    return table if fits and (table.itemsize == np.array(itemsizes)[table.index]).all() else None


@pytest.mark.skipif(DEVICE.type == "cuda", reason="addresses are seen in the interpreter alone")
@pytest.mark.parametrize("sections", [0, 3, 5, 70_000, 2**32 - 1])
def test_no_number_of_sections_leads_out_of_the_patch(sections: int) -> None:
    """The header lies about the table: what is read lies within the patch all the same."""
    numels, itemsizes, counts = [70_000, 9, 1_000, 500], [2, 4, 1, 8], [700, 9, 300, 2]
    nbytes = laid_out(numels, itemsizes, counts).nbytes
    buffer, _, _ = framed(numels, itemsizes, counts, nbytes)
    buffer[8:12] = torch.tensor(list(sections.to_bytes(4, "little")), dtype=torch.uint8)
    with reached() as reach:
        assert read(buffer, numels, itemsizes)[0] is None
    assert reach.require_within(buffer) > 10

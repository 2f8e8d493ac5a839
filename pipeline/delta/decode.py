"""Reading the sections of a patch in spans of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bits import BLOCK, indices
from .encode import global_index, unpack_mask
from .layout import Encoding, Section
from .patch import Patch

#: A sparse span holds about this many values (and one block's more at most).
SPAN_VALUES = 1 << 20
#: A bitmap or dense span covers this many blocks.
SPAN_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks first_block … stop_block - 1 of a section, and which of its values are theirs."""

    first_block: int
    stop_block: int
    first_value: int
    stop_value: int


def section_counts(patch: Patch, sections: Sequence[Section]) -> list[Tensor]:
    """The counts of each section as int64 on the CPU (empty for dense), in one transfer."""
    sizes = [section.blocks for section in sections]
    parts = [patch.counts(section) for section in sections if section.blocks]
    if not parts:
        return [torch.zeros(0, dtype=torch.int64) for _ in sections]
    together = torch.cat(parts).cpu().to(torch.int64) & 0xFFFFFFFF
    return list(torch.split(together, sizes))


def spans_of(section: Section, counts_K: Tensor, blocks_each: int | None = None) -> list[Span]:
    """Cut a sparse or bitmap section with valid counts into spans.

    `blocks_each` asks for spans of that many blocks, whatever they hold.
    """
    blocks = section.blocks
    if blocks_each is None and section.encoding is Encoding.BITMAP:
        blocks_each = SPAN_BLOCKS
    few = section.count <= SPAN_VALUES if blocks_each is None else blocks <= blocks_each
    if few or blocks == 1:
        return [Span(0, blocks, 0, section.count)]
    ends_K = counts_K.cumsum(0)
    if blocks_each is None:
        steps = torch.arange(SPAN_VALUES, section.count, SPAN_VALUES, dtype=torch.int64)
        cuts = torch.unique(torch.searchsorted(ends_K, steps) + 1)
        cuts = cuts[cuts < blocks]
    else:
        cuts = torch.arange(blocks_each, blocks, blocks_each, dtype=torch.int64)
    block_edges = [0, *cuts.tolist(), blocks]
    value_edges = [0, *ends_K[cuts - 1].tolist(), section.count]
    return [
        Span(block_edges[i], block_edges[i + 1], value_edges[i], value_edges[i + 1])
        for i in range(len(block_edges) - 1)
        if value_edges[i] < value_edges[i + 1]
    ]


def spans_within(
    section: Section, counts_K: Tensor, first_block: int, stop_block: int
) -> list[Span]:
    """spans_of() the blocks first_block … stop_block - 1 of it."""
    if stop_block - first_block == section.blocks:
        return spans_of(section, counts_K)
    before = int(counts_K[:first_block].sum().item())
    count = int(counts_K[first_block:stop_block].sum().item())
    if not count:
        return []
    numel = min(stop_block << 16, section.numel) - (first_block << 16)
    part = replace(section, numel=numel, count=count)
    return [
        Span(
            first_block + span.first_block, first_block + span.stop_block,
            before + span.first_value, before + span.stop_value,
        )
        for span in spans_of(part, counts_K[first_block:stop_block])
    ]  # fmt: skip


def span_mask(patch: Patch, section: Section, span: Span, device: torch.device) -> Tensor:
    """Which elements of a bitmap section's span are set: bool [elements of the span]."""
    first = span.first_block << 16
    numel = min(span.stop_block << 16, section.numel) - first
    packed = patch.mask_bits(section)[first >> 3 : (first + numel + 7) >> 3]
    return unpack_mask(packed.to(device), numel)


def span_index(patch: Patch, section: Section, span: Span, device: torch.device) -> Tensor:
    """Element indices of a sparse or bitmap span, ascending: int64 [values of the span]."""
    if section.encoding is Encoding.BITMAP:
        mask = span_mask(patch, section, span, device)
        return indices(mask).add_(span.first_block << 16)
    positions = patch.positions(section)[span.first_value : span.stop_value].to(device)
    counts_K = patch.counts(section)[span.first_block : span.stop_block].to(device)
    return global_index(positions, counts_K, span.first_block)


def span_values(patch: Patch, section: Section, span: Span, device: torch.device) -> Tensor:
    """The values of a span as integer bits."""
    return patch.values(section)[span.first_value : span.stop_value].to(device)


def block_limits(section: Section) -> Tensor:
    """How many elements each block of a section has: int64 [blocks] on the CPU."""
    limits_K = torch.full((section.blocks,), BLOCK, dtype=torch.int64)
    limits_K[-1] = section.numel - ((section.blocks - 1) << 16)
    return limits_K

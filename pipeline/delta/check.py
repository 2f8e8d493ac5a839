"""Everything about a patch that can be checked without the weights."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...messages.errors import CorruptPatch
from ...messages.manifest import Manifest
from . import kernels
from .bits import quiet
from .decode import SPAN_VALUES, Span, block_limits, section_counts, spans_of
from .layout import Encoding, Section, Table
from .patch import Patch, columns_of
from .tensors import require_hash
from .timing import Mark, on

if TYPE_CHECKING:
    from .readied import Checking, Readied


@dataclass(frozen=True, slots=True)
class Checked:
    """A patch that passed check(), ready for apply_checked(): made by check() alone.

    `readied` is what the kernels apply it by, where the patch lies on a device that has some. Of
    the model's size it holds nothing but a few bytes a block.
    """

    patch: Patch
    manifest: Manifest
    readied: Readied | None
    _spans: tuple[tuple[Span, ...], ...] | None

    @property
    def sections(self) -> tuple[Section, ...]:
        """Its sections; in the full form, one a tensor."""
        return self.patch.sections_of(self.manifest)

    @property
    def names(self) -> list[str]:
        """The tensors that it changes, in the order of its sections."""
        return [self.manifest.tensors[at].name for at in self.index]

    @property
    def index(self) -> list[int]:
        """The same by their places in the manifest."""
        if self.readied is not None:
            index = self.readied.index(self.manifest)
        else:
            index = self.patch.table_of(self.manifest).index
        found: list[int] = index.tolist()
        return found

    def spans(self, at: int) -> Sequence[Span]:
        """The bounded steps in which section `at` is applied."""
        if self._spans is not None:
            return self._spans[at]
        section = self.sections[at]
        return _spans(section, section_counts(self.patch, [section])[0])


def check(patch: Patch, manifest: Manifest, *, checking: Checking | None = None) -> Checked:
    """Check a patch against the manifest of the weights it is for.

    Manifest hash (ManifestMismatch), sizes, counts, positions strictly ascending, so unique, and
    within their tensor, as many bits as values (CorruptPatch). Waits for the patch's device: the
    current stream of it; not if the kernels' part, `checking` of the same buffer and manifest, has
    been waited for already.
    """
    with quiet():
        require_hash(patch.manifest_hash, manifest, f"patch {patch.base_version} → {patch.version}")
        if patch.numel != manifest.numel or patch.dense_nbytes != manifest.nbytes:
            raise CorruptPatch(
                f"is for {patch.numel} elements in {patch.dense_nbytes} bytes, the manifest has "
                f"{manifest.numel} in {manifest.nbytes}"
            )
        if checking is None and manifest.numel and kernels.usable(patch.buffer.device):
            from .readied import Checking

            with on(patch.buffer.device):
                checking = Checking(patch.buffer, manifest)
                checking.enqueue()
                Mark(patch.buffer.device).wait()
        readied = checking.passed(patch) if checking is not None else None
        if readied is not None:
            return Checked(patch, manifest, readied, None)
        _check_sizes(patch.table_of(manifest), manifest)
        sections = patch.sections_of(manifest)
        counts = section_counts(patch, sections)
        _check_counts(sections, counts, manifest)
        spans = tuple(
            tuple(_spans(section, counts_K))
            for section, counts_K in zip(sections, counts, strict=True)
        )
        _check_positions(patch, sections, spans, counts, manifest)
        for section, spans_here, counts_K in zip(sections, spans, counts, strict=True):
            if section.encoding is Encoding.BITMAP:
                _check_bits(patch, section, spans_here, counts_K, manifest)
        return Checked(patch, manifest, None, spans)


def _spans(section: Section, counts_K: Tensor) -> Sequence[Span]:
    return spans_of(section, counts_K) if section.blocks else ()


def _check_sizes(table: Table, manifest: Manifest) -> None:
    """Each section's tensor is in the manifest, and of its size there."""
    columns = columns_of(manifest)
    beyond = table.index >= len(columns.numel)
    if beyond.any():
        index = int(table.index[beyond][0])
        raise CorruptPatch(f"names tensor {index} of {len(columns.numel)} in the manifest")
    wrong = table.numel != columns.numel[table.index]
    wrong |= table.itemsize != columns.itemsize[table.index]
    if wrong.any():
        at = int(wrong.argmax())
        spec = manifest.tensors[int(table.index[at])]
        raise CorruptPatch(
            f"has {table.numel[at]} elements of {table.itemsize[at]} bytes, the manifest "
            f"{spec.numel} of {spec.itemsize}",
            tensor=spec.name,
        )


def _name(section: Section, manifest: Manifest) -> str:
    return manifest.tensors[section.index].name


def _check_counts(
    sections: Sequence[Section], counts: Sequence[Tensor], manifest: Manifest
) -> None:
    for section, counts_K in zip(sections, counts, strict=True):
        if section.blocks == 0:
            continue
        total = int(counts_K.sum().item())
        if total != section.count:
            raise CorruptPatch(
                f"its blocks have {total} elements, the section {section.count}",
                tensor=_name(section, manifest),
            )
        if section.blocks > 1 and bool((counts_K > block_limits(section)).any().item()):
            raise CorruptPatch(
                "a block has more changed elements than elements", tensor=_name(section, manifest)
            )


# ---- sparse


def _check_positions(
    patch: Patch,
    sections: Sequence[Section],
    spans: Sequence[Sequence[Span]],
    counts: Sequence[Tensor],
    manifest: Manifest,
) -> None:
    """In batches of about SPAN_VALUES positions, over as many sections as that takes."""
    batch: list[tuple[Section, Tensor, Tensor]] = []
    size = 0
    for section, spans_here, counts_K in zip(sections, spans, counts, strict=True):
        if section.encoding is not Encoding.SPARSE:
            continue
        positions = patch.positions(section)
        for span in spans_here:
            part = positions[span.first_value : span.stop_value]
            batch.append((section, part, counts_K[span.first_block : span.stop_block]))
            size += part.numel()
            if size >= SPAN_VALUES:
                _check_batch(batch, manifest)
                batch, size = [], 0
        # Ascending within blocks, so only the last one can be beyond the end of the tensor.
        rest = section.numel & 0xFFFF
        if rest and int(counts_K[-1].item()) and (int(positions[-1].item()) & 0xFFFF) >= rest:
            raise CorruptPatch(
                f"a position is beyond its {section.numel} elements",
                tensor=_name(section, manifest),
            )
    if batch:
        _check_batch(batch, manifest)


def _check_batch(batch: Sequence[tuple[Section, Tensor, Tensor]], manifest: Manifest) -> None:
    parts = [part for _, part, _ in batch]
    positions = parts[0] if len(parts) == 1 else torch.cat(parts)
    # Flipping the top bit makes the order of int16 that of u16.
    ordered = positions ^ -32768
    ascending = ordered[1:] > ordered[:-1]
    counts_K = torch.cat([counts_K for _, _, counts_K in batch])
    starts = (counts_K.cumsum(0) - counts_K)[counts_K > 0][1:]
    ascending[(starts - 1).to(ascending.device)] = True
    if bool(ascending.all().item()):
        return
    at = int((~ascending).nonzero()[0].item()) + 1
    ends: list[int] = []
    for part in parts:
        ends.append((ends[-1] if ends else 0) + part.numel())
    section = batch[bisect_right(ends, at)][0]
    raise CorruptPatch(
        "its positions are not strictly ascending within a block", tensor=_name(section, manifest)
    )


# ---- bitmap


def _popcount(words_W: Tensor) -> Tensor:
    """Set bits of each int64 (the sums of ever wider fields, as in Hacker's Delight, 5-1)."""
    x = words_W - ((words_W >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


def _check_bits(
    patch: Patch, section: Section, spans: Sequence[Span], counts_K: Tensor, manifest: Manifest
) -> None:
    name = _name(section, manifest)
    start, stop = section.places_offset, section.values_offset
    tail = section.numel & 7
    if tail and int(patch.mask_bits(section)[-1].item()) >> tail:
        raise CorruptPatch(f"a bit is beyond its {section.numel} elements", tensor=name)
    if int(patch.buffer[start + section.places_nbytes : stop].count_nonzero().item()):
        raise CorruptPatch("the padding of its bits is not zero", tensor=name)
    words = patch.buffer[start:stop].view(torch.int64)
    per_block = 1024  # words of 64 bits in a block
    found = []
    for first in range(0, section.blocks, 256):
        part = _popcount(words[first * per_block : (first + 256) * per_block])
        whole = part.numel() // per_block
        found.append(part[: whole * per_block].view(whole, per_block).sum(1))
        if part.numel() % per_block:
            found.append(part[whole * per_block :].sum().view(1))
    if not torch.equal(torch.cat(found).cpu(), counts_K):
        raise CorruptPatch("its bits are not as many as its counts say", tensor=name)

"""Several consecutive patches as one: every element that any changed, with its last value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ...messages.errors import CorruptPatch, ManifestMismatch, WrongBase
from ...messages.manifest import Manifest
from .bits import quiet
from .decode import SPAN_BLOCKS, Span, section_counts, span_index, span_values, spans_of
from .encode import Draft, Piece, assemble, empty_bits, piece_of_mask
from .layout import ANCHOR, Encoding, Section
from .patch import Patch

_Part = tuple[Patch, Section, Tensor]


def merge(patches: Sequence[Patch], *, manifest: Manifest | None = None) -> Patch:
    """One patch in place of several consecutive ones; an anchor among them makes it an anchor.

    Each must start at or above the first one's base and at or below the version before it, and end
    above that (WrongBase); what comes before an anchor is dropped. Positions are the union, values
    the latest, encodings chosen anew; it lies on the last one's device. The patches must be sound:
    check() those that came from elsewhere. `manifest` is needed only for a patch of the full form
    that did not come from diff or check (ManifestMismatch says so).
    """
    if not patches:
        raise ValueError("merge() needs at least one patch")
    _require_chain(patches)
    anchors = [i for i, patch in enumerate(patches) if patch.base_version is None]
    used = patches[anchors[-1] :] if anchors else patches
    if len(used) == 1:
        return used[0]
    with quiet():
        device = used[-1].buffer.device
        if any(patch.full for patch in used):
            manifest = _require_known(manifest, used)
        known = manifest
        parts = _parts(used, known)
        drafts = [_merged(index, parts[index], device) for index in sorted(parts)]
        base = used[0].base_version
        by_index = {draft.index: draft for draft in drafts}
        whole = known is not None and all(
            index in by_index and by_index[index].dense is not None
            for index, spec in enumerate(known.tensors)
            if spec.numel
        )
        dense_of: Callable[[int], Iterable[Tensor]] | None = None
        if whole:
            dense_of = partial(_dense_of, by_index)
        return assemble(
            drafts,
            manifest_hash=used[0].manifest_hash,
            numel=used[0].numel,
            dense_nbytes=used[0].dense_nbytes,
            base_version=ANCHOR if base is None else base,
            version=used[-1].version,
            device=device,
            manifest=known,
            dense_of=dense_of,
        )


def _dense_of(drafts: dict[int, Draft], index: int) -> Iterable[Tensor]:
    dense = drafts[index].dense
    assert dense is not None
    return dense()


def _require_chain(patches: Sequence[Patch]) -> None:
    first = patches[0]
    for before, patch in pairwise(patches):
        if patch.manifest_hash != first.manifest_hash:
            raise ManifestMismatch(
                f"patch to {patch.version} is for manifest {patch.manifest_hash}, the one to "
                f"{first.version} for {first.manifest_hash}"
            )
        if (patch.numel, patch.dense_nbytes) != (first.numel, first.dense_nbytes):
            raise CorruptPatch(
                f"patch to {patch.version} is for {patch.numel} elements, the one to "
                f"{first.version} for {first.numel}, under one manifest"
            )
        base = patch.base_version
        if patch.version <= before.version:
            raise WrongBase(
                base_version=-1 if base is None else base,
                version=patch.version,
                held=before.version,
            )
        lowest = first.base_version or 0
        if base is not None and not lowest <= base <= before.version:
            raise WrongBase(base_version=base, version=patch.version, held=before.version)


def _require_known(manifest: Manifest | None, patches: Sequence[Patch]) -> Manifest:
    for known in (manifest, *(patch.manifest for patch in patches)):
        if known is not None:
            if known.hash != patches[0].manifest_hash:
                raise ManifestMismatch(
                    f"the patches are for manifest {patches[0].manifest_hash}, not for {known.hash}"
                )
            return known
    raise ManifestMismatch(
        "a patch in the full form does not say where its tensors lie: merge(…, manifest=…)"
    )


def _parts(patches: Sequence[Patch], manifest: Manifest | None) -> dict[int, list[_Part]]:
    parts: dict[int, list[_Part]] = {}
    for patch in patches:
        sections = patch.sections if manifest is None else patch.sections_of(manifest)
        for section, counts_K in zip(sections, section_counts(patch, sections), strict=True):
            parts.setdefault(section.index, []).append((patch, section, counts_K))
    for found in parts.values():
        sizes = {(section.itemsize, section.numel) for _, section, _ in found}
        if len(sizes) != 1:
            raise CorruptPatch(f"tensor {found[0][1].index} has several sizes: {sorted(sizes)}")
    return parts


def _merged(index: int, parts: Sequence[_Part], device: torch.device) -> Draft:
    section = parts[0][1]
    itemsize, numel = section.itemsize, section.numel
    dense_at = [i for i, part in enumerate(parts) if part[1].encoding is Encoding.DENSE]
    if dense_at:
        patch, section, _ = parts[dense_at[-1]]
        later = parts[dense_at[-1] + 1 :]
        # Which elements a dense section left alone is not known: all of them count as changed.
        count = section.count if len(parts) == 1 else numel
        return Draft(
            index, itemsize, numel, count, (), partial(_overlaid, patch, section, later, device),
            whole=True,
        )  # fmt: skip
    pieces = [_single(*parts[0], device)] if len(parts) == 1 else _union(parts, device)
    count = sum(piece.values.numel() for piece in pieces)
    # Where somebody left an element alone its value is not known here, and dense cannot be had.
    dense = partial(_values_of, pieces) if count == numel else None
    return Draft(index, itemsize, numel, count, pieces, dense)


def _values_of(pieces: Sequence[Piece]) -> Iterable[Tensor]:
    return (piece.values for piece in pieces)


def _overlaid(
    patch: Patch, section: Section, later: Sequence[_Part], device: torch.device
) -> Iterable[Tensor]:
    values = patch.values(section).to(device)
    if not later:
        return (values,)
    values = values.clone()
    for newer, part, counts_K in later:
        for span in spans_of(part, counts_K):
            idx_N = span_index(newer, part, span, device)
            values.scatter_(0, idx_N, span_values(newer, part, span, device))
    return (values,)


def _union(parts: Sequence[_Part], device: torch.device) -> list[Piece]:
    """Span by span: a mask of who was named, and the values, later ones over earlier ones."""
    section = parts[0][1]
    numel, itemsize = section.numel, section.itemsize
    spans: dict[int, list[tuple[_Part, Span]]] = {}
    for part in parts:
        for span in spans_of(part[1], part[2], SPAN_BLOCKS):
            spans.setdefault(span.first_block, []).append((part, span))
    size = min(SPAN_BLOCKS << 16, numel)
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    latest = empty_bits(size, itemsize, device)
    pieces = []
    for first_block in sorted(spans):
        start = first_block << 16
        mask_N = mask[: min(size, numel - start)]
        latest_N = latest[: mask_N.numel()]
        for (patch, named, _), span in spans[first_block]:
            idx_N = span_index(patch, named, span, device).sub_(start)
            mask_N.index_fill_(0, idx_N, True)
            latest_N.scatter_(0, idx_N, span_values(patch, named, span, device))
        pieces.append(piece_of_mask(start, mask_N, latest_N))
        mask_N.zero_()
    return pieces


def _single(patch: Patch, section: Section, counts_K: Tensor, device: torch.device) -> Piece:
    sparse = section.encoding is Encoding.SPARSE
    return Piece(
        0,
        section.numel,
        counts_K.to(torch.int32).to(device),
        patch.positions(section).to(device) if sparse else None,
        None if sparse else patch.mask_bits(section).to(device),
        patch.values(section).to(device),
    )

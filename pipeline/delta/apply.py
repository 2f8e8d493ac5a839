"""Writing a patch into weights, in place: absolute bits, all checks before the first write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...messages.errors import UnsupportedTensor, WrongBase
from ...messages.layout import Layout
from ...messages.manifest import Manifest
from .bits import bare, bits
from .check import Checked, check
from .decode import section_counts, span_index, span_values, spans_within
from .layout import Encoding
from .parts import Parts, Region, Run, parts_of
from .patch import Patch
from .tensors import manifest_of, overlaps_itself, require_manifest
from .timing import on

__all__ = ["Checked", "Target", "apply", "apply_checked", "check"]


class Target:
    """One tensor to be written to by element index, contiguous or strided."""

    __slots__ = ("_bits", "_flat", "device", "name")

    def __init__(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() > 1 and overlaps_itself(tensor):
            raise UnsupportedTensor(
                name, "is expanded: several elements share memory and cannot be patched; clone() it"
            )
        self.name = name
        self.device = tensor.device
        self._bits = bits(bare(tensor))
        self._flat = self._bits.view(-1) if self._bits.is_contiguous() else None

    def of(self, region: Region) -> Target:
        """The part of it that a region is, to be written to by C-order index in the region."""
        return Target(self.name, region.of(self._bits))

    def put(self, idx_N: Tensor, values_N: Tensor) -> None:
        """Write integer bits at element indices (C order, int64, unique)."""
        if self._flat is not None:
            self._flat.scatter_(0, idx_N, values_N)
            return
        offsets_N = torch.zeros_like(idx_N)
        rest = idx_N
        reach = 1
        for size, stride in zip(
            reversed(self._bits.shape), reversed(self._bits.stride()), strict=True
        ):
            offsets_N += rest % size * stride
            rest = rest // size
            reach += (size - 1) * stride
        memory = self._bits.as_strided((reach,), (1,), self._bits.storage_offset())
        memory.scatter_(0, offsets_N, values_N)

    def put_all(self, values: Tensor) -> None:
        """Write the whole tensor's bits, from any device: 1-D, or of its shape with any strides."""
        self._bits.copy_(values.view(self._bits.shape))


def _apply_section(checked: Checked, at: int, target: Target) -> None:
    patch, section = checked.patch, checked.sections[at]
    if section.encoding is Encoding.DENSE:
        target.put_all(patch.values(section))
        return
    for span in checked.spans(at):
        values_N = span_values(patch, section, span, target.device)
        target.put(span_index(patch, section, span, target.device), values_N)


def _apply_parts(
    checked: Checked, at: int, counts_K: Tensor, run: Run, targets: Sequence[Target]
) -> None:
    """Write what the regions of a run have of a section, each to its own of `targets`."""
    patch, section = checked.patch, checked.sections[at]
    if section.encoding is Encoding.DENSE:
        values = patch.values(section).view(checked.manifest.tensors[section.index].shape)
        for region, target in zip(run.regions, targets, strict=True):
            target.put_all(values[region.slices])
        return
    for span in spans_within(section, counts_K, run.first_block, run.stop_block):
        for device in dict.fromkeys(target.device for target in targets):
            idx_N = span_index(patch, section, span, device)
            values_N = span_values(patch, section, span, device)
            here = [
                pair for pair in zip(run.regions, targets, strict=True) if pair[1].device == device
            ]
            edges_B2 = torch.tensor(
                [(region.low, region.high) for region, _ in here], device=device
            )
            ends: list[tuple[int, int]] = torch.searchsorted(idx_N, edges_B2).tolist()
            for (region, target), (start, stop) in zip(here, ends, strict=True):
                if start < stop:
                    found, at_N = region.find(idx_N[start:stop])
                    part_N = values_N[start:stop]
                    target.put(at_N, part_N if found is None else part_N.index_select(0, found))


def apply_checked(
    checked: Checked,
    tensors: Mapping[str, Tensor],
    *,
    layout: Layout | None = None,
    begin: Callable[[], None] | None = None,
) -> list[str]:
    """Write a checked patch into `tensors`, in place; the names of the changed ones.

    The tensors must be those of the manifest that it was checked against: names, dtypes, shapes
    (ManifestMismatch), plain writable memory (UnsupportedTensor), on any device; contiguous or
    strided. All of them are validated before the first write, and `begin` is called between the
    two: what is raised before it has changed nothing. Temporaries are bounded. Applying twice is
    harmless. Queued on the current streams of the devices; nothing waits for them.

    With a layout that fits the manifest (ManifestMismatch), `tensors` are its local ones, likewise,
    and take what their parts hold: for each part the changes between its first element and its last
    are looked at, and no tensor as published is ever made. The names are those of the local tensors
    that hold some of a changed one, whether or not it is that which changed. What kernels cannot
    write waits for a CUDA device.
    """
    # Inference mode, because tensors that were made under it can be written to nowhere else.
    with torch.inference_mode():
        if layout is not None:
            return _apply_by_layout(checked, tensors, parts_of(layout, checked.manifest), begin)
        manifest = checked.manifest
        require_manifest(tensors, manifest)
        readied = checked.readied
        by_torch: Sequence[int] | None = None
        if readied is not None:
            by_torch = readied.beyond(tensors, manifest)
        targets = _targets(checked, tensors, by_torch)
        if begin is not None:
            begin()
        if readied is not None:
            with on(checked.patch.buffer.device):
                readied.write(tensors, manifest)
        for at, target in targets.items():
            _apply_section(checked, at, target)
    return checked.names


def _targets(
    checked: Checked, tensors: Mapping[str, Tensor], places: Sequence[int] | None
) -> dict[int, Target]:
    """Where the sections at these places of the table (None: all) are to be written."""
    if places is not None and not places:
        return {}
    names = checked.names
    at = range(len(names)) if places is None else places
    return {place: Target(names[place], tensors[names[place]]) for place in at}


def _apply_by_layout(
    checked: Checked,
    tensors: Mapping[str, Tensor],
    parts: Parts,
    begin: Callable[[], None] | None,
) -> list[str]:
    require_manifest(tensors, parts.local)
    readied = checked.readied
    by_torch = None if readied is None else readied.beyond_parts(tensors, parts)
    index = checked.index
    runs = [
        (at, run)
        for at, tensor in enumerate(index if by_torch is None or by_torch else ())
        for run in parts.runs_of(tensor, by_torch)
    ]
    locals_ = {region.part.local for _, run in runs for region in run.regions}
    whole = {name: Target(name, tensors[name]) for name in locals_}
    steps = [
        (at, run, [whole[region.part.local].of(region) for region in run.regions])
        for at, run in runs
    ]
    cut = list(dict.fromkeys(at for at, run in runs if not run.whole))
    found = section_counts(checked.patch, [checked.sections[at] for at in cut])
    counts = dict(zip(cut, found, strict=True))
    if begin is not None:
        begin()
    if readied is not None:
        with on(checked.patch.buffer.device):
            readied.write_parts(tensors, parts)
    for at, run, targets in steps:
        if run.whole:
            _apply_section(checked, at, targets[0])
        else:
            _apply_parts(checked, at, counts[at], run, targets)
    return parts.names(index)


def apply(
    patch: Patch,
    tensors: Mapping[str, Tensor],
    *,
    version: int | None = None,
    layout: Layout | None = None,
    manifest: Manifest | None = None,
) -> list[str]:
    """Check a patch and write it into `tensors`, in place; the names of the changed ones.

    `version`, if given, is the one that the tensors hold: WrongBase unless it is the patch's base
    (an anchor fits any). With a layout, which takes the manifest of the published tensors, as
    apply_checked(). CorruptPatch, ManifestMismatch, UnsupportedTensor, WrongBase: nothing was
    changed.
    """
    if manifest is None:
        if layout is not None:
            raise TypeError("apply() by a layout takes the manifest of the published tensors, too")
        manifest = manifest_of(tensors)
    checked = check(patch, manifest)
    base = patch.base_version
    if version is not None and base is not None and version != base:
        raise WrongBase(base_version=base, version=patch.version, held=version)
    return apply_checked(checked, tensors, layout=layout)

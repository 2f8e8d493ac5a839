"""Writing a patch into weights, in place: absolute bits, all checks before the first write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...messages.errors import UnsupportedTensor, WrongBase
from ...messages.manifest import Manifest
from .bits import bits
from .check import Checked, check
from .decode import span_index, span_values
from .layout import Encoding
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
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            tensor = tensor.detach().as_subclass(Tensor)
        self._bits = bits(tensor.detach())
        self._flat = self._bits.view(-1) if self._bits.is_contiguous() else None

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
        """Write the whole tensor's bits, from any device."""
        if self._flat is not None:
            self._flat.copy_(values)
        else:
            self._bits.copy_(values.view(self._bits.shape))


def _apply_section(checked: Checked, at: int, target: Target) -> None:
    patch, section = checked.patch, checked.sections[at]
    if section.encoding is Encoding.DENSE:
        target.put_all(patch.values(section))
        return
    for span in checked.spans(at):
        values_N = span_values(patch, section, span, target.device)
        target.put(span_index(patch, section, span, target.device), values_N)


def apply_checked(
    checked: Checked,
    tensors: Mapping[str, Tensor],
    *,
    begin: Callable[[], None] | None = None,
) -> list[str]:
    """Write a checked patch into `tensors`, in place; the names of the changed ones.

    The tensors must be those of the manifest that it was checked against: names, dtypes, shapes
    (ManifestMismatch), plain writable memory (UnsupportedTensor), on any device; contiguous or
    strided. All of them are validated before the first write, and `begin` is called between the
    two: what is raised before it has changed nothing. Temporaries are bounded. Applying twice is
    harmless. Queued on the current streams of the devices; nothing waits for them.
    """
    # Inference mode, because tensors that were made under it can be written to nowhere else.
    with torch.inference_mode():
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


def apply(patch: Patch, tensors: Mapping[str, Tensor], *, version: int | None = None) -> list[str]:
    """Check a patch and write it into `tensors`, in place; the names of the changed ones.

    `version`, if given, is the one that the tensors hold: WrongBase unless it is the patch's base
    (an anchor fits any). CorruptPatch, ManifestMismatch, UnsupportedTensor, WrongBase: nothing
    was changed.
    """
    manifest: Manifest = manifest_of(tensors)
    checked = check(patch, manifest)
    base = patch.base_version
    if version is not None and base is not None and version != base:
        raise WrongBase(base_version=base, version=patch.version, held=version)
    return apply_checked(checked, tensors)

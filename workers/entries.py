"""The entries of a log: what is said of a patch there, and what their bytes are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..messages.control import LogEntry, Tags
from ..messages.errors import CorruptPatch, LocalProtocolError
from ..messages.layout import Layout
from ..messages.manifest import Manifest
from ..pipeline.delta import Checked, Encoding, Patch, apply_checked, check
from ..pipeline.delta import checksum as checksum_of
from ..pipeline.delta.layout import ENTRY, HEADER
from ..pipeline.delta.patch import START_NBYTES
from ..pipeline.delta.tensors import dtype_of
from ..pipeline.log.base import Anatomy
from ..pipeline.log.pieces import piece_name


@dataclass(frozen=True, slots=True)
class Origin:
    """Which root of a trainer of several an entry is of, and in which coordinates.

    `layout` and `whole` are the hashes of its layout, and of the manifest that is published.
    """

    root: int
    roots: int
    layout: str
    whole: str


class PatchPayloads:
    """Reads payloads in the patch format: implements the log's `Payloads`.

    `manifest` gives that of the model whose anchors are stored here; whoever only reads has none.
    """

    def __init__(self, manifest: Callable[[], Manifest | None] = lambda: None) -> None:
        self._manifest = manifest

    def checksum(self, payload: bytes | bytearray | memoryview) -> int:
        """The checksum, as an entry has it."""
        data = payload if isinstance(payload, bytearray) else bytearray(payload)
        # frombuffer() takes nothing that is empty.
        buffer = torch.frombuffer(data or bytearray(1), dtype=torch.uint8)
        return checksum_of(buffer[: len(data)])

    def anatomy(self, payload: memoryview) -> Anatomy:
        """Where an anchor of this process's model holds its tensors (CorruptPatch)."""
        manifest = self._manifest()
        if manifest is None:
            raise LocalProtocolError("only who has the manifest stores anchors")
        table = HEADER.size + ENTRY.itemsize * len(manifest.tensors)
        start = bytearray(payload[: max(START_NBYTES, table)])
        if not start:
            raise CorruptPatch("0 bytes")
        # Of the buffer only the size is asked, as long as header and table are in the start.
        buffer = torch.empty(payload.nbytes, dtype=torch.uint8, device="meta")
        patch = Patch.from_start(buffer, torch.frombuffer(start, dtype=torch.uint8))
        if patch.base_version is not None or patch.manifest_hash != manifest.hash:
            raise CorruptPatch("no anchor of this model")
        offsets = [0] * len(manifest.tensors)
        for section in patch.sections_of(manifest):
            whole = section.encoding is Encoding.DENSE
            if not whole or section.numel != manifest.tensors[section.index].numel:
                raise CorruptPatch("a tensor that is not whole in an anchor")
            offsets[section.index] = section.values_offset
        return Anatomy(manifest, tuple(offsets))


def describe(
    patch: Patch,
    epoch: int,
    digest: int,
    step: int | None = None,
    tags: Tags | None = None,
    writer: str = "",
    *,
    checksum: int | None = None,
    merged: int = 0,
    origin: Origin | None = None,
) -> LogEntry:
    """The log entry of a patch; `chunks` is for the tier to fill in. `checksum`: if it is known.
    `origin`: whose piece of the version it is; None: it is all of it."""
    kind = "anchor"
    if patch.base_version is not None:
        kind = f"{'merged' if merged else 'patch'}-{patch.base_version}"
    name = f"{epoch}-{kind}-{patch.version}" + (f"-{writer}" if writer else "")
    return LogEntry(
        name=name if origin is None else piece_name(name, origin.root),
        epoch=epoch,
        base_version=patch.base_version,
        version=patch.version,
        nbytes=patch.nbytes,
        checksum=checksum_of(patch.buffer) if checksum is None else checksum,
        digest=digest,
        manifest_hash=patch.manifest_hash,
        chunks=0,
        writer=writer,
        merged=merged,
        step=step,
        tags=tags,
        root=0 if origin is None else origin.root,
        roots=1 if origin is None else origin.roots,
        layout="" if origin is None else origin.layout,
        whole="" if origin is None else origin.whole,
    )


def intact(data: bytes | bytearray, entry: LogEntry) -> bytearray:
    """An entry's bytes, if they are those that it names (CorruptPatch)."""
    whole = data if isinstance(data, bytearray) else bytearray(data)
    found = PatchPayloads().checksum(whole)
    if found != entry.checksum:
        raise CorruptPatch(f"its checksum is {found:016x}, not {entry.checksum:016x}")
    return whole


def read(data: bytearray, entry: LogEntry, manifest: Manifest) -> Checked:
    """The patch that an entry's bytes are, checked; their checksum is the caller's to check.

    PatchError.
    """
    if not data:
        raise CorruptPatch("0 bytes")
    patch = Patch.from_buffer(torch.frombuffer(data, dtype=torch.uint8))
    if (patch.base_version, patch.version) != (entry.base_version, entry.version):
        raise CorruptPatch(f"it holds {patch!r}")
    return check(patch, manifest)


def remake(
    data: bytearray,
    entry: LogEntry,
    manifest: Manifest,
    state: dict[str, torch.Tensor],
    layout: Layout | None = None,
) -> None:
    """Apply an entry's bytes to a state in host memory; an anchor's become the state themselves.

    With a layout the entry is a piece: `manifest` has the tensors that it names, and the layout
    says where they lie in those of the state, which an anchor's piece makes where there are none.
    Their checksum is the caller's to check. PatchError.
    """
    checked = read(data, entry, manifest)
    if entry.base_version is None:
        values = _values(checked.patch, manifest)
        if layout is None:
            state |= values
            return
        for spec in layout.tensors:
            if spec.name not in state:
                state[spec.name] = torch.empty(spec.shape, dtype=dtype_of(spec))
    apply_checked(checked, state, layout=layout)


def _values(anchor: Patch, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The tensors of an anchor, in the memory of its bytes (CorruptPatch)."""
    sections = {section.index: section for section in anchor.sections_of(manifest)}
    found = {}
    for index, spec in enumerate(manifest.tensors):
        dtype, section = dtype_of(spec), sections.get(index)
        values = torch.empty(0, dtype=dtype) if section is None else anchor.values(section)
        if values.numel() != spec.numel:
            raise CorruptPatch("an anchor that is not whole", tensor=spec.name)
        found[spec.name] = values.view(dtype).view(spec.shape)
    return found

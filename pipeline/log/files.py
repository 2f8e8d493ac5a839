"""A log entry as a safetensors file: what its metadata say, and how a payload lies in its tensors.

An anchor's tensors have their published names, dtypes and shapes; a patch is one tensor of bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from ...messages import codec
from ...messages.control import LogEntry
from ...messages.errors import LogError, RemoteProtocolError
from ...messages.manifest import Manifest, TensorSpec
from .base import Anatomy, Progress, unheard
from .container import METADATA, Damaged, header, read_header

SUFFIX = ".safetensors"
STEP_NBYTES = 8 << 20
ENTRY, ANCHOR = "sparsecast.entry", "sparsecast.anchor"

#: Called between steps of work that may last; it raises once nobody waits for it.
GoOn = Callable[[], None]
#: A tensor of the file, and where its bytes are in the payload.
_Part = tuple[TensorSpec, int]


class Anchor(msgspec.Struct, frozen=True):
    """How an anchor's payload is put together: the head, then tensors; 0 in between."""

    manifest: Manifest
    offsets: tuple[int, ...]
    head: bytes


@dataclass(frozen=True, slots=True)
class Opened:
    """What an entry's file says of itself; `begin` is where its tensors start."""

    entry: LogEntry
    anchor: Anchor | None
    begin: int


def write(
    file: BinaryIO, entry: LogEntry, payload: memoryview, anatomy: Anatomy | None, go_on: GoOn
) -> None:
    """Write an entry, an anchor with its anatomy. LogError if that is not the payload's."""
    # Not in JSON: it has no way to write a tag that is NaN.
    metadata = {"format": "pt", ENTRY: base64.b64encode(codec.encode(entry)).decode()}
    anchor: Anchor | None = None
    if anatomy is not None:
        head = _head(anatomy, payload)
        anchor = Anchor(anatomy.manifest, anatomy.offsets, head)
        metadata[ANCHOR] = msgspec.json.encode(anchor).decode()
    parts = _parts(entry, anchor)
    if any(spec.name == METADATA for spec, _ in parts):
        raise LogError(f"a safetensors file has no place for a tensor called {METADATA!r}")
    file.write(header([spec for spec, _ in parts], metadata))
    for spec, offset in parts:
        for step in _steps(payload[offset : offset + spec.nbytes]):
            go_on()
            file.write(step)


def read(file: BinaryIO, path: Path) -> Opened:
    """Read what stands before the tensors; Damaged unless this is an entry's file, and as long as
    it says."""
    found = read_header(file)
    try:
        entry = codec.decode_entry(base64.b64decode(found.metadata[ENTRY]), subject=path.name)
        anchor = None
        if entry.base_version is None:
            anchor = msgspec.json.decode(found.metadata[ANCHOR], type=Anchor)
    except KeyError as exc:
        raise Damaged(f"its metadata have no {exc}") from exc
    except (RemoteProtocolError, msgspec.MsgspecError, ValueError) as exc:
        raise Damaged(f"its metadata are not an entry's: {exc}") from exc
    if path.name != entry.name + SUFFIX:
        raise Damaged(f"it is the file of entry {entry.name!r}")
    return Opened(entry, anchor, found.begin)


def read_payload(
    file: BinaryIO, opened: Opened, go_on: GoOn, progress: Progress = unheard
) -> bytearray:
    """The payload's bytes, as they are on the disk; Damaged if the file ends before they do.

    `progress` hears, on this thread, how many there are after each step.
    """
    payload = bytearray(opened.entry.nbytes)
    view = memoryview(payload)
    filled = 0
    if opened.anchor is not None:
        filled = len(opened.anchor.head)
        view[:filled] = opened.anchor.head
    file.seek(opened.begin)
    for spec, offset in _parts(opened.entry, opened.anchor):
        for step in _steps(view[offset : offset + spec.nbytes]):
            go_on()
            # typeshed has readinto() of raw files only.
            if file.readinto(step) != step.nbytes:  # type: ignore[attr-defined]
                raise Damaged("it was cut off while it was read")
            filled += step.nbytes
            progress(filled)
    return payload


def _parts(entry: LogEntry, anchor: Anchor | None) -> list[_Part]:
    """The tensors of the file in its order: larger items first, so that each is aligned."""
    if anchor is None:
        return [(TensorSpec("patch", "uint8", (entry.nbytes,)), 0)]
    parts = zip(anchor.manifest.tensors, anchor.offsets, strict=True)
    return sorted(parts, key=lambda part: -part[0].itemsize)


def _head(anatomy: Anatomy, payload: memoryview) -> bytes:
    """What stands before the tensors; LogError if anything but zeros stands between them."""
    spans = sorted(_spans(anatomy.manifest, anatomy.offsets))
    end = begin = spans[0][0] if spans else payload.nbytes
    for start, stop in [*spans, (payload.nbytes, payload.nbytes)]:
        if start < end or any(payload[end:start]):
            raise LogError(f"the anchor's payload has something at byte {end} that is no tensor's")
        end = stop
    return bytes(payload[:begin])


def _spans(manifest: Manifest, offsets: Sequence[int]) -> Iterator[tuple[int, int]]:
    for spec, offset in zip(manifest.tensors, offsets, strict=True):
        if spec.nbytes:
            yield offset, offset + spec.nbytes


def _steps(view: memoryview) -> Iterator[memoryview]:
    return (view[at : at + STEP_NBYTES] for at in range(0, view.nbytes, STEP_NBYTES))

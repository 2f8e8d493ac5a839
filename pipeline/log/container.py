"""A safetensors file, written and read without a second copy of what it holds.

The library would take, or give, every tensor as bytes of its own beside the payload: twice or three
times a model. The format is 8 bytes with the length of a JSON header, the header, and the tensors
(https://huggingface.co/docs/safetensors). Ours has a SHA-256 of itself in its metadata, so that no
flipped bit in a name, a version or a place goes unnoticed; the bytes behind it have the checksum of
their entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from ...messages.manifest import TensorSpec

#: Our dtypes as safetensors spells them.
DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
}
METADATA = "__metadata__"
_SUM = "sparsecast.header"
_NO_SUM = "0" * 64
_LIMIT = 100_000_000  # the library's


class Damaged(ValueError):
    """The file is not what was written; the message says in what."""


class Slab(msgspec.Struct, frozen=True):
    """One tensor in the header: its dtype as safetensors spells it, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensors; `begin` is where they start in the file."""

    slabs: Mapping[str, Slab]
    metadata: Mapping[str, str]
    begin: int


def header(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The bytes before these tensors, which follow without gaps, in this order.

    Whoever wants every one aligned gives those with larger items first.
    """
    at = 0
    # The sum comes first: what looks like it further on is not touched.
    slabs: dict[str, object] = {METADATA: {_SUM: _NO_SUM, **metadata}}
    for spec in tensors:
        slabs[spec.name] = Slab(DTYPES[spec.dtype], spec.shape, (at, at + spec.nbytes))
        at += spec.nbytes
    text = msgspec.json.encode(slabs)
    text += b" " * (-len(text) % 8)
    text = text.replace(_NO_SUM.encode(), _sum(text), 1)
    return len(text).to_bytes(8, "little") + text


def read_header(file: BinaryIO) -> Header:
    """Read and check what stands before the tensors, and that the file ends where they end."""
    nbytes = int.from_bytes(file.read(8), "little")
    text = file.read(nbytes) if nbytes <= _LIMIT else b""
    if not nbytes or len(text) != nbytes:
        raise Damaged("its header is cut off")
    try:
        slabs = msgspec.json.decode(text, type=dict[str, dict[str, object]])
        metadata = msgspec.convert(slabs.pop(METADATA, {}), dict[str, str])
        found = msgspec.convert(slabs, dict[str, Slab])
    except msgspec.ValidationError as exc:
        raise Damaged(f"its header is no safetensors header: {exc}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Damaged(f"its header is no JSON: {exc}") from exc
    told = metadata.get(_SUM, "").encode()
    if not told or _sum(text.replace(told, _NO_SUM.encode(), 1)) != told:
        raise Damaged("its header is not the one that was written")
    begin = 8 + nbytes
    end = begin + max((slab.data_offsets[1] for slab in found.values()), default=0)
    size = file.seek(0, 2)
    if size != end:
        raise Damaged(f"it has {size} bytes, its header says {end}")
    return Header(found, metadata, begin)


def _sum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()

"""The manifest: a model's tensors in order, named by the hash of names, dtypes and shapes."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property

import msgspec

from .errors import ManifestMismatch

#: Bytes of one element, by the name of its dtype as torch spells it (without "torch.").
ITEMSIZE = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
}


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """One tensor: its name, its dtype as torch spells it (without "torch."), and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements the tensor has (1 for a 0-dim one)."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.numel * self.itemsize


class Manifest(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The tensors of a model in the trainer's order; sections of a patch name them by index."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for spec in self.tensors:
            if spec.dtype not in ITEMSIZE:
                raise ValueError(f"tensor {spec.name!r} has the unknown dtype {spec.dtype!r}")
            if any(size < 0 for size in spec.shape):
                raise ValueError(f"tensor {spec.name!r} has a negative size in {spec.shape}")
            if spec.name in seen:
                raise ValueError(f"tensor {spec.name!r} is listed twice")
            seen.add(spec.name)

    @cached_property
    def hash(self) -> str:
        """32 hex digits: the first 16 bytes of SHA-256 over the msgpack of the tensors."""
        return hashlib.sha256(msgspec.msgpack.encode(self.tensors)).hexdigest()[:32]

    @cached_property
    def numel(self) -> int:
        """Elements of the whole model."""
        return sum(spec.numel for spec in self.tensors)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the dense model."""
        return sum(spec.nbytes for spec in self.tensors)

    def require_same(
        self, other: Manifest, *, here: str = "here", there: str = "on the other side"
    ) -> None:
        """Raise ManifestMismatch naming the first difference of `other` (theirs) from this one.

        `here` and `there` say whose is which.
        """
        theirs = {spec.name: spec for spec in other.tensors}
        for spec in self.tensors:
            found = theirs.pop(spec.name, None)
            if found is None:
                raise ManifestMismatch(f"tensor {spec.name!r} is missing {there}")
            if found.shape != spec.shape:
                raise ManifestMismatch(
                    f"tensor {spec.name!r} has shape {list(spec.shape)} {here} "
                    f"and {list(found.shape)} {there}"
                )
            if found.dtype != spec.dtype:
                raise ManifestMismatch(
                    f"tensor {spec.name!r} has dtype {spec.dtype} {here} and {found.dtype} {there}"
                )
        if theirs:
            raise ManifestMismatch(f"tensor {next(iter(theirs))!r} is only {there}")

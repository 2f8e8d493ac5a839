"""What changed between two states: a patch, from both or against a shadow of the first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...messages.errors import LocalProtocolError
from ...messages.manifest import Manifest
from .bits import Source, quiet
from .digest import addends, block_factors, checksum, dense_sum, sparse_sum
from .encode import Draft, Piece, assemble, empty_bits
from .layout import ANCHOR, blocks_of
from .patch import Patch
from .search import Change, Taking, chunks, scan
from .tensors import Dtypes, dtype_of, manifest_of, require_manifest

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Diffed:
    """A patch, the digest of the state after it, and what finding and encoding it took."""

    patch: Patch
    digest: int
    diff_us: int
    encode_us: int

    @property
    def checksum(self) -> int:
        """The checksum of the patch's buffer; waits until it is whole."""
        return checksum(self.patch.buffer)


def _part(held: Tensor, start: int, stop: int) -> Tensor:
    return held[start:stop]


def _sources(tensors: Mapping[str, Tensor], manifest: Manifest) -> list[Source]:
    return [Source(spec.name, tensors[spec.name], dtype_of(spec)) for spec in manifest.tensors]


def _assemble(
    drafts: Sequence[Draft],
    manifest: Manifest,
    manifest_hash: str,
    sources: Sequence[Source],
    *,
    base_version: int,
    version: int,
    device: torch.device,
) -> Patch:
    def dense_of(index: int) -> Iterator[Tensor]:
        source = sources[index]
        return (source.piece(start, stop) for start, stop in chunks(source.numel))

    return assemble(
        drafts,
        manifest_hash=manifest_hash,
        numel=manifest.numel,
        dense_nbytes=manifest.nbytes,
        base_version=base_version,
        version=version,
        device=device,
        manifest=manifest,
        dense_of=dense_of,
    )


def _require_versions(base_version: int, version: int) -> None:
    if not 0 <= base_version < version:
        raise ValueError(
            f"a patch goes from a version ≥ 0 to a higher one, not from {base_version} to {version}"
        )


def _dense_draft(index: int, itemsize: int, source: Source, device: torch.device) -> Draft:
    def dense() -> Iterator[Tensor]:
        return (source.piece(start, stop).to(device) for start, stop in chunks(source.numel))

    return Draft(index, itemsize, source.numel, source.numel, (), dense, whole=True)


def _device(sources: Sequence[Source]) -> torch.device:
    return sources[0].device if sources else torch.device("cpu")


def diff(
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    *,
    base_version: int,
    version: int,
    dtype: Dtypes = None,
) -> Patch:
    """The patch that turns `old` into `new`, on the device of their first tensor.

    Both hold the same names, dtypes and shapes in the same order (ManifestMismatch); with `dtype`
    both are cast on the way. Neither is changed.
    """
    _require_versions(base_version, version)
    with quiet():
        manifest = manifest_of(old, dtype=dtype)
        require_manifest(new, manifest, dtype=dtype)
        olds, news = _sources(old, manifest), _sources(new, manifest)
        drafts = []
        for index, (was, now, spec) in enumerate(zip(olds, news, manifest.tensors, strict=True)):
            pieces = [change.piece for change in scan(was.piece, now, None)]
            if pieces:
                drafts.append(_draft(index, spec.itemsize, now, pieces))
        return _assemble(
            drafts, manifest, manifest.hash, news,
            base_version=base_version, version=version, device=_device(news),
        )  # fmt: skip


def _draft(index: int, itemsize: int, source: Source, pieces: list[Piece]) -> Draft:
    def dense() -> Iterator[Tensor]:
        return (source.piece(start, stop) for start, stop in chunks(source.numel))

    count = sum(piece.values.numel() for piece in pieces)
    return Draft(index, itemsize, source.numel, count, pieces, dense)


class Shadow:
    """A private copy of the bits that were published last, on the devices of the tensors.

    Bytes held: the dense model in the published dtypes; within diff(), the patch and up to about
    12 bytes a changed 8-byte word beside it. Not for several threads at once.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, dtype: Dtypes = None) -> None:
        self._dtype = dtype
        self._torn = False
        with quiet():
            self.manifest = manifest_of(tensors, dtype=dtype)
            self._hash = self.manifest.hash
            self._held: list[Tensor] = []
            total = 0
            for spec, source in zip(
                self.manifest.tensors, _sources(tensors, self.manifest), strict=True
            ):
                held = empty_bits(spec.numel, spec.itemsize, source.device)
                for start, stop in chunks(spec.numel):
                    held[start:stop].copy_(source.piece(start, stop))
                total += int(dense_sum(held, spec.name, 0).item())
                self._held.append(held)
            self._factors = [
                block_factors(spec.name, 0, blocks_of(spec.numel), held.device)
                for spec, held in zip(self.manifest.tensors, self._held, strict=True)
            ]
            self._digest = total & _MASK

    @property
    def digest(self) -> int:
        """The digest of the state that it holds."""
        return self._digest

    @property
    def nbytes(self) -> int:
        """Bytes of the dense state that it holds."""
        return self.manifest.nbytes

    def _sources(self) -> list[Source]:
        return [
            Source(spec.name, held.view(dtype_of(spec)))
            for spec, held in zip(self.manifest.tensors, self._held, strict=True)
        ]

    def _require_whole(self) -> None:
        if self._torn:
            raise LocalProtocolError(
                "this shadow was interrupted while it took over an update and holds neither state; "
                "make a new one and publish an anchor"
            )

    def diff(self, tensors: Mapping[str, Tensor], *, base_version: int, version: int) -> Diffed:
        """The patch from what is held to `tensors`, which is held from then on.

        The tensors must be those of the manifest (ManifestMismatch, UnsupportedTensor). Whatever
        is raised, the shadow holds what it held; only an interrupt within the last step, the
        taking over, leaves it torn, and every later call then says so.
        """
        _require_versions(base_version, version)
        self._require_whole()
        with quiet():
            began = time.perf_counter()
            require_manifest(tensors, self.manifest, dtype=self._dtype)
            sources = _sources(tensors, self.manifest)
            drafts: list[Draft] = []
            taken: list[Taking] = []
            sums: dict[torch.device, Tensor] = {}
            for index, (held, source) in enumerate(zip(self._held, sources, strict=True)):
                pieces = []
                for change in scan(partial(_part, held), source, taken):
                    pieces.append(change.piece)
                    before = sums.get(held.device)
                    amount = self._digest_of(index, change)
                    sums[held.device] = amount if before is None else before + amount
                if pieces:
                    itemsize = self.manifest.tensors[index].itemsize
                    drafts.append(_draft(index, itemsize, source, pieces))
            digest = self._digest + sum(int(value.item()) for value in sums.values())
            found_at = time.perf_counter()
            patch = _assemble(
                drafts, self.manifest, self._hash, sources,
                base_version=base_version, version=version, device=_device(sources),
            )  # fmt: skip
            encoded_at = time.perf_counter()
            self._torn = True
            for taking in taken:
                taking.take()
            self._digest = digest & _MASK
            self._torn = False
            taken_at = time.perf_counter()
        scan_s = found_at - began + taken_at - encoded_at
        return Diffed(
            patch, self._digest, round(scan_s * 1e6), round((encoded_at - found_at) * 1e6)
        )

    def _digest_of(self, index: int, change: Change) -> Tensor:
        piece, old_N = change.piece, change.old_N
        if change.idx_N is None:
            name = self.manifest.tensors[index].name
            return dense_sum(change.new_N, name, piece.start) - dense_sum(old_N, name, piece.start)
        g_K = self._factors[index][piece.start >> 16 : (piece.start + piece.numel + 0xFFFF) >> 16]
        return sparse_sum(addends(change.new_N).sub_(addends(old_N)), change.idx_N, g_K)

    def anchor(self, version: int, *, device: torch.device | None = None) -> Patch:
        """A full copy of the state that is held, as the anchor of `version`.

        On `device`; None: where the first of what is held lies.
        """
        if version < 0:
            raise ValueError(f"version {version} is negative")
        self._require_whole()
        with quiet():
            sources = self._sources()
            device = _device(sources) if device is None else device
            drafts = [
                _dense_draft(index, spec.itemsize, source, device)
                for index, (spec, source) in enumerate(
                    zip(self.manifest.tensors, sources, strict=True)
                )
                if spec.numel
            ]
            return _assemble(
                drafts, self.manifest, self._hash, sources,
                base_version=ANCHOR, version=version, device=device,
            )  # fmt: skip

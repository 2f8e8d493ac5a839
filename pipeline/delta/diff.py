"""Finding what changed, bits against bits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...messages.errors import LocalProtocolError
from ...messages.manifest import Manifest
from .digest import block_factors, dense_sum, sparse_sum
from .encode import Draft, Piece, assemble, empty_bits, index_piece, mask_piece
from .layout import ANCHOR, blocks_of
from .patch import Patch
from .tensors import (
    BLOCK,
    Dtypes,
    Source,
    dtype_of,
    manifest_of,
    quiet,
    require_manifest,
    unsigned,
)

_CHUNK = 1 << 20  # elements; a multiple of BLOCK, small enough for its temporaries to stay in cache
_WORDS_FROM = 1 << 14
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Diffed:
    """A patch, the digest of the state after it, and what finding and encoding it took."""

    patch: Patch
    digest: int
    diff_us: int
    encode_us: int


@dataclass(frozen=True, slots=True)
class _Found:
    """What changed between two pieces of one tensor.

    Sparse: `idx_N` (int64), `old_N`, `new_N` (bits). Many: `mask_N` over the whole piece, and both
    pieces. `target`, `at`, `put` write the new bits into the old piece: target[at] = put.
    """

    idx_N: Tensor | None
    mask_N: Tensor | None
    old_N: Tensor
    new_N: Tensor
    target: Tensor
    at: Tensor | None
    put: Tensor


def _words(bits_N: Tensor, lanes: int) -> Tensor | None:
    """The bits as 64-bit words without the odd end, or None if they lie askew."""
    if bits_N.data_ptr() % 8 or bits_N.storage_offset() % lanes:
        return None
    whole = bits_N.numel() // lanes * lanes
    return (bits_N if whole == bits_N.numel() else bits_N[:whole]).view(torch.int64)


def _find(old_N: Tensor, new_N: Tensor) -> _Found | None:
    """What changed between two equally long contiguous 1-D pieces of integer bits."""
    numel = old_N.numel()
    lanes = 8 // old_N.element_size()
    if lanes > 1 and numel >= _WORDS_FROM:
        # Comparing words reads the same bytes and leaves 1/lanes of the mask to search.
        old_W, new_W = _words(old_N, lanes), _words(new_N, lanes)
        if old_W is not None and new_W is not None:
            end = old_W.numel() * lanes
            at_W = (old_W != new_W).nonzero().view(-1)
            odd = end != numel and not torch.equal(old_N[end:], new_N[end:])
            if not odd:
                words = at_W.numel()
                if not words:
                    return None
                if words * 4 <= old_W.numel():
                    was, now = old_W[at_W], new_W[at_W]
                    lane_N = (was ^ now).view(old_N.dtype).nonzero().view(-1)
                    shift = lanes.bit_length() - 1
                    idx_N = (at_W[lane_N >> shift] << shift) | (lane_N & (lanes - 1))
                    return _Found(
                        idx_N, None, was.view(old_N.dtype)[lane_N], now.view(old_N.dtype)[lane_N],
                        old_W, at_W, now,
                    )  # fmt: skip
    mask_N = old_N != new_N
    if numel > BLOCK and int(mask_N.count_nonzero().item()) * 16 > numel:
        return _Found(None, mask_N, old_N, new_N, old_N, None, new_N)
    idx_N = mask_N.nonzero().view(-1)
    if not idx_N.numel():
        return None
    put = new_N[idx_N]
    return _Found(idx_N, None, old_N[idx_N], put, old_N, idx_N, put)


def _piece(found: _Found, start: int, numel: int) -> Piece:
    if found.idx_N is not None:
        return index_piece(start, numel, found.idx_N, found.new_N)
    assert found.mask_N is not None
    return mask_piece(start, found.mask_N, found.new_N)


def _delta(new_N: Tensor, old_N: Tensor) -> Tensor:
    return unsigned(new_N).to(torch.int64) - unsigned(old_N).to(torch.int64)


def _pieces(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, _CHUNK):
        yield start, min(start + _CHUNK, numel)


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
        return (source.piece(start, stop) for start, stop in _pieces(source.numel))

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
        return (source.piece(start, stop).to(device) for start, stop in _pieces(source.numel))

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
            pieces = []
            for start, stop in _pieces(spec.numel):
                new_N = now.piece(start, stop)
                found = _find(was.piece(start, stop).to(new_N.device), new_N)
                if found is not None:
                    pieces.append(_piece(found, start, stop - start))
            if pieces:
                drafts.append(_draft(index, spec.itemsize, now, pieces))
        return _assemble(
            drafts, manifest, manifest.hash, news,
            base_version=base_version, version=version, device=_device(news),
        )  # fmt: skip


def _draft(index: int, itemsize: int, source: Source, pieces: list[Piece]) -> Draft:
    def dense() -> Iterator[Tensor]:
        return (source.piece(start, stop) for start, stop in _pieces(source.numel))

    count = sum(piece.values.numel() for piece in pieces)
    return Draft(index, itemsize, source.numel, count, pieces, dense)


class Shadow:
    """A private copy of the bits that were published last, on the devices of the tensors.

    Bytes held: the dense model in the published dtypes. Not for several threads at once.
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
                for start, stop in _pieces(spec.numel):
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
            taken: list[_Found] = []
            sums: dict[torch.device, Tensor] = {}
            for index, (held, source) in enumerate(zip(self._held, sources, strict=True)):
                pieces = []
                for start, stop in _pieces(source.numel):
                    new_N = source.piece(start, stop).to(held.device)
                    found = _find(held[start:stop], new_N)
                    if found is None:
                        continue
                    pieces.append(_piece(found, start, stop - start))
                    taken.append(found)
                    change = self._digest_of(index, found, start, stop)
                    before = sums.get(held.device)
                    sums[held.device] = change if before is None else before + change
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
            for found in taken:
                if found.at is None:
                    found.target.copy_(found.put)
                else:
                    found.target.index_put_((found.at,), found.put)
            self._digest = digest & _MASK
            self._torn = False
            taken_at = time.perf_counter()
        scan_s = found_at - began + taken_at - encoded_at
        return Diffed(
            patch, self._digest, round(scan_s * 1e6), round((encoded_at - found_at) * 1e6)
        )

    def _digest_of(self, index: int, found: _Found, start: int, stop: int) -> Tensor:
        delta_N = _delta(found.new_N, found.old_N)
        if found.idx_N is None:
            return dense_sum(delta_N, self.manifest.tensors[index].name, start)
        first = start >> 16
        g_K = self._factors[index][first : (stop + BLOCK - 1) >> 16]
        return sparse_sum(delta_N, found.idx_N, g_K)

    def anchor(self, version: int) -> Patch:
        """A full copy of the state that is held, as the anchor of `version`."""
        if version < 0:
            raise ValueError(f"version {version} is negative")
        self._require_whole()
        with quiet():
            sources = self._sources()
            device = _device(sources)
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

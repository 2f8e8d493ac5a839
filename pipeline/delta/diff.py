"""Finding what changed, bits against bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...messages.errors import LocalProtocolError
from ...messages.manifest import Manifest
from .digest import addends, block_factors, dense_sum, sparse_sum
from .encode import Draft, Piece, assemble, empty_bits, index_piece, piece_of_mask
from .layout import ANCHOR, blocks_of
from .patch import Patch
from .tensors import (
    BLOCK,
    Dtypes,
    Source,
    dtype_of,
    indices,
    manifest_of,
    quiet,
    require_manifest,
)

_CHUNK = 1 << 20  # elements; a multiple of BLOCK, small enough for its temporaries to stay in cache
_WORDS_FROM = 1 << 14
_JOIN = 1 << 18
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Diffed:
    """A patch, the digest of the state after it, and what finding and encoding it took."""

    patch: Patch
    digest: int
    diff_us: int
    encode_us: int


@dataclass(frozen=True, slots=True)
class _Few:
    """Few elements of a chunk changed: which (int64, from the chunk's start), and their bits.

    `target`, `at`, `put` take the new bits over: target[at] = put.
    """

    start: int
    idx_N: Tensor
    old_N: Tensor
    new_N: Tensor
    target: Tensor
    at: Tensor
    put: Tensor

    def take(self) -> None:
        self.target.scatter_(0, self.at, self.put)


@dataclass(frozen=True, slots=True)
class _Many:
    """Much of a chunk changed: a mask over all of it, and its bits before and after."""

    start: int
    mask_N: Tensor
    old_N: Tensor
    new_N: Tensor

    def take(self) -> None:
        self.old_N.copy_(self.new_N)


def _words(bits_N: Tensor, lanes: int) -> Tensor | None:
    """The bits as 64-bit words without the odd end, or None if they lie askew."""
    if bits_N.data_ptr() % 8 or bits_N.storage_offset() % lanes:
        return None
    whole = bits_N.numel() // lanes * lanes
    return (bits_N if whole == bits_N.numel() else bits_N[:whole]).view(torch.int64)


def _find(old_N: Tensor, new_N: Tensor, start: int) -> _Few | _Many | None:
    """What changed between two equally long contiguous 1-D chunks of integer bits."""
    numel = old_N.numel()
    lanes = 8 // old_N.element_size()
    if lanes > 1 and numel >= _WORDS_FROM:
        # Comparing words reads the same bytes and leaves 1/lanes of the mask to search.
        old_W, new_W = _words(old_N, lanes), _words(new_N, lanes)
        if old_W is not None and new_W is not None:
            end = old_W.numel() * lanes
            at_W = indices(old_W != new_W)
            if end == numel or torch.equal(old_N[end:], new_N[end:]):
                if not at_W.numel():
                    return None
                if at_W.numel() * 2 <= old_W.numel():
                    was, now = old_W.index_select(0, at_W), new_W.index_select(0, at_W)
                    lane_N = indices((was ^ now).view(old_N.dtype) != 0)
                    shift = lanes.bit_length() - 1
                    idx_N = at_W.index_select(0, lane_N >> shift).bitwise_left_shift_(shift)
                    idx_N.bitwise_or_(lane_N & (lanes - 1))
                    return _Few(
                        start, idx_N, was.view(old_N.dtype).index_select(0, lane_N),
                        now.view(old_N.dtype).index_select(0, lane_N), old_W, at_W, now,
                    )  # fmt: skip
    mask_N = old_N != new_N
    if numel > BLOCK and int(mask_N.count_nonzero().item()) * 8 > numel:
        return _Many(start, mask_N, old_N, new_N)
    idx_N = indices(mask_N)
    if not idx_N.numel():
        return None
    put = new_N.index_select(0, idx_N)
    return _Few(start, idx_N, old_N.index_select(0, idx_N), put, old_N, idx_N, put)


@dataclass(frozen=True, slots=True)
class _Change:
    """A piece of the patch, with what the digest needs: the elements and their bits before."""

    piece: Piece
    idx_N: Tensor | None
    old_N: Tensor
    new_N: Tensor


def _joined(few: Sequence[_Few], stop: int) -> _Change:
    """Chunks of few changes as one piece: what comes after works on larger arrays."""
    start = few[0].start
    if len(few) == 1:
        idx_N, old_N, new_N = few[0].idx_N, few[0].old_N, few[0].new_N
    else:
        idx_N = torch.cat([found.idx_N + (found.start - start) for found in few])
        old_N = torch.cat([found.old_N for found in few])
        new_N = torch.cat([found.new_N for found in few])
    return _Change(index_piece(start, stop - start, idx_N, new_N), idx_N, old_N, new_N)


def _scan(
    old: Callable[[int, int], Tensor], new: Source, taken: list[_Few | _Many] | None
) -> Iterator[_Change]:
    """What changed in one tensor, in pieces that ascend; into `taken` goes what to take over."""
    few: list[_Few] = []
    held = 0
    end = 0
    for start, stop in _pieces(new.numel):
        old_N = old(start, stop)
        found = _find(old_N, new.piece(start, stop).to(old_N.device), start)
        if found is None:
            continue
        if taken is not None:
            taken.append(found)
        if isinstance(found, _Few):
            few.append(found)
            held += found.idx_N.numel()
            end = stop
        if few and (held >= _JOIN or not isinstance(found, _Few)):
            yield _joined(few, end)
            few, held = [], 0
        if isinstance(found, _Many):
            piece = piece_of_mask(start, found.mask_N, found.new_N)
            yield _Change(piece, None, found.old_N, found.new_N)
    if few:
        yield _joined(few, end)


def _delta(new_N: Tensor, old_N: Tensor) -> Tensor:
    return addends(new_N).sub_(addends(old_N))


def _part(held: Tensor, start: int, stop: int) -> Tensor:
    return held[start:stop]


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
            pieces = [change.piece for change in _scan(was.piece, now, None)]
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
            taken: list[_Few | _Many] = []
            sums: dict[torch.device, Tensor] = {}
            for index, (held, source) in enumerate(zip(self._held, sources, strict=True)):
                pieces = []
                for change in _scan(partial(_part, held), source, taken):
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
            for found in taken:
                found.take()
            self._digest = digest & _MASK
            self._torn = False
            taken_at = time.perf_counter()
        scan_s = found_at - began + taken_at - encoded_at
        return Diffed(
            patch, self._digest, round(scan_s * 1e6), round((encoded_at - found_at) * 1e6)
        )

    def _digest_of(self, index: int, change: _Change) -> Tensor:
        piece, old_N = change.piece, change.old_N
        if change.idx_N is None:
            name = self.manifest.tensors[index].name
            return dense_sum(change.new_N, name, piece.start) - dense_sum(old_N, name, piece.start)
        g_K = self._factors[index][piece.start >> 16 : (piece.start + piece.numel + 0xFFFF) >> 16]
        return sparse_sum(_delta(piece.values, old_N), change.idx_N, g_K)

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

"""What changed between two states: a patch, from both or against a shadow of the first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...messages.errors import LocalProtocolError
from ...messages.layout import Layout
from ...messages.manifest import Manifest
from . import kernels
from .bits import Source, bits_dtype, quiet
from .digest import addends, block_factors, dense_sum, digest, region_sum, sparse_sum
from .digest import checksum as checksum_of
from .encode import Draft, Piece, assemble
from .layout import ANCHOR, blocks_of
from .parts import Parts, Region, parts_of
from .patch import Patch
from .search import Change, Taking, chunks, scan
from .tensors import Dtypes, Named, dtype_of, manifest_of, require_manifest
from .timing import Mark, on

if TYPE_CHECKING:
    from .fused import Differ

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a diff came to, once its patch is whole."""

    digest: int
    checksum: int
    diff_us: int
    encode_us: int


class Diffed:
    """A patch and what its diff came to: the digest of the state after it, and what it took.

    On a CUDA device the patch may still be written, in the order of the stream on which diff() was
    called; whatever is asked here waits until it is whole, on any thread.
    """

    __slots__ = ("_facts", "_settle", "patch")

    def __init__(self, patch: Patch, settle: Callable[[], _Facts]) -> None:
        self.patch = patch
        self._settle = settle
        self._facts: _Facts | None = None

    def _known(self) -> _Facts:
        if self._facts is None:
            self._facts = self._settle()
        return self._facts

    @property
    def digest(self) -> int:
        """The digest of the state after the patch."""
        return self._known().digest

    @property
    def checksum(self) -> int:
        """The checksum of the patch's buffer."""
        return self._known().checksum

    @property
    def diff_us(self) -> int:
        """What finding the changes took, in µs."""
        return self._known().diff_us

    @property
    def encode_us(self) -> int:
        """What writing the patch took, in µs."""
        return self._known().encode_us


def _part(held: Tensor, start: int, stop: int) -> Tensor:
    return held[start:stop]


def _beside(source: Source, device: torch.device, start: int, stop: int) -> Tensor:
    return source.piece(start, stop).to(device)


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


def _memory(manifest: Manifest, devices: Sequence[torch.device], host: bool) -> list[Tensor]:
    """Integer bits for every tensor, in one piece of memory a device, aligned to 256 bytes."""
    places = [torch.device("cpu") if host else device for device in devices]
    held: dict[int, Tensor] = {}
    for place in dict.fromkeys(places):
        members = [at for at, other in enumerate(places) if other == place]
        sizes = [(manifest.tensors[at].nbytes + 255) & ~255 for at in members]
        pinned = host and torch.cuda.is_available()
        memory = torch.empty(sum(sizes), dtype=torch.uint8, device=place, pin_memory=pinned)
        for at, part in zip(members, torch.split(memory, sizes), strict=True):
            spec = manifest.tensors[at]
            held[at] = part[: spec.nbytes].view(bits_dtype(spec.itemsize))
    return [held[at] for at in range(len(places))]


def _differ(
    manifest: Manifest,
    tensors: Sequence[Tensor],
    *,
    held: int = 0,
    places: Sequence[tuple[str, int] | None] | None = None,
) -> Differ | None:
    """The kernels' diff, if all these tensors (the manifest's, once or more) lie on one device
    that has kernels."""
    device = tensors[0].device if tensors else torch.device("cpu")
    if not manifest.numel or not kernels.usable(device):
        return None
    from .fused import Differ

    differ = Differ(manifest, device, held=held, places=places)
    return differ if differ.takes(tensors) else None


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
        was, now = ([given[spec.name] for spec in manifest.tensors] for given in (old, new))
        fused = _differ(manifest, [*was, *now]) if dtype is None else None
        if fused is not None:
            with on(was[0].device):
                return fused.diff(was, now, base_version=base_version, version=version)[0]
        olds, news = _sources(old, manifest), _sources(new, manifest)
        drafts = []
        for index, (one, other) in enumerate(zip(olds, news, strict=True)):
            held = partial(_beside, one, other.device)
            pieces = [change.piece for change in scan(held, other, None)]
            if pieces:
                itemsize = manifest.tensors[index].itemsize
                drafts.append(_draft(index, itemsize, other, pieces))
        return _assemble(
            drafts, manifest, manifest.hash, news,
            base_version=base_version, version=version, device=_device(news),
        )  # fmt: skip


def _draft(index: int, itemsize: int, source: Source, pieces: list[Piece]) -> Draft:
    def dense() -> Iterator[Tensor]:
        return (source.piece(start, stop) for start, stop in chunks(source.numel))

    count = sum(piece.values.numel() for piece in pieces)
    return Draft(index, itemsize, source.numel, count, pieces, dense)


def _places(parts: Parts) -> list[tuple[str, int] | None]:
    """Of each local tensor: which published one it is a run of, in C order, and from where on."""
    regions: dict[int, list[Region]] = {}
    for region in parts.regions:
        regions.setdefault(region.local, []).append(region)
    found: list[tuple[str, int] | None] = []
    for at, spec in enumerate(parts.local.tensors):
        held = regions.get(at, [])
        place: tuple[str, int] | None = None
        if len(held) == 1 and held[0].flat and held[0].part.counted:
            region = held[0]
            runs = len(region.held) == 1 and region.held[0].stride <= 1
            if runs and region.high - region.low == spec.numel:
                place = region.part.tensor, region.low
        found.append(place)
    return found


def _rest(parts: Parts, places: Sequence[tuple[str, int] | None]) -> Parts | None:
    """The parts of the local tensors that begin at no block of a published one; None: all do."""
    askew = {
        spec.name
        for spec, place in zip(parts.local.tensors, places, strict=True)
        if spec.numel and (place is None or place[1] & 0xFFFF)
    }
    if not askew:
        return None
    layout = Layout(
        tensors=tuple(spec for spec in parts.local.tensors if spec.name in askew),
        parts=tuple(part for part in parts.layout.parts if part.local in askew),
        padding=tuple(gap for gap in parts.layout.padding if gap.local in askew),
    )
    return Parts(layout, parts.manifest)


class Shadow:
    """A private copy of the bits that were published last, beside the tensors they are of.

    Bytes held: the dense model in the published dtypes, on the devices of the tensors, or with
    `host` in pinned host memory. Within diff() the patch is made beside it, and scratch: with
    kernels, where all tensors are on one CUDA device, slots for what the last diff lets expect: 1
    to 12 % of the model, 6 % in the first, which a model of up to a milliard elements keeps for the
    next one, a larger one but a thousandth of itself; with torch up to about 12 bytes a changed
    8-byte word. The patch's memory may be twice as large as the patch, and a MiB. Not for several
    threads at once.

    With a `layout` the tensors are its local ones, in whose coordinates patches are, while digests
    are their share of those of the `published` tensors, which it fits (ManifestMismatch). Kernels
    read such tensors again for that as do not begin at a block of 65,536 published elements.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        dtype: Dtypes = None,
        host: bool = False,
        layout: Layout | None = None,
        published: Manifest | None = None,
    ) -> None:
        self._dtype = dtype
        self._torn = False
        with quiet():
            self.manifest = manifest_of(tensors, dtype=dtype)
            self._hash = self.manifest.hash
            sources = _sources(tensors, self.manifest)
            self._held = _memory(self.manifest, [source.device for source in sources], host)
            for held, source in zip(self._held, sources, strict=True):
                for start, stop in chunks(source.numel):
                    held[start:stop].copy_(source.piece(start, stop))
            self._factors: dict[int, Tensor] = {}
            self._layout, self._published = layout, published
            #: Of each tensor, under which name its elements count for the digest, and from which
            #: place on; None: they do not lie there as one run.
            self._places: list[tuple[str, int] | None] = [
                (spec.name, 0) for spec in self.manifest.tensors
            ]
            self._parts: Parts | None = None
            #: The regions of tensors whose share kernels do not find on the way.
            self._rest: Parts | None = None
            if layout is not None and published is not None:
                self._parts = parts_of(layout, published)
                self.manifest.require_same(self._parts.local)
                self._places = _places(self._parts)
                self._rest = _rest(self._parts, self._places)
            named = self._named()
            rest = self._rest.local.tensors if self._rest is not None else ()
            self._rest_held = Named((spec.name, named[spec.name]) for spec in rest)
            self._rest_held.token, self._rest_held.manifests = object(), {}  # they never move
            self._digest = self._whole_digest()
            #: The last diff, while nobody has asked for the digest after it.
            self._last: Diffed | None = None
            self._fused: Differ | None = None
            self._mark = Mark(_device(sources))

    @property
    def digest(self) -> int:
        """The digest of the state that it holds; waits until the last diff is through."""
        if self._last is not None:
            self._digest, self._last = self._last.digest, None
        return self._digest

    @property
    def nbytes(self) -> int:
        """Bytes of the dense state that it holds."""
        return self.manifest.nbytes

    def _whole_digest(self) -> int:
        return digest(self._named(), manifest=self._published, layout=self._layout)

    def _named(self) -> dict[str, Tensor]:
        return {
            spec.name: held.view(dtype_of(spec)).view(spec.shape)
            for spec, held in zip(self.manifest.tensors, self._held, strict=True)
        }

    def _require_whole(self) -> None:
        if self._torn:
            raise LocalProtocolError(
                "this shadow was interrupted while it took over an update and holds neither state; "
                "make a new one and publish an anchor"
            )

    def diff(
        self,
        tensors: Mapping[str, Tensor],
        *,
        base_version: int,
        version: int,
        waiting: Callable[[], None] | None = None,
    ) -> Diffed:
        """The patch from what is held to `tensors`, which is held from then on.

        `waiting` is called once, where nothing is left to do but to wait for the device; where the
        torch reference does the work, before it begins.

        The tensors must be those of the manifest (ManifestMismatch, UnsupportedTensor). With
        kernels it waits once, for the counts, and returns when all that reads the tensors is
        enqueued on their device's current stream: they may change in its order. What is raised by a
        check has changed nothing; what breaks the taking over (an interrupt, a device that fails)
        leaves the shadow torn, and every later call then says so.
        """
        _require_versions(base_version, version)
        self._require_whole()
        with quiet():
            require_manifest(tensors, self.manifest, dtype=self._dtype)
            self._mark.precede()
            token = getattr(tensors, "token", None)
            new: list[Tensor] = []
            if self._fused is None or not self._fused.knows(token):
                new = [tensors[spec.name] for spec in self.manifest.tensors]
            if self._fused is None:
                self._fused = self._differ(new)
            if self._fused is not None and (self._fused.knows(token) or self._fused.takes(new)):
                found = self._diff_fused(self._fused, new, token, base_version, version, waiting)
            else:
                if waiting is not None:
                    waiting()
                found = self._diff_torch(tensors, base_version, version)
                self._mark = Mark(self._mark.device)
            self._last = found
        return found

    def _diff_fused(
        self,
        fused: Differ,
        new: list[Tensor],
        token: object,
        base_version: int,
        version: int,
        waiting: Callable[[], None] | None,
    ) -> Diffed:
        def begin() -> None:
            self._torn = True

        with on(fused.device):
            patch, found = fused.diff(
                self._held,
                new,
                base_version=base_version,
                version=version,
                begin=begin,
                waiting=waiting,
                token=token,
            )
        self._torn = False
        self._mark = found.written
        rest = self._rest_share(fused.device)

        def settled() -> _Facts:
            digest, checksum = found.sums()
            return _Facts((digest + rest()) & _MASK, checksum, *found.times_us())

        return Diffed(patch, settled)

    def _differ(self, tensors: Sequence[Tensor]) -> Differ | None:
        """The kernels' diff of these tensors, whose sums begin with what is held now."""
        if self._parts is None:
            return _differ(self.manifest, tensors, held=self.digest)
        places = [
            (place[0], place[1] >> 16) if place is not None and not place[1] & 0xFFFF else None
            for place in self._places
        ]
        found = _differ(self.manifest, tensors, places=places)
        if found is not None:
            found.begin((self.digest - self._rest_share(found.device)()) & _MASK)
        return found

    def _rest_share(self, device: torch.device) -> Callable[[], int]:
        """The share of the rest as it is held in the order of the device's current stream; for
        asking on any thread, later."""
        rest = self._rest
        if rest is None:
            return lambda: 0
        from .slices import queue_parts

        named = self._rest_held
        with on(device):
            share, others = queue_parts(named, rest, device)
            self._mark = Mark(device)
        if not others:
            return share
        # In host memory: it moves on with the next diff.
        self._mark.wait()
        sums = [
            region_sum(region, named[region.part.local], rest.manifest.tensors[region.tensor])
            for region in rest.regions
            if region.number in others and region.part.counted
        ]
        here = sum(int(one.item()) for one in sums)
        return lambda: share() + here

    def _diff_torch(self, tensors: Mapping[str, Tensor], base_version: int, version: int) -> Diffed:
        began = time.perf_counter()
        before = self.digest
        self._fused = None  # its sums know nothing of what follows
        sources = _sources(tensors, self.manifest)
        drafts: list[Draft] = []
        taken: list[Taking] = []
        sums: dict[torch.device, Tensor] = {}

        def count(amount: Tensor) -> None:
            here = sums.get(amount.device)
            sums[amount.device] = amount if here is None else here + amount

        scattered: list[int] = []
        for index, (held, source) in enumerate(zip(self._held, sources, strict=True)):
            pieces = []
            place = self._places[index]
            for change in scan(partial(_part, held), source, taken):
                pieces.append(change.piece)
                if place is not None:
                    count(self._digest_of(index, place, change))
            if pieces:
                itemsize = self.manifest.tensors[index].itemsize
                drafts.append(_draft(index, itemsize, source, pieces))
                if place is None:
                    scattered.append(index)
                    count(-self._share_of(index))
        found_at = time.perf_counter()
        patch = _assemble(
            drafts, self.manifest, self._hash, sources,
            base_version=base_version, version=version, device=_device(sources),
        )  # fmt: skip
        encoded_at = time.perf_counter()
        self._torn = True
        for taking in taken:
            taking.take()
        self._torn = False
        for index in scattered:
            count(self._share_of(index))
        after = (before + sum(int(value.item()) for value in sums.values())) & _MASK
        taken_at = time.perf_counter()
        diff_us = round((found_at - began + taken_at - encoded_at) * 1e6)
        encode_us = round((encoded_at - found_at) * 1e6)
        return Diffed(patch, lambda: _Facts(after, checksum_of(patch.buffer), diff_us, encode_us))

    def _digest_of(self, index: int, place: tuple[str, int], change: Change) -> Tensor:
        """What a change adds to the digest, where the tensor lies as one run from a place on."""
        piece, old_N = change.piece, change.old_N
        name, first = place
        start = first + piece.start
        if change.idx_N is None:
            return dense_sum(change.new_N, name, start) - dense_sum(old_N, name, start)
        base = first >> 16
        if index not in self._factors:
            held = self._held[index]
            blocks = blocks_of((first & 0xFFFF) + held.numel())
            self._factors[index] = block_factors(name, base, blocks, held.device)
        g_K = self._factors[index][
            (start >> 16) - base : ((start + piece.numel + 0xFFFF) >> 16) - base
        ]
        idx_N = change.idx_N + (start & 0xFFFF) if start & 0xFFFF else change.idx_N
        return sparse_sum(addends(change.new_N).sub_(addends(old_N)), idx_N, g_K)

    def _share_of(self, index: int) -> Tensor:
        """The digest's share of a tensor that lies here and there, as it is held now."""
        assert self._parts is not None
        spec, held = self.manifest.tensors[index], self._held[index]
        total = torch.zeros((), dtype=torch.int64, device=held.device)
        for region in self._parts.regions:
            if region.local == index and region.part.counted:
                whole = self._parts.manifest.tensors[region.tensor]
                total += region_sum(region, held.view(dtype_of(spec)).view(spec.shape), whole)
        return total

    def since(self, tensors: Mapping[str, Tensor], *, base_version: int, version: int) -> Patch:
        """The patch from `tensors`, of the published dtypes and on any device, to what is held.

        Whole on return in the order of the devices' current streams.
        """
        self._require_whole()
        self._mark.precede()
        patch = diff(tensors, self._named(), base_version=base_version, version=version)
        self._mark = Mark(self._mark.device)
        return patch

    def anchor(self, version: int, *, device: torch.device | None = None) -> Patch:
        """A full copy of the state that is held, as the anchor of `version`.

        On `device`; None: where the first of what is held lies.
        """
        if version < 0:
            raise ValueError(f"version {version} is negative")
        self._require_whole()
        with quiet():
            self._mark.precede()
            sources = [Source(name, held) for name, held in self._named().items()]
            device = _device(sources) if device is None else device
            drafts = [
                _dense_draft(index, spec.itemsize, source, device)
                for index, (spec, source) in enumerate(
                    zip(self.manifest.tensors, sources, strict=True)
                )
                if spec.numel
            ]
            patch = _assemble(
                drafts, self.manifest, self._hash, sources,
                base_version=ANCHOR, version=version, device=device,
            )  # fmt: skip
            self._mark = Mark(self._mark.device)
            return patch

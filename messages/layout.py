"""The layout of one rank: where the tensors that it holds lie in those that are published.

A rank of an engine holds parts: rows or columns of a published tensor under tensor parallelism,
several tensors fused into one, experts stacked into one. Patches and digests stay in the
coordinates of the published tensors; each rank takes what its layout names.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property

import msgspec

from .boxes import Box, first_meeting, first_miscount, gap_at
from .errors import ManifestMismatch
from .manifest import Manifest, TensorSpec

#: Stands in Part.axes for a dimension of extent 1 that runs along none of the local tensor.
NO_AXIS = -1


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A box of a published tensor, and the box of a local one that holds it, element for element.

    Element begin + d of the published tensor is element at + d' of the local one, for every d with
    0 ≤ d < shape, where d'[axes[k]] = d[k] and every other d' is 0. Where the box is one element
    thick, k may run along no dimension of the local tensor: axes[k] is NO_AXIS then.
    """

    #: The published tensor, with the first index and the extent of the box in each dimension of it.
    tensor: str
    begin: tuple[int, ...]
    shape: tuple[int, ...]
    #: The local tensor, with the first index of the box in each dimension of it.
    local: str
    at: tuple[int, ...]
    #: For each dimension of the published tensor, the one of the local tensor along which it runs.
    axes: tuple[int, ...]
    #: Whether its share of the digest is this rank's: of what several hold, one counts it.
    counted: bool = True

    def __post_init__(self) -> None:
        if not len(self.begin) == len(self.shape) == len(self.axes):
            raise ValueError(
                f"a part of tensor {self.tensor!r} has {len(self.begin)} first indices, "
                f"{len(self.shape)} extents and {len(self.axes)} axes"
            )
        if min((*self.begin, *self.shape, *self.at), default=0) < 0:
            raise ValueError(f"a part of tensor {self.tensor!r} has a negative index or extent")
        running = [
            axis
            for axis, size in zip(self.axes, self.shape, strict=True)
            if (axis, size) != (NO_AXIS, 1)
        ]
        if len(set(running)) < len(running) or not set(running) <= set(range(len(self.at))):
            raise ValueError(
                f"a part of tensor {self.tensor!r} has axes {list(self.axes)}, which are not "
                f"distinct dimensions of {self.local!r}, a tensor of {len(self.at)}"
            )

    @property
    def box(self) -> Box:
        """What it is of the published tensor."""
        return Box(self.begin, self.shape)

    @property
    def local_box(self) -> Box:
        """What it is of the local tensor."""
        extent = [1] * len(self.at)
        for axis, size in zip(self.axes, self.shape, strict=True):
            if axis != NO_AXIS:
                extent[axis] = size
        return Box(self.at, tuple(extent))


class Padding(msgspec.Struct, frozen=True, kw_only=True):
    """A box of a local tensor that holds nothing published: rows of a padded vocabulary, say."""

    local: str
    at: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.at) != len(self.shape):
            raise ValueError(
                f"padding of {self.local!r} has {len(self.at)} first indices "
                f"and {len(self.shape)} extents"
            )
        if min((*self.at, *self.shape), default=0) < 0:
            raise ValueError(f"padding of {self.local!r} has a negative index or extent")

    @property
    def local_box(self) -> Box:
        """What it is of the local tensor."""
        return Box(self.at, self.shape)


class Layout(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, dict=True):
    """The local tensors of one rank, and where each element of them comes from."""

    tensors: tuple[TensorSpec, ...]
    parts: tuple[Part, ...]
    padding: tuple[Padding, ...] = ()
    #: Whether elements that are in no part and no padding come from elsewhere: what is published
    #: comes from several sources, and this says what one of them gives (compose.through).
    partial: bool = False

    @cached_property
    def hash(self) -> str:
        """32 hex digits: the first 16 bytes of SHA-256 over its msgpack."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:32]

    @cached_property
    def local(self) -> Manifest:
        """The local tensors, as patches in their coordinates name them."""
        return Manifest(tensors=self.tensors)

    def __post_init__(self) -> None:
        Manifest(tensors=self.tensors)  # refuses names, dtypes and sizes that no tensors have

    def require_fit(self, manifest: Manifest) -> None:
        """ManifestMismatch unless the parts are of published tensors and fill the local ones.

        Parts lie within both tensors, which have one dtype, and with the padding they cover every
        local element once; in a partial layout, none twice. What the manifest has and this rank
        does not hold is no error: require_whole() asks it of all ranks together.
        """
        published = {spec.name: spec for spec in manifest.tensors}
        local = {spec.name: spec for spec in self.tensors}
        holders: defaultdict[str, list[Part | Padding]] = defaultdict(list)
        everything: tuple[Part | Padding, ...] = (*self.parts, *self.padding)
        for holder in everything:
            spec = local.get(holder.local)
            if spec is None:
                raise ManifestMismatch(f"{_named(holder)} lies in no local tensor of the layout")
            if isinstance(holder, Part):
                _require_published(holder, published, dtype=spec.dtype)
            if not holder.local_box.within(spec.shape):
                raise ManifestMismatch(
                    f"{_named(holder)} would be {holder.local_box} of local tensor {spec.name!r}, "
                    f"which has shape {list(spec.shape)}"
                )
            holders[spec.name].append(holder)
        for spec in self.tensors:
            held = holders[spec.name]
            boxes = [holder.local_box for holder in held]
            if self.partial:
                element = first_meeting(boxes)
            elif (wrong := first_miscount(spec.shape, boxes)) is None:
                element = None
            elif wrong.times == 0:
                gap = gap_at(wrong.element, spec.shape, boxes)
                raise ManifestMismatch(
                    f"{gap} of local tensor {spec.name!r} is in no part and in no padding"
                )
            else:
                element = wrong.element
            if element is not None:
                one, other = [h for h in held if h.local_box.holds(element)][:2]
                raise ManifestMismatch(
                    f"element {list(element)} of local tensor {spec.name!r} is in {_named(one)} "
                    f"and in {_named(other)}"
                )

    def is_identity(self, manifest: Manifest) -> bool:
        """Whether the local tensors are the published ones, whole and under their own names."""
        whole = identity(manifest)
        return (
            not self.padding
            and len(self.parts) == len(whole.parts)
            and set(self.tensors) == set(whole.tensors)
            and set(self.parts) == set(whole.parts)
        )


def box_part(
    tensor: str, begin: Sequence[int], shape: Sequence[int], local: str, *, counted: bool = True
) -> Part:
    """The part of a local tensor that is just this box of a published one, and lies as it does."""
    return Part(
        tensor=tensor,
        begin=tuple(begin),
        shape=tuple(shape),
        local=local,
        at=(0,) * len(shape),
        axes=tuple(range(len(shape))),
        counted=counted,
    )


def identity(manifest: Manifest) -> Layout:
    """The layout of a rank that holds what is published, as it is published."""
    parts = tuple(
        box_part(spec.name, (0,) * len(spec.shape), spec.shape, spec.name)
        for spec in manifest.tensors
    )
    return Layout(tensors=manifest.tensors, parts=parts)


def require_whole(layouts: Sequence[Layout], manifest: Manifest) -> None:
    """ManifestMismatch unless the ranks' counted parts cover every published element once.

    Then the digests of the ranks add up to that of the whole. `layouts` are those of all ranks of
    a group, in their order; each fits the manifest (Layout.require_fit).
    """
    published = {spec.name: spec for spec in manifest.tensors}
    holders: defaultdict[str, list[tuple[int, Part]]] = defaultdict(list)
    for rank, layout in enumerate(layouts):
        for part in layout.parts:
            if part.counted:
                _require_published(part, published)
                holders[part.tensor].append((rank, part))
    for spec in manifest.tensors:
        boxes = [part.box for _, part in holders[spec.name]]
        wrong = first_miscount(spec.shape, boxes)
        if wrong is None:
            continue
        if wrong.times == 0:
            gap = gap_at(wrong.element, spec.shape, boxes)
            raise ManifestMismatch(f"{gap} of tensor {spec.name!r} is counted by no rank")
        held = [h for h in holders[spec.name] if h[1].box.holds(wrong.element)]
        (one, first), (other, second) = held[:2]
        raise ManifestMismatch(
            f"element {list(wrong.element)} of tensor {spec.name!r} is counted by rank {one} "
            f"({first.box}) and by rank {other} ({second.box})"
        )


def _require_published(
    part: Part, published: Mapping[str, TensorSpec], *, dtype: str | None = None
) -> None:
    spec = published.get(part.tensor)
    if spec is None:
        raise ManifestMismatch(
            f"local tensor {part.local!r} is to hold tensor {part.tensor!r}, which is not published"
        )
    if not part.box.within(spec.shape):
        raise ManifestMismatch(
            f"local tensor {part.local!r} is to hold {part.box} of tensor {part.tensor!r}, "
            f"which has shape {list(spec.shape)}"
        )
    if dtype not in (None, spec.dtype):
        raise ManifestMismatch(
            f"tensor {part.tensor!r} has dtype {spec.dtype}, and {dtype} in local tensor "
            f"{part.local!r}"
        )


def _named(holder: Part | Padding) -> str:
    if isinstance(holder, Part):
        return f"{holder.box} of tensor {holder.tensor!r}"
    return f"padding, {holder.local_box} of {holder.local!r}"

"""The parts of one layout, worked out once: regions of published tensors, and who holds them.

N: elements of a patch that are looked at together.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ...messages.layout import NO_AXIS, Layout, Part
from ...messages.manifest import Manifest, TensorSpec
from .bits import indices

#: Layouts that are remembered: a process has one or two, and one for each rank of a trainer that
#: has several.
_KNOWN = 64


def strides_of(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor, in elements."""
    return [math.prod(shape[at + 1 :]) for at in range(len(shape))]


class Dim(NamedTuple):
    """A dimension of a region: the tensor's size, the region's first index and extent in it, and
    how far apart neighbours lie where it is held, in elements."""

    size: int
    begin: int
    extent: int
    stride: int


@dataclass(frozen=True, slots=True)
class Region:
    """A part that has elements.

    `number` is its place among the regions, `tensor` the published tensor's in the manifest,
    `local` the local one's in the layout. Of the published tensor's elements in C order it has
    some of low … high - 1: all of them if it is flat.
    """

    number: int
    part: Part
    tensor: int
    local: int
    low: int
    high: int
    #: How the published tensor is walked through to find an element's C-order index in the region.
    dims: tuple[Dim, ...]
    #: The same for its place in the contiguous local tensor, from `offset` on.
    held: tuple[Dim, ...]
    offset: int

    @property
    def flat(self) -> bool:
        """Whether it has all elements of low … high - 1."""
        return len(self.dims) == 1

    @property
    def slices(self) -> tuple[slice, ...]:
        """The region in its published tensor."""
        ends = zip(self.part.begin, self.part.shape, strict=True)
        return tuple(slice(begin, begin + extent) for begin, extent in ends)

    def of(self, local: Tensor) -> Tensor:
        """The region in its local tensor: a view, its dimensions in the published order."""
        steps = local.stride()
        offset = sum(at * step for at, step in zip(self.part.at, steps, strict=True))
        strides = _along(self.part, steps)
        return local.as_strided(self.part.shape, strides, local.storage_offset() + offset)

    def pieces(self, numel: int) -> Iterator[tuple[slice, ...]]:
        """The region in a few pieces of at most so many elements, each by its slices of it."""
        shape = self.part.shape
        #: The outermost dimension that is cut to ranges: within it all fits, around it one by one.
        cut = next(
            (at for at in range(len(shape)) if math.prod(shape[at + 1 :]) <= numel), len(shape)
        )
        around = [[slice(at, at + 1) for at in range(n)] for n in shape[:cut]]
        if cut < len(shape):
            step = numel // math.prod(shape[cut + 1 :])
            around.append(
                [slice(at, min(at + step, shape[cut])) for at in range(0, shape[cut], step)]
            )
        within = [slice(0, n) for n in shape[cut + 1 :]]
        for outer in product(*around):
            yield *outer, *within

    def find(self, idx_N: Tensor) -> tuple[Tensor | None, Tensor]:
        """Which of the elements idx_N (int64, all of low … high - 1) it has, and where in it.

        The first are places in idx_N (None: all of them), the second C-order indices in it.
        """
        if self.flat:
            return None, idx_N - self.low if self.low else idx_N
        found: Tensor | None = None
        at_N: Tensor | None = None
        rest_N = idx_N
        for size, begin, extent, stride in reversed(self.dims[1:]):
            outer_N = torch.div(rest_N, size, rounding_mode="trunc")
            here_N = (rest_N - outer_N * size).sub_(begin)
            # The innermost has stride 1: what is here is where it is.
            at_N = here_N if at_N is None else at_N.add_(here_N, alpha=stride)
            rest_N = outer_N
            if extent < size:
                kept = indices((here_N >= 0).logical_and_(here_N < extent))
                found = kept if found is None else found.index_select(0, kept)
                rest_N, at_N = rest_N.index_select(0, kept), at_N.index_select(0, kept)
        # Between low and high, so within the outermost dimension's extent.
        _, begin, _, stride = self.dims[0]
        assert at_N is not None
        return found, at_N.add_(rest_N - begin, alpha=stride)


@dataclass(frozen=True, slots=True)
class Run:
    """Regions of one published tensor that touch its blocks first_block … stop_block - 1.

    `whole`: it is one region, and that is the tensor.
    """

    first_block: int
    stop_block: int
    regions: tuple[Region, ...]
    whole: bool


class Parts:
    """The regions of one layout of the tensors that a manifest publishes.

    ManifestMismatch where it does not fit them.
    """

    def __init__(self, layout: Layout, manifest: Manifest) -> None:
        layout.require_fit(manifest)
        self.layout = layout
        self.manifest = manifest
        #: The local tensors.
        self.local = Manifest(tensors=layout.tensors)
        self.regions = tuple(_regions(layout, manifest))
        of: dict[int, list[Region]] = {}
        for region in self.regions:
            of.setdefault(region.tensor, []).append(region)
        #: By the place of a published tensor in the manifest.
        self.runs: Mapping[int, tuple[Run, ...]] = {
            at: tuple(_runs(regions, manifest.tensors[at].numel)) for at, regions in of.items()
        }

    def runs_of(self, tensor: int, numbers: Container[int] | None) -> Sequence[Run]:
        """The runs of a published tensor; of the regions with these numbers alone, unless None."""
        runs = self.runs.get(tensor, ())
        if numbers is None:
            return runs
        some = ([region for region in run.regions if region.number in numbers] for run in runs)
        return [
            replace(run, regions=tuple(regions))
            for run, regions in zip(runs, some, strict=True)
            if regions
        ]

    @cached_property
    def held_by(self) -> Mapping[int, frozenset[int]]:
        """The local tensors that hold some of each published one, all by their places."""
        return {
            at: frozenset(region.local for run in runs for region in run.regions)
            for at, runs in self.runs.items()
        }

    def names(self, published: Sequence[int]) -> list[str]:
        """The local tensors that hold some of these published ones, in the layout's order."""
        none: frozenset[int] = frozenset()
        held = none.union(*(self.held_by.get(at, none) for at in published))
        return [self.local.tensors[at].name for at in sorted(held)]


def parts_of(layout: Layout, manifest: Manifest) -> Parts:
    """The parts of a layout, remembered; ManifestMismatch where it does not fit the manifest."""
    key = id(layout), manifest.hash
    found = _parts.get(key)
    # Held by what is remembered, so that no other layout can come to have its id.
    if found is None or found.layout is not layout:
        found = Parts(layout, manifest)
        if len(_parts) >= _KNOWN:
            _parts.pop(next(iter(_parts)))
        _parts[key] = found
    return found


_parts: dict[tuple[int, str], Parts] = {}


# ---- regions


def _regions(layout: Layout, manifest: Manifest) -> Iterator[Region]:
    published = {spec.name: (at, spec) for at, spec in enumerate(manifest.tensors)}
    local = {spec.name: (at, spec) for at, spec in enumerate(layout.tensors)}
    number = 0
    for part in layout.parts:
        tensor, whole = published[part.tensor]
        place, holder = local[part.local]
        if not math.prod(part.shape):
            continue
        steps = strides_of(whole.shape)
        low = sum(begin * step for begin, step in zip(part.begin, steps, strict=True))
        high = low + 1 + sum((n - 1) * step for n, step in zip(part.shape, steps, strict=True))
        local_steps = strides_of(holder.shape)
        offset = sum(at * step for at, step in zip(part.at, local_steps, strict=True))
        dims = _dims(part, whole, strides_of(part.shape))
        held = _dims(part, whole, _along(part, local_steps))
        yield Region(number, part, tensor, place, low, high, dims, held, offset)
        number += 1


def _along(part: Part, steps: Sequence[int]) -> list[int]:
    """The steps in the local tensor, in elements, along each dimension of the published one."""
    return [0 if axis == NO_AXIS else steps[axis] for axis in part.axes]


def _dims(part: Part, whole: TensorSpec, strides: Sequence[int]) -> tuple[Dim, ...]:
    """The fewest dimensions by which the region is found, the outermost first: at least one."""
    found = [Dim(1, 0, 1, 0)]
    for dim in map(Dim, whole.shape, part.begin, part.shape, strides):
        if dim.size == 1:
            continue
        outer = found[-1]
        follows = dim.extent == dim.size and outer.stride == dim.extent * dim.stride
        # Of one index alone, or of whole rows that lie one behind the other where they are held.
        if outer.extent == 1 or follows:
            begin = outer.begin * dim.size + dim.begin
            extent = outer.extent * dim.extent
            found[-1] = Dim(outer.size * dim.size, begin, extent, dim.stride)
        else:
            found.append(dim)
    return tuple(found)


def _runs(regions: Sequence[Region], numel: int) -> Iterator[Run]:
    """Regions of one published tensor by the blocks that they lie in; no two runs share a block."""
    together: list[Region] = []
    stop_block = 0

    def run() -> Run:
        whole = len(regions) == 1 and regions[0].flat and regions[0].high - regions[0].low == numel
        return Run(together[0].low >> 16, stop_block, tuple(together), whole)

    for region in sorted(regions, key=lambda region: region.low):
        if together and region.low >> 16 >= stop_block:
            yield run()
            together, stop_block = [], 0
        together.append(region)
        stop_block = max(stop_block, ((region.high - 1) >> 16) + 1)
    if together:
        yield run()

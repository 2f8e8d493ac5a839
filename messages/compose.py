"""Layouts of several ranks together: what they make up, who publishes it, and what goes where.

A trainer of several ranks publishes from each what that holds: patches in the coordinates of its
own tensors. A worker takes such a patch by a layout of those, through() of the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from .boxes import Box, meetings
from .errors import ManifestMismatch
from .layout import NO_AXIS, Layout, Part, require_whole
from .manifest import Manifest, TensorSpec


def through(source: Layout, target: Layout) -> Layout:
    """Where what `source`'s local tensors hold lies in those of `target`: a layout of source.local.

    Both are of the same published tensors (Layout.require_fit). Its tensors are the target's; for
    each part of the one and each of the other that have elements in common it has a part, counted
    as the target's is. It is partial: what else the target has comes from other sources.
    """
    giving: defaultdict[str, list[Part]] = defaultdict(list)
    for part in source.parts:
        giving[part.tensor].append(part)
    taking: defaultdict[str, list[Part]] = defaultdict(list)
    for part in target.parts:
        if part.tensor in giving:
            taking[part.tensor].append(part)
    parts = []
    for tensor, givers in giving.items():
        both = [*givers, *taking[tensor]]
        met = sorted(meetings([part.box for part in both]))
        parts += [
            _joined(both[one], both[other])
            for one, other in met
            if one < len(givers) <= other  # two of one side may meet: the target holds it twice
        ]
    return Layout(tensors=target.tensors, parts=tuple(parts), partial=True)


def _joined(source: Part, target: Part) -> Part:
    """The elements that two parts of one published tensor share, from the one to the other."""
    shared = source.box.shared(target.box)
    ahead = [s - t for s, t in zip(shared.begin, source.begin, strict=True)]
    # What the source fixes is one element thick: it runs along no dimension of the target.
    begin, shape, axes = list(source.at), [1] * len(source.at), [NO_AXIS] * len(source.at)
    for d, axis in enumerate(source.axes):
        if axis != NO_AXIS:
            begin[axis] += ahead[d]
            shape[axis] = shared.shape[d]
            axes[axis] = target.axes[d]
    at = list(target.at)
    for d, axis in enumerate(target.axes):
        if axis != NO_AXIS:
            at[axis] += shared.begin[d] - target.begin[d]
    return Part(
        tensor=source.local,
        begin=tuple(begin),
        shape=tuple(shape),
        local=target.local,
        at=tuple(at),
        axes=tuple(axes),
        counted=target.counted,
    )


def published_by(layouts: Sequence[Layout]) -> Manifest:
    """The tensors that the parts of all ranks make up, in order of first appearance.

    Each has the dtype of the local tensors that hold it and reaches to the end of its furthest box.
    ManifestMismatch where those that hold it have several dtypes, or parts of it several numbers of
    dimensions, or where a part lies in no local tensor.
    """
    found: dict[str, TensorSpec] = {}
    for rank, layout in enumerate(layouts):
        local = {spec.name: spec for spec in layout.tensors}
        for part in layout.parts:
            holder = local.get(part.local)
            if holder is None:
                raise ManifestMismatch(
                    f"{part.box} of tensor {part.tensor!r} lies in no local tensor of rank {rank}"
                )
            end = part.box.end
            known = found.get(part.tensor, TensorSpec(part.tensor, holder.dtype, end))
            if known.dtype != holder.dtype:
                raise ManifestMismatch(
                    f"tensor {part.tensor!r} has dtype {known.dtype}, and {holder.dtype} in local "
                    f"tensor {part.local!r} of rank {rank}"
                )
            if len(known.shape) != len(end):
                raise ManifestMismatch(
                    f"tensor {part.tensor!r} has {len(known.shape)} dimensions, and {len(end)} in "
                    f"a part of rank {rank}"
                )
            shape = tuple(map(max, known.shape, end))
            found[part.tensor] = TensorSpec(part.tensor, known.dtype, shape)
    return Manifest(tensors=tuple(found.values()))


def shared_out(layouts: Sequence[Layout]) -> list[Layout]:
    """What each rank is to publish, so that all together publish everything once.

    Of local tensors that hold the same boxes one is published, whole: by the rank that has the
    fewest bytes to publish so far, so that copies share the work; of equals by the first. What few
    ranks hold is given out before what many do, the largest tensors first. Local tensors that hold
    nothing are left out; all parts of the rest count. ManifestMismatch where what is published has
    padding, or where ranks hold boxes that overlap without being the same, or leave elements out:
    nobody would publish them once.
    """
    holders: defaultdict[frozenset[tuple[str, Box]], dict[int, TensorSpec]] = defaultdict(dict)
    by_local = [_parts_by_local(layout) for layout in layouts]
    for rank, layout in enumerate(layouts):
        for spec in layout.tensors:
            boxes = frozenset((part.tensor, part.box) for part in by_local[rank].get(spec.name, ()))
            if boxes:
                holders[boxes].setdefault(rank, spec)
    nbytes = [0] * len(layouts)
    chosen: list[set[str]] = [set() for _ in layouts]
    # What few hold first: what many do then goes to those that are behind. Equals keep their order.
    for held in sorted(holders.values(), key=lambda held: (len(held), -_nbytes(held))):
        rank = min(held, key=lambda rank: (nbytes[rank], rank))
        nbytes[rank] += held[rank].nbytes
        chosen[rank].add(held[rank].name)
    result = [
        _published(rank, layout, parts, names)
        for rank, (layout, parts, names) in enumerate(zip(layouts, by_local, chosen, strict=True))
    ]
    manifest = published_by(layouts)
    for layout in result:
        layout.require_fit(manifest)
    require_whole(result, manifest)
    return result


def _parts_by_local(layout: Layout) -> Mapping[str, Sequence[Part]]:
    """The parts that have elements, by the local tensor that they lie in."""
    found: defaultdict[str, list[Part]] = defaultdict(list)
    for part in layout.parts:
        if 0 not in part.shape:
            found[part.local].append(part)
    return found


def _nbytes(held: Mapping[int, TensorSpec]) -> int:
    return max(spec.nbytes for spec in held.values())


def _published(
    rank: int, layout: Layout, parts: Mapping[str, Iterable[Part]], names: set[str]
) -> Layout:
    """Of the layout of a rank the local tensors of these names, every part counted."""
    for padding in layout.padding:
        if padding.local in names and 0 not in padding.shape:
            raise ManifestMismatch(
                f"rank {rank} is to publish local tensor {padding.local!r}, which has padding "
                f"({padding.local_box}): there is nothing to publish in it"
            )
    return Layout(
        tensors=tuple(spec for spec in layout.tensors if spec.name in names),
        parts=tuple(
            msgspec.structs.replace(part, counted=True)
            for spec in layout.tensors
            if spec.name in names
            for part in parts[spec.name]
        ),
    )

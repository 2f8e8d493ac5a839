"""What a rank pays for its share of an update: apply and digest by layout, diff and routing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from report import table_of
from sparsecast import Layout, digest
from sparsecast.messages.layout import box_part, identity
from sparsecast.messages.manifest import Manifest, TensorSpec
from sparsecast.pipeline.delta import Checked, Lookup, Shadow, apply_checked
from sparsecast.pipeline.delta.routing import restrict

#: The shares that are measured. A tensor of one dimension has a quarter of it in both quarters.
NAMES = {
    "whole": "the whole model, without a layout",
    "by_layout": "the whole model, by a layout",
    "half": "half of the rows of every tensor",
    "rows": "a quarter of the rows",
    "columns": "a quarter of the columns",
}

WORKS = ("apply", "digest", "diff", "restrict")


def measure(
    timed: Callable[..., dict[str, Any]],
    checked: Checked,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
) -> dict[str, Any]:
    """By the name of a share: the bytes that it is, how `timed` found its works, and whether a
    patch from `old` to `new` left in it what it should.

    Apply and digest are a worker rank's; diff is that of a trainer's rank which holds this share,
    its share of the whole digest included; restrict is what a root of a trainer of one rank does to
    send a worker's rank its share alone. The last two are not measured of the whole.
    """
    manifest = checked.manifest
    whole = identity(manifest)
    layouts = {
        "whole": whole,
        "by_layout": whole,
        "half": _part(manifest, 0, 2),
        "rows": _part(manifest, 0, 4),
        "columns": _part(manifest, 1, 4),
    }
    found = {}
    for name, layout in layouts.items():
        held = {
            local: box.clone(memory_format=torch.contiguous_format)
            for local, box in _boxes(old, layout).items()
        }
        works = _works(checked, Lookup(held), None if name == "whole" else layout)
        found[name] = {work: timed(function) for work, function in works.items()}
        if layout is not whole:
            found[name]["restrict"] = timed(
                lambda layout=layout: restrict(checked.patch, layout, manifest)
            )
            found[name]["diff"] = _diff(timed, manifest, layout, old, new)
        found[name]["nbytes"] = sum(tensor.nbytes for tensor in held.values())
        found[name]["exact"] = all(
            torch.equal(held[local].view(torch.int16), box.view(torch.int16))
            for local, box in _boxes(new, layout).items()
        )
    return found


def _diff(
    timed: Callable[..., dict[str, Any]],
    manifest: Manifest,
    layout: Layout,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
) -> dict[str, Any]:
    """The diff of a share that goes back and forth between two states."""
    ways = itertools.cycle((_boxes(new, layout), _boxes(old, layout)))
    live = Lookup(
        {
            local: box.clone(memory_format=torch.contiguous_format)
            for local, box in _boxes(old, layout).items()
        }
    )
    shadow = Shadow(live.tensors(), layout=layout, published=manifest)
    versions = itertools.count()

    def step() -> None:
        for local, box in next(ways).items():
            live.tensors()[local].copy_(box)

    def diff() -> None:
        version = next(versions)
        shadow.diff(live.tensors(), base_version=version, version=version + 1)

    return timed(diff, step)


def _works(
    checked: Checked, held: Lookup, layout: Layout | None
) -> dict[str, Callable[[], object]]:
    manifest = checked.manifest
    return {
        "apply": lambda: apply_checked(checked, held.tensors(), layout=layout),
        "digest": lambda: digest(held.tensors(), manifest=manifest, layout=layout),
    }


def _boxes(whole: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The local tensors as views of the published ones: each is one box of one of them."""
    return {
        part.local: whole[part.tensor][
            tuple(slice(b, b + n) for b, n in zip(part.begin, part.shape, strict=True))
        ]
        for part in layout.parts
    }


def _part(manifest: Manifest, dim: int, of: int) -> Layout:
    """The second of so many parts of every tensor along a dimension, or along its last one."""
    parts = []
    for spec in manifest.tensors:
        begin, shape = [0] * len(spec.shape), list(spec.shape)
        along = min(dim, len(shape) - 1)
        begin[along] = shape[along] // of
        shape[along] //= of
        parts.append(box_part(spec.name, begin, shape, spec.name))
    tensors = (
        TensorSpec(spec.name, spec.dtype, part.shape)
        for spec, part in zip(manifest.tensors, parts, strict=True)
    )
    return Layout(tensors=tuple(tensors), parts=tuple(parts))


def table(ranks: dict[str, Any]) -> Table:
    """For a person: p50 by the device's clock, and what it is of the whole model's."""
    columns = ("bytes", *(cell for work in WORKS for cell in (work, "× whole")))
    found = table_of(
        f"a rank's share, {ranks['density']:.3%} changed, ms", "what it holds", *columns
    )
    shares = ranks["shares"]
    for name, share in shares.items():
        cells = []
        for work in WORKS:
            ms, whole = (
                one[work]["device_ms"]["p50"] if work in one else None
                for one in (share, shares["whole"])
            )
            cells.append("" if ms is None else f"{ms:.3f}")
            cells.append("" if ms is None or whole is None else f"{ms / whole:.2f}")
        found.add_row(NAMES[name], f"{share['nbytes']:,}", *cells)
    return found

"""Draws what bench/round.py has measured: our stages beside the methods of others.

    python bench/picture.py bench/results/<7b>.json bench/results/<0.5b>.json -o docs/round.svg

Needs the extra `bench` (matplotlib). The same documents give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import TITLES

OURS = "sparsecast"
#: Methods in the order of the bars; others follow them. Of those in one pair of brackets, which do
#: the same in different sizes, the better one is drawn.
ORDER: tuple[tuple[str, ...], ...] = (
    (OURS,),
    ("buckets_256m", "buckets_1g"),
    ("dense",),
    ("dense_safe",),
    ("peers",),
    ("pairs",),
    ("nan_filled",),
)
#: Segments: name, colour (Okabe and Ito's: told apart by the colour-blind), what they sum up.
SEGMENTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "find and encode",
        "#56B4E9",
        ("stage_diff", "stage_encode", "stage_seal", "diff", "encode", "checksum"),
    ),
    ("agree on the bus", "#F0E442", ("stage_announce", "stage_ready")),
    ("broadcast, check", "#E69F00", ("stage_broadcast", "broadcast")),
    ("apply", "#009E73", ("stage_apply", "apply")),
    ("broadcast and apply, as one", "#CC79A7", ("wire_apply",)),
)
REST = ("not told apart", "#999999")
#: Words and axes; browsers that prefer dark pages get the other one.
INK, INK_DARK = "#1f2328", "#e6edf3"
#: On the coloured segments, in either mode.
ON_COLOUR = "#000001"


@dataclass(frozen=True, slots=True)
class Bar:
    """One method: its segments (name to ms, in order) and its whole, ms at p50."""

    title: str
    segments: dict[str, float]
    whole: float


@dataclass(frozen=True, slots=True)
class Panel:
    """One model at one density."""

    title: str
    bars: tuple[Bar, ...]


def panel(document: Mapping[str, Any], density: float) -> Panel:
    """The panel of a document of bench/round.py; ValueError if it has no such density.

    Read are `model`, `settings.workers` and `densities[]`: `density`, `dense_nbytes` and
    `methods{name: {"ms": {part: {"p50"}}}}` with the part `whole` and any of those in SEGMENTS.
    """
    for section in document["densities"]:
        if abs(section["density"] - density) < 1e-9:
            break
    else:
        known = ", ".join(f"{s['density']:g}" for s in document["densities"])
        raise ValueError(f"nothing was measured at a density of {density:g}, only at {known}")
    methods = section["methods"]
    groups = [[name for name in group if name in methods] for group in ORDER]
    names = [min(g, key=lambda name: methods[name]["ms"]["whole"]["p50"]) for g in groups if g]
    names += sorted(methods.keys() - {name for group in ORDER for name in group})
    bars = tuple(_bar(TITLES.get(name, name), methods[name]["ms"]) for name in names)
    model = document["model"].split(",")[0].split(":")[0]
    nbytes, workers = section["dense_nbytes"], document["settings"]["workers"]
    return Panel(
        f"{model}, {nbytes / 1e9:.3g} GB of weights, {100 * density:g} % of the elements changed, "
        f"{workers} worker{'s' if workers > 1 else ''}",
        bars,
    )


def _bar(title: str, ms: Mapping[str, Mapping[str, float]]) -> Bar:
    whole = ms["whole"]["p50"]
    apart = {name: sum(ms[p]["p50"] for p in parts if p in ms) for name, _, parts in SEGMENTS}
    if apart["broadcast, check"] or apart["apply"]:
        # These are the two halves of the joint figure: it would count them twice.
        apart[SEGMENTS[-1][0]] = 0.0
    segments = {name: value for name, value in apart.items() if value > 0}
    rest = whole - sum(segments.values())
    if rest > 0.01 * whole:
        segments[REST[0]] = rest
    elif rest < 0:
        # Medians of parts do not add up to the median of the whole: the bar is as long as that.
        segments = {name: v * whole / (whole - rest) for name, v in segments.items()}
    return Bar(title, segments, whole)


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the picture as SVG: words stay words, and the same panels give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    colours = {name: colour for name, colour, _ in SEGMENTS} | {REST[0]: REST[1]}
    settings: Any = {
        "svg.hashsalt": "sparsecast",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8,
        **{key: INK for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")},
        "axes.edgecolor": INK,
    }
    with matplotlib.rc_context(settings):
        heights = [len(one.bars) for one in panels]
        figure, axes = pyplot.subplots(
            len(panels),
            1,
            figsize=(8.0, 0.9 + sum(0.36 * height + 0.55 for height in heights)),
            gridspec_kw={"height_ratios": heights},
            squeeze=False,
            layout="constrained",
        )
        for axis, one in zip(axes[:, 0], panels, strict=True):
            _draw_panel(axis, one, colours)
        seen = [n for n in colours if any(n in bar.segments for one in panels for bar in one.bars)]
        figure.legend(
            [Patch(color=colours[name]) for name in seen],
            seen,
            loc="outside lower center",
            ncols=min(len(seen), 4),
            frameon=False,
            fontsize=7.5,
        )
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    path.write_text(_for_dark_pages(path.read_text("utf-8")), "utf-8")


def _draw_panel(axis: Any, one: Panel, colours: Mapping[str, str]) -> None:
    longest = max(bar.whole for bar in one.bars)
    best = one.bars[0].whole
    for row, bar in enumerate(one.bars):
        left = 0.0
        for name, value in bar.segments.items():
            axis.barh(row, value, left=left, height=0.68, color=colours[name], linewidth=0)
            if value > 0.055 * longest:
                axis.text(
                    left + value / 2, row, _ms(value), ha="center", va="center",
                    color=ON_COLOUR, fontsize=7,
                )  # fmt: skip
            left += value
        times = "" if row == 0 else f"  ({bar.whole / best:.1f} ×)"
        axis.text(
            bar.whole + 0.01 * longest, row, f"{_ms(bar.whole)} ms{times}", va="center",
            fontweight="bold" if row == 0 else "normal",
        )  # fmt: skip
    axis.set_yticks(range(len(one.bars)), [bar.title for bar in one.bars])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * longest)
    axis.set_title(one.title, loc="left", fontsize=9, fontweight="bold")
    axis.set_xlabel("ms, from publish() to applied on every worker: medians", fontsize=7.5)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _for_dark_pages(svg: str) -> str:
    style = (
        "<style>@media (prefers-color-scheme: dark) {"
        f' [style*="fill: {INK}"] {{ fill: {INK_DARK} !important; }}'
        f' [style*="stroke: {INK}"] {{ stroke: {INK_DARK} !important; }}'
        " }</style>"
    )
    head, tag, rest = svg.partition("<defs>")
    # matplotlib ends some lines in a blank.
    whole = f"{head}{style}\n {tag}{rest}"
    return "\n".join(line.rstrip() for line in whole.split("\n"))


def main() -> int:
    """Draw; 2 if a document has not what is to be drawn."""
    parser = argparse.ArgumentParser(prog="bench/picture.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "documents", type=Path, nargs="+", help="JSON of bench/round.py, one a panel"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the SVG to write")
    parser.add_argument("--density", type=float, default=0.01, help="share that changed (0.01)")
    arguments = parser.parse_args()
    panels = []
    for path in arguments.documents:
        try:
            panels.append(panel(json.loads(path.read_text("utf-8")), arguments.density))
        except (OSError, ValueError, KeyError) as exc:
            what = f"lacks {exc}" if isinstance(exc, KeyError) else str(exc)
            print(f"bench/picture.py: {path}: {what}", file=sys.stderr)
            return 2
    try:
        draw(panels, arguments.output)
    except ModuleNotFoundError as exc:
        print(f"bench/picture.py: {exc}: install the extra `bench`", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

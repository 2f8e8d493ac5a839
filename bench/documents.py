"""What every document of the benches begins with, and how its tables look."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import stats


def head(program: str, arguments: Sequence[str], device: str) -> dict[str, Any]:
    """Command, date, machine, versions and load of a run of bench/`program`.py."""
    cuda = device == "cuda"
    return {
        "command": stats.command(arguments, program),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": stats.machine() | (stats.gpus() if cuda else {}),
        "versions": stats.versions(cuda=cuda),
        "load": round(os.getloadavg()[0], 2),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """stats.spread with p99 and p999; of no values, n alone."""
    if not values:
        return {"n": 0}
    return stats.spread(values) | {
        "p99": round(stats.percentile(values, 0.99), 3),
        "p999": round(stats.percentile(values, 0.999), 3),
    }


def target(what: str, value: float | None, bound: float) -> dict[str, Any]:
    """Something measured that is to be at most `bound`; None: it never came."""
    met = value is not None and value <= bound
    return {"what": what, "value": value, "bound": f"≤ {bound:.4g}", "met": met}


def where(document: dict[str, Any]) -> str:
    """The machine that a document is of, in a few words."""
    machine = document["machine"]
    place = ", ".join(machine.get("gpus", [f"{machine['cpu']}, {machine['cores']} cores"]))
    versions = document["versions"]
    return (
        f"{place}; torch {versions['torch']}, nats-server {versions['nats-server']}; "
        f"load {document['load']}"
    )


def verdict(equal: bool, right: str, wrong: str) -> Text:
    """Whether the bits are right, so that nobody reads past it."""
    return Text(right, "green") if equal else Text(wrong, "bold red")


def console() -> Console:
    """Wide enough for the tables where the output is a file."""
    found = Console()
    return found if found.is_terminal else Console(width=130)


def table(title: str, *columns: str) -> Table:
    """A plain table; the first column is words, the others figures."""
    found = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        found.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return found


def targets_table(found: Sequence[dict[str, Any]]) -> Table:
    """What was aimed at."""
    rows = table("targets", "what", "bound", "measured", "")
    for one in found:
        met = Text("met", "green") if one["met"] else Text("missed", "bold red")
        value = "never" if one["value"] is None else f"{one['value']:.4g}"
        rows.add_row(one["what"], one["bound"], value, met)
    return rows


def figure(found: dict[str, float], key: str) -> str:
    """A figure of a spread, or a dash where nothing was measured."""
    return f"{found[key]:.2f}" if key in found else "–"

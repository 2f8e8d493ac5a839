"""How long a late joiner takes to be current, by size and versions behind, beside a dense transfer.

    python bench/joining.py
    python bench/joining.py --sizes 64000000 --behind 1,10,100 --json bench/results/….json

bench/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

import command
import documents
import words
from control import Ranks
from joining_ranks import DENSE, Config

PARTS = ("connected", "current", "proven")
TITLES = {"dense": "dense by gloo", "dense_safe": "dense, staged, checksummed"}


def main() -> int:
    """Measure, print, and write the document; 1 if the joiner's bits are not the trainer's."""
    return command.run("joining", _parse(sys.argv[1:]), measure, show, _equal)


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the two processes; the document."""
    head = documents.head("joining", sys.argv[1:], "cpu")
    settings = {key: getattr(arguments, key) for key in Config.__dataclass_fields__}
    with console.status("starting") as status:
        ranks = Ranks(
            Path(__file__).with_name("joining_ranks.py"),
            2,
            Config(**settings),
            on_progress=lambda what: status.update(str(what)),
        )
        with ranks:
            measured = ranks.run(arguments.timeout)[0]
    return head | {"settings": settings, "sizes": [summarise(one) for one in measured]}


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """One size: times in ms, and how long a joiner took beside each dense transfer."""
    dense = {name: documents.spread(took) for name, took in measured["dense"].items()}
    joins = []
    for one in measured["joins"]:
        rounds = one.pop("rounds")
        ms = {part: documents.spread([found[part] for found in rounds]) for part in PARTS}
        ratios = {
            f"to_{name}": round(ms["current"]["p50"] / found["p50"], 3)
            for name, found in dense.items()
        }
        # Of each the same, unless a log that is read twice shows up here.
        read = {key: max(found[key] for found in rounds) for key in ("entries", "nbytes")}
        joins.append(one | read | {"ms": ms} | ratios)
    return measured | {"dense": dense, "joins": joins}


def show(document: dict[str, Any], console: Console) -> None:
    """Print the document for a person."""
    settings = document["settings"]
    console.print(
        f"{document['command']}\n{documents.where(document)}; {settings['repeats']} times each; "
        f"{settings['density']:.3%} changed a version"
    )
    keys = ("p50", "p90", "max")
    for size in document["sizes"]:
        console.print(Text(size["model"], "bold"))
        table = documents.table(
            "until current, ms",
            "joiner",
            *keys,
            *("connected", "proven", "entries", "MB", "× dense", "× staged"),
        )
        for name in DENSE:
            took = (documents.figure(size["dense"][name], key) for key in keys)
            table.add_row(TITLES[name], *took, "", "", "", _mb(size["dense_nbytes"]), "", "")
        for join in size["joins"]:
            ms = join["ms"]
            table.add_row(
                _who(join),
                *(documents.figure(ms["current"], key) for key in keys),
                *(documents.figure(ms[part], "p50") for part in ("connected", "proven")),
                str(join["entries"]),
                _mb(join["nbytes"]),
                *(f"{join[f'to_{name}']:.2f}" for name in DENSE),
            )
        console.print(table)
    console.print(
        documents.verdict(
            _equal(document),
            "the joiner held the trainer's bits each time",
            "THE JOINER HELD OTHER BITS",
        )
    )


def _who(join: dict[str, Any]) -> str:
    holds, head = join["holds"], join["head"]
    if holds is None:
        return "with nothing: an anchor"
    if holds == head:
        return "with the newest version"
    return f"{head - holds} behind" + (f", back with version {holds}" if holds else "")


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.2f}"


def _equal(document: dict[str, Any]) -> bool:
    return all(size["digests_equal"] for size in document["sizes"])


def _parse(given: list[str]) -> argparse.Namespace:
    parser = command.parser("joining", __doc__, timeout_s=600)
    add = parser.add_argument
    add(
        "--sizes",
        type=words.rising,
        default=(1_000_000, 16_000_000, 64_000_000),
        help="weights, in turn (1, 16 and 64 M)",
    )
    add("--behind", type=words.rising, default=(1, 8, 64), help="versions behind, in turn (1,8,64)")
    add("--repeats", type=words.count, default=5, help="of each (5)")
    add("--density", type=words.share, default=0.01, help="share that changes a version (0.01)")
    return command.parse(parser, given)


if __name__ == "__main__":
    sys.exit(main())

"""What the log costs a round: the same rounds with it, and with one that stores nothing.

    python bench/storing.py
    python bench/storing.py --workers 1 --elements 64000000 --json bench/results/….json

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
import stats
import words
from control import Ranks
from shapes import Cut
from storing_ranks import KINDS, Config

#: What the log may cost of a round.
BOUND = 1.05
TITLES = {"log": "the log on JetStream", "nothing": "a log that stores nothing"}


def main() -> int:
    """Measure, print, and write the document; 1 if a worker's bits are not the trainer's."""
    return command.run(
        "storing", _parse(sys.argv[1:]), measure, show, lambda document: document["digests_equal"]
    )


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the processes; the document."""
    head = documents.head("storing", sys.argv[1:], "cpu")
    cut = Cut.of_elements(arguments.elements)
    settings = {
        key: getattr(arguments, key)
        for key in ("workers", "blocks", "rounds", "intervals_s", "density", "threads", "seed")
    }
    with console.status("starting") as status:
        ranks = Ranks(
            Path(__file__).with_name("storing_ranks.py"),
            arguments.workers + 1,
            Config(cut=cut, **settings),
            on_progress=lambda what: status.update(str(what)),
        )
        with ranks:
            result = ranks.run(arguments.timeout)[0]
    document = head | {
        "model": cut.describe(),
        "settings": settings,
        "window": result["window"],
        "nbytes": result["nbytes"],
        "paces": [summarise(**pace) for pace in result["paces"]],
        "digests_equal": result["digests_equal"],
    }
    document["targets"] = targets(document)
    return document


def summarise(interval_s: float, blocks: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """One pace: the rounds of each kind in ms, and with the log to without, in all and by pairs."""
    found: dict[str, Any] = {"interval_s": interval_s}
    for kind in KINDS:
        of_kind = [block[kind] for block in blocks]
        found[kind] = {
            "round_ms": documents.spread([ms for one in of_kind for ms in one["round_ms"]]),
            "cpu_ms": documents.spread([one["cpu_ms"] for one in of_kind]),
            "broker_cpu_ms": documents.spread([one["broker_cpu_ms"] for one in of_kind]),
            "astray": sum(one["astray"] for one in of_kind),
        }
    pairs = [
        stats.percentile(block["log"]["round_ms"], 0.5)
        / stats.percentile(block["nothing"]["round_ms"], 0.5)
        for block in blocks
    ]
    p50s = [found[kind]["round_ms"]["p50"] for kind in ("log", "nothing")]
    return found | {"ratio": round(p50s[0] / p50s[1], 3), "pairs": documents.spread(pairs)}


def targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The median round with the log to the one without, at each pace."""
    return [
        documents.target(f"a round with the log, {_pace(one)}: × without", one["ratio"], BOUND)
        for one in document["paces"]
    ]


def show(document: dict[str, Any], console: Console) -> None:
    """Print the document for a person."""
    settings = document["settings"]
    console.print(
        Text.assemble(
            f"{document['command']}\n",
            (f"{document['model']}\n", "bold"),
            f"{documents.where(document)}; window {document['window']}, {settings['workers']} "
            f"worker(s); {settings['density']:.3%} changed ({document['nbytes']:,} bytes)",
        )
    )
    for pace in document["paces"]:
        table = documents.table(
            f"{_pace(pace)}: publish to applied everywhere, ms",
            "",
            *("p50", "p10", "p90", "max", "rounds", "trainer's CPU a round", "broker's", "astray"),
        )
        for kind in KINDS:
            found = pace[kind]
            table.add_row(
                TITLES[kind],
                *(documents.figure(found["round_ms"], key) for key in ("p50", "p10", "p90", "max")),
                str(found["round_ms"]["n"]),
                documents.figure(found["cpu_ms"], "p50"),
                documents.figure(found["broker_cpu_ms"], "p50"),
                str(found["astray"]),
            )
        console.print(table)
        pairs = pace["pairs"]
        console.print(
            f"with the log to without: {pace['ratio']:.3f}; of pairs of blocks "
            f"{pairs['p50']:.3f} at p50, p10–p90 {pairs['p10']:.3f}–{pairs['p90']:.3f}"
        )
    console.print(documents.targets_table(document["targets"]))
    console.print(
        documents.verdict(
            document["digests_equal"],
            "every worker holds the trainer's bits of both",
            "A WORKER HOLDS OTHER BITS",
        )
    )


def _pace(found: dict[str, Any]) -> str:
    interval_s = found["interval_s"]
    return f"every {interval_s:g} s" if interval_s else "one after the other"


def _parse(given: list[str]) -> argparse.Namespace:
    parser = command.parser("storing", __doc__, timeout_s=600)
    add = parser.add_argument
    add("--workers", type=words.count, default=2, help="worker processes (2)")
    add("--blocks", type=words.count, default=12, help="of each kind, at each pace (12)")
    add("--rounds", type=words.count, default=15, help="a block (15)")
    add("--intervals-s", type=_intervals, default=(0.1, 0.0), help="of rounds; 0: at once (0.1,0)")
    add("--elements", type=words.count, default=16_000_000, help="weights (16 M)")
    add("--density", type=words.share, default=0.01, help="share that changes (0.01)")
    return command.parse(parser, given)


def _intervals(text: str) -> tuple[float, ...]:
    found = tuple(float(word) for word in text.split(","))
    if not all(0 <= interval_s < float("inf") for interval_s in found):
        raise argparse.ArgumentTypeError(f"intervals are 0 or above, not {text}")
    return found


if __name__ == "__main__":
    sys.exit(main())

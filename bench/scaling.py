"""What more workers on the bus cost: control time and the trainer's CPU a round, with 1, 8 and 64.

    python bench/scaling.py
    python bench/scaling.py --workers 1,2,4,8 --window gloo --json bench/results/….json

bench/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

import command
import documents
import words
from control import Ranks
from scaling_ranks import Config

TIMES = {
    "go": "publish() → go",
    "ready": "of it sealed → go",
    "received": "go → all received",
    "applied": "→ all applied",
    "total": "publish() → all applied",
}
CPU = {
    "cpu": "the trainer's CPU",
    "broker_cpu": "the broker's",
    "hosts_cpu": "the workers', all",
}


def main() -> int:
    """Measure, print, and write the document; 1 if a worker's bits are not the trainer's."""
    return command.run("scaling", _parse(sys.argv[1:]), measure, show, _equal)


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the processes; the document."""
    head = documents.head("scaling", sys.argv[1:], "cpu")
    config = Config(**{key: getattr(arguments, key) for key in Config.__dataclass_fields__})
    with console.status("starting") as status:
        ranks = Ranks(
            Path(__file__).with_name("scaling_ranks.py"),
            config.hosts + 1,
            config,
            on_progress=lambda what: status.update(str(what)),
        )
        with ranks:
            measured = ranks.run(arguments.timeout)[0]
    document = head | {
        "model": config.cut.describe(),
        "settings": {key: getattr(config, key) for key in Config.__dataclass_fields__},
        "crews": [summarise(one) for one in measured],
    }
    document["growth"] = growth(document["crews"])
    document["targets"] = targets(document)
    return document


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """One number of workers; times and CPU in ms a round."""
    rounds = measured.pop("rounds")
    found = {key: documents.spread([one[key] for one in rounds]) for key in (*TIMES, *CPU)}
    # In ticks of the kernel: only all rounds together say something.
    for key in ("broker_cpu", "hosts_cpu"):
        found[key] = {"mean": round(sum(one[key] for one in rounds) / len(rounds), 3)}
    rest = {k: round(v, 3) if isinstance(v, float) else v for k, v in measured.items()}
    return rest | {"ms": found}


def growth(crews: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From each number of workers to the next: what one more costs, in ms a round, and how often
    the figure has grown."""
    found = []
    for fewer, more in itertools.pairwise(crews):
        step: dict[str, Any] = {"from": fewer["workers"], "to": more["workers"]}
        for key in ("cpu", *TIMES):
            before, after = fewer["ms"][key]["p50"], more["ms"][key]["p50"]
            step[key] = {
                "ms_a_worker": round((after - before) / (step["to"] - step["from"]), 4),
                "times": round(after / before, 3) if before else None,
            }
        found.append(step)
    return found


def targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    """That what the trainer does grows no faster than the workers do.

    What follows go is the workers' own work, on cores that they share: it has no bound here.
    """
    return [
        documents.target(
            f"{name}, {step['to']} workers to {step['from']}",
            step[key]["times"],
            step["to"] / step["from"],
        )
        for step in document["growth"]
        for key, name in (("cpu", CPU["cpu"]), ("go", TIMES["go"]))
    ]


def show(document: dict[str, Any], console: Console) -> None:
    """Print the document for a person."""
    settings = document["settings"]
    console.print(
        Text.assemble(
            f"{document['command']}\n",
            (f"{document['model']}\n", "bold"),
            f"{documents.where(document)}; window {settings['window']}; workers in "
            f"{settings['hosts']} process(es); {settings['rounds']} rounds each",
        )
    )
    table = documents.table("a round, ms at p50 (p90)", "workers", *TIMES.values())
    for crew in document["crews"]:
        spreads = (crew["ms"][key] for key in TIMES)
        table.add_row(
            str(crew["workers"]), *(f"{one['p50']:.2f} ({one['p90']:.2f})" for one in spreads)
        )
    console.print(table)
    table = documents.table(
        "CPU, ms a round", "workers", *CPU.values(), "idle: the trainer's, ms/s", "the broker's"
    )
    for crew in document["crews"]:
        ms = crew["ms"]
        table.add_row(
            str(crew["workers"]),
            f"{ms['cpu']['p50']:.2f} ({ms['cpu']['p90']:.2f})",
            *(f"{ms[key]['mean']:.2f}" for key in ("broker_cpu", "hosts_cpu")),
            *(f"{crew[key]:.1f}" for key in ("idle_cpu_ms_a_s", "idle_broker_cpu_ms_a_s")),
        )
    console.print(table)
    table = documents.table(
        "one more worker, ms a round at p50", "from → to", CPU["cpu"], *TIMES.values()
    )
    for step in document["growth"]:
        figures = (f"{step[key]['ms_a_worker']:.3f}" for key in ("cpu", *TIMES))
        table.add_row(f"{step['from']} → {step['to']}", *figures)
    console.print(table)
    short = [f"{c['short']} with {c['workers']}" for c in document["crews"] if c["short"]]
    if short:
        console.print(f"rounds that did not reach all by the window: {', '.join(short)}")
    console.print(documents.targets_table(document["targets"]))
    console.print(
        documents.verdict(
            _equal(document), "every worker holds the trainer's bits", "A WORKER HOLDS OTHER BITS"
        )
    )


def _equal(document: dict[str, Any]) -> bool:
    return all(crew["digests_equal"] for crew in document["crews"])


def _parse(given: list[str]) -> argparse.Namespace:
    parser = command.parser("scaling", __doc__, timeout_s=600)
    add = parser.add_argument
    add("--workers", type=words.rising, default=(1, 8, 64), help="how many, in turn (1,8,64)")
    add(
        "--hosts",
        type=words.count,
        default=min(2, os.cpu_count() or 1),
        help="processes that have them, on one event loop each (2)",
    )
    add("--rounds", type=words.count, default=50, help="measured ones each (50)")
    add("--elements", type=words.count, default=100_000, help="weights of a worker (100,000)")
    add("--density", type=words.share, default=0.01, help="share that changes (0.01)")
    add("--window", choices=["bus", "gloo"], default="bus", help="its kind (bus)")
    return command.parse(parser, given)


if __name__ == "__main__":
    sys.exit(main())

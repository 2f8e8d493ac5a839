"""A trainer of several ranks that each publish their shard, beside gathering them first.

    python bench/layouts.py
    python bench/layouts.py --ranks 2 --tp 1,2 --elements 16000000 --json bench/results/….json
    python bench/layouts.py --device cuda --ranks 1,2,4 --tp 1,2,4    # a GPU for each rank

bench/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

import command
import documents
import stats
import words
from control import Ranks
from layouts_ranks import METHODS, STAGES, Config
from shapes import MODELS, Cut
from sharding import by_engine, by_rows, count_bytes, even_cut, manifest_of_shapes
from targets import target

TITLES = {
    "sharded": "each rank its shard",
    "gathered": "gathered, then sparse",
    "dense": "gathered, then dense",
}
#: What is measured of a round, as far as the method has it.
PARTS = ("whole", "gather", "publish", "publish_cpu", *STAGES)
#: Gathering first to ours; publish() of one rank to that of two; received to owned.
FASTER, DIFF, BYTES = 2.0, 1.8, 1.1


def main() -> int:
    """Measure, print, and write the document; 1 if the worker's bits are not the trainer's."""
    return command.run("layouts", _parse(sys.argv[1:]), measure, show, _equal)


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every number of ranks with every worker, each with processes of its own; the document."""
    head = documents.head("layouts", sys.argv[1:], arguments.device)
    cut = even_cut(arguments.elements, MODELS[arguments.model])
    keys = ("device", "rounds", "warmup", "density", "routing", "threads", "seed")
    settings = {key: getattr(arguments, key) for key in keys}
    cases = []
    with console.status("starting") as status:
        for ranks in arguments.ranks:
            for tp in arguments.tp:
                where = f"{ranks} rank(s) of the trainer, {tp} of the worker"

                def progress(what: Any, where: str = where) -> None:
                    status.update(f"{where}: {what}")

                progress("starting")
                cases.append(_case(arguments, cut, ranks, tp, settings, progress))
    document = head | {
        "load_after": round(os.getloadavg()[0], 2),
        "model": cut.describe(),
        "settings": settings,
        "cases": cases,
    }
    document["targets"] = targets(document)
    return document


def _case(
    arguments: argparse.Namespace,
    cut: Cut,
    ranks: int,
    tp: int,
    settings: dict[str, Any],
    progress: Any,
) -> dict[str, Any]:
    manifest = manifest_of_shapes(cut.shapes)
    layouts = by_engine(manifest, cut.model, tp)
    config = Config(cut=cut, ranks=ranks, layouts=tuple(layouts), **settings)
    program = Path(__file__).with_name("layouts_ranks.py")
    with Ranks(program, ranks + tp, config, on_progress=progress) as processes:
        result = processes.run(arguments.timeout)[0]
    counted = count_bytes(cut, by_rows(manifest, ranks), layouts, arguments.density, arguments.seed)
    case = {"ranks": ranks, "tp": tp} | summarise(result) | {"bytes": counted}
    received = case["methods"]["sharded"]["received"]
    # Of the first rank, which tells it; the others hold as much.
    return case | {"received_to_own": round(received / counted["own"][0], 4)}


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """One case: times in ms, and how the ways beside ours compare with it."""
    turns = result["turns"]
    methods: dict[str, Any] = {}
    for name in METHODS:
        rounds = [turn[name] for turn in turns]
        parts = [part for part in PARTS if part in rounds[0]]
        methods[name] = {
            "ms": {part: documents.spread([one[part] for one in rounds]) for part in parts},
            **{
                key: round(stats.percentile([one[key] for one in rounds], 0.5))
                for key in ("nbytes", "received")
            },
            "astray": sum(one.get("astray", False) for one in rounds),
        }

    def ratio(of: str, part: str) -> float:
        p50s = [methods[name]["ms"][part]["p50"] for name in (of, "sharded")]
        return round(p50s[0] / p50s[1], 3)

    return {
        "window": result["window"],
        "methods": methods,
        "gathered_to_sharded": ratio("gathered", "whole"),
        "dense_to_sharded": ratio("dense", "whole"),
        # publish() of all of it on one rank, to that of a shard on the slowest rank.
        "publish_to_sharded": ratio("gathered", "publish"),
        "publish_cpu_to_sharded": ratio("gathered", "publish_cpu"),
        "digests_equal": result["digests_equal"],
    }


def targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Of trainers of several ranks; the diff of two."""
    found = []
    for case in document["cases"]:
        who = f"{case['ranks']} → {case['tp']}"
        if case["ranks"] > 1:
            seen = case["gathered_to_sharded"]
            found.append(target(f"{who}: gathered first to ours", seen, FASTER, least=True))
            seen = case["received_to_own"]
            what = f"{who}: bytes that a rank receives, × what it owns"
            found.append(target(what, seen, BYTES, least=False))
        if case["ranks"] == 2:
            seen = case["publish_to_sharded"]
            found.append(target(f"{who}: publish() of one rank to two", seen, DIFF, least=True))
    return found


def show(document: dict[str, Any], console: Console) -> None:
    """Print the document for a person."""
    settings = document["settings"]
    console.print(
        Text.assemble(
            f"{document['command']}\n",
            (f"{document['model']}\n", "bold"),
            f"{documents.where(document)} → {document['load_after']}; "
            f"{settings['threads']} torch thread(s) a rank; {settings['density']:.3%} changed",
        )
    )
    for case in document["cases"]:
        _show_case(case, console)
    table = documents.table(
        "bytes of a step to a rank of the worker",
        "ranks",
        *("owned", "received", "× owned", "broadcast", "× owned", "all-to-all", "× owned"),
    )
    for case in document["cases"]:
        counted = case["bytes"]
        table.add_row(
            f"{case['ranks']} → {case['tp']}",
            f"{max(counted['own']):,}",
            f"{case['methods']['sharded']['received']:,}",
            f"{case['received_to_own']:.3f}",
            f"{counted['broadcast']:,}",
            f"{counted['broadcast_to_own']:.3f}",
            f"{max(counted['all_to_all']):,}",
            f"{counted['all_to_all_to_own']:.3f}",
        )
    console.print(table)
    if document["targets"]:
        console.print(documents.targets_table(document["targets"]))
    console.print(
        documents.verdict(
            _equal(document),
            "every rank of every worker holds its part of the trainer's bits, by every method",
            "A RANK OF A WORKER HOLDS OTHER BITS",
        )
    )


def _show_case(case: dict[str, Any], console: Console) -> None:
    table = documents.table(
        f"{case['ranks']} rank(s) → worker of {case['tp']}: publish to applied, ms, "
        f"window {case['window']}",
        "",
        *("p50", "p90", "gather", "publish()", "its CPU", *STAGES, "×"),
    )
    for name, method in case["methods"].items():
        ms = method["ms"]
        to = 1.0 if name == "sharded" else case[f"{name}_to_sharded"]
        table.add_row(
            TITLES[name],
            *(documents.figure(ms["whole"], key) for key in ("p50", "p90")),
            *(documents.figure(ms.get(part, {}), "p50") for part in PARTS[1:]),
            f"{to:.2f}",
        )
    console.print(table)
    astray = sum(method["astray"] for method in case["methods"].values())
    if astray:
        console.print(f"{astray} round(s) took the log, or a second attempt", style="red")


def _equal(document: dict[str, Any]) -> bool:
    return all(all(case["digests_equal"].values()) for case in document["cases"])


def _parse(given: list[str]) -> argparse.Namespace:
    parser = command.parser("layouts", __doc__, timeout_s=1800)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the weights are (cpu)")
    add("--ranks", type=_powers, default=(1, 2, 4), help="of the trainer, in turn (1,2,4)")
    add("--tp", type=_powers, default=(1, 2, 4), help="ranks of the worker, in turn (1,2,4)")
    add("--model", choices=list(MODELS), default="0.5b", help="whose shapes (0.5b)")
    add("--elements", type=words.count, default=64_000_000, help="weights (64 M)")
    add("--density", type=words.share, default=0.01, help="share that changes (0.01)")
    add("--routing", choices=["auto", "broadcast", "all-to-all"], default="auto", help="see Policy")
    add("--rounds", type=words.count, default=15, help="of each method, a case (15)")
    add("--warmup", type=words.count, default=3, help="rounds before them (3)")
    arguments = command.parse(parser, given)
    needed = max(arguments.ranks) + max(arguments.tp)
    if arguments.device == "cuda" and torch.cuda.device_count() < needed:
        parser.error(f"it takes a GPU for each of {needed} ranks, {torch.cuda.device_count()} here")
    return arguments


def _powers(text: str) -> tuple[int, ...]:
    found = words.rising(text)
    if not set(found) <= {1, 2, 4}:
        raise argparse.ArgumentTypeError(f"1, 2 and 4 ranks share the model evenly, not {text}")
    return found


if __name__ == "__main__":
    sys.exit(main())

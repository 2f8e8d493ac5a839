"""What updates cost the worker's engine: the latency of its forwards with and without them.

    python bench/stall.py --device cuda --model 7b --json bench/results/….json
    python bench/stall.py --device cpu --model tiny

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
from models import CONFIGS
from stall_ranks import Config

#: What the p99 of a forward may grow by, beside the apply itself.
SLACK_MS = 1.0


def main() -> int:
    """Measure, print, and write the document; 1 if the worker's bits are not the trainer's."""
    return command.run("stall", _parse(sys.argv[1:]), measure, show, lambda d: d["digests_equal"])


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the two processes; the document."""
    head = documents.head("stall", sys.argv[1:], arguments.device)
    settings = {key: getattr(arguments, key) for key in Config.__dataclass_fields__}
    with console.status("starting") as status:
        ranks = Ranks(
            Path(__file__).with_name("stall_ranks.py"),
            2,
            Config(**settings),
            on_progress=lambda what: status.update(str(what)),
        )
        with ranks:
            result = ranks.run(arguments.timeout)[0]
    gpus = len(head["machine"].get("gpus", ()))
    document = head | {
        "model": f"Qwen2 {arguments.model}: {result['model']}",
        "settings": settings | {"one_device": arguments.device == "cpu" or gpus < 2},
        "window": result["window"],
        "digests_equal": result["digests_equal"],
    }
    document |= summarise(result["phases"])
    document["targets"] = targets(document)
    return document


def summarise(phases: list[dict[str, Any]]) -> dict[str, Any]:
    """The measured phases as figures, in ms; `p99_pairs` has one entry a pair of phases."""
    found: dict[str, Any] = {}
    latencies: dict[str, list[list[float]]] = {"quiet": [], "busy": []}
    guards: dict[str, list[float]] = {"quiet": [], "busy": []}
    hit: list[float] = []
    for phase in phases:
        kind, forwards = phase["kind"], phase["forwards"]
        latencies[kind].append([1e3 * (ended - began) for began, ended, _ in forwards])
        guards[kind] += [waited for _, _, waited in forwards]
        hit += [
            1e3 * (ended - began)
            for began, ended, _ in forwards
            if any(began <= at <= ended for at in phase["applies"])
        ]
    for kind, measured in latencies.items():
        found[kind] = {
            "forward_ms": documents.spread([ms for phase in measured for ms in phase]),
            "guard_ms": documents.spread(guards[kind]),
            "p99_phases": [round(stats.percentile(phase, 0.99), 3) for phase in measured],
        }
    found["hit_ms"] = documents.spread(hit)
    busy = [phase for phase in phases if phase["kind"] == "busy"]
    workers = [one for phase in busy for one in phase["workers"]]
    rounds = [one for phase in busy for one in phase["rounds"]]
    found["updates"] = {
        "published": sum(phase["published"] for phase in busy),
        "applied": sum(len(phase["applies"]) for phase in busy),
        "measured": len(workers),
        "by_window": sum(one["source"] == "window" for one in workers),
        "nbytes": round(stats.percentile([one["nbytes"] for one in rounds], 0.5)),
        "total_ms": documents.spread([one["total"] for one in rounds]),
    }
    for part in ("receive", "check", "staged", "apply", "verify"):
        found["updates"][f"{part}_ms"] = documents.spread([one[part] for one in workers])
    return found


def targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The p99 with updates against the one without; and the same of the forwards that were hit."""
    quiet, busy = (document[kind]["forward_ms"]["p99"] for kind in ("quiet", "busy"))
    bound = quiet + document["updates"]["apply_ms"]["p50"] + SLACK_MS
    hit = document["hit_ms"].get("p50")
    return [
        documents.target("p99 of a forward with updates, ms", busy, bound),
        documents.target("p50 of a forward that an apply fell into, ms", hit, bound),
    ]


def show(document: dict[str, Any], console: Console) -> None:
    """Print the document for a person."""
    machine, versions, settings = (document[k] for k in ("machine", "versions", "settings"))
    updates = document["updates"]
    where = ", ".join(machine.get("gpus", [f"{machine['cpu']}, {machine['cores']} cores"]))
    how = "CUDA graph" if settings["graph"] else "eager"
    console.print(
        Text.assemble(
            f"{document['command']}\n",
            (f"{document['model']}\n", "bold"),
            f"{where}; torch {versions['torch']}; window {document['window']}; trainer and worker "
            f"on {'one device' if settings['one_device'] else 'a device each'}; load "
            f"{document['load']}\n"
            f"{settings['batch']} × {settings['tokens']} tokens a forward, {how}; in the busy "
            f"phases an update every {settings['interval_s']} s, {settings['density']:.3%} changed "
            f"({updates['nbytes']:,} bytes), {updates['published']} published, "
            f"{updates['applied']} applied, {updates['by_window']} of {updates['measured']} "
            "proven ones by the window",
        )
    )
    keys = ("p50", "p90", "p99", "p999", "max")
    table = documents.table("a forward, ms", "when", *keys, "n")
    rows = {
        "without updates": document["quiet"]["forward_ms"],
        "with updates": document["busy"]["forward_ms"],
        "… those that an apply fell into": document["hit_ms"],
        "into the guard, without": document["quiet"]["guard_ms"],
        "into the guard, with": document["busy"]["guard_ms"],
    }
    for name, found in rows.items():
        cells = (documents.figure(found, key) for key in keys)
        table.add_row(name, *cells, str(found["n"]))
    console.print(table)
    table = documents.table("an update on the worker, ms", "part", "p50", "p90", "max", "n")
    names = {
        "total": "publish to applied (trainer)",
        "receive": "receive",
        "check": "check",
        "staged": "staged → applied",
        "apply": "apply alone",
        "verify": "digest of all weights",
    }
    for part, name in names.items():
        found = updates[f"{part}_ms"]
        cells = (documents.figure(found, key) for key in ("p50", "p90", "max"))
        table.add_row(name, *cells, str(found["n"]))
    console.print(table)
    console.print(documents.targets_table(document["targets"]))
    equal = document["digests_equal"]
    console.print(
        "the worker holds the trainer's bits" if equal else "THE WORKER HOLDS OTHER BITS",
        style="" if equal else "bold red",
    )


def _parse(given: list[str]) -> argparse.Namespace:
    parser = command.parser("stall", __doc__, timeout_s=600)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="for both (cpu)")
    parser.add_argument("--model", choices=list(CONFIGS), default="tiny", help="its size (tiny)")
    parser.add_argument("--batch", type=words.count, default=8, help="sequences a forward (8)")
    parser.add_argument("--tokens", type=words.count, default=4, help="tokens a sequence (4)")
    parser.add_argument("--graph", action="store_true", help="forwards as a CUDA graph")
    parser.add_argument(
        "--pairs", type=words.count, default=3, help="of a quiet and a busy phase (3)"
    )
    parser.add_argument("--seconds", type=words.positive, default=5.0, help="each phase (5)")
    parser.add_argument("--interval-s", type=words.positive, default=0.2, help="of updates (0.2)")
    parser.add_argument(
        "--density", type=words.share, default=0.01, help="share that changes (0.01)"
    )
    parser.add_argument("--window", choices=["auto", "nccl", "gloo", "bus"], default="auto")
    arguments = command.parse(parser, given)
    if arguments.graph and arguments.device != "cuda":
        parser.error("--graph: a CUDA graph needs --device cuda")
    if arguments.interval_s > arguments.seconds:
        parser.error("--interval-s: no phase is so long (--seconds)")
    return arguments


if __name__ == "__main__":
    sys.exit(main())

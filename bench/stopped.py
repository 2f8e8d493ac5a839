"""What a stopped worker costs once the round that met the stop is over: publish(), the others.

    python bench/stopped.py --device cpu --workers 3
    python bench/stopped.py --device cuda --workers 3 --json bench/results/….json

bench/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, get_args

import torch
from rich.console import Console
from rich.text import Text

import command
import documents
import stats
import words
from crew import Crew
from models import change
from shapes import Cut
from sparsecast import Policy
from sparsecast.messages.control import WindowKind
from training import PATIENCE_S, Setting, Training

KINDS = {
    "none": "none stopped",
    "stopped": "one stopped",
    "left": "one fewer, which left",
}
#: What is compared: of what, and which figure.
FIGURES = {
    "publish_p99": ("publish_ms", "p99"),
    "applied_p50": ("applied_ms", "p50"),
    "applied_p99": ("applied_ms", "p99"),
}
TITLES = {
    "publish_p99": "publish(), p99",
    "applied_p50": "the others' time to applied, p50",
    "applied_p99": "the others' time to applied, p99",
}
#: What it may cost.
BOUND = 1.1


def main() -> int:
    """Measure, print, and write the document; 1 if a worker's bits are not the trainer's."""
    return command.run(
        "stopped", _parse(sys.argv[1:]), measure, show, lambda document: document["digests_equal"]
    )


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Phases of each kind in turn; the document."""
    head = documents.head("stopped", sys.argv[1:], arguments.device)
    cut = Cut.of_elements(arguments.elements)
    setting = Setting(
        shapes=cut.shapes,
        workers=arguments.workers,
        device=arguments.device,
        threads=arguments.threads,
        seed=arguments.seed,
        # An anchor in mid-measurement would fall into one kind of phase or the other.
        policy=Policy(window=arguments.window, anchor_every=1_000_000),
    )
    phases: dict[str, list[Phase]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        status = stack.enter_context(console.status("starting"))
        training = stack.enter_context(Training(setting, stack.enter_context(Crew())))
        rounds = Rounds(training, arguments.density, arguments.interval_s, arguments.seed)
        order = list(KINDS)
        for turn in range(arguments.turns):
            for kind in order:
                status.update(f"{KINDS[kind]}: {turn + 1} of {arguments.turns}")
                phases[kind].append(rounds.phase(kind, arguments.rounds))
            order.append(order.pop(0))
        rounds.gather()
        equal = training.equal(training.workers)
        window = training.publisher.window
    document = head | {
        "model": cut.describe(),
        "settings": {
            key: getattr(arguments, key)
            for key in ("device", "workers", "turns", "rounds", "density", "interval_s", "threads")
        }
        | {"seed": arguments.seed},
        "window": window,
        "nbytes": rounds.nbytes,
        "digests_equal": equal and all(one.equal for found in phases.values() for one in found),
    }
    document |= summarise(phases)
    document["targets"] = targets(document)
    return document


@dataclass(frozen=True, slots=True)
class Phase:
    """Rounds under one kind: times in ms, of publish() and until the last of the others held it."""

    publish_ms: list[float]
    applied_ms: list[float]
    #: The round that was left out: the first, which meets what the phase is about.
    met_ms: float
    #: Measured rounds that a second attempt or the log has carried, or other members than meant.
    astray: int
    equal: bool


class Rounds:
    """One round after the other, each begun when its time has come and the others hold the last."""

    def __init__(self, training: Training, density: float, interval_s: float, seed: int) -> None:
        self._training = training
        self._density = density
        self._interval_s = interval_s
        device = next(iter(training.tensors.values())).device
        self._random = torch.Generator(device).manual_seed(seed + 1)
        self._due = time.monotonic()
        self.nbytes = 0

    def gather(self) -> None:
        """Go on until one version has come to every worker by the window."""
        training = self._training
        first = training.publisher.version + 1

        def whole() -> int | None:
            training.check()
            self._round()
            # A window takes in who is current: whoever comes back need not run after the rounds.
            training.all_hold(training.publisher.version, training.workers)
            return training.by_window(
                range(first, training.publisher.version + 1), training.workers
            )

        training.heard.wait(whole, PATIENCE_S, "every worker is in the window")

    def phase(self, kind: str, n: int) -> Phase:
        """One phase; every worker runs again and is told to be in when this returns."""
        training = self._training
        self.gather()
        # The last rank: with gloo, one that others receive through would be another case.
        victim = training.workers[-1]
        if kind == "stopped":
            victim.doomed = True
            victim.tell("fault", "idle", signal.SIGSTOP.value)
            victim.wait("fault", PATIENCE_S)
        elif kind == "left":
            victim.tell("leave")
            victim.wait("left", PATIENCE_S)
        _, met = self._round()
        first = training.publisher.version + 1
        took = [self._round() for _ in range(n)]
        versions = range(first, training.publisher.version + 1)
        members = len(training.workers) - (kind != "none")
        others = training.workers[:-1]
        equal = training.equal(others if kind != "none" else training.workers)
        astray = sum(self._astray(version, members) for version in versions)
        if kind == "stopped":
            victim.resume()
            victim.doomed = False
        elif kind == "left":
            training.join(victim)
        return Phase([one for one, _ in took], [one for _, one in took], met, astray, equal)

    def _round(self) -> tuple[float, float]:
        """ms of publish(), and from its call until the last of the others held the version."""
        training, others = self._training, self._training.workers[:-1]
        change(training.tensors, self._density, self._random)
        self._due = max(self._due + self._interval_s, time.monotonic())
        time.sleep(max(self._due - time.monotonic(), 0))
        began = time.monotonic()
        update = training.publisher.publish()
        took = time.monotonic() - began
        self.nbytes = update.nbytes
        training.all_hold(update.version, others)
        held = max(worker.held(update.version) or 0.0 for worker in others)
        return 1e3 * took, 1e3 * (held - began)

    def _astray(self, version: int, members: int) -> bool:
        told = self._training.heard.wait(
            lambda: self._training.heard.trainer(version),
            PATIENCE_S,
            f"the metrics of version {version}",
        )
        return told.transport == "log" or told.attempt != 1 or told.members != members


def summarise(phases: dict[str, list[Phase]]) -> dict[str, Any]:
    """The figures of each kind, and one stopped to the others: in all, and turn by turn."""
    kinds = {
        kind: {
            "publish_ms": documents.spread([ms for one in found for ms in one.publish_ms]),
            "applied_ms": documents.spread([ms for one in found for ms in one.applied_ms]),
            "left_out": len(found),
            "left_out_ms": documents.spread([one.met_ms for one in found]),
            "astray": sum(one.astray for one in found),
        }
        for kind, found in phases.items()
    }
    ratios: dict[str, Any] = {"none": {}, "left": {}}
    for kind, found in ratios.items():
        for name, (of, figure) in FIGURES.items():
            share = int(figure[1:]) / 100
            turns = [
                stats.percentile(getattr(stopped, of), share)
                / stats.percentile(getattr(other, of), share)
                for stopped, other in zip(phases["stopped"], phases[kind], strict=True)
            ]
            found[name] = {
                "ratio": round(kinds["stopped"][of][figure] / kinds[kind][of][figure], 3),
                "turns": [round(one, 3) for one in turns],
            }
    return {"kinds": kinds, "stopped_to": ratios}


def targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One stopped to none stopped."""
    return [
        documents.target(f"{title}: one stopped to none", found["ratio"], BOUND)
        for title, found in (
            (TITLES[name], document["stopped_to"]["none"][name]) for name in FIGURES
        )
    ]


def show(document: dict[str, Any], console: Console) -> None:
    """Print the document for a person."""
    settings = document["settings"]
    console.print(
        Text.assemble(
            f"{document['command']}\n",
            (f"{document['model']}\n", "bold"),
            f"{documents.where(document)}; window {document['window']}, {settings['workers']} "
            f"workers; a round every {settings['interval_s']} s, {settings['density']:.3%} changed "
            f"({document['nbytes']:,} bytes)",
        )
    )
    keys = ("p50", "p10", "p90", "p99", "max")
    for of, title in (
        ("publish_ms", "publish(), ms"),
        ("applied_ms", "from the call of publish() until the last of the others holds it, ms"),
    ):
        table = documents.table(title, "", *keys, "rounds")
        for kind, name in KINDS.items():
            found = document["kinds"][kind][of]
            figures = (documents.figure(found, key) for key in keys)
            table.add_row(name, *figures, str(found["n"]))
        console.print(table)
    table = documents.table(
        "one stopped, divided by … (of single turns)", "", *(TITLES[name] for name in FIGURES)
    )
    for kind, found in document["stopped_to"].items():
        cells = []
        for name in FIGURES:
            turns = found[name]["turns"]
            cells.append(f"{found[name]['ratio']:.3f}  ({min(turns):.3f}–{max(turns):.3f})")
        table.add_row(KINDS[kind], *cells)
    console.print(table)
    for kind, name in KINDS.items():
        found = document["kinds"][kind]
        console.print(
            f"{name}: {found['left_out']} round(s) left out, the first of each phase: "
            f"{documents.figure(found['left_out_ms'], 'p50')} ms at p50, "
            f"{documents.figure(found['left_out_ms'], 'max')} at most; "
            f"{found['astray']} of the others not by one attempt of the window"
        )
    console.print(documents.targets_table(document["targets"]))
    console.print(
        documents.verdict(
            document["digests_equal"],
            "every worker holds the trainer's bits",
            "A WORKER HOLDS OTHER BITS",
        )
    )


def _parse(given: list[str]) -> argparse.Namespace:
    parser = command.parser("stopped", __doc__, timeout_s=600)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="of all (cpu)")
    add("--workers", type=words.several, default=2, help="at least two (2)")
    add("--turns", type=words.count, default=5, help="phases of each kind (5)")
    add("--rounds", type=words.count, default=50, help="measured ones a phase (50)")
    add("--elements", type=words.count, default=16_000_000, help="weights (16 M)")
    add("--density", type=words.share, default=0.01, help="share that changes (0.01)")
    add("--interval-s", type=words.positive, default=0.1, help="of rounds (0.1)")
    add("--window", choices=["auto", *get_args(WindowKind)], default="auto")
    return command.parse(parser, given)


if __name__ == "__main__":
    sys.exit(main())

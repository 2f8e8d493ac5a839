"""What a worker that dies or stops costs the others: the trainer's loop, and the survivors.

    python bench/recovery.py --device cuda --workers 3 --json bench/results/….json
    python bench/recovery.py --device cpu --workers 2

bench/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
from contextlib import ExitStack
from typing import Any, get_args

from rich.console import Console
from rich.text import Text

import command
import documents
import words
from crew import Crew
from recovery_trainer import SLACK_S, Case, Pace, Trainer, deadline_s
from shapes import Cut
from sparsecast import Policy
from sparsecast.messages.control import WindowKind
from training import Setting

CASES = {
    "killed-idle": Case("idle", signal.SIGKILL, "SIGKILL between two rounds"),
    "killed-ready": Case("ready", signal.SIGKILL, "SIGKILL after ready, before go"),
    "killed-receiving": Case("receive", signal.SIGKILL, "SIGKILL at the start of the receive"),
    "stopped-receiving": Case("receive", signal.SIGSTOP, "SIGSTOP at the start of the receive"),
    "stopped-ready": Case("ready", signal.SIGSTOP, "SIGSTOP after ready, before go"),
    "stopped-idle": Case("idle", signal.SIGSTOP, "SIGSTOP between two rounds"),
}
_DEFAULT = "killed-idle,killed-ready,killed-receiving,stopped-receiving"


def main() -> int:
    """Measure, print, and write the document; 1 if a survivor's bits are not the trainer's."""
    return command.run("recovery", _parse(sys.argv[1:]), measure, show, _equal)


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the cases one after the other; the document."""
    head = documents.head("recovery", sys.argv[1:], arguments.device)
    cut = Cut.of_elements(arguments.elements)
    policy = Policy(
        window=arguments.window,
        ready_s=arguments.ready_s,
        commit_s=arguments.ready_s + 3,
        send_s=arguments.send_s,
    )
    setting = Setting(
        shapes=cut.shapes,
        workers=arguments.workers,
        device=arguments.device,
        threads=arguments.threads,
        seed=arguments.seed,
        policy=policy,
    )
    pace = Pace(arguments.density, arguments.interval_s, arguments.around_s)
    cases: list[dict[str, Any]] = []
    with ExitStack() as stack:
        status = stack.enter_context(console.status("starting"))
        crew = stack.enter_context(Crew())
        trainer = stack.enter_context(Trainer(setting, pace, crew))
        deaths = {name: _deaths(name, arguments.repeats) for name in arguments.cases}
        if 2 * sum(deaths.values()) <= len(os.sched_getaffinity(0)):
            trainer.prepare(sum(deaths.values()))
        for name in arguments.cases:
            case = CASES[name]
            trainer.prepare(deaths[name])
            times: list[dict[str, Any]] = []
            for number in range(arguments.repeats):
                status.update(f"{case.title}: {number + 1} of {arguments.repeats}")
                times.append(trainer.once(case))
            cases.append(summarise(name, case, times, trainer.window, trainer.nbytes, policy))
        window = trainer.window
    return head | {
        "model": cut.describe(),
        "settings": {
            "device": arguments.device,
            "workers": arguments.workers,
            "repeats": arguments.repeats,
            "density": arguments.density,
            "interval_s": arguments.interval_s,
            "ready_s": arguments.ready_s,
            "send_s": arguments.send_s,
            "threads": arguments.threads,
            "seed": arguments.seed,
        },
        "window": window,
        "cases": cases,
        "targets": [one for case in cases for one in targets(case)],
    }


def _deaths(name: str, repeats: int) -> int:
    return repeats if CASES[name].number == signal.SIGKILL else 0


def summarise(
    name: str,
    case: Case,
    times: list[dict[str, Any]],
    window: str | None,
    nbytes: int,
    policy: Policy,
) -> dict[str, Any]:
    """One case of the document. Times in seconds, publish() in ms; None: it never came."""
    deadline = deadline_s(case, policy, nbytes)
    found: dict[str, Any] = {
        "case": name,
        "what": case.title,
        "deadline_s": round(deadline, 3),
        "bound_s": round(deadline + SLACK_S.get(window or "", 1.5), 3),
        "publish_ms": {
            when: documents.spread([ms for one in times for ms in one["publish_ms"][when]])
            for when in ("before", "during", "after")
        },
        "digests_equal": all(one["digests_equal"] for one in times),
        "roads": [one["road"] for one in times],
    }
    parts = ["held_s", "next_s", "window_again_s"]
    if case.number == signal.SIGSTOP:
        parts.append("back_s")
    for part in parts:
        measured = [one[part] for one in times]
        known = [value for value in measured if value is not None]
        found[part] = {
            "p50": round(statistics.median(known), 3) if known else None,
            "max": round(max(known), 3) if len(known) == len(measured) else None,
            "all": [None if value is None else round(value, 3) for value in measured],
            "n": len(measured),
        }
    return found


def targets(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The survivors hold the next version in time; the trainer's loop goes on meanwhile."""
    publish = case["publish_ms"]
    what = case["what"]
    found = [
        documents.target(f"{what}: next held, s, longest", case["next_s"]["max"], case["bound_s"])
    ]
    if publish["during"]["n"] and publish["before"]["n"]:
        # Far below any deadline, and beyond what a busy machine does to a thread.
        bound = publish["before"]["max"] + 1e3 * case["deadline_s"] / 10
        found.append(
            documents.target(f"{what}: publish() meanwhile, ms", publish["during"]["max"], bound)
        )
    return found


def show(document: dict[str, Any], console: Console) -> None:
    """Print the document for a person."""
    machine, versions, settings = (document[k] for k in ("machine", "versions", "settings"))
    where = ", ".join(machine.get("gpus", [f"{machine['cpu']}, {machine['cores']} cores"]))
    console.print(
        Text.assemble(
            f"{document['command']}\n",
            (f"{document['model']}\n", "bold"),
            f"{where}; torch {versions['torch']}; window {document['window']}, "
            f"{settings['workers']} workers; an update every {settings['interval_s']} s, "
            f"{settings['density']:.3%} changed; ready within {settings['ready_s']} s, sent within "
            f"{settings['send_s']} s; load {document['load']}",
        )
    )
    table = documents.table(
        f"from the fault, s ({settings['repeats']} times each; median / longest)",
        *("fault", "deadline", "that version held", "the next one", "by a window again", "back"),
    )
    for case in document["cases"]:
        table.add_row(
            case["what"],
            f"{case['deadline_s']:.2f}",
            *(_times(case.get(part)) for part in ("held_s", "next_s", "window_again_s", "back_s")),
        )
    console.print(table)
    whens = ("before", "during", "after")
    table = documents.table(
        "publish(), ms (p50 / p99 / max, and how many)", "fault", *(f"{when} it" for when in whens)
    )
    for case in document["cases"]:
        table.add_row(case["what"], *(_publish(case["publish_ms"][when]) for when in whens))
    console.print(table)
    console.print(documents.targets_table(document["targets"]))
    equal = _equal(document)
    console.print(
        "every survivor holds the trainer's bits" if equal else "A SURVIVOR HOLDS OTHER BITS",
        style="" if equal else "bold red",
    )


def _equal(document: dict[str, Any]) -> bool:
    return all(case["digests_equal"] for case in document["cases"])


def _times(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return " / ".join(
        "never" if found[key] is None else f"{found[key]:.3f}" for key in ("p50", "max")
    )


def _publish(found: dict[str, float]) -> str:
    figures = " / ".join(documents.figure(found, key) for key in ("p50", "p99", "max"))
    return f"{figures}  ({found['n']})"


def _parse(given: list[str]) -> argparse.Namespace:
    parser = command.parser("recovery", __doc__, timeout_s=900)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of all (cpu)")
    parser.add_argument("--workers", type=words.several, default=3, help="at least two (3)")
    parser.add_argument("--repeats", type=words.count, default=5, help="of each case (5)")
    parser.add_argument(
        "--cases",
        type=_cases,
        default=_cases(_DEFAULT),
        help=f"some of {','.join(CASES)} (the first four)",
    )
    parser.add_argument("--elements", type=words.count, default=16_000_000, help="weights (16 M)")
    parser.add_argument(
        "--density", type=words.share, default=0.01, help="share that changes (0.01)"
    )
    parser.add_argument("--interval-s", type=words.positive, default=0.1, help="of updates (0.1)")
    parser.add_argument(
        "--around-s",
        type=words.positive,
        default=1.5,
        help="measured before and after a fault (1.5)",
    )
    parser.add_argument("--ready-s", type=words.positive, default=1.0, help="Policy.ready_s (1)")
    parser.add_argument("--send-s", type=words.positive, default=2.0, help="Policy.send_s (2)")
    parser.add_argument("--window", choices=["auto", *get_args(WindowKind)], default="auto")
    return command.parse(parser, given)


def _cases(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in CASES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CASES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())

"""The frame of a bench's command: the flags that all have, how it ends, and what it leaves."""

from __future__ import annotations

import argparse
import faulthandler
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import documents
import words
from control import RankFailed
from crew import WorkerFailed

Document = dict[str, Any]
#: What has not ended by itself so long after the timeout never will.
GRACE_S = 20.0


def parser(program: str, doc: str | None, *, timeout_s: float) -> argparse.ArgumentParser:
    """The flags that every command has; `doc` is the module's."""
    made = argparse.ArgumentParser(
        prog=f"bench/{program}.py", description=(doc or "").partition("\n")[0]
    )
    add = made.add_argument
    add("--threads", type=words.count, default=1, help="torch threads a process (1)")
    add("--seed", type=int, default=0, help="of weights and changes (0)")
    add(
        "--timeout",
        type=words.positive,
        default=timeout_s,
        help=f"for it all, s ({timeout_s:g})",
    )
    add("--json", type=Path, help="where to write what was measured")
    return made


def parse(made: argparse.ArgumentParser, given: Sequence[str]) -> argparse.Namespace:
    """The arguments; a document that has no folder to go to is refused before anything runs."""
    arguments = made.parse_args(given)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        made.error(f"--json: there is no folder {arguments.json.parent}")
    return arguments


def run(
    program: str,
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Console], Document],
    show: Callable[[Document, Console], None],
    right: Callable[[Document], bool],
) -> int:
    """Measure, print, write the document. 0; 1 if its bits are not `right`; 2 if it failed."""
    console = documents.console()
    signal.signal(signal.SIGTERM, words.terminated)
    # A trainer that hangs is what a bench may find: it must not hang the bench as well. Workers
    # leave when the pipes close; a stopped one is killed by the crew's end.
    faulthandler.dump_traceback_later(arguments.timeout + GRACE_S, exit=True)
    try:
        document = measure(arguments, Console(stderr=True))
    except (RankFailed, WorkerFailed, TimeoutError) as exc:
        console.print(f"bench/{program}.py: {exc}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    finally:
        faulthandler.cancel_dump_traceback_later()
    show(document, console)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return 0 if right(document) else 1

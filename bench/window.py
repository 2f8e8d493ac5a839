"""A window by itself: opening, rounds of each size, and one plain NCCL broadcast beside them.

    python bench/window.py --window nccl --ranks 2      # one GPU a process
    python bench/window.py --window gloo --sizes 1024,1048576

bench/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import documents
from control import RankFailed, Ranks
from sparsecast import Broker
from window_ranks import Config

_MIB = 1 << 20
SIZES = (1024, _MIB, 16 * _MIB, 300 * _MIB, 2048 * _MIB)
#: In which pieces the largest payload goes in turn; the last: in one.
PIECES = (64 * _MIB, 128 * _MIB, 256 * _MIB, 512 * _MIB, 4096 * _MIB)
#: What a window is to reach of one plain broadcast, where bandwidth counts.
SHARE, FROM_NBYTES = 0.85, 256 * _MIB


def main() -> int:
    """Measure, print, and write the document; 1 if a receiver did not get the sender's bytes."""
    arguments = _parse(sys.argv[1:])
    document = documents.head(
        "window", sys.argv[1:], "cuda" if arguments.window == "nccl" else "cpu"
    )
    document |= {"window": arguments.window, "runs": []}
    failed = False
    for ranks in arguments.ranks:
        try:
            with Broker() as url:
                config = Config(
                    url=url,
                    window=arguments.window,
                    ranks=ranks,
                    sizes=arguments.sizes,
                    pieces=arguments.pieces,
                )
                program = Path(__file__).with_name("window_ranks.py")
                with Ranks(program, ranks, config) as processes:
                    found = processes.run(arguments.timeout)
        except (RankFailed, TimeoutError) as exc:
            print(f"bench/window.py, {ranks} ranks: {exc}", file=sys.stderr)
            failed = True
            continue
        document["runs"].append({"ranks": ranks, "by_rank": [found[r] for r in range(ranks)]})
        _show(document["runs"][-1])
    document["targets"] = _targets(document["runs"])
    if document["targets"]:
        documents.console().print(documents.targets_table(document["targets"]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    right = all(one["bytes_right"] for run in document["runs"] for one in run["by_rank"])
    return 2 if failed else 0 if right else 1


def _targets(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for run in runs:
        for size in run["by_rank"][0]["sizes"]:
            if size["nbytes"] < FROM_NBYTES or "plain_us" not in size:
                continue
            ratio = size["window_us"]["p50"] / size["plain_us"]["p50"]
            what = f"{run['ranks']} ranks, {_name(size['nbytes'])}: × one plain broadcast"
            found.append(documents.target(what, round(ratio, 3), 1 / SHARE))
    return found


def _show(run: dict[str, Any]) -> None:
    """Rank 0's figures, and the last one's p50."""
    first, last = run["by_rank"][0], run["by_rank"][-1]
    columns = ("p50 µs", "p10", "p90", "max", "last rank", "plain p50", "plain / window")
    table = documents.table(f"{run['ranks']} ranks", "", *columns)
    for mine, its in zip(first["sizes"], last["sizes"], strict=True):
        plain = f"{mine['plain_us']['p50']:.0f}" if "plain_us" in mine else "–"
        ratio = f"{mine['plain_over_window']:.3f}" if "plain_us" in mine else "–"
        table.add_row(_name(mine["nbytes"]), *_figures(mine, its), plain, ratio)
    for mine, its in zip(first.get("pieces", ()), last.get("pieces", ()), strict=True):
        label = f"{_name(mine['nbytes'])} in pieces of {_name(mine['piece_nbytes'])}"
        table.add_row(label, *_figures(mine, its), "", "")
    for mine, its in zip(first.get("host", ()), last.get("host", ()), strict=True):
        table.add_row(f"{_name(mine['nbytes'])} {mine['way']}", *_figures(mine, its), "", "")
    console = documents.console()
    console.print(table)
    opened = ", ".join(f"{one['open_first_ms']:.0f}" for one in run["by_rank"])
    again = ", ".join(f"{one['open_again_ms']['p50']:.0f}" for one in run["by_rank"])
    aborted = ", ".join(f"{one['abort_ms']:.0f}" for one in run["by_rank"])
    closed = ", ".join(f"{one['close_ms']['p50']:.0f}" for one in run["by_rank"])
    console.print(f"open, ms by rank: {opened}; again: {again}; close: {closed}; abort: {aborted}")


def _figures(mine: dict[str, Any], its: dict[str, Any]) -> list[str]:
    keys = ("p50", "p10", "p90", "max")
    return [*(f"{mine['window_us'][k]:.0f}" for k in keys), f"{its['window_us']['p50']:.0f}"]


def _name(nbytes: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/window.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--window", choices=["nccl", "gloo", "bus"], default="nccl", help="its kind (nccl)")
    add("--ranks", type=_numbers, default=(2,), help="how many processes, the sender's too (2)")
    add("--sizes", type=_numbers, default=SIZES, help="of payloads, in bytes")
    add("--pieces", type=_numbers, default=PIECES, help="of nccl's largest payload, in bytes")
    add("--timeout", type=float, default=120.0, help="seconds for all of one number of ranks (120)")
    add("--json", type=Path, help="where to write what was measured")
    arguments = parser.parse_args(words)
    if not all(size >= 1 for size in (*arguments.sizes, *arguments.pieces)):
        parser.error("--sizes, --pieces: a byte or more")
    if not all(ranks >= 2 for ranks in arguments.ranks):
        parser.error("--ranks: two or more")
    if arguments.window == "nccl" and torch.cuda.device_count() < max(arguments.ranks):
        parser.error(f"--window nccl: one GPU a rank, {torch.cuda.device_count()} here")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.parent}")
    return arguments


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


if __name__ == "__main__":
    sys.exit(main())

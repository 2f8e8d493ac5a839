"""Rounds over real processes, beside dense and the peers' sparse way in the same run.

    python bench/round.py --device cpu
    python bench/round.py --device cpu --workers 3 --link 1gbit --json bench/results/….json

bench/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

import report
import stats
from control import RankFailed, Ranks
from link import Link, LinkError
from ranks import Config
from shapes import Cut

#: An error of this share in the rate of a shaped link makes its figures worthless.
_TOLERANCE = 0.12


def main() -> int:
    """Measure, print, and write the document; 1 if a method left other bits than the trainer's."""
    arguments = _parse(sys.argv[1:])
    # A table that is cut to 80 columns for a file says nothing.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        document = measure(arguments, Console(stderr=True))
    except (LinkError, RankFailed, TimeoutError) as exc:
        console.print(f"bench/round.py: {exc}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; everything is removed")
        return 130
    report.show(document, console)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    equal = all(all(s["digests_equal"].values()) for s in document["densities"])
    return 0 if equal else 1


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the processes; the document."""
    cut = Cut(arguments.layers, 0) if arguments.layers else Cut.of_elements(arguments.elements)
    size = arguments.workers + 1
    load_before = os.getloadavg()[0]
    with ExitStack() as stack:
        link = None
        if arguments.link != "none":
            link = stack.enter_context(Link(arguments.link, size))
        config = Config(
            cut=cut,
            workers=arguments.workers,
            rounds=arguments.rounds,
            warmup=arguments.warmup,
            densities=arguments.densities,
            diff_rounds=arguments.diff_rounds,
            threads=arguments.threads,
            seed=arguments.seed,
            window=arguments.window,
            first=arguments.first,
            addresses=tuple(link.address(r) if link else "127.0.0.1" for r in range(size)),
        )
        status = stack.enter_context(console.status(cut.describe()))
        ranks = stack.enter_context(
            Ranks(
                Path(__file__).with_name("ranks.py"),
                size,
                config,
                prefix=link.prefix if link else lambda rank: (),
                on_progress=lambda what: status.update(f"{cut.describe()}\n{what}"),
            )
        )
        result = ranks.run(arguments.timeout)[0]
        sample = result["link"]
        if link is not None:
            _require_shape(link, sample)
            sample |= {"shape": link.shape}
    document = {
        "command": stats.command(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "seed": arguments.seed,
        "machine": stats.machine(),
        "versions": stats.versions(),
        "load": {"before": round(load_before, 2), "after": round(os.getloadavg()[0], 2)},
        "model": cut.describe(),
        "settings": {
            "device": arguments.device,
            "workers": arguments.workers,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "warmup": arguments.warmup,
            "link": arguments.link,
            "first": arguments.first,
        },
        "window": result["window"],
        "link": sample,
        "densities": [report.density_section(d, 2 * cut.numel) for d in result["densities"]],
        "diff": [report.diff_section(d) for d in result["diff"]],
    }
    document["targets"] = report.targets(document)
    return document


def _require_shape(link: Link, sample: dict[str, float]) -> None:
    """TCP carries about 95 % of a link's bits as payload."""
    for way in ("there_mbit_s", "back_mbit_s"):
        share = sample[way] * 1e6 / link.bits_per_s
        if abs(share - 0.95) > _TOLERANCE:
            raise LinkError(
                f"the link of {link.rate} carried {sample[way]} Mbit/s in a plain transfer: it is "
                "not what it says, and no figure of this run would be"
            )


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/round.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="where the weights are")
    parser.add_argument("--workers", type=_count, default=2, help="worker processes (2)")
    parser.add_argument("--rounds", type=_count, default=30, help="measured rounds a density (30)")
    parser.add_argument("--warmup", type=_count, default=3, help="rounds before them (3)")
    parser.add_argument("--diff-rounds", type=_count, default=40, help="of the diff alone (40)")
    parser.add_argument(
        "--densities", type=_densities, default=(0.01,), help="shares that change, 0.01,0.001 say"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--layers", type=_count, help="so many layers, no embedding")
    size.add_argument(
        "--elements", type=_count, default=64_000_000, help="whole layers, then embedding rows"
    )
    parser.add_argument("--link", default="none", help="none, or a rate for tc: 1gbit (root)")
    parser.add_argument("--window", choices=["gloo", "bus"], default="gloo", help="ours (gloo)")
    parser.add_argument("--threads", type=_count, default=1, help="torch threads a process (1)")
    parser.add_argument(
        "--first", action="store_true", help="go before all that else runs here (root)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and changes (0)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for it all (1800)")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    arguments = parser.parse_args(words)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.parent}")
    return arguments


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def _densities(text: str) -> tuple[float, ...]:
    found = tuple(float(word) for word in text.split(","))
    if not all(0 < density <= 1 for density in found):
        raise argparse.ArgumentTypeError(f"shares are above 0 and at most 1, not {text}")
    return found


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

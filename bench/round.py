"""Rounds over real processes, beside dense and the peers' sparse way in the same run.

    python bench/round.py --device cpu
    python bench/round.py --device cpu --workers 3 --link 1gbit --json bench/results/….json
    python bench/round.py --device cuda --model 7b --workers 1      # one GPU a process

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

import torch
from rich.console import Console

import report
import stats
import targets
import words
from control import RankFailed, Ranks
from link import Link, LinkError
from ranks import Config
from shapes import MODELS, Cut

#: An error of this share in the rate of a shaped link makes its figures worthless.
_TOLERANCE = 0.12


def main() -> int:
    """Measure, print, and write the document; 1 if a method left other bits than the trainer's."""
    arguments = _parse(sys.argv[1:])
    # A table that is cut to 80 columns for a file says nothing.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    signal.signal(signal.SIGTERM, words.terminated)
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
    if "failed" in document:
        return 2
    equal = all(all(s["digests_equal"].values()) for s in document["densities"])
    return 0 if equal else 1


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the processes; the document."""
    cut = _cut(arguments)
    cuda = arguments.device == "cuda"
    densities = (*(n / cut.numel for n in arguments.changed), *arguments.densities)
    size = arguments.workers + 1
    load_before = os.getloadavg()[0]
    with ExitStack() as stack:
        link = None
        if arguments.link != "none":
            link = stack.enter_context(Link(arguments.link, size))
        config = Config(
            cut=cut,
            device=arguments.device,
            ways="device" if cuda else arguments.ways,
            workers=arguments.workers,
            rounds=arguments.rounds,
            warmup=arguments.warmup,
            seconds=arguments.seconds,
            densities=densities,
            diff_rounds=arguments.diff_rounds,
            threads=arguments.threads,
            seed=arguments.seed,
            window=arguments.window or ("nccl" if cuda else "gloo"),
            staging_nbytes=arguments.staging_mib and arguments.staging_mib << 20,
            first=arguments.first,
            addresses=tuple(link.address(r) if link else "127.0.0.1" for r in range(size)),
        )
        status = stack.enter_context(console.status(cut.describe()))
        measured: list[dict[str, Any]] = []

        def progress(what: str | dict[str, Any]) -> None:
            if isinstance(what, str):
                status.update(f"{cut.describe()}\n{what}")
            else:
                measured.append(what)

        ranks = stack.enter_context(
            Ranks(
                Path(__file__).with_name("ranks.py"),
                size,
                config,
                prefix=link.prefix if link else lambda rank: (),
                on_progress=progress,
            )
        )
        result = _result(ranks, arguments.timeout, measured)
        sample = result["link"]
        if link is not None and sample is not None:
            _require_shape(link, sample)
            sample |= {"shape": link.shape}
    document = {
        "command": stats.command(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "seed": arguments.seed,
        "machine": stats.machine() | (stats.gpus() if cuda else {}),
        "versions": stats.versions(cuda=cuda),
        "load": {"before": round(load_before, 2), "after": round(os.getloadavg()[0], 2)},
        "model": cut.describe(),
        "settings": {
            "device": arguments.device,
            "model": arguments.model or "cut",
            "ways": config.ways,
            "workers": arguments.workers,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "warmup": arguments.warmup,
            "link": arguments.link,
            "first": arguments.first,
            "seconds_a_density": arguments.seconds,
            "staging_mib": arguments.staging_mib,
        },
        "window": result["window"],
        "link": sample,
        "densities": [report.density_section(d, 2 * cut.numel) for d in result["densities"]],
    }
    if "failed" in result:
        document["failed"] = result["failed"]
    if "diff" in result:
        document["diff"] = [report.diff_section(d) for d in result["diff"]]
    if "answer_ms" in result:
        document["answer_ms"] = stats.spread(result["answer_ms"])
    if "held" in result:
        document["held_nbytes"] = result["held"]
    if arguments.beside is not None:
        earlier = json.loads(arguments.beside.read_text())
        document["beside"] = targets.growth(document, earlier)
    document["targets"] = targets.of_round(document)
    return document


def _result(ranks: Ranks, timeout_s: float, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The trainer's, or, if a rank fails after densities were measured, those and the reason."""
    try:
        found: dict[str, Any] = ranks.run(timeout_s)[0]
    except (RankFailed, TimeoutError) as exc:
        if not measured:
            raise
        window = measured[-1]["window"]
        found = {"link": None, "densities": measured, "window": window, "failed": str(exc)}
    return found


def _require_shape(link: Link, sample: dict[str, float]) -> None:
    """TCP carries about 95 % of a link's bits as payload."""
    for way in ("there_mbit_s", "back_mbit_s"):
        share = sample[way] * 1e6 / link.bits_per_s
        if abs(share - 0.95) > _TOLERANCE:
            raise LinkError(
                f"the link of {link.rate} carried {sample[way]} Mbit/s in a plain transfer: it is "
                "not what it says, and no figure of this run would be"
            )


def _cut(arguments: argparse.Namespace) -> Cut:
    if arguments.model is not None:
        return Cut.whole(MODELS[arguments.model])
    return Cut(arguments.layers, 0) if arguments.layers else Cut.of_elements(arguments.elements)


def _parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/round.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the weights are (cpu)")
    add("--workers", type=words.count, help="worker processes (2; on GPUs 1)")
    add("--rounds", type=words.count, default=30, help="measured rounds a density (30)")
    add("--warmup", type=words.count, default=3, help="rounds before them (3)")
    add("--seconds", type=float, default=float("inf"), help="a density ends after so many")
    add("--diff-rounds", type=words.count, default=40, help="of the diff alone, on CPUs (40)")
    add("--densities", type=_densities, default=(0.01,), help="shares that change, 0.01,0.001 say")
    add("--changed", type=_counts, default=(), help="the same as numbers of elements, 27000 say")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--model", choices=list(MODELS), help="a whole model (on GPUs 0.5b)")
    size.add_argument("--layers", type=words.count, help="so many layers of 0.5b, no embedding")
    size.add_argument(
        "--elements", type=words.count, default=64_000_000, help="whole layers, then embedding rows"
    )
    add("--link", default="none", help="none, or a rate for tc: 1gbit (root, CPUs)")
    add("--window", choices=["auto", "nccl", "gloo", "bus"], help="ours (gloo; on GPUs nccl)")
    add("--staging-mib", type=words.count, help="both bounds of Policy's staging (its own)")
    add("--threads", type=words.count, default=1, help="torch threads a process (1)")
    add("--first", action="store_true", help="go before all that else runs here (root)")
    add("--seed", type=int, default=0, help="of weights and changes (0)")
    add("--timeout", type=float, default=1800.0, help="seconds for it all (1800)")
    add("--json", type=Path, help="where to write what was measured")
    add("--beside", type=Path, help="a document of fewer workers: says how the round grew")
    # On CPUs the methods of GPUs can be tried, over gloo: their figures mean nothing.
    add("--ways", choices=["host", "device"], default="host", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.parent}")
    if arguments.beside is not None and not arguments.beside.is_file():
        parser.error(f"--beside: there is no file {arguments.beside}")
    if arguments.device == "cuda":
        arguments.workers = arguments.workers or 1
        if arguments.model is None and not arguments.layers:
            arguments.model = "0.5b"
        if arguments.link != "none":
            parser.error("--link shapes what CPUs send; GPUs of one host use NVLink or PCIe")
        if torch.cuda.device_count() <= arguments.workers:
            parser.error(
                f"--workers {arguments.workers} needs {arguments.workers + 1} GPUs, "
                f"{torch.cuda.device_count()} here"
            )
    arguments.workers = arguments.workers or 2
    return arguments


def _counts(text: str) -> tuple[int, ...]:
    return tuple(words.count(word) for word in text.split(","))


def _densities(text: str) -> tuple[float, ...]:
    found = tuple(float(word) for word in text.split(","))
    if not all(0 < density <= 1 for density in found):
        raise argparse.ArgumentTypeError(f"shares are above 0 and at most 1, not {text}")
    return found


if __name__ == "__main__":
    sys.exit(main())

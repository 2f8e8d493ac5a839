"""What was measured, as a document and as a table."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from stats import percentile, spread

TITLES = {
    "sparsecast": "sparsecast",
    "dense": "dense, one broadcast a tensor",
    "dense_safe": "dense, staged and checksummed",
    "peers": "the peers' sparse way",
    "buckets_256m": "dense in buckets of 256 MiB",
    "buckets_1g": "dense in buckets of 1 GiB",
    "pairs": "vLLM #40096's way",
    "nan_filled": "vLLM 0.33's way",
}
#: Of several ways to do the same, the better one counts.
BETTER_OF = {"dense_in_buckets": ("buckets_256m", "buckets_1g")}
STAGES = {
    "stage_diff": "diff",
    "stage_encode": "encode",
    "stage_seal": "seal: digest, checksum, thread",
    "stage_announce": "announce",
    "stage_ready": "ready, go",
    "stage_broadcast": "broadcast, check",
    "stage_apply": "apply",
}
#: What does not add up to the round: the workers' own clocks, and what follows a round.
WORKER = {
    "worker_receive": "worker: receive",
    "worker_check": "worker: check",
    "worker_staged_to_applied": "worker: staged → applied",
    "worker_apply": "worker: apply alone",
    "after_verify": "after it: verified everywhere",
    "worker_verify": "worker: digest of all weights",
}
_COUNTS = ("changed", "nbytes", "by_window", "attempt", "peak_trainer", "peak_worker")


def density_section(measured: dict[str, Any], dense_nbytes: int) -> dict[str, Any]:
    """One density of the document."""
    rounds = measured["rounds"]
    methods: dict[str, Any] = {}
    for name, found in rounds.items():
        parts = {key for one in found for key in one if key not in _COUNTS}
        methods[name] = {
            "nbytes": round(percentile([one["nbytes"] for one in found], 0.5)),
            "ms": {key: spread([one[key] for one in found]) for key in sorted(parts)},
        }
        if "peak_trainer" in found[0]:
            methods[name]["peak_nbytes"] = {
                side: round(max(one[f"peak_{side}"] for one in found))
                for side in ("trainer", "worker")
            }
    ours = rounds["sparsecast"]
    changed = sum(one["changed"] for one in ours)
    methods["sparsecast"] |= {
        "changed": round(changed / len(ours)),
        "bytes_per_changed": round(sum(one["nbytes"] for one in ours) / changed, 4),
        "rounds_not_at_once": sum(not one["by_window"] or one["attempt"] != 1 for one in ours),
    }

    def p50(method: str, part: str) -> float:
        return float(methods[method]["ms"][part]["p50"])

    def best(others: tuple[str, ...], part: str) -> float:
        return round(min(p50(other, part) for other in others) / p50("sparsecast", part), 3)

    others: dict[str, tuple[str, ...]] = {name: (name,) for name in methods if name != "sparsecast"}
    others |= {name: of for name, of in BETTER_OF.items() if set(of) <= methods.keys()}
    ratios = {f"{name}_to_sparsecast": best(of, "whole") for name, of in others.items()}
    ratios |= {
        f"{name}_to_sparsecast_wire_apply": best(of, "wire_apply") for name, of in others.items()
    }
    section = {
        "density": measured["density"],
        "dense_nbytes": dense_nbytes,
        "methods": methods,
        "ratios": ratios,
        "digests_equal": measured["digests"],
    }
    if "plain_ms" in measured:
        # What one broadcast of our payload takes by itself, beside what a worker waited for it.
        section["plain_broadcast_ms"] = spread(measured["plain_ms"])
        section["plain_broadcast_share"] = round(
            section["plain_broadcast_ms"]["p50"] / max(p50("sparsecast", "worker_receive"), 1e-6), 3
        )
    return section


def diff_section(measured: dict[str, Any]) -> dict[str, Any]:
    """The diff alone, of one density."""
    times = measured["times"]
    return {
        "density": measured["density"],
        "diff_ms": spread(times["diff"]),
        "not_equal_ms": spread(times["not_equal"]),
        "ratio": round(percentile(times["diff"], 0.5) / percentile(times["not_equal"], 0.5), 3),
    }


def show(document: dict[str, Any], console: Console) -> None:
    """Print the document for a person."""
    machine, versions, settings = (document[k] for k in ("machine", "versions", "settings"))
    machine_line = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
    if "gpus" in machine:
        machine_line += (
            f"{len(machine['gpus'])} GPUs: {', '.join(sorted(set(machine['gpus'])))}, driver "
            f"{machine['driver']}, NCCL {versions['nccl']}, Triton {versions['triton']}; "
        )
    head = Text.assemble(
        f"{document['command']}\n",
        (f"{document['model']}\n", "bold"),
        f"{settings['workers']} worker(s), {settings['threads']} torch thread(s) each, window "
        f"{document['window']}{_link(document)}\n",
        f"{machine_line}torch {versions['torch']}, nats-server {versions['nats-server']}; "
        f"load {document['load']['before']} → {document['load']['after']}"
        + (", this bench first (SCHED_RR)" if settings["first"] else ""),
    )
    parts: list[Any] = [head]
    for section in document["densities"]:
        parts += [_methods(section), _stages(section)]
        late = section["methods"]["sparsecast"]["rounds_not_at_once"]
        if late:
            parts.append(Text(f"{late} round(s) of ours took the log, or a second attempt", "red"))
        wrong = [name for name, equal in section["digests_equal"].items() if not equal]
        parts.append(
            Text(f"not the trainer's bits: {', '.join(wrong)}", "bold red")
            if wrong
            else Text("every worker of every method holds the trainer's bits", "green")
        )
    if "failed" in document:
        parts.append(Text(f"the run failed after these: {document['failed']}", "bold red"))
    if "diff" in document:
        parts.append(_diffs(document))
    if "held_nbytes" in document:
        parts.append(_memory(document))
    if "answer_ms" in document:
        found = document["answer_ms"]
        parts.append(
            Text(f"the answers alone, in every method beside ours: {_ms(found['p50'])} ms")
        )
    if document["targets"]:
        parts.append(targets_table(document["targets"]))
    console.print(Group(*parts))


def _link(document: dict[str, Any]) -> str:
    sample = document["link"]
    if sample is None:
        return ""
    return (
        f", link {document['settings']['link']} (a plain transfer: "
        f"{sample['there_mbit_s']:,.0f} Mbit/s there, {sample['back_mbit_s']:,.0f} back, round "
        f"trip {sample['round_trip_ms']} ms)"
    )


def _methods(section: dict[str, Any]) -> Table:
    n = section["methods"]["sparsecast"]["ms"]["whole"]["n"]
    title = (
        f"{section['density']:.3%} changed ({section['methods']['sparsecast']['changed']:,}): "
        f"publish to applied everywhere, ms, {n} rounds"
    )
    spreads = ("p50", "min", "p10", "p90", "max")
    table = table_of(title, "method", "bytes", *spreads, "wire + apply", "×")
    ours = section["methods"]["sparsecast"]["ms"]["whole"]["p50"]
    for name, method in section["methods"].items():
        whole = method["ms"]["whole"]
        table.add_row(
            TITLES[name],
            f"{method['nbytes']:,}",
            *(_ms(whole[key]) for key in spreads),
            _ms(method["ms"]["wire_apply"]["p50"]),
            f"{whole['p50'] / ours:.2f}",
        )
    return table


def _stages(section: dict[str, Any]) -> Table:
    method = section["methods"]["sparsecast"]
    title = f"sparsecast, stage by stage, ms ({method['bytes_per_changed']} B a changed element)"
    table = table_of(title, "stage", "p50", "min", "p10", "p90", "max")
    rows = STAGES | {"bus": "bus: announce → all ready → go", "publish": "publish() returns after"}
    for key, name in (rows | WORKER).items():
        found = method["ms"][key]
        table.add_row(name, *(_ms(found[k]) for k in ("p50", "min", "p10", "p90", "max")))
    if "plain_broadcast_ms" in section:
        found = section["plain_broadcast_ms"]
        name = "one plain broadcast of these bytes"
        table.add_row(name, *(_ms(found[k]) for k in ("p50", "min", "p10", "p90", "max")))
    return table


def _memory(document: dict[str, Any]) -> Table:
    """GPU memory beside the weights, of the density nearest to 1 %; the document has all."""
    section = min(document["densities"], key=lambda found: abs(found["density"] - 0.01))
    table = table_of(
        f"memory beside the weights, MiB, {section['density']:.3%} changed",
        *("method", "trainer: held", "in a round", "worker: held", "in a round"),
    )
    held = document["held_nbytes"]
    for name, method in section["methods"].items():
        cells = []
        for side in ("trainer", "worker"):
            for nbytes in (held[side].get(name, 0), method["peak_nbytes"][side]):
                cells.append(f"{nbytes / 2**20:,.0f}")
        table.add_row(TITLES[name], *cells)
    return table


def _diffs(document: dict[str, Any]) -> Table:
    table = table_of(
        "the diff alone, ms", "changed", "Shadow.diff p50", "min", "torch != p50", "min", "ratio"
    )
    for section in document["diff"]:
        ours, theirs = section["diff_ms"], section["not_equal_ms"]
        table.add_row(
            f"{section['density']:.3%}",
            *(_ms(v) for v in (ours["p50"], ours["min"], theirs["p50"], theirs["min"])),
            f"{section['ratio']:.2f}",
        )
    return table


def targets_table(found: list[dict[str, Any]]) -> Table:
    """What was aimed at, what was seen, and whether that is enough."""
    table = table_of("targets", "what", "target", "seen", "")
    for target in found:
        met = Text("met", "green") if target["met"] else Text("missed", "bold red")
        table.add_row(target["what"], target["bound"], f"{target['value']:.3g}", met)
    return table


def table_of(title: str, *columns: str) -> Table:
    """An empty table, its figures to the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"

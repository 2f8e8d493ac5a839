"""What was measured, as a document and as a table."""

from __future__ import annotations

from collections.abc import Callable
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
}
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
_COUNTS = ("changed", "nbytes", "by_window", "attempt")


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
    ours = rounds["sparsecast"]
    changed = sum(one["changed"] for one in ours)
    methods["sparsecast"] |= {
        "changed": round(changed / len(ours)),
        "bytes_per_changed": round(sum(one["nbytes"] for one in ours) / changed, 4),
        "rounds_not_at_once": sum(not one["by_window"] or one["attempt"] != 1 for one in ours),
    }

    def p50(method: str, part: str) -> float:
        return float(methods[method]["ms"][part]["p50"])

    ratios = {
        f"{other}_to_sparsecast": round(p50(other, "whole") / p50("sparsecast", "whole"), 3)
        for other in ("dense", "dense_safe", "peers")
    }
    ratios |= {
        f"{other}_to_sparsecast_wire_apply": round(
            p50(other, "wire_apply") / p50("sparsecast", "wire_apply"), 3
        )
        for other in ("dense", "dense_safe", "peers")
    }
    return {
        "density": measured["density"],
        "dense_nbytes": dense_nbytes,
        "methods": methods,
        "ratios": ratios,
        "digests_equal": measured["digests"],
    }


def diff_section(measured: dict[str, Any]) -> dict[str, Any]:
    """The diff alone, of one density."""
    times = measured["times"]
    return {
        "density": measured["density"],
        "diff_ms": spread(times["diff"]),
        "not_equal_ms": spread(times["not_equal"]),
        "ratio": round(percentile(times["diff"], 0.5) / percentile(times["not_equal"], 0.5), 3),
    }


def targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, for 1 % changed, where this run can tell."""
    found: list[dict[str, Any]] = []

    def add(what: str, value: float, bound: float, least: bool) -> None:
        met = value >= bound if least else value <= bound
        sign = "≥" if least else "≤"
        found.append({"what": what, "value": value, "bound": f"{sign} {bound:g}", "met": met})

    shaped = document["settings"]["link"] != "none"
    for section in document["densities"]:
        if abs(section["density"] - 0.01) > 1e-6:
            continue
        ours, ratios = section["methods"]["sparsecast"], section["ratios"]
        if shaped:
            add("whole round, dense to ours", ratios["dense_to_sparsecast"], 10, True)
            add("whole round, peers to ours", ratios["peers_to_sparsecast"], 1.25, True)
        else:
            value = ratios["dense_safe_to_sparsecast_wire_apply"]
            add("wire + apply, dense received as safely to ours", value, 5, True)
        add("bytes a changed element", ours["bytes_per_changed"], 4.1, False)
        if document["settings"]["workers"] == 2 and not shaped:
            add("announce → all ready → go, ms at p50", ours["ms"]["bus"]["p50"], 2, False)
    for section in document["diff"]:
        if abs(section["density"] - 0.01) < 1e-6:
            add("Shadow.diff to torch's !=", section["ratio"], 2.2, False)
    return found


def show(document: dict[str, Any], console: Console) -> None:
    """Print the document for a person."""
    machine, versions, settings = (document[k] for k in ("machine", "versions", "settings"))
    sample = document["link"]
    head = Text.assemble(
        f"{document['command']}\n",
        (f"{document['model']}\n", "bold"),
        f"{settings['workers']} worker(s), {settings['threads']} torch thread(s) each, window "
        f"{document['window']}, link {settings['link']} (a plain transfer: "
        f"{sample['there_mbit_s']:,.0f} Mbit/s there, {sample['back_mbit_s']:,.0f} back, round "
        f"trip {sample['round_trip_ms']} ms)\n",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        f"torch {versions['torch']}, nats-server {versions['nats-server']}; "
        f"load {document['load']['before']} → {document['load']['after']}"
        + (", this bench first (SCHED_RR)" if settings["first"] else ""),
    )
    parts: list[Any] = [head]
    for section in document["densities"]:
        parts += [_methods(section), _stages(section)]
        wrong = [name for name, equal in section["digests_equal"].items() if not equal]
        parts.append(
            Text(f"not the trainer's bits: {', '.join(wrong)}", "bold red")
            if wrong
            else Text("every worker of every method holds the trainer's bits", "green")
        )
    parts.append(_diffs(document))
    if document["targets"]:
        parts.append(_targets(document["targets"]))
    console.print(Group(*parts))


def _methods(section: dict[str, Any]) -> Table:
    title = f"{section['density']:.3%} changed: publish to applied everywhere, ms"
    table = _table(title, "method", "bytes", "p50", "min", "p10", "p90", "max", "wire + apply", "×")
    ours = section["methods"]["sparsecast"]["ms"]["whole"]["p50"]
    for name, method in section["methods"].items():
        whole = method["ms"]["whole"]
        table.add_row(
            TITLES[name],
            f"{method['nbytes']:,}",
            *(_ms(whole[key]) for key in ("p50", "min", "p10", "p90", "max")),
            _ms(method["ms"]["wire_apply"]["p50"]),
            f"{whole['p50'] / ours:.2f}",
        )
    return table


def _stages(section: dict[str, Any]) -> Table:
    method = section["methods"]["sparsecast"]
    title = f"sparsecast, stage by stage, ms ({method['bytes_per_changed']} B a changed element)"
    table = _table(title, "stage", "p50", "min", "p10", "p90", "max")
    rows = STAGES | {"bus": "bus: announce → all ready → go", "publish": "publish() returns after"}
    for key, name in (rows | WORKER).items():
        found = method["ms"][key]
        table.add_row(name, *(_ms(found[k]) for k in ("p50", "min", "p10", "p90", "max")))
    return table


def _diffs(document: dict[str, Any]) -> Table:
    table = _table(
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


def _targets(found: list[dict[str, Any]]) -> Table:
    table = _table("targets", "what", "bound", "measured", "")
    for target in found:
        met = Text("met", "green") if target["met"] else Text("missed", "bold red")
        table.add_row(target["what"], target["bound"], f"{target['value']:.3g}", met)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


_ms: Callable[[float], str] = "{:.2f}".format

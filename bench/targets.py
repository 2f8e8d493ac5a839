"""What was aimed at, and what a run has to say to it."""

from __future__ import annotations

from typing import Any

Target = dict[str, Any]


def of_round(document: dict[str, Any]) -> list[Target]:
    """Those that this run of round.py can tell: target, seen, met."""
    ways = document["settings"]["ways"]
    return _on_cpus(document) if ways == "host" else _on_gpus(document)


def target(what: str, seen: float, bound: float, *, least: bool) -> Target:
    """One line: `seen` is at least, or at most, `bound`."""
    sign = "≥" if least else "≤"
    met = seen >= bound if least else seen <= bound
    return {"what": what, "value": seen, "bound": f"{sign} {bound:g}", "met": met}


def growth(document: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """How our round grew from an earlier document's number of workers to this one's."""

    def p50s(of: dict[str, Any]) -> dict[str, float]:
        return {
            f"{d['density']:.3%}": d["methods"]["sparsecast"]["ms"]["whole"]["p50"]
            for d in of["densities"]
        }

    if document["model"] != earlier["model"]:
        raise ValueError(f"not the same model: {document['model']} and {earlier['model']}")
    now, before = p50s(document), p50s(earlier)
    return {
        "command": earlier["command"],
        "workers": earlier["settings"]["workers"],
        "ratios": {key: round(now[key] / before[key], 3) for key in now if key in before},
    }


def p50(work: dict[str, Any]) -> float:
    """ms of a work of kernels.py by the device's clock."""
    return float(work["device_ms"]["p50"])


def of_kernels(document: dict[str, Any]) -> list[Target]:
    """Those that a run of kernels.py can tell; they are for 7B."""
    found: list[Target] = []

    def most(what: str, seen: float, bound: float) -> None:
        found.append(target(f"7B, {what}", round(seen, 3), bound, least=False))

    def diffs(section: dict[str, Any], copy: float, bound: float) -> None:
        for work, what in (
            ("diff", "diff + encode to a copy"),
            ("diff_behind", "the same behind queued work"),
        ):
            most(f"{section['density']:.3%}: {what}", p50(section["works"][work]) / copy, bound)

    for model in document["models"]:
        if model["name"] != "7b":
            continue
        works, slices = model["works"], model["digest_slices_ms"]
        copy = p50(works["copy"])
        most("digest of all weights to reading them once", p50(works["digest"]) / (copy / 2), 1.6)
        if slices is not None:
            most("the longest slice of it, ms", slices["max"], 0.5)
        for section in model["densities"]:
            works, share = section["works"], f"{section['density']:.3%}"
            if "failed" in section:
                continue
            if abs(section["density"] - 0.01) < 1e-6:
                diffs(section, copy, 1.25)
                most(f"{share}: bytes a changed element", section["bytes_per_changed"], 4.1)
                put = p50(works["index_put"])
                most(f"{share}: check + apply to index_put", p50(works["check_apply"]) / put, 1.1)
            if abs(section["density"] - 0.00005) < 1e-8:
                diffs(section, copy, 1.05)
    return found


def _on_gpus(document: dict[str, Any]) -> list[Target]:
    model = document["settings"]["model"]
    found: list[Target] = []

    def least(what: str, seen: float, bound: float) -> None:
        found.append(target(what, seen, bound, least=True))

    def most(what: str, seen: float, bound: float) -> None:
        found.append(target(what, seen, bound, least=False))

    for section in document["densities"]:
        density, ratios = section["density"], section["ratios"]
        ours = section["methods"]["sparsecast"]
        share = f"{density:.3%}"
        pairs, nan = ratios["pairs_to_sparsecast"], ratios["nan_filled_to_sparsecast"]
        buckets = ratios["dense_in_buckets_to_sparsecast"]
        one_percent = abs(density - 0.01) < 1e-6
        if one_percent and model == "7b":
            least(f"{share}: vLLM #40096's way to ours", pairs, 4.5)
            least(f"{share}: vLLM 0.33's way to ours", nan, 6.5)
            least(f"{share}: dense in buckets to ours", buckets, 3)
            most(f"{share}: the aim, the whole round in ms", ours["ms"]["whole"]["p50"], 12)
            least(f"{share}: rate of a plain broadcast", section["plain_broadcast_share"], 0.85)
        if model == "0.5b" and round(density * section["dense_nbytes"] / 2) == 27_000:
            least("27,000 changed: vLLM #40096's way to ours", pairs, 12)
            most("27,000 changed: MB on the wire", round(ours["nbytes"] / 1e6, 4), 0.16)
        if one_percent and model == "0.5b":
            least(f"{share}: vLLM #40096's way to ours", pairs, 12)
            least(f"{share}: dense in buckets to ours", buckets, 1.4)
        if one_percent:
            most(f"{share}: bytes a changed element", ours["bytes_per_changed"], 4.1)
        least(f"{share}: dense in buckets to ours, at no density below", buckets, 0.909)
    if "beside" in document:
        earlier = document["beside"]
        for share, ratio in earlier["ratios"].items():
            workers = f"{document['settings']['workers']} worker(s) to {earlier['workers']}"
            most(f"{share}: our round with {workers}", ratio, 1.2)
    return found


def _on_cpus(document: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[Target] = []

    def add(what: str, value: float, bound: float, least: bool) -> None:
        found.append(target(what, value, bound, least=least))

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
    for section in document.get("diff", ()):
        if abs(section["density"] - 0.01) < 1e-6:
            add("Shadow.diff to torch's !=", section["ratio"], 2.2, False)
    return found

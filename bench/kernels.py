"""The data path on one device, kernel by kernel, beside the memory's floor and plain torch.

    python bench/kernels.py --device cuda --models 0.5b,7b
    python bench/kernels.py --device cpu --models tiny --densities 0.01

bench/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import inspect
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.text import Text
from torch import Tensor

import shares
import stats
import targets
from devices import Device
from report import table_of, targets_table
from shapes import MODELS, Cut, Tensors, make_weights, train_step
from sparsecast import Patch, digest
from sparsecast.pipeline.delta import (
    Lookup,
    Shadow,
    apply_checked,
    check,
    checksum,
    named_tensors,
)

DENSITIES = (0.00005, 0.001, 0.01, 0.03, 0.1, 0.5, 1.0)
#: Beyond this share the ready int64 indices of index_put alone would outgrow a GPU.
_INDEX_UP_TO = 0.11
_WARMUP = 2
_LEAST = 3
#: What changes where a rank's share of an update is measured.
_SHARED = 0.01
#: A tensor of fewer elements costs a launch, not bandwidth.
_BIG = 1 << 20


class Clock:
    """Times one piece of work again and again: `repeats` times, fewer when `seconds` are over."""

    def __init__(self, device: Device, repeats: int, seconds: float) -> None:
        self._device = device
        self._repeats = repeats
        self._seconds = seconds

    def of(
        self,
        work: Callable[[], Any],
        before: Callable[[], Any] | None = None,
        *,
        behind: bool = False,
    ) -> dict[str, Any]:
        """The device's and the host's ms of `work`, and the memory on top of what was held;
        see Device.timed()."""
        device_ms, host_ms = [], []
        end = time.monotonic() + self._seconds
        nbytes = 0
        self._device.wake()
        for number in range(-_WARMUP, self._repeats):
            if number >= _LEAST and time.monotonic() > end:
                break
            if before is not None:
                before()
            self._device.watch()
            on_device, on_host = self._device.timed(work, behind=behind)
            if number >= 0:
                device_ms.append(on_device)
                host_ms.append(on_host)
                nbytes = max(nbytes, self._device.peak())
        return {
            "device_ms": stats.spread(device_ms),
            "host_ms": stats.spread(host_ms),
            "peak_nbytes": nbytes,
        }


class Subject:
    """A model in two states, A and B, and a shadow that goes back and forth between them."""

    def __init__(self, cut: Cut, device: Device, clock: Clock, seed: int) -> None:
        self._device = device
        self._clock = clock
        self._random = torch.Generator(device.torch).manual_seed(seed + 1)
        self._versions = itertools.count()
        self._numel = cut.numel
        self._a = make_weights(cut, seed, device.torch)
        self._b = {name: tensor.clone() for name, tensor in self._a.items()}
        #: What a trainer has: tensors that change where they lie. It looks them up for every diff.
        self._live = Lookup({name: tensor.clone() for name, tensor in self._a.items()})
        self._flat = torch.empty(cut.numel, dtype=torch.int16, device=device.torch)

    def states(self) -> dict[str, Any]:
        """What does not depend on how much changes."""
        big = [tensor.view(-1) for tensor in self._a.values() if tensor.numel() >= _BIG]
        words = [tensor[: tensor.numel() & ~3].view(torch.int64) for tensor in big]
        found = {"copy": self._copy()}
        found["sum"] = self._clock.of(lambda: [part.sum() for part in words])
        self._shadow = Shadow(self._live.tensors())
        manifest = self._shadow.manifest
        found["digest"] = self._clock.of(lambda: digest(self._live.tensors(), manifest=manifest))
        found["named_tensors"] = self._clock.of(lambda: named_tensors(self._a))
        self._held = Lookup({name: tensor.clone() for name, tensor in self._a.items()})
        return {"works": found, "digest_slices_ms": self._slices()}

    def _copy(self) -> dict[str, Any]:
        other = torch.empty_like(self._flat)
        return self._clock.of(lambda: other.copy_(self._flat))

    def _slices(self) -> dict[str, float] | None:
        """ms of each slice of a digest, between its pauses; None if it makes none."""
        if "pause" not in inspect.signature(digest).parameters:
            return None
        slices: list[float] = []
        for _ in range(_LEAST):
            last: float | None = None

            def pause(*_: Any) -> None:
                nonlocal last
                now = time.perf_counter()
                # Before the first one ends tensors are looked up, too.
                if last is not None:
                    slices.append(1e3 * (now - last))
                last = now

            kept: Any = {"pause": pause}
            digest(self._live.tensors(), manifest=self._shadow.manifest, **kept)
        return stats.spread(slices) if slices else None

    def density(self, density: float) -> dict[str, Any]:
        """All that depends on how much changes; what became of it if memory ran out."""
        found = self._within_memory(lambda: self._density(density))
        return {"density": density, "exact": False, "works": {}} | found

    def shares(self) -> dict[str, Any]:
        """What ranks pay for their shares of an update; what became of it if memory ran out."""
        found = self._within_memory(self._shares)
        return {"density": _SHARED, "exact": False, "shares": {}} | found

    def _within_memory(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return work()
        except torch.OutOfMemoryError as exc:
            reason = str(exc).split("\n")[0]
        # Outside the handler, whose traceback holds what filled the memory.
        gc.collect()
        self._shadow = Shadow(self._a)
        _copy(self._a, self._held.tensors())
        return {"failed": reason}

    def _density(self, density: float) -> dict[str, Any]:
        _copy(self._a, self._b)
        train_step(self._b, density, self._random)
        works: dict[str, Any] = {}
        ways = itertools.cycle((self._b, self._a))
        live = self._live.tensors()

        def step() -> None:
            _copy(next(ways), live)

        works["diff"] = self._clock.of(self._diff, step)
        works["diff_behind"] = self._clock.of(self._diff, step, behind=True)
        works["diff_ready"] = self._clock.of(self._ready, step)
        self._become(self._a)
        found = self._become(self._b)
        patch = found.patch
        facts = {
            "density": density,
            "changed": patch.changed,
            "nbytes": patch.nbytes,
            "encoding": patch.encoding,
            "bytes_per_changed": round(patch.nbytes / max(patch.changed, 1), 4),
        }
        works |= self._receiver(patch)
        works |= self._torch(density)
        exact = digest(self._held.tensors()) == digest(self._b) == found.digest
        # The next density starts from the first state again.
        self._become(self._a)
        _copy(self._a, self._held.tensors())
        return facts | {"exact": exact, "works": works}

    def _shares(self) -> dict[str, Any]:
        _copy(self._a, self._b)
        train_step(self._b, _SHARED, self._random)
        self._become(self._a)
        patch = self._become(self._b).patch
        checked = check(Patch.from_buffer(patch.buffer), self._shadow.manifest)
        found = shares.measure(self._clock.of, checked, self._a, self._b)
        ways = itertools.cycle((self._a, self._b))
        live = self._live.tensors()
        found["whole"]["diff"] = self._clock.of(self._diff, lambda: _copy(next(ways), live))
        self._become(self._a)
        return {"exact": all(share["exact"] for share in found.values()), "shares": found}

    def _diff(self) -> Any:
        version = next(self._versions)
        tensors = self._live.tensors()
        return self._shadow.diff(tensors, base_version=version, version=version + 1)

    def _become(self, state: Tensors) -> Any:
        _copy(state, self._live.tensors())
        return self._diff()

    def _ready(self) -> tuple[int, int]:
        found = self._diff()
        return found.digest, found.checksum

    def _receiver(self, patch: Patch) -> dict[str, Any]:
        buffer, manifest = patch.buffer, self._shadow.manifest

        def checked() -> Any:
            # A worker has bytes, and parses them.
            return check(Patch.from_buffer(buffer), manifest)

        ready = checked()
        return {
            "checksum": self._clock.of(lambda: checksum(buffer)),
            "check": self._clock.of(checked),
            "apply": self._clock.of(lambda: apply_checked(ready, self._held.tensors())),
            "check_apply": self._clock.of(lambda: apply_checked(checked(), self._held.tensors())),
        }

    def _torch(self, density: float) -> dict[str, Any]:
        """Plain torch at the same work: a diff a tensor; writing with ready int64 indices."""
        pairs = [
            (_bits(self._a[name]), _bits(self._b[name]), _bits(tensor))
            for name, tensor in self._held.tensors().items()
        ]

        def find() -> None:
            for old, now, _ in pairs:
                now.index_select(0, (old != now).nonzero().view(-1))

        works = {"torch_diff": self._clock.of(find)}
        if density > _INDEX_UP_TO:
            return works
        puts, places, start = [], [], 0
        for old, now, held in pairs:
            idx = (old != now).nonzero().view(-1)
            if idx.numel():
                puts.append((held, idx, now.index_select(0, idx)))
                places.append(idx + start)
            start += now.numel()
        every, values = torch.cat(places), torch.cat([put[2] for put in puts])

        def put() -> None:
            for held, idx, new in puts:
                held.index_put_((idx,), new)

        works["index_put"] = self._clock.of(put)
        works["index_put_fused"] = self._clock.of(lambda: self._flat.index_put_((every,), values))
        return works


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16).view(-1)


def main() -> int:
    """Measure, print, write; 1 if an applied patch left other bits than the trainer's."""
    arguments = _parse(sys.argv[1:])
    console = Console() if sys.stdout.isatty() else Console(width=150)
    device = Device(arguments.device)
    cuda = device.is_cuda
    document: dict[str, Any] = {
        "command": stats.command(sys.argv[1:], "kernels"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "seed": arguments.seed,
        "machine": stats.machine() | (stats.gpus() if cuda else {}),
        "versions": stats.versions(cuda=cuda),
        "load": {"before": round(os.getloadavg()[0], 2)},
        "settings": {"device": arguments.device, "repeats": arguments.repeats},
        "models": [],
    }
    for name in arguments.models:
        document["models"].append(_model(name, device, arguments))
        document["load"]["after"] = round(os.getloadavg()[0], 2)
        document["targets"] = targets.of_kernels(document)
        # After each: what ends a run in the next model does not take this one along.
        if arguments.json is not None:
            text = json.dumps(document, indent=1, ensure_ascii=False)
            arguments.json.write_text(text + "\n")
    show(document, console)
    exact = (
        m["ranks"]["exact"] and all(d["exact"] for d in m["densities"]) for m in document["models"]
    )
    return 0 if all(exact) else 1


def _model(name: str, device: Device, arguments: argparse.Namespace) -> dict[str, Any]:
    cut = Cut.whole(MODELS[name])
    clock = Clock(device, arguments.repeats, arguments.seconds)
    subject = Subject(cut, device, clock, arguments.seed)
    found = {"name": name, "model": cut.describe(), "nbytes": 2 * cut.numel} | subject.states()
    found["densities"] = []
    for density in (*(n / cut.numel for n in arguments.changed), *arguments.densities):
        print(f"{name}: {density:.3%}", file=sys.stderr, flush=True)
        found["densities"].append(subject.density(density))
    print(f"{name}: a rank's share", file=sys.stderr, flush=True)
    found["ranks"] = subject.shares()
    del subject
    gc.collect()
    if device.is_cuda:
        torch.cuda.empty_cache()
    return found


# ---- for a person


def show(document: dict[str, Any], console: Console) -> None:
    """Print the document: p50 by the device's clock, unless a column says otherwise."""
    machine, versions = document["machine"], document["versions"]
    gpu = f"{machine['gpus'][0]}, driver {machine['driver']}; " if machine.get("gpus") else ""
    head = (
        f"{document['command']}\n{gpu}{machine['cpu']}; torch {versions['torch']}, Triton "
        f"{versions.get('triton', 'none')}"
    )
    parts: list[Any] = [Text(head)]
    for model in document["models"]:
        parts += [Text(model["model"], style="bold"), _states(model), _densities(model)]
        ranks = model["ranks"]
        if "failed" not in ranks:
            parts.append(shares.table(ranks))
        failed = [f"{d['density']:.3%}: {d['failed']}" for d in model["densities"] if "failed" in d]
        failed += [f"a rank's share: {ranks['failed']}"] if "failed" in ranks else []
        parts += [Text(line, "bold red") for line in failed]
        wrong = [d["density"] for d in (*model["densities"], ranks) if not d["exact"]]
        parts.append(
            Text(f"not shown to be the trainer's bits at {wrong}", "bold red")
            if wrong
            else Text("what was applied holds the trainer's bits at every density", "green")
        )
    if document["targets"]:
        parts.append(targets_table(document["targets"]))
    console.print(Group(*parts))


def _states(model: dict[str, Any]) -> Any:
    names = {
        "copy": "a copy of all bytes: the floor",
        "sum": "torch's sum of all int64 words",
        "digest": "digest of the whole state",
        "named_tensors": "named_tensors",
    }
    columns = ("device p50", "p10", "p90", "host p50", "× reading once", "n")
    table = table_of("whatever changes, ms", "work", *columns)
    read_ms = targets.p50(model["works"]["copy"]) / 2
    for key, name in names.items():
        one = model["works"][key]
        found = one["device_ms"]
        table.add_row(
            name,
            *(f"{found[k]:.3f}" for k in ("p50", "p10", "p90")),
            f"{one['host_ms']['p50']:.3f}",
            f"{found['p50'] / read_ms:.2f}",
            str(found["n"]),
        )
    slices = model["digest_slices_ms"]
    if slices is not None:
        table.add_row("its slices", *(f"{slices[k]:.3f}" for k in ("p50", "p10", "p90")))
        table.add_row("its longest slice", f"{slices['max']:.3f}")
    return table


def _densities(model: dict[str, Any]) -> Any:
    floor = targets.p50(model["works"]["copy"])
    table = table_of(
        "diff to apply, ms",
        *("changed", "encoding", "B each", "diff", "× copy", "behind", "× copy", "returns"),
        *("ready", "torch diff"),
        *("checksum", "check", "apply", "both", "index_put", "fused", "both ×"),
    )
    for found in model["densities"]:
        if "failed" in found:
            table.add_row(f"{found['density']:.3%}", "failed")
            continue
        works = found["works"]

        def ms(key: str, clock: str = "device_ms", works: Any = works) -> str:
            return f"{works[key][clock]['p50']:.3f}" if key in works else "–"

        put = targets.p50(works["index_put"]) if "index_put" in works else None
        table.add_row(
            *(f"{found['density']:.3%}", found["encoding"], f"{found['bytes_per_changed']:.3f}"),
            *(ms("diff"), f"{targets.p50(works['diff']) / floor:.2f}", ms("diff_behind")),
            *(f"{targets.p50(works['diff_behind']) / floor:.2f}", ms("diff", "host_ms")),
            *(ms("diff_ready", "host_ms"), ms("torch_diff"), ms("checksum"), ms("check")),
            *(ms("apply"), ms("check_apply"), ms("index_put"), ms("index_put_fused")),
            f"{targets.p50(works['check_apply']) / put:.2f}" if put else "–",
        )
    return table


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/kernels.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda", help="where the weights are (cuda)")
    add("--models", type=_models, default=("0.5b", "7b"), help="of 0.5b, 7b, tiny (0.5b,7b)")
    add("--densities", type=_numbers, default=DENSITIES, help="shares that change")
    add("--changed", type=_numbers, default=(), help="the same as numbers of elements")
    add("--repeats", type=int, default=30, help="of each work (30)")
    add("--seconds", type=float, default=2.0, help="after which a work is not repeated (2)")
    add("--seed", type=int, default=0, help="of weights and changes (0)")
    add("--json", type=Path, help="where to write what was measured")
    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if not all(0 < density <= 1 for density in arguments.densities):
        parser.error("--densities: shares are above 0 and at most 1")
    if any(count < 1 for count in arguments.changed):
        parser.error("--changed: numbers of elements are at least 1")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.parent}")
    return arguments


def _models(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in MODELS]:
        raise argparse.ArgumentTypeError(f"no model {unknown[0]}, only {', '.join(MODELS)}")
    return names


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


if __name__ == "__main__":
    sys.exit(main())

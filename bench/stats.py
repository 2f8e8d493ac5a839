"""Spread of what was measured, and the machine that it was measured on."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sparsecast
from sparsecast.pipeline.bus.broker import server_binary

Spread = dict[str, float]


def percentile(values: Sequence[float], share: float) -> float:
    """The value at `share` (0 to 1) of the sorted values, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> Spread:
    """p50, p10, p90, min, max and how many."""
    return {
        "p50": round(percentile(values, 0.5), 3),
        "p10": round(percentile(values, 0.1), 3),
        "p90": round(percentile(values, 0.9), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
        "n": len(values),
    }


def cpu_s(pid: int) -> float:
    """CPU seconds, user and system, that a process has had so far; in ticks of the kernel."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, str | int | float]:
    """CPU, cores, kernel and memory; no name of the host."""
    model = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": f"{platform.system()} {platform.release()}",
        "memory_gib": round(pages / 2**30, 1),
    }


def gpus() -> dict[str, Any]:
    """The GPUs' names, their driver and how they are linked, as far as nvidia-smi tells."""
    told = [line.partition(", ") for line in _told("nvidia-smi", *_QUERY)]
    return {
        "gpus": [name for name, _, _ in told],
        "driver": told[0][2] if told else "",
        "topology": [
            re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip()
            for line in _told("nvidia-smi", "topo", "-m")
            if "GPU" in line
        ],
    }


_QUERY = ("--query-gpu=name,driver_version", "--format=csv,noheader")


def versions(*, cuda: bool = False) -> dict[str, str]:
    """What was measured, and what it ran on."""
    told = subprocess.run(
        [str(server_binary()), "--version"], capture_output=True, text=True, timeout=10, check=True
    )
    found = {
        "sparsecast": sparsecast.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nats-py": _version("nats-py"),
        "nats-server": told.stdout.strip().rpartition("v")[2],
    }
    if cuda:
        found |= {
            "cuda": str(torch.version.cuda),
            "triton": _version("triton"),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "nccl4py": _version("nccl4py"),
        }
    return found


def command(arguments: Sequence[str], program: str = "round") -> str:
    """The command line, to be typed in the root of the repository; paths by their names."""
    named = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return shlex.join(["python", f"bench/{program}.py", *named])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _told(*words: str) -> list[str]:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _commit() -> str:
    """Of the checkout; in a copy of the files alone, what BENCH_COMMIT says."""

    def git(*words: str) -> str:
        folder = str(Path(__file__).parent)
        told = subprocess.run(
            ["git", "-C", folder, *words], capture_output=True, text=True, timeout=10
        )
        return told.stdout.strip() if told.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=12", "HEAD")
    except OSError:
        head = ""
    if not head:
        return os.environ.get("BENCH_COMMIT", "")
    return f"{head}, with changes" if git("status", "--short", "-uno") else head


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

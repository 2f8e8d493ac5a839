"""What nvidia-smi says of the GPUs: seen without torch, and what torch does not tell."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
SMI_S = 8.0


@dataclass(frozen=True, slots=True)
class Smi:
    """The GPUs of the machine: driver by UUID, and links between two UUIDs (both orders)."""

    drivers: dict[str, str] = field(default_factory=dict)
    links: dict[tuple[str, str], str] = field(default_factory=dict)


def ask() -> Smi:
    """Ask nvidia-smi, within some seconds; nothing if it is not there or fails."""
    listed = _run("--query-gpu=index,uuid,driver_version", "--format=csv,noheader")
    drivers, uuids = parse_list(listed)
    if len(uuids) < 2:
        return Smi(drivers)
    return Smi(drivers, parse_links(_run("topo", "-m"), uuids))


def parse_list(text: str) -> tuple[dict[str, str], dict[int, str]]:
    """Drivers by UUID and UUIDs by nvidia-smi's index, of its list in CSV."""
    drivers, uuids = {}, {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3 and cells[0].isdigit() and cells[1].startswith("GPU-"):
            uuids[int(cells[0])] = cells[1]
            drivers[cells[1]] = cells[2]
    return drivers, uuids


def parse_links(text: str, uuids: dict[int, str]) -> dict[tuple[str, str], str]:
    """The links between GPUs in the matrix of `nvidia-smi topo -m`, by pairs of UUIDs."""
    lines = [_ESCAPE.sub("", line) for line in text.splitlines()]
    header: list[str] = next((line.split() for line in lines if line.startswith("\t")), [])
    columns = [name for name in header if re.fullmatch(r"GPU\d+", name)]
    links = {}
    for line in lines:
        cells = line.split()
        if not cells or not re.fullmatch(r"GPU\d+", cells[0]):
            continue
        for column, link in zip(columns, cells[1:], strict=False):
            first, second = uuids.get(int(cells[0][3:])), uuids.get(int(column[3:]))
            if first and second and first != second:
                links[first, second] = link
    return links


def _run(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SMI_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""

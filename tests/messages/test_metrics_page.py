"""docs/metrics.md is held against the Structs: a field without a line fails, and the reverse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from sparsecast.messages.metrics import Event, EventKind, TrainerMetrics, WorkerMetrics

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
SECTIONS = {
    heading: body
    for heading, body in re.findall(r"^## `([^`]+)`\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}


def _column(section: str, table: int) -> list[str]:
    """First column of the n-th table of a section."""
    tables = re.split(r"^\|---.*$", SECTIONS[section], flags=re.M)[1:]
    return re.findall(r"^\| `(\w[\w-]*)` \|", tables[table], re.M)


@pytest.mark.parametrize(
    ("section", "struct"),
    [
        ("sparsecast.<run>.metrics.trainer", TrainerMetrics),
        ("sparsecast.<run>.metrics.<worker>", WorkerMetrics),
        ("sparsecast.<run>.events", Event),
    ],
    ids=["trainer", "worker", "event"],
)
def test_every_field_has_its_line(section: str, struct: type[msgspec.Struct]) -> None:
    """In the order of the Struct, so that a reader finds what a message shows."""
    fields = [field.name for field in msgspec.structs.fields(struct)]
    assert _column(section, 0) == fields


def test_every_kind_of_event_has_its_line() -> None:
    """With what to do about it."""
    assert _column("sparsecast.<run>.events", 1) == list(get_args(EventKind))

"""docs/operations.md is held against the code: what it names is there, and nothing is left out."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from sparsecast import Policy
from sparsecast.messages import errors
from sparsecast.messages.metrics import Event, EventKind, TrainerMetrics, WorkerMetrics
from sparsecast.workers.board import MemberState, TrainerState
from sparsecast.workers.cli import app
from sparsecast.workers.options import Exit, exit_code

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
FAILURES = PAGE.partition("\n## A worker\n")[2]
QUOTED = re.findall(r"`([^`]+)`", PAGE)
#: Arguments and methods of the public face.
FACE = {
    "publish()", "rollback()", "reading()", "refusal()", "require_current()", "max_lag",
    "offline_s", "linger_s",
    "after_apply", "include", "exclude", "rename", "dtype=", "--name", "_s", 'window="auto"',
    "--once --json", "replica.status", "replica.refusal()", "replica.catching_up",
    "update.wait_applied(…).missing", "sparsecast", "sparsecast.Policy", "Shard", "view=",
}  # fmt: skip


def known() -> set[str]:
    """Every name of the code that the page may use."""
    structs = (TrainerMetrics, WorkerMetrics, Event)
    return {
        *get_args(EventKind),
        *get_args(MemberState),
        *get_args(TrainerState),
        *(field.name for field in fields(Policy)),
        *(field.name for struct in structs for field in msgspec.structs.fields(struct)),
        *(name for name, value in vars(errors).items() if isinstance(value, type)),
        *FACE,
    }


def test_every_name_is_the_codes() -> None:
    """A field of the policy, an event, a state or an error was renamed, and the page was not."""
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    for name in set(QUOTED) - known():
        first, _, rest = name.partition(" ")
        if first == "sparsecast":
            assert rest.split()[0] in {*commands, "log", "runs"}, name
        elif first in ("nats", "python"):
            continue  # a command of somebody else's, or of the tests
        else:
            assert (ROOT / name).exists(), f"nothing is called {name!r}"


@pytest.mark.parametrize("kind", get_args(EventKind))
def test_every_event_is_on_the_page(kind: str) -> None:
    """An operator sees an event and finds no failure that it belongs to."""
    assert f"`{kind}`" in FAILURES


def test_every_exit_code_is_on_the_page() -> None:
    """In the order of the enum, each with the errors that lead to it."""
    rows = re.findall(r"^\| (\d+) \| [^|]+ \|([^|]*)\|$", PAGE, re.M)
    assert [int(code) for code, _ in rows] == [int(code) for code in Exit]
    for code, raised in rows:
        for name in re.findall(r"`(\w+)`", raised):
            cls = getattr(errors, name)
            assert exit_code(cls.__new__(cls)) == int(code), name


@pytest.mark.parametrize("line", sorted(set(re.findall(r"“([^”]+)”", PAGE))))
def test_every_quoted_line_is_said(line: str) -> None:
    """A log line was reworded, and who searches for it as the page has it finds nothing."""
    sources = [*(ROOT / "workers").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")]
    # Formats of the logging module, and of f-strings, stand where the page has nothing.
    assert any(line.strip() in source.read_text() for source in sources) or line in SERVERS


#: What nats-server says.
SERVERS = {"insufficient resources"}

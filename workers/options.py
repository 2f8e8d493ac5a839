"""What the commands of the command line share: options, the settings file, exit codes."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..messages import errors
from ..messages.subjects import check_token
from . import settings
from .devices import several
from .tiers import parse_log

T = TypeVar("T")


class Exit(enum.IntEnum):
    """What a command's exit code says."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    BUS = 3
    REFUSED = 4
    TIMEOUT = 5
    INTERRUPTED = 130


_CODES: tuple[tuple[type[errors.SparsecastError], Exit], ...] = (
    (errors.InvalidName, Exit.USAGE),
    (errors.SettingsError, Exit.USAGE),
    (errors.BusUnavailable, Exit.BUS),
    (errors.NameInUse, Exit.REFUSED),
    (errors.RunBusy, Exit.REFUSED),
    (errors.Fenced, Exit.REFUSED),
    (errors.ReplicaRefused, Exit.REFUSED),
    (errors.ManifestMismatch, Exit.REFUSED),
    (errors.PermissionDenied, Exit.REFUSED),
    (errors.WaitTimeout, Exit.TIMEOUT),
)


def exit_code(error: errors.SparsecastError) -> Exit:
    """The exit code that stands for an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), Exit.FAILED)


#: What belongs to one call and not into a file.
_NOT_IN_FILES = frozenset(
    {"config", "help", "prompt", "once", "json", "until_stdin_closes", "dry_run"}
)


class WindowChoice(enum.StrEnum):
    """What --window takes."""

    AUTO = "auto"
    NCCL = "nccl"
    GLOO = "gloo"
    BUS = "bus"


class RoleChoice(enum.StrEnum):
    """What --role takes."""

    ROLLOUT = "rollout"
    EVALUATION = "evaluation"


class DemoDevice(enum.StrEnum):
    """What the demo's --device takes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def _commands(command: Any) -> dict[str, Any]:
    """The commands of a group; none of what is not one."""
    return getattr(command, "commands", {})


def _settings_of(command: Any) -> frozenset[str]:
    """The settings of a command, or of a group's commands, as flags spell them."""
    own = {
        str(parameter.name).replace("_", "-")
        for parameter in command.params
        if parameter.name not in _NOT_IN_FILES
    }
    return frozenset(own.union(*map(_settings_of, _commands(command).values())))


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None and not context.resilient_parsing:
        top: Any = context
        while top.parent is not None and top.parent.parent is not None:
            top = top.parent
        group = top.parent.command if top.parent else top.command
        known = {name: _settings_of(command) for name, command in _commands(group).items()}
        # The commands of a group share its table: each takes what it knows.
        context.default_map = settings.from_file(path, str(top.info_name), known)
    return path


def check_name(kind: str) -> Callable[[str | None], str | None]:
    """A callback that refuses what cannot be a name of this kind (InvalidName)."""

    def check(value: str | None) -> str | None:
        return None if value is None else check_token(kind, value)

    return check


def check_bus(context: typer.Context, url: str | None) -> str | None:
    """A callback that refuses credentials on the command line (SettingsError)."""
    source = context.get_parameter_source("bus")
    if url is not None and source is not None and source.name == "COMMANDLINE":
        settings.refuse_credentials(url)
    return url


def check_log(value: str) -> str:
    """A callback that refuses what `tiers.parse_log` does not read (SettingsError)."""
    parse_log(value)
    return value


def check_devices(value: str) -> str:
    """A callback that refuses what `devices.several` does not read (SettingsError)."""
    several(value)
    return value


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar="SPARSECAST_CONFIG",
        is_eager=True,
        callback=_read_config,
        help="A TOML file with settings.",
    ),
]
Bus = Annotated[
    str | None,
    typer.Option(
        "--bus",
        envvar="SPARSECAST_BUS",
        callback=check_bus,
        help="URL of the NATS server. Not given: the live broker of this user. A URL with "
        "credentials only in the variable or the file.",
    ),
]
Run = Annotated[
    str,
    typer.Option(
        "--run", envvar="SPARSECAST_RUN", callback=check_name("run"), help="Name of the run."
    ),
]
LogTiers = Annotated[
    str,
    typer.Option(
        "--log",
        envvar="SPARSECAST_LOG",
        callback=check_log,
        help="The tiers of the run's log: jetstream, dir:/PATH, or several with a comma between, "
        "the quickest first.",
    ),
]


def bus_of(url: str | None) -> settings.BusChoice:
    """The bus to use; one that was not given is named on stderr."""
    choice = settings.find_bus(url)
    if url is None:
        typer.echo(f"bus: {choice.label}", err=True)
    return choice


def asyncio_run(coroutine: Coroutine[Any, Any, T]) -> T:
    """asyncio.run() on uvloop, where there is a build of it."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(coroutine)
    return uvloop.run(coroutine)

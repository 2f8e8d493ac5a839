"""Where a command's settings come from: flags, then the environment, then a TOML file.

Flags and environment are typer's; this module reads the file and finds the bus.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..messages.errors import SettingsError

PREFIX = "SPARSECAST"


def from_file(path: Path, command: str, known: Mapping[str, frozenset[str]]) -> dict[str, Any]:
    """The settings for `command` in a TOML file: its top level, then the table of that name.

    `known` maps every command to the names of its settings, as flags spell them. A key at the top
    level is for whatever command knows it; a key that none knows is a SettingsError, so that a
    slip of the pen is not silently ignored.
    """
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as exc:
        raise SettingsError(f"settings file {path}: {exc.strerror or exc}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"settings file {path} is not TOML: {exc}") from exc
    found: dict[str, Any] = {}
    everything = frozenset().union(*known.values())
    for key, value in content.items():
        if key in known and isinstance(value, dict):
            continue
        name = key.replace("_", "-")
        if name not in everything:
            raise SettingsError(f"settings file {path}: no command has a setting {key!r}")
        if name in known[command]:
            found[name.replace("-", "_")] = value
    table = content.get(command, {})
    for key, value in table.items() if isinstance(table, dict) else ():
        name = key.replace("_", "-")
        if name not in known[command]:
            raise SettingsError(
                f"settings file {path}: {command} has no setting {key!r}; "
                f"it has {', '.join(sorted(known[command]))}"
            )
        found[name.replace("-", "_")] = value
    return found


@dataclass(frozen=True, slots=True)
class BusChoice:
    """The bus to use, and how it was found; `label` says both, without credentials."""

    url: str
    origin: str

    @property
    def label(self) -> str:
        """For people: where the bus is and how it was found."""
        from ..pipeline.bus.client import redact

        return f"{redact(self.url)} ({self.origin})"


def find_bus(given: str | None, *, origin: str = "as given") -> BusChoice:
    """The bus that was given, else the live broker of this user, else a SettingsError with the
    command to type."""
    if given:
        return BusChoice(given, origin)
    from ..pipeline.bus.broker import advertised

    live = advertised()
    if live is None:
        raise SettingsError(
            "no bus: give --bus nats://HOST:4222 or set SPARSECAST_BUS; "
            "or start one on this machine with: sparsecast broker"
        )
    return BusChoice(live.url, f"the live broker of this user, pid {live.pid}")


def refuse_credentials(url: str) -> None:
    """SettingsError if a URL that stands on a command line, for all to see, holds a secret."""
    if "@" in url:
        from ..pipeline.bus.client import redact

        raise SettingsError(
            f"--bus {redact(url)}: credentials on a command line are seen by every "
            "user of the machine; put the URL into SPARSECAST_BUS or into the settings file"
        )

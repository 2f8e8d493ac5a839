"""Which tiers a log has: "jetstream", "dir:/path", several of them, or objects of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from ..messages.errors import SettingsError
from ..pipeline.log.base import Log, Payloads, Streams, Tell
from ..pipeline.log.directory import DirectoryLog
from ..pipeline.log.jetstream import JetStreamLog
from ..pipeline.log.pieces import WholeLog
from ..pipeline.log.tiered import TieredLog

#: What a user gives: a tier, several with a comma between, or a sequence, the quickest first.
LogSetting: TypeAlias = str | Log | Sequence[str | Log]

JETSTREAM = "jetstream"
DIRECTORY = "dir:"
DEFAULT_LOG = JETSTREAM


def parse_log(setting: LogSetting) -> tuple[str | Log, ...]:
    """The tiers, checked: SettingsError says what to type."""
    if isinstance(setting, str):
        setting = setting.split(",")
    elif not isinstance(setting, Sequence):
        setting = [setting]
    tiers = [tier.strip() if isinstance(tier, str) else tier for tier in setting]
    for tier in tiers:
        if isinstance(tier, str) and tier != JETSTREAM:
            _require_directory(tier)
    if not tiers:
        raise SettingsError(f"no log: give {JETSTREAM!r} or {DIRECTORY + '/PATH'!r}")
    if len(set(map(_name, tiers))) < len(tiers):
        raise SettingsError(f"log {','.join(map(_name, tiers))!r} names a tier twice")
    return tuple(tiers)


def open_log(
    tiers: Sequence[str | Log],
    streams: Streams | None,
    run: str,
    payloads: Payloads,
    *,
    tell: Tell,
    quota_nbytes: int | None = None,
) -> Log:
    """These tiers as one log, of whole entries. `streams` is the bus, for jetstream, where it takes
    no more than `quota_nbytes`."""
    opened = open_tiers(tiers, streams, run, payloads, tell=tell, quota_nbytes=quota_nbytes)
    one = next(iter(opened.values())) if len(opened) == 1 else TieredLog(opened, tell=tell)
    return WholeLog(one)


def open_tiers(
    tiers: Sequence[str | Log],
    streams: Streams | None,
    run: str,
    payloads: Payloads,
    *,
    tell: Tell,
    quota_nbytes: int | None = None,
) -> dict[str, Log]:
    """These tiers by their names."""
    found: dict[str, Log] = {}
    for tier in tiers:
        if not isinstance(tier, str):
            found[_name(tier)] = tier
        elif tier == JETSTREAM:
            assert streams is not None
            found[tier] = JetStreamLog(streams, run, quota_nbytes=quota_nbytes)
        else:
            found[tier] = DirectoryLog(tier.removeprefix(DIRECTORY), run, payloads, tell=tell)
    return found


def _require_directory(tier: str) -> None:
    path = tier.removeprefix(DIRECTORY)
    if path == tier or not path:
        raise SettingsError(
            f"log {tier!r}: give {JETSTREAM}, {DIRECTORY}/PATH, or several with a comma between: "
            f"{DIRECTORY}/PATH,{JETSTREAM}"
        )
    if not Path(path).is_dir():
        raise SettingsError(
            f"log {tier!r}: there is no such directory; make it, where trainer and workers share "
            f"it: mkdir -p {path}"
        )


def _name(tier: str | Log) -> str:
    return tier if isinstance(tier, str) else type(tier).__name__

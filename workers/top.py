"""`sparsecast top`: a live table of a run, drawn from what travels on its subjects anyway."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..messages import codec
from ..messages.codec import Message as Control
from ..messages.errors import RemoteProtocolError, SettingsError, WaitTimeout
from ..messages.metrics import Metric
from ..messages.subjects import ROOT, Subjects
from ..pipeline.bus.base import Bus, Message, Subscription
from ..pipeline.bus.nats import connect
from .board import Board, MemberRow, Snapshot, TrainerRow

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Events below the table.
EVENTS = 4
_STYLES = {
    "following": "green",
    "alive": "green",
    "joining": "cyan",
    "catching up": "cyan",
    "verifying": "green",
    "unheard": "dim",
    "left": "dim",
}


async def follow(bus: Bus, run: str, hear: Callable[[Control | Metric], None]) -> None:
    """Call `hear` with all that a run says from now on. What cannot be decoded is left out."""
    subjects = Subjects(run)

    def control(message: Message) -> None:
        try:
            heard = codec.decode(message.data, subject=message.subject)
        except RemoteProtocolError:
            return
        hear(heard)

    def metric(message: Message) -> None:
        try:
            heard = codec.decode_metric(message.data, subject=message.subject)
        except RemoteProtocolError:
            return
        hear(heard)

    for subject in (subjects.trainer_control, subjects.worker_control_all, subjects.announced_all):
        await bus.subscribe(subject, control)
    for subject in (subjects.metrics_all, subjects.events):
        await bus.subscribe(subject, metric)


async def find_runs(bus: Bus, *, wait_s: float) -> list[str]:
    """The runs that somebody speaks in, heard within `wait_s`."""
    found: set[str] = set()
    subscriptions: list[Subscription] = [
        await bus.subscribe(subject, lambda message: found.add(message.subject.split(".")[1]))
        for subject in (f"{ROOT}.*.trainer.control", f"{ROOT}.*.worker.*.control")
    ]
    await asyncio.sleep(wait_s)
    for subscription in subscriptions:
        await subscription.unsubscribe()
    return sorted(found)


async def hear_everyone(
    board: Board,
    *,
    wait_s: float,
    quiet_s: float = 1.2,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return once trainer and members have been heard and nobody new has for `quiet_s`; after
    `wait_s` at the latest. `quiet_s` is to be above two heartbeats: whoever lives speaks in it."""
    started = changed = clock()
    known = board.heard
    while clock() - started < wait_s:
        await asyncio.sleep(0.05)
        heard = board.heard
        if heard != known:
            known, changed = heard, clock()
        if known[0] and known[1] and clock() - changed > quiet_s:
            return


async def show(url: str, *, run: str | None, once: bool, as_json: bool, wait_s: float) -> None:
    """Show a run until Ctrl-C, or once. WaitTimeout if nobody speaks (within `wait_s`, if once)."""
    bus = await connect(url, name="top", timeout_s=5.0)
    try:
        board = Board(run or await _only_run(bus, wait_s=wait_s))
        await follow(bus, board.run, lambda message: board.hear(message, time.monotonic()))
        if once:
            await hear_everyone(board, wait_s=wait_s)
            _print_once(board, bus.url, as_json=as_json, wait_s=wait_s)
        else:
            await _show_live(board, bus)
    finally:
        await bus.close()


async def _only_run(bus: Bus, *, wait_s: float) -> str:
    runs = await find_runs(bus, wait_s=min(wait_s, 1.5))
    if not runs:
        raise WaitTimeout("a run", min(wait_s, 1.5), f"nobody speaks on {bus.url}; give --run")
    if len(runs) > 1:
        raise SettingsError(f"several runs are live: give --run, one of {', '.join(runs)}")
    return runs[0]


def _print_once(board: Board, url: str, *, as_json: bool, wait_s: float) -> None:
    if board.heard == (False, frozenset()):
        raise WaitTimeout(f"a word of run {board.run!r}", wait_s, f"nobody speaks on {url}")
    snapshot = board.snapshot(time.monotonic())
    if as_json:
        print(msgspec.json.encode(snapshot).decode())
    else:
        Console(width=None if sys.stdout.isatty() else 100).print(render(snapshot, bus=url))


async def _show_live(board: Board, bus: Bus) -> None:
    started = time.monotonic()

    def picture() -> RenderableType:
        note = "" if bus.connected else f"the bus {bus.url} is gone; waiting for it"
        if not note and board.heard == (False, frozenset()):
            note = f"nobody speaks yet, {time.monotonic() - started:.0f} s"
        return render(board.snapshot(time.monotonic()), bus=bus.url, note=note)

    # The normal screen: the last table stays when it ends, over ssh as well.
    with Live(picture(), auto_refresh=False, screen=False, transient=False) as live:
        while True:
            await asyncio.sleep(0.5)
            live.update(picture(), refresh=True)


def render(snapshot: Snapshot, *, bus: str, note: str = "") -> RenderableType:
    """The table, within 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=False)
    table.add_column("member", overflow="ellipsis", max_width=20, no_wrap=True)
    for title in ("version", "verified", "lag", "p50", "p99 ms", "bytes", "share", "bad"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_row(*_trainer_cells(snapshot.trainer))
    for row in snapshot.members:
        table.add_row(*_member_cells(row))
    parts: list[RenderableType] = [_title(snapshot), _ground(snapshot, bus), Text(""), table]
    parts.extend(
        Text(f"{row.name}: {row.note}", style="yellow", overflow="ellipsis", no_wrap=True)
        for row in snapshot.members
        if row.note and row.state != "left"
    )
    parts.extend(
        Text(f"{row.name}: evaluates {row.follow}", style="dim", no_wrap=True)
        for row in snapshot.members
        if row.follow is not None and row.state != "left"
    )
    if not snapshot.members:
        parts.append(Text("no worker heard yet", style="dim"))
    parts.extend(
        Text(
            f"{time.strftime('%H:%M:%S', time.localtime(event.time_s))} "
            f"{event.kind} {event.member}: {event.reason}",
            style="dim",
            overflow="ellipsis",
            no_wrap=True,
        )
        for event in snapshot.events[-EVENTS:]
    )
    if note:
        parts.append(Text(note, style="bold red"))
    return Group(*parts)


def _title(snapshot: Snapshot) -> Text:
    trainer = snapshot.trainer
    text = Text(overflow="ellipsis", no_wrap=True)
    text.append(snapshot.run, style="bold")
    if trainer.state == "unheard":
        text.append("  no trainer heard yet", style="yellow")
    else:
        text.append(f"  epoch {trainer.epoch}")
        if trainer.step is not None:
            text.append(f"  step {trainer.step}")
        if trainer.transport is not None:
            text.append(f"  window {trainer.transport} {trainer.window}")
    return text


def _ground(snapshot: Snapshot, bus: str) -> Text:
    trainer = snapshot.trainer
    text = Text(bus, style="dim", overflow="ellipsis", no_wrap=True)
    if trainer.nbytes and trainer.dense_nbytes:
        text.append(f"  {trainer.dense_nbytes / trainer.nbytes:.1f}× fewer bytes than dense")
    return text


def _trainer_cells(row: TrainerRow) -> list[Text]:
    return [
        Text("trainer", style="bold"),
        _cell(row.version),
        Text(""),
        Text(""),
        _cell(ms(row.round_p50_ms)),
        _cell(ms(row.round_p99_ms)),
        _cell(size(row.nbytes)),
        _cell(share(row.density)),
        Text(""),
        Text(row.state, style=_STYLES.get(row.state, "bold red")),
    ]


def _member_cells(row: MemberRow) -> list[Text]:
    return [
        Text(row.name),
        _cell(row.version),
        _cell(row.verified),
        _cell(row.lag),
        _cell(ms(row.round_p50_ms)),
        _cell(ms(row.round_p99_ms)),
        _cell(size(row.nbytes)),
        _cell(share(row.density)),
        Text(str(row.mismatches), style="bold red" if row.mismatches else ""),
        Text(_state(row), style=_STYLES.get(row.state, "bold red")),
    ]


def _state(row: MemberRow) -> str:
    if row.state == "catching up" and row.caught_up is not None:
        return f"log {row.caught_up:.0%}"  # no longer than "following": there is no more room
    return row.state


def _cell(value: object) -> Text:
    return Text("–", style="dim") if value is None else Text(str(value))


def ms(value: float | None) -> str | None:
    """Milliseconds in three figures."""
    if value is None:
        return None
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size(nbytes: int | float | None) -> str | None:
    """Bytes in three figures, in powers of 1,000."""
    if nbytes is None:
        return None
    amount = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    digits = 0 if unit == "B" or amount >= 99.5 else 1 if amount >= 9.95 else 2
    return f"{amount:.{digits}f} {unit}"


def share(density: float | None) -> str | None:
    """A share as a percentage."""
    if density is None:
        return None
    percent = density * 100
    return f"{percent:.1f}%" if percent >= 10 else f"{percent:.2f}%"

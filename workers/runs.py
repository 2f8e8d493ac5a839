"""`sparsecast runs`: which runs share a broker, who holds them, and how to be rid of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer

from ..messages.errors import RunBusy
from ..messages.subjects import Subjects
from .options import Bus, Config, Exit, asyncio_run, bus_of, check_name

if TYPE_CHECKING:
    from ..pipeline.bus.base import StreamSize
    from ..pipeline.bus.nats import NatsBus

T = TypeVar("T")

_JOURNAL = re.compile(r"sparsecast-(.+)-journal")

app = typer.Typer(
    name="runs",
    help="List the runs of a broker, and drop one with all that the broker keeps of it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="A JSON list on stdout.")]
TimeoutS = Annotated[
    float,
    typer.Option(envvar="SPARSECAST_TIMEOUT_S", min=0.1, help="For each question to the broker."),
]


class RunView(msgspec.Struct, frozen=True, kw_only=True):
    """A run: `version` is the newest that was announced, `trainer` who holds the lease, if any;
    `quota_nbytes` is what its log may take of the broker."""

    run: str
    epoch: int | None
    version: int | None
    trainer: str | None
    journal_nbytes: int
    log_nbytes: int
    quota_nbytes: int | None


def _with_bus(
    bus: str | None, timeout_s: float, work: Callable[[NatsBus], Coroutine[Any, Any, T]]
) -> T:
    from ..pipeline.bus.nats import connect

    url = bus_of(bus).url

    async def look() -> T:
        found = await connect(url, name="sparsecast-runs", timeout_s=timeout_s)
        try:
            return await work(found)
        finally:
            await found.close()

    return asyncio_run(look())


async def _view(
    bus: NatsBus, run: str, sizes: Mapping[str, StreamSize], timeout_s: float
) -> RunView:
    from ..pipeline.bus.journal import Journal
    from ..pipeline.bus.lease import holder_of

    subjects = Subjects(run)
    epoch = version = None
    if subjects.journal_stream in sizes:
        state = await Journal(bus, run).open(timeout_s)
        epoch, version = state.claim.epoch if state.claim else None, state.head
    lease = await holder_of(bus, run, timeout_s=timeout_s)
    journal, log = sizes.get(subjects.journal_stream), sizes.get(subjects.log_stream)
    return RunView(
        run=run,
        epoch=epoch,
        version=version,
        trainer=None if lease is None else f"{lease.host}, process {lease.pid}",
        journal_nbytes=0 if journal is None else journal.nbytes,
        log_nbytes=0 if log is None else log.nbytes,
        quota_nbytes=None if log is None else log.max_nbytes,
    )


@app.command()
def ls(
    bus: Bus = None, timeout_s: TimeoutS = 10.0, json: Json = False, config: Config = None
) -> None:
    """List the runs that the broker keeps a journal of.

    Keys of the JSON, one object a run: run, epoch (null: never claimed), version (the newest that
    was announced), trainer (who holds the run now; null: nobody), journal_nbytes, log_nbytes,
    quota_nbytes (what the log may take; null: as much as there is room).
    """

    async def work(found: NatsBus) -> list[RunView]:
        sizes = await found.streams(timeout_s=timeout_s)
        names = sorted(match[1] for name in sizes if (match := _JOURNAL.fullmatch(name)))
        return [await _view(found, name, sizes, timeout_s) for name in names]

    views = _with_bus(bus, timeout_s, work)
    if json:
        typer.echo(msgspec.json.encode(views).decode())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "epoch", "version", "held by", "journal", "log", "quota", box=None)
    for view in views:
        sizes = (
            "–" if nbytes is None else f"{nbytes / 1e6:,.1f} MB"
            for nbytes in (view.journal_nbytes, view.log_nbytes, view.quota_nbytes)
        )
        known = ("–" if number is None else str(number) for number in (view.epoch, view.version))
        table.add_row(view.run, *known, view.trainer or "nobody", *sizes)
    Console().print(table)


@app.command()
def rm(
    run: Annotated[str, typer.Argument(help="Which run.", callback=check_name("run"))],
    bus: Bus = None,
    timeout_s: TimeoutS = 10.0,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config: Config = None,
) -> None:
    """Drop a run: its journal, and its log on the broker. Directories are left alone.

    What is dropped cannot be brought back: a trainer that starts this run again begins at version
    0, or above what a directory of its log still has. Refused while a trainer holds
    the run. Exit code 1 if the broker knows no such run.
    """
    subjects = Subjects(run)
    streams = (subjects.log_stream, subjects.journal_stream)

    async def work(found: NatsBus) -> bool:
        sizes = await found.streams(timeout_s=timeout_s)
        there = [sizes[stream].nbytes for stream in streams if stream in sizes]
        if not there:
            return False
        size = sum(there) / 1e6
        await _require_free(found, run, timeout_s)
        if not yes:
            typer.confirm(f"Drop run {run!r}, {size:,.1f} MB?", abort=True)
            await _require_free(found, run, timeout_s)
        for stream in streams:
            await found.delete_stream(stream, timeout_s=timeout_s)
        return True

    if not _with_bus(bus, timeout_s, work):
        typer.echo(f"sparsecast: the broker knows no run {run!r}", err=True)
        raise typer.Exit(Exit.FAILED)
    typer.echo(f"run {run!r} is gone")


async def _require_free(bus: NatsBus, run: str, timeout_s: float) -> None:
    from ..pipeline.bus.lease import holder_of

    lease = await holder_of(bus, run, timeout_s=timeout_s)
    if lease is not None:
        who = f"{lease.holder.incarnation} ({lease.host}, process {lease.pid})"
        raise RunBusy(run, who, lease_s=lease.lease_s)

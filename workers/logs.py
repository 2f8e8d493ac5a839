"""`sparsecast log`: what is in a run's log, whether it is whole, a state as a file, less of it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..messages.errors import LogHole, SettingsError
from .options import Bus, Config, Exit, LogTiers, Run, asyncio_run, bus_of
from .tiers import DEFAULT_LOG, JETSTREAM, parse_log

if TYPE_CHECKING:
    from .logbook import Logbook

T = TypeVar("T")

app = typer.Typer(
    name="log",
    help="Look into the log of a run: its patches and anchors. Of tiers that are directories alone "
    "it needs no bus.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
TimeoutS = Annotated[
    float,
    typer.Option(envvar="SPARSECAST_TIMEOUT_S", min=0.1, help="For each look into one tier."),
]


def _with_book(
    run: str,
    log: str,
    bus: str | None,
    timeout_s: float,
    work: Callable[[Logbook], Coroutine[Any, Any, T]],
) -> T:
    """What `work` finds in the log."""
    from .logbook import opened

    tiers = [tier for tier in parse_log(log) if isinstance(tier, str)]
    url = bus_of(bus).url if JETSTREAM in tiers else bus

    async def look() -> T:
        async with opened(run, tiers, url, timeout_s=timeout_s) as book:
            return await work(book)

    return asyncio_run(look())


def _tell(found: Any, *, as_json: bool, show: Callable[[Any], None]) -> None:
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode(found).decode())
    else:
        show(found)


def _end(problems: list[str]) -> None:
    """Exit code 1, with what went wrong on stderr, if anything did."""
    for problem in problems:
        typer.echo(f"sparsecast: {problem}", err=True)
    if problems:
        raise typer.Exit(Exit.FAILED)


@app.command()
def ls(
    run: Run,
    bus: Bus = None,
    log: LogTiers = DEFAULT_LOG,
    timeout_s: TimeoutS = 60.0,
    json: Json = False,
    config: Config = None,
) -> None:
    """List the entries, and which tiers have them.

    Exit code 1 if a tier cannot be read, a file is damaged, or nothing leads to the newest version.
    Keys of the JSON: run, tiers, head, nbytes, entries [{name, epoch, base_version (null: an
    anchor), version, nbytes, checksum, digest, manifest_hash, writer, merged (of so many others; 0:
    stored as it was announced), step, tags, tiers, pieces (so many roots have stored theirs)}], way
    [the entries that lead to the newest version], partial [pieces of what other roots have not
    stored], problems.
    """
    from .logview import listing, print_listing

    async def work(book: Logbook) -> Any:
        return listing(book, book.entries)

    found = _with_book(run, log, bus, timeout_s, work)
    _tell(found, as_json=json, show=print_listing)
    _end(found.problems)


@app.command()
def show(
    version: Annotated[int, typer.Argument(min=0, help="What leads to this version.")],
    run: Run,
    bus: Bus = None,
    log: LogTiers = DEFAULT_LOG,
    timeout_s: TimeoutS = 60.0,
    json: Json = False,
    config: Config = None,
) -> None:
    """Show all that is known of the entries of a version: patches and anchors.

    Exit code 1 if there is none. JSON: a list of objects, with the keys of `ls`.
    """
    from .logview import print_entries, view

    async def work(book: Logbook) -> Any:
        return [view(book, entry) for entry in book.entries if entry.version == version]

    found = _with_book(run, log, bus, timeout_s, work)
    if not found:
        raise LogHole(f"run {run!r} has no entry of version {version}", version=version)
    _tell(found, as_json=json, show=print_entries)


@app.command()
def verify(
    run: Run,
    bus: Bus = None,
    log: LogTiers = DEFAULT_LOG,
    timeout_s: TimeoutS = 60.0,
    json: Json = False,
    config: Config = None,
) -> None:
    """Read every entry in every tier, and make every version again.

    Each checksum; the chain from the newest anchor to the newest version; and each digest, with
    patches applied over anchors in host memory, single ones first and then merged ones in their
    place. It takes twice the model there. Exit code 0 if all
    is as it was published, 1 if not. Keys of the JSON: ok, run, epoch, anchor, head, unbroken,
    entries [{tier, name, ok, reason}], versions [{name, version, ok, expected, found, reason}],
    problems.
    """
    from .audit import verify as verify_all
    from .logview import print_verdict

    found = _with_book(run, log, bus, timeout_s, verify_all)
    _tell(found, as_json=json, show=print_verdict)
    if not found.ok:
        raise typer.Exit(Exit.FAILED)


@app.command()
def export(
    run: Run,
    to: Annotated[
        Path, typer.Option("--to", envvar="SPARSECAST_TO", help="The safetensors file to write.")
    ],
    version: Annotated[
        int | None,
        typer.Option(envvar="SPARSECAST_VERSION", min=0, help="Not given: the newest."),
    ] = None,
    bus: Bus = None,
    log: LogTiers = DEFAULT_LOG,
    timeout_s: TimeoutS = 60.0,
    json: Json = False,
    config: Config = None,
) -> None:
    """Write the weights of a version to a safetensors file.

    The file is read back, and its digest is the published one before it gets its name. Exit code 1
    if the log does not lead there. Keys of the JSON: run, version, to, nbytes, digest, way [the
    entries that led there].
    """
    from .audit import export as export_state

    if not to.parent.is_dir():
        raise SettingsError(f"--to {to}: there is no such directory; mkdir -p {to.parent}")
    found = _with_book(run, log, bus, timeout_s, lambda book: export_state(book, version, to))
    _tell(
        found,
        as_json=json,
        show=lambda it: typer.echo(
            f"version {it.version} of run {it.run}, digest {it.digest}: "
            f"{it.nbytes:,} bytes in {it.to}"
        ),
    )


@app.command()
def prune(
    run: Run,
    bus: Bus = None,
    log: LogTiers = DEFAULT_LOG,
    keep_versions: Annotated[
        int,
        typer.Option(
            envvar="SPARSECAST_KEEP_VERSIONS", min=1,
            help="The log goes on to lead to so many newest versions.",
        ),
    ] = 1,
    keep_bytes: Annotated[
        int | None,
        typer.Option(
            envvar="SPARSECAST_KEEP_BYTES", min=1,
            help="Drop more while it holds more bytes; the newest anchor and what follows it stay.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
    timeout_s: TimeoutS = 60.0,
    json: Json = False,
    config: Config = None,
) -> None:  # fmt: skip
    """Drop what nobody needs any more, by the rule that the trainer keeps to.

    Earlier epochs, if the journal is there to tell which one lives; what lies before the second
    newest anchor or an older one that the newest versions need; and of older versions the patches
    that merged ones cover. Nothing goes unless patches lead
    from an anchor that stays, and is whole, to the newest version. Exit code 1 if a tier could not
    be pruned. Keys of the JSON: run, dry_run, dropped, nbytes, kept, kept_nbytes, problems.
    """
    from .logview import print_pruned
    from .logview import prune as prune_all

    found = _with_book(
        run, log, bus, timeout_s,
        lambda book: prune_all(
            book, keep_versions=keep_versions, keep_nbytes=keep_bytes, dry_run=dry_run
        ),
    )  # fmt: skip
    _tell(found, as_json=json, show=print_pruned)
    _end(found.problems)

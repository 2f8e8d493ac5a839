"""`sparsecast runs` on a broker with runs that live and runs that have ended."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import commands
from commands import Done
from runs import Site, step, weights
from sparsecast.messages.subjects import Subjects
from sparsecast.workers.cli import app
from sparsecast.workers.runs import RunView

__all__ = ["clean"]


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from outside, no live broker, and lines that are not wrapped."""
    commands.no_settings(tmp_path, monkeypatch)


async def runs(site: Site, *arguments: str) -> Done:
    """`sparsecast runs …` on the site's broker."""
    return await commands.sparsecast("runs", *arguments, "--bus", site.url)


async def listed(site: Site) -> dict[str, RunView]:
    """What `ls --json` says of this site's run, if anything."""
    done = await runs(site, "ls", "--json")
    assert done.returncode == 0, done.stderr
    views = [RunView(**view) for view in json.loads(done.stdout)]
    return {view.run: view for view in views if view.run == site.run}


async def test_a_run_is_listed_and_dropped(site: Site) -> None:
    """Held by a trainer, it is listed with its version and refused to be dropped; when the trainer
    has left it goes, with its log, and a trainer that starts it again begins at version 0."""
    assert await listed(site) == {}
    trained = weights()
    publisher = await site.publisher(trained)
    step(trained, 1)
    await publisher.publish()
    await publisher.close()
    await publisher.__aenter__()
    view = (await listed(site))[site.run]
    assert (view.epoch, view.version) == (2, 2)
    assert view.trainer is not None
    assert "process" in view.trainer
    assert view.journal_nbytes > 0
    assert view.log_nbytes > 0
    shown = await runs(site, "ls")
    assert site.run in shown.stdout
    busy = await runs(site, "rm", site.run, "--yes")
    assert busy.returncode != 0
    assert "is held by trainer" in busy.stderr
    await publisher.close()
    assert (await listed(site))[site.run].trainer is None
    gone = await runs(site, "rm", site.run, "--yes")
    assert (gone.returncode, gone.stdout) == (0, f"run {site.run!r} is gone\n")
    assert await listed(site) == {}
    again = await runs(site, "rm", site.run, "--yes")
    assert again.returncode == 1
    assert f"knows no run {site.run!r}" in again.stderr
    await publisher.__aenter__()
    view = (await listed(site))[site.run]
    assert (view.epoch, view.version) == (1, 0)


async def test_who_does_not_say_yes_loses_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked whether to drop it, the answer is no: all is there."""
    publisher = await site.publisher(weights())
    await publisher.close()
    monkeypatch.setattr("typer.confirm", _refuses)
    done = await runs(site, "rm", site.run)
    assert done.returncode != 0
    assert Subjects(site.run).run in await listed(site)


def _refuses(question: str, *, abort: bool) -> None:
    import typer

    assert "MB?" in question
    assert abort
    raise typer.Abort


def test_a_name_that_cannot_be_a_run_is_refused() -> None:
    """Before any broker is looked for."""
    done = CliRunner().invoke(app, ["runs", "rm", "a.b", "--bus", "nats://127.0.0.1:1"])
    assert done.exit_code != 0

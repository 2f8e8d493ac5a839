"""Commands of `sparsecast`, run to their end within the test's own process."""

import asyncio
import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsecast.workers.cli import main


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    returncode: int
    stdout: str
    stderr: str


async def sparsecast(*arguments: str) -> Done:
    """Run a command to its end, in a thread of its own: a process would wait for torch."""

    def work() -> Done:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([*arguments])
            except SystemExit as ended:
                code = int(ended.code or 0)
        return Done(code, out.getvalue(), err.getvalue())

    return await asyncio.to_thread(work)


def no_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from outside, no live broker, and lines that are not wrapped."""
    for key in [key for key in os.environ if key.startswith("SPARSECAST")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("COLUMNS", "200")

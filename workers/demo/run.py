"""`sparsecast demo`: where it shows itself, how it is interrupted, what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from ...messages.errors import SettingsError, SparsecastError
from .play import Demo, DemoOptions
from .view import LiveView, PlainView


def run_demo(options: DemoOptions) -> int:
    """Run the whole; the exit code. Whatever happens, no process of it stays."""
    if options.json is not None:
        folder = options.json.absolute().parent
        if options.json.is_dir() or not os.access(folder, os.W_OK):
            raise SettingsError(f"--json {options.json} cannot be written")
    console = Console(soft_wrap=False)
    live = console.is_terminal and not options.plain
    view = LiveView(console) if live else PlainView(console)
    directory = Path(tempfile.mkdtemp(prefix="sparsecast-demo-"))
    kept = False
    try:
        with signals_raise() as check:
            code = Demo(options, view, directory, check).play()
        kept = code != 0
        return code
    except KeyboardInterrupt:
        view.show("interrupted: workers and broker have ended")
        return 130
    except SparsecastError:
        kept = True
        raise
    finally:
        if kept and any(directory.glob("*.log")):
            view.show(f"what the workers said: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def signals_raise() -> Iterator[Callable[[], None]]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: in order, by a KeyboardInterrupt.

    Yields what raises it again, if one came: an exception that meets the interpreter in a finaliser
    or a callback is printed and lost.
    """
    asked = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

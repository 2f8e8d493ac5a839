"""A worker's catch-up on stderr: a bar on a terminal, elsewhere a line at its beginning and end."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Drawn

from .catching import Progress
from .top import size


class Bar:
    """Shows one catch-up after another on stderr; those that are not notable leave no trace.

    `say` prints a line. Nothing is drawn but by show(), and nothing stays drawn after clear().
    """

    def __init__(self, say: Callable[[str], None], console: Console | None = None) -> None:
        self._say = say
        self._console = console or Console(stderr=True)
        # FORCE_COLOR makes a terminal of a pipe: a log file must not be full of bars.
        self._live = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._last: Progress | None = None
        self._drawn: Drawn | None = None

    def show(self, at: Progress | None, *, verified: int | None, status: str) -> bool:
        """How a replica stands; whether it is on a catch-up that is worth showing.

        `at` is its `catching_up`, `status` says why it is not at the head.
        """
        if at is not None and at.notable:
            if self._live:
                self._draw(at)
            elif self._last is None:
                what = f"from {at.origin} to version {at.target}"
                self._say(f"catching up {what}: {size(at.of_nbytes)} of the log")
            self._last = at
            return True
        last, self._last = self._last, None
        if last is not None:
            self.clear()
            if verified is not None and verified >= last.target:
                took = f"{size(last.of_nbytes)} in {last.elapsed_s:.1f} s"
                self._say(f"caught up to version {verified}: {took}")
            else:
                self._say(f"catching up to version {last.target} broke off: {status}")
        return False

    def _draw(self, at: Progress) -> None:
        what = f"{at.origin} → version {at.target}"
        if at.nbytes == at.of_nbytes:
            what = f"proving version {at.target}"
        if self._drawn is None:
            # No thread of its own: it would draw between whoever else writes to the terminal.
            self._drawn = Drawn(
                TextColumn("worker: {task.description}"),
                BarColumn(bar_width=None),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                auto_refresh=False,
                transient=True,
                expand=True,
            )
            self._drawn.add_task(what, total=at.of_nbytes)
            self._drawn.start()
        [task] = self._drawn.task_ids
        self._drawn.update(task, description=what, completed=at.nbytes, total=at.of_nbytes)
        self._drawn.refresh()

    def clear(self) -> None:
        """Take what is drawn off the terminal. Idempotent."""
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None

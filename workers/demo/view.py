"""What the demo shows: lines for a pipe, a live picture for a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.status import Status

from .picture import Look, line, picture
from .progress import Progress

#: Updates between two lines of the plain view.
EVERY = 20


#: Seconds between two lines about one step that takes long.
SAY_EVERY_S = 5.0


@dataclass(slots=True)
class Step:
    """One step of the set-up: how it stands while it lasts, and what it came to."""

    doing: str
    say: Callable[[str], None]
    state: str = ""
    done: str = ""

    def stands(self, state: str) -> None:
        """What the step waits for now."""
        self.state = state
        self.say(state)


class PlainView:
    """Lines, each with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started = time.monotonic()
        self._progress: Progress | None = None
        self._look: Callable[[], Look] | None = None

    @contextmanager
    def step(self, doing: str) -> Iterator[Step]:
        """One step of the set-up: shown at once, and with its time when it is done."""
        self.tell(f"{doing} …")
        began = said = time.monotonic()

        def say(state: str) -> None:
            nonlocal said
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                self.tell(f"{doing}: {state}")

        step = Step(doing, say)
        yield step
        self.tell(f"{doing}: {step.done or 'done'}, {time.monotonic() - began:.1f} s")

    @contextmanager
    def training(self, progress: Progress, look: Callable[[], Look]) -> Iterator[None]:
        """Training goes on inside; `look` gathers the rest of what there is to see."""
        self._progress, self._look = progress, look
        yield

    def advance(self) -> None:
        """One more update was published."""
        assert self._progress is not None
        assert self._look is not None
        done, goal = self._progress.position
        if done % EVERY == 0 or done == goal or done == 1:
            self.tell(line(self._progress, self._look()))

    def finish(self) -> None:
        """The last picture, which stays."""
        assert self._progress is not None
        assert self._look is not None
        elapsed_s = time.monotonic() - self.started
        self.console.print(picture(self._progress, self._look(), elapsed_s))

    def tell(self, text: str) -> None:
        """Something that an onlooker should know."""
        elapsed = time.monotonic() - self.started
        self.console.print(
            f"{elapsed:7.1f} s  {text}", markup=False, highlight=False, soft_wrap=True
        )

    def show(self, text: str) -> None:
        """A line without a time."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveView(PlainView):
    """The set-up as lines with a spinner, the training as one picture that stays when it ends."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live: Live | None = None

    @contextmanager
    def step(self, doing: str) -> Iterator[Step]:
        """One step of the set-up: shown at once, and with its time when it is done."""
        step, began = Step(doing, lambda _: None), time.monotonic()
        with Status(_Ticking(step, began), console=self.console):
            yield step
        took = time.monotonic() - began
        self.console.print(f"[green]✓[/] {took:5.1f} s  {doing}", highlight=False, end="")
        self.show(f": {step.done}" if step.done else "")

    @contextmanager
    def training(self, progress: Progress, look: Callable[[], Look]) -> Iterator[None]:
        """Training goes on inside; `look` gathers the rest of what there is to see."""
        self._progress, self._look = progress, look

        def draw() -> object:
            return picture(progress, look(), time.monotonic() - self.started)

        # Drawn by a thread of its own four times a second, so that a long update does not freeze
        # it; the normal screen, so that the last picture stays.
        with Live(
            get_renderable=draw,  # type: ignore[arg-type]  # RenderableType, which rich calls
            console=self.console,
            refresh_per_second=4,
            transient=False,
            vertical_overflow="visible",
        ):
            yield

    def advance(self) -> None:
        """The picture draws itself."""

    def finish(self) -> None:
        """The picture is there already."""


class _Ticking:
    """A step's text with the seconds that it has taken, anew at every look."""

    def __init__(self, step: Step, began: float) -> None:
        self._step = step
        self._began = began

    def __rich__(self) -> str:
        state = f"  {self._step.state}" if self._step.state else ""
        return f"{self._step.doing} … {time.monotonic() - self._began:.1f} s{escape(state)}"

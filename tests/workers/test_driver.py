"""The driver loop over a toy core: order, ticks, faults, and what is left when it stops."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sparsecast import BusUnavailable, WaitTimeout, WindowAborted, WindowError, WindowTimeout
from sparsecast.messages.control import Stamp
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from sparsecast.workers.driver import Changes, Driver, Outbox, Windows
from sparsecast.workers.ends import Ends, Place


class Toy:
    """A core that notes what it is given and answers with the commands that it is told to."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.answers: dict[str, list[str]] = {}
        self.deadline: float | None = None

    def handle(self, event: str, now: float) -> list[str]:
        """Take one event."""
        self.heard.append(event)
        if event == "bad":
            raise RuntimeError("a state that cannot be")
        return self.answers.get(event, [])

    def next_deadline(self) -> float | None:
        """When the next tick is due."""
        return self.deadline


class Stand:
    """A driver over a toy, with everything that it says."""

    def __init__(self) -> None:
        self.core = Toy()
        self.errors: list[Exception] = []
        self.changes = 0
        self.work: dict[str, Callable[[], Coroutine[Any, Any, str | None]]] = {}
        self.driver: Driver[str, str] = Driver(
            self.core,
            lambda command: self.work[command]() if command in self.work else None,
            tick="tick",
            clock=asyncio.get_running_loop().time,
            on_change=self._changed,
            on_error=self.errors.append,
        )

    def _changed(self) -> None:
        self.changes += 1


async def test_an_event_out_of_a_command_comes_after_the_one_that_caused_it() -> None:
    """A command posts while its event is handled: the loop finishes one before the next."""
    stand = Stand()
    stand.core.answers = {"a": ["post", "later"], "b": []}

    def post() -> None:
        stand.driver.post("b")
        assert stand.core.heard == ["a"]

    async def later() -> str:
        return "c"

    def perform(command: str) -> Coroutine[Any, Any, str | None] | None:
        if command == "post":
            post()
            return None
        return later()

    stand.driver._perform = perform
    stand.driver.post("a")
    assert stand.core.heard == ["a", "b"]
    await asyncio.sleep(0.01)
    assert stand.core.heard == ["a", "b", "c"]


async def test_a_tick_comes_at_the_deadline_and_not_before() -> None:
    """The core names a time: one tick then, and no more while it names none."""
    stand = Stand()
    loop = asyncio.get_running_loop()
    stand.core.deadline = due = loop.time() + 0.05
    ticked: list[float] = []

    def perform(command: str) -> None:
        ticked.append(loop.time())
        stand.core.deadline = None

    stand.driver._perform = perform
    stand.core.answers = {"tick": ["note"]}
    stand.driver.post("a")
    await asyncio.sleep(0.15)
    assert stand.core.heard == ["a", "tick"]
    assert ticked[0] >= due - 0.005


@pytest.mark.parametrize("where", ["core", "command"])
async def test_a_fault_is_told_once_with_what_came_before(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The core or a command fails: on_error hears it, waits look again, the log has the events."""
    stand = Stand()
    stand.core.answers = {"go": ["fail", "fail"]}

    async def fail() -> None:
        raise RuntimeError("a state that cannot be")

    stand.work = {"fail": fail}
    with caplog.at_level(logging.ERROR, logger="sparsecast.driver"):
        stand.driver.post("first")
        stand.driver.post("bad" if where == "core" else "go")
        await asyncio.sleep(0.01)
    assert [str(error) for error in stand.errors] == ["a state that cannot be"]
    assert "first" in caplog.text
    heard = list(stand.core.heard)
    before = stand.changes
    stand.driver.post("more")
    assert stand.core.heard == heard
    assert stand.changes == before
    assert not stand.driver._events  # a broken driver that goes on hearing must not grow


async def test_stopping_waits_for_what_ran() -> None:
    """Tasks are cancelled and have ended when stop() returns, the one that never began as well."""
    stand = Stand()
    ended: list[str] = []

    async def long() -> str:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("long")
        return "never"

    stand.driver.spawn(long())
    await asyncio.sleep(0)
    stand.driver.spawn(long())
    await stand.driver.stop()
    assert ended == ["long"]
    stand.driver.post("late")
    assert stand.core.heard == []


class PoorBus:
    """A bus that takes messages only while it is up."""

    def __init__(self) -> None:
        self.up = True
        self.taken: list[bytes] = []

    async def publish(self, subject: str, data: bytes) -> None:
        """Take a message, or refuse it."""
        if not self.up:
            raise BusUnavailable("nats://nowhere", "disconnected")
        self.taken.append(data)

    async def flush(self, timeout_s: float) -> None:
        """Refuse while down."""
        if not self.up:
            raise BusUnavailable("nats://nowhere", "disconnected")


async def test_the_outbox_keeps_order_and_drops_what_the_bus_refuses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Three while it is away are dropped and counted in one line; the rest goes in order."""
    bus: Any = PoorBus()
    outbox = Outbox(bus)
    with caplog.at_level(logging.WARNING, logger="sparsecast.driver"):
        for number in range(8):
            bus.up = not 2 <= number < 5
            outbox.put("s", b"%d" % number)
            await asyncio.sleep(0.001)
        await outbox.close(1.0)
    assert bus.taken == [b"0", b"1", b"5", b"6", b"7"]
    assert len(caplog.records) == 2
    assert "3 were not sent" in caplog.text


async def test_closing_an_outbox_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """The bus takes nothing and says nothing: close() returns at its deadline, and tells."""
    bus: Any = SimpleNamespace(publish=lambda *_: asyncio.sleep(60))
    outbox = Outbox(bus)
    outbox.put("s", b"1")
    outbox.put("s", b"2")
    with caplog.at_level(logging.WARNING, logger="sparsecast.driver"):
        async with asyncio.timeout(2):
            await outbox.close(0.05)
    assert "closing before the bus had the last messages" in caplog.text


class SlowWindow:
    """A window whose open blocks until aborted, and whose abort takes its time."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.aborted = asyncio.Event()
        self.gone = False

    async def open(self, timeout_s: float) -> None:
        """Block."""
        if self.spec.kind == "nccl":
            raise WindowError(self.spec.label, "no such device")
        await self.aborted.wait()
        raise WindowAborted(self.spec.label, "aborted during open")

    async def abort(self) -> None:
        """Take a while, cancelled or not."""
        self.aborted.set()
        await asyncio.shield(self._vanish())

    async def _vanish(self) -> None:
        await asyncio.sleep(0.02)
        self.gone = True


def _windows() -> tuple[Windows, list[SlowWindow]]:
    made: list[SlowWindow] = []

    def factory(spec: Any, courier: Any) -> SlowWindow:
        made.append(SlowWindow(spec))
        return made[-1]

    ports: Any = SimpleNamespace(windows=factory, bus=None, device="cpu")
    return Windows(ports, Subjects("r")), made


def _opening(kind: str) -> cmd.OpenWindow:
    return cmd.OpenWindow(Stamp(1, 3), kind, 0, 2, 5.0)  # type: ignore[arg-type]


async def test_a_window_that_does_not_open_says_why() -> None:
    """The reason goes to the core, which has it aborted."""
    windows, made = _windows()
    assert await windows.open(_opening("nccl")) == ev.WindowFailed(1, 3, "no such device")
    await windows.abort(3)
    assert made[0].gone
    assert windows[3] is None


async def test_an_abort_that_was_cancelled_is_waited_for() -> None:
    """The driver stops while a window is being broken off: abort_all() sees it to its end."""
    windows, made = _windows()
    opening = asyncio.create_task(windows.open(_opening("gloo")))
    await asyncio.sleep(0)
    aborting = asyncio.create_task(windows.abort(3))
    await asyncio.sleep(0)
    aborting.cancel()
    await asyncio.gather(aborting, return_exceptions=True)
    assert not made[0].gone
    await windows.abort_all()
    assert made[0].gone
    assert isinstance(await opening, ev.WindowFailed)


async def test_every_root_has_an_end_of_its_own() -> None:
    """A worker opens an end for each of three roots, a rank of the trainer its own, each under a
    prefix of its own; of a trainer of one rank the prefix is that of the window. Aborting one
    aborts all."""
    for roots, of, prefixes in (
        ((0, 1, 2), 3, ["window.1.3.0", "window.1.3.1", "window.1.3.2"]),
        ((1,), 3, ["window.1.3.1"]),
        ((0,), 1, ["window.1.3"]),
    ):
        windows, made = _windows()
        command = replace(_opening("gloo"), roots=roots, of=of)
        opening = asyncio.create_task(windows.open(command))
        await asyncio.sleep(0)
        assert [end.spec.prefix for end in made] == [f"sparsecast.r.{one}" for one in prefixes]
        await windows.abort(3)
        assert all(end.gone for end in made)
        failed = await opening
        assert isinstance(failed, ev.WindowFailed)
        assert ("root 0: " in failed.reason) == (len(roots) > 1)


class Steady:
    """An end that takes its time over everything, and notes what it was given."""

    def __init__(self, takes_s: float) -> None:
        self.spec: Any = SimpleNamespace(label="gloo:1.3")
        self.takes_s = takes_s
        self.given: list[Any] = []

    async def receive(self, staging: Any, *, attempt: int, timeout_s: float, behind: Any) -> None:
        """Take a while, or as long as there is."""
        self.given.append((staging, attempt, behind))
        await asyncio.sleep(min(self.takes_s, timeout_s))
        if self.takes_s > timeout_s:
            raise WindowTimeout(self.spec.label, "no sender")


async def test_ends_receive_in_turn_within_one_deadline() -> None:
    """Each root's payload goes to its own staging; a slow first root leaves the second what is left
    of the time, and nothing to the third: who waited in vain is named."""
    ends: list[Any] = [Steady(0.05), Steady(0.02), Steady(0.0)]
    await Ends(_places(3), ends).receive("abc", attempt=2, timeout_s=5.0, behind="xyz")  # type: ignore[arg-type]
    assert [end.given for end in ends] == [[(a, 2, b)] for a, b in zip("abc", "xyz", strict=True)]
    ends = [Steady(0.1), Steady(60.0), Steady(0.0)]
    began = asyncio.get_running_loop().time()
    with pytest.raises(WindowTimeout, match="root 1: no sender"):
        await Ends(_places(3), ends).receive("abc", attempt=1, timeout_s=0.3)  # type: ignore[arg-type]
    assert asyncio.get_running_loop().time() - began < 3.0
    assert not ends[2].given
    ends = [Steady(0.2), Steady(0.0)]
    ends[0].receive = lambda *_, **__: asyncio.sleep(0.2)
    with pytest.raises(WindowTimeout, match=r"root 1: not reached within 0\.1 s"):
        await Ends(_places(2), ends).receive("ab", attempt=1, timeout_s=0.1)  # type: ignore[arg-type]


async def test_waits_look_again_at_every_change() -> None:
    """Two wait for different things: each ends when its own is there, a third says what is not."""
    changes, state = Changes(), {"n": 0}

    def reached(n: int) -> asyncio.Task[int]:
        return asyncio.create_task(
            changes.until(
                lambda: state["n"] if state["n"] >= n else None,
                0.3,
                what=f"{n}",
                why=lambda: f"it is {state['n']}",
            )
        )

    one, two, nine = reached(1), reached(2), reached(9)
    for n in (1, 2):
        await asyncio.sleep(0)
        state["n"] = n
        changes.notify()
    assert await one in (1, 2)
    assert await two == 2
    with pytest.raises(WaitTimeout, match=r"9 not within 0\.3 s: it is 2"):
        await nine
    assert not changes._waiters


def _places(roots: int) -> list[Place]:
    """A worker's places at the ends of so many roots."""
    return [Place(root, None, 1, 2, f".{root}") for root in range(roots)]

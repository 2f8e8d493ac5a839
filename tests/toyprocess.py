"""One process of the toy run: a core, its timer, and a torch thread for one thing at a time."""

from collections.abc import Callable
from typing import Any

from sparsecast.messages.control import Sender, Stamp
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from toyworld import Key, Op, ToyWindow, World


class Process:
    """One core with what surrounds it. `lane` is its torch thread: one thing at a time."""

    core: Any

    def __init__(self, world: World, me: Sender) -> None:
        self.world = world
        self.me = me
        self.label = f"{me.name}/{me.incarnation}"
        self.alive = True
        self.closed = False
        self.frozen_until = 0.0
        self.ticks = 0
        self.began = world.now
        self._tick = 0
        self._lane = 0.0
        self._posting = False
        self._events: list[Any] = []

    def __repr__(self) -> str:
        return self.label

    def post(self, event: Any) -> None:
        if not self.alive:
            return
        if self.world.now < self.frozen_until:
            self.world.at(self.frozen_until, lambda: self.post(event))
            return
        self._events.append(event)
        if self._posting:
            return
        self._posting = True
        while self._events:
            commands = self.core.handle(self._events.pop(0), self.world.now)
            assert not (self.closed and commands), "a closed core speaks"
            if isinstance(event, ev.Close):
                self.closed = True
            for command in commands:
                self.perform(command)
        self._posting = False
        self.check()
        self.arm()

    def arm(self) -> None:
        self._tick += 1
        tick = self._tick
        deadline = self.core.next_deadline()
        if deadline is None:
            return
        if self.world.chance(self.world.faults.early):
            deadline = self.world.random.uniform(self.world.now, max(deadline, self.world.now))

        def ring() -> None:
            if tick == self._tick and self.alive:
                self.ticks += 1
                spent = self.world.now - self.began
                assert self.ticks < 300 + 120 * spent, f"{self} spins: {self.ticks} in {spent} s"
                self.post(ev.Tick())

        self.world.at(max(deadline, self.world.now + 0.0005), ring)

    def lane(self, seconds: float, work: Callable[[], Any]) -> None:
        """Do `work` after all that was asked for before; what it returns is posted."""

        def run() -> None:
            if not self.alive:
                return
            if self.world.now < self.frozen_until:
                self.world.at(self.frozen_until, run)
                return
            event = work()
            if event is not None:
                self.post(event)

        self._lane = max(self._lane, self.world.now) + seconds
        self.world.at(self._lane, run)

    def kill(self) -> None:
        self.alive = False
        for key in list(self.world.windows):
            self.world.break_off(key, self)

    def stop(self, seconds: float) -> None:
        self.frozen_until = max(self.frozen_until, self.world.now + seconds)

    def key(self, stamp: Stamp) -> Key:
        """The window of a stamp, as this process means it."""
        return stamp.epoch, stamp.window, self.trainer_life

    @property
    def trainer_life(self) -> str:
        raise NotImplementedError

    def open(self, command: cmd.OpenWindow) -> None:
        stamp, world = command.stamp, self.world
        world.enter(self, Stamp(stamp.epoch, stamp.window, 0, stamp.version))
        key = self.key(stamp)
        window = world.windows.setdefault(key, ToyWindow(command.size))
        assert window.size == command.size
        assert command.rank not in window.opens, "a rank opens a window twice"
        op = window.opens[command.rank] = Op(self)
        window.ranks[self.label] = command.rank
        world.after(command.timeout_s, lambda: world.fail(key, "open", op))
        world.progress(key, None)

    def failed(self, key: Key, what: str, op: Op) -> None:
        raise NotImplementedError

    def landed(self, op: Op) -> None:
        raise NotImplementedError

    def perform(self, command: Any) -> None:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError

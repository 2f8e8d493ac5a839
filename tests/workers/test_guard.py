"""The guard: readers share, a writer goes first and alone, half written weights are not served."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sparsecast.messages.errors import LocalProtocolError, ReplicaTorn, WaitTimeout
from sparsecast.workers.guard import Guard

SOON_S = 5.0


@contextmanager
def reader_elsewhere(guard: Guard) -> Iterator[Callable[[], None]]:
    """A thread that reads until the returned function is called, or the block ends."""
    inside, leave = threading.Event(), threading.Event()

    def read() -> None:
        with guard.reading():
            inside.set()
            leave.wait(SOON_S)

    thread = threading.Thread(target=read)
    thread.start()
    assert inside.wait(SOON_S)
    try:
        yield leave.set
    finally:
        leave.set()
        thread.join(SOON_S)


def fail_inside(guard: Guard, error: Exception, *, commit: int | None = None) -> None:
    """An apply that raises after its first write, before its commit or after it."""
    with guard.writing(1.0) as writer:
        writer.begin_write()
        if commit is not None:
            writer.commit(commit)
        raise error


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait, for a bounded time, until `condition` holds."""
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.0005)


def test_version_flips_at_commit() -> None:
    """A fresh guard knows no version; a reader after the commit sees the committed one."""
    guard = Guard()
    with guard.reading() as version:
        assert version is None
    with guard.writing(1.0) as writer:
        writer.begin_write()
        assert guard.version is None
        writer.commit(3)
    with guard.reading() as version:
        assert version == 3
    assert guard.readers == 0


def test_writer_names_the_readers_it_waited_for() -> None:
    """Two readers stay: the writer gives up at its deadline, says how many and how long, and
    readers pass again, the version untouched."""
    guard = Guard(7)
    with reader_elsewhere(guard), reader_elsewhere(guard):
        started = time.monotonic()
        with (
            pytest.raises(WaitTimeout, match=r"2 reader\(s\) hold them, the eldest for 0\.\d s"),
            guard.writing(0.1),
        ):
            pytest.fail("the writer got in beside readers")
        assert 0.1 <= time.monotonic() - started < 2
        with guard.reading() as version:
            assert version == 7


def test_oldest_reader_is_told_by_the_clock_given() -> None:
    """The eldest hold counts from its first entry, not from the nested one."""
    now = [100.0]
    guard = Guard(clock=lambda: now[0])
    assert guard.oldest_reader_s == 0.0
    with guard.reading():
        now[0] = 102.5
        with guard.reading():
            assert guard.oldest_reader_s == 2.5
            assert guard.readers == 1
    assert guard.oldest_reader_s == 0.0


def test_readers_behind_a_writer_that_gave_up_go_on() -> None:
    """A reader queues behind a waiting writer, which times out: the reader must not sleep on."""
    guard = Guard(1)
    entered = threading.Event()

    def write() -> None:
        with pytest.raises(WaitTimeout), guard.writing(0.15):
            pass

    def read() -> None:
        with guard.reading():
            entered.set()

    with reader_elsewhere(guard):
        writer = threading.Thread(target=write)
        writer.start()
        until(lambda: guard._writers_waiting == 1, "the writer never queued")
        reader = threading.Thread(target=read)
        reader.start()
        assert not entered.wait(0.05), "a new reader passed a waiting writer"
        assert entered.wait(SOON_S / 2), "the reader slept on after the writer had given up"
        writer.join(SOON_S)
        reader.join(SOON_S)


def test_reentrant_reader_passes_a_waiting_writer() -> None:
    """A reader that enters again while a writer waits for it would deadlock if it queued."""
    guard = Guard(1)
    written = threading.Event()

    def write() -> None:
        with guard.writing(SOON_S) as writer:
            writer.commit(2)
            written.set()

    thread = threading.Thread(target=write)
    with guard.reading():
        thread.start()
        until(lambda: guard._writers_waiting == 1, "the writer never queued")
        with guard.reading(timeout_s=1.0) as version:
            assert version == 1
        assert not written.is_set()
    thread.join(SOON_S)
    assert guard.version == 2


@pytest.mark.parametrize("how", ["raise", "forget"])
def test_an_apply_that_stops_half_way_tears_the_replica(how: str) -> None:
    """After begin_write() only commit() saves the weights; a later commit heals them."""
    guard = Guard(4)
    if how == "raise":
        with pytest.raises(OSError, match="cable"):
            fail_inside(guard, OSError("the cable"))
    else:
        with guard.writing(1.0) as writer:
            writer.begin_write()
    assert guard.torn is not None
    with (
        pytest.raises(ReplicaTorn, match="cable" if how == "raise" else "without commit"),
        guard.reading(),
    ):
        pytest.fail("half written weights were served")
    with guard.holding(4) as held:
        assert not held
    with guard.writing(1.0) as writer:
        writer.begin_write()
        writer.commit(9)
    with guard.reading() as version:
        assert version == 9


def test_failing_before_the_first_write_or_after_the_commit_tears_nothing() -> None:
    """A check that fails inside the guard, before anything was written, leaves the old version."""
    guard = Guard(4)
    with pytest.raises(ValueError, match="early"), guard.writing(1.0):
        raise ValueError("early")
    with guard.reading() as version:
        assert version == 4
    with pytest.raises(ValueError, match="late"):
        fail_inside(guard, ValueError("late"), commit=5)
    with guard.reading() as version:
        assert version == 5


def test_weights_found_wrong_are_served_to_no_new_reader() -> None:
    """The digest of version 4 was not the trainer's: whoever reads now may end, nobody else comes
    in, naming the reason, until the resync commits; proving a version alone does not heal."""
    guard = Guard(4)
    refused = threading.Event()

    def read() -> None:
        with pytest.raises(ReplicaTorn, match="digest of version 4"), guard.reading():
            pass
        refused.set()

    with guard.reading():
        guard.tear("the digest of version 4 is not the trainer's")
        with guard.reading() as version:
            assert version == 4
        thread = threading.Thread(target=read)
        thread.start()
        assert refused.wait(SOON_S)
        thread.join(SOON_S)
    guard.declare(4)
    with pytest.raises(ReplicaTorn), guard.reading():
        pass
    with guard.writing(1.0) as writer:
        writer.begin_write()
        writer.commit(5)
    with guard.reading() as version:
        assert version == 5


def test_readers_that_wait_hear_of_a_tear() -> None:
    """A reader queued behind a waiting writer is refused at once, not at its deadline."""
    guard = Guard(1)
    errors: list[type[BaseException]] = []

    def write() -> None:
        try:
            with guard.writing(1.0):
                pass
        except WaitTimeout:
            pass

    def read() -> None:
        try:
            with guard.reading():
                pass
        except ReplicaTorn as exc:
            errors.append(type(exc))

    with reader_elsewhere(guard):
        writer = threading.Thread(target=write)
        writer.start()
        until(lambda: guard._writers_waiting == 1, "the writer never queued")
        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.02)
        guard.tear("found wrong")
        until(lambda: errors == [ReplicaTorn], "the waiting reader was not told")
    writer.join(SOON_S)
    reader.join(SOON_S)


def test_declared_version_is_what_readers_see() -> None:
    """A digest has shown that untouched weights are version 0: no writing, and readers know."""
    guard = Guard()
    guard.declare(0)
    with guard.reading() as version:
        assert version == 0


def test_holding_refuses_another_version() -> None:
    """The digest of version 1 asks again after version 2 has landed: it holds nothing, and a
    writer is not kept out."""
    guard = Guard(1)
    with guard.holding(1) as held:
        assert held
        assert guard.readers == 1
    with guard.writing(1.0) as writer:
        writer.commit(2)
    with guard.holding(1) as held:
        assert not held
        assert guard.readers == 0
    assert guard.readers == 0


def test_misuse_is_an_error_not_a_deadlock() -> None:
    """One thread that would wait for itself is told so at once; so is a writer used too late."""
    guard = Guard(1)
    with guard.reading(), pytest.raises(LocalProtocolError, match=r"inside reading"):
        guard.writing(SOON_S).__enter__()
    with guard.writing(1.0) as writer:
        with pytest.raises(LocalProtocolError, match="inside writing"):
            guard.reading().__enter__()
        with pytest.raises(LocalProtocolError, match="inside writing"):
            guard.writing(1.0).__enter__()
    with pytest.raises(LocalProtocolError, match="has ended"):
        writer.commit(2)
    assert guard.version == 1


def test_reader_gives_up_while_a_writer_writes() -> None:
    """A writer that never ends costs a reader its deadline, not for ever."""
    guard = Guard(1)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            with guard.reading(timeout_s=0.1):
                pass
        except WaitTimeout as exc:
            errors.append(exc)

    with guard.writing(1.0):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join(SOON_S)
    assert [str(error) for error in errors] == [
        "reading the weights not within 0.1 s: a writer writes"
    ]


def test_no_reader_ever_sees_half_an_update() -> None:
    """Four readers hammer two cells that a writer changes one after the other, some writes failing
    half way: every reader finds both cells equal to the version it was told."""
    guard = Guard(0)
    cells = [0, 0]
    stop = threading.Event()
    wrong: list[tuple[int | None, int, int]] = []
    seen = [0] * 4

    def read(index: int) -> None:
        while not stop.is_set():
            try:
                with guard.reading() as version:
                    first = cells[0]
                    with guard.reading() as again:
                        time.sleep(0)
                        if not first == cells[1] == version == again:
                            wrong.append((version, first, cells[1]))
                seen[index] += 1
            except ReplicaTorn:
                time.sleep(0)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 1.0
    version = 0
    while time.monotonic() < deadline:
        version += 1
        try:
            with guard.writing(SOON_S) as writer:
                writer.begin_write()
                cells[0] = version
                time.sleep(0)
                if version % 5 == 0:
                    raise RuntimeError("half way")
                cells[1] = version
                writer.commit(version)
        except RuntimeError:
            assert guard.torn
        time.sleep(0.001)
    stop.set()
    for thread in threads:
        thread.join(SOON_S)
    assert not wrong
    assert version > 20
    assert min(seen) > 20


class Actor:
    """A thread that does with the guard what it is told; `outcome` is None while it is blocked."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.commands: queue.Queue[Callable[[], Any] | None] = queue.Queue()
        self.entered: list[AbstractContextManager[Any]] = []
        self.writer: Any = None
        self.outcome: Any = "idle"
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while (command := self.commands.get()) is not None:
            try:
                self.outcome = ("done", command())
            except Exception as exc:
                self.outcome = ("raised", type(exc))

    def tell(self, command: Callable[[], Any]) -> None:
        self.outcome = None
        self.commands.put(command)

    def read(self) -> int | None:
        context = self.guard.reading(timeout_s=SOON_S)
        version = context.__enter__()
        self.entered.append(context)
        return version

    def leave(self) -> None:
        self.entered.pop().__exit__(None, None, None)

    def write(self) -> None:
        context = self.guard.writing(SOON_S)
        self.writer = context.__enter__()
        self.entered.append(context)

    def fail(self) -> None:
        error = RuntimeError("on purpose")
        assert not self.entered.pop().__exit__(RuntimeError, error, None)

    def blocked(self) -> bool:
        return self.outcome is None


class GuardMachine(RuleBasedStateMachine):
    """Three threads in any order against a model that says who may be in, and who must wait."""

    def __init__(self) -> None:
        super().__init__()
        self.guard = Guard(0)
        self.actors = [Actor(self.guard) for _ in range(3)]
        self.depth = [0, 0, 0]
        self.waiting_readers: set[int] = set()
        self.waiting_writers: set[int] = set()
        self.writer: int | None = None
        self.began = False
        self.torn = False
        self.version = 0

    def idle(self, who: int) -> bool:
        return who != self.writer and who not in self.waiting_readers | self.waiting_writers

    def finished(self, who: int) -> Any:
        until(lambda: not self.actors[who].blocked(), f"actor {who} is blocked and should not be")
        return self.actors[who].outcome

    def stays_blocked(self, who: int) -> None:
        # On a busy machine it may not have come to the guard yet: who is told next would pass it.
        actor, waiting = self.actors[who], {who} | self.waiting_readers | self.waiting_writers
        waits = self.guard._changed._waiters  # type: ignore[attr-defined]
        until(lambda: not actor.blocked() or len(waits) == len(waiting), f"actor {who} is away")
        assert actor.blocked(), actor.outcome

    def settle(self) -> None:
        """Let those in whom the last step freed, as the rules say."""
        if self.writer is None and not any(self.depth) and self.waiting_writers:
            until(
                lambda: any(not self.actors[who].blocked() for who in self.waiting_writers),
                "no waiting writer got in",
            )
            (who,) = (who for who in self.waiting_writers if not self.actors[who].blocked())
            assert self.finished(who) == ("done", None)
            self.waiting_writers.discard(who)
            self.writer, self.began = who, False
        if self.torn:
            for who in self.waiting_readers:
                assert self.finished(who) == ("raised", ReplicaTorn)
            self.waiting_readers.clear()
        elif self.writer is None and not self.waiting_writers:
            for who in self.waiting_readers:
                assert self.finished(who) == ("done", self.version)
                self.depth[who] = 1
            self.waiting_readers.clear()

    @initialize()
    def start(self) -> None:
        assert self.guard.version == 0

    @rule(who=st.integers(0, 2))
    def read(self, who: int) -> None:
        if not self.idle(who):
            return
        actor = self.actors[who]
        actor.tell(actor.read)
        if self.depth[who]:
            assert self.finished(who) == ("done", self.version)
            self.depth[who] += 1
        elif self.torn:
            assert self.finished(who) == ("raised", ReplicaTorn)
        elif self.writer is not None or self.waiting_writers:
            self.stays_blocked(who)
            self.waiting_readers.add(who)
        else:
            assert self.finished(who) == ("done", self.version)
            self.depth[who] = 1

    @rule(who=st.integers(0, 2))
    def leave(self, who: int) -> None:
        if not self.depth[who]:
            return
        self.actors[who].tell(self.actors[who].leave)
        assert self.finished(who) == ("done", None)
        self.depth[who] -= 1
        self.settle()

    @rule(who=st.integers(0, 2))
    def write(self, who: int) -> None:
        if not self.idle(who):
            return
        actor = self.actors[who]
        actor.tell(actor.write)
        if self.depth[who]:
            assert self.finished(who) == ("raised", LocalProtocolError)
            return
        self.waiting_writers.add(who)
        if self.writer is not None or any(self.depth):
            self.stays_blocked(who)
        self.settle()

    # No preconditions: which of two waiting writers got in is chance, and a replay that drew other
    # steps for it would be flaky.
    @rule(version=st.integers(0, 5), commit=st.booleans())
    def begin(self, version: int, commit: bool) -> None:
        if self.writer is None:
            return
        writer = self.actors[self.writer].writer
        writer.begin_write()
        self.began = True
        if commit:
            writer.commit(version)
            self.version, self.began, self.torn = version, False, False

    @rule(fail=st.booleans())
    def end(self, fail: bool) -> None:
        if self.writer is None:
            return
        actor = self.actors[self.writer]
        actor.tell(actor.fail if fail else actor.leave)
        assert self.finished(self.writer) == ("done", None)
        self.torn = self.torn or self.began
        self.writer, self.began = None, False
        self.settle()

    @rule(fail=st.booleans())
    def break_off(self, fail: bool) -> None:
        self.begin(version=0, commit=False)
        self.end(fail=fail)

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.guard.readers == sum(depth > 0 for depth in self.depth)
        assert not (self.writer is not None and any(self.depth))
        assert self.guard.version == self.version
        assert bool(self.guard.torn) == self.torn

    def teardown(self) -> None:
        while self.writer is not None or any(self.depth):
            if self.writer is not None:
                self.end(fail=False)
            for who in range(3):
                self.leave(who)
        assert not self.waiting_readers | self.waiting_writers
        for actor in self.actors:
            actor.commands.put(None)
            actor.thread.join(SOON_S)
            assert not actor.thread.is_alive()


TestGuardMachine = GuardMachine.TestCase
TestGuardMachine.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

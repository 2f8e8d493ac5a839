"""A chaos run: broker, trainer and workers as real processes, each with its own way to the broker.

    async with Site(folder) as site:
        await site.start()
        site.trainer.kill(); site.trainer.start()
        await site.settle()                 # everybody is at the head, every digest is equal
        site.check()                        # nobody was ever wrong, no publish() was held up

What the processes say is compared with what the trainers said that they would publish, read by
read.
"""

import asyncio
import contextlib
import json
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sparsecast import Policy
from sparsecast.messages import codec
from sparsecast.messages.metrics import Event, EventKind
from sparsecast.pipeline.bus.base import Message
from sparsecast.pipeline.bus.nats import connect

from ..servers import Proxy
from . import roles
from .actors import Actor
from .roles import Part
from .servers import Server

#: Deadlines short enough that a fault costs a second, long enough for two loaded cores.
SHORT = Policy(
    window="gloo",
    lease_s=1,
    heartbeat_s=0.1,
    silence_s=1.0,
    ready_s=0.5,
    commit_s=1.5,
    open_s=1.0,
    send_s=1.0,
    guard_s=0.5,
    settle_s=1.0,
    probe_s=0.3,
    backoff_s=0.2,
    backoff_max_s=1.0,
    retry_s=0.1,
    bus_s=2.0,
    store_s=3.0,
    anchor_every=25,
)
#: publish() waits for nobody: this is far more than its diff takes, and less than the shortest
#: wait that it could have been drawn into.
PUBLISH_S = SHORT.ready_s
#: Until all is well again after the last fault.
SETTLE_S = 20.0


@dataclass(slots=True)
class Truth:
    """What may be read, and what was."""

    #: The digests that trainers have said before they published, by version.
    digests: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    #: Of weights with which a trainer has opened the run, at a version that it may have died before
    #: telling.
    openings: set[int] = field(default_factory=set)
    #: With what a trainer has claimed the run: a version, and contents that it had before.
    claims: set[tuple[int, int]] = field(default_factory=set)

    #: What was read: by whom, which version, which digest.
    reads: set[tuple[str, int, int]] = field(default_factory=set)

    def lies(self) -> list[str]:
        """Reads of what no trainer has said. Words come in any order: ask when all have come."""
        made = self.openings.union(*self.digests.values())
        claimed = {(version, digest) for version, digest in self.claims if digest in made}
        return [
            f"{name} read {digest:016x} as version {version}"
            for name, version, digest in sorted(self.reads)
            if digest not in self.digests[version]
            and digest not in self.openings
            and (version, digest) not in claimed
        ]


class Site:
    """Everything of one run. What it started dies with it."""

    def __init__(
        self,
        *,
        workers: int = 2,
        policy: Policy = SHORT,
        pace_s: float = 0.1,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._stack = contextlib.AsyncExitStack()
        self._policy = policy
        self._pace_s = pace_s
        self._news = asyncio.Event()
        self._began = time.monotonic()
        self._print = note
        self.notes: list[str] = []
        self.truth = Truth()
        #: What must never be, in the order in which it was found.
        self.wrong: list[str] = []
        #: How often each event was told on the bus, by its kind, as far as it was heard.
        self.events: Counter[str] = Counter()
        self._told: set[tuple[str, str]] = set()
        self.longest_publish_s = 0.0
        #: How long the last settle() took.
        self.settled_s = 0.0
        self.trainer = Actor(self, "trainer", roles.trainer)
        self.workers = [Actor(self, f"w{n}", roles.worker) for n in range(workers)]
        #: Another trainer, which is not started with the others.
        self.rival = Actor(self, "rival", roles.trainer)
        self.actors = {actor.name: actor for actor in (self.trainer, self.rival, *self.workers)}
        #: The test's own way to the broker.
        self._way = Proxy("")

    async def __aenter__(self) -> Self:
        try:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
            self.broker = Server(folder, self.wrong.append)
            self._stack.push_async_callback(self.broker.kill)
            await self.broker.start()
            self.note(f"broker: pid {self.broker.pid}")
            for way in self._ways():
                await self._stack.enter_async_context(way)
            self._lead()
            bus = await connect(self._way.url, name="chaos", timeout_s=10.0)
            self._stack.push_async_callback(bus.close, 0.5)
            await bus.subscribe("sparsecast.chaos.events", self._event)
            path = str(folder / "said")
            server = await asyncio.start_unix_server(self._serve, path)
            self._stack.callback(server.close)
            self.part = Part(
                name="",
                run="chaos",
                bus="",
                socket=path,
                seed=0,
                policy=self._policy,
                pace_s=self._pace_s,
                workers=len(self.workers),
            )
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for actor in self.actors.values():
            self._stack.callback(actor.kill)
        await self._stack.aclose()
        if error is not None:
            error.add_note("\n".join(["what was done:", *self.notes[-40:], *self.wrong]))

    def note(self, text: str) -> None:
        """Write down what was done, and when."""
        line = f"{time.monotonic() - self._began:7.2f} {text}"
        self.notes.append(line)
        if self._print is not None:
            self._print(line)

    # ---- the run

    async def start(self) -> None:
        """All processes, until all workers are in; then train."""
        for actor in self.started():
            actor.start()
        await self.settle()
        self.run()

    def started(self) -> list[Actor]:
        """Those of the beginning: the trainer and the workers."""
        return [self.trainer, *self.workers]

    def run(self) -> None:
        """Train and publish."""
        self.trainer.tell("run")

    async def supersede(self) -> None:
        """Another trainer takes the run, which the one that has it does not answer for; that one
        may be fenced off from now on."""
        self.trainer, self.rival = self.rival, self.trainer
        self.trainer.start()
        await self.until(lambda: "open" in self.trainer.said, 10.0, "the rival has the run")

    async def restart_broker(self, *, forgetful: bool = False) -> None:
        """After a kill: another one, to which every way leads from now on."""
        await self.broker.start(forgetful=forgetful)
        self.note(f"broker: pid {self.broker.pid}{' without its store' if forgetful else ''}")
        self._lead()

    def _ways(self) -> list[Proxy]:
        return [self._way, *(actor.way for actor in self.actors.values())]

    def _lead(self) -> None:
        for way in self._ways():
            way.lead_to(self.broker.url)

    def heal(self) -> None:
        """End every fault: who is stopped or held goes on, every way is open."""
        for actor in self.actors.values():
            actor.go_on()
            actor.way.accept()
            actor.way.flow()
            actor.way.delay_s = 0.0
        with contextlib.suppress(ProcessLookupError):
            self.broker.signal(signal.SIGCONT)

    async def settle(self, *, heal: bool = True, timeout_s: float = SETTLE_S) -> None:
        """Pause the trainer, and wait until every worker is a member, has its head and has proven
        it."""
        began = time.monotonic()
        if heal:
            self.heal()
        self.trainer.said.pop("paused", None)
        self.trainer.tell("pause")
        await self.until(self._settled, timeout_s, "everybody is at the head")
        self.settled_s = time.monotonic() - began
        version = self.trainer.said["paused"]["version"]
        self.note(f"settled at version {version}, {self.settled_s:.2f} s")
        made = self.trainer.said.get("making") or self.trainer.said["opening"]
        for worker in self.workers:
            if worker.said["read"]["digest"] != made["digest"]:
                self.wrong.append(f"{worker.name} is not what the trainer is, at version {version}")

    def _settled(self) -> bool:
        paused = self.trainer.said.get("paused")
        return paused is not None and all(
            (read := worker.said.get("read")) is not None
            and read["version"] == read["verified"] == paused["version"]
            for worker in self.workers
        )

    def check(self) -> None:
        """Nobody was ever wrong, and no publish() was held up."""
        self.wrong += self.truth.lies()
        assert not self.wrong, "\n".join(self.wrong)
        assert self.longest_publish_s < PUBLISH_S, (
            f"a publish() took {self.longest_publish_s:.3f} s"
        )

    async def until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait for what the processes say; TimeoutError tells what they have said."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    assert not self.wrong, "\n".join(self.wrong)
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            said = "\n".join(f"{actor.name}: {actor.said}" for actor in self.actors.values())
            raise TimeoutError(f"not within {timeout_s:g} s: {what}\n{said}") from None

    # ---- what is said

    def _event(self, message: Message) -> None:
        event = codec.decode_metric(message.data, subject=message.subject)
        assert isinstance(event, Event)
        self.events[event.kind] += 1
        self._told.add((event.kind, event.member))
        if event.kind == "mismatch":
            self.wrong.append(f"mismatch of {event.member}: {event.reason}")
        self._news.set()

    async def event(self, kind: EventKind, member: str) -> None:
        """Wait for an event, from now on."""
        self._told.discard((kind, member))
        await self.until(lambda: (kind, member) in self._told, 10.0, f"{kind} of {member}")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        actor: Actor | None = None
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while line := await reader.readline():
                words = json.loads(line)
                if actor is None:
                    actor, life = self.actors[words["name"]], self.actors[words["name"]].lives
                    actor.called(writer)
                    self.note(f"{actor.name}: pid {words['pid']}")
                self._learn(actor, words)
                if life == actor.lives:
                    self._heard(actor, words)
                self._news.set()
        writer.close()
        if actor is not None and life == actor.lives and actor.alive and "left" not in actor.said:
            self.wrong.append(f"{actor.name} died by itself")
            self._news.set()

    def _learn(self, actor: Actor, words: dict[str, Any]) -> None:
        """What counts even if its speaker is dead by now."""
        match words:
            case {"kind": "opening", "digest": digest}:
                self.truth.openings.add(digest)
            case {"kind": "claiming", "version": version, "digest": digest}:
                self.truth.claims.add((version, digest))
            case {"kind": "making", "version": version, "digest": digest}:
                self.truth.digests[version].add(digest)
            case {"kind": "read", "version": version, "digest": digest, "mismatches": mismatches}:
                self.truth.reads.add((actor.name, version, digest))
                if mismatches:
                    self.wrong.append(f"{actor.name} has {mismatches} mismatches")
            case {"kind": "fenced", "text": text} if actor is self.rival:
                self.note(f"{actor.name}: {text}")
            case {"kind": "error" | "fenced", "text": text}:
                self.wrong.append(f"{actor.name}: {text}")

    def _heard(self, actor: Actor, words: dict[str, Any]) -> None:
        match words:
            case {"kind": "made", "began": began, "ended": ended}:
                idle = sum(max(0.0, min(e, ended) - max(b, began)) for b, e in actor.idle)
                self.longest_publish_s = max(self.longest_publish_s, ended - began - idle)
            case {"kind": "kept out", "text": text}:
                self.note(f"{actor.name}: {text}")
        actor.heard(words)

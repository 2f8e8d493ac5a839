"""What runs in the processes of a chaos run: a trainer and a worker, with breakpoints.

Both are what a user would write around `sparsecast.Publisher` and `sparsecast.Replica`, and both
tell the test over a socket what they make, read and meet. A *breakpoint* is a stage of a round at
which the process stands still until the test lets it go on, or kills it there.

Self-contained: `spawn` loads this file into a fresh process by its path.
"""

import contextlib
import ctypes
import functools
import inspect
import json
import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any

import torch

from sparsecast import Policy, Publisher, Replica, digest
from sparsecast.messages import codec
from sparsecast.messages.errors import (
    BusUnavailable,
    Fenced,
    NameInUse,
    ReplicaTorn,
    RunBusy,
    WaitTimeout,
)
from sparsecast.pipeline.bus.journal import Journal
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.delta import Shadow
from sparsecast.workers.archive import Archive
from sparsecast.workers.engine import ModuleEngine
from sparsecast.workers.fetching import Fetching
from sparsecast.workers.hands import Hands
from sparsecast.workers.incoming import Incoming
from sparsecast.workers.sending import Sending
from sparsecast.workers.tenure import Tenure

#: How long a breakpoint holds, and a pause waits for the workers, at most.
HELD_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a process is told at its start. `bus` is its own way to the broker."""

    name: str
    run: str
    bus: str
    socket: str
    seed: int
    policy: Policy
    #: Between two publishes of a trainer; and how many workers it should have.
    pace_s: float = 0.1
    workers: int = 0


class Link:
    """The process's line to the test: one JSON object a line, both ways."""

    def __init__(self, part: Part) -> None:
        self.running = threading.Event()
        #: Asked to pause, and not answered yet.
        self.pausing = threading.Event()
        self.ended = threading.Event()
        self._armed = ""
        self._released = threading.Event()
        self._writing = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(part.socket)
        self.say("hello", name=part.name, pid=os.getpid())
        threading.Thread(target=self._listen, name="test", daemon=True).start()

    def say(self, kind: str, **fields: Any) -> None:
        with self._writing:
            self._socket.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")

    def armed(self, stage: str) -> bool:
        return self._armed == stage

    def reach(self, stage: str) -> None:
        """This stage has come; with a breakpoint here, stand still."""
        if self._armed != stage:
            return
        self._armed = ""
        self._released.clear()
        self.say("at", stage=stage)
        if not self._released.wait(HELD_S):
            self.say("error", text=f"nobody took this process on from {stage!r}")

    def _listen(self) -> None:
        for line in self._socket.makefile():
            match json.loads(line):
                case {"do": "arm", "stage": stage}:
                    self._armed = stage
                    self.say("armed", stage=stage)
                case {"do": "go on"}:
                    self._armed = ""
                    self._released.set()
                case {"do": "run"}:
                    self.running.set()
                case {"do": "pause"}:
                    self.running.clear()
                    self.pausing.set()
                case {"do": "end"}:
                    self.ended.set()
        os._exit(77)  # the test is gone


# ---- the stages of a round


def before(owner: type, name: str, link: Link, stage: str) -> None:
    """Have every call of this method come by a stage first."""
    real = getattr(owner, name)

    @functools.wraps(real)
    async def wrapped_async(*args: Any, **options: Any) -> Any:
        link.reach(stage)
        return await real(*args, **options)

    @functools.wraps(real)
    def wrapped(*args: Any, **options: Any) -> Any:
        link.reach(stage)
        return real(*args, **options)

    setattr(owner, name, wrapped_async if inspect.iscoroutinefunction(real) else wrapped)


def messages(link: Link) -> None:
    """Every control message is a stage, by its name: the broker has it, and nothing followed."""
    real = NatsBus.publish

    async def publish(bus: NatsBus, subject: str, data: bytes, **options: Any) -> None:
        await real(bus, subject, data, **options)
        if subject.endswith(".control"):
            stage = type(codec.decode(data, subject=subject)).__name__.lower()
            if link.armed(stage):
                await bus.flush(5.0)
                link.reach(stage)

    NatsBus.publish = publish  # type: ignore[method-assign]


def trainer_stages(link: Link) -> None:
    messages(link)
    diff, append = Shadow.diff, Journal.append

    def diffing(shadow: Shadow, *args: Any, waiting: Callable[[], None], **options: Any) -> Any:
        def begun() -> None:
            waiting()
            link.reach("diff")  # members are asked to prepare, and there is no patch yet

        return diff(shadow, *args, waiting=begun, **options)

    async def announcing(journal: Journal, message: Any, **options: Any) -> int:
        link.reach("announce")
        sequence = await append(journal, message, **options)
        link.reach("announced")  # the journal has it, and its author does not know
        return sequence

    Shadow.diff = diffing  # type: ignore[method-assign]
    Journal.append = announcing  # type: ignore[method-assign]
    before(Sending, "send", link, "broadcast")
    before(Archive, "store", link, "store")


def worker_stages(link: Link) -> None:
    messages(link)
    before(Hands, "receive", link, "broadcast")
    before(Fetching, "fetch", link, "fetch")
    before(Incoming, "stage", link, "check")
    before(ModuleEngine, "after_apply", link, "apply")  # written, and the version has not flipped
    before(Incoming, "digest", link, "digest")


#: Where each can be held; those in the second row are messages that it has said.
TRAINER_STAGES = ("diff", "announce", "announced", "broadcast", "store", "prepare", "go")
WORKER_STAGES = ("broadcast", "check", "apply", "digest", "ready", "received", "applied")


# ---- the weights


def weights(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(90, 41, generator=random).to(torch.bfloat16),
        "layer.weight": torch.randn(48, 32, generator=random),
        "layer.bias": torch.randn(48, generator=random).to(torch.float16),
        "steps": torch.zeros((), dtype=torch.int64),
    }


def train(tensors: dict[str, torch.Tensor], random: torch.Generator) -> None:
    """Change a few percent of the elements, in place."""
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor[torch.rand(tensor.shape, generator=random) < 0.03] += 1.5
        else:
            tensor += 1


# ---- the processes


@contextlib.contextmanager
def telling(part: Part) -> Iterator[Link]:
    """The line to the test; whatever goes wrong inside is told there."""
    # We die with the server that forked us, even while we are stopped; and it ends with the test,
    # unless we hold the pipe open by which it knows of that.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    if os.environ.get("SPARSECAST_CHAOS_LOG"):
        logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {part.name}: %(message)s")
    link = Link(part)
    try:
        yield link
    except BaseException:
        link.say("error", text=traceback.format_exc())
        raise


def claims(link: Link) -> None:
    """Say what the run goes on from, before it is claimed: the contents may be of an old version,
    which the log has made again."""
    append = Tenure._append_claim

    async def said(self: Tenure, epoch: int, version: int, digest: int, sequence: int) -> None:
        link.say("claiming", version=version, digest=digest)
        await append(self, epoch, version, digest, sequence)

    Tenure._append_claim = said  # type: ignore[method-assign]


def trainer(context: Any, part: Part) -> None:
    """Hold the run, train and publish while told to; say what every version is before it is one."""
    random = torch.Generator().manual_seed(part.seed)
    mine = weights(part.seed)
    with telling(part) as link:
        trainer_stages(link)
        claims(link)
        link.say("opening", digest=digest(mine))
        publisher = Publisher(mine, run=part.run, bus=part.bus, policy=part.policy, linger_s=2.0)
        while True:
            try:
                publisher.open()
                break
            except (RunBusy, BusUnavailable) as exc:
                link.say("kept out", text=str(exc))
                if link.ended.wait(0.05):
                    return
        link.say("open", version=publisher.version)
        try:
            lead(link, publisher, mine, random, part)
        except Fenced as exc:
            link.say("fenced", text=str(exc))
        finally:
            publisher.close()
        link.say("left")


def lead(
    link: Link,
    publisher: Publisher,
    mine: dict[str, torch.Tensor],
    random: torch.Generator,
    part: Part,
) -> None:
    while not link.ended.is_set():
        if not link.running.wait(0.02):
            if link.pausing.is_set():
                link.pausing.clear()
                publisher.wait_members(part.workers, timeout_s=HELD_S)
                link.say("paused", version=publisher.version)
            continue
        train(mine, random)
        link.say("making", version=publisher.version + 1, digest=digest(mine))
        began = time.monotonic()
        update = publisher.publish()
        link.say("made", version=update.version, began=began, ended=time.monotonic())
        link.ended.wait(part.pace_s)


def worker(context: Any, part: Part) -> None:
    """Follow the run and read all the time; say what every read has seen. Start again where the
    name is not free yet, as whoever keeps workers running would."""
    mine = weights(part.seed)
    with telling(part) as link:
        worker_stages(link)
        while not link.ended.is_set():
            replica = Replica(mine, run=part.run, bus=part.bus, name=part.name, policy=part.policy)
            try:
                replica.start()
                read(link, replica, mine)
            except (BusUnavailable, NameInUse) as exc:
                link.say("kept out", text=str(exc))
                link.ended.wait(0.1)
            finally:
                replica.stop()
        link.say("left")


def read(link: Link, replica: Replica, mine: dict[str, torch.Tensor]) -> None:
    said: tuple[Any, ...] = ()
    while not link.ended.wait(0.01):
        replica.ports  # noqa: B018 - raises what has ended the replica
        try:
            with replica.reading(timeout_s=1.0) as version:
                found = digest(mine)
        except (ReplicaTorn, WaitTimeout):
            continue
        seen = (version, found, replica.verified, replica.mismatches, replica.status)
        if version is not None and seen[:4] != said[:4]:
            said = seen
            names = ("version", "digest", "verified", "mismatches", "status")
            link.say("read", **dict(zip(names, seen, strict=True)))

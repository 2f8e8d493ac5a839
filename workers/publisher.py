"""The trainer's face: Publisher (synchronous) and AsyncPublisher over the driver."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import torch

from ..messages import codec
from ..messages.control import Claim, Sender, Tags, WorkerMessage
from ..messages.errors import (
    BusError,
    Closed,
    Fenced,
    LogError,
    PublisherBusy,
    RemoteProtocolError,
    SequenceConflict,
    SparsecastError,
    StreamMissing,
    WindowError,
)
from ..messages.metrics import Event, EventKind, TrainerMetrics
from ..messages.subjects import Subjects, sender
from ..pipeline.bus.base import Message, Subscription
from ..pipeline.bus.journal import Journal
from ..pipeline.bus.lease import Lease
from ..pipeline.core import commands as cmd
from ..pipeline.core import events as ev
from ..pipeline.core.policy import Policy
from ..pipeline.core.trainer import TrainerCore
from .connect import LoopThread, connect
from .driver import Changes, Driver, Outbox, Ports, Windows
from .outgoing import Outgoing, Published, Source

log = logging.getLogger("sparsecast.publisher")

T = TypeVar("T")

OnBusy = Literal["coalesce", "wait", "error"]


@dataclass(frozen=True, slots=True)
class Report:
    """How far an update has come.

    `applied` maps worker names to the seconds from publish() until the trainer heard that the
    weights hold it (0.0 if that is no longer remembered); `missing` maps every other member to
    the reason.
    """

    version: int
    applied: Mapping[str, float]
    missing: Mapping[str, str]

    @property
    def complete(self) -> bool:
        """Whether every member has it, and there is at least one."""
        return bool(self.applied) and not self.missing

    def flat(self, prefix: str = "sparsecast/") -> dict[str, float]:
        """Scalars for any logger."""
        times = sorted(self.applied.values())
        return {
            f"{prefix}version": float(self.version),
            f"{prefix}applied": float(len(self.applied)),
            f"{prefix}missing": float(len(self.missing)),
            f"{prefix}applied_first_s": times[0] if times else 0.0,
            f"{prefix}applied_last_s": times[-1] if times else 0.0,
        }


class _Made:
    """The facts of one publish()."""

    def __init__(self, made: Published) -> None:
        self.version = made.version
        self.base_version = made.base_version
        #: Elements whose bits changed, and bytes of the patch and of the same weights dense.
        self.changed = made.changed
        self.nbytes = made.nbytes
        self.dense_nbytes = made.dense_nbytes
        self._numel = made.numel

    @property
    def density(self) -> float:
        """The share of elements that changed, 0 to 1."""
        return self.changed / self._numel if self._numel else 0.0


class AsyncUpdate(_Made):
    """One published update."""

    def __init__(self, made: Published, publisher: AsyncPublisher) -> None:
        super().__init__(made)
        self._publisher = publisher

    async def wait_applied(
        self, timeout_s: float = 30.0, at_least: Literal["all"] | int = "all"
    ) -> Report:
        """Wait until all members, or `at_least` n, hold this version; at the timeout too, return.

        Raises only if the publisher was fenced, closed or broken.
        """
        return await self._publisher._wait_applied(self.version, timeout_s, at_least)


class Update(_Made):
    """One published update, for synchronous callers."""

    def __init__(self, made: Published, publisher: Publisher) -> None:
        super().__init__(made)
        self._publisher = publisher

    def wait_applied(
        self, timeout_s: float = 30.0, at_least: Literal["all"] | int = "all"
    ) -> Report:
        """Wait until all members, or `at_least` n, hold this version; at the timeout too, return.

        Raises only if the publisher was fenced, closed or broken.
        """
        inner = self._publisher._inner
        return self._publisher._call(inner._wait_applied(self.version, timeout_s, at_least))


class AsyncPublisher:
    """Publishes a model's weights to the workers of a run.

    `model` is a Module (its state_dict) or a mapping of names to tensors on any device; `dtype`
    publishes floating tensors as what inference runs. `bus` is a NATS URL, or None for an embedded
    broker that ends with this object. Use it as an async context manager: entering claims the run
    (RunBusy, BusUnavailable), leaving waits up to `linger_s` until the log has what was published.
    """

    def __init__(
        self,
        model: Source,
        *,
        run: str,
        bus: str | None = None,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rename: Callable[[str], str] | Mapping[str, str] | None = None,
        on_busy: OnBusy = "coalesce",
        policy: Policy | None = None,
        linger_s: float = 10.0,
        ports: Callable[[], Coroutine[Any, Any, Ports]] | None = None,
    ) -> None:
        self.run = run
        self.policy = policy or Policy()
        self._subjects = Subjects(run)
        self._bus_url = bus
        self._model = model
        self._choice: dict[str, Any] = {
            "dtype": dtype,
            "include": include,
            "exclude": exclude,
            "rename": rename,
        }
        self._on_busy = on_busy
        self._linger_s = linger_s
        self._open_ports = ports
        self._error: Exception | None = None
        self._closed = False
        self._core: TrainerCore | None = None

    # ---- life

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changes = Changes()
        self._subscription: Subscription | None = None
        self._broker_close: Callable[[], None] | None = None
        ports = await self._make_ports()
        self._ports = ports
        self._me = Sender("trainer", ports.token())
        self._outgoing: Outgoing = await ports.run(self._make_outgoing)
        self._core = TrainerCore(
            run=self.run,
            me=self._me,
            manifest_hash=self._outgoing.manifest.hash,
            kinds=ports.kinds,
            policy=self.policy,
        )
        self._driver: Driver[ev.TrainerEvent, cmd.TrainerCommand] = Driver(
            self._core,
            self._perform,
            tick=ev.Tick(),
            clock=ports.clock,
            on_change=self._changes.notify,
            on_error=self._broke,
        )
        self._outbox = Outbox(ports.bus)
        self._windows = Windows(ports, self._subjects, "cpu")
        self._journal = Journal(ports.bus, self.run)
        self._lease = Lease(
            ports.bus,
            self.run,
            self._me,
            host=socket.gethostname(),
            pid=os.getpid(),
            lease_s=self.policy.lease_s,
        )
        self._sequence = 0
        self._last_anchor = 0
        await self._lease.acquire(timeout_s=self.policy.bus_s)
        self._subscription = await ports.bus.subscribe(
            self._subjects.worker_control_all, self._heard
        )
        state = await self._journal.open(timeout_s=self.policy.bus_s)
        epoch, version = 1, 0
        if state.claim is not None:
            # A successor goes on above whatever was announced before it; holders of anything else
            # see by the digest that they have to resync (rule 2).
            newest = state.claim.version
            if state.announce is not None and state.announce.stamp.epoch == state.claim.epoch:
                newest = max(newest, state.announce.version)
            epoch, version = state.claim.epoch + 1, newest + 1
        _, digest = await ports.run(self._outgoing.begin, version)
        await self._claim(epoch, version, digest, state.last_sequence)
        self._driver.spawn(self._store_anchor())
        self._driver.spawn(self._keep_lease())
        self._driver.post(ev.Claimed(epoch, version))

    async def _make_ports(self) -> Ports:
        if self._open_ports is not None:
            return await self._open_ports()
        if self._bus_url is None:
            from ..pipeline.bus.broker import Broker

            broker = Broker(advertise=True)
            self._bus_url = await asyncio.to_thread(broker.start)
            self._broker_close = broker.close
            log.info("embedded broker at %s", self._bus_url)
            print(
                f"sparsecast: embedded broker at {self._bus_url}\n"
                f"sparsecast: watch it with: sparsecast top --run {self.run} "
                f"--bus {self._bus_url}",
                flush=True,
            )
        return await connect(
            self._bus_url, run=self.run, name=f"{self.run}-trainer", timeout_s=self.policy.bus_s
        )

    def _make_outgoing(self) -> Outgoing:
        return Outgoing(self._model, clock=self._ports.clock, **self._choice)

    async def close(self) -> None:
        """Let the log take what was published, up to linger_s, then leave the run. Idempotent."""
        if self._closed:
            return
        core = self._core
        if core is not None and self._error is None:
            try:
                await self._changes.until(
                    lambda: True if core.quiet or core.error or self._error else None,
                    self._linger_s,
                    what="the last updates are in the log",
                    why=lambda: f"version {core.stored} of {core.published} is stored",
                )
            except TimeoutError as exc:
                log.warning("closing without: %s", exc)
            self._driver.post(ev.Close("the trainer left"))
        await self._stop()

    async def _stop(self) -> None:
        self._closed = True
        if hasattr(self, "_driver"):
            await self._windows.abort_all()
            await self._driver.stop()
            await self._outbox.close(1.0)
            try:
                await self._lease.release(timeout_s=1.0)
            except SparsecastError as exc:
                log.debug("the lease runs out by itself: %s", exc)
        if hasattr(self, "_ports"):
            if self._subscription is not None:
                await self._subscription.unsubscribe()
            await self._ports.close()
        if getattr(self, "_broker_close", None) is not None:
            assert self._broker_close is not None
            await asyncio.to_thread(self._broker_close)
        if hasattr(self, "_changes"):
            self._changes.notify()

    # ---- the user's face

    @property
    def bus(self) -> str:
        """The URL of the bus."""
        return self._bus_url or self._ports.bus.url

    @property
    def version(self) -> int:
        """The newest version that publish() has made, or the one that the run starts from."""
        return self._outgoing.version

    @property
    def window(self) -> str | None:
        """The kind of the open window, or None while none is open."""
        return self._core.window_kind if self._core is not None else None

    async def publish(self, step: int | None = None, tags: Tags | None = None) -> AsyncUpdate:
        """Publish what changed since the last call; returns once the weights may change again.

        Never waits for workers or the bus (unless on_busy="wait"). `step` and `tags` travel in
        announcements, metrics and samples. Fenced, Closed, PublisherBusy, UnsupportedTensor.
        """
        made = await asyncio.to_thread(self._publish, step, tags)
        return AsyncUpdate(made, self)

    def _publish(self, step: int | None, tags: Tags | None) -> Published:
        self._check()
        if self._on_busy == "error" and not self._outgoing.wait_taken(0.0):
            raise PublisherBusy(
                f"version {self.version} still waits for the round in flight; "
                'publish less often, or use on_busy="coalesce"'
            )
        if self._on_busy == "wait":
            self._outgoing.wait_taken(self.policy.send_s * self.policy.attempts)
        made = self._outgoing.publish(step, tags)
        try:
            self._loop.call_soon_threadsafe(self._driver.post, ev.Published(made.version))
        except RuntimeError as exc:  # the loop was closed meanwhile
            raise Closed("the publisher was closed") from exc
        return made

    async def wait_members(self, n: int, timeout_s: float = 60.0) -> list[str]:
        """Wait until `n` workers are in and current; their names. WaitTimeout says who is not."""
        core = self._live_core()

        def present() -> list[str] | None:
            self._check()
            members = core.membership.members.values()
            names = sorted(
                m.sender.name
                for m in members
                if m.version is not None and m.version >= core.head
            )
            return names if len(names) >= n else None

        def why() -> str:
            applied, missing = core.progress(core.head)
            return f"{len(applied)} of {n} are in" + "".join(
                f"; {name}: {reason}" for name, reason in missing.items()
            )

        return await self._changes.until(present, timeout_s, what=f"{n} members", why=why)

    async def _wait_applied(
        self, version: int, timeout_s: float, at_least: Literal["all"] | int
    ) -> Report:
        core = self._live_core()

        def done() -> bool | None:
            self._check(closed=False)
            applied, missing = core.progress(version)
            if at_least == "all":
                return True if applied and not missing else None
            return True if len(applied) >= at_least else None

        with contextlib.suppress(TimeoutError):
            await self._changes.until(done, timeout_s, what="applied", why=str)
        applied, missing = core.progress(version)
        return Report(version, applied, missing)

    def _live_core(self) -> TrainerCore:
        self._check()
        assert self._core is not None
        return self._core

    def _check(self, *, closed: bool = True) -> None:
        if self._error is not None:
            raise self._error
        if self._core is None or (closed and self._closed):
            raise Closed("the publisher is not open: use it as a context manager")

    # ---- what comes from the bus

    def _heard(self, message: Message) -> None:
        try:
            decoded = codec.decode(message.data, subject=message.subject)
        except RemoteProtocolError as exc:
            log.warning("ignored: %s", exc)
            return
        if not isinstance(decoded, WorkerMessage):
            log.warning("ignored: a %s on %s", type(decoded).__name__, message.subject)
            return
        if decoded.sender.name != sender(message.subject):
            log.warning("ignored: %s speaks as %s", message.subject, decoded.sender.name)
            return
        self._driver.post(ev.FromWorker(decoded))

    def _broke(self, exc: Exception) -> None:
        self._error = self._error or exc

    # ---- what the core asks for

    def _perform(
        self, command: cmd.TrainerCommand
    ) -> Coroutine[Any, Any, ev.TrainerEvent | None] | None:
        match command:
            case cmd.Say(message):
                self._outbox.put(self._subjects.trainer_control, codec.encode(message))
            case cmd.Tell(kind, member, reason):
                self._tell(kind, member, reason)
            case cmd.Settled(record):
                self._settled(record)
            case cmd.Fail(error):
                self._error = error
            case cmd.Take(unsafe):
                return self._take(unsafe)
            case cmd.Append():
                return self._append(command)
            case cmd.OpenWindow():
                return self._windows.open(command)
            case cmd.AbortWindow(window):
                return self._windows.abort(window)
            case cmd.CloseWindow(window):
                return self._windows.close(window)
            case cmd.Send():
                return self._send(command)
            case cmd.Store(versions):
                return self._store(versions)
            case cmd.Reclaim(epoch):
                return self._reclaim(epoch)
        return None

    async def _take(self, unsafe: tuple[int, ...]) -> ev.Sealed | None:
        sealed: ev.Sealed | None = await self._ports.run(self._outgoing.take, unsafe)
        return sealed

    async def _append(self, command: cmd.Append) -> ev.Announced | ev.AnnounceFailed:
        announce = command.announce
        version = announce.version
        try:
            sequence = await self._journal.append(
                announce,
                message_id=f"{self._me.incarnation}-{announce.stamp.epoch}-{version}",
                expected_sequence=self._sequence,
                timeout_s=self.policy.bus_s,
            )
        except SequenceConflict as exc:
            return await self._conflicted(version, exc)
        except StreamMissing as exc:
            return ev.AnnounceFailed(version, "lost", str(exc))
        except BusError as exc:
            return ev.AnnounceFailed(version, "unavailable", str(exc))
        if announce.stamp.epoch == self._epoch:
            self._sequence = sequence  # Else of a journal that is gone: it may answer late.
        return ev.Announced(version)

    async def _conflicted(self, version: int, conflict: SequenceConflict) -> ev.AnnounceFailed:
        """Whose word is in our way: a successor's, which has claimed the run, or a late one?"""
        try:
            state = await self._journal.open(timeout_s=self.policy.bus_s)
        except BusError as exc:
            return ev.AnnounceFailed(version, "unavailable", str(exc))
        if state.claim is None:
            return ev.AnnounceFailed(version, "lost", "its journal is empty")
        if state.claim.sender != self._me:
            reason = f"the journal moved on without us ({conflict})"
            return ev.AnnounceFailed(version, "fenced", reason)
        # An append of an older epoch may arrive after our claim in a journal made anew, where
        # sequences start again; members ignore it.
        self._sequence = state.last_sequence
        late = f"a late word of an older epoch ({conflict})"
        return ev.AnnounceFailed(version, "unavailable", late)

    async def _send(self, command: cmd.Send) -> ev.Sent:
        stamp = command.stamp
        window = self._windows[stamp.window]
        payload = self._outgoing.payload(stamp.version)
        error: str | None = "the window is gone"
        if window is not None and payload is not None:
            try:
                await window.send(payload, attempt=stamp.attempt, timeout_s=command.timeout_s)
                error = None
            except WindowError as exc:
                error = exc.reason
        return ev.Sent(stamp.window, stamp.attempt, error)

    async def _store(self, versions: tuple[int, ...]) -> ev.LogStored | ev.LogFailed:
        assert self._core is not None
        epoch = self._core.epoch
        try:
            entry, patch = await self._ports.run(self._outgoing.entry, versions, epoch)
            await self._ports.log.store(entry, patch.to_bytes(), timeout_s=self.policy.store_s)
        except (LogError, BusError) as exc:
            return ev.LogFailed(versions[-1], str(exc))
        await self._ports.run(self._outgoing.release, entry.version)
        if entry.version - self._last_anchor >= self.policy.anchor_every:
            self._last_anchor = entry.version
            self._driver.spawn(self._store_anchor())
        return ev.LogStored(entry.version)

    async def _store_anchor(self) -> None:
        """Put a full copy into the log, as often as it takes, and drop what it makes needless."""
        assert self._core is not None
        failures = 0
        while True:
            epoch = self._epoch
            entry, patch = await self._ports.run(self._outgoing.anchor, epoch)
            try:
                await self._ports.log.store(entry, patch.to_bytes(), timeout_s=self.policy.store_s)
                await self._prune(epoch)
            except (LogError, BusError) as exc:
                if failures == 0:
                    self._tell("log-failed", "trainer", f"anchor {entry.version}: {exc}")
                failures += 1
                await asyncio.sleep(self.policy.retry_s * 2.0 ** min(failures, 6))
                if epoch != self._epoch:
                    return
                continue
            self._last_anchor = max(self._last_anchor, entry.version)
            return

    async def _prune(self, epoch: int) -> None:
        """Keep the newest two anchors of this epoch and all that follows the older one."""
        entries = await self._ports.log.entries(timeout_s=self.policy.store_s)
        ours = [entry for entry in entries if entry.epoch == epoch]
        anchors = sorted(entry.version for entry in ours if entry.base_version is None)
        if not anchors:
            return
        oldest = anchors[-2:][0]
        keep = [entry for entry in ours if entry.version >= oldest]
        if len(keep) < len(entries):
            await self._ports.log.prune(keep, timeout_s=self.policy.store_s)

    async def _claim(self, epoch: int, version: int, digest: int, expected_sequence: int) -> None:
        self._epoch = self._lease.epoch = epoch
        claim = Claim(
            sender=self._me,
            epoch=epoch,
            version=version,
            digest=digest,
            manifest=self._outgoing.manifest,
            nonce=self._ports.token(),
            heartbeat_s=self.policy.heartbeat_s,
        )
        self._sequence = await self._journal.append(
            claim,
            message_id=f"{self._me.incarnation}-{epoch}-claim",
            expected_sequence=expected_sequence,
            timeout_s=self.policy.bus_s,
        )

    async def _reclaim(self, epoch: int) -> ev.Claimed | ev.ReclaimFailed | ev.LeaseLost:
        """The bus has lost its memory: claim the run anew, with an anchor of what is published."""
        try:
            try:
                await self._lease.renew(timeout_s=self.policy.bus_s)
            except (Fenced, StreamMissing):
                await self._lease.acquire(timeout_s=self.policy.bus_s)
            state = await self._journal.open(timeout_s=self.policy.bus_s)
            held = state.claim
            if held is not None and held.sender != self._me:
                return ev.LeaseLost(f"trainer {held.sender.incarnation} has the run now")
            if held is not None:
                # Only the lease was lost, or an earlier try was stored although it failed here.
                epoch = max(epoch, held.epoch + 1)
            version, digest = await self._ports.run(self._outgoing.begin)
            await self._claim(epoch, version, digest, state.last_sequence)
        except (SequenceConflict, Fenced) as exc:
            return ev.LeaseLost(str(exc))
        except BusError as exc:
            return ev.ReclaimFailed(str(exc))
        except SparsecastError as exc:
            return ev.LeaseLost(str(exc))
        self._driver.spawn(self._store_anchor())
        return ev.Claimed(epoch, version)

    async def _keep_lease(self) -> ev.LeaseLost:
        while True:
            await asyncio.sleep(self.policy.lease_s / 4)
            try:
                await self._lease.renew(timeout_s=self.policy.bus_s)
            except Fenced as exc:
                return ev.LeaseLost(exc.reason)
            except StreamMissing as exc:
                self._driver.post(ev.AnnounceFailed(self.version, "lost", str(exc)))
            except BusError as exc:
                # It may run out meanwhile and a successor may take the run: the journal's
                # compare-and-set decides.
                log.warning("the lease was not renewed: %s", exc)

    # ---- metrics

    def _tell(self, kind: EventKind, member: str, reason: str) -> None:
        event = Event(
            time_s=self._ports.wall(), run=self.run, kind=kind, member=member, reason=reason
        )
        log.info("%s %s: %s", kind, member, reason)
        self._outbox.put(self._subjects.events, codec.encode_metric(event))

    def _settled(self, record: cmd.RoundRecord) -> None:
        assert self._core is not None
        applied_at = max(record.applied.values(), default=0.0)
        verified_at = max(record.verified.values(), default=0.0)
        metrics = TrainerMetrics(
            time_s=self._ports.wall(),
            run=self.run,
            epoch=self._core.epoch,
            version=record.version,
            base_version=record.base_version,
            changed=record.changed,
            density=record.changed / record.numel if record.numel else 0.0,
            nbytes=record.nbytes,
            dense_nbytes=record.dense_nbytes,
            encoding=record.encoding,
            window=record.window,
            transport=record.transport,
            attempt=record.attempt,
            members=len(record.members),
            applied=len(record.applied),
            verified=len(record.verified),
            diff_us=record.diff_us,
            encode_us=record.encode_us,
            seal_us=_us(record.published_at, record.sealed_at),
            announce_us=_us(record.published_at, record.announced_at),
            ready_us=_us(record.announced_at, record.went_at),
            broadcast_us=_us(record.went_at, record.received_at) if record.window else 0,
            apply_us=_us(record.received_at, applied_at),
            verify_us=_us(applied_at, verified_at),
            total_us=_us(record.published_at, applied_at),
            step=record.step,
            tags=record.tags,
        )
        self._outbox.put(self._subjects.metrics_trainer, codec.encode_metric(metrics))


def _us(start: float, end: float) -> int:
    """Microseconds between two times, 0 if either never was."""
    return max(round((end - start) * 1e6), 0) if start and end else 0


class Publisher:
    """AsyncPublisher for synchronous training loops: its event loop runs on a thread of its own.

    publish() finds what changed on the caller's thread and returns; all else goes on behind it.
    """

    def __init__(
        self,
        model: Source,
        *,
        run: str,
        bus: str | None = None,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rename: Callable[[str], str] | Mapping[str, str] | None = None,
        on_busy: OnBusy = "coalesce",
        policy: Policy | None = None,
        linger_s: float = 10.0,
    ) -> None:
        self._inner = AsyncPublisher(
            model,
            run=run,
            bus=bus,
            dtype=dtype,
            include=include,
            exclude=exclude,
            rename=rename,
            on_busy=on_busy,
            policy=policy,
            linger_s=linger_s,
        )
        self._thread: LoopThread | None = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Claim the run: RunBusy, BusUnavailable. Entering the context does this."""
        if self._thread is not None:
            return
        self._thread = LoopThread("sparsecast-publisher")
        try:
            self._call(self._inner.__aenter__())
        except BaseException:
            self._thread.stop()
            self._thread = None
            raise

    def close(self) -> None:
        """Let the log take what was published, then leave the run. Idempotent."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        try:
            thread.call(self._inner.close())
        finally:
            thread.stop()

    @property
    def run(self) -> str:
        """The run's name."""
        return self._inner.run

    @property
    def bus(self) -> str:
        """The URL of the bus."""
        return self._inner.bus

    @property
    def version(self) -> int:
        """The newest version that publish() has made, or the one that the run starts from."""
        return self._inner.version

    @property
    def window(self) -> str | None:
        """The kind of the open window, or None while none is open."""
        return self._inner.window

    def publish(self, step: int | None = None, tags: Tags | None = None) -> Update:
        """Publish what changed since the last call; returns once the weights may change again.

        Never waits for workers or the bus (unless on_busy="wait"). `step` and `tags` travel in
        announcements, metrics and samples. Fenced, Closed, PublisherBusy, UnsupportedTensor.
        """
        return Update(self._inner._publish(step, tags), self)

    def wait_members(self, n: int, timeout_s: float = 60.0) -> list[str]:
        """Wait until `n` workers are in and current; their names. WaitTimeout says who is not."""
        return self._call(self._inner.wait_members(n, timeout_s))

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._thread is None:
            coroutine.close()
            raise Closed("the publisher is not open: use it as a context manager")
        return self._thread.call(coroutine)

"""The trainer's side of a run on an event loop: AsyncPublisher over the driver."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal, Self, get_args

import torch
from msgspec.structs import replace

from ..messages import codec
from ..messages.control import Prepare, Sender, Tags, WorkerMessage
from ..messages.errors import (
    CannotResume,
    Closed,
    LocalProtocolError,
    LogError,
    PublisherBusy,
    SettingsError,
    SparsecastError,
    brief,
)
from ..messages.layout import Layout
from ..messages.ranks import Roll
from ..messages.subjects import Subjects, sender
from ..pipeline.bus.base import Message
from ..pipeline.bus.journal import JournalState
from ..pipeline.core import commands as cmd
from ..pipeline.core import events as ev
from ..pipeline.core.policy import Policy
from ..pipeline.core.trainer import TrainerCore
from ..pipeline.delta.tensors import Model
from .archive import Archive
from .awaiting import Awaiting
from .choice import Choice
from .connect import connect
from .driver import Changes, Driver, Outbox, Ports, Windows, decoded
from .leading import Leading
from .outgoing import Outgoing, Past, ShadowPlace
from .parted import Parted
from .recall import Recall
from .rehearsal import rehearse_outgoing
from .sending import Sending, SendingTogether
from .streams import device_for, in_order
from .telling import Telling
from .tenure import Tenure
from .tiers import DEFAULT_LOG, LogSetting, parse_log
from .together import Together
from .united import unite
from .updates import AtLeast, Made, Published, Report
from .views import View

log = logging.getLogger("sparsecast.publisher")

#: How long an update's way into the log waits for its members' words at most.
ACKNOWLEDGED_S = 0.1

OnBusy = Literal["coalesce", "wait", "error"]
Resume = Literal["auto", "must", "never"]
NOT_OPEN = "the publisher is not open: use it as a context manager"


class AsyncUpdate(Made):
    """One published update."""

    def __init__(self, made: Published, publisher: AsyncPublisher) -> None:
        super().__init__(made)
        self._publisher = publisher

    async def wait_applied(
        self, timeout_s: float = 30.0, at_least: AtLeast | None = None
    ) -> Report:
        """Wait until all members, or `at_least` n, hold this version; at the timeout too, return.

        `at_least` None: as Policy.quorum says, which is "all" unless it is set.
        Raises only if the publisher was fenced, closed or broken.
        """
        return await self._publisher._wait_applied(self.version, timeout_s, at_least)


class AsyncPublisher:
    """Publishes a model's weights to the workers of a run.

    `model` is a Module (its state_dict) or a mapping of names to tensors on any device; `dtype`
    publishes floating tensors as what inference runs. `bus` is a NATS URL, or None for an embedded
    broker that ends with this object. Use it as an async context manager: entering claims the run
    (RunBusy, BusUnavailable, CannotResume), leaving waits up to `linger_s` until the log has what
    was published.
    It may be entered again after it was left, or after entering has failed.

    `view`: what this function makes of the tensors is published in place of them, say fp8 blocks
    and their scales (docs/views.md), and workers hold just that. It takes and returns a mapping of
    names to tensors, on any devices; `include`, `exclude` and `rename` choose and name what it is
    given, and `dtype` is refused beside it. It is called on entering and in each publish() (on any
    thread, never twice at once; without autograd, inference mode or autocast) and works in the
    order of the current streams. It must not change what it is given, and may return that. What it
    raises, publish() raises, and ManifestMismatch where a name, dtype or shape is not what it was:
    nothing is published then, and the next publish() brings all. Bytes held: what it returned last,
    and within publish() what it returns. A view that gives other bits for the same weights costs
    bytes on the wire, and nothing else. `resume` and rollback() are of what it returned: the
    trainer's own weights cannot be brought back from that.

    `on_busy`: what publish() does while a patch still waits for the round in flight: "coalesce"
    merges with it, "wait" waits for as long as a round may take and merges then, "error" raises
    PublisherBusy.

    `resume`: a run that has been there before goes on from the newest version that its log makes
    again: that is claimed under the next number, so that workers that hold it need nothing, and
    what these weights differ in is published as the version after it before entering returns.
    "auto": else these weights are claimed themselves, and workers that hold anything else fetch a
    full copy; "must": else CannotResume; "never": they are claimed in any case.

    On CUDA publish() works in the order of the caller's current stream, and the weights may change
    again in that order. `device` is where windows take payloads from: None means the weights' CUDA
    device, or host memory; name one for weights in host memory whose workers are reached by NCCL.
    `ranks`: a trainer that is spread over so many processes; this is the first of them, the others
    are Contributors. Each publishes what it holds, which is read off DTensors, or what `layout`
    says of plain tensors. They meet on entering, within Policy.gather_s (WaitTimeout); one that is
    lost later breaks this publisher. A `view` is given what this rank holds, DTensors as they are;
    what it returns may be DTensors too, else `layout` is of that.

    `shadow`: the copy of what was published last lies beside the weights ("device"), or in pinned
    host memory ("host"). `log`: where patches and anchors are stored: "jetstream", "dir:/path" (a
    directory that workers share), several with a comma between, or tiers of your own.
    """

    def __init__(
        self,
        model: Model,
        *,
        run: str,
        bus: str | None = None,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rename: Callable[[str], str] | Mapping[str, str] | None = None,
        view: View | None = None,
        on_busy: OnBusy = "coalesce",
        device: str | None = None,
        shadow: ShadowPlace = "device",
        policy: Policy | None = None,
        log: LogSetting = DEFAULT_LOG,
        resume: Resume = "auto",
        linger_s: float = 10.0,
        ranks: int = 1,
        layout: Layout | None = None,
        ports: Callable[[], Coroutine[Any, Any, Ports]] | None = None,
    ) -> None:
        _require_one_of("on_busy", on_busy, get_args(OnBusy))
        _require_one_of("shadow", shadow, get_args(ShadowPlace))
        _require_one_of("resume", resume, get_args(Resume))
        self._choice = Choice(
            model,
            include=include,
            exclude=exclude,
            rename=rename,
            dtype=dtype,
            view=view,
            layout=layout,
        )
        if ranks < 1:
            raise SettingsError(f"a trainer of {ranks} ranks")
        self._ranks = ranks
        self._parted: Parted | None = None
        if ranks > 1:
            if on_busy == "error":
                raise SettingsError(
                    'on_busy="error" and ranks were both given: the others would publish what this '
                    'rank refuses; use "coalesce" or "wait"'
                )
            if bus is None and ports is None:
                raise SettingsError(
                    f"a trainer of {ranks} ranks needs bus=, a broker that all of them reach"
                )
            self._parted = Parted(self._choice)
        elif layout is not None:
            raise SettingsError("layout= says what one of several ranks holds: give ranks= as well")
        self.run = run
        self.policy = policy or Policy()
        self._subjects = Subjects(run)
        self._bus_url = bus
        self._shadow: ShadowPlace = shadow
        self._tiers = parse_log(log)
        self._device = device
        self._on_busy = on_busy
        self._resume = resume
        self._linger_s = linger_s
        self._open_ports = ports
        self._error: Exception | None = None
        self._core: TrainerCore | None = None
        #: What is to be undone on leaving, the youngest first; None while this is not open.
        self._life: contextlib.AsyncExitStack | None = None

    # ---- life

    async def __aenter__(self) -> Self:
        if self._life is not None:
            raise LocalProtocolError("this publisher is open already")
        async with contextlib.AsyncExitStack() as life:
            await self._start(life)
            self._life = life.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _start(self, life: contextlib.AsyncExitStack) -> None:
        self._loop = asyncio.get_running_loop()
        self._error = None
        self._changes = Changes()
        #: Calls of rollback() go one after the other, and are counted.
        self._rolling, self._rolls = asyncio.Lock(), 0
        life.callback(self._changes.notify)
        self._ports = ports = await self._make_ports(life)
        life.push_async_callback(ports.close)
        me = Sender("trainer", ports.token())
        leading = await self._gather(life, me.incarnation) if self._parted is not None else None
        self._outgoing: Outgoing = await ports.run(self._make_outgoing, me.incarnation, leading)
        fellows = leading.fellows if leading is not None else []
        self._core = TrainerCore(
            run=self.run,
            me=me,
            manifest_hash=self._outgoing.manifest.hash,
            kinds=tuple(k for k in ports.kinds if all(k in fellow.kinds for fellow in fellows)),
            policy=self.policy,
            gpus=(ports.gpu, *(fellow.gpu for fellow in fellows)),
            nbytes=self._outgoing.manifest.nbytes,
        )
        self._driver: Driver[ev.TrainerEvent, cmd.TrainerCommand] = Driver(
            self._core,
            self._perform,
            tick=ev.Tick(),
            clock=ports.clock,
            on_change=self._changes.notify,
            on_error=self._broke,
        )
        self._awaiting = Awaiting(self._core, self._changes, self._check)
        # Released after the driver has stopped: a renewal would take the lease again.
        self._tenure = Tenure(self.run, me, ports, self._outgoing, self.policy)
        life.push_async_callback(self._tenure.release)
        self._outbox = Outbox(ports.bus)
        life.push_async_callback(self._outbox.close, 1.0)
        self._windows = Windows(ports, self._subjects)
        life.push_async_callback(self._windows.abort_all)
        life.push_async_callback(self._driver.stop)
        sending = Sending(ports, self._windows, self._outgoing)
        self._sending: Sending | SendingTogether = sending
        if leading is not None:
            together = Together(leading, self.policy)
            self._sending = SendingTogether(sending, together, self.policy)
        self._telling = Telling(self.run, ports, self._outbox)
        self._archive = Archive(
            ports,
            self._outgoing,
            self.policy,
            lambda reason: self._telling.event("log-failed", "trainer", reason),
        )
        self._recall = Recall(
            self.run,
            ports,
            self._outgoing,
            self.policy,
            lambda reason: self._telling.event("log-failed", "trainer", reason),
        )
        await self._tenure.reserve()
        subscription = await ports.bus.subscribe(self._subjects.worker_control_all, self._heard)
        life.push_async_callback(subscription.unsubscribe)
        claimed = await self._tenure.claim(self._past)
        #: Our weights, under the number that they are first published by.
        self._first: int = self._outgoing.version
        if self._first == claimed.version:
            self._driver.spawn(self._archive.anchor(self._epoch))
        # Else behind the patch: whoever holds the claim's version would take the anchor instead.
        if leading is not None:
            leading.order("hold", self._first, self.policy.bus_s)
        self._driver.spawn(self._tenure.keep(self._driver.post))
        self._driver.post(claimed)
        self._driver.post(ev.Published(self._first))

    async def _gather(self, life: contextlib.AsyncExitStack, incarnation: str) -> Leading:
        """Meet the other ranks of this trainer (WaitTimeout)."""
        ports = self._ports
        leading = Leading(
            bus=ports.bus.url,
            run=self.run,
            name="trainer",
            life=incarnation,
            ranks=self._ranks,
            policy=self.policy,
            clock=ports.clock,
            broke=self._lost,
        )

        async def leave(_: object, error: BaseException | None, __: object) -> None:
            wrong = error if isinstance(error, Exception) else self._error
            await leading.close(brief(wrong) if wrong is not None else "")

        life.push_async_exit(leave)
        await leading.start()
        return leading

    async def _past(self, state: JournalState) -> Past | None:
        """What the run goes on from, if not from our own weights. CannotResume."""
        if self._resume == "never" or (self._resume == "auto" and state.claim is None):
            return None
        try:
            past = await self._recall.head(state)
        except CannotResume as exc:
            if self._resume == "must":
                raise
            log.warning("%s", exc)
            self._telling.event("resume", "trainer", f"not from the log: {exc.reason}")
            return None
        log.info("run %s goes on from version %d", self.run, past.version)
        self._telling.event("resume", "trainer", f"goes on from version {past.version}")
        return past

    def _epoch(self) -> int:
        return self._tenure.epoch

    async def _make_ports(self, life: contextlib.AsyncExitStack) -> Ports:
        if self._open_ports is not None:
            return await self._open_ports()
        url = self._bus_url
        if url is None:
            from ..pipeline.bus.broker import Broker

            broker = Broker(advertise=True)
            life.push_async_callback(asyncio.to_thread, broker.close)
            url = await asyncio.to_thread(broker.start)
            log.info("embedded broker at %s", url)
            print(
                f"sparsecast: embedded broker at {url}\n"
                f"sparsecast: watch it with: sparsecast top --run {self.run} --bus {url}",
                flush=True,
            )
        return await connect(
            url,
            run=self.run,
            name=f"{self.run}-trainer",
            device=lambda: device_for(self._device, self._tensors),
            tiers=self._tiers,
            manifest=lambda: self._outgoing.local,
            tell=self._log_failed,
            quota_nbytes=self.policy.quota_nbytes,
            timeout_s=self.policy.bus_s,
        )

    def _log_failed(self, reason: str) -> None:
        """Tell of a tier that fails; on any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._telling.event, "log-failed", "trainer", reason)

    def _tensors(self) -> dict[str, torch.Tensor]:
        if self._parted is not None:
            return self._parted.weights()
        return self._choice.tensors()

    def _make_outgoing(self, writer: str, leading: Leading | None) -> Outgoing:
        ports = self._ports
        if leading is None:
            outgoing = Outgoing(self._choice, clock=ports.clock, writer=writer, shadow=self._shadow)
        else:
            assert self._parted is not None
            outgoing = unite(
                self._parted,
                leading,
                writer=writer,
                policy=self.policy,
                clock=ports.clock,
                shadow=self._shadow,
            )
        rehearse_outgoing(outgoing, ports.device, dtype=self._choice.dtype, shadow=self._shadow)
        return outgoing

    async def close(self) -> None:
        """Let the log take what was published, up to linger_s, then leave the run. Idempotent."""
        life, self._life = self._life, None
        if life is None:
            return
        async with life:
            if self._error is None:
                await self._linger()
                self._driver.post(ev.Close("the trainer left"))

    async def _linger(self) -> None:
        core = self._core
        assert core is not None
        try:
            await self._changes.until(
                lambda: True if core.quiet or self._error else None,
                self._linger_s,
                what="the last updates are in the log",
                why=lambda: f"version {core.stored} of {core.published} is stored",
            )
        except TimeoutError as exc:
            log.warning("closing without: %s", exc)

    # ---- the user's face

    @property
    def bus(self) -> str:
        """The URL of the bus; Closed if it is an embedded one that was never started."""
        if self._bus_url is None:
            self._begun()
        return self._bus_url or self._ports.bus.url

    @property
    def version(self) -> int:
        """The newest version that publish() has made, or the one that the run starts from.

        Closed before the first entering.
        """
        self._begun()
        return self._outgoing.version

    @property
    def window(self) -> str | None:
        """The kind of the open window, or None while none is open."""
        return self._core.window_kind if self._core is not None else None

    async def publish(self, step: int | None = None, tags: Tags | None = None) -> AsyncUpdate:
        """Publish what changed since the last call; returns once the weights may change again.

        Never waits for workers or the bus (unless on_busy="wait"). `step` and `tags` travel in
        announcements, metrics and samples. Fenced, Closed, PublisherBusy, UnsupportedTensor,
        ManifestMismatch, and what a view raises: nothing was published.
        """
        return AsyncUpdate(await self._publish_aside(step, tags), self)

    @property
    def _devices(self) -> tuple[torch.device, ...]:
        return self._outgoing.devices if self._core is not None else ()

    async def _publish_aside(
        self,
        step: int | None,
        tags: Tags | None,
        past: Past | None = None,
    ) -> Published:
        """publish() on another thread, in the order of the caller's streams."""
        publish = in_order(self._devices, lambda: self._publish(step, tags, past))
        return await asyncio.to_thread(publish)

    async def rollback(
        self, version: int, step: int | None = None, tags: Tags | None = None
    ) -> AsyncUpdate:
        """Publish the contents of an old version, from the log, under a new number.

        Workers get what differs, as with publish(). The trainer's own weights are left alone: they
        are the caller's to set back, and the next publish() brings what they differ in from what
        was published here. Takes as long as reading the log, and one full copy in host memory.
        Of a trainer of several ranks each has to call it, as with publish(). LogHole if the log
        does not lead to exactly that version (any more, or yet), LogError, BusError, Fenced,
        Closed, PublisherBusy: nothing was changed, on no rank.
        """
        core = self._live_core()
        self._rolls += 1
        roll, gone = Roll(call=self._rolls, version=version), False
        try:
            async with self._rolling:
                past = await self._recall.version(version, core.head)
                roll = replace(roll, digest=past.digest)
                try:
                    await asyncio.gather(*map(asyncio.wrap_future, self._outgoing.roll(roll)))
                except SparsecastError as exc:
                    raise LogError(brief(exc)) from exc
                self._check()
                gone = True  # from here on the other ranks publish it
                self._outgoing.roll(replace(roll, go=True))
                made = await self._publish_aside(step, tags, past)
        except BaseException as exc:
            if not gone:
                reason = brief(exc) if isinstance(exc, Exception) else "it was broken off"
                self._outgoing.roll(replace(roll, reason=reason))
            raise
        reason = f"version {made.version} has the contents of version {version}"
        self._telling.event("rollback", "trainer", reason)
        return AsyncUpdate(made, self)

    def _publish(
        self,
        step: int | None,
        tags: Tags | None,
        past: Past | None = None,
    ) -> Published:
        self._check()
        if self._on_busy == "error" and not self._outgoing.wait_taken(0.0):
            raise PublisherBusy(
                f"version {self.version} still waits for the round in flight; "
                'publish less often, or use on_busy="coalesce"'
            )
        if self._on_busy == "wait":
            self._outgoing.wait_taken(self.policy.send_s * self.policy.attempts)
            self._check()
        made = self._outgoing.publish(
            step, tags, begun=lambda: self._post(ev.Publishing()), past=past
        )
        if not self._outgoing.awaited:  # else Sealed will say so, and soon: spare the loop a turn
            self._post(ev.Published(made.version))
        return made

    def _post(self, event: ev.TrainerEvent) -> None:
        """Give the core an event, from the caller's thread."""
        try:
            self._loop.call_soon_threadsafe(self._driver.post, event)
        except RuntimeError as exc:  # the loop was closed meanwhile
            raise Closed("the publisher was closed") from exc

    async def wait_members(self, n: int, timeout_s: float = 60.0) -> list[str]:
        """Wait until `n` workers for rollouts are in and current; their names. WaitTimeout says
        who is not."""
        self._live_core()
        return await self._awaiting.members(n, timeout_s, least=self._first)

    async def _wait_applied(
        self, version: int, timeout_s: float, at_least: AtLeast | None
    ) -> Report:
        self._live_core()
        enough = self.policy.quorum if at_least is None else at_least
        return await self._awaiting.applied(version, timeout_s, enough)

    def _live_core(self) -> TrainerCore:
        self._check()
        return self._begun()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._life is None:
            raise Closed(NOT_OPEN)

    def _begun(self) -> TrainerCore:
        if self._core is None:
            raise Closed(NOT_OPEN)
        return self._core

    # ---- what comes from the bus

    def _heard(self, message: Message) -> None:
        said = decoded(message, get_args(WorkerMessage), log)
        if said is None:
            return
        if said.sender.name != sender(message.subject):
            log.warning("ignored: %s speaks as %s", message.subject, said.sender.name)
            return
        self._driver.post(ev.FromWorker(said))

    def _broke(self, exc: Exception) -> None:
        self._error = self._error or exc
        self._changes.notify()

    def _lost(self, exc: Exception) -> None:
        """A rank of this trainer is lost; on any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._broke, exc)

    # ---- what the core asks for

    def _perform(
        self, command: cmd.TrainerCommand
    ) -> Coroutine[Any, Any, ev.TrainerEvent | None] | None:
        match command:
            case cmd.Say(message):
                self._outbox.put(self._subjects.trainer_control, codec.encode(message))
                if isinstance(message, Prepare):
                    self._sending.alert(message.stamp)
            case cmd.Tell(kind, member, reason):
                self._telling.event(kind, member, reason)
            case cmd.Settled(record):
                self._telling.settled(record, self._epoch())
            case cmd.Fail(error):
                self._error = error
            case cmd.Take(unsafe):
                return self._take(unsafe)
            case cmd.Append(announce):
                return self._tenure.announce(announce)
            case cmd.OpenWindow():
                return self._sending.open(command)
            case cmd.AbortWindow(window):
                return self._sending.abort(window)
            case cmd.CloseWindow(window):
                return self._sending.close(window)
            case cmd.Send():
                return self._sending.send(command)
            case cmd.Mend():
                return self._archive.mend(self._epoch)
            case cmd.Store(versions):
                return self._store(versions)
            case cmd.Reclaim(epoch):
                return self._reclaim(epoch)
        return None

    async def _take(self, unsafe: tuple[int, ...]) -> ev.Sealed | ev.NothingTaken:
        sealed: ev.Sealed | None = await self._ports.run(self._outgoing.take, unsafe)
        return sealed or ev.NothingTaken()

    async def _store(self, versions: tuple[int, ...]) -> ev.LogStored | ev.LogFailed:
        # Storing takes this loop's time: begun at once, it would hold the members' words up.
        await self._awaiting.acknowledged(versions[-1], ACKNOWLEDGED_S)
        stored = await self._archive.store(versions, self._epoch())
        if self._archive.due(versions[-1]):
            self._driver.spawn(self._archive.anchor(self._epoch))
        if self._archive.mergeable:
            self._driver.spawn(self._archive.merge(self._epoch))
        return stored

    async def _reclaim(self, epoch: int) -> ev.Claimed | ev.ReclaimFailed | ev.LeaseLost:
        claimed = await self._tenure.reclaim(epoch)
        if isinstance(claimed, ev.Claimed):
            self._driver.spawn(self._archive.anchor(self._epoch))
        return claimed


def _require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise SettingsError(f"{name} is one of {', '.join(map(repr, known))}, not {value!r}")

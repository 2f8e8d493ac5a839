"""The face of a trainer's other ranks: a Contributor publishes its part beside the first rank."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Self

import msgspec
import torch

from ..messages import codec
from ..messages.control import LogEntry, Tags
from ..messages.errors import Closed, LocalProtocolError, LogError, SettingsError, WaitTimeout
from ..messages.layout import Layout
from ..messages.ranks import At, Begin, Fellow, Held, Order, Publish, Roll, Seal, Store
from ..messages.subjects import Subjects
from ..pipeline.bus.journal import Journal
from ..pipeline.core.policy import Policy
from ..pipeline.delta import Patch
from ..pipeline.delta.tensors import Model
from .choice import Choice
from .connect import connect
from .driver import Changes, Outbox, Ports, Windows
from .following import Following
from .orders import decode_what
from .outgoing import Outgoing, Past, ShadowPlace
from .parted import Parted
from .rehearsal import rehearse_outgoing
from .remaking import Remaking, Spoilt
from .rolls import Rolls
from .sending import Sending
from .streams import device_for, in_order
from .tiers import DEFAULT_LOG, LogSetting, parse_log
from .updates import Made, Published
from .views import View

log = logging.getLogger("sparsecast.publisher")

NOT_OPEN = "this rank of the trainer is not open: use it as a context manager"


class Contributor:
    """One of the other ranks of a trainer whose weights are spread over several processes.

    The first rank runs `AsyncPublisher(ranks=…)`; `rank` is from 1 on. `model`, `view`, `layout`
    and the like are as there, for what this rank holds; `run`, `bus`, `log` and `policy` are its.
    Used as an async context manager: entering waits until the first rank has claimed the run
    (WaitTimeout; Closed says why that has left), leaving until that has left, up to `linger_s`.
    publish() and rollback() are to be called as on the first rank, which tells the workers, and
    hears from them. Where a call fails on some ranks only, the next version would be of two steps:
    the run ends with it, and the first rank says on which rank.
    """

    def __init__(
        self,
        model: Model,
        *,
        run: str,
        bus: str,
        rank: int,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rename: Callable[[str], str] | Mapping[str, str] | None = None,
        view: View | None = None,
        layout: Layout | None = None,
        device: str | None = None,
        shadow: ShadowPlace = "device",
        policy: Policy | None = None,
        log: LogSetting = DEFAULT_LOG,
        linger_s: float = 10.0,
        ports: Callable[[], Coroutine[Any, Any, Ports]] | None = None,
    ) -> None:
        if rank < 1:
            raise SettingsError(f"rank {rank} of the trainer: its first rank, 0, is a Publisher")
        self.run = run
        self.bus = bus
        self.rank = rank
        self.policy = policy or Policy()
        choice = Choice(
            model,
            include=include,
            exclude=exclude,
            rename=rename,
            dtype=dtype,
            view=view,
            layout=layout,
        )
        self._parted = Parted(choice)
        self._device = device
        self._shadow: ShadowPlace = shadow
        self._tiers = parse_log(log)
        self._linger_s = linger_s
        self._open_ports = ports
        self._outgoing: Outgoing | None = None
        self._life: contextlib.AsyncExitStack | None = None

    # ---- life

    async def __aenter__(self) -> Self:
        if self._life is not None:
            raise LocalProtocolError(f"rank {self.rank} of the trainer is open already")
        async with contextlib.AsyncExitStack() as life:
            await self._start(life)
            self._life = life.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Go on for the first rank until it leaves, up to linger_s, then leave. Idempotent."""
        life, self._life = self._life, None
        if life is None:
            return
        self._changes.notify()
        async with life:
            with contextlib.suppress(WaitTimeout):
                await self._changes.until(
                    lambda: True if self._deserted else None,
                    self._linger_s,
                    what="the first rank of the trainer leaves",
                    why=lambda: "it is there",
                )

    async def _start(self, life: contextlib.AsyncExitStack) -> None:
        self._changes = Changes()
        life.callback(self._changes.notify)
        #: How the first rank was lost, once publish() has said so.
        self._lost: str | None = None
        #: The copy that the first rank has asked for, until it says what of it.
        self._copy: Patch | None = None
        self._rolls, self._rolling = Rolls(), asyncio.Lock()
        life.callback(self._let_go_of_copies)
        self._loop = asyncio.get_running_loop()
        self._outgoing, self._met, self._begun, self._why = None, False, False, ""
        if self._open_ports is not None:
            ports = await self._open_ports()
        else:
            ports = await connect(
                self.bus,
                run=self.run,
                name=f"{self.run}-trainer-{self.rank}",
                device=lambda: device_for(self._device, self._parted.weights),
                tiers=self._tiers,
                manifest=lambda: self._outgoing.local if self._outgoing is not None else None,
                quota_nbytes=self.policy.quota_nbytes,
                timeout_s=self.policy.bus_s,
            )
        self._ports = ports
        life.push_async_callback(ports.close)
        self._layout: Layout = await ports.run(self._parted.layout)
        outbox = Outbox(ports.bus)
        life.push_async_callback(outbox.close, 1.0)
        self._windows = Windows(ports, Subjects(self.run))
        life.push_async_callback(self._windows.abort_all)
        self._following = Following(
            ports=ports,
            outbox=outbox,
            run=self.run,
            name="trainer",
            rank=self.rank,
            policy=self.policy,
            perform=self._perform,
            introduce=self._introduce,
            let_go=self._let_go,
            deserted=self._let_go,  # the others' ends may wait for ours
            over=self._over,
            once=True,  # what another one gathers would be of another step
        )
        await self._following.start()
        life.push_async_callback(self._following.stop)
        await self._changes.until(
            lambda: True if self._met or self._deserted else None,
            self.policy.gather_s,
            what="the first rank of the trainer gathers the others",
            why=lambda: "it is there" if self._following.leader else "nothing is heard of it",
        )
        await self._changes.until(
            lambda: True if self._begun or self._deserted else None,
            self.policy.gather_s + self.policy.resume_s,
            what="the run is claimed",
            why=lambda: "the first rank of the trainer has not said so",
        )
        if not self._begun:
            raise Closed(f"{self._deserted} before it had claimed the run")

    @property
    def _deserted(self) -> str | None:
        """How the first rank was lost, in words; None: it is there."""
        if self._following.ended:
            return f"the first rank of the trainer has left{self._why}"
        if self._following.abandoned:
            silence_s = self.policy.silence_s
            return f"the first rank of the trainer was unheard for {silence_s:g} s and more,"
        return None

    def _over(self, why: str) -> None:
        self._why = f" ({why})" if why else ""
        self._changes.notify()

    # ---- the user's face

    @property
    def version(self) -> int:
        """The newest version that publish() has made here, or the one that the run starts from.

        Closed before the first entering.
        """
        return self._made_by().version

    async def publish(self, step: int | None = None, tags: Tags | None = None) -> Made:
        """Publish what changed here since the last call; returns once the weights may change again.

        Never waits for other ranks, workers or the bus. What it returns is of this rank's part.
        `step` and `tags` are the first rank's to tell. Closed once that has left the run, or is
        unheard for Policy.silence_s; UnsupportedTensor, ManifestMismatch: nothing was published.
        """
        return await self._publish_aside(step, tags)

    async def rollback(
        self, version: int, step: int | None = None, tags: Tags | None = None
    ) -> Made:
        """Publish again what this rank held of an old version, as the first rank does.

        Waits until that has found it: WaitTimeout. LogError: the first rank has not, and says why;
        else as publish(). Nothing was published then. The weights are left alone.
        """
        self._require_led()
        call = self._rolls.enter()

        def found() -> tuple[Roll, Past | None] | None:
            self._require_led()
            return self._rolls.next(call)

        async with contextlib.AsyncExitStack() as turn:
            try:
                await turn.enter_async_context(self._rolling)
                roll, past = await self._changes.until(
                    found,
                    self.policy.gather_s + self.policy.resume_s,
                    what=f"version {version} again",
                    why=lambda: "the first rank of the trainer has not made it again",
                )
            except BaseException:
                self._rolls.give_up(call)
                raise
            if roll.version != version:
                raise LocalProtocolError(
                    f"rollback({version}), where the first rank of the trainer called "
                    f"rollback({roll.version}): start all of its ranks again"
                )
            if roll.reason:
                raise LogError(f"the first rank of the trainer did not roll back: {roll.reason}")
            return await self._publish_aside(step, tags, past)

    async def _publish_aside(
        self, step: int | None, tags: Tags | None, past: Past | None = None
    ) -> Made:
        made = in_order(self._made_by().devices, lambda: self._publish(step, tags, past))
        return Made(await asyncio.to_thread(made))

    def _publish(self, step: int | None, tags: Tags | None, past: Past | None = None) -> Published:
        outgoing = self._made_by()
        self._require_led()
        try:
            return outgoing.publish(step, tags, past=past)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._changes.notify)

    def _require_led(self) -> None:
        """Closed unless this is open, and the first rank there."""
        if self._life is None:
            raise Closed(NOT_OPEN)
        if self._lost is None:
            self._lost = self._deserted
        if self._lost is not None:  # for good: what it has published without us is of other steps
            raise Closed(f"{self._lost} so nothing was published")

    def _made_by(self) -> Outgoing:
        if self._outgoing is None:
            raise Closed(NOT_OPEN)
        return self._outgoing

    # ---- what the first rank wants

    def _introduce(self, leader: str, incarnation: str) -> Fellow:
        self._met = True
        self._changes.notify()
        return Fellow(
            leader=leader,
            rank=self.rank,
            incarnation=incarnation,
            layout=codec.pack_layout(self._layout),
            kinds=self._ports.kinds,
            gpu=self._ports.gpu,
        )

    async def _let_go(self) -> None:
        await self._windows.abort_all()
        self._changes.notify()

    async def _perform(self, order: Order) -> Any:
        what, run = decode_what(order), self._ports.run
        if isinstance(what, Publish):
            self._outgoing = await run(self._make, what)
            self._sending = Sending(self._ports, self._windows, self._outgoing, self.rank)
            return None
        outgoing, sending = self._made_by(), self._sending
        match order.deed, what:
            case "open", _:
                return await sending.open(what)
            case "abort", _:
                return await sending.abort(what)
            case "close", _:
                return await sending.close(what)
            case "send", _:
                return await sending.send(what)
            case "begin", Begin(version=version, made=None):
                _, digest = await run(outgoing.begin, version)
                return Held(version=version, digest=digest)
            case "recall", _:
                return await self._recall(outgoing, what)
            case "since", (start, digest):
                return await run(outgoing.go_on, start, self._rolls.take(digest).tensors)
            case "roll", Roll():
                self._rolls.hear(what)
                self._changes.notify()
                return None
            case "hold", _:
                self._rolls.forget()
                self._begun = True
                self._changes.notify()
                return None
            case "begin", Begin(made=At() as at):
                try:
                    await self._until(at)
                except WaitTimeout as exc:
                    raise LogError(str(exc)) from exc  # to be tried again
                return await run(outgoing.begin_at, at.version)
            case "seal", Seal(at=at, base=base):
                await self._until(at)
                sealed = await run(
                    lambda: outgoing.take(outgoing.kept(base, at.version), at.version)
                )
                if sealed is None:
                    raise LocalProtocolError(f"nothing leads to version {at.version} here")
                return sealed
            case "join", version:
                await run(lambda: outgoing.join(outgoing.kept(0, version)))
                return None
            case "store", Store(version=version, epoch=epoch, digest=digest):
                entry, patch = await run(outgoing.entry_until, version, epoch, digest)
                entry = msgspec.structs.replace(entry, step=what.step, tags=what.tags)
                return await self._store(entry, patch)
            case "release", _:
                return await run(outgoing.release, what)
            case "copy", _:
                return await self._take_copy(outgoing, what)
            case "keep", (version, epoch, digest):
                patch, self._copy = self._copy, None
                if patch is None or patch.version != version:
                    raise LocalProtocolError(f"no copy of version {version} was taken here")
                return await self._store(outgoing.anchored(patch, epoch, digest), patch)
        raise LocalProtocolError(f"a rank of a trainer does not {order.deed}")

    def _let_go_of_copies(self) -> None:
        self._copy, self._rolls = None, Rolls()

    def _make(self, what: Publish) -> Outgoing:
        roots = tuple(codec.unpack_layout(packed) for packed in what.roots)
        choice = self._parted.choice
        share = self._parted.share(self.rank, roots, what.manifest)
        outgoing = Outgoing(
            choice,
            clock=self._ports.clock,
            writer=what.writer,
            shadow=self._shadow,
            share=share,
        )
        rehearse_outgoing(outgoing, self._ports.device, dtype=choice.dtype, shadow=self._shadow)
        return outgoing

    async def _until(self, at: At) -> int:
        """Wait until publish() has made a version here, which it has made by now (WaitTimeout).

        LocalProtocolError if it was made by other calls than on the first rank.
        """
        outgoing = self._made_by()

        def made() -> int | None:
            there, here = outgoing.version >= at.version, outgoing.at(at.version)
            amiss = ""
            if here.failed > at.failed:
                amiss = f"publish() has failed and not on the first rank ({outgoing.failure})"
            elif there and here.failed < at.failed:
                amiss = "publish() has failed on the first rank and not on this one"
            elif there and here.old != at.old:
                made, of = min({*here.old} ^ {*at.old})
                alone = "on this rank" if (made, of) in here.old else "on the first rank"
                amiss = f"version {made} is of rollback({of}) {alone} alone"
            if amiss:
                raise LocalProtocolError(
                    f"version {at.version} would be of two steps: {amiss}; start all ranks of the "
                    "trainer again"
                )
            return outgoing.version if there else None

        return await self._changes.until(
            made,
            self.policy.store_s,
            what=f"version {at.version}",
            why=lambda: f"publish() has made {outgoing.version} on this rank",
        )

    async def _take_copy(self, outgoing: Outgoing, at: At) -> Held:
        made = await self._until(at)
        if made > at.version:
            return Held(version=made, digest=None)
        patch, digest = await self._ports.run(outgoing.copy)
        self._copy = patch
        return Held(version=patch.version, digest=digest)

    async def _recall(self, outgoing: Outgoing, way: Sequence[LogEntry]) -> Held:
        """Make again what this rank held of an old state."""
        number = self._rolls.ask()
        claims = await Journal(self._ports.bus, self.run).claims(timeout_s=self.policy.bus_s)
        manifest, layout = outgoing.manifest, outgoing.layout
        remaking = Remaking(self._ports, self.policy, manifest, layout, claims)
        version, digest = way[-1].version, way[-1].digest
        try:
            state = await remaking.state(way)
        except Spoilt as exc:
            return Held(version=version, digest=None, spoilt=exc.entry.name)
        share = await remaking.digest(state)
        self._rolls.made(number, Past(version, digest, state))
        return Held(version=version, digest=share)

    async def _store(self, entry: LogEntry, patch: Patch) -> None:
        payload = await self._ports.run(self._made_by().wire, patch)
        await self._ports.log.store(entry, payload, timeout_s=self.policy.store_s)

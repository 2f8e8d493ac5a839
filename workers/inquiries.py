"""A client's side of generation: which workers there are, and what becomes of each request.

Silence is counted in beats of the client's own clock task, not in seconds: a client whose loop
stalls misses beats itself, and does not take that for the workers' silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from ..messages import codec
from ..messages.control import Role
from ..messages.errors import BusError, RemoteProtocolError
from ..messages.rollouts import Generate, Generated, GenerateFailed, Generating, Offer, Seek
from ..messages.subjects import Subjects
from ..pipeline.bus.base import Bus, Message, Subscription

log = logging.getLogger("sparsecast.rollouts")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPolicy:
    """Deadlines of the samples' side, in seconds."""

    beat_s: float = 0.5
    """How often the client asks who is there; workers tell of their requests as often."""

    silent_beats: int = 3
    """A worker, or a request, unheard for more beats than this counts as lost."""

    gather_s: float = 0.1
    """How long a new client waits for further workers once it has heard the first."""

    no_worker_s: float = 5.0
    """With no worker at all for so long, prompts fail before their own deadline."""

    backoff_s: float = 0.2
    """How long a worker that could not answer is left alone."""

    connect_s: float = 5.0
    """The deadline of connecting to the bus."""


@dataclass(slots=True)
class Peer:
    """A worker that generates, as last heard: `missed` beats ago."""

    offer: Offer
    missed: int = 0
    #: Prompts of this client that it has now.
    load: int = 0

    @property
    def name(self) -> str:
        """The worker's name."""
        return self.offer.worker


@dataclass(frozen=True, slots=True)
class Lost:
    """No answer is to be expected any more (though a late one still counts)."""

    reason: str


Outcome = Generated | GenerateFailed | Lost


@dataclass(slots=True, eq=False)
class Inquiry:
    """One request to one worker. `state` is what the worker last said of it."""

    request: str
    worker: str
    prompts: int
    outcomes: asyncio.Queue[tuple[Inquiry, Outcome]]
    missed: int = 0
    lost: bool = False
    state: str = "sent"


class Inquiries:
    """The client's inbox: keeps the table of workers, and hands each request its outcomes."""

    def __init__(
        self, bus: Bus, run: str, client: str, policy: RolloutPolicy, role: Role = "rollout"
    ) -> None:
        self.run = run
        self.policy = policy
        self.role: Role = role
        self.closed = False
        self._bus = bus
        self._subjects = Subjects(run)
        self._client = client
        self._inbox = self._subjects.answers(client)
        self._peers: dict[str, Peer] = {}
        self._inquiries: dict[str, Inquiry] = {}
        self._count = 0
        self._subscription: Subscription | None = None
        self._beats: asyncio.Task[None] | None = None
        self._first = asyncio.Event()

    @property
    def url(self) -> str:
        """The bus that it asks on."""
        return self._bus.url

    async def open(self) -> None:
        """Subscribe, and begin to ask who is there."""
        self._subscription = await self._bus.subscribe(f"{self._inbox}.*", self._heard)
        self._beats = asyncio.get_running_loop().create_task(self._beat())

    async def close(self) -> None:
        """End. Idempotent."""
        self.closed = True
        if self._beats is not None:
            self._beats.cancel()
            await asyncio.gather(self._beats, return_exceptions=True)
            self._beats = None
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            with contextlib.suppress(BusError):
                await subscription.unsubscribe()

    async def gather(self, timeout_s: float) -> None:
        """Return once a worker is there and others had time to answer too, or at the deadline."""
        if not self.peers():
            self._first.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._first.wait(), timeout_s)
                await asyncio.sleep(min(self.policy.gather_s, timeout_s))

    def peers(self, only: str | None = None) -> list[Peer]:
        """The workers that are there, refusing or not: those of the role that is asked for, or the
        one of this name, whatever its role."""
        if only is not None:
            return [self._peers[only]] if only in self._peers else []
        return [peer for peer in self._peers.values() if peer.offer.role == self.role]

    async def ask(
        self, worker: str, request: Generate, outcomes: asyncio.Queue[tuple[Inquiry, Outcome]]
    ) -> Inquiry:
        """Send `request` (its name is set here) to a worker; outcomes come through the queue.

        BusError if it could not be sent. To be ended with forget().
        """
        inquiry = Inquiry(request.request, worker, len(request.prompts), outcomes)
        self._inquiries[inquiry.request] = inquiry
        self._carry(inquiry, 1)
        try:
            await self._bus.publish(
                self._subjects.generate(worker),
                codec.encode(request),
                reply=f"{self._inbox}.{inquiry.request}",
            )
        except BaseException:
            self.forget(inquiry)
            raise
        return inquiry

    def name(self) -> str:
        """A name for the next request."""
        self._count += 1
        return f"{self._client}-{self._count}"

    def forget(self, inquiry: Inquiry) -> None:
        """Take no more outcomes of it. Idempotent."""
        if self._inquiries.pop(inquiry.request, None) is not None and not inquiry.lost:
            self._carry(inquiry, -1)

    # ---- what comes

    def _heard(self, message: Message) -> None:
        name = message.subject[len(self._inbox) + 1 :]
        inquiry = self._inquiries.get(name)
        if not message.data:
            # The server's word that nobody is subscribed: quicker than the worker's silence.
            if inquiry is not None:
                self._lose(inquiry, "is gone from the bus")
                self._peers.pop(inquiry.worker, None)
            return
        try:
            heard = codec.decode_rollout(message.data, subject=message.subject)
        except RemoteProtocolError as exc:
            log.warning("ignored: %s", exc)
            return
        match heard:
            case Offer():
                self._offered(heard)
            case Generating():
                if inquiry is not None:
                    inquiry.missed, inquiry.state = 0, heard.state
                    if inquiry.lost:
                        inquiry.lost = False
                        self._carry(inquiry, 1)
            case Generated() | GenerateFailed():
                if inquiry is not None:
                    self.forget(inquiry)
                    inquiry.outcomes.put_nowait((inquiry, heard))
            case _:
                log.warning("ignored: a %s on %s", type(heard).__name__, message.subject)

    def _offered(self, offer: Offer) -> None:
        peer = self._peers.get(offer.worker)
        if peer is None:
            peer = self._peers[offer.worker] = Peer(offer)
            peer.load = sum(
                inquiry.prompts
                for inquiry in self._inquiries.values()
                if inquiry.worker == offer.worker and not inquiry.lost
            )
        peer.offer, peer.missed = offer, 0
        if offer.role == self.role:
            self._first.set()

    def _carry(self, inquiry: Inquiry, sign: int) -> None:
        peer = self._peers.get(inquiry.worker)
        if peer is not None:
            peer.load += sign * inquiry.prompts

    def _lose(self, inquiry: Inquiry, reason: str) -> None:
        if not inquiry.lost:
            self._carry(inquiry, -1)
            inquiry.lost = True
            inquiry.outcomes.put_nowait((inquiry, Lost(f"{inquiry.worker} {reason}")))

    # ---- beats

    async def _beat(self) -> None:
        seek = codec.encode(Seek(client=self._client))
        limit = self.policy.silent_beats
        while True:
            try:
                await self._bus.publish(self._subjects.offers, seek, reply=f"{self._inbox}.offers")
            except BusError as exc:
                # Nobody can be heard: that is not the workers' silence.
                log.debug("not asked who is there: %s", exc)
                await asyncio.sleep(self.policy.beat_s)
                continue
            await asyncio.sleep(self.policy.beat_s)
            silent = limit * self.policy.beat_s
            for name, peer in list(self._peers.items()):
                peer.missed += 1
                if peer.missed > limit:
                    del self._peers[name]
            for inquiry in list(self._inquiries.values()):
                inquiry.missed += 1
                if inquiry.missed > limit:
                    self._lose(inquiry, f"was silent for {silent:g} s")

"""The connection to a NATS server: it opens with a deadline, comes back by itself, and tells."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import nats.errors
from nats.aio.client import Client

from ...messages.errors import BusUnavailable
from .base import StateHandler
from .client import MINIMUM_SERVER, Credentials, HardenedClient, redact, server_version

log = logging.getLogger("sparsecast.bus")

RECONNECT_WAIT_S = 0.25
PING_INTERVAL_S = 5

_DENIED = re.compile(r'permissions violation for (publish|subscription)[^"]*"([^"]+)"')


class Connection:
    """A connection for one event loop, opened once and closed once."""

    def __init__(self, url: str) -> None:
        self._servers = [part.strip() for part in url.split(",") if part.strip()]
        self._url = redact(url)
        self._client = HardenedClient()
        self._state_handlers: list[StateHandler] = []
        self._up = asyncio.Event()
        self._opened = False
        self._closing = False
        self._reason = ""
        self._refused = asyncio.Event()
        self._quiet: dict[str, float] = {}

    # ---- the connection

    async def open(self, name: str, credentials: Credentials, timeout_s: float) -> None:
        """Connect, trying again until `timeout_s` is over; see nats.connect()."""
        if not self._servers:
            raise BusUnavailable(self._url, "no URL was given; expected nats://host:port")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        options = credentials.options()
        try:
            while not await self._attempt(name, options, deadline):
                if loop.time() >= deadline:
                    raise BusUnavailable(
                        self._url, f"{self._reason or 'no answer'} (tried for {timeout_s:g} s)"
                    )
                await asyncio.sleep(min(RECONNECT_WAIT_S, max(0.0, deadline - loop.time())))
                self._client = HardenedClient()
            found = str(self._client._server_info.get("version", ""))
            if server_version(found) < MINIMUM_SERVER:
                raise BusUnavailable(
                    self._url,
                    f"nats-server {found} is too old: sparsecast needs "
                    f"{'.'.join(map(str, MINIMUM_SERVER))} or newer",
                )
            await self._begin()
        except BaseException:
            self._closing = True
            await self._shut(0.5)
            raise
        self._opened = True
        self._reason = ""
        self._up.set()
        self._tell("connected", self._url)

    async def _attempt(self, name: str, options: dict[str, Any], deadline: float) -> bool:
        """Whether we are connected now; BusUnavailable if trying again is no use."""
        loop = asyncio.get_running_loop()
        connecting = loop.create_task(
            self._client.connect(
                servers=self._servers,
                name=name,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnected,
                reconnected_cb=self._on_reconnected,
                closed_cb=self._on_closed,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # a float too
                connect_timeout=2,
                ping_interval=PING_INTERVAL_S,
                max_outstanding_pings=2,
                flush_timeout=5.0,
                drain_timeout=2,
                **options,
            )
        )
        refused = loop.create_task(self._refused.wait())
        both: set[asyncio.Task[Any]] = {connecting, refused}
        try:
            await asyncio.wait(
                both, timeout=max(0.0, deadline - loop.time()), return_when=asyncio.FIRST_COMPLETED
            )
            if self._refused.is_set():
                raise BusUnavailable(self._url, self._reason)
            if connecting.done():
                connecting.result()
                # A server that hangs up instead of answering counts as connected to nats-py.
                return self._client.is_connected
        except OSError as exc:
            self._reason = reason_of(exc)
        except (nats.errors.Error, ValueError, AssertionError) as exc:
            raise BusUnavailable(self._url, reason_of(exc)) from None
        finally:
            for task in both:
                task.cancel()
            await asyncio.wait(both, timeout=0.5)
            _forget(connecting)
        await self._shut(0.5)
        return False

    @property
    def url(self) -> str:
        """Where the broker is, without credentials."""
        return self._url

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes, in bytes, headers included."""
        return self._client.max_payload

    @property
    def connected(self) -> bool:
        """Whether the connection stands now."""
        return self._up.is_set() and self._client.is_connected

    @property
    def client(self) -> Client:
        """The connection as nats-py has it, for its micro services."""
        return self._client

    def on_state(self, handler: StateHandler) -> None:
        """Hear of every change of the connection, slow consumers, denials and errors."""
        self._state_handlers.append(handler)

    async def close(self, timeout_s: float = 2.0) -> None:
        """Drain and close, within `timeout_s`. Idempotent."""
        if self._closing:
            return
        self._closing = True
        if self._client.is_connected:
            drain = asyncio.ensure_future(self._client.drain())
            # Not asyncio.timeout: drain() swallows a cancellation and waits on.
            await asyncio.wait({drain}, timeout=timeout_s)
            if not drain.done():
                log.warning("%s did not take what was left within %g s", self._url, timeout_s)
                self._client.abandon()
                drain.cancel()
            _forget(drain)
        await self._shut(min(timeout_s, 0.5))
        self._break_off()
        self._up.clear()
        self._tell("closed", "closed here")

    async def _shut(self, timeout_s: float) -> None:
        closing = asyncio.ensure_future(self._client.close())
        await asyncio.wait({closing}, timeout=timeout_s)
        if not closing.done():
            self._client.abandon()
            closing.cancel()
            await asyncio.wait({closing}, timeout=timeout_s)
        _forget(closing)

    def _tell(self, event: str, detail: str) -> None:
        level = logging.INFO if event in ("connected", "reconnected", "closed") else logging.WARNING
        now = asyncio.get_running_loop().time()
        if now >= self._quiet.get(event + detail, 0.0):
            # A slow consumer is reported for every message that it drops: log one a second.
            self._quiet = {key: end for key, end in self._quiet.items() if end > now}
            self._quiet[event + detail] = now + 1.0
            log.log(level, "bus %s: %s: %s", self._url, event, detail)
        for handler in self._state_handlers:
            try:
                handler(event, detail)
            except Exception:
                log.exception("a state handler failed on %s", event)

    async def _on_error(self, exc: Exception) -> None:
        if isinstance(exc, nats.errors.SlowConsumerError):
            self._tell("slow-consumer", exc.subject)
            return
        text = str(exc)
        denied = _DENIED.search(text)
        if denied is not None:
            self._deny(denied[1], denied[2])
            return
        if isinstance(exc, nats.errors.FlushTimeoutError):
            self._tell("error", "the server takes data too slowly")
            return
        if self._refused.is_set():
            return  # what follows a refusal (the server hangs up) is no reason of its own
        self._reason = reason_of(exc)
        if not self._opened:
            if "authorization" in text.lower() or "authentication" in text.lower():
                self._reason = f"{self._reason}: the server refuses the credentials"
                self._refused.set()
        elif self._client.is_connected and not isinstance(
            exc, (OSError, nats.errors.StaleConnectionError)
        ):
            self._tell("error", self._reason)
        else:
            log.debug("bus %s: %s", self._url, self._reason)

    async def _on_disconnected(self) -> None:
        if not self._opened or self._closing:
            return
        self._up.clear()
        self._break_off()
        self._tell("disconnected", self._reason or "the connection broke")

    async def _on_reconnected(self) -> None:
        self._reason = ""
        self._up.set()
        self._tell("reconnected", self._url)

    async def _on_closed(self) -> None:
        if self._opened and not self._closing:
            self._closing = True
            self._up.clear()
            self._break_off()
            self._tell("closed", self._reason or "the client gave up")

    async def _wait_up(self, deadline: float) -> None:
        if self.connected:
            return
        if not self._client.is_connected:
            self._up.clear()  # nats-py knows before it tells: what is sent now would wait inside it
        if self._closing:
            raise self._unavailable("closed")
        try:
            async with asyncio.timeout_at(deadline):
                await self._up.wait()
        except TimeoutError:
            raise self._unavailable("disconnected, and not back in time") from None

    def _unavailable(self, what: str) -> BusUnavailable:
        if self._closing:
            return BusUnavailable(self._url, "the connection is closed")
        return BusUnavailable(self._url, f"{what}: {self._reason}" if self._reason else what)

    # ---- what speaks over the connection

    async def _begin(self) -> None:
        """The server has taken us for the first time."""

    def _break_off(self) -> None:
        """The connection is gone: no answer comes to what was asked over it."""

    def _deny(self, action: str, subject: str) -> None:
        """The server denied us to "publish" to a subject (in lower case), or a "subscription"."""


def _forget(task: asyncio.Future[None]) -> None:
    """Take what became of a task that is of no interest any more, lest the loop complain."""
    if task.done() and not task.cancelled() and task.exception() is not None:
        log.debug("while closing: %r", task.exception())


def reason_of(exc: BaseException) -> str:
    """What a foreign error means to whoever uses the bus."""
    if isinstance(exc, ConnectionRefusedError):
        return "connection refused: is a broker running there?"
    if isinstance(exc, (TimeoutError, nats.errors.TimeoutError)):
        return "no answer in time"
    return str(exc).removeprefix("nats: ") or type(exc).__name__

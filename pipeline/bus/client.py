"""The nats-py client with its sharp edges taken off, its credentials, URLs fit to be printed."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats.errors
from nats.aio.client import Client

from ...messages.errors import BusError

#: The oldest server that knows all we use: a time to live for single messages, batched direct gets.
MINIMUM_SERVER = (2, 11)

#: Up to so many bytes are written at once, if no more than that waits for the socket.
DIRECT_NBYTES = 64 << 10

_USERINFO = re.compile(r"^([a-z]+://)?[^/]*@", re.IGNORECASE)


def redact(url: str) -> str:
    """The URL (or comma-separated URLs) of a bus without user, password or token."""
    return ",".join(_USERINFO.sub(r"\1", part.strip()) for part in url.split(","))


def server_version(version: str) -> tuple[int, int]:
    """Major and minor of a server's version string; (0, 0) if it is none."""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client shows to the server, beside what the URL itself holds. Never printed."""

    #: A .creds file (JWT and seed).
    file: Path | None = None
    #: A file with an nkey seed.
    nkey_file: Path | None = None
    user: str | None = None
    password: str | None = None
    token: str | None = None
    #: The certificate authority of the server, and the client's own certificate and key (PEM).
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None

    def __repr__(self) -> str:
        return "Credentials(…)"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Credentials:
        """Read SPARSECAST_BUS_CREDENTIALS, _NKEY, _CA, _CERTIFICATE and _KEY (files), and
        SPARSECAST_BUS_USER, _PASSWORD and _TOKEN."""
        source = os.environ if environment is None else environment

        def text(key: str) -> str | None:
            return source.get(f"SPARSECAST_BUS_{key}") or None

        def path(key: str) -> Path | None:
            value = text(key)
            return Path(value).expanduser() if value else None

        return cls(
            file=path("CREDENTIALS"),
            nkey_file=path("NKEY"),
            user=text("USER"),
            password=text("PASSWORD"),
            token=text("TOKEN"),
            ca_file=path("CA"),
            certificate_file=path("CERTIFICATE"),
            key_file=path("KEY"),
        )

    def options(self) -> dict[str, Any]:
        """Arguments for the client's connect(); BusError if a file cannot be read."""
        for path in (
            self.file,
            self.nkey_file,
            self.ca_file,
            self.certificate_file,
            self.key_file,
        ):
            if path is not None and not os.access(path, os.R_OK):
                raise BusError(
                    f"credentials file {path} cannot be read; check the path and its permissions"
                )
        options: dict[str, Any] = {}
        if self.file is not None:
            options["user_credentials"] = str(self.file)
        if self.nkey_file is not None:
            options["nkeys_seed"] = str(self.nkey_file)
        if self.user is not None:
            options["user"] = self.user
        if self.password is not None:
            options["password"] = self.password
        if self.token is not None:
            options["token"] = self.token
        if self.ca_file is not None or self.certificate_file is not None:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.certificate_file is not None:
                context.load_cert_chain(self.certificate_file, self.key_file)
            options["tls"] = context
        return options


class HardenedClient(Client):
    """nats-py's client, made to survive what would end its reading loop or close it for good."""

    async def _process_pong(self) -> None:
        # A flush that ran out of time leaves its cancelled future in the queue; answering that one
        # would raise in the reading loop and leave the connection deaf.
        if self._pongs and self._pongs[0].done():
            self._pongs.pop(0)
            self._pongs_received += 1
            self._pings_outstanding = 0
            return
        await super()._process_pong()

    async def _send_ping(self, future: Any = None) -> None:
        # nats-py writes a PING past what still waits to be written: its PONG would not say that
        # the server has what was published and subscribed before.
        if self._pending and self._transport is not None and self.is_connected:
            self._transport.writelines(self._pending[:])
            self._pending = []
            self._pending_data_size = 0
        await super()._send_ping(future)

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        # nats-py leaves the writing to a task of its own: every message waits for that one's turn.
        # Where much waits to be written already, that task's own waiting is what bounds it.
        transport = self._transport
        writer = getattr(transport, "_io_writer", None)
        if (
            force_flush
            or transport is None
            or writer is None
            or not self.is_connected
            or self._pending_data_size > DIRECT_NBYTES
            or writer.transport.get_write_buffer_size() > DIRECT_NBYTES
        ):
            return await super()._flush_pending(force_flush)
        if self._pending:
            try:
                transport.writelines(self._pending[:])
            except (OSError, RuntimeError):
                # The socket is gone: the task of its own knows what follows from that.
                return await super()._flush_pending(force_flush)
            self._pending = []
            self._pending_data_size = 0
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    async def _process_err(self, err_msg: str) -> None:
        # nats-py closes for good on any error of the server that is not about permissions
        # (expired credentials, too many connections): we go on trying, and say why.
        if "permissions violation" in err_msg:
            await super()._process_err(err_msg)
            return
        error = nats.errors.Error(f"nats: {err_msg.strip(chr(39))}")
        self._err = error
        await self._error_cb(error)
        await self._process_op_err(error)

    async def _connect_to_server(self, s: Any) -> None:
        # An attempt that failed after the socket was open (an empty answer, bad credentials) leaves
        # it open, one for every attempt.
        if self._transport:
            self.abandon()
        await super()._connect_to_server(s)

    def abandon(self) -> None:
        """Drop the socket without waiting for anyone: for a server that no longer reads."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None and writer.transport is not None:
            writer.transport.abort()

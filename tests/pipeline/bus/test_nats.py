"""The NATS adapter against a real server: connecting, talking, breaking and coming back."""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servers import Proxy, until
from sparsecast.messages.errors import (
    BusError,
    BusUnavailable,
    PayloadTooLarge,
    RemoteProtocolError,
)
from sparsecast.pipeline.bus import jetstream
from sparsecast.pipeline.bus.base import Bus, Message
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.client import Credentials, redact
from sparsecast.pipeline.bus.nats import NatsBus, connect

Connect = Callable[..., Awaitable[NatsBus]]


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- connecting


async def test_a_bus_that_is_not_there_fails_in_time_and_says_the_url() -> None:
    """Nobody listens: connect() gives up at its deadline, naming the URL but not the password."""
    port = free_port()
    began = time.monotonic()
    with pytest.raises(BusUnavailable) as caught:
        await connect(f"nats://ann:geheim@127.0.0.1:{port}", name="t", timeout_s=0.6)
    assert time.monotonic() - began < 2.0
    assert f"nats://127.0.0.1:{port} is not available: connection refused" in str(caught.value)
    assert "geheim" not in str(caught.value)
    assert "ann" not in caught.value.url


async def test_a_server_that_never_speaks_fails_in_time() -> None:
    """Something accepts the connection and says nothing: the deadline holds all the same."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(BusUnavailable, match=str(port)):
            await connect(f"nats://127.0.0.1:{port}", name="t", timeout_s=0.5)
        assert time.monotonic() - began < 2.5


@pytest.mark.parametrize("url", ["", "nats://", "nats://:4222", "http:/x", "nats://h:port"])
async def test_what_is_no_url_is_refused(url: str) -> None:
    """A slip of the pen in the URL is refused at the latest at the deadline, never hangs."""
    with pytest.raises(BusUnavailable):
        await connect(url, name="t", timeout_s=0.5)


async def test_a_broker_that_starts_a_little_later_is_waited_for(tmp_path: Path) -> None:
    """Trainer and broker are started together: connect() goes on trying until its deadline."""
    port = free_port()
    connecting = asyncio.ensure_future(connect(f"127.0.0.1:{port}", name="t", timeout_s=5.0))
    await asyncio.sleep(0.4)
    broker = Broker(port=port)
    await asyncio.to_thread(broker.start)
    try:
        bus = await connecting
        assert bus.connected
        await bus.close()
    finally:
        broker.close()


async def test_a_server_that_is_too_old_is_refused(broker: Broker) -> None:
    """Old servers ignore the time to live of a message in silence: connect() refuses them."""
    async with Proxy(broker.url) as proxy:
        proxy.from_server = lambda data: data.replace(b'"version":"2.15.1"', b'"version":"2.9.10"')
        with pytest.raises(BusUnavailable, match=r"nats-server 2\.9\.10 is too old.*2\.11"):
            await connect(proxy.url, name="t", timeout_s=2.0)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://h:4222", "nats://h:4222"),
        ("nats://user:pa:ss@h:4222", "nats://h:4222"),
        ("tls://token@h", "tls://h"),
        ("user:p@ss@h:1", "h:1"),
        ("nats://a:b@h1:1, nats://a:b@h2:2", "nats://h1:1,nats://h2:2"),
    ],
)
def test_credentials_are_never_shown(url: str, shown: str) -> None:
    """What is printed of a URL has no user, password or token in it."""
    assert redact(url) == shown


def test_credentials_come_from_the_environment_and_stay_hidden(tmp_path: Path) -> None:
    """Files and secrets are taken from SPARSECAST_BUS_…; no repr tells them; a bad path is said."""
    missing = tmp_path / "nobody.creds"
    found = Credentials.from_environment(
        {"SPARSECAST_BUS_CREDENTIALS": str(missing), "SPARSECAST_BUS_PASSWORD": "geheim"}
    )
    assert found.file == missing
    assert "geheim" not in repr(found)
    assert "geheim" not in str(found)
    with pytest.raises(BusError, match=r"nobody\.creds cannot be read"):
        found.options()
    assert Credentials.from_environment({}).options() == {}


async def test_the_bus_fulfils_the_contract(bus: NatsBus, broker: Broker) -> None:
    """A NatsBus is a Bus, tells its URL and the server's limit, and closes twice at no cost."""
    contract: Bus = bus
    assert contract.url == broker.url
    assert contract.max_payload == broker.max_payload
    assert contract.connected
    await bus.close()
    began = time.monotonic()
    await bus.close()
    assert time.monotonic() - began < 0.1
    assert not bus.connected
    with pytest.raises(BusUnavailable, match="closed"):
        await bus.publish("a", b"")
    with pytest.raises(BusUnavailable, match="closed"):
        await bus.request("a", b"", timeout_s=1.0)
    with pytest.raises(BusUnavailable, match="closed"):
        await bus.flush(1.0)


# ---- talking


async def test_messages_come_in_order_with_subject_and_reply(
    bus: NatsBus, broker: Broker, connected: Connect, run: str
) -> None:
    """A thousand messages arrive once each, in order, with subject and reply subject."""
    other = await connected(broker.url)
    heard: list[Message] = []
    await other.subscribe(f"{run}.*", heard.append)
    await other.flush(2.0)
    for number in range(1000):
        await bus.publish(f"{run}.x", str(number).encode(), reply="back")
    await bus.flush(2.0)
    await until(lambda: len(heard) == 1000)
    assert [int(message.data) for message in heard] == list(range(1000))
    assert {(message.subject, message.reply) for message in heard} == {(f"{run}.x", "back")}
    assert heard[0].sequence is None


async def test_one_of_a_queue_group_gets_each_message(
    bus: NatsBus, broker: Broker, connected: Connect, run: str
) -> None:
    """Two workers share a queue group: each request reaches one of them."""
    heard: list[tuple[int, bytes]] = []
    for worker in (0, 1):
        member = await connected(broker.url)
        await member.subscribe(
            run, lambda message, worker=worker: heard.append((worker, message.data)), queue="w"
        )
        await member.flush(2.0)
    for number in range(200):
        await bus.publish(run, str(number).encode())
    await until(lambda: len(heard) >= 200)
    await asyncio.sleep(0.05)
    assert sorted(int(data) for _, data in heard) == list(range(200))
    assert {worker for worker, _ in heard} == {0, 1}


async def test_a_handler_that_fails_does_not_end_the_subscription(
    bus: NatsBus, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler raises on one message: that is logged with the subject, the next is delivered."""
    heard: list[bytes] = []

    def handler(message: Message) -> None:
        if message.data == b"bad":
            raise ValueError("cannot")
        heard.append(message.data)

    await bus.subscribe(run, handler)
    with caplog.at_level(logging.ERROR, "sparsecast.bus"):
        await bus.publish(run, b"bad")
        await bus.publish(run, b"good")
        await until(lambda: heard == [b"good"])
    assert f"the handler of {run} failed" in caplog.text


async def test_no_handler_call_starts_after_unsubscribe(bus: NatsBus, run: str) -> None:
    """Messages are already waiting in the client when the subscription is ended: none is heard."""
    heard: list[bytes] = []
    subscription = await bus.subscribe(run, lambda message: heard.append(message.data))
    for _ in range(100):
        await bus.publish(run, b"x")
    await bus.flush(2.0)
    count = len(heard)
    await subscription.unsubscribe()
    await subscription.unsubscribe()
    await bus.publish(run, b"late")
    await bus.flush(2.0)
    await asyncio.sleep(0.05)
    assert len(heard) == count


async def test_requests_are_answered_each_with_its_own(bus: NatsBus, run: str) -> None:
    """Fifty requests at once: each gets the answer to its own question."""

    def answer(message: Message) -> None:
        task = asyncio.ensure_future(bus.publish(message.reply, message.data[::-1]))
        tasks.add(task)

    tasks: set[asyncio.Future[None]] = set()
    await bus.subscribe(run, answer)
    questions = [f"question {number}".encode() for number in range(50)]
    answers = await asyncio.gather(
        *(bus.request(run, question, timeout_s=2.0) for question in questions)
    )
    assert answers == [question[::-1] for question in questions]


async def test_a_request_that_nobody_hears_fails_at_once(bus: NatsBus, run: str) -> None:
    """No one listens: the error comes at once and names the subject, long before the deadline."""
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match=f"nobody listens on {run}"):
        await bus.request(run, b"", timeout_s=30.0)
    assert time.monotonic() - began < 2.0


async def test_a_request_without_an_answer_ends_at_its_deadline(bus: NatsBus, run: str) -> None:
    """Someone listens and does not answer: BusUnavailable at the deadline, naming the subject."""
    await bus.subscribe(run, lambda _message: None)
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match=f"no answer on {run}"):
        await bus.request(run, b"", timeout_s=0.3)
    assert 0.25 < time.monotonic() - began < 2.0


async def test_a_message_above_the_limit_is_refused_before_it_is_sent(run: str) -> None:
    """The server would close the connection on such a message; it is refused here, and the
    connection goes on. Headers count as payload."""
    with Broker(max_payload=4096) as url:
        bus = await connect(url, name="t")
        try:
            with pytest.raises(
                PayloadTooLarge, match=r"message of 4097 bytes.*limit of 4096"
            ) as bad:
                await bus.publish(run, bytes(4097))
            assert (bad.value.nbytes, bad.value.limit) == (4097, 4096)
            with pytest.raises(PayloadTooLarge):
                await bus.append("s", run, bytes(4096), message_id="m", timeout_s=2.0)
            heard: list[int] = []
            await bus.subscribe(run, lambda message: heard.append(len(message.data)))
            await bus.publish(run, bytes(4096))
            await until(lambda: heard == [4096])
            assert bus.connected
        finally:
            await bus.close()


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB x 0"])
async def test_what_is_no_subject_is_refused(bus: NatsBus, subject: str) -> None:
    """A subject that would break the wire's protocol is refused by name."""
    with pytest.raises(BusError, match="cannot be"):
        await bus.publish(subject, b"")
    with pytest.raises(BusError, match="cannot be"):
        await bus.subscribe(subject, lambda _message: None)


async def test_a_slow_consumer_is_seen(
    bus: NatsBus, broker: Broker, connected: Connect, run: str
) -> None:
    """More comes than may wait for the handler: what is dropped is told, not lost in silence."""
    told: list[tuple[str, str]] = []
    slow = await connected(broker.url, on_state=lambda event, detail: told.append((event, detail)))
    heard: list[Message] = []
    await slow.subscribe(run, heard.append, pending_nbytes=2000)
    await slow.flush(2.0)
    for _ in range(500):
        await bus.publish(run, bytes(500))
    await bus.flush(2.0)
    await until(lambda: ("slow-consumer", run) in told)
    await slow.flush(2.0)
    assert len(heard) < 500


async def test_flush_means_that_the_server_has_it(
    bus: NatsBus, broker: Broker, connected: Connect, run: str
) -> None:
    """Subscribe, flush, and the first word of another connection is heard: every time."""
    other = await connected(broker.url)
    for number in range(100):
        heard: list[bytes] = []
        subscription = await other.subscribe(
            f"{run}.{number}", lambda message, heard=heard: heard.append(message.data)
        )
        await other.flush(2.0)
        await bus.publish(f"{run}.{number}", b"x")
        await until(lambda heard=heard: heard == [b"x"])
        await subscription.unsubscribe()


# ---- breaking and coming back


async def test_a_broken_connection_comes_back_by_itself(
    broker: Broker, connected: Connect, bus: NatsBus, run: str
) -> None:
    """The line is cut: handlers hear of it, publish() refuses meanwhile, subscriptions return."""
    async with Proxy(broker.url) as proxy:
        told: list[str] = []
        here = await connected(proxy.url, on_state=lambda event, _detail: told.append(event))
        heard: list[bytes] = []
        await here.subscribe(run, lambda message: heard.append(message.data))
        proxy.cut(refuse=True)
        await until(lambda: "disconnected" in told)
        assert not here.connected
        with pytest.raises(BusUnavailable, match="disconnected"):
            await here.publish(run, b"lost")
        began = time.monotonic()
        with pytest.raises(BusUnavailable):
            await here.flush(0.3)
        assert time.monotonic() - began < 1.5
        proxy.accept()
        await until(lambda: "reconnected" in told)
        await bus.publish(run, b"after")
        await until(lambda: heard == [b"after"])
        assert told == ["connected", "disconnected", "reconnected"]


async def test_whoever_waits_for_an_answer_hears_at_once_of_the_break(
    broker: Broker, connected: Connect, run: str
) -> None:
    """The connection breaks under a request: it fails then, not at its far deadline."""
    async with Proxy(broker.url) as proxy:
        here = await connected(proxy.url)
        await here.subscribe(run, lambda _message: None)
        asking = asyncio.ensure_future(here.request(run, b"", timeout_s=60.0))
        await asyncio.sleep(0.1)
        proxy.cut()
        with pytest.raises(BusUnavailable, match="broke before"):
            await asyncio.wait_for(asking, 5.0)


async def test_a_request_during_an_outage_waits_for_the_connection(
    broker: Broker, connected: Connect, bus: NatsBus, run: str
) -> None:
    """Asked while the line is down, within its deadline: it is sent once the line is back."""
    tasks: list[asyncio.Future[None]] = []
    await bus.subscribe(
        run,
        lambda message: tasks.append(asyncio.ensure_future(bus.publish(message.reply, b"yes"))),
    )
    await bus.flush(2.0)
    async with Proxy(broker.url) as proxy:
        here = await connected(proxy.url)
        proxy.cut(refuse=True)
        await until(lambda: not here.connected)
        asking = asyncio.ensure_future(here.request(run, b"?", timeout_s=10.0))
        await asyncio.sleep(0.2)
        assert not asking.done()
        proxy.accept()
        assert await asking == b"yes"
    assert len(tasks) == 1


async def test_a_stopped_broker_costs_no_more_than_the_deadline(
    own_broker: Broker, connected: Connect, run: str
) -> None:
    """The server is stopped with SIGSTOP: flush and request end in time. It goes on: so does the
    connection, though answers to abandoned questions come late."""
    bus = await connected(own_broker.url)
    heard: list[bytes] = []
    await bus.subscribe(run, lambda message: heard.append(message.data))
    await bus.flush(2.0)
    await freeze(own_broker.pid)
    try:
        began = time.monotonic()
        with pytest.raises(BusUnavailable):
            await bus.flush(0.3)
        with pytest.raises(BusUnavailable):
            await bus.request("x", b"", timeout_s=0.3)
        assert time.monotonic() - began < 2.0
    finally:
        os.kill(own_broker.pid, signal.SIGCONT)
    await asyncio.sleep(0.2)
    await bus.publish(run, b"alive")
    await bus.flush(2.0)
    await until(lambda: heard == [b"alive"])


def thread_states(pid: int) -> list[str]:
    """The state of every thread of a process, as the kernel tells it."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return [stat.rpartition(")")[2].split()[0] for stat in stats]


async def freeze(pid: int) -> None:
    """Stop a process, and wait until all of its threads have."""
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: all(state == "T" for state in thread_states(pid)))


async def fill(bus: NatsBus) -> None:
    """Publish for ever."""
    while True:
        await bus.publish("x", bytes(1 << 20))


async def test_closing_on_a_stopped_broker_is_bounded(own_broker: Broker) -> None:
    """The server takes nothing more and megabytes wait to be sent: close() ends all the same."""
    bus = await connect(own_broker.url, name="t")
    await freeze(own_broker.pid)
    try:
        # Until its buffers are full, which is what we want.
        filling = asyncio.ensure_future(fill(bus))
        await asyncio.wait({filling}, timeout=0.5)
        assert not filling.done()
        filling.cancel()
        began = time.monotonic()
        await bus.close(0.5)
        assert time.monotonic() - began < 4.0
    finally:
        os.kill(own_broker.pid, signal.SIGCONT)


async def test_a_broker_that_dies_and_returns_is_found_again(
    tmp_path: Path, connected: Connect, run: str
) -> None:
    """The broker is killed and a new one comes up at the same port: the bus finds it."""
    first = Broker(store_dir=tmp_path)
    url = first.start()
    port = int(url.rpartition(":")[2])
    bus = await connected(url)
    heard: list[bytes] = []
    await bus.subscribe(run, lambda message: heard.append(message.data))
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: not bus.connected)
    first.close()
    second = Broker(port=port, store_dir=tmp_path)
    await asyncio.to_thread(second.start)
    try:
        await bus.flush(5.0)
        await bus.publish(run, b"again")
        await until(lambda: heard == [b"again"])
    finally:
        await bus.close()
        second.close()


# ---- garbage


@given(st.binary(max_size=200))
def test_garbage_in_the_servers_name_is_an_error_of_ours(data: bytes) -> None:
    """Whatever answers in JetStream's stead: a RemoteProtocolError that names the subject."""

    def read() -> None:
        reply = jetstream.decode_reply(data, "$JS.API.X")
        jetstream.decode_state(reply, created=False, subject="$JS.API.X")

    with pytest.raises(RemoteProtocolError) as caught:
        read()
    assert caught.value.subject == "$JS.API.X"


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.dictionaries(
            st.sampled_from(["state", "config", "first_seq", "bytes", "metadata"]), inner
        ),
        max_leaves=6,
    )
)
def test_a_strange_error_is_still_an_error_of_ours(error: object) -> None:
    """Whatever stands in the place of an error becomes a BusError that names the stream."""
    found = jetstream.error_of(error, url="nats://h", stream="s")
    assert isinstance(found, BusError)
    assert "'s'" in str(found)

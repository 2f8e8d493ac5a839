"""A worker's endpoint: every request is answered, whatever happens to it, and the client hears how
it goes meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecast.messages import codec
from sparsecast.messages.control import Beat, Sender
from sparsecast.messages.errors import EngineError, ReplicaTorn, WaitTimeout
from sparsecast.messages.rollouts import (
    Generate,
    Generated,
    GenerateFailed,
    Generating,
    Offer,
    RolloutMessage,
    Sample,
    Seek,
    Span,
)
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.workers.generation import GenerationService
from sparsecast.workers.micro import register_service

SOON_S = 5.0


class Reverser:
    """A generator that answers a prompt with itself, backwards; `before` runs in every call."""

    def __init__(self, before: Callable[[Callable[[], bool]], object] | None = None) -> None:
        self.before = before
        self.calls: list[Generate] = []
        self.threads: set[int] = set()
        self.version = 3

    def generate(self, request: Generate, *, cancelled: Callable[[], bool]) -> list[Sample]:
        self.calls.append(request)
        self.threads.add(threading.get_ident())
        ended = self.before(cancelled) if self.before is not None else None
        samples = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                raise EngineError("prompt is text")
            tokens = prompt[::-1][: request.max_tokens]
            for _ in range(request.samples):
                samples.append(
                    Sample(
                        prompt=prompt,
                        tokens=tokens,
                        logprobs=(-0.5,) * len(tokens),
                        spans=(Span(0, len(tokens), self.version),),
                        worker="",
                        finish="aborted" if ended == "cancelled" else "length",
                    )
                )
        return samples


def until_cancelled(cancelled: Callable[[], bool]) -> str:
    """A long generation: it ends when it is cancelled."""
    while not cancelled():
        time.sleep(0.002)
    return "cancelled"


async def begun(generator: Reverser) -> None:
    """Wait until the generator has been called."""
    deadline = time.monotonic() + SOON_S
    while not generator.calls:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


class Client:
    """Sends requests and keeps whatever comes back, request by request."""

    def __init__(self, bus: NatsBus, run: str) -> None:
        self.bus = bus
        self.subjects = Subjects(run)
        self.heard: dict[str, list[RolloutMessage]] = {}
        self.changed = asyncio.Event()

    async def open(self) -> None:
        await self.bus.subscribe(f"{self.subjects.answers('me')}.*", self.hear)

    def hear(self, message: Any) -> None:
        name = message.subject.rpartition(".")[2]
        self.heard.setdefault(name, []).append(codec.decode_rollout(message.data))
        self.changed.set()

    async def send(self, name: str, worker: str | None = "w", **fields: Any) -> None:
        fields = {"prompts": ((1, 2, 3),), "timeout_s": 10.0} | fields
        request = Generate(request=name, **fields)
        await self.send_raw(name, codec.encode(request), worker)

    async def send_raw(self, name: str, data: bytes, worker: str | None = "w") -> None:
        subject = self.subjects.generate(worker) if worker else self.subjects.generate_any
        await self.bus.publish(subject, data, reply=f"{self.subjects.answers('me')}.{name}")

    def states(self, name: str) -> list[str]:
        return [m.state for m in self.heard.get(name, []) if isinstance(m, Generating)]

    async def until(self, condition: Callable[[], Any], timeout_s: float = SOON_S) -> Any:
        async with asyncio.timeout(timeout_s):
            while not (found := condition()):
                self.changed.clear()
                await self.changed.wait()
            return found

    async def answer(self, name: str) -> Generated | GenerateFailed:
        def final() -> RolloutMessage | None:
            last = self.heard.get(name, [None])[-1]
            return last if isinstance(last, Generated | GenerateFailed) else None

        answer: Generated | GenerateFailed = await self.until(final)
        return answer

    async def ask(self, name: str, **fields: Any) -> Generated | GenerateFailed:
        await self.send(name, **fields)
        return await self.answer(name)


@pytest.fixture
async def client(bus: NatsBus, run: str) -> Client:
    client = Client(bus, run)
    await client.open()
    return client


class Services:
    """Starts services, and closes them."""

    def __init__(self, connected: Any, broker: Broker, run: str) -> None:
        self.connected, self.broker, self.run = connected, broker, run
        self.open: list[GenerationService] = []
        self.version: int | None = 3

    async def start(self, generator: Any = None, name: str = "w", **options: Any) -> Any:
        bus = options.pop("bus", None) or await self.connected(self.broker.url)
        options.setdefault("version", lambda: self.version)
        options.setdefault("wait_version", self.wait_version)
        service = GenerationService(
            bus, run=self.run, name=name, generator=generator or Reverser(), **options
        )
        await service.start()
        await bus.flush(SOON_S)
        self.open.append(service)
        return service

    async def wait_version(self, version: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.version is None or self.version < version:
            if time.monotonic() >= deadline:
                raise WaitTimeout(f"version {version}", timeout_s, "the trainer is slow")
            await asyncio.sleep(0.005)


@pytest.fixture
async def services(connected: Any, broker: Broker, run: str) -> AsyncIterator[Services]:
    services = Services(connected, broker, run)
    yield services
    for service in services.open:
        await service.close()


async def test_request_is_accepted_then_answered(client: Client, services: Services) -> None:
    """The client hears at once that the worker has the request, and then the samples, signed with
    the worker's name, the trainer's step and tags, and the prompts' places."""
    service = await services.start(origin=lambda version: (100 + version, {"phase": "rl"}))
    answer = await client.ask("r1", prompts=((1, 2, 3), (4, 5)), samples=2, first_index=10)
    first, *_ = client.heard["r1"]
    assert first == Generating(request="r1", worker="w", state="queued")
    assert isinstance(answer, Generated)
    assert (answer.request, answer.worker, answer.version) == ("r1", "w", 3)
    assert [s.tokens for s in answer.samples] == [(3, 2, 1)] * 2 + [(5, 4)] * 2
    assert [s.index for s in answer.samples] == [10, 10, 11, 11]
    assert {(s.worker, s.step) for s in answer.samples} == {("w", 103)}
    assert all(s.tags == {"phase": "rl"} for s in answer.samples)
    statistics = service.statistics
    assert (statistics.requests, statistics.failures) == (1, 0)
    assert (statistics.samples, statistics.tokens) == (4, 10)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompts": ()}, "there are no prompts"),
        ({"samples": 0}, "samples is at least 1, not 0"),
        ({"max_tokens": -1}, "max_tokens is at least 1, not -1"),
        ({"temperature": -0.1}, "temperature is at least 0"),
        ({"temperature": float("nan")}, "temperature is at least 0 and finite, not nan"),
        ({"top_p": 0.0}, "top_p is above 0"),
        ({"timeout_s": float("inf")}, "timeout_s is above 0 and finite"),
        ({"first_index": -1}, "first_index is at least 0"),
    ],
)
async def test_senseless_requests_are_refused_by_name(
    client: Client, services: Services, fields: dict[str, Any], reason: str
) -> None:
    """No engine is asked what no engine can do, and the refusal says what is wrong."""
    generator = Reverser()
    await services.start(generator)
    answer = await client.ask("r", **fields)
    assert isinstance(answer, GenerateFailed)
    assert reason in answer.reason
    assert not answer.retry
    assert not generator.calls


async def test_garbage_is_answered_and_changes_nothing(client: Client, services: Services) -> None:
    """Bytes that are no message, a message of another kind, one that nobody waits for: each is
    answered if it can be, and the next request is served."""
    service = await services.start()
    beat = Beat(sender=Sender("t", "1"), epoch=1, version=1)
    for number, data in enumerate((b"\xc1garbage", codec.encode(beat), b"\x80")):
        await client.send_raw(f"g{number}", data)
        answer = await client.answer(f"g{number}")
        assert isinstance(answer, GenerateFailed)
        assert not answer.retry
    await client.send_raw("seek", codec.encode(Seek(client="me")))
    answer = await client.answer("seek")
    assert isinstance(answer, GenerateFailed)
    assert answer.reason == "a Seek is no request"
    await client.bus.publish(client.subjects.generate("w"), b"nobody waits for this")
    await client.bus.publish(
        client.subjects.offers, b"\xc1", reply=f"{client.subjects.answers('me')}.x"
    )
    assert isinstance(await client.ask("good"), Generated)
    assert service.statistics.failures == 5
    assert "x" not in client.heard


def test_no_bytes_break_the_endpoint(broker: Broker, run: str) -> None:
    """Hypothesis throws bytes at the handler, well-formed requests among them: it never raises,
    and whatever has a reply subject gets an answer."""

    class Bus:
        url, max_payload, connected = "", 1000, True

        def __init__(self) -> None:
            self.answered = asyncio.Event()

        async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
            if isinstance(codec.decode_rollout(data), Generated | GenerateFailed):
                self.answered.set()

    async def throw(data: bytes) -> None:
        from sparsecast.pipeline.bus.base import Message

        bus: Any = Bus()

        async def no_wait(version: int, timeout_s: float) -> None:
            raise WaitTimeout("version", timeout_s, "never")

        service = GenerationService(
            bus,
            run=run,
            name="w",
            generator=Reverser(),
            version=lambda: 1,
            wait_version=no_wait,
        )
        service._on_request(Message("s", data, "reply"))
        service._on_request(Message("s", data, ""))
        service._on_seek(Message("s", data, "reply"))
        async with asyncio.timeout(SOON_S):
            await bus.answered.wait()
        await service.close()

    requests = st.builds(
        Generate,
        request=st.text(max_size=5),
        prompts=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=3).map(tuple),
        samples=st.integers(-1, 2),
        max_tokens=st.integers(-1, 3),
        temperature=st.floats(),
        top_p=st.floats(),
        min_version=st.none() | st.integers(0, 3),
        timeout_s=st.floats(),
        seed=st.none() | st.integers(-(2**63), 2**64 - 1),
        first_index=st.integers(-1, 5),
    )

    @given(st.binary(max_size=60) | requests.map(codec.encode))
    @settings(max_examples=150, deadline=None)
    def check(data: bytes) -> None:
        asyncio.run(throw(data))

    check()


async def test_request_waits_for_its_version(client: Client, services: Services) -> None:
    """A request for version 5 waits while the worker holds 3, tells so, lets a request without a
    wish pass, and is answered when 5 has come."""
    services.version = 3
    generator = Reverser()
    await services.start(generator, progress_s=0.02)
    await client.send("later", min_version=5)
    await client.until(lambda: "waiting" in client.states("later"))
    assert isinstance(await client.ask("now"), Generated)
    generator.version = services.version = 5
    answer = await client.answer("later")
    assert isinstance(answer, Generated)
    assert answer.version == 5


async def test_version_that_does_not_come_goes_back_to_the_client(
    client: Client, services: Services
) -> None:
    """After its patience the worker hands the request back, to be tried elsewhere, and says which
    version it holds and which one was wanted."""
    generator = Reverser()
    await services.start(generator, patience_s=0.1)
    answer = await client.ask("r", min_version=9)
    assert isinstance(answer, GenerateFailed)
    assert answer.retry
    assert "version 9 is wanted, 3 is here" in answer.reason
    assert "the trainer is slow" in answer.reason
    assert not generator.calls


async def test_worker_that_must_not_generate_says_why(client: Client, services: Services) -> None:
    """A lagging worker refuses, in its answers and in its offers, and recovers."""
    reasons = ["5 versions behind"]
    await services.start(refuse=lambda: reasons[0] if reasons else None)
    answer = await client.ask("r")
    assert isinstance(answer, GenerateFailed)
    assert (answer.reason, answer.retry) == ("5 versions behind", True)
    reply = f"{client.subjects.answers('me')}.offer"
    await client.bus.publish(client.subjects.offers, codec.encode(Seek(client="me")), reply=reply)
    (offer,) = await client.until(lambda: client.heard.get("offer"))
    assert offer == Offer(worker="w", version=3, requests=0, refusal="5 versions behind")
    reasons.clear()
    assert isinstance(await client.ask("again"), Generated)


async def test_client_hears_how_its_requests_go(client: Client, services: Services) -> None:
    """While one request computes and one is queued, both are told of again and again."""
    await services.start(Reverser(until_cancelled), progress_s=0.02)
    await client.send("first")
    await client.until(lambda: "computing" in client.states("first"))
    await client.send("second")
    await client.until(lambda: client.states("first").count("computing") >= 4)
    await client.until(lambda: client.states("second").count("queued") >= 4)


async def test_more_requests_than_may_wait_are_refused_as_busy(
    client: Client, services: Services
) -> None:
    """The third request at a worker for two is told at once to go elsewhere."""
    release = threading.Event()
    await services.start(Reverser(lambda cancelled: release.wait(SOON_S)), max_requests=2)
    await client.send("one")
    await client.send("two")
    third = await client.ask("three")
    assert isinstance(third, GenerateFailed)
    assert (third.reason, third.retry) == ("busy with 2 requests", True)
    release.set()
    assert isinstance(await client.answer("one"), Generated)
    assert isinstance(await client.answer("two"), Generated)


async def test_queued_request_fails_at_its_own_deadline(client: Client, services: Services) -> None:
    """A request behind one that will not end is handed back when its time is over."""
    release = threading.Event()
    await services.start(Reverser(lambda cancelled: release.wait(SOON_S)))
    await client.send("stuck")
    answer = await client.ask("behind", timeout_s=0.1)
    release.set()
    assert isinstance(answer, GenerateFailed)
    assert answer.retry
    assert "1 other request(s) kept the worker busy" in answer.reason


async def test_generation_past_its_deadline_is_cancelled(
    client: Client, services: Services
) -> None:
    """The engine is told to stop at the request's deadline, and is free for the next."""
    generator = Reverser(until_cancelled)
    await services.start(generator)
    answer = await client.ask("long", timeout_s=0.1)
    assert isinstance(answer, GenerateFailed)
    assert "not finished within 0.1 s" in answer.reason
    generator.before = None
    assert isinstance(await client.ask("next"), Generated)


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (EngineError("no such token"), False),
        (ReplicaTorn("half an update"), True),
        (RuntimeError("out of memory"), True),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_engine_that_raises_is_an_answer(
    client: Client, services: Services, error: Exception, retry: bool
) -> None:
    """The request's own fault is final, the worker's is not; the worker lives on."""

    def fail(cancelled: Callable[[], bool]) -> None:
        raise error

    generator = Reverser(fail)
    service = await services.start(generator)
    answer = await client.ask("r")
    assert isinstance(answer, GenerateFailed)
    assert str(error) in answer.reason
    assert answer.retry is retry
    generator.before = None
    assert isinstance(await client.ask("next"), Generated)
    assert service.statistics.failures == 1
    assert str(error) in service.statistics.last_error


async def test_engine_that_loses_samples_is_caught(client: Client, services: Services) -> None:
    """An engine that answers one sample for two is an error, not a shift of all that follow."""

    class Loser(Reverser):
        def generate(self, request: Generate, *, cancelled: Callable[[], bool]) -> list[Sample]:
            return super().generate(request, cancelled=cancelled)[1:]

    await services.start(Loser())
    answer = await client.ask("r", samples=2)
    assert isinstance(answer, GenerateFailed)
    assert answer.reason == "the engine gave 1 samples, 2 were asked for"


async def test_answer_above_the_servers_limit_is_refused_with_both_sizes(
    client: Client, services: Services
) -> None:
    """A thousand samples of a thousand tokens do not fit into one message: the client hears what
    to change, instead of nothing."""
    await services.start()
    answer = await client.ask("r", prompts=(tuple(range(1000)),), samples=1000, max_tokens=1000)
    assert isinstance(answer, GenerateFailed)
    assert not answer.retry
    assert str(client.bus.max_payload) in answer.reason
    assert "fewer samples" in answer.reason


async def test_workers_share_what_is_for_anyone(client: Client, services: Services) -> None:
    """Of 30 requests to any worker each is answered once, and both workers take some."""
    await services.start(name="a")
    await services.start(name="b")
    for number in range(30):
        await client.send(f"r{number}", worker=None)
    answers = [await client.answer(f"r{number}") for number in range(30)]
    await asyncio.sleep(0.05)
    finals = [
        message
        for messages in client.heard.values()
        for message in messages
        if isinstance(message, Generated)
    ]
    assert len(finals) == 30
    assert {answer.worker for answer in answers} == {"a", "b"}


async def test_computing_never_blocks_the_loop(client: Client, services: Services) -> None:
    """The engine computes until the loop has turned a hundred times more: on the loop's own thread
    that would never come to pass. Both requests are computed on one and the same thread."""
    turned, waited = threading.Event(), []
    generator = Reverser(lambda cancelled: waited.append(turned.wait(SOON_S)))
    await services.start(generator)
    await client.send("one")
    await client.send("two")
    await begun(generator)
    for _ in range(100):
        await asyncio.sleep(0)
    turned.set()
    assert isinstance(await client.answer("two"), Generated)
    assert waited == [True, True]
    assert len(generator.threads) == 1
    assert threading.get_ident() not in generator.threads


async def test_drain_finishes_the_running_and_hands_back_the_rest(
    client: Client, services: Services
) -> None:
    """SIGTERM while one request computes, one is queued and one waits for a version: the first is
    answered, the others go back at once, later ones are refused, and nobody else's share comes."""
    release = threading.Event()
    generator = Reverser(lambda cancelled: release.wait(SOON_S))
    service = await services.start(generator, progress_s=0.02)
    await client.send("running")
    await client.until(lambda: "computing" in client.states("running"))
    await client.send("queued")
    await client.send("waiting", min_version=9)
    await client.until(lambda: "waiting" in client.states("waiting"))
    drain = asyncio.create_task(service.drain(SOON_S))
    for name in ("queued", "waiting"):
        answer = await client.answer(name)
        assert isinstance(answer, GenerateFailed)
        assert (answer.reason, answer.retry) == ("the worker is leaving", True)
    late = await client.ask("late")
    assert isinstance(late, GenerateFailed)
    assert late.retry
    assert not drain.done()
    release.set()
    assert await drain
    assert isinstance(await client.answer("running"), Generated)
    assert len(generator.calls) == 1


async def test_drain_cancels_what_does_not_end_in_time(client: Client, services: Services) -> None:
    """A generation longer than the drain allows is cancelled and handed back."""
    generator = Reverser(until_cancelled)
    service = await services.start(generator, progress_s=0.05)
    await client.send("long")
    await begun(generator)
    began = time.monotonic()
    assert await service.drain(0.1)
    assert time.monotonic() - began < 2
    answer = await client.answer("long")
    assert isinstance(answer, GenerateFailed)
    assert (answer.reason, answer.retry) == ("the worker is leaving", True)


async def test_drain_and_close_do_not_wait_for_an_engine_that_hangs(
    client: Client, services: Services
) -> None:
    """An engine that ignores its cancellation costs a drain its deadline, and close() nothing."""
    release = threading.Event()
    generator = Reverser(lambda cancelled: release.wait(SOON_S))
    service = await services.start(generator, progress_s=0.05)
    await client.send("hung")
    await begun(generator)
    began = time.monotonic()
    assert not await service.drain(0.1)
    await service.close()
    assert time.monotonic() - began < 3
    release.set()


# nats-py's micro services ask for the time in a way that Python 3.12 deprecates.
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
async def test_worker_is_a_micro_service(
    client: Client, services: Services, connected: Any, broker: Broker
) -> None:
    """Service discovery finds the worker with its metadata; its statistics are in STATS and at its
    own endpoint; after stop() it is gone."""
    bus = await connected(broker.url)
    service = await services.start(bus=bus)
    metadata = {"run": client.subjects.run, "worker": "w", "device": "cpu", "model": "m"}
    registration = await register_service(bus, service, metadata=metadata)
    await client.ask("r", samples=2)

    async def all_of(verb: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        inbox = f"{client.subjects.prefix}.discovery.{verb}"
        subscription = await client.bus.subscribe(
            inbox, lambda m: found.append(json.loads(m.data)) if m.data else None
        )
        await client.bus.publish(f"$SRV.{verb}.sparsecast-worker", b"", reply=inbox)
        await asyncio.sleep(0.1)
        await subscription.unsubscribe()
        return [one for one in found if one["metadata"].get("run") == client.subjects.run]

    (info,) = await all_of("INFO")
    assert info["metadata"] == metadata
    assert [endpoint["name"] for endpoint in info["endpoints"]] == ["status"]
    (stats,) = await all_of("STATS")
    assert stats["endpoints"][0]["data"]["samples"] == 2
    status = await client.bus.request(client.subjects.status("w"), b"", timeout_s=SOON_S)
    told = json.loads(status)
    assert (told["requests"], told["samples"], told["tokens"]) == (1, 2, 6)
    assert told["busy_s"] > 0
    await registration.stop()
    assert await all_of("INFO") == []


async def test_answer_outlives_an_outage_of_the_bus(
    own_broker: Broker, connected: Any, run: str, tmp_path: Any
) -> None:
    """The broker dies while a request computes and comes back: the answer is sent after all."""
    port = int(own_broker.url.rpartition(":")[2])
    worker_bus, client_bus = await connected(own_broker.url), await connected(own_broker.url)
    client = Client(client_bus, run)
    await client.open()
    release = threading.Event()
    service = GenerationService(
        worker_bus,
        run=run,
        name="w",
        generator=Reverser(lambda cancelled: release.wait(SOON_S)),
        version=lambda: 1,
        wait_version=lambda version, timeout_s: asyncio.sleep(0),
    )
    await service.start()
    await worker_bus.flush(SOON_S)
    await client.send("r", timeout_s=20.0)
    await client.until(lambda: client.states("r"))
    await asyncio.to_thread(own_broker.close)
    release.set()
    await asyncio.sleep(0.1)
    second = Broker(port=port)
    await asyncio.to_thread(second.start)
    try:
        await client.until(lambda: isinstance(client.heard["r"][-1], Generated), 15)
    finally:
        await service.close()
        await asyncio.to_thread(second.close)

"""Rollouts: samples in order from whichever workers live, and a reason for what has none."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecast.messages.errors import (
    BusUnavailable,
    Closed,
    EngineError,
    GenerationFailed,
    InvalidName,
    ReplicaTorn,
    WaitTimeout,
)
from sparsecast.messages.rollouts import Generate, Sample, Span
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus, connect
from sparsecast.workers.generation import GenerationService
from sparsecast.workers.inquiries import RolloutPolicy
from sparsecast.workers.pieces import cut
from sparsecast.workers.rollouts import AsyncRollouts, Rollouts
from spawn import KILLED, Context, Processes

QUICK = RolloutPolicy(beat_s=0.05, no_worker_s=0.5, backoff_s=0.05, gather_s=0.05)
PROMPTS = [(n % 7 + 2, n % 5 + 2, 3) for n in range(16)]


class Counter:
    """A generator that answers a prompt with the tokens after its last one.

    Token 99 is one that no model has; `before` runs in every call and may raise or wait.
    """

    def __init__(self, before: Callable[[Generate], object] | None = None) -> None:
        self.before = before
        self.calls: list[Generate] = []
        self.version = 1

    def generate(self, request: Generate, *, cancelled: Callable[[], bool]) -> list[Sample]:
        self.calls.append(request)
        if self.before is not None:
            self.before(request)
        return [
            self.sample(request, index, prompt)
            for index, prompt in enumerate(request.prompts, request.first_index)
            for _ in range(request.samples)
        ]

    def sample(self, request: Generate, index: int, prompt: Any) -> Sample:
        if 99 in prompt:
            raise EngineError(f"prompt {index} has token 99")
        tokens = tuple(range(prompt[-1] + 1, prompt[-1] + 1 + request.max_tokens))
        return Sample(
            prompt=prompt,
            tokens=tokens,
            logprobs=(-1.0,) * len(tokens),
            spans=(Span(0, len(tokens), self.version),),
            worker="",
            finish="length",
        )


class Crew:
    """Workers of one run in this process, each with a connection of its own."""

    def __init__(self, connected: Any, url: str, run: str) -> None:
        self.connected, self.url, self.run = connected, url, run
        self.services: dict[str, GenerationService] = {}
        self.buses: dict[str, NatsBus] = {}

    async def add(self, name: str, generator: Any = None, **options: Any) -> Any:
        generator = Counter() if generator is None else generator
        bus = await self.connected(self.url)

        async def wait_version(version: int, timeout_s: float) -> None:
            deadline = time.monotonic() + timeout_s
            while generator.version < version:
                if time.monotonic() >= deadline:
                    raise WaitTimeout(f"version {version}", timeout_s, "it stays away")
                await asyncio.sleep(0.005)

        service = GenerationService(
            bus,
            run=self.run,
            name=name,
            generator=generator,
            version=lambda: generator.version,
            wait_version=wait_version,
            **{"progress_s": 0.05, "patience_s": 0.1} | options,
        )
        await service.start()
        await bus.flush(5.0)
        self.services[name], self.buses[name] = service, bus
        return generator


@pytest.fixture
async def crew(connected: Any, broker: Broker, run: str) -> AsyncIterator[Crew]:
    crew = Crew(connected, broker.url, run)
    yield crew
    for service in crew.services.values():
        await service.close()


@pytest.fixture
async def rollouts(bus: NatsBus, run: str) -> AsyncIterator[AsyncRollouts]:
    async with AsyncRollouts(run, bus, policy=QUICK) as rollouts:
        yield rollouts


async def meet(rollouts: AsyncRollouts, *names: str) -> None:
    """Wait until the client has heard of these workers."""
    assert rollouts._inquiries is not None
    deadline = time.monotonic() + 5.0
    while not {peer.name for peer in rollouts._inquiries.peers()} >= set(names):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def collect(samples: Any) -> list[Sample]:
    """All samples of a generate()."""
    return [sample async for sample in samples]


async def failures(samples: Any) -> tuple[list[Sample], dict[int, str]]:
    """What came before the GenerationFailed, and its reasons."""
    came: list[Sample] = []
    with pytest.raises(GenerationFailed) as caught:
        await extend(came, samples)
    return came, caught.value.failures


async def extend(came: list[Sample], samples: Any) -> None:
    """Collect into a list that outlives an error."""
    async for sample in samples:
        came.append(sample)


# ---- one machine, live workers


async def test_prompts_are_spread_and_answered_in_order(
    crew: Crew, rollouts: AsyncRollouts
) -> None:
    """Sixteen prompts, twice each, over three workers: each has its share, and the samples come in
    the order of the prompts with their places."""
    generators = [await crew.add(name) for name in ("a", "b", "c")]
    await meet(rollouts, "a", "b", "c")
    samples = await collect(rollouts.generate(PROMPTS, samples=2, max_tokens=3))
    assert [s.index for s in samples] == [n for n in range(16) for _ in range(2)]
    for sample in samples:
        prompt = PROMPTS[sample.index]
        assert sample.prompt == prompt
        assert sample.tokens == (prompt[-1] + 1, prompt[-1] + 2, prompt[-1] + 3)
    shares = sorted(sum(len(call.prompts) for call in g.calls) for g in generators)
    assert shares == [5, 5, 6]
    assert {s.worker for s in samples} == {"a", "b", "c"}


async def test_load_is_shared_between_calls(crew: Crew, rollouts: AsyncRollouts) -> None:
    """Two calls of one prompt each at the same time go to two workers, not to the same."""
    started = threading.Barrier(2, timeout=5.0)
    for name in ("a", "b"):
        await crew.add(name, Counter(lambda request: started.wait()))
    await meet(rollouts, "a", "b")
    one, two = await asyncio.gather(
        collect(rollouts.generate([(1,)])), collect(rollouts.generate([(2,)]))
    )
    assert {one[0].worker, two[0].worker} == {"a", "b"}


async def test_one_worker_by_name(crew: Crew, rollouts: AsyncRollouts) -> None:
    """A caller may ask one worker alone; one that is not there fails by name, and names those
    that are."""
    await crew.add("a")
    await crew.add("b")
    await meet(rollouts, "a", "b")
    samples = await collect(rollouts.generate(PROMPTS, worker="b"))
    assert {s.worker for s in samples} == {"b"}
    came, reasons = await failures(rollouts.generate(PROMPTS[:2], worker="z"))
    assert not came
    assert set(reasons) == {0, 1}
    assert "no worker 'z'" in reasons[0]
    assert reasons[0].endswith("a, b do")


async def test_worker_that_joins_late_is_waited_for(crew: Crew, rollouts: AsyncRollouts) -> None:
    """The call comes before the first worker does."""
    pending = asyncio.ensure_future(collect(rollouts.generate(PROMPTS)))
    await asyncio.sleep(0.2)
    await crew.add("a")
    assert len(await pending) == 16


# ---- what fails


async def test_no_worker_fails_in_time_with_the_command(
    rollouts: AsyncRollouts, bus: NatsBus, run: str
) -> None:
    """Nobody is there: after no_worker_s, long before the deadline, each prompt fails, and the
    reason names the run, the bus and the command that starts a worker."""
    began = time.monotonic()
    came, reasons = await failures(rollouts.generate(PROMPTS, timeout_s=30))
    assert 0.4 < time.monotonic() - began < 2
    assert not came
    assert set(reasons) == set(range(16))
    assert f"no worker of run {run!r} answers on bus {bus.url}" in reasons[0]
    assert f"sparsecast worker --run {run} --bus {bus.url} --name worker-0" in reasons[0]


async def test_deadline_comes_first_if_it_is_shorter(rollouts: AsyncRollouts) -> None:
    """A caller with 0.2 s does not wait 0.5 s for workers."""
    began = time.monotonic()
    _, reasons = await failures(rollouts.generate([(1,)], timeout_s=0.2))
    assert time.monotonic() - began < 1
    assert "no worker of run" in reasons[0]


async def test_one_bad_prompt_spoils_no_other(crew: Crew, rollouts: AsyncRollouts) -> None:
    """Prompt 5 of 16 has a token that no model has: it fails by its own place, all others are
    answered, and nobody tries it for ever."""
    generators = [await crew.add("a"), await crew.add("b")]
    await meet(rollouts, "a", "b")
    prompts = [*PROMPTS[:5], (1, 99), *PROMPTS[6:]]
    began = time.monotonic()
    came, reasons = await failures(rollouts.generate(prompts, timeout_s=20))
    assert time.monotonic() - began < 5
    assert [s.index for s in came] == [n for n in range(16) if n != 5]
    assert list(reasons) == [5]
    assert reasons[5] in ("a: prompt 5 has token 99", "b: prompt 5 has token 99")
    assert sum(len(g.calls) for g in generators) <= 9


async def test_worker_that_cannot_now_is_passed_over(crew: Crew, rollouts: AsyncRollouts) -> None:
    """One worker's weights are torn: its share goes to the other, and is answered."""

    def torn(request: Generate) -> None:
        raise ReplicaTorn("half an update")

    broken = await crew.add("a", Counter(torn))
    await crew.add("b")
    await meet(rollouts, "a", "b")
    samples = await collect(rollouts.generate(PROMPTS))
    assert len(samples) == 16
    assert {s.worker for s in samples} == {"b"}
    assert broken.calls


async def test_workers_that_refuse_are_named_with_their_reasons(
    crew: Crew, rollouts: AsyncRollouts
) -> None:
    """Both workers are behind: they are not asked; at the deadline the prompts fail with what each
    of them says."""
    for name, lag in (("a", 7), ("b", 9)):
        await crew.add(name, refuse=lambda lag=lag: f"{lag} versions behind")
    await meet(rollouts, "a", "b")
    _, reasons = await failures(rollouts.generate([(1,)], timeout_s=0.6))
    assert "a refuses: 7 versions behind" in reasons[0]
    assert "b refuses: 9 versions behind" in reasons[0]
    assert crew.services["a"].statistics.requests == 0


async def test_busy_worker_is_asked_again(crew: Crew, rollouts: AsyncRollouts) -> None:
    """A worker that takes one request at a time, and five calls: all are answered in the end."""
    generator = await crew.add("a", Counter(lambda r: time.sleep(0.05)), max_requests=1)
    calls = [collect(rollouts.generate([(n + 1,)], max_tokens=1)) for n in range(5)]
    answers = await asyncio.gather(*calls)
    assert [answer[0].tokens for answer in answers] == [(n + 2,) for n in range(5)]
    assert len(generator.calls) == 5


async def test_version_is_found_on_the_worker_that_has_it(
    crew: Crew, rollouts: AsyncRollouts
) -> None:
    """Worker a stays at version 1, b holds 5: with min_version 5 everything comes from b."""
    behind, ahead = await crew.add("a"), await crew.add("b")
    await meet(rollouts, "a", "b")
    ahead.version = 5
    samples = await collect(rollouts.generate(PROMPTS, min_version=5))
    assert {(s.worker, s.version) for s in samples} == {("b", 5)}
    assert not behind.calls


async def test_version_that_nobody_has_fails_with_both_versions(
    crew: Crew, rollouts: AsyncRollouts
) -> None:
    """Version 9 never comes: at the deadline the reason says what was wanted and what is here."""
    await crew.add("a")
    _, reasons = await failures(rollouts.generate([(1,)], min_version=9, timeout_s=0.5))
    assert "version 9 is wanted, 1 is here" in reasons[0]


async def test_what_is_late_fails_and_what_came_is_kept(
    crew: Crew, rollouts: AsyncRollouts
) -> None:
    """One of two workers computes past the deadline: the other's samples are delivered, and the
    rest fails, saying who had it."""
    release = threading.Event()
    await crew.add("a")
    await crew.add("b", Counter(lambda request: release.wait(5.0)))
    await meet(rollouts, "a", "b")
    began = time.monotonic()
    came, reasons = await failures(rollouts.generate(PROMPTS, timeout_s=1.0))
    release.set()
    assert 0.9 < time.monotonic() - began < 4
    assert len(came) == 8
    assert sorted([s.index for s in came] + list(reasons)) == list(range(16))
    assert all("b has it (computing)" in reason for reason in reasons.values())


async def test_slow_worker_is_not_taken_for_dead(crew: Crew, rollouts: AsyncRollouts) -> None:
    """A request that computes for ten times the allowed silence is told of all along, and is
    computed once."""
    slow = await crew.add("a", Counter(lambda request: time.sleep(1.5)))
    (sample,) = await collect(rollouts.generate([(1,)]))
    assert sample.worker == "a"
    assert len(slow.calls) == 1


async def test_worker_without_a_connection_is_noticed_by_its_silence(
    crew: Crew, rollouts: AsyncRollouts
) -> None:
    """A worker hears a request and then loses the bus for good: after three silent beats the other
    worker gets its share."""
    reached, release = threading.Event(), threading.Event()

    def hang(request: Generate) -> None:
        reached.set()
        release.wait(5.0)

    await crew.add("a", Counter(hang))
    pending = asyncio.ensure_future(collect(rollouts.generate(PROMPTS)))
    assert await asyncio.to_thread(reached.wait, 5.0)
    await crew.add("b")
    await crew.buses["a"].close()
    samples = await asyncio.wait_for(pending, 5.0)
    release.set()
    assert {s.worker for s in samples} == {"b"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": "one"}, EngineError, "give a list of one"),
        ({"prompts": []}, EngineError, "there are no prompts"),
        ({"samples": 0}, EngineError, "samples is at least 1"),
        ({"temperature": -1.0}, EngineError, "temperature is at least 0"),
        ({"timeout_s": 0.0}, EngineError, "timeout_s is above 0"),
        ({"seed": 2**64}, EngineError, "a seed has 64 bits"),
        ({"worker": "no.such"}, InvalidName, "worker 'no.such' cannot be used"),
    ],
)
async def test_senseless_arguments_are_refused_at_once(
    rollouts: AsyncRollouts, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The call itself raises, before anything is sent."""
    with pytest.raises(error, match=message):
        rollouts.generate(**{"prompts": [(1,)]} | arguments)


async def test_request_too_large_for_one_message_is_cut(
    connected: Any, tmp_path: Path, run: str
) -> None:
    """A server that takes 64 KiB, and answers of three times that: the prompts go in more pieces,
    and a single one that does not fit fails with the sizes."""
    with Broker(max_payload=65536) as url:
        crew = Crew(connected, url, run)
        generator = await crew.add("a")
        async with AsyncRollouts(run, url, policy=QUICK) as rollouts:
            samples = await collect(rollouts.generate(PROMPTS * 10, max_tokens=100))
            assert [s.index for s in samples] == list(range(160))
            assert len(generator.calls) > 1
            _, reasons = await failures(rollouts.generate([(1,)], samples=500, max_tokens=100))
            assert "the bus takes 65536" in reasons[0]
            _, reasons = await failures(rollouts.generate(["x" * 70000]))
            assert "70" in reasons[0]
            assert "65536" in reasons[0]
        await crew.services["a"].close()
        await crew.buses["a"].close()


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    samples=st.integers(1, 4),
    max_tokens=st.integers(1, 20),
    count=st.integers(1, 8),
    limit=st.integers(1, 20_000),
)
def test_cut_is_whole_even_and_bounded(
    lengths: list[int], samples: int, max_tokens: int, count: int, limit: int
) -> None:
    """Pieces cover the prompts once, in order; with room for all there are as many as workers, of
    sizes that differ by one; and none but a single prompt exceeds the limit."""
    request = Generate(
        request="",
        prompts=tuple((1,) * length for length in lengths),
        samples=samples,
        max_tokens=max_tokens,
    )
    pieces = cut(request, count, limit)
    assert [index for piece in pieces for index in piece] == list(range(len(lengths)))
    for piece in pieces:
        nbytes = sum(samples * (160 + 5 * lengths[i] + 24 * max_tokens) for i in piece)
        assert len(piece) == 1 or nbytes <= limit
    sizes = [len(piece) for piece in cut(request, count, 10**9)]
    assert len(sizes) == min(count, len(lengths))
    assert max(sizes) - min(sizes) <= 1


# ---- the synchronous face


class Background:
    """A crew on an event loop of its own, for tests of synchronous code."""

    def __init__(self, url: str, run: str) -> None:
        self.url, self.run = url, run
        self.started, self.stop = threading.Event(), threading.Event()
        self.generator = Counter()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.main()))
        self.thread.start()
        assert self.started.wait(10.0)

    async def main(self) -> None:
        bus = await connect(self.url, name="background")
        crew = Crew(lambda url: asyncio.sleep(0, bus), self.url, self.run)
        await crew.add("a", self.generator)
        self.started.set()
        await asyncio.to_thread(self.stop.wait, 60.0)
        await crew.services["a"].close()
        await bus.close()


@pytest.fixture
def background(broker: Broker, run: str) -> Iterator[Background]:
    background = Background(broker.url, run)
    yield background
    background.stop.set()
    background.thread.join(10.0)


def test_synchronous_code_gets_samples_in_a_plain_loop(
    background: Background, broker: Broker
) -> None:
    """No event loop in sight: samples come in order, several threads may ask at once."""
    with Rollouts(background.run, broker.url, policy=QUICK) as rollouts:
        assert [s.index for s in rollouts.generate(PROMPTS)] == list(range(16))
        results: list[int] = []

        def ask() -> None:
            results.append(len(list(rollouts.generate(PROMPTS, samples=2))))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10.0)
        assert results == [32, 32, 32]


def test_leaving_a_loop_early_leaves_nothing_behind(background: Background, broker: Broker) -> None:
    """A caller breaks off after two samples, and asks again."""
    with Rollouts(background.run, broker.url, policy=QUICK) as rollouts:
        for number, _ in enumerate(rollouts.generate(PROMPTS)):
            if number == 1:
                break
        assert len(list(rollouts.generate(PROMPTS))) == 16
    assert not [t for t in threading.enumerate() if t.name.startswith("sparsecast-rollouts")]


def test_closing_ends_a_wait_at_once(background: Background, broker: Broker) -> None:
    """close() while another thread waits for samples: that one gets Closed, soon; so does a later
    call."""
    release = threading.Event()
    background.generator.before = lambda request: release.wait(10.0)
    rollouts = Rollouts(background.run, broker.url, policy=QUICK)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            list(rollouts.generate(PROMPTS, timeout_s=20))
        except Closed as exc:
            errors.append(exc)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    rollouts.close()
    thread.join(10.0)
    release.set()
    assert time.monotonic() - began < 3
    assert len(errors) == 1
    with pytest.raises(Closed):
        list(rollouts.generate(PROMPTS))
    rollouts.close()


def test_errors_reach_synchronous_code(broker: Broker, run: str) -> None:
    """GenerationFailed by prompt, EngineError for nonsense, BusUnavailable for a bus that is not
    there."""
    with Rollouts(run, broker.url, policy=QUICK) as rollouts:
        with pytest.raises(GenerationFailed, match=r"2 prompt\(s\) were not answered; prompt 0"):
            list(rollouts.generate([(1,), (2,)]))
        with pytest.raises(EngineError, match="samples is at least 1"):
            list(rollouts.generate([(1,)], samples=0))
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match=r"127\.0\.0\.1:9"):
        Rollouts(run, "nats://127.0.0.1:9", policy=RolloutPolicy(connect_s=0.5))
    assert time.monotonic() - began < 5


# ---- real processes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny random Qwen2 on disk."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


class Stepwise:
    """A generator in steps, as an engine's tokens are: says when it is at its third of the first
    request, and from there on goes slowly."""

    def __init__(self, inner: Any, context: Context, slow_s: float) -> None:
        self.inner, self.context, self.slow_s = inner, context, slow_s

    def generate(self, request: Generate, *, cancelled: Callable[[], bool]) -> list[Sample]:
        asked = [0]
        slow = request.seed is None

        def watched() -> bool:
            asked[0] += 1
            if asked[0] == 4 and slow:
                self.context.mark("computing")
            if asked[0] >= 4 and slow:
                time.sleep(self.slow_s)
            return cancelled()

        if isinstance(self.inner, Counter):
            for _ in range(request.max_tokens):
                watched()
        samples: list[Sample] = self.inner.generate(request, cancelled=watched)
        return samples


async def serve_until_told(
    context: Context, directory: str, run: str, slow_s: list[float]
) -> dict[str, int]:
    """A worker process: a service around the real engine (or a Counter), until the parent says
    "enough"."""
    inner: Any = Counter()
    version = 1
    if directory:
        from sparsecast.workers.huggingface import HuggingFaceEngine

        inner = HuggingFaceEngine.load(directory, dtype=torch.float32)
        with inner.guard().writing(1.0) as writer:
            writer.commit(version)
    bus = await connect(context.broker_url, name=f"worker-{context.rank}")
    service = GenerationService(
        bus,
        run=run,
        name=f"worker-{context.rank}",
        generator=Stepwise(inner, context, slow_s[context.rank]),
        version=lambda: version,
        wait_version=lambda version, timeout_s: asyncio.sleep(0),
    )
    await service.start()
    await bus.flush(5.0)
    context.mark("serving")
    await context.waiting("enough", rank=-1, timeout_s=60.0)
    await service.close()
    await bus.close()
    return {"samples": service.statistics.samples}


def sound(samples: list[Sample], directory: Path) -> None:
    """Logprobs are those of a fresh forward of the model."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for sample in samples[::5]:
        text = torch.tensor([[*sample.prompt, *sample.tokens]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=text).logits[0], dim=-1)
        first = len(sample.prompt)
        expected = [logprobs[first + i - 1, t].item() for i, t in enumerate(sample.tokens)]
        assert list(sample.logprobs) == pytest.approx(expected, abs=1e-4)


async def test_worker_is_killed_in_mid_request(broker: Broker, run: str, model: Path) -> None:
    """Two workers with a language model share the prompts; in a second request worker-0 has drawn
    three tokens of its share when it is killed: the other answers those prompts too, well before
    the deadline, nothing is missing or twice there; and with a seed it draws alone what both drew
    together."""
    seeded = {"samples": 2, "max_tokens": 8, "seed": 5, "timeout_s": 20.0}
    with Processes(
        2, serve_until_told, str(model), run, [30.0, 0.0], timeout_s=60, broker_url=broker.url
    ) as processes:
        await asyncio.to_thread(processes.wait, "serving")
        async with AsyncRollouts(run, broker.url) as rollouts:
            await meet(rollouts, "worker-0", "worker-1")
            both = await collect(rollouts.generate(PROMPTS, **seeded))
            assert {s.worker for s in both} == {"worker-0", "worker-1"}
            sound(both, model)
            pending = asyncio.ensure_future(
                collect(rollouts.generate(PROMPTS, samples=2, max_tokens=10, timeout_s=25.0))
            )
            await asyncio.to_thread(processes.wait, "computing", rank=0)
            struck = time.monotonic()
            await asyncio.to_thread(processes.kill, 0)
            samples = await pending
            assert time.monotonic() - struck < 8
            alone = await collect(rollouts.generate(PROMPTS, **seeded))
        assert [s.index for s in samples] == [n for n in range(16) for _ in range(2)]
        assert {s.worker for s in samples + alone} == {"worker-1"}
        assert {s.finish for s in samples} == {"length"}
        sound(samples, model)
        assert [s.tokens for s in alone] == [s.tokens for s in both]
        processes.mark("enough")
        results = await asyncio.to_thread(processes.results)
    assert results == [KILLED, {"samples": 16 + 32 + 32}]


async def test_worker_freezes_in_mid_request(broker: Broker, run: str) -> None:
    """worker-0 is stopped while it computes, its connection stands: its silence gives it away, and
    the other answers."""
    with Processes(
        2, serve_until_told, "", run, [0.2, 0.0], timeout_s=60, broker_url=broker.url
    ) as processes:
        await asyncio.to_thread(processes.wait, "serving")
        async with AsyncRollouts(run, broker.url) as rollouts:
            await meet(rollouts, "worker-0", "worker-1")
            pending = asyncio.ensure_future(
                collect(rollouts.generate(PROMPTS, max_tokens=50, timeout_s=25.0))
            )
            await asyncio.to_thread(processes.wait, "computing", rank=0)
            struck = time.monotonic()
            processes.stop(0)
            samples = await pending
            assert 1.0 < time.monotonic() - struck < 8
        assert [s.index for s in samples] == list(range(16))
        assert {s.worker for s in samples} == {"worker-1"}
        await asyncio.to_thread(processes.kill, 0)
        processes.mark("enough")
        await asyncio.to_thread(processes.results)


async def test_frozen_worker_that_thaws_still_counts(broker: Broker, run: str) -> None:
    """The only worker is stopped in mid-request for longer than the allowed silence, and goes on:
    its late answer is taken."""
    with Processes(
        1, serve_until_told, "", run, [0.01], timeout_s=60, broker_url=broker.url
    ) as processes:
        await asyncio.to_thread(processes.wait, "serving")
        policy = RolloutPolicy(beat_s=0.1, no_worker_s=20.0)
        async with AsyncRollouts(run, broker.url, policy=policy) as rollouts:
            pending = asyncio.ensure_future(
                collect(rollouts.generate(PROMPTS, max_tokens=50, timeout_s=25.0))
            )
            await asyncio.to_thread(processes.wait, "computing", rank=0)
            processes.stop(0)
            await asyncio.sleep(1.2)
            assert not pending.done()
            processes.resume(0)
            samples = await pending
        assert [s.index for s in samples] == list(range(16))
        processes.mark("enough")
        (result,) = await asyncio.to_thread(processes.results)
    assert result["samples"] <= 32

"""Generation over the bus: one worker's endpoint, from the request to the answer.

Requests are taken on the event loop and computed on one thread, one after the other. Whatever
happens to a request, it is answered; while it waits or is computed the client hears so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ..messages import codec
from ..messages.control import Role, Tags
from ..messages.errors import (
    BusError,
    BusUnavailable,
    EngineError,
    RemoteProtocolError,
    SparsecastError,
)
from ..messages.rollouts import (
    Generate,
    Generated,
    GenerateFailed,
    Generating,
    Offer,
    RolloutMessage,
    Sample,
    Seek,
)
from ..messages.subjects import Subjects, check_token
from ..pipeline.bus.base import Bus, Message, Subscription
from .engine import Generator
from .lane import Lane

log = logging.getLogger("sparsecast.generation")


@dataclass(slots=True)
class Statistics:
    """What a worker has generated since its start."""

    requests: int = 0
    failures: int = 0
    samples: int = 0
    tokens: int = 0
    #: Seconds in which the generation thread computed.
    busy_s: float = 0.0
    last_error: str = ""


class GenerationService:
    """Answers Generate on the bus: by the worker's name, and in turn with the others of the run.

    `version()` is what the weights hold, `wait_version(version, timeout_s)` returns once they hold
    that or newer (else WaitTimeout), `refuse()` is why this worker must not generate now, or None,
    `origin(version)` is the trainer's step and tags of a version, for the samples. At most
    `max_requests` are taken at a time. Who is there for `role` "evaluation" answers by its name
    only. A request for a newer version waits `patience_s` here, then
    goes back to the client, who may find a worker that has it. For one event loop.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        run: str,
        name: str,
        generator: Generator,
        version: Callable[[], int | None],
        wait_version: Callable[[int, float], Awaitable[object]],
        refuse: Callable[[], str | None] = lambda: None,
        origin: Callable[[int], tuple[int | None, Tags | None]] = lambda version: (None, None),
        role: Role = "rollout",
        max_requests: int = 64,
        progress_s: float = 0.5,
        patience_s: float = 2.0,
    ) -> None:
        self.run = run
        self.name = check_token("worker", name)
        self.statistics = Statistics()
        self._bus = bus
        self._subjects = Subjects(run)
        self._generator = generator
        self._version = version
        self._wait_version = wait_version
        self._refuse = refuse
        self._origin = origin
        self._role: Role = role
        self._max_requests = max_requests
        self._progress_s = progress_s
        self._patience_s = patience_s
        self._subscriptions: dict[str, Subscription] = {}
        self._jobs: set[_Job] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._lane = Lane(f"sparsecast-generate-{name}")
        self._draining = False

    # ---- life

    async def start(self) -> None:
        """Subscribe and begin to answer."""
        subjects = self._subjects
        wanted = [
            (subjects.generate(self.name), self._on_request, ""),
            (subjects.offers, self._on_seek, ""),
        ]
        if self._role == "rollout":
            wanted.append((subjects.generate_any, self._on_request, "workers"))
        for subject, handler, group in wanted:
            self._subscriptions[subject] = await self._bus.subscribe(subject, handler, queue=group)

    async def drain(self, timeout_s: float) -> bool:
        """Take no more, hand back what was not begun, let the running request finish.

        Returns whether it did within `timeout_s`; if not, it was cancelled and handed back.
        """
        self._draining = True
        anyone = self._subscriptions.pop(self._subjects.generate_any, None)
        if anyone is not None:
            await anyone.unsubscribe()
        waiting = [job for job in self._jobs if job.state != "computing"]
        for job in waiting:
            job.give_up("the worker is leaving")
        running = [job.task for job in self._jobs if job.task is not None]
        if not running:
            return True
        _, late = await asyncio.wait(running, timeout=timeout_s)
        for job in self._jobs:
            job.give_up("the worker is leaving")
        if late:
            _, late = await asyncio.wait(late, timeout=2 * self._progress_s)
        with contextlib.suppress(BusError):
            await self._bus.flush(self._progress_s)
        return not late

    async def close(self) -> None:
        """End at once; requests still there go unanswered. Idempotent."""
        self._draining = True
        for subscription in list(self._subscriptions.values()):
            with contextlib.suppress(BusError):
                await subscription.unsubscribe()
        self._subscriptions.clear()
        for job in self._jobs:
            job.cancelled = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._lane.stop()

    # ---- what comes

    def _on_seek(self, message: Message) -> None:
        if not message.reply:
            return
        try:
            seek = codec.decode_rollout(message.data, subject=message.subject)
        except RemoteProtocolError as exc:
            log.warning("ignored: %s", exc)
            return
        if isinstance(seek, Seek):
            offer = Offer(
                worker=self.name,
                version=self._version(),
                requests=len(self._jobs),
                refusal=self._refusal(),
                role=self._role,
            )
            self._spawn(self._send(message.reply, codec.encode(offer), self._progress_s))

    def _on_request(self, message: Message) -> None:
        self.statistics.requests += 1
        request: RolloutMessage | None = None
        fault: tuple[str, bool] | None = None
        try:
            request = codec.decode_rollout(message.data, subject=message.subject)
        except RemoteProtocolError as exc:
            fault = str(exc), False
        if isinstance(request, Generate):
            fault = self._fault(request)
        elif request is not None:
            fault = f"a {type(request).__name__} is no request", False
        if isinstance(request, Generate) and fault is None and message.reply:
            job = _Job(request, message.reply)
            self._jobs.add(job)
            job.task = self._spawn(self._serve(job))
            return
        reason, retry = fault or ("the request has no reply subject", False)
        self._count_failure(reason)
        if message.reply:
            name = request.request if isinstance(request, Generate) else ""
            answer = self._failed(name, reason, retry=retry)
            self._spawn(self._send(message.reply, answer, self._patience_s))
        else:
            log.warning("not answered, nobody waits for it: %s", reason)

    def _fault(self, request: Generate) -> tuple[str, bool] | None:
        """Why a request is not taken, and whether another worker may; None if it is taken."""
        unfit = unfit_reason(request)
        if unfit is not None:
            return unfit, False
        refusal = self._refusal()
        if refusal is not None:
            return refusal, True
        if len(self._jobs) >= self._max_requests:
            return f"busy with {len(self._jobs)} requests", True
        return None

    def _refusal(self) -> str | None:
        return "the worker is leaving" if self._draining else self._refuse()

    # ---- one request

    async def _serve(self, job: _Job) -> None:
        progress = self._spawn(self._tell(job))
        try:
            answer = await self._answer(job)
        finally:
            progress.cancel()
            self._jobs.discard(job)
        await self._send(job.reply, answer, max(job.remaining_s(), self._patience_s))

    async def _tell(self, job: _Job) -> None:
        while True:
            message = Generating(request=job.request.request, worker=self.name, state=job.state)
            with contextlib.suppress(BusError):
                await self._bus.publish(job.reply, codec.encode(message))
            await asyncio.sleep(self._progress_s)

    async def _answer(self, job: _Job) -> bytes:
        try:
            await job.unless_given_up(self._wait_for_version(job))
            await job.unless_given_up(self._wait_for_turn(job))
        except _GivenUp as exc:
            self._count_failure(exc.reason)
            return self._failed(job.request.request, exc.reason, retry=True)
        try:
            job.state = "computing"
            return await self._lane.run(lambda: self._compute(job))
        finally:
            self._turn.release()

    async def _wait_for_version(self, job: _Job) -> None:
        wanted, held = job.request.min_version, self._version()
        if wanted is None or (held is not None and held >= wanted):
            return
        job.state = "waiting"
        try:
            await self._wait_version(wanted, min(self._patience_s, job.remaining_s()))
        except SparsecastError as exc:
            raise _GivenUp(f"version {wanted} is wanted, {self._version()} is here: {exc}") from exc
        job.state = "queued"

    async def _wait_for_turn(self, job: _Job) -> None:
        try:
            async with asyncio.timeout(job.remaining_s()):
                await self._turn.acquire()
        except TimeoutError:
            raise _GivenUp(
                f"{len(self._jobs) - 1} other request(s) kept the worker busy until the deadline"
            ) from None

    # ---- on the generation thread

    def _compute(self, job: _Job) -> bytes:
        began = time.monotonic()
        name = job.request.request
        try:
            samples = self._generator.generate(job.request, cancelled=job.is_over)
        except Exception as exc:
            if not isinstance(exc, SparsecastError):
                log.exception("generation failed")
            reason = (
                str(exc) if isinstance(exc, SparsecastError) else f"{type(exc).__name__}: {exc}"
            )
            # EngineError is about the request: another worker would say the same.
            return self._failed_here(name, reason, retry=not isinstance(exc, EngineError))
        finally:
            elapsed_s = time.monotonic() - began
            self.statistics.busy_s += elapsed_s
        if job.is_over() and any(sample.finish == "aborted" for sample in samples):
            reason = job.given_up or f"not finished within {job.request.timeout_s:g} s"
            return self._failed_here(name, reason, retry=True)
        wanted = len(job.request.prompts) * job.request.samples
        if len(samples) != wanted:
            reason = f"the engine gave {len(samples)} samples, {wanted} were asked for"
            return self._failed_here(name, reason, retry=False)
        answer = codec.encode(
            Generated(
                request=name,
                worker=self.name,
                version=max(sample.version for sample in samples),
                samples=tuple(self._signed(job, i, sample) for i, sample in enumerate(samples)),
                generate_us=round(elapsed_s * 1e6),
            )
        )
        if len(answer) > self._bus.max_payload:
            return self._failed_here(
                name,
                f"the answer has {len(answer)} bytes, the bus takes {self._bus.max_payload}: "
                "ask for fewer samples or tokens at once, or raise the server's max_payload",
                retry=False,
            )
        self.statistics.samples += len(samples)
        self.statistics.tokens += sum(len(sample.tokens) for sample in samples)
        return answer

    def _signed(self, job: _Job, place: int, sample: Sample) -> Sample:
        step, tags = self._origin(sample.version)
        index = job.request.first_index + place // job.request.samples
        return msgspec.structs.replace(sample, worker=self.name, step=step, tags=tags, index=index)

    def _failed_here(self, request: str, reason: str, *, retry: bool) -> bytes:
        self._count_failure(reason)
        return self._failed(request, reason, retry=retry)

    # ---- what goes

    def _failed(self, request: str, reason: str, *, retry: bool) -> bytes:
        return codec.encode(
            GenerateFailed(request=request, worker=self.name, reason=reason, retry=retry)
        )

    def _count_failure(self, reason: str) -> None:
        self.statistics.failures += 1
        self.statistics.last_error = reason

    async def _send(self, reply: str, data: bytes, timeout_s: float) -> None:
        """Publish an answer, again while the bus is away, until nobody can wait for it any more."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                await self._bus.publish(reply, data)
                return
            except BusUnavailable as exc:
                if time.monotonic() >= deadline:
                    log.warning("an answer was lost: %s", exc)
                    return
                await asyncio.sleep(0.1)
            except BusError as exc:
                log.warning("an answer was not sent: %s", exc)
                return

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def unfit_reason(request: Generate) -> str | None:
    """What no engine can do about a request, or None."""
    if not request.prompts:
        return "there are no prompts"
    for value, name in ((request.samples, "samples"), (request.max_tokens, "max_tokens")):
        if value < 1:
            return f"{name} is at least 1, not {value}"
    if not 0 <= request.temperature < math.inf:
        return f"temperature is at least 0 and finite, not {request.temperature}"
    if not 0 < request.top_p <= 1:
        return f"top_p is above 0 and at most 1, not {request.top_p}"
    if not 0 < request.timeout_s < math.inf:
        return f"timeout_s is above 0 and finite, not {request.timeout_s}"
    if request.first_index < 0:
        return f"first_index is at least 0, not {request.first_index}"
    return None


class _GivenUp(Exception):
    """A request goes back to its client before it was computed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Job:
    """One request that was taken, until it is answered."""

    def __init__(self, request: Generate, reply: str) -> None:
        self.request = request
        self.reply = reply
        self.state: Literal["queued", "waiting", "computing"] = "queued"
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False
        self.given_up: str | None = None
        self._deadline = time.monotonic() + request.timeout_s
        self._gave_up = asyncio.Event()

    def remaining_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def is_over(self) -> bool:
        """Whether nobody waits for it any more. Any thread."""
        return self.cancelled or time.monotonic() >= self._deadline

    def give_up(self, reason: str) -> None:
        """Let whatever waits or computes for it end soon, for this reason."""
        self.given_up = reason
        self.cancelled = True
        self._gave_up.set()

    async def unless_given_up(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine to its end, or cancel it and raise _GivenUp."""
        work = asyncio.ensure_future(coroutine)
        gave_up = asyncio.ensure_future(self._gave_up.wait())
        try:
            await asyncio.wait({work, gave_up}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                return
            raise _GivenUp(self.given_up or "")
        finally:
            gave_up.cancel()
            work.cancel()

"""The samples' side of the loop: prompts spread over the workers of a run, samples in order.

A piece of the prompts goes to one worker; if that one dies, refuses or is late, to another. What
no worker has answered by the deadline fails by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import time
import uuid
from collections.abc import AsyncGenerator, Generator, Sequence
from concurrent.futures import Future
from typing import Self

from ..messages.control import Role
from ..messages.errors import Closed, EngineError, GenerationFailed, WaitTimeout
from ..messages.rollouts import Generate, Sample
from ..messages.subjects import check_token
from ..pipeline.bus.base import Bus
from ..pipeline.bus.nats import connect
from .connect import LoopThread
from .generation import unfit_reason
from .inquiries import Inquiries, RolloutPolicy
from .pieces import Order, Piece, cut
from .settings import find_bus

Prompts = Sequence[str | Sequence[int]]


class AsyncRollouts:
    """Samples from the workers of a run, for code on an event loop.

    `bus` is a URL, None (the live broker of this user) or a Bus that stays the caller's.
    `async with` connects (BusUnavailable) and begins to look for workers. `role`: which of them are
    asked; one that evaluates serves the version that it follows.
    """

    def __init__(
        self,
        run: str,
        bus: str | Bus | None = None,
        *,
        role: Role = "rollout",
        policy: RolloutPolicy | None = None,
    ) -> None:
        self.run = check_token("run", run)
        self.role: Role = role
        self._given = bus
        self._policy = policy or RolloutPolicy()
        self._bus: Bus | None = None
        self._inquiries: Inquiries | None = None

    async def __aenter__(self) -> Self:
        if self._bus is not None:
            raise Closed("a Rollouts is entered once")
        client = uuid.uuid4().hex[:16]
        if isinstance(self._given, str | None):
            url = find_bus(self._given).url
            self._bus = await connect(
                url, name=f"rollouts-{client}", timeout_s=self._policy.connect_s
            )
        else:
            self._bus = self._given
        self._inquiries = Inquiries(self._bus, self.run, client, self._policy, self.role)
        try:
            await self._inquiries.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End; prompts that are not answered yet fail. Idempotent."""
        inquiries, self._inquiries = self._inquiries, None
        if inquiries is not None:
            await inquiries.close()
            if self._bus is not None and self._bus is not self._given:
                await self._bus.close()

    def generate(
        self,
        prompts: Prompts,
        *,
        min_version: int | None = None,
        samples: int = 1,
        max_tokens: int = 32,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_tokens: Sequence[int] | None = None,
        seed: int | None = None,
        timeout_s: float = 30.0,
        worker: str | None = None,
    ) -> AsyncGenerator[Sample, None]:
        """Answer each prompt (text or token ids) `samples` times, in the order of the prompts.

        `Sample.index` is the place of its prompt. `min_version`: only weights of that version or
        newer. Completions end at the model's end of sequence, at `stop_tokens` besides, or after
        `max_tokens`. Temperature 0 is greedy. With a `seed` the same weights give the same samples,
        however many workers there are. `worker` asks that one alone.

        Samples come as soon as all before them have come. GenerationFailed, after the last sample
        that could be had, names each prompt that was not answered within `timeout_s` from this
        call, or that no worker can answer. EngineError for arguments that make no sense.
        """
        request = _request(
            prompts, min_version, samples, max_tokens, temperature, top_p, stop_tokens, seed,
            timeout_s,
        )  # fmt: skip
        if worker is not None:
            check_token("worker", worker)
        return self._generate(request, worker, asyncio.get_running_loop().time())

    async def _generate(
        self, request: Generate, worker: str | None, began: float
    ) -> AsyncGenerator[Sample, None]:
        loop = asyncio.get_running_loop()
        inquiries = self._inquiries
        if inquiries is None or self._bus is None:
            raise Closed("this Rollouts is not open")
        deadline = began + request.timeout_s
        await inquiries.gather(min(deadline - loop.time(), self._policy.no_worker_s))
        able = [peer for peer in inquiries.peers() if peer.offer.refusal is None]
        count = 1 if worker is not None else max(1, len(able))
        order = Order(inquiries, request, worker, began, deadline)
        pieces = [
            asyncio.ensure_future(Piece(order, span).answered())
            for span in cut(request, count, int(self._bus.max_payload * 0.8))
        ]
        failures: dict[int, str] = {}
        try:
            for piece in pieces:
                samples, failed = await piece
                failures |= failed
                for sample in samples:
                    yield sample
        finally:
            for piece in pieces:
                piece.cancel()
            await asyncio.gather(*pieces, return_exceptions=True)
        if failures:
            raise GenerationFailed(failures)


def _request(
    prompts: Prompts,
    min_version: int | None,
    samples: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    stop_tokens: Sequence[int] | None,
    seed: int | None,
    timeout_s: float,
) -> Generate:
    if isinstance(prompts, str):
        raise EngineError("prompts is a list; for one prompt give a list of one")
    request = Generate(
        request="",
        prompts=tuple(p if isinstance(p, str) else tuple(int(t) for t in p) for p in prompts),
        samples=samples,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_tokens=None if stop_tokens is None else tuple(int(t) for t in stop_tokens),
        min_version=min_version,
        timeout_s=timeout_s,
        seed=seed,
    )
    reason = unfit_reason(request)
    if reason is not None:
        raise EngineError(reason)
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise EngineError(f"a seed has 64 bits: {seed} is too large")
    return request


class Rollouts:
    """Samples from the workers of a run, for synchronous code; see AsyncRollouts.

    Connects at once (BusUnavailable), on a thread of its own; several threads may use it.
    """

    def __init__(
        self,
        run: str,
        bus: str | None = None,
        *,
        role: Role = "rollout",
        policy: RolloutPolicy | None = None,
    ) -> None:
        self.run = run
        self._core = AsyncRollouts(run, bus, role=role, policy=policy)
        self._pumps: set[Future[None]] = set()
        self._thread = LoopThread(f"sparsecast-rollouts-{run}")
        try:
            self._thread.call(self._core.__aenter__())
        except BaseException:
            self._thread.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End; an iterator that still waits raises Closed. Idempotent."""
        for pump in list(self._pumps):
            pump.cancel()
        with contextlib.suppress(Closed):
            self._thread.call(self._core.close())
        self._thread.stop()

    def generate(
        self,
        prompts: Prompts,
        *,
        min_version: int | None = None,
        samples: int = 1,
        max_tokens: int = 32,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_tokens: Sequence[int] | None = None,
        seed: int | None = None,
        timeout_s: float = 30.0,
        worker: str | None = None,
    ) -> Generator[Sample, None, None]:
        """AsyncRollouts.generate() for a plain loop: the workers begin with this call."""
        found: queue.SimpleQueue[Sample | BaseException | None] = queue.SimpleQueue()

        async def pump() -> None:
            end: BaseException | None = None
            try:
                samples_ = self._core.generate(
                    prompts, min_version=min_version, samples=samples, max_tokens=max_tokens,
                    temperature=temperature, top_p=top_p, stop_tokens=stop_tokens, seed=seed,
                    timeout_s=timeout_s, worker=worker,
                )  # fmt: skip
                async with contextlib.aclosing(samples_):
                    async for sample in samples_:
                        found.put(sample)
            except asyncio.CancelledError:
                end = Closed("this Rollouts was closed")
                raise
            except Exception as exc:
                end = exc
            finally:
                found.put(end)

        future = self._thread.submit(pump())
        self._pumps.add(future)
        future.add_done_callback(self._pumps.discard)
        return self._take(found, future, timeout_s)

    def _take(
        self,
        found: queue.SimpleQueue[Sample | BaseException | None],
        future: Future[None],
        timeout_s: float,
    ) -> Generator[Sample, None, None]:
        # The loop's side keeps the deadline; this one is for a loop that hangs or was stopped.
        deadline = time.monotonic() + timeout_s + 5.0
        try:
            while True:
                try:
                    item = found.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    raise WaitTimeout(
                        "samples", timeout_s, "the event loop of this Rollouts does not answer"
                    ) from None
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()

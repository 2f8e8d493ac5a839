"""The worker service: a language model that follows a run and answers generation requests.

One process, three threads of work beside the event loop: generation, the replica's apply and
digest lane, and the window's own. It says on stderr where it stands, and drains on SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..messages.control import Role, WindowKind
from ..pipeline.core.policy import Policy
from .bar import Bar
from .generation import GenerationService
from .huggingface import HuggingFaceEngine
from .micro import register_service
from .replica import Replica
from .tiers import DEFAULT_LOG

log = logging.getLogger("sparsecast.service")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What `sparsecast worker` is told."""

    run: str
    bus: str
    name: str
    #: A local directory with a Hugging Face causal LM, or a name that its hub's loader knows.
    model: str
    #: "cpu", or "cuda:0".
    device: str = "cpu"
    #: The one kind of window to offer, or "auto" for all that work here.
    window: str = "auto"
    #: The tiers of the run's log, as the trainer has them.
    log: str = DEFAULT_LOG
    #: Whether updates wait for it, and which versions it follows: see Replica.
    role: Role = "rollout"
    follow: str = "latest"
    #: Refuse to generate when further behind, or when the trainer is unheard for longer.
    max_lag: int | None = None
    offline_s: float | None = None
    #: Torch threads on a CPU. Two workers that share cores and use more than one each made
    #: generation nine times slower.
    threads: int = 1
    #: How long a drain lets running requests finish.
    drain_s: float = 10.0
    policy: Policy = field(default_factory=Policy)


async def serve(options: WorkerOptions) -> int:
    """Run a worker until SIGTERM or SIGINT; the exit status.

    NameInUse, ReplicaRefused, BusUnavailable and EngineError pass through to the caller.
    """
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    else:
        # Windows order what they receive behind this thread's current stream; the engine computes
        # on another thread, and on the default stream.
        torch.cuda.set_stream(torch.cuda.Stream(options.device))  # type: ignore[no-untyped-call]
    began = time.monotonic()
    _say(f"loading {options.model} on {options.device}")
    engine = await asyncio.to_thread(HuggingFaceEngine.load, options.model, device=options.device)
    _say(f"model loaded, {time.monotonic() - began:.1f} s")
    windows: tuple[WindowKind, ...] | None = None
    if options.window != "auto":
        windows = _kinds(options.window)
    replica = Replica(
        engine,
        run=options.run,
        bus=options.bus,
        name=options.name,
        device=options.device,
        windows=windows,
        role=options.role,
        follow=options.follow,
        max_lag=options.max_lag,
        offline_s=options.offline_s,
        log=options.log,
        policy=options.policy,
    )
    with _stop_signals() as stop:
        async with replica:
            bus = replica.ports.bus
            generation = GenerationService(
                bus,
                run=options.run,
                name=options.name,
                generator=engine,
                version=lambda: replica.version,
                wait_version=replica.wait_version,
                refuse=replica.refusal,
                origin=replica.origin,
                role=options.role,
            )
            try:
                await _answer(replica, generation, stop, options)
            finally:
                await generation.close()
    _say(f"left at version {replica.version}, {replica.mismatches} mismatches")
    return 0


async def _answer(
    replica: Replica, generation: GenerationService, stop: asyncio.Event, options: WorkerOptions
) -> None:
    """Answer requests until `stop` is set, then drain; raise what ends the replica before."""
    await generation.start()
    service = await register_service(
        replica.ports.bus,
        generation,
        metadata={
            "run": options.run,
            "worker": options.name,
            "role": options.role,
            "device": options.device,
            "model": options.model,
        },
    )
    bar = Bar(_say)
    narrator = asyncio.create_task(_narrate(replica, bar))
    failure = asyncio.create_task(replica.failed())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({failure, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            raise failure.result()
        _say("draining")
        await generation.drain(options.drain_s)
    finally:
        for task in (narrator, failure, stopped):
            task.cancel()
        await asyncio.gather(narrator, failure, stopped, return_exceptions=True)
        bar.clear()
        await service.stop()


def _kinds(window: str) -> tuple[WindowKind, ...]:
    known: tuple[WindowKind, ...] = ("nccl", "gloo", "bus")
    return tuple(kind for kind in known if kind == window)


async def _narrate(replica: Replica, bar: Bar) -> None:
    """Say where the replica stands: each new state once, and a waiting one every 5 s; show how far
    it is while it catches up."""
    last, said_at = "", 0.0
    while True:
        now = time.monotonic()
        refusal = replica.refusal()
        if replica.verified is None:
            # What the worker waits for, without the seconds that change with every look.
            state, text = replica.status.split(" yet, ")[0], replica.status
        elif refusal is not None:
            state, text = "refusing", f"refusing to generate: {refusal}"
        else:
            what = "" if replica.follow.latest else f", {replica.follow}"
            state = f"following run {replica.run}{what}"
            text = f"{state}, at version {replica.version}"
        shown = bar.show(replica.catching_up, verified=replica.verified, status=replica.status)
        waiting = not shown and (replica.verified is None or refusal is not None)
        if state != last or (waiting and now - said_at >= 5.0):
            _say(text)
            last, said_at = state, now
        await asyncio.sleep(0.1)


@contextlib.contextmanager
def _stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _say(text: str) -> None:
    print(f"worker: {text}", file=sys.stderr, flush=True)

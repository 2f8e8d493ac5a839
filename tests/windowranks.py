"""One rank of a window's scenario: its connection, its windows and its memory, in its own process.

An nccl rank is on the GPU of its own number, and its payloads are there.
"""

import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import torch

from sparsecast.messages.errors import WindowError
from sparsecast.pipeline.bus.nats import NatsBus, connect
from sparsecast.pipeline.windows import Window, WindowSpec, available_kinds, open_window
from spawn import Context

#: What is allowed on top of a deadline, or to an abort, on a busy machine.
MARGIN_S = 3.0
#: More than the buffers of any connection hold: a peer that does not read blocks the sender.
#: NCCL has some 4 MiB a channel and dozens of channels.
LARGE = {"gloo": 48 << 20, "bus": 48 << 20, "nccl": 512 << 20}

Outcome = tuple[str, float]


class Rank:
    """What a scenario gets."""

    def __init__(self, context: Context, kind: str, prefix: str, bus: NatsBus) -> None:
        self.context = context
        self.rank = context.rank
        self.kind = kind
        self.prefix = prefix
        self.bus = bus
        gpus = torch.cuda.device_count() if kind == "nccl" else 0
        self.use(f"cuda:{context.rank % gpus}" if gpus else "cpu")

    def use(self, device: str) -> None:
        """Be on this device; a GPU is in use already, as in a process that has weights there."""
        self.device = device
        if device != "cpu":
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)
            assert self.kind in available_kinds(device)

    def window(self, number: int, *, rank: int | None = None, size: int | None = None) -> Window:
        spec = WindowSpec(
            kind=self.kind,
            prefix=f"{self.prefix}.1.{number}",
            epoch=1,
            window=number,
            rank=self.rank if rank is None else rank,
            size=self.context.size if size is None else size,
            device=self.device,
        )
        return open_window(spec, self.bus)

    def memory(self, nbytes: int, value: int = 0) -> torch.Tensor:
        """So many bytes of this value, complete."""
        return self.settled(torch.full((nbytes,), value, dtype=torch.uint8, device=self.device))

    def large(self, value: int = 0) -> torch.Tensor:
        """More than connections hold."""
        return self.memory(LARGE[self.kind], value)

    def settled(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, once what was enqueued is done: a payload must be complete."""
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        return tensor

    async def round_of(self, window: Window, memory: torch.Tensor, attempt: int) -> None:
        """Send or receive this memory."""
        work = window.send if window.spec.rank == 0 else window.receive
        await work(memory, attempt=attempt, timeout_s=20)

    async def round(self, window: Window, nbytes: int, attempt: int, timeout_s: float = 20) -> str:
        """Send or receive the pattern of this round; returns the hash of what is here then."""
        if window.spec.rank == 0:
            payload = self.settled(pattern(nbytes, attempt).to(self.device))
            await window.send(payload, attempt=attempt, timeout_s=timeout_s)
        else:
            payload = self.memory(nbytes, 255)
            await window.receive(payload, attempt=attempt, timeout_s=timeout_s)
        return digest(payload)


def pattern(nbytes: int, seed: int) -> torch.Tensor:
    """Bytes that are the same on every rank, and differ from seed to seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def digest(tensor: torch.Tensor) -> str:
    """What two ranks compare instead of the bytes."""
    return hashlib.sha256(tensor.cpu().numpy().data).hexdigest()


async def outcome(work: Awaitable[Any]) -> Outcome:
    """How `work` ended, by the name of its error, and after how long."""
    started = time.monotonic()
    try:
        await work
    except WindowError as exc:
        return type(exc).__name__, time.monotonic() - started
    return "done", time.monotonic() - started


def in_rank(
    scenario: Callable[..., Awaitable[Any]],
) -> Callable[[Context, str, str], Awaitable[Any]]:
    """Give a scenario its connection, and close it afterwards."""

    async def run(context: Context, kind: str, prefix: str, *args: Any) -> Any:
        bus = await connect(context.broker_url, name=f"rank-{context.rank}", timeout_s=10)
        try:
            return await scenario(Rank(context, kind, prefix, bus), *args)
        finally:
            await bus.close()

    run.__module__, run.__qualname__ = scenario.__module__, scenario.__qualname__
    return run

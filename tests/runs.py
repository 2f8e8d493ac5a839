"""A trainer and its workers on one event loop, through a real broker and real windows."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import torch

from sparsecast import AsyncPublisher, Policy, Replica, digest
from sparsecast.messages import codec
from sparsecast.messages.metrics import Metric
from sparsecast.pipeline.log.tiered import TieredLog

#: Deadlines short enough that a fault costs a test a second and not five.
QUICK = Policy(
    heartbeat_s=0.1,
    silence_s=1.5,
    ready_s=1.0,
    commit_s=2.0,
    open_s=3.0,
    send_s=3.0,
    guard_s=0.5,
    probe_s=0.5,
    backoff_s=0.2,
    retry_s=0.1,
    settle_s=2.0,
    lease_s=2,
)

Tensors = dict[str, torch.Tensor]


def weights(seed: int = 0) -> Tensors:
    """A small model of several dtypes, one of them strided and one without elements."""
    random = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(300, 41, generator=random).to(torch.bfloat16),
        "layer.weight": torch.randn(64, 64, generator=random).t(),
        "layer.bias": torch.randn(64, generator=random).to(torch.float16),
        "steps": torch.zeros((), dtype=torch.int64),
        "empty": torch.zeros(0, 7),
    }


def step(tensors: Tensors, seed: int, share: float = 0.02) -> None:
    """Change about this share of the elements, in place."""
    random = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            changed = torch.rand(tensor.shape, generator=random) < share
            tensor[changed] += 1.5
        else:
            tensor += 1


def codes(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Matrices as int8 with a scale a row; all else is the very tensor that was given."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not tensor.numel():
            found[name] = tensor
            continue
        whole = tensor.float()
        scale = whole.abs().amax(1, keepdim=True).clamp(min=1e-6) / 127
        found[name], found[f"{name}.scale"] = (whole / scale).round().to(torch.int8), scale
    return found


def same_bits(ours: Tensors, theirs: Tensors) -> bool:
    """Whether two models are equal bit for bit."""
    return ours.keys() == theirs.keys() and all(
        torch.equal(
            ours[name].contiguous().view(-1).view(torch.uint8),
            theirs[name].contiguous().view(-1).view(torch.uint8),
        )
        for name in ours
    )


async def until_stored(
    publisher: AsyncPublisher, version: int, *, anchor: bool = False, timeout_s: float = 20.0
) -> None:
    """Wait until the publisher's log has this version in every tier: a patch to it, or an anchor.

    Not in one of them: a publisher that is closed breaks off what the others still store.
    """
    log: Any = publisher._ports.log
    log = log.log  # what holds the pieces
    tiers = list(log._tiers.values()) if isinstance(log, TieredLog) else [log]
    async with asyncio.timeout(timeout_s):
        while tiers:
            found = await tiers[-1].entries(timeout_s=timeout_s)
            if any(e.version == version and (e.base_version is None) == anchor for e in found):
                tiers.pop()
            else:
                await asyncio.sleep(0.02)


class Site:
    """Starts publishers and replicas of one run; what it started ends with the test."""

    def __init__(self, url: str, run: str) -> None:
        self.url = url
        self.run = run
        self._stack: list[Any] = []

    async def publisher(self, tensors: Tensors, **options: Any) -> AsyncPublisher:
        """An open publisher."""
        options = {"run": self.run, "bus": self.url, "policy": QUICK, "linger_s": 5.0} | options
        return await self._enter(AsyncPublisher(tensors, **options))

    async def replica(self, tensors: Any, name: str = "w0", **options: Any) -> Replica:
        """A running replica."""
        options = {"run": self.run, "bus": self.url, "policy": QUICK, "name": name} | options
        return await self._enter(Replica(tensors, **options))

    def ends(self, context: Any) -> None:
        """What was entered elsewhere ends with the test too."""
        self._stack.append(context)

    async def _enter(self, context: Any) -> Any:
        entered = await context.__aenter__()
        self.ends(context)
        return entered

    async def close(self) -> None:
        """End all, the youngest first."""
        while self._stack:
            await self._stack.pop().__aexit__(None, None, None)


async def hangs(*_: Any, **__: Any) -> Any:
    """In place of what never comes to its end."""
    await asyncio.sleep(3600)


def checkpoint(version: int) -> Tensors:
    """weights() after the steps 1 … version."""
    tensors = weights()
    for seed in range(1, version + 1):
        step(tensors, seed)
    return tensors


async def published(site: Site, versions: int, **options: Any) -> list[int]:
    """A run with so many versions in its log, left in order; the digest of each."""
    trained, digests = weights(), []
    publisher = await site.publisher(trained, **options)
    digests.append(digest(trained))
    for version in range(1, versions + 1):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
        digests.append(digest(trained))
    await publisher.close()
    return digests


class Ear:
    """Collects the metrics and events of a run."""

    def __init__(self) -> None:
        self.heard: list[Metric] = []
        self._news = asyncio.Event()

    def hear(self, message: Any) -> None:
        """Take one message."""
        self.heard.append(codec.decode_metric(message.data, subject=message.subject))
        self._news.set()

    async def until(self, sort: type[Any], /, timeout_s: float = 10.0, **fields: Any) -> Any:
        """The first message of this kind with these fields; TimeoutError tells what was heard."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    for metric in self.heard:
                        if isinstance(metric, sort) and all(
                            getattr(metric, name) == value for name, value in fields.items()
                        ):
                            return metric
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise TimeoutError(f"no {sort.__name__} with {fields} among {self.heard}") from None


async def eventually(
    condition: Callable[[], bool] | Callable[[], Awaitable[bool]], timeout_s: float = 10.0
) -> None:
    """Wait until a condition holds, looking every 20 ms; TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.02)

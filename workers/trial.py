"""The doctor's test round: a trainer and a worker as two real processes, on devices of choice.

`trial()` starts them and compares what they say; run as a module, this is either of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec

from ..messages.errors import SparsecastError
from ..messages.subjects import Subjects
from .examine import brief, end_with
from .findings import Round

if TYPE_CHECKING:
    import torch

    from ..pipeline.bus.base import Bus

#: Updates that are measured, after those that wait for the window to open.
UPDATES = 8
OPEN_S = 12.0
#: A process with a GPU: its context, and every kernel compiled for the first time.
START_S = {"cpu": 25.0, "cuda": 90.0}
APPLY_S = 10.0
AFTER_FAILURE_S = 1.0
NAME = "worker-0"


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """What a process of the round says in the end."""

    digest: int = 0
    version: int = 0
    window: str | None = None
    updates: int = 0
    times_ms: list[float] = []
    verified: int | None = None
    mismatches: int = 0
    error: str = ""


async def trial(bus: Bus, url: str, trainer: str, worker: str, *, expected: str | None) -> Round:
    """Run one; `bus` is a connection to the broker at `url`, to clean up there."""
    run = f"doctor-{secrets.token_hex(4)}"
    start_s = max(START_S[place.partition(":")[0]] for place in (trainer, worker))
    whole_s = start_s + OPEN_S + APPLY_S
    sides = [
        asyncio.create_task(_process(role, run, url, device, start_s, whole_s))
        for role, device in (("trainer", trainer), ("worker", worker))
    ]
    try:
        told = await _both(sides)
    finally:
        with contextlib.suppress(SparsecastError):
            await bus.delete_stream(Subjects(run).journal_stream, timeout_s=2.0)
            await bus.delete_stream(Subjects(run).log_stream, timeout_s=2.0)
    return judge(told[0], told[1], trainer=trainer, worker=worker, expected=expected)


def judge(
    published: Said, received: Said, *, trainer: str, worker: str, expected: str | None
) -> Round:
    """What the two sides say together."""
    exact = (
        published.digest == received.digest
        and received.verified == received.version == published.version > 0
        and not received.mismatches
    )
    reasons = [
        f"{who}: {said.error}"
        for who, said in (("the trainer", published), ("the worker", received))
        if said.error
    ]
    if not reasons and not exact:
        reasons = [
            f"the worker ended at version {received.version} of {published.version} with "
            f"{received.mismatches} mismatches"
            + ("" if published.digest == received.digest else " and other weights")
        ]
    return Round(
        trainer=trainer,
        worker=worker,
        expected=expected,
        window=published.window if published.updates else None,
        updates=published.updates,
        verified=received.verified or 0,
        exact=exact and not reasons,
        p50_ms=round(median(published.times_ms), 2) if published.times_ms else None,
        reason="; ".join(reasons),
    )


async def _both(sides: list[asyncio.Task[Said]]) -> list[Said]:
    """What both say; one that fails takes the other with it, which would wait in vain."""
    try:
        done, _ = await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
        failed = any(side.result().error for side in done)
        await asyncio.wait(sides, timeout=AFTER_FAILURE_S if failed else None)
        return [side.result() if side.done() else Said() for side in sides]
    finally:
        for side in sides:
            side.cancel()
        await asyncio.wait(sides)


async def _process(
    role: str, run: str, url: str, device: str, start_s: float, whole_s: float
) -> Said:
    """Run one side to its end or its deadline."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sparsecast.workers.trial", str(os.getpid())),
        *(role, run, device, str(start_s)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # The URL may hold a password: not for the command line. One thread, as in the demo.
        env=os.environ | {"SPARSECAST_BUS": url, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    try:
        async with asyncio.timeout(whole_s):
            output, errors = await process.communicate()
    except TimeoutError:
        return Said(error=f"it did not end within {whole_s:g} s")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    with contextlib.suppress(msgspec.DecodeError, IndexError):
        return msgspec.json.decode(output.splitlines()[-1], type=Said)
    last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["no word"]
    return Said(error=f"it ended with exit code {process.returncode}: {last[0]}")


# ---- the two sides


def model(device: str) -> dict[str, torch.Tensor]:
    """A million bfloat16 weights in eight tensors, the same on every device."""
    import torch

    random = torch.Generator().manual_seed(1)
    return {
        f"layer.{index}": torch.randn((256, 512), generator=random).to(torch.bfloat16).to(device)
        for index in range(8)
    }


def train(run: str, device: str, start_s: float) -> Said:
    """The trainer's side: publish until all is measured, each update applied before the next."""
    import torch

    from .. import digest
    from .publisher import Publisher

    weights = model(device)
    random = torch.Generator().manual_seed(2)
    times: list[float] = []
    said: dict[str, Any] = {}

    def step() -> float:
        for tensor in weights.values():
            changed = torch.rand(tensor.shape, generator=random) < 0.01
            tensor.view(torch.int16).bitwise_xor_(changed.to(torch.int16).to(device))
        update = publisher.publish()
        report = update.wait_applied(timeout_s=APPLY_S)
        if not report.complete:
            raise TimeoutError(
                f"version {update.version} was not applied within {APPLY_S:g} s: "
                f"{report.missing.get(NAME, 'the worker has left')}"
            )
        return report.applied[NAME] * 1e3

    with Publisher(weights, run=run, bus=os.environ["SPARSECAST_BUS"], linger_s=2.0) as publisher:
        publisher.wait_members(1, timeout_s=start_s)
        opening = time.monotonic() + OPEN_S
        while publisher.window is None and time.monotonic() < opening:
            step()
        step()
        said["window"] = publisher.window or "log"
        times = [step() for _ in range(UPDATES)]
        # Told to the worker by its tags: the last.
        update = publisher.publish(tags={"last": "yes"})
        update.wait_applied(timeout_s=APPLY_S)
        said["version"] = publisher.version
    return Said(digest=digest(weights), updates=len(times), times_ms=times, **said)


def follow(run: str, device: str, start_s: float) -> Said:
    """The worker's side: follow until the last version is verified."""
    from .. import digest
    from .replica import Replica

    weights = model(device)
    bus = os.environ["SPARSECAST_BUS"]
    replica = Replica(weights, run=run, bus=bus, name=NAME, device=device)
    end = time.monotonic() + start_s + OPEN_S
    replica.start()
    try:
        while True:
            verified = replica.verified
            if verified and (replica.origin(verified)[1] or {}).get("last"):
                break
            if time.monotonic() > end:
                raise TimeoutError(f"no last version came: {replica.status}")
            time.sleep(0.005)
        with replica.reading(timeout_s=APPLY_S) as version:
            held = digest(weights)
        return Said(
            digest=held,
            version=version or 0,
            verified=replica.verified,
            mismatches=replica.mismatches,
        )
    finally:
        replica.stop()


def main() -> None:
    """One side: parent's process id, role, run, device, seconds to start."""
    parent, role, run, device, start_s = sys.argv[1:]
    end_with(int(parent))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    side = {"trainer": train, "worker": follow}[role]
    try:
        said = side(run, device, float(start_s))
    except Exception as exc:
        said = Said(error=str(exc) if isinstance(exc, SparsecastError) else brief(exc))
    answers.write(msgspec.json.encode(said) + b"\n")
    # Whatever thread still runs, the word is said.
    os._exit(0)


if __name__ == "__main__":
    main()

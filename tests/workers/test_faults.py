"""Real processes that die, stop, and come back, and a broker that goes away under a run."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import QUICK, Ear, Site, Tensors, eventually, same_bits, step, weights
from sparsecast import AsyncPublisher, Broker, Replica, ReplicaTorn
from sparsecast.messages.control import Announce
from sparsecast.messages.metrics import Event, WorkerMetrics
from sparsecast.pipeline.windows.gloo import GlooWindow
from sparsecast.workers.driver import Ports
from spawn import Context, Processes


async def follow(context: Context, run: str, until: int, timeout_s: float) -> dict[str, Any]:
    """A worker process: follow until version `until` is verified; what it holds then."""
    mine = weights()
    async with Replica(
        mine, run=run, bus=context.broker_url, name=f"w{context.rank}", policy=QUICK
    ) as replica:
        await replica.wait_version(0, timeout_s=20)
        context.mark("following")
        await replica.wait_version(until, timeout_s=timeout_s)
        await eventually(lambda: replica.verified == replica.version)
        return {"version": replica.version, "bytes": _bytes(mine), "name": replica.name}


def _bytes(tensors: Tensors) -> bytes:
    return b"".join(
        bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        for tensor in tensors.values()
    )


async def _train(
    publisher: AsyncPublisher, trained: Tensors, versions: range, pause_s: float = 0.05
) -> float:
    """Publish these versions; the longest time that publish() took, in seconds."""
    longest, loop = 0.0, asyncio.get_running_loop()
    for version in versions:
        step(trained, version)
        began = loop.time()
        await publisher.publish(step=version)
        longest = max(longest, loop.time() - began)
        await asyncio.sleep(pause_s)
    return longest


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_a_worker_fails_in_mid_run(site: Site, ear: Ear, fault: signal.Signals) -> None:
    """One of three is killed or stopped between rounds: the trainer goes on, two follow."""
    trained = weights()
    publisher = await site.publisher(trained)
    with Processes(3, follow, site.run, 30, 30.0, timeout_s=60, broker_url=site.url) as processes:
        await publisher.wait_members(3, timeout_s=20)
        await _train(publisher, trained, range(1, 11))
        processes.kill(1) if fault is signal.SIGKILL else processes.stop(1)
        longest = await _train(publisher, trained, range(11, 31))
        # A publish waits for no worker: its time is the diff of a few thousand elements.
        assert longest < QUICK.ready_s / 2
        await ear.until(Event, kind="evict", member="w1")
        if fault is signal.SIGSTOP:
            processes.resume(1)
        results = await asyncio.to_thread(processes.results)
    survivors = [r for rank, r in enumerate(results) if fault is signal.SIGSTOP or rank != 1]
    for result in survivors:
        assert result["version"] == 30
        assert result["bytes"] == _bytes(trained)


async def lead(context: Context, run: str, versions: int) -> None:
    """A trainer process: publish, and stay until killed."""
    trained = weights()
    async with AsyncPublisher(trained, run=run, bus=context.broker_url, policy=QUICK) as publisher:
        await publisher.wait_members(1, timeout_s=20)
        await _train(publisher, trained, range(1, versions + 1))
        context.mark("published")
        await asyncio.sleep(60)


async def test_a_killed_trainer_has_a_successor(site: Site) -> None:
    """SIGKILL, then another trainer on the run: its versions go on above, its weights count."""
    mine = weights()
    replica = await site.replica(mine)
    with Processes(1, lead, site.run, 5, timeout_s=60, broker_url=site.url) as processes:
        await asyncio.to_thread(processes.wait, "published")
        await replica.wait_version(5, timeout_s=10)
        processes.kill(0)
        assert replica.version == 5
        with replica.reading() as version:  # it goes on serving
            assert version == 5
        trained = weights(seed=3)
        publisher = None
        async with asyncio.timeout(QUICK.lease_s + 10):
            while publisher is None:
                with contextlib.suppress(Exception):
                    publisher = await site.publisher(trained)
                await asyncio.sleep(0.1)
    assert publisher.version > 5
    update = await publisher.publish()
    assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(trained, mine)


@pytest.mark.parametrize("remembers", [True, False], ids=["with-its-store", "without"])
async def test_the_broker_comes_back(tmp_path: Path, run: str, remembers: bool) -> None:
    """The broker dies in mid-run and is started again: publish() never fails, the run goes on."""
    stores = [tmp_path / "a", tmp_path / "a" if remembers else tmp_path / "b"]
    first = Broker(store_dir=stores[0])
    url = first.start()
    site = Site(url, run)
    trained, mine = weights(), weights()
    second = None
    try:
        publisher = await site.publisher(trained)
        replica = await site.replica(mine)
        await publisher.wait_members(1, timeout_s=10)
        await _train(publisher, trained, range(1, 4))
        os.kill(first.pid, signal.SIGKILL)
        await _train(publisher, trained, range(4, 8))
        first.close()
        second = Broker(port=int(url.rsplit(":", 1)[1]), store_dir=stores[1])
        await asyncio.to_thread(second.start)
        await _train(publisher, trained, range(8, 11))
        await replica.wait_version(10, timeout_s=30)
        await eventually(lambda: replica.verified == 10)
        assert same_bits(trained, mine)
        assert replica.mismatches == 0
    finally:
        await site.close()
        first.close()
        if second is not None:
            second.close()


async def test_a_flipped_bit_on_the_wire_is_refused(site: Site, ear: Ear) -> None:
    """The payload arrives with one bit wrong: nothing is changed, the log brings it."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained)
    replica = await site.replica(mine, ports=_flipping(site))
    await publisher.wait_members(1, timeout_s=10)
    await eventually(lambda: publisher.window == "gloo")
    step(trained, 1)
    update = await publisher.publish()
    assert (await update.wait_applied(timeout_s=10)).complete
    refused = await ear.until(Event, kind="refused", member="w0")
    assert "checksum" in refused.reason
    assert (await ear.until(WorkerMetrics, worker="w0", version=1)).source == "log"
    assert same_bits(trained, mine)
    assert replica.mismatches == 0


def _flipping(site: Site) -> Any:
    """Ports whose gloo window flips a bit of the first payload that it receives."""
    from dataclasses import replace

    from sparsecast.workers.connect import connect

    class Flipping(GlooWindow):
        flips = 1

        async def receive(self, staging: torch.Tensor, **options: Any) -> None:
            await super().receive(staging, **options)
            if Flipping.flips:
                Flipping.flips -= 1
                staging[staging.numel() // 2] ^= 4

    async def ports() -> Ports:
        real = await connect(site.url, run=site.run, name="w0")
        return replace(real, windows=lambda spec, courier: Flipping(spec, courier))

    return ports


async def test_a_lying_announcement_is_refused(site: Site, ear: Ear) -> None:
    """The announced digest is not the state's: nothing is served until a version is proven."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    original = publisher._tenure._journal.append

    async def lie(message: Any, **options: Any) -> int:
        if isinstance(message, Announce) and message.version == 1:
            import msgspec

            message = msgspec.structs.replace(message, digest=message.digest ^ 1)
        return await original(message, **options)

    publisher._tenure._journal.append = lie  # type: ignore[method-assign]
    step(trained, 1)
    await publisher.publish()
    assert (await ear.until(Event, kind="mismatch")).member == "w0"
    await eventually(lambda: replica.engine.guard().torn is not None)
    with pytest.raises(ReplicaTorn, match="digest"), replica.reading():
        pass
    step(trained, 2)
    await publisher.publish()
    await eventually(lambda: replica.verified == 2)
    assert same_bits(trained, mine)
    with replica.reading() as version:
        assert version == 2

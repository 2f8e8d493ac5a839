"""The worker's face against a trainer, a log and a window that misbehave."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from runs import QUICK, Ear, Site, eventually, same_bits, step, weights
from sparsecast import BusUnavailable, Closed, LocalProtocolError, Replica, WaitTimeout
from sparsecast.messages.control import Announce
from sparsecast.messages.metrics import Event, WorkerMetrics
from sparsecast.workers.connect import connect
from sparsecast.workers.driver import Ports


@pytest.mark.parametrize("nbytes", [1 << 62, (1 << 64) - 1, -5], ids=["vast", "uint64", "negative"])
async def test_an_absurd_size_costs_one_round(site: Site, ear: Ear, nbytes: int) -> None:
    """No machine has so much room: the worker says so, takes the log, and follows the next one."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    await eventually(lambda: publisher.window == "gloo")
    journal = publisher._tenure._journal
    original = journal.append

    async def lie(message: Any, **options: Any) -> int:
        if isinstance(message, Announce) and message.version == 1:
            message = msgspec.structs.replace(message, nbytes=nbytes)
        return await original(message, **options)

    journal.append = lie  # type: ignore[method-assign]
    for version in (1, 2):
        step(trained, version)
        await publisher.publish()
        await eventually(lambda version=version: replica.verified == version, 20.0)
    assert same_bits(trained, mine)
    assert replica.mismatches == 0
    assert (await ear.until(WorkerMetrics, version=1)).source == "log"


async def test_no_memory_while_checking_costs_one_round(site: Site, ear: Ear) -> None:
    """The allocator fails while a payload is checked: refused, told, and brought by the log."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained)
    failures = [RuntimeError("DefaultCPUAllocator: can't allocate memory")]

    async def ports() -> Ports:
        real = await connect(site.url, run=site.run, name="w0")

        async def run(function: Any, *args: Any) -> Any:
            if failures and getattr(function, "func", function).__name__ == "stage":
                raise failures.pop()
            return await real.run(function, *args)

        return replace(real, run=run)

    replica = await site.replica(mine, ports=ports)
    await publisher.wait_members(1, timeout_s=10)
    await eventually(lambda: publisher.window == "gloo")
    step(trained, 1)
    update = await publisher.publish()
    assert (await update.wait_applied(timeout_s=10)).complete
    assert not failures
    assert "allocate memory" in (await ear.until(Event, kind="refused", member="w0")).reason
    await eventually(lambda: replica.verified == 1)
    assert same_bits(trained, mine)


async def test_it_may_be_entered_again(site: Site) -> None:
    """Left at version 1, back at version 3: the log brings what it missed."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained)
    replica = Replica(mine, run=site.run, bus=site.url, name="w0", policy=QUICK)
    async with replica:
        with pytest.raises(LocalProtocolError, match="running already"):
            await replica.__aenter__()
        await publisher.wait_members(1, timeout_s=10)
        step(trained, 1)
        await publisher.publish()
        await replica.wait_version(1, timeout_s=10)
    with pytest.raises(Closed):
        await replica.wait_version(1, timeout_s=1)
    for version in (2, 3):
        step(trained, version)
        await publisher.publish()
    async with replica:
        await replica.wait_version(3, timeout_s=10)
        assert same_bits(trained, mine)


async def test_it_may_try_again_after_a_bus_that_was_not_there(site: Site) -> None:
    """Its first attempt found nobody; the same object connects when the bus is there."""
    there = False

    async def ports() -> Ports:
        url = site.url if there else "nats://127.0.0.1:9"
        return await connect(url, run=site.run, name="w0", timeout_s=0.5)

    replica = Replica(weights(), run=site.run, bus="", name="w0", policy=QUICK, ports=ports)
    with pytest.raises(BusUnavailable):
        await replica.__aenter__()
    there = True
    await site.publisher(weights())
    async with replica:
        assert await replica.wait_version(0, timeout_s=10) == 0


async def test_after_closing_nothing_writes_any_more(site: Site) -> None:
    """It is closed while an apply waits for a reader: once close() returns, the weights stand."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    guard = replica.engine.guard()
    with guard.reading():
        step(trained, 1)
        await publisher.publish()
        await eventually(lambda: guard._writers_waiting == 1)
        await replica.close()
        assert guard._writers_waiting == 0
    before = {name: tensor.clone() for name, tensor in mine.items()}
    with pytest.raises(Closed):
        await replica.wait_version(1, timeout_s=0.1)
    assert same_bits(before, mine)
    assert not torch.equal(mine["steps"], trained["steps"])


async def test_waiting_for_a_version_says_what_is_missing(site: Site) -> None:
    """Nobody publishes version 5: the error names where the worker stands."""
    await site.publisher(weights())
    replica = await site.replica(weights())
    await replica.wait_version(0, timeout_s=10)
    with pytest.raises(WaitTimeout, match=r"version 5 not within 0\.1 s: at version 0"):
        await replica.wait_version(5, timeout_s=0.1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
async def test_a_compiled_module_computes_with_the_new_weights(site: Site, backend: str) -> None:
    """torch.compile keeps the parameters, and they are patched in place: what was compiled at
    version 0 computes with version 2."""

    def module() -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())

    trained, compiled = module(), torch.compile(module(), backend=backend)
    tokens = torch.linspace(-1, 1, 16).view(2, 8)
    with torch.no_grad():
        before = compiled(tokens)
        publisher = await site.publisher(trained)
        replica = await site.replica(compiled)
        await publisher.wait_members(1, timeout_s=10)
        for _ in range(2):
            for parameter in trained.parameters():
                parameter.add_(0.05)
            update = await publisher.publish()
            assert (await update.wait_applied(timeout_s=10)).complete
        with replica.reading() as version:
            found = compiled(tokens)
        assert version == 2
        assert torch.equal(found, trained(tokens))
        assert not torch.equal(found, before)

"""Fixtures and hooks of every test: real brokers, fresh run names, uvloop."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus, connect

pytest_plugins = ("harness",)

# Before torch is imported, here and in what tests start. Of several threads a process on a few
# cores, those that are done spin until the last one comes: a test would take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes is the machine's affair, not the code's: no test is timed.
settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("untimed")

_numbers = itertools.count(1)

Connect = Callable[..., Awaitable[NatsBus]]


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Asynchronous tests run on the loop that programs use."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker]:
    """One embedded broker for the whole session: use it with a `run` of your own."""
    broker = Broker()
    broker.start()
    yield broker
    broker.close()


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """An embedded broker for one test, which may kill it or read its store_dir."""
    broker = Broker(store_dir=tmp_path / "store")
    broker.start()
    yield broker
    broker.close()


@pytest.fixture
def run() -> str:
    """A run name that no other test uses."""
    return f"run-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
async def connected() -> AsyncIterator[Connect]:
    """`await connected(url, **options)` gives a NatsBus that is closed after the test."""
    buses: list[NatsBus] = []

    async def connect_one(url: str, **options: Any) -> NatsBus:
        bus = await connect(url, **{"name": "test", **options})
        buses.append(bus)
        return bus

    yield connect_one
    await asyncio.gather(*(bus.close(0.5) for bus in buses))


@pytest.fixture
async def bus(broker: Broker, connected: Connect) -> NatsBus:
    """A connection to the session's broker."""
    return await connected(broker.url)

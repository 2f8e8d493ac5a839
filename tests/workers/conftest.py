"""Fixtures: a run of the test's own, and an ear on its metrics."""

from collections.abc import AsyncIterator

import pytest

from runs import Ear, Site
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus


@pytest.fixture
async def site(broker: Broker, run: str) -> AsyncIterator[Site]:
    """A run of this test's own on the session's broker."""
    site = Site(broker.url, run)
    yield site
    await site.close()


@pytest.fixture
async def ear(bus: NatsBus, run: str) -> Ear:
    """Listens to the metrics and events of this test's run from before its start."""
    ear = Ear()
    await bus.subscribe(f"sparsecast.{run}.metrics.*", ear.hear)
    await bus.subscribe(f"sparsecast.{run}.events", ear.hear)
    await bus.flush(2.0)
    return ear

"""A worker's entry among the micro services of its NATS server: discovery and statistics."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgspec
from nats.micro import add_service
from nats.micro.request import Request
from nats.micro.service import EndpointConfig, EndpointStats, Service

from ..messages.errors import LocalProtocolError
from ..messages.subjects import Subjects
from ..pipeline.bus.base import Bus
from ..pipeline.bus.nats import NatsBus
from .generation import GenerationService

log = logging.getLogger("sparsecast.micro")


class Registration:
    """An entry among the micro services of the bus."""

    def __init__(self, micro: Service) -> None:
        self._micro = micro

    async def stop(self, timeout_s: float = 1.0) -> None:
        """Take it out; nothing happens if the bus is away. Idempotent."""
        leaving = asyncio.ensure_future(self._micro.stop())
        await asyncio.wait({leaving}, timeout=timeout_s)
        if not leaving.done():
            leaving.cancel()
        elif (error := leaving.exception()) is not None:
            log.debug("not taken out of the micro services: %s", error)


async def register_service(
    bus: Bus, service: GenerationService, *, metadata: Mapping[str, str]
) -> Registration:
    """Register a worker as NATS micro service "sparsecast-worker", for `nats micro` and the like.

    PING, INFO and STATS of the services' protocol answer with `metadata` and the statistics; the
    endpoint "status" (`sparsecast.<run>.status.<worker>`) gives the statistics alone, as JSON.
    Needs a NatsBus.
    """
    if not isinstance(bus, NatsBus):
        raise LocalProtocolError("only a NatsBus has micro services")

    async def status(request: Request) -> None:
        await request.respond(msgspec.json.encode(asdict(service.statistics)))

    def statistics(endpoint: EndpointStats) -> dict[str, Any]:
        return asdict(service.statistics)

    micro = await add_service(
        bus.client,
        name="sparsecast-worker",
        version=importlib.metadata.version("sparsecast"),
        description="Generates from the weights of a run that it follows",
        metadata=dict(metadata),
        stats_handler=statistics,
    )
    await micro.add_endpoint(
        EndpointConfig(
            name="status",
            subject=Subjects(service.run).status(service.name),
            queue_group=service.name,
            handler=status,
        )
    )
    return Registration(micro)

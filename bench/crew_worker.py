"""A worker process of a crew: its replica comes, goes, and fails at a chosen moment, as told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from control import Control, run_rank
from models import empty, fill
from sparsecast import Policy, Replica, digest
from sparsecast.messages import codec
from sparsecast.messages.control import Ready
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.windows.base import Courier, Window, WindowSpec
from sparsecast.workers.connect import connect
from sparsecast.workers.driver import Ports
from sparsecast.workers.engine import ModuleEngine
from sparsecast.workers.rehearsal import rehearse

#: The trainer has something to say at least this often, or it is gone.
PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Config:
    """What a worker is told at its start."""

    url: str
    run: str
    name: str
    device: str
    shapes: dict[str, tuple[int, ...]]
    seed: int
    threads: int
    policy: Policy


class Fault:
    """Ends or stops this very process at the chosen moment, and says so just before."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._moment: str | None = None
        self._signal = 0
        #: The version of the round that this worker has last committed to.
        self.version = 0

    def arm(self, moment: str, number: int) -> None:
        """At the next such moment, this signal."""
        self._signal = number
        self._moment = moment

    def reach(self, moment: str) -> None:
        """This moment has come; with a fault for it, nothing after this call happens in time."""
        if self._moment == moment:
            self._moment = None
            self._control.say(("fault", (time.monotonic(), self.version)))
            os.kill(os.getpid(), self._signal)


class _Bus:
    """The replica's bus, which tells when a commitment to a round has reached the broker."""

    def __init__(self, bus: Any, subject: str, fault: Fault) -> None:
        self._bus = bus
        self._subject = subject
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def publish(self, subject: str, data: bytes, **options: Any) -> None:
        await self._bus.publish(subject, data, **options)
        if subject != self._subject:
            return
        message = codec.decode(data, subject=subject)
        # Attempt 0 is the opening of a window.
        if isinstance(message, Ready) and message.stamp.attempt:
            self._fault.version = message.stamp.version
            await self._bus.flush(5.0)
            self._fault.reach("ready")


class _Window:
    """A window whose receive() may not come to pass."""

    def __init__(self, window: Window, fault: Fault) -> None:
        self._window = window
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._window, name)

    async def receive(self, staging: Tensor, **options: Any) -> None:
        self._fault.reach("receive")
        await self._window.receive(staging, **options)


class _Noting(ModuleEngine):
    """Tensors whose every version is told to the trainer as it is written."""

    def __init__(self, tensors: dict[str, Tensor], control: Control) -> None:
        super().__init__(tensors)
        self._control = control

    def after_apply(self, version: int, changed: Sequence[str]) -> None:
        super().after_apply(version, changed)
        device = next(iter(self.tensors().values())).device
        if device.type == "cuda":
            # Not the whole device: the next round's collective may be pending there.
            torch.cuda.current_stream(device).synchronize()
        self._control.say(("applied", (version, time.monotonic())))


def main(control: Control, config: Config) -> None:
    """Prepare, join when told, and do what is told until the end."""
    torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    tensors = empty(config.shapes, device)
    fill(tensors, config.seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        rehearse(tensors, device)  # what loads now need not load while others wait for the join
    fault = Fault(control)
    control.say(("prepared", None))

    async def ports() -> Ports:
        found = await connect(
            config.url,
            run=config.run,
            name=config.name,
            device=config.device,
            timeout_s=config.policy.bus_s,
        )

        def window(spec: WindowSpec, courier: Courier) -> Any:
            return _Window(found.windows(spec, courier), fault)

        bus: Any = _Bus(found.bus, Subjects(config.run).worker_control(config.name), fault)
        return replace(found, bus=bus, windows=window)

    replica = Replica(
        _Noting(tensors, control),
        run=config.run,
        bus=config.url,
        name=config.name,
        device=config.device,
        policy=config.policy,
        ports=ports,
    )
    try:
        while True:
            match control.hear(PATIENCE_S):
                case ("join",):
                    replica.start()
                    control.say(("joined", None))
                case ("leave",):
                    replica.stop()
                    control.say(("left", None))
                case ("fault", "idle", number):
                    fault.arm("idle", number)
                    fault.reach("idle")
                case ("fault", moment, number):
                    fault.arm(moment, number)
                    control.say(("armed", None))
                case ("digest",):
                    with replica.reading() as version:
                        found = digest(tensors)
                    control.say(("digest", (version, found, replica.mismatches)))
                case ("end",):
                    return
    finally:
        replica.stop()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run_rank(main)

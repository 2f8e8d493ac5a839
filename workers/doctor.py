"""`sparsecast doctor`: every step under a deadline of its own; one that fails hides no other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ..messages.errors import BusError, SettingsError, SparsecastError
from . import findings as f
from . import nvidia, settings, verdict
from .devices import resolve
from .examine import Answer, Ask, brief
from .reach import look, server

if TYPE_CHECKING:
    from ..pipeline.bus.nats import NatsBus

T = TypeVar("T")
Say = Callable[[str], None]

STEP_S = 60.0
#: The first use of a GPU: its context, and every kernel compiled for the first time.
KERNELS_S = 90.0
#: Settings of others that change what is found here.
TOLD = ("NCCL_", "GLOO_", "TRITON_", "CUDA_VISIBLE_DEVICES", "TORCH_NCCL_")


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """What `sparsecast doctor` is told."""

    bus: str | None = None
    #: Of the round: its trainer and worker, or one for both. Empty: the best that are there.
    devices: tuple[str, ...] = ()


async def examine(options: DoctorOptions, say: Say) -> f.Findings:
    """Look at everything."""
    began = time.monotonic()
    found = f.Findings(
        software=f.Software(
            sparsecast=_own_version(),
            python=sys.version.partition(" ")[0],
            platform=sys.platform,
        ),
        environment={key: os.environ[key] for key in sorted(os.environ) if key.startswith(TOLD)},
    )
    troubles: list[f.Problem] = []
    async with contextlib.AsyncExitStack() as stack:
        examiner = await stack.enter_async_context(Examiner())
        machine = asyncio.create_task(_machine(found, options, examiner, troubles, say))
        bus = None
        with _noted(troubles, "broker", "start one with: sparsecast broker, and look at its log"):
            bus = await _broker(found, options, stack, say)
        with _noted(troubles, "torch and GPUs", "see what else is listed"):
            await machine
        if bus is not None and found.software.torch is not None:
            with _noted(troubles, "test round", "what it needs is in the rows above"):
                trainer, worker = _places(found, options)
                say(f"a test round, {trainer} → {worker}")
                await _round(found, *bus, trainer, worker)
    found.problems = [*troubles, *verdict.problems(found)]
    found.notes = list(verdict.notes(found))
    found.ok = not found.problems
    found.elapsed_s = round(time.monotonic() - began, 2)
    return found


def _own_version() -> str:
    from .. import __version__

    return __version__


@contextlib.contextmanager
def _noted(troubles: list[f.Problem], check: str, remedy: str) -> Iterator[None]:
    """What fails inside is a problem, and what comes after goes on."""
    try:
        yield
    except Exception as exc:
        reason = str(exc) if isinstance(exc, SparsecastError) else brief(exc)
        troubles.append(f.Problem(check=check, reason=reason, remedy=remedy))


# ---- torch, GPUs, windows, kernels


class Examiner:
    """Asks examine.py, a process of its own: a new one after a hang or a crash."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Examiner:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def ask(self, step: str, kind: type[T], device: str = "", *, timeout_s: float) -> T:
        """One step's findings. SparsecastError with what it said, or how it ended."""
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "sparsecast.workers.examine", str(os.getpid())),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=1 << 20,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(Ask(step, device)) + b"\n")
        try:
            line = await asyncio.wait_for(process.stdout.readline(), timeout_s)
        except TimeoutError:
            await self._end()
            raise SparsecastError(f"it did not end within {timeout_s:g} s") from None
        if not line:
            code = await process.wait()
            self._process = None
            raise SparsecastError(f"its process ended with exit code {code}")
        answer = msgspec.json.decode(line, type=Answer)
        if answer.error:
            raise SparsecastError(answer.error)
        return msgspec.json.decode(answer.result, type=kind)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _machine(
    found: f.Findings,
    options: DoctorOptions,
    examiner: Examiner,
    troubles: list[f.Problem],
    say: Say,
) -> None:
    smi = asyncio.create_task(asyncio.to_thread(nvidia.ask))
    say("torch")
    with _noted(troubles, "torch", "import torch in a shell of your own and see"):
        found.software = await examiner.ask("software", f.Software, timeout_s=STEP_S)
    told = await smi
    found.gpus_listed = len(told.drivers)
    driver = "look at nvidia-smi and dmesg: the driver does not answer as it should"
    say("GPUs")
    with _noted(troubles, "GPUs", driver):
        seen = await examiner.ask("gpus", list[f.Gpu], timeout_s=STEP_S)
        found.gpus = [
            msgspec.structs.replace(gpu, driver=told.drivers.get(gpu.uuid)) for gpu in seen
        ]
        uuids = {gpu.index: gpu.uuid for gpu in seen}
    if len(found.gpus) > 1:
        with _noted(troubles, "peer access", driver):
            found.pairs = [
                msgspec.structs.replace(
                    pair, link=told.links.get((uuids[pair.first], uuids[pair.second]))
                )
                for pair in await examiner.ask("pairs", list[f.Pair], timeout_s=STEP_S)
            ]
    places = ["cpu", *(gpu.device for gpu in found.gpus)]
    if found.gpus:
        with _noted(troubles, "NCCL", "pip install 'sparsecast[nccl]'"):
            nccl, nccl4py = await examiner.ask(
                "nccl", tuple[str | None, str | None], timeout_s=STEP_S
            )
            found.software = msgspec.structs.replace(
                found.software,
                nccl=nccl or found.software.nccl,
                nccl4py=nccl4py or found.software.nccl4py,
            )
    for device in places:
        with _noted(troubles, f"windows on {device}", "reinstall torch"):
            found.windows += await examiner.ask("offers", list[f.Offer], device, timeout_s=STEP_S)
    for device in _chosen(places, options):
        say(f"diff and apply on {device}")
        try:
            one = await examiner.ask("kernels", f.Kernels, device, timeout_s=KERNELS_S)
        except SparsecastError as exc:
            backend = "torch" if device == "cpu" else "triton"
            one = f.Kernels(device=device, backend=backend, exact=False, reason=str(exc))
        found.kernels.append(one)


def _chosen(places: list[str], options: DoctorOptions) -> list[str]:
    wanted = {"cuda:0" if device == "cuda" else device for device in options.devices}
    return [device for device in places if not wanted or device == "cpu" or device in wanted]


def _places(found: f.Findings, options: DoctorOptions) -> tuple[str, str]:
    if not options.devices:
        return verdict.places(found.gpus, found.pairs)
    devices = [resolve(device, len(found.gpus)) for device in options.devices]
    return devices[0], devices[-1]


# ---- the bus


async def _broker(
    found: f.Findings, options: DoctorOptions, stack: contextlib.AsyncExitStack, say: Say
) -> tuple[NatsBus, str] | None:
    """A connection and its URL for the round: to the broker in question, else to an embedded one;
    None if there is neither."""
    from ..pipeline.bus.broker import Broker

    found.server = await asyncio.to_thread(server)
    say("the broker")
    bus = None
    with contextlib.suppress(SettingsError):
        choice = settings.find_bus(options.bus, origin="given")
        origin = "given" if options.bus else "live"
        found.broker, bus = await look(choice.url, origin, stack)
        if bus is not None:
            return bus, choice.url
    if not found.server.usable:
        return None
    try:
        url = stack.enter_context(Broker())
    except BusError as exc:
        own = f.Broker(url="", origin="embedded", reason=str(exc))
    else:
        own, bus = await look(url, "embedded", stack)
    if found.broker is None:
        found.broker = own
    return None if bus is None else (bus, url)


# ---- the round


async def _round(found: f.Findings, bus: NatsBus, url: str, trainer: str, worker: str) -> None:
    from .trial import trial

    expected = verdict.expected_kind(found, trainer, worker)
    found.round = await trial(bus, url, trainer, worker, expected=expected)


def run_doctor(
    options: DoctorOptions,
    *,
    as_json: bool,
    loop: Callable[[Coroutine[Any, Any, f.Findings]], f.Findings],
) -> int:
    """Examine and show; the exit code."""
    from rich.console import Console

    from .chart import chart

    told = Console(stderr=True)
    with told.status("looking") as status:
        found = loop(examine(options, lambda what: status.update(f"{what} …")))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        Console().print(chart(found))
    return 0 if found.ok else 1

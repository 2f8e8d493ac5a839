"""What `sparsecast doctor` finds, as its JSON has it. None: not there, or not known."""

from __future__ import annotations

import msgspec


class Software(msgspec.Struct, frozen=True, kw_only=True):
    """Versions. `cuda` is what torch was built for, `nccl` what the NCCL window loads (else what
    torch brings)."""

    sparsecast: str
    python: str
    platform: str
    torch: str | None = None
    cuda: str | None = None
    triton: str | None = None
    nccl: str | None = None
    nccl4py: str | None = None
    uvloop: str | None = None
    nats_py: str | None = None


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU that torch sees; `index` is torch's."""

    index: int
    name: str
    uuid: str
    memory_nbytes: int
    compute_capability: str
    driver: str | None = None

    @property
    def device(self) -> str:
        """Its name in torch."""
        return f"cuda:{self.index}"


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """Two GPUs: whether each reads the other's memory, and how they are linked (NV18, PIX, SYS …,
    as nvidia-smi has it)."""

    first: int
    second: int
    peer_access: bool
    link: str | None = None


class Kernels(msgspec.Struct, frozen=True, kw_only=True):
    """A small diff, apply and digest on a device, against the torch reference on the CPU.

    `backend`: triton, or torch (the reference itself). `first_ms` contains compiling.
    """

    device: str
    backend: str
    exact: bool
    first_ms: float | None = None
    again_ms: float | None = None
    reason: str = ""


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a trainer or worker on `device` would offer this kind of window, and why not."""

    device: str
    kind: str
    offered: bool
    reason: str = ""


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """The nats-server that an embedded broker would run."""

    path: str | None = None
    version: str | None = None
    usable: bool = False
    reason: str = ""


class Broker(msgspec.Struct, frozen=True, kw_only=True):
    """The broker that was asked. `origin`: given, live (of this user) or embedded.

    `request_p50_ms`: a request and its answer through the broker, both from this process.
    """

    url: str
    origin: str
    reachable: bool = False
    version: str | None = None
    jetstream: bool = False
    max_payload_nbytes: int | None = None
    request_p50_ms: float | None = None
    reason: str = ""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """A trainer and a worker, two processes, through the whole way of some updates.

    `expected` is the best kind of window that both devices offer, `window` what carried the
    updates (log: none did). `exact`: the worker verified every digest, and in the end its weights
    are the trainer's. `p50_ms`: from publish() until the trainer heard that they were applied.
    """

    trainer: str
    worker: str
    expected: str | None = None
    window: str | None = None
    updates: int = 0
    verified: int = 0
    exact: bool = False
    p50_ms: float | None = None
    reason: str = ""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Something that should work here and does not: what, why, and what to do."""

    check: str
    reason: str
    remedy: str


class Findings(msgspec.Struct, kw_only=True):
    """Everything; `ok` is whether there is no problem. `gpus_listed`: by nvidia-smi."""

    ok: bool = False
    problems: list[Problem] = []
    notes: list[str] = []
    software: Software
    environment: dict[str, str] = {}
    gpus: list[Gpu] = []
    gpus_listed: int = 0
    pairs: list[Pair] = []
    kernels: list[Kernels] = []
    windows: list[Offer] = []
    server: Server = Server()
    broker: Broker | None = None
    round: Round | None = None
    elapsed_s: float = 0.0

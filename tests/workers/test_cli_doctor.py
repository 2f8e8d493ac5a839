"""`sparsecast doctor`: what it says of this machine, and that one broken thing hides no other."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from rich.console import Console

from servers import nats_server
from sparsecast.messages.errors import SparsecastError
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.workers import findings as f
from sparsecast.workers import trial
from sparsecast.workers.chart import chart
from sparsecast.workers.cli import doctor as command
from sparsecast.workers.doctor import Examiner
from sparsecast.workers.reach import look, server

DEAD = "nats://127.0.0.1:9"


def run_doctor(home: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run it to its end; the exit code and the JSON."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SPARSECAST")}
    result = subprocess.run(
        [sys.executable, "-m", "sparsecast.workers.cli", "doctor", "--json", *arguments],
        env=kept | {"XDG_RUNTIME_DIR": str(home), "NCCL_NVLS_ENABLE": "0"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "Traceback" not in result.stderr
    return result.returncode, json.loads(result.stdout)


async def test_all_is_well_and_the_broker_is_left_as_it_was(
    tmp_path: Path, broker: Broker, bus: NatsBus
) -> None:
    """On the CPU with a broker of ours: exit code 0, everything looked at, a proven round by gloo
    through that broker, and no stream of it left there."""
    code, told = await asyncio.to_thread(
        run_doctor, tmp_path, "--bus", broker.url, "--device", "cpu"
    )
    assert code == 0, told["problems"]
    found = msgspec.convert(told, f.Findings)
    assert found.ok
    assert found.environment["NCCL_NVLS_ENABLE"] == "0"
    assert found.software.torch is not None
    assert [(one.device, one.exact) for one in found.kernels] == [("cpu", True)]
    assert {o.kind: o.offered for o in found.windows if o.device == "cpu"} == {
        "nccl": False, "gloo": True, "bus": True,
    }  # fmt: skip
    assert found.broker is not None
    assert (found.broker.url, found.broker.origin) == (broker.url, "given")
    assert found.broker.jetstream
    assert (found.broker.request_p50_ms or 0) > 0
    assert found.round is not None
    assert (found.round.trainer, found.round.worker, found.round.window) == ("cpu", "cpu", "gloo")
    assert found.round.exact
    assert found.round.updates == trial.UPDATES
    assert found.round.verified > trial.UPDATES
    assert (found.round.p50_ms or 0) > 0
    names = json.loads(await bus.request("$JS.API.STREAM.NAMES", b"", timeout_s=2.0))
    assert not [name for name in names["streams"] or () if "doctor-" in name]


def test_a_broker_that_is_away_hides_nothing_else(tmp_path: Path) -> None:
    """--bus names a port where nobody listens: exit code 1 and that one problem; the round runs
    through an embedded broker."""
    code, told = run_doctor(tmp_path, "--bus", DEAD, "--device", "cpu")
    assert code == 1
    (problem,) = told["problems"]
    assert problem["check"] == f"broker {DEAD}"
    assert problem["remedy"]
    assert (told["broker"]["origin"], told["broker"]["reachable"]) == ("given", False)
    assert told["round"]["exact"]
    assert told["kernels"][0]["exact"]


async def test_a_hung_or_killed_step_does_not_take_the_next_with_it() -> None:
    """The process that looks at torch is stopped, then its successor killed: each time the step
    says so, and the next has a new process."""
    async with Examiner() as examiner:

        async def versions() -> f.Software:
            return await examiner.ask("software", f.Software, timeout_s=30.0)

        first = await versions()
        assert first.torch is not None
        process = examiner._process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(SparsecastError, match=r"did not end within 0\.3 s"):
            await examiner.ask("gpus", list[f.Gpu], timeout_s=0.3)
        assert process.returncode == -signal.SIGKILL
        assert await versions() == first
        process = examiner._process
        assert process is not None
        process.kill()
        with pytest.raises(SparsecastError, match="ended with exit code -9"):
            await versions()
        assert await versions() == first
        with pytest.raises(SparsecastError, match="Invalid device"):
            await examiner.ask("kernels", f.Kernels, "cuda:banana", timeout_s=30.0)


async def test_a_round_whose_worker_cannot_start_says_so_soon(
    broker: Broker, bus: NatsBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's device is not there: the reason is the worker's, and the trainer, which would
    wait for it, is ended."""
    monkeypatch.setitem(trial.START_S, "meta", 60.0)
    async with asyncio.timeout(40):
        found = await trial.trial(bus, broker.url, "cpu", "meta:banana", expected="gloo")
    assert not found.exact
    assert found.reason.startswith("the worker: ")
    assert found.updates == 0


async def test_a_broker_without_jetstream_is_told_with_the_way_out(tmp_path: Path) -> None:
    """A plain nats-server: reached, its version known, and refused for want of JetStream."""
    with nats_server(tmp_path, "") as url:
        async with contextlib.AsyncExitStack() as stack:
            found, connection = await look(url, "given", stack)
    assert connection is None
    assert (found.reachable, found.jetstream) == (True, False)
    assert found.version is not None
    assert found.reason == "JetStream is not enabled there: start it with -js"


def said(**change: Any) -> trial.Said:
    return trial.Said(**{"digest": 7, "version": 9, "verified": 9, **change})


@pytest.mark.parametrize(
    ("received", "reason"),
    [
        pytest.param(said(), "", id="exact"),
        pytest.param(said(digest=8), "and other weights", id="digest"),
        pytest.param(said(version=8), "ended at version 8 of 9", id="behind"),
        pytest.param(said(mismatches=1), "with 1 mismatches", id="mismatch"),
        pytest.param(said(verified=8), "ended at version 9 of 9", id="unverified"),
        pytest.param(said(error="boom"), "the worker: boom", id="error"),
    ],
)
def test_a_round_is_exact_only_if_both_sides_agree(received: trial.Said, reason: str) -> None:
    """Version, verification, mismatches and the digest of the weights in the end all count."""
    published = trial.Said(digest=7, version=9, window="gloo", updates=8, times_ms=[3.0, 1.0, 2.0])
    found = trial.judge(published, received, trainer="cpu", worker="cpu", expected="gloo")
    assert found.exact == (not reason)
    assert reason in found.reason
    assert (found.window, found.p50_ms) == ("gloo", 2.0)


def test_the_server_that_is_there_is_found_and_an_old_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installed nats-server will do; one that calls itself 2.9.10, or that fails, will not."""
    assert server().usable
    binary = tmp_path / "nats-server"
    monkeypatch.setattr("sparsecast.pipeline.bus.broker.server_binary", lambda: binary)
    binary.write_text("#!/bin/sh\necho 'nats-server: v2.9.10'\n")
    binary.chmod(0o755)
    found = server()
    assert (found.usable, found.version) == (False, "2.9.10")
    assert "2.11 or newer is needed" in found.reason
    binary.write_text("#!/bin/sh\nexit 3\n")
    assert "status 3" in server().reason


def test_every_key_of_the_json_is_in_the_help() -> None:
    """A program that reads the JSON finds its keys documented."""
    help_text = command.__doc__ or ""

    def names(kind: type) -> set[str]:
        found: set[str] = set()
        for name, hint in get_type_hints(kind).items():
            found.add(name)
            for inner in (hint, *get_args(hint)):
                if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                    found |= names(inner)
        return found

    missing = {name for name in names(f.Findings) if name not in help_text}
    assert not missing
    assert {"p50_ms", "uuid", "remedy"} <= names(f.Findings)


def test_the_table_says_what_is_wrong_and_what_to_do() -> None:
    """A machine with two GPUs and a broken round: every device has a row, the problem its remedy,
    and brackets in a reason are text, not markup."""
    found = f.Findings(
        software=f.Software(sparsecast="0", python="3", platform="x", torch="2.11", cuda="13.0"),
        gpus=[
            f.Gpu(
                index=i, name="NVIDIA H200", uuid=f"GPU-{i}", memory_nbytes=139 << 30,
                compute_capability="9.0", driver="580",
            )
            for i in range(2)
        ],
        pairs=[f.Pair(first=0, second=1, peer_access=True, link="NV18")],
        kernels=[f.Kernels(device="cuda:1", backend="triton", exact=False, reason="a [red] lie")],
        environment={"NCCL_NVLS_ENABLE": "0"},
        windows=[f.Offer(device="cuda:0", kind="nccl", offered=True)],
        problems=[f.Problem(check="data path on cuda:1", reason="a [red] lie", remedy="do this")],
        round=f.Round(trainer="cuda:0", worker="cuda:1", reason="the worker: boom"),
    )  # fmt: skip
    console = Console(width=100, force_terminal=False)
    with console.capture() as captured:
        console.print(chart(found))
    text = captured.get()
    for word in (
        "139 GiB", "GPU-1", "NCCL_NVLS_ENABLE=0", "peer access, link NV18", "a [red] lie",
        "→ do this", "the worker: boom", "not all is well",
    ):  # fmt: skip
        assert word in text


@pytest.mark.gpu(2)
def test_two_gpus_do_all_that_they_should(tmp_path: Path) -> None:
    """On two GPUs: kernels exact on each, and a round by NCCL between them."""
    code, told = run_doctor(tmp_path)
    assert code == 0, told["problems"]
    assert [one["backend"] for one in told["kernels"]][1:] == ["triton"] * len(told["gpus"])
    assert told["round"]["window"] == "nccl"
    assert told["round"]["trainer"] != told["round"]["worker"]

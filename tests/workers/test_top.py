"""`sparsecast top`: the table in 80 columns, and what programs read, from a real run."""

import asyncio
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from rich.console import Console

import sparsecast
from sparsecast.messages.codec import encode
from sparsecast.messages.control import Beat, Heartbeat, Sender
from sparsecast.messages.metrics import Event
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.workers.board import MemberRow, MemberState, Snapshot, TrainerRow
from sparsecast.workers.top import find_runs, ms, render, share, size

TRAINER_KEYS = {
    "state", "epoch", "version", "step", "heard_s", "rounds", "round_p50_ms", "round_p99_ms",
    "nbytes", "dense_nbytes", "density", "encoding", "transport", "window", "members",
}  # fmt: skip
MEMBER_KEYS = {
    "name", "state", "note", "version", "verified", "lag", "heard_s", "rounds", "round_p50_ms",
    "round_p99_ms", "nbytes", "density", "mismatches", "source", "follow",
    "caught_up",
}  # fmt: skip


def top(*arguments: str, home: Path, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run `sparsecast top` to its end."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SPARSECAST")}
    return subprocess.run(
        [sys.executable, "-m", "sparsecast.workers.cli", "top", *arguments],
        env=kept | {"XDG_RUNTIME_DIR": str(home)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def snapshot() -> Snapshot:
    """A run with large figures and long reasons."""
    trainer = TrainerRow(
        state="alive", epoch=12, version=1_234_567, step=1_234_567, heard_s=0.1, rounds=200,
        round_p50_ms=1234.5, round_p99_ms=98765.4, nbytes=123_456_789, dense_nbytes=15_231_233_024,
        density=0.0123, encoding="sparse", transport="gloo", window=123, members=3,
    )  # fmt: skip
    member = MemberRow(
        name="a-worker-with-a-rather-long-name", state="following", note="", version=1_234_567,
        verified=1_234_567, lag=0, heard_s=0.2, rounds=200, round_p50_ms=1234.5,
        round_p99_ms=98765.4, nbytes=123_456_789, density=0.0123, mismatches=12, source="gloo",
        follow=None,
        caught_up=None,
    )  # fmt: skip
    event = Event(time_s=0.0, run="r", kind="evict", member="w", reason="silent for 4.1 s " * 9)
    return Snapshot(
        run="a-run-with-a-name", trainer=trainer, members=(member,) * 3, events=(event,) * 9
    )


@pytest.mark.parametrize(
    ("state", "caught_up", "shown"),
    [("following", None, "following"), ("catching up", 0.999, "log 100%")],
    ids=["following", "catching up"],
)
def test_the_table_fits_80_columns(state: MemberState, caught_up: float | None, shown: str) -> None:
    """The largest figures that one expects: no line is longer, no figure is cut."""
    console = Console(width=80, file=io.StringIO(), record=True)
    told = snapshot()
    member = replace(told.members[0], state=state, caught_up=caught_up)
    told = replace(told, members=(member,) * 3)
    console.print(render(told, bus="nats://127.0.0.1:4222", note="the bus is gone"))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    header, trainer, line = lines[3:6]
    assert header.split()[:4] == ["member", "version", "verified", "lag"]
    assert "1234567" in trainer
    assert "98765" in trainer
    assert "123 MB" in trainer
    assert "1.23%" in trainer
    assert line.startswith("a-worker-with-a-rat…")
    assert line.rstrip().endswith(f" 12 {shown}")
    assert sum("evict w" in line for line in lines) == 4
    assert "123.4× fewer bytes than dense" in lines[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (999_600, "1.00 MB"),
     (184_213, "184 kB"), (15_231_233_024, "15.2 GB")],
)  # fmt: skip
def test_sizes_have_three_figures(value: int, text: str) -> None:
    """Bytes as people read them."""
    assert size(value) == text


def test_what_is_unknown_is_no_figure() -> None:
    """None stays None: the table shows a dash, never a made-up zero."""
    assert (size(None), ms(None), share(None)) == (None, None, None)
    assert (ms(0.123), ms(12.34), ms(123.4)) == ("0.12", "12.3", "123")
    assert (share(0.01234), share(0.57)) == ("1.23%", "57.0%")


def test_a_real_run_is_told_to_programs(broker: Broker, run: str, tmp_path: Path) -> None:
    """A trainer and its replica: `top --once --json` tells both, with the keys as promised."""
    weights = {"w": torch.zeros(1000)}
    replica = sparsecast.Replica({"w": torch.zeros(1000)}, run=run, bus=broker.url, name="w-0")
    with sparsecast.Publisher(weights, run=run, bus=broker.url) as publisher:
        replica.start()
        try:
            publisher.wait_members(1, timeout_s=20)
            weights["w"][:10] = 1.0
            publisher.publish(step=7).wait_applied(timeout_s=20)
            result = top("--run", run, "--bus", broker.url, "--once", "--json", home=tmp_path)
        finally:
            replica.stop()
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told.keys() == {"run", "trainer", "members", "events"}
    assert told["trainer"].keys() == TRAINER_KEYS
    (member,) = told["members"]
    assert member.keys() == MEMBER_KEYS
    assert (told["run"], told["trainer"]["state"], told["trainer"]["version"]) == (run, "alive", 1)
    assert (member["name"], member["state"], member["lag"]) == ("w-0", "following", 0)
    assert (member["version"], member["verified"], member["mismatches"]) == (1, 1, 0)


async def test_the_only_run_is_found_by_itself(
    own_broker: Broker, connected: object, tmp_path: Path
) -> None:
    """No --run: the one that is heard is shown; with two, both are named and exit code 2."""
    bus: NatsBus = await connected(own_broker.url)  # type: ignore[operator]

    async def speak(run: str) -> None:
        beat = Beat(sender=Sender("trainer", "t"), epoch=1, version=3)
        await bus.publish(f"sparsecast.{run}.trainer.control", encode(beat))
        heartbeat = Heartbeat(sender=Sender("w", "a"), epoch=1, version=3, verified=3)
        await bus.publish(f"sparsecast.{run}.worker.w.control", encode(heartbeat))

    async def talk(runs: list[str]) -> None:
        while True:
            for run in runs:
                await speak(run)
            await asyncio.sleep(0.1)

    for runs in (["alpha"], ["alpha", "beta"]):
        talking = asyncio.create_task(talk(runs))
        assert await find_runs(bus, wait_s=0.5) == runs
        result = await asyncio.to_thread(
            top, "--bus", own_broker.url, "--once", "--json", home=tmp_path
        )
        talking.cancel()
        if len(runs) == 1:
            told = json.loads(result.stdout)
            assert (told["run"], told["members"][0]["state"]) == ("alpha", "following")
        else:
            assert result.returncode == 2
            assert "one of alpha, beta" in result.stderr


async def test_garbage_on_the_run_does_not_disturb(
    broker: Broker, bus: NatsBus, run: str, tmp_path: Path
) -> None:
    """Undecodable bytes on every subject of the run: what is sound is shown all the same."""

    async def talk() -> None:
        beat = Beat(sender=Sender("trainer", "t"), epoch=1, version=3)
        while True:
            for subject in ("trainer.control", "worker.w.control", "metrics.w", "events"):
                await bus.publish(f"sparsecast.{run}.{subject}", b"\xff\x00garbage")
            await bus.publish(f"sparsecast.{run}.trainer.control", encode(beat))
            await asyncio.sleep(0.05)

    talking = asyncio.create_task(talk())
    result = await asyncio.to_thread(
        top, "--run", run, "--bus", broker.url, "--once", "--wait-s", "1", home=tmp_path
    )
    talking.cancel()
    assert result.returncode == 0, result.stderr
    assert "alive" in result.stdout
    assert "no worker heard yet" in result.stdout

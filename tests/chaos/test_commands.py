"""The processes that users start: `sparsecast broker`, `sparsecast worker`, and a script that
publishes."""

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from sparsecast.messages.metrics import WorkerMetrics
from sparsecast.pipeline.bus.nats import connect

from ..runs import Ear
from ..servers import Proxy
from .servers import SPARSECAST, Server, command, environment

RUN = "chaos"
SCRIPT = Path(__file__).with_name("script.py")


class Program:
    """One process, and what it says."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = ""
        self._news = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while data := await self.process.stdout.read(1 << 16):
            self.said += data.decode()
            self._news.set()
        self._news.set()

    async def says(self, pattern: str, timeout_s: float = 90.0) -> re.Match[str]:
        """Wait for it to say this."""
        try:
            async with asyncio.timeout(timeout_s):
                while (found := re.search(pattern, self.said)) is None:
                    assert not self._reading.done(), f"it has ended:\n{self.said}"
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise TimeoutError(f"no {pattern!r} in what it has said:\n{self.said}") from None
        return found

    async def ends(self, timeout_s: float = 60.0) -> int:
        """SIGTERM; its exit code."""
        self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), timeout_s)

    async def kill(self) -> None:
        """SIGKILL. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        await self._reading


class Stage:
    """A broker, one way to it that stays, and the programs that were started."""

    def __init__(self, folder: Path, stack: contextlib.AsyncExitStack) -> None:
        self.folder = folder
        self.died: list[str] = []
        self.broker = Server(folder, self.died.append)
        self.way = Proxy("")
        self._stack = stack

    async def start(self, program: Path, *arguments: str) -> Program:
        process = await asyncio.create_subprocess_exec(
            *command(program, *arguments),
            env=environment(self.folder) | {"OMP_NUM_THREADS": "1"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        started = Program(process)
        self._stack.push_async_callback(started.kill)
        return started

    async def worker(self, name: str) -> Program:
        model = str(self.folder / "model")
        options = ("--run", RUN, "--bus", self.way.url, "--name", name, "--model", model)
        return await self.start(SPARSECAST, "worker", *options)

    async def trainer(self) -> Program:
        return await self.start(SCRIPT, str(self.folder / "model"), RUN, self.way.url)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """A tiny model on the disk, and a broker."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    async with contextlib.AsyncExitStack() as stack:
        stage = Stage(tmp_path, stack)
        stack.push_async_callback(stage.broker.kill)
        await stage.broker.start()
        await stack.enter_async_context(stage.way)
        stage.way.lead_to(stage.broker.url)
        yield stage


@pytest.mark.timeout(300)
async def test_what_users_start_survives_what_happens_to_it(stage: Stage) -> None:
    """A worker is killed and started again; the broker is stopped, killed and comes back; the
    trainer is killed, and another one follows; the other worker is stopped for a while. At the end
    both have proven the newest version, the log proves every one, and all leave in order."""
    first, second = await stage.worker("w0"), await stage.worker("w1")
    trainer = await stage.trainer()
    ear, bus = Ear(), await connect(stage.way.url, name="ear")
    await bus.subscribe(f"sparsecast.{RUN}.metrics.*", ear.hear)
    await asyncio.gather(first.says("following run chaos"), second.says("following run chaos"))
    for name in ("w0", "w1"):
        await ear.until(WorkerMetrics, worker=name, source="window", verified=True)

    await second.kill()
    second = await stage.worker("w1")
    stage.broker.signal(signal.SIGSTOP)
    await asyncio.sleep(1.0)
    stage.broker.signal(signal.SIGCONT)
    await trainer.kill()
    trainer = await stage.trainer()
    await stage.broker.kill()
    await stage.broker.start()
    stage.way.lead_to(stage.broker.url)
    version = int((await trainer.says(r"open (\d+)"))[1])
    assert version > 1
    first.process.send_signal(signal.SIGSTOP)
    await second.says(r"following run chaos, at version")
    first.process.send_signal(signal.SIGCONT)

    assert await trainer.ends(80.0) == 0
    last = await trainer.says(r"last (\d+) \['w0', 'w1'\] {}")
    newest = int(last[1])
    for name in ("w0", "w1"):
        await ear.until(WorkerMetrics, worker=name, version=newest, verified=True, mismatches=0)
    verify = await stage.start(SPARSECAST, "log", "verify", "--run", RUN, "--bus", stage.way.url)
    assert await asyncio.wait_for(verify.process.wait(), 90) == 0, verify.said
    for worker in (first, second):
        assert await worker.ends() == 0
        await worker.says(rf"left at version {newest}, 0 mismatches")
    await bus.close(0.5)

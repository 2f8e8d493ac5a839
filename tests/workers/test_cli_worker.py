"""`sparsecast worker` that catches up: a bar on a terminal, two lines elsewhere."""

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import sparsecast
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.workers.bar import Bar
from sparsecast.workers.catching import Progress

AT = Progress(
    base_version=3, version=3, target=9, nbytes=25_000_000, of_nbytes=100_000_000, entries=1,
    of_entries=6, elapsed_s=2.5, notable=True,
)  # fmt: skip
SEQUENCES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Screen(io.StringIO):
    """What a terminal gets."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def bar(file: io.StringIO, said: list[str]) -> Bar:
    """A bar on a terminal of 100 columns, or on none."""
    console = Console(file=file, force_terminal=True, width=100, legacy_windows=False)
    return Bar(said.append, console)


def test_a_bar_has_versions_bytes_rate_and_time_left() -> None:
    """Its figures move, it says when only the proof is left, and a line of what came of it stays
    when it is gone."""
    screen, said = Screen(), []
    shown = bar(screen, said)
    for nbytes in (25_000_000, 50_000_000, 100_000_000):
        assert shown.show(replace(AT, nbytes=nbytes), verified=3, status="")
    assert said == []
    assert not shown.show(None, verified=9, status="")
    text = SEQUENCES.sub("", screen.getvalue())
    assert "worker: version 3 → version 9" in text
    assert "25.0/100.0 MB" in text
    assert "50.0/100.0 MB" in text
    assert "B/s" in text
    assert re.search(r"\d:\d\d:\d\d|-:--:--", text)
    assert "worker: proving version 9" in text
    assert said == ["caught up to version 9: 100 MB in 2.5 s"]


def test_without_a_terminal_there_are_two_lines() -> None:
    """The same on a pipe, though the environment asks for colours: a line at the beginning, one at
    the end, and no bytes for a terminal."""
    pipe, said = io.StringIO(), []
    shown = bar(pipe, said)
    for nbytes in (0, 25_000_000, 100_000_000):
        assert shown.show(replace(AT, nbytes=nbytes, base_version=None), verified=None, status="")
    assert not shown.show(None, verified=9, status="")
    assert not shown.show(None, verified=9, status="")
    assert pipe.getvalue() == ""
    assert said == [
        "catching up from a full copy to version 9: 100 MB of the log",
        "caught up to version 9: 100 MB in 2.5 s",
    ]


@pytest.mark.parametrize("file", [Screen, io.StringIO], ids=["terminal", "pipe"])
def test_a_catch_up_that_breaks_off_says_why(file: type[io.StringIO]) -> None:
    """The worker is not where it was to be when the catch-up is over: the status says why."""
    said: list[str] = []
    shown = bar(file(), said)
    shown.show(AT, verified=3, status="")
    shown.show(None, verified=None, status="waiting for an anchor from the log; the log: a hole")
    assert said[-1] == (
        "catching up to version 9 broke off: waiting for an anchor from the log; the log: a hole"
    )


@pytest.mark.parametrize("file", [Screen, io.StringIO], ids=["terminal", "pipe"])
def test_a_short_one_leaves_no_trace(file: type[io.StringIO]) -> None:
    """A small patch from the log: nothing is drawn, nothing said."""
    drawn, said = file(), []
    shown = bar(drawn, said)
    assert not shown.show(replace(AT, notable=False), verified=3, status="")
    assert not shown.show(None, verified=9, status="")
    shown.clear()
    assert (drawn.getvalue(), said) == ("", [])


# ---- the command itself


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 on disk whose full copy is worth telling: 74 MB."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=72_000, hidden_size=512, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("qwen2")
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


class Terminal:
    """A pseudo-terminal of 100 columns, and all that was written to it."""

    def __init__(self) -> None:
        self._ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.written = b""
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._ours, 65536):
                self.written += data
        except OSError:  # the last one who had the other end has closed it
            pass

    def text(self) -> str:
        """Without the sequences that move the cursor and colour."""
        return SEQUENCES.sub("", self.written.decode(errors="replace")).replace("\r", "\n")

    def close(self) -> None:
        """After the process has ended."""
        self._reading.join(5.0)
        os.close(self._ours)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """A terminal for one process."""
    terminal = Terminal()
    yield terminal
    terminal.close()


def until(condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_late_worker_shows_how_far_it_is(
    broker: Broker, run: str, model: Path, tmp_path: Path, terminal: Terminal
) -> None:
    """A worker with the checkpoint that the trainer started from comes when its weights are others:
    it draws a bar on its terminal, says that it has caught up, and ends in order; stdout is left to
    whoever wants to read something there."""
    from sparsecast.workers.huggingface import HuggingFaceEngine

    tensors = dict(HuggingFaceEngine.load(str(model)).tensors())
    for tensor in tensors.values():
        tensor += 1
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SPARSECAST")}
    command = [sys.executable, "-m", "sparsecast.workers.cli", "worker", "--run", run]
    command += ["--model", str(model), "--bus", broker.url]
    with sparsecast.Publisher(tensors, run=run, bus=broker.url):
        process = subprocess.Popen(
            command, env=kept | {"TERM": "xterm-256color", "XDG_RUNTIME_DIR": str(tmp_path)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal.theirs,
        )  # fmt: skip
        os.close(terminal.theirs)
        try:
            until(lambda: "following run" in terminal.text())
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=20.0) == (b"", None)
            assert process.returncode == 0
        finally:
            process.kill()
            process.communicate()
    drawn = terminal.text()
    assert re.search("worker: (a full copy →|proving) version 0", drawn), drawn
    assert re.search(r"\d/\d+\.\d MB", drawn)
    assert "B/s" in drawn
    assert re.search(r"worker: caught up to version 0: \d+\.\d MB in \d+\.\d s", drawn)
    assert b"\x1b[?25h" in terminal.written  # the cursor is back
    assert "worker: left at version 0, 0 mismatches" in drawn

"""`sparsecast demo` as people run it: real processes, to the end, interrupted, and with deaths."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(150)

WORKER_KEYS = {"applied", "verified", "mismatches", "version"}


def environment(home: Path) -> dict[str, str]:
    """This process's, without settings of its own, temporary files and advertisements in `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SPARSECAST")}
    places = {"XDG_RUNTIME_DIR": str(home), "TMPDIR": str(home)}
    return kept | places | {"PYTHONUNBUFFERED": "1", "TERM": "xterm"}


def command(run: str, *arguments: str) -> list[str]:
    """The command line of a demo."""
    return [
        *(sys.executable, "-m", "sparsecast.workers.cli", "demo", "--run", run),
        *("--plain", *arguments),
    ]


def processes_of(run: str, home: Path) -> list[int]:
    """Every process that belongs to the run: its workers by their name, its broker by its files."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace")
            if f"\0{run}\0" in words or str(home) in words:
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def none_left(run: str, home: Path, *, within_s: float = 10.0) -> bool:
    """Whether every process of the run ends within some seconds."""
    deadline = time.monotonic() + within_s
    while processes_of(run, home):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Running:
    """A demo whose lines are read as they come."""

    def __init__(self, run: str, home: Path, *arguments: str) -> None:
        self.run = run
        self.home = home
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command(run, *arguments),
            env=environment(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read lines until one matches; the end of the output before that is a failure."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(pattern, line)
            if found:
                return found
        pytest.fail(f"{pattern!r} was never said:\n{''.join(self.lines)}")

    def end(self, timeout_s: float) -> tuple[int, str]:
        """Wait for the end; the exit code and all that was said."""
        rest, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, "".join(self.lines) + rest


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A place for the demo's files; what is left of its processes is killed."""
    yield tmp_path
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"TMPDIR={tmp_path}\0".encode() in path.read_bytes() + b"\0":
                os.kill(int(path.parent.name), signal.SIGKILL)


def test_a_short_demo_is_proven_and_leaves_nothing(home: Path, run: str) -> None:
    """Four warm-up and six RL updates, two workers: exit code 0, the JSON as promised, every
    version proven on both workers, no process and no file left."""
    outcome = home / "outcome.json"
    result = subprocess.run(
        command(run, "--updates", "6", "--warmup", "4", "--device", "cpu", "--json", str(outcome)),
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert none_left(run, home)
    told = json.loads(outcome.read_bytes())
    outcome.unlink()
    assert told.keys() == {
        "run", "updates", "rl_updates", "window", "devices", "workers", "density", "nbytes",
        "round_ms", "reward",
    }  # fmt: skip
    assert (told["run"], told["updates"], told["rl_updates"]) == (run, 10, 6)
    assert told["window"] == "gloo"
    assert told["devices"] == {"trainer": "cpu", "worker-0": "cpu", "worker-1": "cpu"}
    assert told["workers"].keys() == {"worker-0", "worker-1"}
    for worker in told["workers"].values():
        assert worker.keys() == WORKER_KEYS
        # Rounds of the warm-up may be merged; on-policy RL waits for each.
        assert 7 <= worker["applied"] <= 10
        assert (worker["verified"], worker["version"]) == (worker["applied"], 10)
        assert worker["mismatches"] == 0
    assert told["density"].keys() == {"warmup_p50", "rl_p50"}
    assert told["density"]["warmup_p50"] > 0.3 > told["density"]["rl_p50"]
    assert 0 < told["nbytes"]["total"] < told["nbytes"]["dense_total"]
    assert 0 < told["round_ms"]["p50"] <= told["round_ms"]["p99"]
    assert told["reward"].keys() == {"first", "last"}
    for step in ("broker", "model", "starting the workers", "claiming", "waiting for the workers"):
        assert re.search(rf"{step}[^\n]*: [^\n]*, \d+\.\d s\n", result.stdout), step
    assert f"top --run {run} --bus nats://127.0.0.1:" in result.stdout
    assert "devices: trainer and 2 workers on cpu (as asked)" in result.stdout
    assert "updates went by gloo; trainer and 2 workers on cpu" in result.stdout
    assert "proven: 2 workers ended at version 10" in result.stdout
    assert list(home.glob("sparsecast*")) == []


def test_a_worker_that_dies_is_named_and_the_others_go_on(home: Path, run: str) -> None:
    """Updates travel over the bus, one worker is killed in the RL phase: training goes on with
    the other, the demo says who died and how, and does not call itself proven."""
    demo = Running(run, home, "--updates", "8", "--warmup", "2", "--window", "bus")
    pid = int(demo.read_until(r"worker-0 \(pid (\d+)\)")[1])
    demo.read_until(r"RL 1/8")
    os.kill(pid, signal.SIGKILL)
    code, said = demo.end(100)
    assert code == 1, said
    assert "worker-0 ended with SIGKILL" in said
    assert "RL 8/8" in said
    assert "window bus" in said
    assert "NOT PROVEN: worker-0" in said
    assert "NOT PROVEN: worker-1" not in said
    assert "Traceback" not in said
    assert none_left(run, home)


def test_a_live_demo_answers_and_is_not_disturbed(home: Path, run: str) -> None:
    """While a demo trains: `ask` is answered; a second demo on its run and a second worker under
    the name of the first are refused with exit code 4. Then Ctrl-C: exit code 130, and nothing
    is left behind."""
    demo = Running(run, home, "--updates", "500", "--warmup", "500", "--workers", "1")
    url = demo.read_until(r"(nats://127\.0\.0\.1:\d+)")[1]
    demo.read_until(r"warm-up 1/500")

    def other(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sparsecast.workers.cli", *arguments, "--bus", url],
            env=environment(home),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    asked = other("ask", "5 2 9 1 3", "--run", run, "--json")
    assert asked.returncode == 0, asked.stderr
    reply = json.loads(asked.stdout)
    assert reply.keys() == {
        "text", "tokens", "logprobs", "spans", "worker", "version", "finish",
    }  # fmt: skip
    assert (reply["worker"], len(reply["logprobs"])) == ("worker-0", len(reply["tokens"]))
    assert reply["spans"][-1][1:] == [len(reply["tokens"]), reply["version"]]

    second = other("demo", "--plain", "--run", run, "--updates", "1")
    assert second.returncode == 4, second.stdout + second.stderr
    assert f"run {run!r} is held by trainer" in second.stderr
    assert "starting the workers" not in second.stdout

    (model,) = home.glob("sparsecast-demo-*/model")
    namesake = other("worker", "--run", run, "--name", "worker-0", "--model", str(model))
    assert namesake.returncode == 4, namesake.stderr
    assert f"worker name 'worker-0' is in use in run {run!r}" in namesake.stderr

    demo.process.send_signal(signal.SIGINT)
    code, said = demo.end(30)
    assert code == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert none_left(run, home, within_s=2.0)
    assert list(home.glob("sparsecast*")) == []


@pytest.mark.gpu(2)
def test_a_demo_on_two_gpus_goes_by_nccl(home: Path, run: str) -> None:
    """Two GPUs, nothing asked for: the trainer on the one, a worker on the other, NCCL between
    them, and every version proven."""
    outcome = home / "outcome.json"
    demo = Running(run, home, "--updates", "6", "--warmup", "4", "--json", str(outcome))
    code, said = demo.end(140)
    assert code == 0, said
    told = json.loads(outcome.read_bytes())
    assert told["window"] == "nccl", said
    assert told["devices"]["trainer"] == "cuda:0"
    assert told["devices"]["worker-0"] == "cuda:1"
    assert none_left(run, home)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["terminate", "hang-up"])
def test_a_demo_ended_while_it_sets_up_leaves_nothing(
    home: Path, run: str, number: signal.Signals
) -> None:
    """SIGTERM or a closed terminal while the workers start: exit code 130, nothing left behind."""
    demo = Running(run, home, "--workers", "1")
    demo.read_until(r"starting the workers: ")
    demo.process.send_signal(number)
    code, said = demo.end(30)
    assert code == 130, said
    assert "Traceback" not in said
    assert none_left(run, home, within_s=2.0)
    assert list(home.glob("sparsecast*")) == []


def test_a_worker_that_dies_before_it_joined_ends_the_demo(home: Path, run: str) -> None:
    """A worker is killed while it starts: exit code 1 at once, with how it ended, and where its
    last words are kept."""
    demo = Running(run, home)
    pid = int(demo.read_until(r"worker-1 \(pid (\d+)\)")[1])
    os.kill(pid, signal.SIGKILL)
    code, said = demo.end(20)
    assert code == 1, said
    assert "a worker that is needed has ended\nworker-1 ended with SIGKILL" in said
    assert "Traceback" not in said
    kept = re.search(r"what the workers said: (\S+)", said)
    assert kept is not None
    assert (Path(kept[1]) / "worker-1.log").exists()
    assert none_left(run, home, within_s=2.0)


def test_an_outcome_that_cannot_be_written_is_told_before_the_start(home: Path, run: str) -> None:
    """--json into a folder that is not there: exit code 2 at once, not after three minutes."""
    demo = Running(run, home, "--json", str(home / "nowhere" / "o.json"))
    code, said = demo.end(20)
    assert code == 2
    assert "o.json cannot be written" in said
    assert "loading torch" not in said


def test_a_killed_demo_leaves_no_process_behind(home: Path, run: str) -> None:
    """SIGKILL to the demo: it can clean up nothing, and yet workers and broker end."""
    demo = Running(run, home, "--workers", "1")
    demo.read_until(r"warm-up 1/")
    assert len(processes_of(run, home)) >= 3
    demo.process.kill()
    demo.end(10)
    assert none_left(run, home, within_s=20.0)


def test_the_live_picture_stays_on_the_terminal(home: Path, run: str) -> None:
    """On a terminal of 80 columns: a picture that redraws itself, and its last state stays."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    arguments = command(run, "--updates", "2", "--warmup", "1", "--workers", "1")
    arguments.remove("--plain")
    process = subprocess.Popen(
        arguments,
        env=environment(home) | {"COLUMNS": "80", "LINES": "40"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    seen = b""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:
                break
        elif process.poll() is not None:
            break
    os.close(master)
    assert process.wait(10) == 0, seen.decode(errors="replace")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert "✓" in text
    assert "waiting for the workers" in text
    last = text[text.rindex("sparsecast demo  run") :]
    assert "RL update 2 of 2" in last
    assert re.search(r"reward +[▁▂▃▄▅▆▇█]+ ", last)
    assert re.search(r"worker-0 +3 +3 +\d+ +\d+ +0 +following", last)
    assert "in a second terminal:" in text
    assert "proven: 1 worker" in last
    assert max(len(line) for line in last.splitlines()) <= 130
    assert none_left(run, home)

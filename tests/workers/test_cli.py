"""The command line: what it says, what it exits with, and where its settings come from."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsecast.pipeline.bus.broker import Broker
from sparsecast.workers.cli import app, main

LOG = ("log ls", "log show", "log verify", "log export", "log prune")
COMMANDS = ("demo", "worker", "ask", "broker", "top", *LOG, "doctor")
DEAD = "nats://127.0.0.1:9"


def environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, without settings of its own and with a private place for advertisements."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SPARSECAST")}
    return kept | {"XDG_RUNTIME_DIR": str(home), "COLUMNS": "100"} | dict(more or {})


def sparsecast(
    *arguments: str, home: Path, more: Mapping[str, str] | None = None, timeout_s: float = 30.0
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "sparsecast.workers.cli", *arguments],
        env=environment(home, more),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For commands that run in this process: no settings, and no live broker."""
    for key in [key for key in os.environ if key.startswith("SPARSECAST")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    """--help tells the flags and the variables behind them."""
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "SPARSECAST_" in result.output
    assert f"sparsecast {command}" in result.output.replace("root", "sparsecast")


def test_the_help_documents_the_exit_codes() -> None:
    """Every exit code is in the help, and every command in the list."""
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for meaning in ("0 done", "1 failed", "2 usage", "3 the bus", "4 refused", "5 nothing came"):
        assert meaning in text
    for command in {command.split()[0] for command in COMMANDS}:
        assert re.search(rf"^ +{command} ", result.output, re.MULTILINE)


def test_help_and_usage_do_not_wait_for_torch() -> None:
    """Importing the command line, and asking every command for help, loads nothing heavy."""
    script = """
import sys
from sparsecast.workers.cli import app
for command in sys.argv[1:]:
    try:
        app([*command.split(), "--help"])
    except SystemExit as ended:
        assert not ended.code
heavy = [name for name in ("torch", "transformers", "nats", "rich") if name in sys.modules]
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, *COMMANDS],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["frobnicate"], "No such command 'frobnicate'", id="command"),
        pytest.param(["top", "--frob"], "No such option: --frob", id="option"),
        pytest.param(["worker", "--run", "r"], "Missing option '--model'", id="missing"),
        pytest.param(["top", "--run", "a.b"], "run 'a.b' cannot be used", id="run"),
        pytest.param(
            ["worker", "--run", "r", "--model", "m", "--name", "a b"],
            "worker 'a b' cannot be used",
            id="worker",
        ),
        pytest.param(["top", "--run", "r", "--json"], "--json needs --once", id="json"),
        pytest.param(["ask", "hello", "--run", "r"], "sparsecast broker", id="no-bus"),
        pytest.param(
            ["top", "--bus", "nats://me:hunter2@h:1"], "credentials on a command line", id="secret"
        ),
        pytest.param(["top", "--config", "/nowhere.toml"], "/nowhere.toml", id="config"),
        pytest.param(["demo", "--updates", "0"], "--updates", id="range"),
        pytest.param(["demo", "--window", "nvlink"], "--window", id="choice"),
        pytest.param(
            ["worker", "--run", "r", "--model", "m", "--bus", DEAD, "--device", "cuda:77"],
            "device 'cuda:77'",
            id="no-such-gpu",
        ),
        pytest.param(
            ["worker", "--run", "r", "--model", "m", "--bus", DEAD, "--device", "tpu"],
            "device 'tpu': expected cpu, cuda or cuda:N",
            id="device",
        ),
        pytest.param(
            ["worker", "--run", "r", "--model", "m", "--bus", DEAD, "--window", "nccl"],
            "use --device cuda:N",
            id="nccl-on-cpu",
        ),
        pytest.param(
            ["worker", "--run", "r", "--model", "m", "--bus", DEAD, "--follow", "every:3"],
            "for workers of role 'evaluation'",
            id="follow",
        ),
        pytest.param(["log", "ls", "--run", "r", "--log", "tape"], "dir:/PATH", id="log"),
        pytest.param(
            ["log", "ls", "--run", "r", "--log", "dir:/nowhere"], "mkdir -p /nowhere", id="log-dir"
        ),
        pytest.param(["log", "verify", "--run", "r"], "sparsecast broker", id="log-no-bus"),
        pytest.param(
            ["log", "show", "--run", "r", "--bus", DEAD], "argument 'version'", id="log-version"
        ),
        pytest.param(
            ["log", "export", "--run", "r", "--bus", DEAD, "--to", "/nowhere/m.safetensors"],
            "mkdir -p /nowhere",
            id="log-to",
        ),
        pytest.param(["doctor", "--device", "cpu,cpu,cpu"], "with a comma between", id="devices"),
    ],
)
def test_wrong_usage_is_told_in_a_line_and_exits_with_2(
    clean: None, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    """A slip on the command line: exit code 2, what is wrong on stderr, no traceback, no secret."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    stdout, stderr = capsys.readouterr()
    assert ended.value.code == 2
    assert says in stderr
    assert "Traceback" not in stderr
    assert "hunter2" not in stderr
    assert stdout == ""


def test_an_error_of_ours_is_one_line_in_a_real_process(tmp_path: Path) -> None:
    """The module run as a program ends as the console script does."""
    result = sparsecast("top", "--run", "a.b", home=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "sparsecast: run 'a.b' cannot be used: names have 1 to 64 letters, digits, '-' or '_'"
    ]


def test_a_bus_that_is_not_there_exits_with_3_within_its_deadline(tmp_path: Path) -> None:
    """Nobody listens at the URL: said with the URL, after some five seconds."""
    began = time.monotonic()
    result = sparsecast("top", "--run", "r", "--once", "--bus", DEAD, home=tmp_path)
    assert result.returncode == 3
    assert f"bus {DEAD} is not available" in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - began < 20


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    """One setting in three places: the run that top asks for shows which one counted."""
    path = tmp_path / "s.toml"
    with Broker() as url:
        path.write_text(f'run = "from-file"\nbus = "{url}"\n[top]\nwait-s = 0.2\n')
        runs = []
        for more, flags in (
            ({}, []),
            ({"SPARSECAST_RUN": "from-environment"}, []),
            ({"SPARSECAST_RUN": "from-environment"}, ["--run", "from-flag"]),
        ):
            result = sparsecast(
                "top", "--once", *flags, home=tmp_path,
                more={"SPARSECAST_CONFIG": str(path), **more},
            )  # fmt: skip
            assert result.returncode == 5
            found = re.search(r"a word of run '([a-z-]+)' not within 0\.2 s", result.stderr)
            assert found is not None, result.stderr
            runs.append(found[1])
    assert runs == ["from-file", "from-environment", "from-flag"]


def test_credentials_may_come_from_the_environment_and_stay_unsaid(tmp_path: Path) -> None:
    """The variable holds a URL with a password: it is used, and no output repeats it."""
    with Broker() as url:
        secret = url.replace("nats://", "nats://me:hunter2@")
        result = sparsecast(
            "top", "--run", "r", "--once", "--wait-s", "0.2", home=tmp_path,
            more={"SPARSECAST_BUS": secret},
        )  # fmt: skip
    assert result.returncode == 5
    assert url in result.stderr
    assert "hunter2" not in result.stderr + result.stdout


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    """SPARSECAST_DEBUG=1: an error of ours comes with where it was raised."""
    result = sparsecast("top", "--run", "a.b", home=tmp_path, more={"SPARSECAST_DEBUG": "1"})
    assert "Traceback" in result.stderr
    assert "InvalidName" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["interrupt", "terminate"])
def test_the_broker_runs_until_it_is_told_to_end(tmp_path: Path, number: signal.Signals) -> None:
    """`sparsecast broker`: prints where it is and what to type, is found, and ends in order."""
    with subprocess.Popen(
        [sys.executable, "-m", "sparsecast.workers.cli", "broker"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().removeprefix("broker: ").strip()
            assert f"sparsecast top --bus {url} --run RUN" in process.stdout.readline()
            host, port = url.removeprefix("nats://").split(":")
            socket.create_connection((host, int(port)), timeout=2).close()
            found = sparsecast("top", "--run", "r", "--once", "--wait-s", "0.1", home=tmp_path)
            assert found.returncode == 5
            assert f"bus: {url} (the live broker of this user, pid " in found.stderr
            process.send_signal(number)
            assert process.wait(10) == 0
        finally:
            process.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=2)


def test_a_broker_whose_server_dies_says_so(tmp_path: Path) -> None:
    """Someone kills the nats-server: the command ends with the code for a bus that is away."""
    with subprocess.Popen(
        [sys.executable, "-m", "sparsecast.workers.cli", "broker"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            advertised = (tmp_path / "sparsecast-broker.json").read_text()
            pid = re.search(r'"pid": (\d+)', advertised)
            assert pid is not None
            os.kill(int(pid[1]), signal.SIGKILL)
            assert process.wait(10) == 3
            assert process.stderr is not None
            assert "the embedded broker ended" in process.stderr.read()
        finally:
            process.kill()


def test_a_model_that_is_not_there_is_told_with_the_way_out(tmp_path: Path) -> None:
    """`sparsecast worker --model ./nowhere`: the error says what is missing; exit code 1."""
    with Broker() as url:
        result = sparsecast(
            "worker", "--run", "r", "--model", "./nowhere", "--bus", url, home=tmp_path
        )
    assert result.returncode == 1
    assert "there is no directory './nowhere'" in result.stderr
    assert "Traceback" not in result.stderr

"""The command line: demo, worker, ask, broker, top, log (logs.py), runs (runs.py), doctor.

Nothing heavy is imported before a command needs it: `--help` and usage errors come at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..messages import errors
from . import logs, runs
from .devices import count, index_of, resolve
from .options import (
    Bus,
    Config,
    DemoDevice,
    Exit,
    LogTiers,
    RoleChoice,
    Run,
    WindowChoice,
    asyncio_run,
    bus_of,
    check_bus,
    check_devices,
    check_name,
    exit_code,
)
from .tiers import DEFAULT_LOG

EPILOG = (
    "Settings come from flags, then SPARSECAST_… variables (SPARSECAST_RUN for --run), then a TOML "
    "file (--config or SPARSECAST_CONFIG: keys at the top level for every command, a table for one "
    "command). Exit codes: 0 done, 1 failed, 2 usage or settings, 3 the bus is not available, "
    "4 refused (name in use, run held by another trainer, another model), "
    "5 nothing came within the deadline, 130 interrupted."
)

app = typer.Typer(
    name="sparsecast",
    help="Lossless sparse weight sync for online RL, every version proven bit-exact.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# ---- commands


@app.command()
def demo(
    updates: Annotated[
        int, typer.Option(envvar="SPARSECAST_UPDATES", min=1, help="RL updates.")
    ] = 500,
    warmup: Annotated[
        int, typer.Option(envvar="SPARSECAST_WARMUP", min=0, help="Supervised updates before.")
    ] = 240,
    workers: Annotated[
        int | None,
        typer.Option(
            envvar="SPARSECAST_WORKERS", min=1, max=16,
            help="Inference workers. Default: 2, or 1 on two GPUs (NCCL takes one a process).",
        ),
    ] = None,
    device: Annotated[
        DemoDevice,
        typer.Option(envvar="SPARSECAST_DEVICE", help="auto: the GPUs if there are any."),
    ] = DemoDevice.AUTO,
    window: Annotated[
        WindowChoice,
        typer.Option(envvar="SPARSECAST_WINDOW", help="The road of the updates."),
    ] = WindowChoice.AUTO,
    seed: Annotated[
        int, typer.Option(envvar="SPARSECAST_SEED", min=0, help="Weights, prompts, samples.")
    ] = 0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the outcome to this file as JSON.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Lines instead of a live view (as when piped).")
    ] = False,
    run: Annotated[
        str | None,
        typer.Option(
            "--run", envvar="SPARSECAST_RUN", callback=check_name("run"), help="Default: demo-…"
        ),
    ] = None,
    bus: Annotated[
        str | None,
        typer.Option(
            "--bus",
            envvar="SPARSECAST_BUS",
            callback=check_bus,
            help="URL of a NATS server with JetStream. Not given: an embedded one.",
        ),
    ] = None,
    config: Config = None,
) -> None:  # fmt: skip
    """Watch online RL on this machine, every update proven.

    One trainer and real workers, on a small transformer that learns to sort digits. With two or
    more GPUs the trainer is on the first, each worker on one of its own, and updates go by NCCL;
    with one GPU all share it, and updates go by gloo.

    Exit code 0 only if every version that a worker applied was verified there and is the
    trainer's. Keys of the JSON: run, updates, rl_updates, window, devices {trainer, name: …},
    workers {name: {applied, verified, mismatches, version}}, density {warmup_p50, rl_p50},
    nbytes {total, dense_total}, round_ms {p50, p99}, reward {first, last}.
    """
    from .demo.play import DemoOptions
    from .demo.run import run_demo

    options = DemoOptions(
        updates=updates, warmup=warmup, workers=workers, device=device.value, window=window.value,
        seed=seed, json=json, plain=plain, run=run, bus=bus,
    )  # fmt: skip
    raise typer.Exit(run_demo(options))


@app.command()
def worker(
    run: Run,
    model: Annotated[
        str,
        typer.Option(envvar="SPARSECAST_MODEL", help="Directory of a Hugging Face causal LM."),
    ],
    name: Annotated[
        str,
        typer.Option(
            envvar="SPARSECAST_NAME", callback=check_name("worker"), help="Unique within the run."
        ),
    ] = "worker-0",
    bus: Bus = None,
    device: Annotated[
        str, typer.Option(envvar="SPARSECAST_DEVICE", help="cpu, cuda or cuda:N.")
    ] = "cpu",
    window: Annotated[
        WindowChoice,
        typer.Option(envvar="SPARSECAST_WINDOW", help="The road that this worker offers."),
    ] = WindowChoice.AUTO,
    role: Annotated[
        RoleChoice,
        typer.Option(
            envvar="SPARSECAST_ROLE", help="evaluation: takes versions from the log, delays nobody."
        ),
    ] = RoleChoice.ROLLOUT,
    follow: Annotated[
        str,
        typer.Option(
            envvar="SPARSECAST_FOLLOW",
            help="Which versions: latest, or with --role evaluation every:K or version:N.",
        ),
    ] = "latest",
    max_lag: Annotated[
        int | None,
        typer.Option(
            envvar="SPARSECAST_MAX_LAG", min=0,
            help="Refuse to generate when more versions behind the trainer than this.",
        ),
    ] = None,
    log: LogTiers = DEFAULT_LOG,
    offline_s: Annotated[
        float | None,
        typer.Option(
            envvar="SPARSECAST_OFFLINE_S", min=0.1,
            help="Refuse to generate when the trainer was not heard for so many seconds.",
        ),
    ] = None,
    until_stdin_closes: Annotated[bool, typer.Option("--until-stdin-closes", hidden=True)] = False,
    config: Config = None,
) -> None:  # fmt: skip
    """Serve a model and follow a run.

    Generates on request and applies every update. Ends in order on SIGTERM or Ctrl-C: finishes
    what it generates, and leaves the run.
    """
    url = bus_of(bus).url
    device = resolve(device, count() if index_of(device) is not None else 0)
    if device == "cpu" and window is WindowChoice.NCCL:
        raise errors.SettingsError(
            "--window nccl: NCCL carries tensors on GPUs; use --device cuda:N"
        )
    from ..pipeline.core.follow import follow_of

    follow_of(role.value, follow)
    from .service import WorkerOptions, serve

    options = WorkerOptions(
        run=run, bus=url, name=name, model=model, device=device, window=window.value,
        role=role.value, follow=follow, max_lag=max_lag, offline_s=offline_s, log=log,
    )  # fmt: skip
    if until_stdin_closes:
        _end_with_stdin()
    raise typer.Exit(asyncio_run(serve(options)))


def _end_with_stdin(grace_s: float = 15.0) -> None:
    """End this process when stdin closes: its starter holds the other end, even to a SIGKILL."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(Exit.FAILED)

    threading.Thread(target=watch, name="sparsecast-stdin", daemon=True).start()


@app.command()
def ask(
    prompt: Annotated[str, typer.Argument(help="Text, as the workers' tokenizer reads it.")],
    run: Run,
    bus: Bus = None,
    worker: Annotated[
        str | None,
        typer.Option(
            envvar="SPARSECAST_WORKER", callback=check_name("worker"), help="Ask this one, not any."
        ),
    ] = None,
    role: Annotated[
        RoleChoice,
        typer.Option(envvar="SPARSECAST_ROLE", help="Ask one of these, if not one by its name."),
    ] = RoleChoice.ROLLOUT,
    max_tokens: Annotated[int, typer.Option(envvar="SPARSECAST_MAX_TOKENS", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option(envvar="SPARSECAST_TEMPERATURE", min=0.0, help="0: the likeliest.")
    ] = 0.0,
    timeout_s: Annotated[float, typer.Option(envvar="SPARSECAST_TIMEOUT_S", min=0.1)] = 30.0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    config: Config = None,
) -> None:
    """Ask the workers of a run one thing.

    Prints the answer, and on stderr who gave it from which version of the weights.
    Keys of the JSON: text, tokens, logprobs, spans [[start, stop, version], …], worker, version,
    finish.
    """
    from .ask import ask_once

    choice = bus_of(bus)
    ask_once(
        prompt, run=run, bus=choice.url, worker=worker, role=role.value, max_tokens=max_tokens,
        temperature=temperature, timeout_s=timeout_s, as_json=json,
    )  # fmt: skip


@app.command()
def broker(
    port: Annotated[
        int, typer.Option(envvar="SPARSECAST_PORT", min=-1, max=65535, help="-1: a free one.")
    ] = -1,
    store_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="SPARSECAST_STORE_DIR",
            help="Keep what is stored in this directory. Not given: it goes with the broker.",
        ),
    ] = None,
    config: Config = None,
) -> None:
    """Run an embedded NATS server until Ctrl-C or SIGTERM.

    It listens on the loopback interface. Commands of this user on this machine find it by
    themselves.
    """
    from ..pipeline.bus.broker import Broker

    embedded = Broker(port=port, store_dir=store_dir, advertise=True)
    with _until_signalled() as signalled, embedded as url:
        typer.echo(f"broker: {url}")
        typer.echo(f"watch a run with: sparsecast top --bus {url} --run RUN")
        typer.echo("end with Ctrl-C")
        while not signalled(1.0):
            embedded.check()


@contextlib.contextmanager
def _until_signalled() -> Iterator[Callable[[float], bool]]:
    """Yields a function that waits some seconds for SIGINT or SIGTERM, and tells if one came."""
    read, write = os.pipe()
    before = {
        number: signal.signal(number, lambda *_: os.write(write, b"."))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda timeout_s: bool(select.select([read], [], [], timeout_s)[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


@app.command()
def top(
    run: Annotated[
        str | None,
        typer.Option(
            "--run", envvar="SPARSECAST_RUN", callback=check_name("run"),
            help="Name of the run. Not given: the only one that is heard.",
        ),
    ] = None,
    bus: Bus = None,
    once: Annotated[
        bool, typer.Option("--once", help="Listen, print the table, and end (as when piped).")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="With --once: one JSON object on stdout.")
    ] = False,
    wait_s: Annotated[
        float,
        typer.Option(envvar="SPARSECAST_WAIT_S", min=0.1, help="With --once: listen so long."),
    ] = 4.0,
    config: Config = None,
) -> None:  # fmt: skip
    """Show a live table of a run.

    Every member's version, lag, round times, bytes, share of changed elements, mismatches.
    --once listens until the trainer and at least one member have spoken and nobody new does, for
    --wait-s at the longest; exit code 5 if nobody spoke. Keys of the JSON: run, trainer {state,
    epoch, version, step, heard_s, rounds, round_p50_ms, round_p99_ms, nbytes, dense_nbytes,
    density, encoding, transport, window, members}, members [{name, state, note, version,
    verified, lag, heard_s, rounds, round_p50_ms, round_p99_ms, nbytes, density, mismatches,
    source, follow, caught_up}], events [...]. Times of rounds are known from the rounds heard while
    it listens.
    """
    from .top import show

    if json and not once:
        raise errors.SettingsError("--json needs --once: a live table is for people")
    choice = bus_of(bus)
    asyncio_run(
        show(choice.url, run=run, once=once or not sys.stdout.isatty(), as_json=json, wait_s=wait_s)
    )


app.add_typer(logs.app)
app.add_typer(runs.app)


@app.command()
def doctor(
    bus: Annotated[
        str | None,
        typer.Option(
            "--bus",
            envvar="SPARSECAST_BUS",
            callback=check_bus,
            help="The broker to look at. Not given: the live broker of this user, else an "
            "embedded one.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            envvar="SPARSECAST_DEVICE",
            callback=check_devices,
            help="Of the test round: cpu, cuda:N for both ends, or cuda:N,cuda:M for trainer and "
            "worker. auto: the two GPUs with the best link, the one GPU, or the CPU.",
        ),
    ] = "auto",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    config: Config = None,
) -> None:
    """Say what this machine can do, and why not.

    Looks at torch, Triton and the GPUs, runs diff and apply on each against the reference, asks
    the broker (streams of the test round are removed from it), and lets a trainer and a worker,
    two processes, bring some updates from one device to the other, each proven.

    Exit code 0: all that this machine should do works; 1: something does not, and it is said what
    to do; 2 usage. Keys of the JSON: ok, problems [{check, reason, remedy}], notes [...],
    software {sparsecast, python, platform, torch, cuda, triton, nccl, nccl4py, uvloop, nats_py},
    environment {...}, gpus [{index, name, uuid, memory_nbytes, compute_capability, driver}],
    gpus_listed, pairs [{first, second, peer_access, link}], kernels [{device, backend, exact,
    first_ms, again_ms, reason}], windows [{device, kind, offered, reason}], server {path, version,
    usable, reason}, broker {url, origin, reachable, version, jetstream, max_payload_nbytes,
    request_p50_ms, reason}, round {trainer, worker, expected, window, updates, verified, exact,
    p50_ms, reason}, elapsed_s.
    """
    from .devices import several
    from .doctor import DoctorOptions, run_doctor

    options = DoctorOptions(bus=bus, devices=several(device))
    raise typer.Exit(run_doctor(options, as_json=json, loop=asyncio_run))


def main(arguments: list[str] | None = None) -> None:
    """The console script: an error of ours is one line on stderr and an exit code.

    SPARSECAST_DEBUG=1 shows tracebacks.
    """
    try:
        app(args=arguments, prog_name="sparsecast")
    except errors.SparsecastError as error:
        if os.environ.get("SPARSECAST_DEBUG"):
            raise
        typer.echo(f"sparsecast: {error}", err=True)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)


if __name__ == "__main__":
    main()

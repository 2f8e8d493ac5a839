"""The doctor's findings as a table for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .findings import Findings

GOOD, BAD, NONE = "[green]✓[/]", "[red]✗[/]", "[dim]–[/]"


def chart(found: Findings) -> RenderableType:
    """The table, then what is wrong and what to do, then what to know."""
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    table.add_column()
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for mark, what, text in rows(found):
        table.add_row(mark, what, escape(text))
    lines: list[RenderableType] = [table]
    for problem in found.problems:
        lines.append(Text(f"\n✗ {problem.check}: {problem.reason}", style="red"))
        lines.append(Text(f"  → {problem.remedy}"))
    if found.notes:
        lines.append(Text(""))
        lines += [Text(f"· {note}", style="dim") for note in found.notes]
    end = "all that this machine should do works" if found.ok else "not all is well"
    lines.append(Text(f"\n{end} ({found.elapsed_s:.1f} s)", style="bold"))
    return Group(*lines)


def rows(found: Findings) -> Iterator[tuple[str, str, str]]:
    """Mark, subject and text of every row."""
    software = found.software
    yield GOOD, "sparsecast", f"{software.sparsecast}, Python {software.python}"
    cuda = f", CUDA {software.cuda}" if software.cuda else ""
    yield (
        GOOD if software.torch and not software.torch.startswith("broken") else BAD,
        "torch",
        f"{software.torch or 'not installed'}{cuda}, triton {software.triton or '–'}",
    )
    yield (
        GOOD if software.uvloop else NONE,
        "bus client",
        f"nats-py {software.nats_py or '–'}, uvloop {software.uvloop or '–'}",
    )
    if found.gpus:
        yield (
            GOOD if software.nccl4py else NONE,
            "NCCL",
            f"{software.nccl or '–'}, nccl4py {software.nccl4py or '–'}",
        )
    else:
        yield BAD if found.gpus_listed else NONE, "GPUs", "torch sees none"
    if found.environment:
        told = (f"{key}={value}" for key, value in found.environment.items())
        yield NONE, "environment", ", ".join(told)
    for gpu in found.gpus:
        yield (
            GOOD,
            gpu.device,
            f"{gpu.name}, {gpu.memory_nbytes / 2**30:.0f} GiB, sm {gpu.compute_capability}, "
            f"driver {gpu.driver or '–'}, {gpu.uuid}",
        )
    for pair in found.pairs:
        yield (
            GOOD if pair.peer_access else NONE,
            f"{pair.first} ↔ {pair.second}",
            f"{'peer access' if pair.peer_access else 'no peer access'}, link {pair.link or '?'}",
        )
    for one in found.kernels:
        times = f", {one.first_ms:.0f} ms, again {one.again_ms:.1f} ms" if one.first_ms else ""
        yield (
            GOOD if one.exact else BAD,
            f"data path {one.device}",
            f"{one.backend}: {'exact' if one.exact else one.reason}{times}",
        )
    for device in dict.fromkeys(offer.device for offer in found.windows):
        mine = [offer for offer in found.windows if offer.device == device]
        offered = [offer.kind for offer in mine if offer.offered]
        refused = [f"no {offer.kind}: {offer.reason}" for offer in mine if not offer.offered]
        yield (
            GOOD if offered else BAD,
            f"windows {device}",
            "; ".join([", ".join(offered) or "none", *refused]),
        )
    yield (
        GOOD if found.server.usable else BAD,
        "nats-server",
        f"{found.server.version}, {found.server.path}"
        if found.server.usable
        else found.server.reason,
    )
    if found.broker is not None:
        broker = found.broker
        yield (
            BAD if broker.reason else GOOD,
            "broker",
            f"{broker.url} ({broker.origin}): "
            + (
                broker.reason
                or f"{broker.version}, JetStream, messages to "
                f"{(broker.max_payload_nbytes or 0) / 2**20:g} MiB, "
                f"request p50 {broker.request_p50_ms:.2f} ms"
            ),
        )
    if found.round is None:
        yield BAD, "test round", "not run"
        return
    one_round = found.round
    p50 = f", p50 {one_round.p50_ms:.1f} ms" if one_round.p50_ms is not None else ""
    yield (
        GOOD if one_round.exact and one_round.expected == one_round.window else BAD,
        "test round",
        f"{one_round.trainer} → {one_round.worker}: "
        + (
            f"window {one_round.window}, {one_round.updates} updates, verified to version "
            f"{one_round.verified}{p50}"
            if one_round.exact
            else one_round.reason
        ),
    )

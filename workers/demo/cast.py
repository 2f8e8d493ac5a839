"""Who plays on which device: a pure choice from what is there and what was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ...messages.errors import SettingsError

WORKERS = 2


@dataclass(frozen=True, slots=True)
class Cast:
    """The devices of the trainer and of each worker, the window to ask for, and why so."""

    trainer: str
    workers: tuple[str, ...]
    window: str
    why: str


def choose(
    gpus: int, *, device: str, workers: int | None, window: str, no_nccl: str | None
) -> Cast:
    """Choose for a machine with `gpus` GPUs.

    `device` is auto, cpu or cuda; `workers` None leaves the number to this function; `no_nccl` says
    why there is no NCCL window here, if so. SettingsError for what cannot be.
    """
    if device == "cuda" and not gpus:
        raise SettingsError("--device cuda: torch sees no GPU here; `sparsecast doctor` says more")
    if device == "cpu" or not gpus:
        if window == "nccl":
            raise SettingsError("--window nccl: NCCL carries tensors on GPUs, one GPU a process")
        why = "as asked" if device == "cpu" else "torch sees no GPU"
        return Cast("cpu", ("cpu",) * (workers or WORKERS), window, why)
    others = gpus - 1
    if window == "nccl":
        if no_nccl is not None:
            raise SettingsError(f"--window nccl: {no_nccl}")
        if others < (workers or 1):
            raise SettingsError(
                f"--window nccl: NCCL takes one GPU a process: {(workers or 1) + 1} GPUs are "
                f"needed, {gpus} here"
            )
    if not others:
        why = "one GPU for all: NCCL would take one a process"
        return Cast("cuda:0", ("cuda:0",) * (workers or WORKERS), window, why)
    wanted = workers or WORKERS
    if window not in ("auto", "nccl"):
        return Cast("cuda:0", _spread(wanted, others), window, f"window {window} as asked")
    if no_nccl is not None:
        return Cast("cuda:0", _spread(wanted, others), window, f"without NCCL: {no_nccl}")
    if workers is None:
        fewer = f": {gpus} GPUs leave room for {others}" if others < wanted else ""
        why = f"one GPU a process, for NCCL{fewer}"
        return Cast("cuda:0", _spread(min(wanted, others), others), window, why)
    if workers > others:
        why = f"{workers} workers on {others} of {gpus} GPUs share: not by NCCL"
        return Cast("cuda:0", _spread(workers, others), "gloo", why)
    return Cast("cuda:0", _spread(workers, others), window, "one GPU a process, for NCCL")


def _spread(workers: int, others: int) -> tuple[str, ...]:
    return tuple(f"cuda:{1 + index % others}" for index in range(workers))

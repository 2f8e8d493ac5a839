"""The doctor's look at torch, GPUs, windows and kernels, in a process that may hang or crash.

Run as a module it answers one JSON line, {"step", "device"}, with another, {"result"} or {"error"},
until its stdin closes.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import msgspec

from .findings import Gpu, Kernels, Offer, Pair, Software

if TYPE_CHECKING:
    import torch

#: Shapes of the small model of the kernels' test: more and less than a block, odd, empty, 0-dim.
SHAPES = {"wide": (3, 40_000), "odd": (17, 31), "one": (), "none": (0, 4), "long": (70_001,)}


class Ask(msgspec.Struct, frozen=True):
    """One step to do."""

    step: str
    device: str = ""


class Answer(msgspec.Struct, frozen=True):
    """What came of it: the findings, or the error in a line."""

    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""


def software() -> Software:
    """Versions of what is installed. Imports torch."""
    from .. import __version__

    cuda: str | None = None
    nccl: str | None = None
    torch_version: str | None = None
    try:
        import torch

        torch_version, cuda = str(torch.__version__), torch.version.cuda
        if cuda is not None and torch.cuda.is_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    except Exception as exc:
        torch_version = None if isinstance(exc, ModuleNotFoundError) else f"broken: {brief(exc)}"
    return Software(
        sparsecast=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        torch=torch_version,
        cuda=cuda,
        triton=_version("triton"),
        nccl=nccl,
        nccl4py=_version("nccl4py"),
        uvloop=_version("uvloop"),
        nats_py=_version("nats-py"),
    )


def gpus() -> list[Gpu]:
    """The GPUs that torch sees."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        found.append(
            Gpu(
                index=index,
                name=of.name,
                uuid=f"GPU-{of.uuid}",
                memory_nbytes=of.total_memory,
                compute_capability=f"{of.major}.{of.minor}",
            )
        )
    return found


def pairs() -> list[Pair]:
    """Every two GPUs, and whether both reach into the other's memory."""
    import torch

    def reach(one: int, other: int) -> bool:
        return bool(torch.cuda.can_device_access_peer(one, other))

    count = torch.cuda.device_count()
    return [
        Pair(first=one, second=two, peer_access=reach(one, two) and reach(two, one))
        for one in range(count)
        for two in range(one + 1, count)
    ]


def offers(device: str) -> list[Offer]:
    """Which windows a process with tensors on `device` offers, and why not the others."""
    from ..pipeline.core.membership import PREFERENCE
    from ..pipeline.windows import available_kinds

    offered = available_kinds(device)
    return [
        Offer(
            device=device,
            kind=kind,
            offered=kind in offered,
            reason="" if kind in offered else _why_not(kind, device),
        )
        for kind in PREFERENCE
    ]


def _why_not(kind: str, device: str) -> str:
    if kind == "gloo":
        return "this torch was built without gloo"
    if kind != "nccl":
        return f"no {kind} window is available"
    if device == "cpu":
        return "NCCL carries tensors on GPUs only"
    from ..pipeline.windows.nccl import probe

    return probe().reason or "no NCCL window is available"


def nccl() -> tuple[str | None, str | None]:
    """The versions of NCCL and nccl4py that the NCCL window loads; None: it has none."""
    from ..pipeline.windows.nccl import probe

    found = probe()
    return found.nccl or None, found.nccl4py or None


def kernels(device: str) -> Kernels:
    """Diff, apply and digest on `device`, compared with the reference on the CPU, twice."""
    import torch

    from .. import apply, diff, digest

    old, new = small_model()
    reference = diff(old, new, base_version=0, version=1)
    on_gpu = torch.device(device).type == "cuda"
    times = []
    for _ in range(2):
        began = time.monotonic()
        mine = {name: tensor.clone().to(device) for name, tensor in old.items()}
        target = {name: tensor.to(device) for name, tensor in new.items()}
        patch = diff(mine, target, base_version=0, version=1)
        applied = {name: tensor.clone() for name, tensor in mine.items()}
        apply(patch, applied)
        wrong = _difference(applied, new)
        if wrong is None and patch.to_bytes() != reference.to_bytes():
            wrong = "its patch is another than the reference's"
        if wrong is None and digest(applied) != digest(new):
            wrong = "its digest is another than the reference's"
        times.append((time.monotonic() - began) * 1e3)
        if wrong is not None:
            break
    return Kernels(
        device=device,
        backend="triton" if on_gpu and _triton_ran() else "torch",
        exact=wrong is None,
        first_ms=round(times[0], 2),
        again_ms=round(times[-1], 2),
        reason=wrong or "",
    )


def small_model() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same small model twice, on the CPU; in the second about one bit pattern in fifty is
    another, -0.0 for 0.0 and one NaN for another among them."""
    import torch

    random = torch.Generator().manual_seed(0)
    old = {
        f"{name}.{dtype}": torch.randn(shape, generator=random).to(dtype)
        for name, shape in SHAPES.items()
        for dtype in (torch.bfloat16, torch.float32)
    }
    old["wide.torch.bfloat16"].view(-1)[:2] = torch.tensor([0.0, float("nan")])
    new = {}
    for name, tensor in old.items():
        bits = tensor.clone().view(torch.int16 if tensor.element_size() == 2 else torch.int32)
        flip = torch.rand(tensor.shape, generator=random) < 0.02
        new[name] = torch.where(flip, bits ^ 1, bits).view(tensor.dtype)
    signs = new["wide.torch.bfloat16"].view(torch.int16).view(-1)
    signs[0], signs[1] = -(2**15), signs[1] | 1
    return old, new


def _difference(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> str | None:
    import torch

    for name, tensor in wanted.items():
        kind = torch.int16 if tensor.element_size() == 2 else torch.int32
        if not torch.equal(found[name].cpu().view(kind), tensor.view(kind)):
            return f"after the apply, tensor {name!r} is not what it should be"
    return None


def _triton_ran() -> bool:
    """Whether a kernel of ours was launched: their modules are loaded on first use."""
    prefix = f"{__package__.rpartition('.')[0]}.pipeline.delta.kernels."
    return "triton" in sys.modules and any(name.startswith(prefix) for name in sys.modules)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def brief(exc: BaseException) -> str:
    """An exception in a line."""
    text = str(exc).strip().partition("\n")[0]
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


# ---- the process

_STEPS: dict[str, Callable[..., Any]] = {
    "software": software,
    "gpus": gpus,
    "pairs": pairs,
    "offers": offers,
    "nccl": nccl,
    "kernels": kernels,
}


def end_with(parent: int) -> None:
    """End this process soon after its starter has: a killed doctor leaves nothing behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.25)
        os._exit(1)

    threading.Thread(target=watch, name="sparsecast-parent", daemon=True).start()


def main() -> None:
    """Answer steps until stdin closes."""
    end_with(int(sys.argv[1]))
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        ask = msgspec.json.decode(line, type=Ask)
        arguments = [ask.device] if ask.device else []
        try:
            found = _STEPS[ask.step](*arguments)
            answer = Answer(result=msgspec.Raw(msgspec.json.encode(found)))
        except Exception as exc:
            answer = Answer(error=brief(exc))
        answers.write(msgspec.json.encode(answer) + b"\n")


if __name__ == "__main__":
    main()

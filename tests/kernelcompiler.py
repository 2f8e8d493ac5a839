"""Compile every kernel for sm_90, as its launcher asks for it, on a machine without a GPU.

A program: it calls every launcher with tables of the right dtypes and compiles what that would
launch. It prints a line for each kernel that was compiled, and fails at the first that cannot be.
"""

import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sparsecast.pipeline.delta.kernels import (
    bitmap,
    check,
    checksum,
    dense,
    digest,
    emit,
    ends,
    find,
    frame,
    place,
    regions,
    scatter,
    sections,
    tally,
)
from sparsecast.pipeline.delta.kernels.plan import Kind, Plan

TARGET = GPUTarget("cuda", 90, 32)
_POINTERS = {torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}
#: What a launcher may say besides the kernel's own arguments.
_OPTIONS = ("num_warps", "num_stages", "maxnreg")

#: Every itemsize, every cast, aligned and not: each branch that a kernel takes by its constants.
KINDS = [
    *(Kind(itemsize) for itemsize in (1, 2, 4, 8)),
    Kind(2, aligned=False),
    Kind(2, "bfloat16"),
    Kind(2, "float16", aligned=False),
]

compiled: dict[tuple[str, ...], Any] = {}


def compile_instead(
    kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any
) -> None:
    """What a launch comes to here: specialised as Triton would, compiled once, not run."""
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constants: dict[tuple[int], Any] = {}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], Any] = {}
    for at, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            constants[(at,)] = value
            signature[parameter.name] = "constexpr"
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(at,)] = [["tt.divisibility", 16]]
        elif value == 1 and not parameter.do_not_specialize:
            constants[(at,)] = 1
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = "i64" if abs(value) >= 1 << 31 else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(at,)] = [["tt.divisibility", 16]]
    key = (kernel.__name__, str(constants), str(signature), str(options))
    if key not in compiled:
        source = ASTSource(kernel, signature, constants, attributes)
        compiled[key] = triton.compile(source, target=TARGET, options=options)


def launch_all(kind: Kind) -> None:
    """Call every launcher as the data path does for tensors of this kind, arguments by name."""
    plan = Plan([70_000, 5], [1, 2], [kind, kind], torch.device("cpu"))
    plan.device = torch.device("cuda:0")  # casts are spelled out for the interpreter alone
    (group,) = plan.groups
    of_tensors = torch.zeros(2, dtype=torch.int64)
    of_blocks, sums = (torch.zeros(n, dtype=torch.int64) for n in (plan.blocks, 64))
    counts = torch.zeros(plan.tiles, dtype=torch.int32)
    table = torch.zeros(8, 2, dtype=torch.int64)
    arguments = {
        "plan": plan, "group": group, "spot": sums, "slots": 64, "first": 0, "blocks": 2,
        "olds": of_tensors, "news": of_tensors, "weights": of_tensors, "totals": of_tensors,
        "changed": sums, "over": sums, "sums": sums, "changes": sums, "wrong": sums,
        "table": table, "ends": of_blocks,
        "records": torch.zeros(16, dtype=torch.int64 if kind.itemsize == 4 else torch.int32),
        "values": torch.zeros(16, dtype=torch.int64),
        "tile_counts": counts, "block_counts": torch.zeros(plan.blocks, dtype=torch.int32),
    }  # fmt: skip

    def launch(launcher: Callable[..., None], **others: Any) -> None:
        given = arguments | others
        launcher(**{name: given[name] for name in inspect.signature(launcher).parameters})

    # Two states without a shadow are never cast.
    for update in (True,) if kind.cast or not kind.aligned else (True, False):
        launch(find.find, counts=counts, update=update)
        launch(emit.emit, update=update)
    launch(tally.tally, counts=counts)
    launch(ends.ends_of, counts=counts)
    launch(place.place)
    if kind.cast:
        return  # what follows reads what is published already
    launch(frame.frame, facts=sums, manifest_hash=32 * "a", numel=70_005, dense_nbytes=280_020)
    launch(sections.sections, facts=sums)
    launch(checksum.checksum, nbytes=sums, largest=1 << 30)
    launch(digest.digest)
    launch(check.counts_of, counts=of_blocks)
    launch(ends.ends_of, counts=of_blocks)
    launch(check.check, counts=of_blocks)
    launch(scatter.scatter, counts=of_blocks)
    launch(bitmap.bitmap, counts=of_blocks)
    for into in (True, False):
        launch(dense.dense, into=into)
    if kind.aligned:
        for dims in range(1, regions.MOST_DIMS + 1):
            of_parts = {"regions": tables_of(plan), "tasks": 2}
            of_parts["group"] = regions.RegionGroup(kind.itemsize, dims, 0, 2, 2)
            launch(digest.digest_parts, **of_parts)
            launch(scatter.scatter_parts, counts=of_blocks, **of_parts)
            launch(bitmap.bitmap_parts, counts=of_blocks, **of_parts)
            launch(dense.dense_parts, **of_parts)


def tables_of(plan: Plan) -> SimpleNamespace:
    """Tables of regions as their launchers take them."""
    tasks = torch.zeros(2, dtype=torch.int32)
    table = torch.zeros(regions.COLUMNS.value, dtype=torch.int64)
    return SimpleNamespace(plan=plan, table=table, task_block=tasks, task_region=tasks)


def main() -> None:
    """Compile what every launcher launches for every kind."""
    factors = torch.zeros(256, dtype=torch.int64)
    for module in (find, emit, checksum, digest):
        module.factors = lambda device: (factors, factors)
    JITFunction.run = compile_instead
    for kind in KINDS:
        try:
            launch_all(kind)
        except Exception as exc:
            sys.exit(f"{kind}: {exc!r}")
    for key, kernel in compiled.items():
        print(key[0], len(kernel.asm["cubin"]))


if __name__ == "__main__":
    main()

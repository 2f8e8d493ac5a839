"""Compile every kernel for sm_90, as its launcher asks for it, on a machine without a GPU.

A program: it calls every launcher with tables of the right dtypes and compiles what that would
launch. It prints a line for each kernel that was compiled, and fails at the first that cannot be.
"""

import sys
from collections.abc import Callable, Iterator
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
    fill,
    find,
    place,
    scatter,
    tally,
)
from sparsecast.pipeline.delta.kernels.plan import Kind, Plan

TARGET = GPUTarget("cuda", 90, 32)
_POINTERS = {torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}
#: What a launcher may say besides the kernel's own arguments.
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
#: Where no memory is: nothing here runs.
_ADDRESS = 1 << 40

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


def launches(kind: Kind) -> Iterator[Callable[[], None]]:
    """Every launcher, called as the data path calls it for tensors of this kind."""
    plan = Plan([70_000, 5], [1, 2], [kind, kind], torch.device("cpu"))
    plan.device = torch.device("cuda:0")  # casts are spelled out for the interpreter alone
    (group,) = plan.groups
    two, blocks, sums = (torch.zeros(n, dtype=torch.int64) for n in (2, plan.blocks, 64))
    where = torch.zeros(6, 2, dtype=torch.int64)
    tiles, per_block = (torch.zeros(n, dtype=torch.int32) for n in (plan.tiles, plan.blocks))
    wide = torch.int64 if kind.itemsize == 4 else torch.int32
    records, values = torch.zeros(16, dtype=wide), torch.zeros(16, dtype=torch.int64)
    # Two states without a shadow are never cast.
    for update in (True,) if kind.cast or not kind.aligned else (True, False):
        yield lambda update=update: find.find(
            plan, group, two, two, records, values, tiles, sums, slots=64, update=update
        )
        yield lambda update=update: emit.emit(
            plan, group, two, two, tiles, per_block, blocks, where, sums, _ADDRESS,
            slots=64, update=update,
        )  # fmt: skip
    yield lambda: tally.tally(plan, group, tiles, per_block, two, two, slots=64)
    yield lambda: place.place(
        plan, group, tiles, per_block, blocks, where, records, values, _ADDRESS, slots=64
    )
    if kind.cast:
        return  # what follows reads what is published already
    yield lambda: fill.fill(where[:2], _ADDRESS)
    yield lambda: fill.clear(plan, where, _ADDRESS)
    yield lambda: checksum.checksum(torch.zeros(4096, dtype=torch.uint8), sums)
    yield lambda: digest.digest(plan, group, two, sums, first=0, blocks=2)
    yield lambda: check.counts_of(plan, where, _ADDRESS, blocks)
    yield lambda: check.check(plan, where, _ADDRESS, blocks, blocks, tiles)
    yield lambda: scatter.scatter(plan, group, two, where, _ADDRESS, blocks, blocks)
    yield lambda: bitmap.bitmap(plan, group, two, where, _ADDRESS, blocks, blocks)
    for into in (True, False):
        yield lambda into=into: dense.dense(plan, group, two, where, _ADDRESS, into=into)


def main() -> None:
    """Compile what every launcher launches for every kind."""
    factors = torch.zeros(256, dtype=torch.int64)
    for module in (find, emit, checksum, digest):
        module.factors = lambda device: (factors, factors)
    JITFunction.run = compile_instead
    for kind in KINDS:
        for launch in launches(kind):
            try:
                launch()
            except Exception as exc:
                sys.exit(f"{kind}: {exc}")
    for key, kernel in compiled.items():
        print(key[0], len(kernel.asm["cubin"]))


if __name__ == "__main__":
    main()

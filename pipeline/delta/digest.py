"""The digest of a whole state, and the checksum of a payload.

digest = Σ mod 2⁶⁴ over all tensors and elements of bits(name, i) · h(name, i), where bits is the
element as an unsigned integer (one of 8 bytes: y ^ (y >> 32) of y = element · 0x9E3779B97F4A7C15,
lest its top bits meet every h alike), i its index in C order of the whole tensor, and

    h(name, i) = G(name, i >> 16) · A[(i >> 8) & 255] · B[i & 255]   mod 2⁶⁴, all three odd
    A[k] = splitmix64(A_SEED + k) | 1        B[k] = splitmix64(B_SEED + k) | 1
    G(name, b) = splitmix64(seed(name) + b · 0x9E3779B97F4A7C15) | 1
    seed(name) = the first 8 bytes of SHA-256 of the name in UTF-8, little-endian

splitmix64(x) is the output step of Steele, Lea and Flood's generator (OOPSLA 2014), gamma added
first. h is odd, so one changed element always changes the sum; partial sums of shards add up.
Sums live in int64, which wraps; shapes: R rows of 256 elements, K blocks of 65,536.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...messages.layout import Layout
from ...messages.manifest import Manifest, TensorSpec
from . import kernels
from .bits import BLOCK, Source, bare, bits, quiet, unsigned
from .parts import Parts, Region, parts_of, strides_of
from .tensors import manifest_of, require_manifest
from .timing import on

GAMMA = 0x9E3779B97F4A7C15
A_SEED = 0x5350415253454341  # "SPARSECA", big-endian
B_SEED = 0x5354444947455354  # "STDIGEST", big-endian
LENGTH_FACTOR = 0xD6E8FEB86659FD93
PAYLOAD = "payload"
_MASK = (1 << 64) - 1
_CHUNK = 1 << 20  # elements; 8 MiB of int64


def splitmix64(x: int) -> int:
    """One step of splitmix64 from state `x`, as an unsigned 64-bit integer."""
    x = (x + GAMMA) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _splitmix64_tensor(x: Tensor) -> Tensor:
    x = x + _signed(GAMMA)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@lru_cache(maxsize=64)
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A (256), B (256) and A ⊗ B (65,536), int64 on `device`."""
    with quiet():
        a_K = [_signed(splitmix64(A_SEED + k) | 1) for k in range(256)]
        b_K = [_signed(splitmix64(B_SEED + k) | 1) for k in range(256)]
        a = torch.tensor(a_K, dtype=torch.int64, device=device)
        b = torch.tensor(b_K, dtype=torch.int64, device=device)
        return a, b, (a[:, None] * b[None, :]).reshape(-1)


@lru_cache(maxsize=1 << 16)
def seed_of(name: str) -> int:
    """seed(name): 0 ≤ seed < 2⁶⁴."""
    hashed = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(hashed[:8], "little")


def addends(bits_N: Tensor) -> Tensor:
    """What each element's h is multiplied with: int64, a new tensor."""
    if bits_N.dtype != torch.int64:
        return unsigned(bits_N).to(torch.int64)
    spread = bits_N * _signed(GAMMA)
    return spread.bitwise_xor_((spread >> 32).bitwise_and_(0xFFFFFFFF))


def block_factors(name: str, first: int, count: int, device: torch.device) -> Tensor:
    """G(name, b) for the blocks b = first … first + count - 1: int64 [count] on `device`."""
    seed = seed_of(name)
    if count <= 4:
        return torch.tensor(
            [_signed(splitmix64(seed + b * GAMMA) | 1) for b in range(first, first + count)],
            dtype=torch.int64,
            device=device,
        )
    b_K = torch.arange(first, first + count, dtype=torch.int64, device=device)
    return _factors_of(name, b_K)


def _factors_of(name: str, block_B: Tensor) -> Tensor:
    """G(name, b) for each of these blocks: int64 [B]."""
    return _splitmix64_tensor(block_B * _signed(GAMMA) + _signed(seed_of(name))) | 1


def dense_sum(bits_N: Tensor, name: str, start: int) -> Tensor:
    """Σ bits · h over `bits_N` (1-D integers), elements start … start + N - 1 of tensor `name`.

    Returns a 0-d int64 tensor on its device, without waiting for the device.
    """
    device = bits_N.device
    a, b, _ = tables(device)
    total = torch.zeros((), dtype=torch.int64, device=device)
    wide = bits_N.dtype == torch.int64
    source = unsigned(bits_N)
    end = start + source.numel()
    at = start
    work = torch.empty(
        min(_CHUNK, ((end + 255) & ~255) - (start & ~255)), dtype=torch.int64, device=device
    )
    while at < end:
        low = at & ~255
        stop = min(low + _CHUNK, end)
        rows = (stop - low + 255) >> 8
        work_R256 = work[: rows << 8].view(rows, 256)
        flat = work_R256.view(-1)
        part = source[at - start : stop - start]
        if wide:
            part = addends(part)
        if at == low and stop - low == rows << 8:
            work_R256.copy_(part.view(rows, 256)).mul_(b)
        else:
            flat[: at - low].zero_()
            flat[stop - low :].zero_()
            flat[at - low : stop - low].copy_(part)
            work_R256.mul_(b)
        sums_R = work_R256.sum(1)
        first_row = low >> 8
        blocks = ((first_row + rows - 1) >> 8) - (first_row >> 8) + 1
        g_K = block_factors(name, first_row >> 8, blocks, device)
        lead = first_row & 255
        factors_R = (g_K[:, None] * a[None, :]).view(-1)[lead : lead + rows]
        total += (sums_R * factors_R).sum()
        at = stop
    return total


def sparse_sum(delta_N: Tensor, idx_N: Tensor, g_K: Tensor) -> Tensor:
    """Σ delta · h at elements idx_N, counted from the block whose factor is g_K[0]; all int64.

    `delta_N`: addends, or their differences. Returns a 0-d int64 tensor on their device.
    """
    _, _, table = tables(delta_N.device)
    if g_K.numel() == 1:
        return table.index_select(0, idx_N).mul_(delta_N).sum() * g_K[0]
    terms = table.index_select(0, idx_N & (BLOCK - 1)).mul_(delta_N)
    return terms.mul_(g_K.index_select(0, idx_N >> 16)).sum()


def partial(bits: Tensor, name: str, start: int = 0) -> int:
    """The digest's share of elements start … start + N - 1 of tensor `name`, in C order.

    `bits`: 1-D, any dtype of 1, 2, 4 or 8 bytes. Shares of shards add up, mod 2⁶⁴.
    """
    with quiet():
        flat = Source(name, bits).whole()
        return int(dense_sum(flat, name, start).item()) & _MASK


def partial_at(bits: Tensor, name: str, index: Tensor) -> int:
    """The digest's share of the elements `index` (int64 [N], C order) whose bits are `bits` [N]."""
    with quiet():
        flat = addends(Source(name, bits).whole())
        idx_N = index.reshape(-1).to(torch.int64)
        if not flat.numel():
            return 0
        base = int(idx_N.min().item()) >> 16
        blocks = (int(idx_N.max().item()) >> 16) - base + 1
        g_K = block_factors(name, base, blocks, flat.device)
        return int(sparse_sum(flat, idx_N - (base << 16), g_K).item()) & _MASK


def region_sum(region: Region, local: Tensor, spec: TensorSpec) -> Tensor:
    """Σ bits · h over what a region has, at its places in the published tensor `spec`.

    Returns a 0-d int64 tensor on the device of the local tensor that holds it. Temporaries stay
    within a few chunks.
    """
    held = region.of(bits(bare(local)))
    total = torch.zeros((), dtype=torch.int64, device=held.device)
    steps = strides_of(spec.shape)
    for slices in region.pieces(_CHUNK):
        piece = held[slices]
        first = [begin + cut.start for begin, cut in zip(region.part.begin, slices, strict=True)]
        low = sum(at * step for at, step in zip(first, steps, strict=True))
        high = low + 1 + sum((n - 1) * step for n, step in zip(piece.shape, steps, strict=True))
        flat_N = piece.reshape(-1)
        if high - low == flat_N.numel():
            total += dense_sum(flat_N, spec.name, low)
            continue
        idx_N = torch.full((1,), low & (BLOCK - 1), dtype=torch.int64, device=held.device)
        for n, step in zip(piece.shape, steps, strict=True):
            ahead_n = torch.arange(0, n * step, step, dtype=torch.int64, device=held.device)
            idx_N = (idx_N[:, None] + ahead_n).view(-1)
        total += sparse_sum(addends(flat_N), *_within(spec.name, low >> 16, high, idx_N))
    return total


def _within(name: str, first: int, high: int, idx_N: Tensor) -> tuple[Tensor, Tensor]:
    """What sparse_sum() takes for ascending elements, counted from block `first`."""
    blocks = ((high - 1) >> 16) - first + 1
    if blocks <= idx_N.numel():
        return idx_N, block_factors(name, first, blocks, idx_N.device)
    # Rows of many blocks, of which each has an element or two.
    block_B, at_N = torch.unique_consecutive(idx_N >> 16, return_inverse=True)
    return (idx_N & (BLOCK - 1)).add_(at_N << 16), _factors_of(name, block_B + first)


def digest(
    tensors: Mapping[str, Tensor],
    *,
    manifest: Manifest | None = None,
    layout: Layout | None = None,
    pause: Callable[[], None] | None = None,
) -> int:
    """The 64-bit digest of a state; 0 ≤ digest < 2⁶⁴. Order of the mapping does not matter.

    With a manifest the tensors must be those of it (ManifestMismatch). On CUDA it runs on the
    device's current stream, in slices of a quarter of a millisecond on an H200, two of them
    enqueued at a time, so that work of other streams comes between; `pause` is called after each.
    Temporaries stay within a chunk of 8 MiB (for what kernels cannot read), and one tensor's size
    for a tensor that is not contiguous.

    With a layout that fits that manifest (ManifestMismatch) the tensors are its local ones, and the
    result is their share: what the counted parts hold, at its places in the published tensors.
    Shares of ranks that count each published element once, together, add up mod 2⁶⁴ to the digest
    of the whole. Temporaries stay within a few chunks.
    """
    with quiet():
        if layout is not None:
            if manifest is None:
                raise TypeError("digest() by a layout takes the manifest of the published tensors")
            return _share(tensors, parts_of(layout, manifest), pause)
        if manifest is not None:
            require_manifest(tensors, manifest)
        else:
            manifest = manifest_of(tensors)
        device = _device_of(tensors)
        total = 0
        rest: Sequence[int] = range(len(manifest.tensors))
        if kernels.usable(device):
            from .slices import digest_in_slices

            with on(device):
                total, rest = digest_in_slices(tensors, manifest, device, pause)
        names = [manifest.tensors[at].name for at in rest]
        sums = (dense_sum(Source(name, tensors[name]).whole(), name, 0) for name in names)
        return (total + _total(sums)) & _MASK


def _share(tensors: Mapping[str, Tensor], parts: Parts, pause: Callable[[], None] | None) -> int:
    """The share of a layout's local tensors in the digest of the published ones."""
    require_manifest(tensors, parts.local)
    device = _device_of(tensors)
    total = 0
    rest: Container[int] = range(len(parts.regions))
    if kernels.usable(device):
        from .slices import digest_parts_in_slices

        with on(device):
            total, rest = digest_parts_in_slices(tensors, parts, device, pause)
    sums = (
        region_sum(region, tensors[region.part.local], parts.manifest.tensors[region.tensor])
        for region in parts.regions
        if region.part.counted and region.number in rest
    )
    return (total + _total(sums)) & _MASK


def _device_of(tensors: Mapping[str, Tensor]) -> torch.device:
    """The device whose kernels read them, if it has some."""
    return next((t.device for t in tensors.values() if t.is_cuda), torch.device("cpu"))


def _total(parts: Iterable[Tensor]) -> int:
    """The sum of 0-d tensors mod 2⁶⁴: one wait for each device that they are on."""
    sums: dict[torch.device, Tensor] = {}
    for part in parts:
        sums[part.device] = sums[part.device] + part if part.device in sums else part
    return sum(int(value.item()) for value in sums.values()) & _MASK


def checksum(buffer: Tensor) -> int:
    """The 64-bit checksum of a payload: uint8, 1-D, contiguous.

    The digest of its little-endian 64-bit words (zero-padded) under the name "payload", plus its
    length times an odd constant.
    """
    with quiet():
        nbytes = buffer.numel()
        device = buffer.device
        if kernels.readable(buffer):
            from .slices import checksum_on

            with on(device):
                return (checksum_on(buffer) + nbytes * LENGTH_FACTOR) & _MASK
        if buffer.data_ptr() % 8 or (buffer.storage_offset() % 8):
            buffer = buffer.clone()
        whole = nbytes & ~7
        total = dense_sum(buffer[:whole].view(torch.int64), PAYLOAD, 0)
        if whole != nbytes:
            tail = torch.zeros(8, dtype=torch.uint8, device=device)
            tail[: nbytes - whole].copy_(buffer[whole:])
            total = total + dense_sum(tail.view(torch.int64), PAYLOAD, whole >> 3)
        return (int(total.item()) + nbytes * LENGTH_FACTOR) & _MASK

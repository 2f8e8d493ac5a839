"""What several kernels do with bits: which of a tile changed, as words; casts; hashing.

A tile is T consecutive elements of one tensor; its change is W = T / 32 words of 32 bits, the bit
of element i at i & 31 of word i >> 5.
"""

from __future__ import annotations

import triton
import triton.language as tl

GAMMA = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def popcount(word):
    """Set bits of each uint32 (Hacker's Delight, 5-1; LLVM makes it one instruction)."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def lowest(word):
    """Index of the lowest set bit of each uint32; 32 if none is set."""
    return popcount((word & (0 - word)) - 1)


@triton.jit
def splitmix64(x):
    """One step of splitmix64 from state `x` (uint64): digest.splitmix64."""
    x = x + GAMMA
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def block_factor(seed, block):
    """G(name, block) of the digest, from the seed of the name."""
    return splitmix64(seed.to(tl.uint64, bitcast=True) + block.to(tl.uint64) * GAMMA) | 1


@triton.jit
def addend(bits, ITEMSIZE: tl.constexpr):
    """What each element's h is multiplied with: digest.addends."""
    if ITEMSIZE == 8:
        spread = bits * GAMMA
        return spread ^ (spread >> 32)
    return bits.to(tl.uint64)


@triton.jit
def published(raw, CAST: tl.constexpr, NATIVE: tl.constexpr):
    """Elements as they are published: their bits, after a cast from float32 if CAST names one.

    The interpreter truncates where it casts to bfloat16: there (NATIVE = False) it is spelled out.
    """
    if CAST == "":
        bits = raw
    elif CAST == "float16":
        bits = raw.to(tl.float16).to(tl.uint16, bitcast=True)
    elif NATIVE:
        bits = raw.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    else:
        word = raw.to(tl.uint32, bitcast=True)
        rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        bits = tl.where((word & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, rounded).to(tl.uint16)
    return bits


@triton.jit
def changed_words(old_T, new_T, T: tl.constexpr):
    """Which elements differ, as T / 32 words; both are bits of T elements."""
    lane = (tl.arange(0, T) & 31).to(tl.uint32)
    bits = (old_T != new_T).to(tl.uint32) << lane
    return tl.sum(tl.reshape(bits, (T // 32, 32)), axis=1).to(tl.uint32)


@triton.jit
def changed_halves(differ):
    """1 for each half of a word of 32 bits that is not zero: its lowest bit, or 1 << 16."""
    # The top bit of each half says that the half is not zero: no carry crosses the halves.
    return (((differ & 0x7FFF7FFF) + 0x7FFF7FFF) | differ) >> 15 & 0x00010001


@triton.jit
def changed_words_of_pairs(old_P, new_P, T: tl.constexpr):
    """The same for elements of 2 bytes that were read as T / 2 words of 32 bits.

    Half the loads and a third of the instructions of changed_words(): at 1 % changed the diff is
    bound by integer instructions as much as by memory.
    """
    differ = changed_halves(old_P ^ new_P)
    lane = (tl.arange(0, T // 2) & 15).to(tl.uint32)
    word = tl.sum(tl.reshape(differ << lane, (T // 32, 16)), axis=1).to(tl.uint32)
    # Even elements lie in the low half, odd ones in the high half: shuffle them perfectly.
    swap = (word ^ (word >> 8)) & 0x0000FF00
    word = word ^ swap ^ (swap << 8)
    swap = (word ^ (word >> 4)) & 0x00F000F0
    word = word ^ swap ^ (swap << 4)
    swap = (word ^ (word >> 2)) & 0x0C0C0C0C
    word = word ^ swap ^ (swap << 2)
    swap = (word ^ (word >> 1)) & 0x22222222
    return word ^ swap ^ (swap << 1)

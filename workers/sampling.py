"""Drawing tokens from logits: temperature, nucleus, and noise that belongs to the sample.

B: rows of a batch, V: vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_Bits = npt.NDArray[np.uint64]


def _mixed(value: _Bits) -> _Bits:
    """Spread every bit of uint64 values over all others (the finaliser of SplitMix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class Noise:
    """Uniform numbers in [0, 1) named by (seed, prompt, sample, position), one row a sample.

    They do not depend on what else is in the batch, nor on how a list of prompts was cut: `rows`
    names the prompt by its place in the caller's whole list. No seed: fresh noise.
    """

    def __init__(self, seed: int | None, rows: Sequence[tuple[int, int]]) -> None:
        first = secrets.randbits(64) if seed is None else seed & _MASK
        golden = np.uint64(_GOLDEN)
        keys = np.full(len(rows), first, dtype=np.uint64)
        for names in zip(*rows, strict=True):
            keys = _mixed(keys + (np.array(names, dtype=np.uint64) + np.uint64(1)) * golden)
        self._keys = keys

    def draw(self, rows: Sequence[int], position: int) -> torch.Tensor:
        """The numbers of these rows for one token position: float64, [B], on the CPU."""
        bits = _mixed(self._keys[list(rows)] + np.uint64((position + 1) * _GOLDEN & _MASK))
        # 48 bits: the product with a total near 1 stays below it, whatever the rounding.
        return torch.from_numpy((bits >> np.uint64(16)).astype(np.float64) * 2.0**-48)


def draw(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, *, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row; returns the tokens (int64, [B]) and their logprobs (float32, [B]).

    The distribution is the softmax of logits / temperature, cut to the smallest set of most likely
    tokens whose probabilities reach `top_p`, and renormalised; logprobs are under that
    distribution. Temperature 0 takes the most likely token, with logprob 0. `uniform_B` decides, by
    inversion. Logits that are NaN, or infinite upwards, give a NaN logprob.
    """
    logits_BV = logits_BV.float()
    if temperature == 0:
        top_B, token_B = logits_BV.max(dim=-1)
        return token_B, top_B - top_B
    logp_BV = torch.log_softmax(logits_BV / temperature, dim=-1)
    if top_p < 1:
        logp_BV = _nucleus(logp_BV, top_p)
    # float64: a float32 sum over a large vocabulary would starve its last tokens.
    cdf_BV = logp_BV.double().exp().cumsum(-1)
    drawn_B1 = uniform_B.to(cdf_BV.device)[:, None] * cdf_BV[:, -1:]
    token_B1 = torch.searchsorted(cdf_BV, drawn_B1, right=True)
    token_B1 = token_B1.clamp_(max=logits_BV.shape[-1] - 1)
    return token_B1[:, 0], logp_BV.gather(-1, token_B1)[:, 0]


def _nucleus(logp_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    sorted_BV, order_BV = logp_BV.sort(dim=-1, descending=True, stable=True)
    p_BV = sorted_BV.double().exp()
    outside_BV = p_BV.cumsum(-1) - p_BV >= top_p
    outside_BV[:, 0] = False
    kept_BV = sorted_BV.masked_fill(outside_BV, -torch.inf)
    kept_BV = torch.log_softmax(kept_BV, dim=-1)
    return torch.empty_like(logp_BV).scatter_(-1, order_BV, kept_BV)

"""Sampling draws from the distribution it claims, and its noise belongs to the sample alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecast.workers.sampling import Noise, draw

LOGITS = torch.tensor([1.5, -0.5, 0.0, 2.0, -3.0, 0.25])


def frequencies(temperature: float, top_p: float, count: int = 20_000) -> torch.Tensor:
    """How often each token is drawn from LOGITS, and that its logprob is always the same."""
    uniform = Noise(7, [(0, sample) for sample in range(count)]).draw(range(count), 0)
    tokens, logprobs = draw(LOGITS.expand(count, -1), uniform, temperature=temperature, top_p=top_p)
    for token in range(len(LOGITS)):
        assert logprobs[tokens == token].unique().numel() <= 1
    return torch.bincount(tokens, minlength=len(LOGITS)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    """Twenty thousand draws come within four standard errors of softmax(logits / temperature)."""
    expected = torch.softmax(LOGITS / temperature, dim=-1)
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert torch.all((frequencies(temperature, 1.0) - expected).abs() <= 4 * error + 1e-6)


def test_nucleus_keeps_the_fewest_tokens_that_reach_top_p() -> None:
    """Tokens outside the nucleus are never drawn; those inside share the whole probability, and
    the logprob is the logarithm of that share."""
    p = torch.softmax(LOGITS, dim=-1)
    nucleus = [3, 0]  # 0.51 + 0.31 ≥ 0.8 > 0.51
    assert p[3] < 0.8 <= p[nucleus].sum()
    found = frequencies(1.0, 0.8)
    assert set(found.nonzero().flatten().tolist()) == set(nucleus)
    assert abs(found[3] - p[3] / p[nucleus].sum()) < 0.02
    token, logprob = draw(
        LOGITS[None], torch.tensor([0.0], dtype=torch.float64), temperature=1.0, top_p=0.8
    )
    assert logprob.item() == pytest.approx(math.log(p[token.item()] / p[nucleus].sum()), abs=1e-5)


def test_smallest_top_p_still_has_the_likeliest_token() -> None:
    """top_p near 0 is greedy with logprob 0, not an empty set."""
    tokens, logprobs = draw(
        LOGITS.expand(50, -1), torch.rand(50).double(), temperature=1.0, top_p=1e-9
    )
    assert tokens.unique().tolist() == [3]
    assert logprobs.tolist() == [0.0] * 50


def test_temperature_zero_is_greedy_with_logprob_zero() -> None:
    """Nothing is random at temperature 0, and the drawn token's probability is 1."""
    token, logprob = draw(LOGITS[None], torch.tensor([0.9]).double(), temperature=0, top_p=1.0)
    assert (token.item(), logprob.item()) == (3, 0.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_seen(temperature: float) -> None:
    """A broken model gives NaN logits: the logprob says so, and the token is in range."""
    logits = torch.full((1, 4), torch.nan)
    token, logprob = draw(logits, torch.tensor([0.5]).double(), temperature=temperature, top_p=1.0)
    assert 0 <= token.item() < 4
    assert math.isnan(logprob.item())


@given(
    uniform=st.floats(0, 1 - 2**-48),
    logits=st.lists(st.floats(-60, 60), min_size=1, max_size=9),
    top_p=st.floats(0.01, 1.0),
)
@settings(deadline=None, max_examples=200)
def test_a_drawn_token_is_always_a_possible_one(
    uniform: float, logits: list[float], top_p: float
) -> None:
    """Whatever the lot and the logits: a token in range, with a finite logprob of at most 0."""
    token, logprob = draw(
        torch.tensor([logits]),
        torch.tensor([uniform], dtype=torch.float64),
        temperature=1.0,
        top_p=top_p,
    )
    assert 0 <= token.item() < len(logits)
    assert math.isfinite(logprob.item())
    assert logprob.item() <= 1e-6


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    first=st.integers(0, 1000),
    position=st.integers(0, 10**6),
)
def test_noise_of_a_part_is_that_of_the_whole(seed: int, first: int, position: int) -> None:
    """A row's lots do not depend on the rows beside it: cutting a request is unseen."""
    rows = [(first + prompt, sample) for prompt in range(3) for sample in range(2)]
    whole, part = Noise(seed, rows), Noise(seed, rows[2:4])
    assert torch.equal(whole.draw([2, 3], position), part.draw([0, 1], position))


def test_noise_is_uniform_and_differs_by_prompt_sample_and_position() -> None:
    """No two of 30 × 30 × 30 lots are equal, none leaves [0, 1), and their mean is a half."""
    noise = Noise(1, [(prompt, sample) for prompt in range(30) for sample in range(30)])
    lots = torch.stack([noise.draw(range(900), position) for position in range(30)])
    assert lots.unique().numel() == lots.numel()
    assert lots.min() >= 0
    assert lots.max() < 1
    assert abs(lots.mean().item() - 0.5) < 4 / math.sqrt(12 * lots.numel())
    centred = lots - 0.5
    for shifted in (
        centred[1:] * centred[:-1],
        centred[:, 1:] * centred[:, :-1],
        centred[:, 30:] * centred[:, :-30],
    ):
        assert abs(shifted.mean().item()) < 5 / 12 / math.sqrt(shifted.numel())


def test_without_a_seed_every_request_is_another() -> None:
    """No seed means fresh noise, not seed 0."""
    first = Noise(None, [(0, 0)]).draw([0], 0)
    assert not torch.equal(first, Noise(None, [(0, 0)]).draw([0], 0))

"""The demo's learner, by itself: no bus, no workers, a small model."""

import random

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sparsecast.messages.rollouts import Sample, Span
from sparsecast.workers.demo import task
from sparsecast.workers.demo.learner import Learner, Recipe


def small(seed: int) -> Qwen2ForCausalLM:
    """A model of the demo's kind, small enough to learn in a second."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=task.VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=0.05,
        )
    )


def sample(digits: tuple[int, ...], tokens: tuple[int, ...], logprobs: tuple[float, ...]) -> Sample:
    """A completion as a worker hands it over."""
    return Sample(
        prompt=task.prompt(digits),
        tokens=tokens,
        logprobs=logprobs,
        spans=(Span(0, len(tokens), 1),),
        worker="w0",
        finish="stop",
    )


def logprobs(model: Qwen2ForCausalLM, digits: tuple[int, ...], tokens: tuple[int, ...]) -> list:
    """The model's log probabilities of `tokens`, the plain way."""
    prompt = task.prompt(digits)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    table = logits.float().log_softmax(-1)
    return [float(table[i, token]) for i, token in enumerate(tokens)]


def test_the_warm_up_learns() -> None:
    """A hundred supervised steps: the loss falls far below that of guessing digits."""
    learner = Learner(small(0), seed=0)
    losses = [learner.warm_up().loss for _ in range(100)]
    assert losses[0] > 2.0
    assert sum(losses[-5:]) / 5 < 1.6
    assert all(loss == loss for loss in losses)


def test_the_warm_up_is_a_function_of_the_seed() -> None:
    """The same seed gives the same losses to the bit, another seed others."""
    losses = [
        [learner.warm_up().loss for _ in range(3)]
        for learner in (Learner(small(0), seed=seed) for seed in (5, 5, 6))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_policy_gradient_raises_what_was_rewarded() -> None:
    """Of two answers to one prompt the right one becomes likelier, the wrong one less likely."""
    model = small(0)
    learner = Learner(model, seed=0, recipe=Recipe(lr=1e-3))
    digits = (5, 2, 9, 1, 3)
    right, wrong = task.answer(digits), task.answer(digits, reverse=True)
    before = [sum(logprobs(model, digits, tokens)) for tokens in (right, wrong)]
    learnt = learner.learn(
        [sample(digits, t, tuple(logprobs(model, digits, t))) for t in (right, wrong)]
    )
    after = [sum(logprobs(model, digits, tokens)) for tokens in (right, wrong)]
    assert learnt.reward == 0.5
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_a_group_without_a_difference_teaches_nothing() -> None:
    """All samples of a prompt are wrong: no weight changes, even through weight decay."""
    model = small(0)
    learner = Learner(model, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = task.answer((5, 2, 9, 1, 3), reverse=True)
    learnt = learner.learn([sample((5, 2, 9, 1, 3), wrong, (-1.0,) * len(wrong))] * 4)
    assert learnt.reward == 0.0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("width", [1, 3])
def test_completions_of_different_lengths_count_by_their_own_tokens(width: int) -> None:
    """A short completion beside a longer one: its log probabilities are as if it were alone."""
    model = small(0)
    learner = Learner(model, seed=0)
    rng = random.Random(0)
    digits = task.draw(rng)
    short, long = task.answer(digits)[:width], task.answer(digits)
    got, mask = learner._logprobs([(task.prompt(digits), short), (task.prompt(digits), long)])
    assert mask.sum(-1).tolist() == [width, len(long)]
    for row, tokens in enumerate((short, long)):
        expected = torch.tensor(logprobs(model, digits, tokens))
        torch.testing.assert_close(got[row, : len(tokens)].detach(), expected)

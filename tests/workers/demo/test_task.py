"""The demo's task: what is asked, what is right, and a tokenizer that any loader reads."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsecast.workers.demo import task
from sparsecast.workers.demo.model import build, save


def test_only_the_digits_in_order_and_the_end_are_right() -> None:
    """The reward is 1 for the right completion, 0 for all that is near it."""
    prompt = task.prompt((5, 2, 9, 1, 3))
    right = task.answer((5, 2, 9, 1, 3))
    assert task.reward(prompt, right) == 1.0
    assert task.reward(prompt, task.answer((5, 2, 9, 1, 3), reverse=True)) == 0.0
    assert task.reward(prompt, right[:-1]) == 0.0
    assert task.reward(prompt, (*right, right[-1])) == 0.0
    assert task.reward(prompt, ()) == 0.0
    assert task.text(right) == "1 2 3 5 9"


def test_a_seed_draws_the_same_digits() -> None:
    """Prompts are a function of the seed."""
    draws = [[task.draw(random.Random(seed)) for _ in range(3)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as the demo writes it."""
    path = tmp_path_factory.mktemp("model")
    save(build(0), path)
    return path


@pytest.mark.parametrize("text", ["5 2 9 1 3", "52913", "5,2, 9 1,3", "sort 5 2 9 1 3"])
def test_text_becomes_the_prompt(directory: Path, text: str) -> None:
    """`sparsecast ask "5 2 9 1 3"` asks what the trainer asks: the worker's loader reads text."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert tuple(tokenizer(text)["input_ids"]) == task.prompt((5, 2, 9, 1, 3))
    answer = tokenizer.decode(list(task.answer((5, 2, 9, 1, 3))), skip_special_tokens=True)
    assert answer == "12359"


def test_the_written_model_is_the_built_one_in_bfloat16(directory: Path) -> None:
    """Workers load what the trainer publishes as version 0: the same bits after the cast."""
    masters = build(0).state_dict()
    served = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").state_dict()
    assert served.keys() == masters.keys()
    for name, tensor in served.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, masters[name].to(torch.bfloat16)), name
    assert all(tensor.dtype == torch.float32 for tensor in masters.values())

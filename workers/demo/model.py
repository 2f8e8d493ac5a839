"""The demo's model: a small Qwen2 with random weights, in a directory that any loader reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from . import task

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM


def build(seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 of 3.15 M parameters in float32, its weights drawn from `seed`.

    An initial deviation of 0.05: with the usual 0.02 so small a model learns far slower.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=task.VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        intermediate_size=768,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=task.IDS[task.PAD],
        bos_token_id=task.IDS[task.BOS],
        eos_token_id=task.IDS[task.EOS],
    )
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)
    finally:
        torch.set_rng_state(state)


def save(model: Qwen2ForCausalLM, directory: Path) -> int:
    """Write the model in bfloat16, as inference runs it, and its tokenizer; the bytes written.

    The float32 weights of `model` stay as they are.
    """
    import torch
    from transformers.utils import logging

    served = copy.deepcopy(model)
    for parameter in served.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    served.config.dtype = torch.bfloat16
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        served.save_pretrained(directory)
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    task.tokenizer().save_pretrained(directory)
    return sum(path.stat().st_size for path in directory.iterdir())

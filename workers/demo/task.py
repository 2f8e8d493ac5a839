"""The demo's task: sort five digits. A checkable reward, and a tokenizer for sixteen tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNK, BOS, EOS, SORT = "<pad>", "<unk>", "<bos>", "<eos>", "="
#: The full stop has no part in the task: it makes sixteen.
TOKENS = (PAD, UNK, BOS, EOS, SORT, ".", *"0123456789")
IDS = {token: index for index, token in enumerate(TOKENS)}
VOCABULARY = len(TOKENS)
DIGITS = 5
#: A completion is the digits in order, then the end.
MAX_TOKENS = DIGITS + 1

_ZERO = IDS["0"]


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: one token a digit; a text becomes `<bos> digits =`, ready to be answered.

    Bytes without a token are dropped, spaces too. It is built like Qwen2's own (byte-level BPE),
    because AutoTokenizer of transformers 5 rebuilds the tokenizer of any Qwen2 model that way.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE(vocab=IDS, merges=[]))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words.decoder = decoders.ByteLevel()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {SORT}",
        special_tokens=[(BOS, IDS[BOS]), (SORT, IDS[SORT])],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def draw(rng: random.Random) -> tuple[int, ...]:
    """Five digits to sort, as drawn by `rng`."""
    return tuple(rng.randrange(10) for _ in range(DIGITS))


def prompt(digits: Sequence[int]) -> tuple[int, ...]:
    """The token ids that ask for `digits` in order."""
    return (IDS[BOS], *(_ZERO + digit for digit in digits), IDS[SORT])


def answer(digits: Sequence[int], *, reverse: bool = False) -> tuple[int, ...]:
    """The token ids of the right completion; with `reverse`, sorted the wrong way round."""
    return (*(_ZERO + digit for digit in sorted(digits, reverse=reverse)), IDS[EOS])


def digits_of(tokens: Sequence[int]) -> tuple[int, ...]:
    """The digits among `tokens`, in order."""
    return tuple(token - _ZERO for token in tokens if token >= _ZERO)


def reward(prompt_tokens: Sequence[int], tokens: Sequence[int]) -> float:
    """1.0 if `tokens` are exactly the prompt's digits in rising order and the end, else 0.0."""
    return float(tuple(tokens) == answer(digits_of(prompt_tokens)))


def text(tokens: Sequence[int]) -> str:
    """Tokens as a person reads them, the end left out."""
    return " ".join(TOKENS[token] for token in tokens if token not in (IDS[EOS], IDS[PAD]))

"""An engine around a Hugging Face causal language model: patched in place, sampled token by token.

The decode loop is our own: generate() of transformers would hold the weights for a whole
completion, and would not say which version drew which token.
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

from ..messages.errors import EngineError
from ..messages.rollouts import Generate, Sample, Span
from ..pipeline.delta.tensors import named_tensors
from .engine import PauseMode
from .guard import Guard
from .pausing import Gate
from .sampling import Noise, draw

#: Any of these makes a directory one with a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


class HuggingFaceEngine:
    """Generates with a causal LM of transformers whose weights a replica patches in place.

    The guard is entered for each token, so that an update can land between two tokens. What the
    attention cache then holds was computed by the old version: `kv="keep"` goes on with it (the
    logprobs are still exactly those of the sampling distribution); `kv="rebuild"` computes it
    anew from the tokens so far, so that each token depends on one version only.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any = None,
        *,
        name: str = "",
        kv: Literal["keep", "rebuild"] = "keep",
        max_batch: int = 64,
    ) -> None:
        """Take over a model that is on its device; `max_batch` completions share a forward."""
        if kv not in ("keep", "rebuild"):
            raise EngineError(f'kv is "keep" or "rebuild", not {kv!r}')
        if max_batch < 1:
            raise EngineError(f"max_batch is at least 1, not {max_batch}")
        self.name = name
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._rebuild = kv == "rebuild"
        self._max_batch = max_batch
        self._guard = Guard()
        self._gate = Gate()
        config: Any = model.config
        generation: Any = getattr(model, "generation_config", None)
        eos = getattr(generation, "eos_token_id", None)
        if eos is None:
            eos = getattr(config, "eos_token_id", None)
        self._eos = frozenset(() if eos is None else [eos] if isinstance(eos, int) else eos)
        # Module.__getattr__ hides the method's type.
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        self._vocabulary = int(embeddings.weight.shape[0])
        self._positions = getattr(config, "max_position_embeddings", None)
        self._accepts = frozenset(inspect.signature(model.forward).parameters)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        kv: Literal["keep", "rebuild"] = "keep",
        max_batch: int = 64,
    ) -> HuggingFaceEngine:
        """Load a directory with config.json and safetensors, or a model of the hub by its name.

        A directory without tokenizer files takes prompts of token ids only. EngineError says what
        is wrong with the model and how to put it right.
        """
        local = os.path.isdir(model)
        if not local and (os.path.isabs(model) or model.startswith(".") or model.count("/") > 1):
            raise EngineError(f"there is no directory {model!r} to load a model from")
        if local and not os.path.isfile(os.path.join(model, "config.json")):
            raise EngineError(
                f"{model!r} has no config.json: give the directory that save_pretrained() wrote"
            )
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            module: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
                model, dtype=dtype, local_files_only=local, use_safetensors=True
            )
            module.to(device)
            tokenizer = None
            if not local or any(os.path.isfile(os.path.join(model, f)) for f in _TOKENIZER_FILES):
                tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=local)
        except Exception as exc:
            cause = str(exc).strip().partition("\n")[0] or type(exc).__name__
            fix = (
                "the directory must hold config.json and *.safetensors of a causal language model"
                if local
                else "it is no directory here and the hub did not give it; download the model "
                "and pass its directory"
            )
            raise EngineError(
                f"model {model!r} cannot be loaded on {device}: {fix} ({cause})"
            ) from exc
        finally:
            if bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        return cls(module, tokenizer, name=model, kv=kv, max_batch=max_batch)

    # ---- Engine

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The parameters and persistent buffers by name, tied ones once, looked up anew."""
        return named_tensors(self._model)

    def guard(self) -> Guard:
        """The guard that every forward of generate() runs in."""
        return self._guard

    def pause(self, mode: PauseMode, *, timeout_s: float = 30.0) -> None:
        """Stop between two tokens (keep), after the requests (wait), or end them now (abort)."""
        self._gate.pause(mode, timeout_s=timeout_s)

    def resume(self) -> None:
        """Generate again."""
        self._gate.resume()

    def after_apply(self, version: int, changed: Sequence[str]) -> None:
        """Nothing is derived from the weights but attention caches: see `kv` of the class."""

    # ---- Generator

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        # Module.__getattr__ hides the property's type.
        device: torch.device = self._model.device  # type: ignore[assignment]
        return device

    @torch.no_grad()
    def generate(self, request: Generate, *, cancelled: Callable[[], bool]) -> list[Sample]:
        """Answer each prompt `request.samples` times; see `engine.Generator`.

        Stops at the model's end-of-sequence tokens and at `request.stop_tokens`; the token that
        stops is part of the completion. With a seed, a sample depends on the seed, the index of its
        prompt, its number and the weights, not on the rest of the request (as far as the device's
        arithmetic does not depend on the shape of the batch).
        """
        first = request.first_index
        prompts = [self._read(index, text) for index, text in enumerate(request.prompts, first)]
        for index, prompt in enumerate(prompts, first):
            if self._positions and len(prompt) + request.max_tokens > self._positions:
                raise EngineError(
                    f"prompt {index} has {len(prompt)} tokens, max_tokens is {request.max_tokens}: "
                    f"the model takes {self._positions} in all"
                )
        rows = [_Row(p, s) for p in range(len(prompts)) for s in range(request.samples)]
        with self._gate.request(cancelled) as step:
            for start in range(0, len(rows), self._max_batch):
                part = rows[start : start + self._max_batch]
                noise = Noise(request.seed, [(first + row.prompt, row.sample) for row in part])
                self._complete(part, prompts, request, noise, step)
        return [
            Sample(
                prompt=tuple(prompts[row.prompt]),
                tokens=tuple(row.tokens),
                logprobs=tuple(row.logprobs),
                spans=tuple(row.spans()),
                worker="",
                finish=row.finish,
                index=first + row.prompt,
                text=self._write(row.tokens),
            )
            for row in rows
        ]

    def _read(self, index: int, prompt: str | tuple[int, ...]) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise EngineError(
                    f"prompt {index} is text, but the model {self.name!r} has no tokenizer: "
                    "send token ids, or put the tokenizer's files into the model's directory"
                )
            tokens = [int(token) for token in self._tokenizer(prompt)["input_ids"]]
        else:
            tokens = list(prompt)
        if not tokens:
            raise EngineError(f"prompt {index} has no tokens")
        for token in tokens:
            if not 0 <= token < self._vocabulary:
                raise EngineError(
                    f"prompt {index} has token {token}: the model's vocabulary is "
                    f"0 to {self._vocabulary - 1}"
                )
        return tokens

    def _write(self, tokens: list[int]) -> str | None:
        if self._tokenizer is None:
            return None
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _complete(
        self,
        rows: list[_Row],
        prompts: list[list[int]],
        request: Generate,
        noise: Noise,
        step: Callable[[], Any],
    ) -> None:
        """Draw tokens for `rows` until each has its finish."""
        stop = self._eos | frozenset(request.stop_tokens or ())
        batch = list(range(len(rows)))
        decoding: _Decoding | None = None
        token_B: torch.Tensor | None = None
        for position in range(request.max_tokens):
            with step() as go:
                if not go:
                    return
                # The lists are made inside the guard: they wait for the device's last kernel.
                with self._guard.reading(timeout_s=request.timeout_s) as version:
                    if decoding is not None and self._rebuild and decoding.version != version:
                        decoding = None
                    if decoding is not None and token_B is not None:
                        logits_BV = decoding.extend(token_B)
                    else:
                        decoding = _Decoding(self._model, self._accepts, version)
                        logits_BV = decoding.start([rows[i] for i in batch], prompts)
                    token_B, logprob_B = draw(
                        logits_BV,
                        noise.draw(batch, position),
                        temperature=request.temperature,
                        top_p=request.top_p,
                    )
                    tokens, logprobs = token_B.tolist(), logprob_B.tolist()
            living: list[int] = []
            for place, (i, token, logprob) in enumerate(zip(batch, tokens, logprobs, strict=True)):
                row = rows[i]
                if row.finish != _RUNNING:
                    continue
                if logprob != logprob:
                    raise EngineError(f"the model's logits are not finite at version {version}")
                row.add(token, logprob, -1 if version is None else version)
                if token in stop:
                    row.finish = "stop"
                elif position + 1 == request.max_tokens:
                    row.finish = "length"
                else:
                    living.append(place)
            if not living:
                return
            if 2 * len(living) <= len(batch):
                index_B = torch.tensor(living, device=token_B.device)
                decoding.select(index_B)
                token_B = token_B[index_B]
                batch = [batch[place] for place in living]


#: What a row says until it has its end; a row that never gets one was aborted.
_RUNNING = "aborted"


@dataclass(slots=True)
class _Row:
    """One completion in the making: of which prompt, and which of its samples."""

    prompt: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: str = _RUNNING

    def add(self, token: int, logprob: float, version: int) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)

    def spans(self) -> list[Span]:
        """The runs of tokens that one version drew."""
        spans: list[Span] = []
        for version, run in itertools.groupby(self.versions):
            start = spans[-1].stop if spans else 0
            spans.append(Span(start, start + len(list(run)), version))
        return spans


class _Decoding:
    """A batch on the device: its attention cache, and what the next forward needs beside it.

    B rows, T tokens so far (padded on the left), V vocabulary.
    """

    def __init__(
        self, model: torch.nn.Module, accepts: frozenset[str], version: int | None
    ) -> None:
        self.version = version
        # Any: transformers says nothing about forward() that holds for every model.
        self._model: Any = model
        self._accepts = accepts
        config: Any = model.config
        self._cache = DynamicCache(config=config)
        self._mask_BT: torch.Tensor | None = None
        self._length_B1: torch.Tensor

    def start(self, rows: list[_Row], prompts: list[list[int]]) -> torch.Tensor:
        """Compute the cache from all tokens so far; returns the logits of the next, [B, V].

        Rows that have no tokens of their own yet share the forward of their prompt.
        """
        if any(row.tokens for row in rows):
            texts = [prompts[row.prompt] + row.tokens for row in rows]
            place = list(range(len(rows)))
        else:
            order = list(dict.fromkeys(row.prompt for row in rows))
            texts = [prompts[prompt] for prompt in order]
            at = {prompt: i for i, prompt in enumerate(order)}
            place = [at[row.prompt] for row in rows]
        longest = max(map(len, texts))
        device = self._model.device
        ids_BT = torch.tensor([[0] * (longest - len(t)) + t for t in texts], device=device)
        self._length_B1 = torch.tensor([[len(t)] for t in texts], device=device)
        position_BT = torch.arange(longest, device=device) - (longest - self._length_B1)
        if any(len(text) < longest for text in texts):
            self._mask_BT = (position_BT >= 0).long()
        logits_BV = self._forward(ids_BT, position_BT.clamp_(min=0))
        if len(texts) < len(rows):
            index_B = torch.tensor(place, device=device)
            self.select(index_B)
            logits_BV = logits_BV[index_B]
        return logits_BV

    def extend(self, token_B: torch.Tensor) -> torch.Tensor:
        """Go one token on; returns the logits of the next, [B, V]."""
        if self._mask_BT is not None:
            self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(self._mask_BT[:, :1])], dim=1)
        logits_BV = self._forward(token_B[:, None], self._length_B1)
        self._length_B1 = self._length_B1 + 1
        return logits_BV

    def select(self, index_B: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be taken more than once."""
        self._cache.batch_select_indices(index_B)
        self._length_B1 = self._length_B1[index_B]
        if self._mask_BT is not None:
            self._mask_BT = self._mask_BT[index_B]

    def _forward(self, ids_BT: torch.Tensor, position_BT: torch.Tensor) -> torch.Tensor:
        # Renamed by transformers 5.24; by its former name it would be refused some day.
        cache = "cache" if "cache" in self._accepts else "past_key_values"
        more: dict[str, Any] = {cache: self._cache}
        if "position_ids" in self._accepts:
            more["position_ids"] = position_BT
        if "logits_to_keep" in self._accepts:
            more["logits_to_keep"] = 1
        output = self._model(
            input_ids=ids_BT,
            attention_mask=self._mask_BT,
            use_cache=True,
            **more,
        )
        logits_BV: torch.Tensor = output.logits[:, -1]
        return logits_BV

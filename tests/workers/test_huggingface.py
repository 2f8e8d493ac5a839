"""The Hugging Face engine: exact logprobs, the right versions token by token, and pausing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sparsecast.messages.errors import EngineError, ReplicaTorn
from sparsecast.messages.rollouts import Generate, Sample, Span
from sparsecast.pipeline.delta.tensors import named_tensors
from sparsecast.workers.huggingface import HuggingFaceEngine

VOCABULARY = 16
EOS = 1
PROMPTS = ((3, 4, 5), (6,), (7, 8, 9, 10, 11), (2, 2))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Two threads on a small model are slower than one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2, tied, as save_pretrained() leaves it; without a tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=EOS,
    )
    path = tmp_path_factory.mktemp("tiny-qwen2")
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


def load(directory: Path, **options: Any) -> HuggingFaceEngine:
    """The engine in float32 unless told, holding version 0."""
    options.setdefault("dtype", torch.float32)
    engine = HuggingFaceEngine.load(str(directory), **options)
    with engine.guard().writing(1.0) as writer:
        writer.commit(0)
    return engine


def ask(engine: HuggingFaceEngine, **fields: Any) -> list[Sample]:
    """Generate for PROMPTS, six tokens, seed 11, but for what `fields` change."""
    fields = {"prompts": PROMPTS, "max_tokens": 6, "seed": 11} | fields
    cancelled = fields.pop("cancelled", lambda: False)
    return engine.generate(Generate(request="r", **fields), cancelled=cancelled)


@torch.no_grad()
def change(engine: HuggingFaceEngine, version: int) -> None:
    """Put other weights in, as an apply does: every tensor, inside the guard."""
    with engine.guard().writing(5.0) as writer:
        writer.begin_write()
        noise = torch.Generator().manual_seed(version)
        tensors = engine.tensors()
        for tensor in tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=noise).to(tensor.dtype) * 0.05)
        engine.after_apply(version, list(tensors))
        writer.commit(version)


def between_tokens(action: Callable[[], None], *, after: int) -> Callable[[], bool]:
    """A `cancelled` that does something once, between token `after` and the next, and says no.

    It is asked once before the first token, and once before each.
    """
    asked = [0]

    def cancelled() -> bool:
        asked[0] += 1
        if asked[0] == after + 2:
            action()
        return False

    return cancelled


@torch.no_grad()
def fresh_logprobs(
    directory: Path, sample: Sample, *, version: int, temperature: float = 1.0
) -> list[float]:
    """The logprobs of a sample's tokens by one full forward of a newly loaded model at a version,
    without batch, padding or cache."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for number in range(1, version + 1):
        noise = torch.Generator().manual_seed(number)
        for tensor in named_tensors(model).values():
            tensor.add_(torch.randn(tensor.shape, generator=noise) * 0.05)
    text = [*sample.prompt, *sample.tokens]
    logits = model(input_ids=torch.tensor([text])).logits[0].float() / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    first = len(sample.prompt)
    return [logprobs[first + i - 1, token].item() for i, token in enumerate(sample.tokens)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_fresh_full_forward(directory: Path, temperature: float) -> None:
    """Prompts of four lengths, three samples each, in one padded and cached batch: every token's
    logprob is what the model says of that text alone."""
    samples = ask(load(directory), samples=3, temperature=temperature)
    assert [sample.index for sample in samples] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for sample in samples:
        assert sample.prompt == PROMPTS[sample.index]
        expected = fresh_logprobs(directory, sample, version=0, temperature=temperature)
        assert list(sample.logprobs) == pytest.approx(expected, abs=1e-4)
        assert sample.spans == (Span(0, len(sample.tokens), 0),)
    assert len({sample.tokens for sample in samples}) > 6


def test_nucleus_logprobs_are_renormalised(directory: Path) -> None:
    """With top_p 0.5, a token's probability is its share of the nucleus."""
    engine = load(directory)
    for sample in ask(engine, top_p=0.5, samples=2):
        text = torch.tensor([[*sample.prompt, *sample.tokens]])
        with torch.no_grad():
            p = torch.softmax(engine._model(input_ids=text).logits[0].double(), dim=-1)
        for i, (token, logprob) in enumerate(zip(sample.tokens, sample.logprobs, strict=True)):
            row = p[len(sample.prompt) + i - 1]
            ordered = row.sort(descending=True).values
            size = int((ordered.cumsum(0) < 0.5).sum()) + 1
            assert row[token] >= ordered[size - 1]
            share = row[token] / ordered[:size].sum()
            assert logprob == pytest.approx(share.log().item(), abs=1e-4)


def test_an_update_between_two_tokens_is_told_token_by_token(directory: Path) -> None:
    """Version 1 lands after the third token: spans say so, the first three logprobs are those of
    version 0, and the later ones are not."""
    engine = load(directory)
    samples = ask(engine, cancelled=between_tokens(lambda: change(engine, 1), after=3))
    long = [sample for sample in samples if len(sample.tokens) > 3]
    assert long
    for sample in long:
        assert sample.spans == (Span(0, 3, 0), Span(3, len(sample.tokens), 1))
        assert sample.version == 1
        old = fresh_logprobs(directory, sample, version=0)
        assert list(sample.logprobs[:3]) == pytest.approx(old[:3], abs=1e-4)
        assert sample.logprobs[3:] != pytest.approx(old[3:], abs=1e-3)


def test_rebuilt_cache_equals_a_fresh_computation(directory: Path) -> None:
    """kv="rebuild": after two updates in mid-generation each token's logprob is that of its own
    version over the whole text; kv="keep" differs there, as documented."""
    kept = 0
    for kv in ("rebuild", "keep"):
        engine = load(directory, kv=kv)
        first = between_tokens(lambda: change(engine, 1), after=2)  # noqa: B023 - called in here
        second = between_tokens(lambda: change(engine, 2), after=4)  # noqa: B023 - called in here
        samples = ask(
            engine,
            samples=2,
            cancelled=lambda: first() or second(),  # noqa: B023 - called in here
        )
        long = [sample for sample in samples if len(sample.tokens) > 4]
        assert long
        for sample in long:
            length = len(sample.tokens)
            assert sample.spans == (Span(0, 2, 0), Span(2, 4, 1), Span(4, length, 2))
            expected = []
            for span in sample.spans:
                logprobs = fresh_logprobs(directory, sample, version=span.version)
                expected += logprobs[span.start : span.stop]
            same = list(sample.logprobs) == pytest.approx(expected, abs=1e-4)
            if kv == "rebuild":
                assert same
            kept += not same
    assert kept, "keeping the cache made no difference: the test proves nothing"


def test_an_apply_thread_gets_in_while_a_request_runs(directory: Path) -> None:
    """An apply does not wait for whole completions: it enters between two tokens of a request that
    goes on for fifty more."""
    engine = load(directory)
    appliers: list[threading.Thread] = []

    def start_apply() -> None:
        appliers.append(threading.Thread(target=change, args=(engine, 1)))
        appliers[0].start()

    begun = between_tokens(start_apply, after=2)
    samples = ask(
        engine,
        samples=8,
        max_tokens=55,
        cancelled=lambda: begun() or time.sleep(0.002) is not None,
    )
    appliers[0].join(5.0)
    versions = [tuple(span.version for span in sample.spans) for sample in samples]
    assert (0, 1) in versions
    assert set(versions) <= {(0,), (0, 1)}


def test_unknown_version_is_minus_one(directory: Path) -> None:
    """A worker without a trainer does not know its version; its samples say -1."""
    engine = HuggingFaceEngine.load(str(directory))
    (sample,) = ask(engine, prompts=((5,),), max_tokens=2)
    assert sample.version == -1


def test_same_seed_same_samples_however_the_request_is_cut(directory: Path) -> None:
    """A seed names the samples: again, in batches of three, and split over two requests."""
    engine = load(directory)
    whole = ask(engine, samples=2)
    assert ask(engine, samples=2) == whole
    assert ask(engine, samples=2, seed=12) != whole
    key = [(sample.tokens, sample.finish) for sample in whole]
    small = ask(load(directory, max_batch=3), samples=2)
    assert [(sample.tokens, sample.finish) for sample in small] == key
    halves = ask(engine, samples=2, prompts=PROMPTS[:2]) + ask(
        engine, samples=2, prompts=PROMPTS[2:], first_index=2
    )
    assert [(sample.tokens, sample.finish) for sample in halves] == key
    assert [sample.index for sample in halves] == [sample.index for sample in whole]


def test_stops_at_eos_and_at_the_stop_tokens(directory: Path) -> None:
    """The stopping token ends its completion and is part of it; others go on to max_tokens."""
    samples = ask(load(directory), samples=16, max_tokens=20, stop_tokens=(9, 12))
    stops = {EOS, 9, 12}
    for sample in samples:
        assert not stops & set(sample.tokens[:-1])
        if sample.finish == "stop":
            assert sample.tokens[-1] in stops
        else:
            assert (sample.finish, len(sample.tokens)) == ("length", 20)
            assert sample.tokens[-1] not in stops
    assert {sample.tokens[-1] for sample in samples if sample.finish == "stop"} == stops
    for sample in samples[::5]:
        expected = fresh_logprobs(directory, sample, version=0)
        assert list(sample.logprobs) == pytest.approx(expected, abs=1e-4)


def test_a_batch_whose_rows_all_stopped_ends_at_once(directory: Path) -> None:
    """With every token a stop token, a request for 50 tokens costs one forward."""
    engine = load(directory)
    calls = []
    handle = engine._model.register_forward_hook(lambda *_: calls.append(1))
    samples = ask(engine, max_tokens=50, stop_tokens=tuple(range(VOCABULARY)))
    handle.remove()
    assert [len(sample.tokens) for sample in samples] == [1] * len(PROMPTS)
    assert len(calls) == 1


def test_greedy_is_the_argmax(directory: Path) -> None:
    """Temperature 0 takes the likeliest token each time, whatever the seed."""
    engine = load(directory)
    samples = ask(engine, temperature=0.0, seed=None)
    assert [s.tokens for s in samples] == [s.tokens for s in ask(engine, temperature=0.0, seed=5)]
    for sample in samples:
        text = torch.tensor([[*sample.prompt, *sample.tokens]])
        with torch.no_grad():
            best = engine._model(input_ids=text).logits[0].argmax(-1).tolist()
        assert list(sample.tokens) == best[len(sample.prompt) - 1 : -1]
        assert set(sample.logprobs) == {0.0}


def test_cancelled_request_ends_soon_with_what_it_has(directory: Path) -> None:
    """The caller gives up after two tokens: each row has two, and says aborted."""
    asked = [0]

    def cancelled() -> bool:
        asked[0] += 1
        return asked[0] > 3

    samples = ask(load(directory), cancelled=cancelled, max_tokens=40)
    assert {(len(s.tokens), s.finish) for s in samples if s.finish != "stop"} == {(2, "aborted")}


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_pause_in_mid_request(directory: Path, mode: Any) -> None:
    """abort ends the running request, wait lets it finish, keep freezes it until resume()."""
    engine = load(directory)
    reached, answer = threading.Event(), []

    def note() -> None:
        reached.set()
        time.sleep(0.05)

    def work() -> None:
        answer.extend(
            ask(
                engine,
                prompts=((5, 6),),
                samples=24,
                max_tokens=50,
                cancelled=between_tokens(note, after=2),
            )
        )

    thread = threading.Thread(target=work)
    thread.start()
    assert reached.wait(5.0)
    engine.pause(mode, timeout_s=10.0)
    with engine.guard().writing(0.5):
        pass
    if mode == "keep":
        time.sleep(0.05)
        assert not answer
    engine.resume()
    thread.join(10.0)
    finishes = {sample.finish for sample in answer}
    assert len(answer) == 24
    assert ("aborted" in finishes) == (mode == "abort")


def test_torn_weights_generate_nothing(directory: Path) -> None:
    """An apply failed half way: generate() raises, and works again after the resync."""
    engine = load(directory)
    with engine.guard().writing(1.0) as writer:
        writer.begin_write()
    with pytest.raises(ReplicaTorn):
        ask(engine)
    change(engine, 3)
    assert {sample.version for sample in ask(engine)} == {3}


def test_weights_that_give_nan_are_an_error(directory: Path) -> None:
    """A model whose logits are NaN answers with an error that names the version, not with ids."""
    engine = load(directory)
    with torch.no_grad():
        engine.tensors()["model.norm.weight"].fill_(torch.nan)
    with pytest.raises(EngineError, match="not finite at version 0"):
        ask(engine)


def test_tensors_are_the_trainers_manifest_and_live(directory: Path) -> None:
    """Tied once, by the names of a trainer's model, patchable in place under no_grad, and seen by
    the next forward; the dtype is the one that was asked for."""
    engine = load(directory, dtype=torch.bfloat16)
    trainer = named_tensors(Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16))
    tensors = engine.tensors()
    assert {k: (v.dtype, v.shape) for k, v in tensors.items()} == {
        k: (v.dtype, v.shape) for k, v in trainer.items()
    }
    assert list(tensors) == list(trainer)
    assert "lm_head.weight" not in tensors
    assert not any(tensor.is_inference() for tensor in tensors.values())
    before = ask(engine, temperature=0.0)
    with torch.no_grad():
        tensors["model.embed_tokens.weight"].copy_(tensors["model.embed_tokens.weight"].flip(0))
    assert ask(engine, temperature=0.0) != before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": ((1,), ("hello"))}, "prompt 1 is text.*no tokenizer.*send token ids"),
        ({"prompts": ((1,), ())}, "prompt 1 has no tokens"),
        ({"prompts": ((3, 16),)}, "prompt 0 has token 16: the model's vocabulary is 0 to 15"),
        ({"prompts": ((-1,),)}, "prompt 0 has token -1"),
        ({"prompts": ((1, 2),), "max_tokens": 63}, "the model takes 64 in all"),
    ],
)
def test_prompts_that_the_model_cannot_take(
    directory: Path, fields: dict[str, Any], message: str
) -> None:
    """Each refusal names the prompt and the fault, before any forward."""
    with pytest.raises(EngineError, match=message):
        ask(load(directory), **fields)


def test_text_prompts_with_a_tokenizer(directory: Path, tmp_path: Path) -> None:
    """A directory with a tokenizer takes text, answers with text, and token ids still work."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *"0123456789", "+", "=", ">", "?"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="?"
    ).save_pretrained(tmp_path)
    Qwen2ForCausalLM.from_pretrained(directory).save_pretrained(tmp_path)
    engine = load(tmp_path)
    text, ids = ask(engine, prompts=("1+2=", (3, 12, 4, 13)), seed=None, temperature=0.0)
    assert text.prompt == (3, 12, 4, 13)
    assert text.tokens == ids.tokens
    assert text.text is not None
    assert text.text.replace(" ", "") == "".join(
        words[token] for token in text.tokens if token > EOS
    )


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    """A path that does not exist, and one without a model, are told apart; nobody asks the hub."""
    with pytest.raises(EngineError, match="there is no directory '/no/such/model'"):
        HuggingFaceEngine.load("/no/such/model")
    with pytest.raises(EngineError, match=r"has no config\.json"):
        HuggingFaceEngine.load(str(tmp_path))


def test_a_directory_without_weights_names_the_fix(directory: Path, tmp_path: Path) -> None:
    """config.json alone is not a model."""
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    with pytest.raises(EngineError, match=r"must hold config\.json and \*\.safetensors"):
        HuggingFaceEngine.load(str(tmp_path))


def test_a_hub_name_that_cannot_be_had_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off line, a name goes to the hub's loader, and its failure says what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EngineError, match="download the model and pass its directory"):
        HuggingFaceEngine.load("sparsecast-tests/no-such-model")


def test_nonsense_options_are_refused(directory: Path) -> None:
    """A misspelt kv and an empty batch fail at load, by name."""
    with pytest.raises(EngineError, match='kv is "keep" or "rebuild", not \'drop\''):
        load(directory, kv="drop")
    with pytest.raises(EngineError, match="max_batch is at least 1"):
        load(directory, max_batch=0)

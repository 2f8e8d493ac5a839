"""`sparsecast ask`: one prompt to the workers of a run, and which weights answered it."""

from __future__ import annotations

import sys

import msgspec

from ..messages.control import Role
from ..messages.rollouts import Sample, Span
from .rollouts import Rollouts


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What `sparsecast ask --json` prints. `spans` are [start, stop, version] over the tokens."""

    text: str | None
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[Span, ...]
    worker: str
    version: int
    finish: str


def ask_once(
    prompt: str,
    *,
    run: str,
    bus: str,
    worker: str | None,
    role: Role,
    max_tokens: int,
    temperature: float,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Print the answer on stdout, and who gave it on stderr. GenerationFailed if none came."""
    with Rollouts(run=run, bus=bus, role=role) as rollouts:
        (sample,) = rollouts.generate(
            [prompt],
            worker=worker,
            max_tokens=max_tokens,
            temperature=temperature,
            timeout_s=timeout_s,
        )
    if as_json:
        print(msgspec.json.encode(_reply(sample)).decode())
        return
    print(sample.text if sample.text is not None else " ".join(map(str, sample.tokens)))
    print(
        f"{sample.worker}, {len(sample.tokens)} tokens, {_origin(sample)}, "
        f"ended by {sample.finish}",
        file=sys.stderr,
    )


def _reply(sample: Sample) -> Reply:
    return Reply(
        text=sample.text,
        tokens=sample.tokens,
        logprobs=sample.logprobs,
        spans=sample.spans,
        worker=sample.worker,
        version=sample.version,
        finish=sample.finish,
    )


def _origin(sample: Sample) -> str:
    """Which versions drew which tokens."""
    if len(sample.spans) == 1:
        return _name(sample.spans[0].version)
    return ", ".join(
        f"tokens {span.start}–{span.stop - 1} from {_name(span.version)}" for span in sample.spans
    )


def _name(version: int) -> str:
    return f"version {version}" if version >= 0 else "weights of no known version"

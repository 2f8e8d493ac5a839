"""Generation over the bus: requests to the workers' service, and samples back (msgpack)."""

from __future__ import annotations

from typing import Literal

import msgspec

from .control import Role, Tags


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, stop) of a completion were sampled from weights at `version`."""

    start: int
    stop: int
    version: int


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One completion: what it says, with which probability, and which versions said it.

    `tokens` are the ids of the completion alone; `logprobs[i]` is the natural logarithm of the
    probability with which tokens[i] was drawn (temperature and nucleus included); `spans` cover
    the tokens in order, without a gap.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[Span, ...]
    worker: str
    finish: str
    index: int = 0
    text: str | None = None
    step: int | None = None
    tags: Tags | None = None

    @property
    def version(self) -> int:
        """The newest version that sampled a token of this completion."""
        return max((span.version for span in self.spans), default=-1)


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Prompts for one worker. A prompt is text (the worker's tokenizer reads it) or token ids.

    `min_version`: the worker waits for it, up to timeout_s, before it samples. Each prompt is
    answered `samples` times. `first_index` is the place of the first prompt in the caller's list:
    samples, reasons and the noise of a seed count from it, so that a list may be cut. Absent
    answer: the client asks another worker.
    """

    request: str
    prompts: tuple[str | tuple[int, ...], ...]
    samples: int = 1
    max_tokens: int = 32
    temperature: float = 1.0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] | None = None
    min_version: int | None = None
    timeout_s: float = 30.0
    seed: int | None = None
    first_index: int = 0


class Generating(msgspec.Struct, frozen=True, kw_only=True, tag="generating"):
    """The worker has the request, and lives: sent on receipt, and then every half second.

    `state`: behind other requests, waiting for min_version, or computing. Absent for a few
    periods: the client asks another worker.
    """

    request: str
    worker: str
    state: Literal["queued", "waiting", "computing"]


class Generated(msgspec.Struct, frozen=True, kw_only=True, tag="generated"):
    """The samples of one request, in the order of the prompts, `samples` for each."""

    request: str
    worker: str
    version: int
    samples: tuple[Sample, ...]
    generate_us: int


class GenerateFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """This worker cannot answer, and why; `retry` if another worker may."""

    request: str
    worker: str
    reason: str
    retry: bool


class Seek(msgspec.Struct, frozen=True, kw_only=True, tag="seek"):
    """A client asks who generates in this run. Absent: nobody wants samples."""

    client: str


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """A worker's answer to Seek: it generates, or says why not now (`refusal`).

    `version` is what its weights hold (None: not known), `requests` how many it has. Who evaluates
    is asked only by name, or by who asks for evaluation. Absent for a few periods: the client takes
    it for gone.
    """

    worker: str
    version: int | None
    requests: int
    refusal: str | None = None
    role: Role = "rollout"


RolloutMessage = Generate | Generating | Generated | GenerateFailed | Seek | Offer

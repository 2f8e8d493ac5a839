"""A piece of a request for samples: which worker has it, and who gets it when that one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from ..messages.errors import BusError, PayloadTooLarge
from ..messages.rollouts import Generate, Generated, GenerateFailed, Sample
from .inquiries import Inquiries, Inquiry, Lost, Outcome, Peer

#: What a sample needs on the wire at most, in bytes: itself, a token of its prompt, and a token of
#: its own with its logprob and its text.
_SAMPLE_NBYTES, _PROMPT_NBYTES, _TOKEN_NBYTES = 160, 5, 24


def cut(request: Generate, count: int, limit_nbytes: int) -> list[range]:
    """Neighbouring prompts, evenly in `count` pieces; more where an answer would be too large."""
    total = len(request.prompts)
    count = min(count, total)
    nbytes = [
        request.samples
        * (_SAMPLE_NBYTES + _PROMPT_NBYTES * len(prompt) + _TOKEN_NBYTES * request.max_tokens)
        for prompt in request.prompts
    ]
    pieces: list[range] = []
    for part in range(count):
        start, filled = part * total // count, 0
        stop = (part + 1) * total // count
        for index in range(start, stop):
            if filled and filled + nbytes[index] > limit_nbytes:
                pieces.append(range(start, index))
                start, filled = index, 0
            filled += nbytes[index]
        pieces.append(range(start, stop))
    return pieces


@dataclass(frozen=True, slots=True)
class Order:
    """One call of generate(): the whole request, and the one worker that was asked for, if any.

    `began` and `deadline` are by the loop's clock.
    """

    inquiries: Inquiries
    request: Generate
    worker: str | None
    began: float
    deadline: float


class Piece:
    """Neighbouring prompts of an order, on their way to an answer."""

    def __init__(self, order: Order, span: range) -> None:
        self._order = order
        self._span = span
        self._inquiries = order.inquiries
        self._policy = order.inquiries.policy
        self._outcomes: asyncio.Queue[tuple[Inquiry, Outcome]] = asyncio.Queue()
        self._asked: list[Inquiry] = []
        #: Workers that could not answer, and until when they are left alone.
        self._resting: dict[str, float] = {}
        self._reasons: dict[str, None] = {}

    async def answered(self) -> tuple[list[Sample], dict[int, str]]:
        """The samples of these prompts, and the reason of each prompt that has none."""
        try:
            return await self._answer()
        finally:
            for inquiry in self._asked:
                self._inquiries.forget(inquiry)

    async def _answer(self) -> tuple[list[Sample], dict[int, str]]:
        loop = asyncio.get_running_loop()
        seen_at = self._order.began
        while True:
            now = loop.time()
            if self._inquiries.closed:
                return self._failed("closed before it was answered")
            if now >= self._order.deadline:
                return self._failed(self._late())
            wait_s = self._order.deadline - now
            if self._there():
                seen_at = now
            if all(inquiry.lost for inquiry in self._asked):
                peer = self._pick(now)
                if peer is not None:
                    try:
                        await self._ask(peer, now)
                    except PayloadTooLarge as exc:
                        return await self._refused(str(exc))
                    except BusError as exc:
                        self._note(peer.name, str(exc), now)
                        continue
                elif now - seen_at >= self._policy.no_worker_s:
                    return self._failed(self._nobody())
                else:
                    wait_s = min(wait_s, self._policy.backoff_s / 4)
            try:
                inquiry, outcome = await asyncio.wait_for(self._outcomes.get(), wait_s)
            except TimeoutError:
                continue
            match outcome:
                case Generated(samples=samples):
                    if self._fits(samples):
                        return list(samples), {}
                    reason = f"answered {len(samples)} samples that are not those of the request"
                    self._ended(inquiry, f"{inquiry.worker} {reason}")
                case GenerateFailed(reason=reason, retry=False):
                    return await self._refused(f"{inquiry.worker}: {reason}")
                case GenerateFailed(reason=reason):
                    self._ended(inquiry, f"{inquiry.worker}: {reason}")
                case Lost(reason=reason):
                    # It stays among those asked: a late answer is as good as another's.
                    self._note(inquiry.worker, reason, loop.time())

    def _there(self) -> list[Peer]:
        """The workers that may be asked, refusing or not."""
        return self._inquiries.peers(self._order.worker)

    def _pick(self, now: float) -> Peer | None:
        """The worker to ask: fresh ones before those that failed us, the least loaded first."""
        able = [
            peer
            for peer in self._there()
            if peer.offer.refusal is None and now >= self._resting.get(peer.name, 0.0)
        ]
        return min(able, key=lambda p: (p.name in self._resting, p.load, p.name), default=None)

    async def _ask(self, peer: Peer, now: float) -> None:
        request = msgspec.structs.replace(
            self._order.request,
            request=self._inquiries.name(),
            prompts=self._order.request.prompts[self._span.start : self._span.stop],
            first_index=self._span.start,
            timeout_s=self._order.deadline - now,
        )
        self._asked.append(await self._inquiries.ask(peer.name, request, self._outcomes))

    def _ended(self, inquiry: Inquiry, reason: str) -> None:
        self._asked.remove(inquiry)
        self._note(inquiry.worker, reason, asyncio.get_running_loop().time())

    def _note(self, worker: str, reason: str, now: float) -> None:
        self._resting[worker] = now + self._policy.backoff_s
        self._reasons.pop(reason, None)
        self._reasons[reason] = None

    async def _refused(self, reason: str) -> tuple[list[Sample], dict[int, str]]:
        """No worker will take this piece as it is: halve it, so that one prompt spoils no other."""
        if len(self._span) == 1:
            return self._failed(reason)
        middle = self._span.start + len(self._span) // 2
        halves = await asyncio.gather(
            *(
                Piece(self._order, span).answered()
                for span in (range(self._span.start, middle), range(middle, self._span.stop))
            )
        )
        (left, failed_left), (right, failed_right) = halves
        return left + right, failed_left | failed_right

    def _fits(self, samples: Sequence[Sample]) -> bool:
        expected = [index for index in self._span for _ in range(self._order.request.samples)]
        return [sample.index for sample in samples] == expected

    # ---- reasons

    def _failed(self, reason: str) -> tuple[list[Sample], dict[int, str]]:
        return [], dict.fromkeys(self._span, reason)

    def _nobody(self) -> str:
        run, url, only = self._inquiries.run, self._inquiries.url, self._order.worker
        history = "".join(f"; {reason}" for reason in list(self._reasons)[-2:])
        names = ", ".join(sorted(peer.name for peer in self._inquiries.peers()))
        if names:
            return f"no worker {only!r} of run {run!r} answers on bus {url}{history}; {names} do"
        what, option = "worker", ""
        if self._inquiries.role == "evaluation":
            what, option = "worker for evaluation", " --role evaluation"
        return (
            f"no {what} of run {run!r} answers on bus {url}{history}; start one with: sparsecast "
            f"worker --run {run} --bus {url} --name {only or 'worker-0'} --model DIR{option}"
        )

    def _late(self) -> str:
        if not self._there():
            return self._nobody()
        reasons = list(self._reasons)[-3:]
        reasons += [f"{i.worker} has it ({i.state})" for i in self._asked if not i.lost]
        reasons += [
            f"{peer.name} refuses: {peer.offer.refusal}"
            for peer in self._there()
            if peer.offer.refusal is not None
        ]
        told = "; ".join(reasons) or "no worker was free"
        return f"not answered within {self._order.request.timeout_s:g} s: {told}"

"""Subjects and streams: where each message of a run travels.

Everything of a run lives under `sparsecast.<run>.`; the sender's identity is part of the subject,
so that the server's permissions can enforce it.
"""

from __future__ import annotations

import re

from .errors import InvalidName

ROOT = "sparsecast"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ENTRY = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[0-9]{1,6})?")

#: The stream that holds one lease a run, each with a time to live.
LEASE_STREAM = "sparsecast-leases"
LEASE_SUBJECTS = f"{ROOT}.*.lease"


def check_token(kind: str, name: str) -> str:
    """Return `name` if it can be one token of a subject, else raise InvalidName."""
    if not _TOKEN.fullmatch(name):
        raise InvalidName(kind, name)
    if kind == "worker" and name == "trainer":
        # Its metrics would go to the trainer's subject, and its events would be the trainer's.
        raise InvalidName(kind, name, "that is what the trainer is called")
    return name


def check_entry(name: str) -> str:
    """Return `name` if a log entry can be called so, else raise InvalidName: one token, and another
    one of digits for a piece of an entry."""
    if not _ENTRY.fullmatch(name):
        raise InvalidName("log entry", name)
    return name


class Subjects:
    """The subjects of one run."""

    def __init__(self, run: str) -> None:
        self.run = check_token("run", run)
        self.prefix = f"{ROOT}.{run}"

        #: The journal: claims and announcements, stored with compare-and-set (trainer → stream).
        self.journal_stream = f"sparsecast-{run}-journal"
        self.announce_claim = f"{self.prefix}.announce.claim"
        self.announce_update = f"{self.prefix}.announce.update"
        self.announce_all = f"{self.prefix}.announce.>"
        #: What the journal accepted, republished by the server (stream → members).
        self.announced_claim = f"{self.prefix}.announced.claim"
        self.announced_update = f"{self.prefix}.announced.update"
        self.announced_all = f"{self.prefix}.announced.>"
        #: Who holds the run (trainer → lease stream).
        self.lease = f"{self.prefix}.lease"

        #: Control (trainer → all members).
        self.trainer_control = f"{self.prefix}.trainer.control"
        #: Control of every member (members → trainer).
        self.worker_control_all = f"{self.prefix}.worker.*.control"

        #: The log: chunks of patches and anchors, and their index.
        self.log_stream = f"sparsecast-{run}-log"
        self.log_all = f"{self.prefix}.log.>"
        self.log_chunks_all = f"{self.prefix}.log.chunks.>"
        self.log_index = f"{self.prefix}.log.index"
        self.log_index_all = f"{self.log_index}.>"

        #: Metrics and events, in JSON.
        self.metrics_trainer = f"{self.prefix}.metrics.trainer"
        self.metrics_all = f"{self.prefix}.metrics.*"
        self.events = f"{self.prefix}.events"

        #: Generation requests: any worker (queue group `workers`), or one by name.
        self.generate_any = f"{self.prefix}.generate"
        #: Who generates? (clients → every generating worker, which answers with an Offer)
        self.offers = f"{self.prefix}.offers"

    def worker_control(self, name: str) -> str:
        """Control of one member (member → trainer)."""
        return f"{self.prefix}.worker.{check_token('worker', name)}.control"

    def orders(self, name: str) -> str:
        """What the first rank of a worker, or of the trainer, tells the others."""
        return f"{self._side(name)}.orders"

    def rank(self, name: str, rank: int | None) -> str:
        """What another rank of a worker, or of the trainer, tells the first one; None: any."""
        return f"{self._side(name)}.rank.{'*' if rank is None else rank}"

    def _side(self, name: str) -> str:
        if name == "trainer":
            return f"{self.prefix}.trainer"
        return f"{self.prefix}.worker.{check_token('worker', name)}"

    def metrics(self, name: str) -> str:
        """Metrics of one worker."""
        return f"{self.prefix}.metrics.{check_token('worker', name)}"

    def generate(self, name: str) -> str:
        """Generation requests for one worker by name."""
        return f"{self.prefix}.generate.{check_token('worker', name)}"

    def status(self, name: str) -> str:
        """Where one worker tells its statistics, in JSON, to whoever asks."""
        return f"{self.prefix}.status.{check_token('worker', name)}"

    def answers(self, client: str) -> str:
        """The prefix of one client's inbox: offers, and what becomes of its requests."""
        return f"{self.prefix}.answers.{check_token('client', client)}"

    def window(self, epoch: int, window: int) -> str:
        """The prefix of one window's own traffic: rendezvous, chunks, acknowledgements."""
        return f"{self.prefix}.window.{epoch}.{window}"

    def log_chunks(self, entry: str) -> str:
        """The chunks of one log entry, in the order of their sequences."""
        return f"{self.prefix}.log.chunks.{check_entry(entry)}"

    def log_entry(self, entry: str) -> str:
        """The index entry of one log entry, a subject of its own: it can be dropped alone."""
        return f"{self.log_index}.{check_entry(entry)}"


def sender(subject: str) -> str:
    """The worker's name in a subject of `worker_control` or `metrics`."""
    tokens = subject.split(".")
    return tokens[3] if len(tokens) > 3 else ""

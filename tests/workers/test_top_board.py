"""The board: what a run looks like from its messages alone, without bus, clock or terminal."""

import pytest
from msgspec.structs import fields, replace

from sparsecast.messages import control as msg
from sparsecast.messages.control import Sender
from sparsecast.messages.manifest import Manifest
from sparsecast.messages.metrics import Event, TrainerMetrics, WorkerMetrics
from sparsecast.workers.board import Board, MemberRow, percentile

TRAINER = Sender("trainer", "t1")


def worker(name: str, incarnation: str = "a") -> Sender:
    """A worker in one of its lives."""
    return Sender(name, incarnation)


def heartbeat(
    name: str,
    version: int | None,
    verified: int | None,
    *,
    lagging: str | None = None,
    incarnation: str = "a",
) -> msg.Heartbeat:
    """A heartbeat at these versions."""
    return msg.Heartbeat(
        sender=worker(name, incarnation),
        epoch=1,
        version=version,
        verified=verified,
        lagging=lagging,
    )


def trainer_round(version: int, *, total_us: int = 10_000, **changes: object) -> TrainerMetrics:
    """The trainer's metrics of one round."""
    times = {f.name: 1 for f in fields(TrainerMetrics) if f.name.endswith("_us")}
    values: dict[str, object] = {
        "time_s": 0.0,
        "run": "r",
        "epoch": 1,
        "version": version,
        "base_version": version - 1,
        "changed": 10,
        "density": 0.01,
        "nbytes": 40,
        "dense_nbytes": 2000,
        "encoding": "sparse",
        "window": 1,
        "transport": "gloo",
        "attempt": 1,
        "members": 2,
        "applied": 2,
        "verified": 2,
        "total_us": total_us,
    }
    return TrainerMetrics(**(times | values | changes))  # type: ignore[arg-type]


def worker_round(name: str, version: int, **changes: object) -> WorkerMetrics:
    """A worker's metrics of one version."""
    times = {f.name: 1 for f in fields(WorkerMetrics) if f.name.endswith("_us")}
    values: dict[str, object] = {
        "time_s": 0.0,
        "run": "r",
        "worker": name,
        "epoch": 1,
        "version": version,
        "base_version": version - 1,
        "lag": 0,
        "nbytes": 40,
        "source": "window",
        "window": 1,
        "transport": "gloo",
        "attempt": 1,
        "receive_us": 1000,
        "check_us": 500,
        "staged_us": 2500,
        "apply_us": 2000,
        "verify_us": 700,
        "verified": True,
        "mismatches": 0,
    }
    return WorkerMetrics(**(times | values | changes))  # type: ignore[arg-type]


def only(board: Board, now: float) -> MemberRow:
    """The one member of a board."""
    (row,) = board.snapshot(now).members
    return row


def test_an_idle_run_is_not_blank() -> None:
    """Nothing is published while somebody looks: heartbeats alone fill the table."""
    board = Board("r")
    assert board.snapshot(0.0).trainer.state == "unheard"
    board.hear(msg.Beat(sender=TRAINER, epoch=3, version=17), 1.0)
    board.hear(heartbeat("w0", 17, 17), 1.1)
    board.hear(heartbeat("w1", 15, 15), 1.2)
    snapshot = board.snapshot(1.5)
    assert (snapshot.trainer.state, snapshot.trainer.epoch, snapshot.trainer.version) == (
        "alive",
        3,
        17,
    )
    assert [(row.name, row.state, row.version, row.lag) for row in snapshot.members] == [
        ("w0", "following", 17, 0),
        ("w1", "following", 15, 2),
    ]
    assert snapshot.members[0].round_p50_ms is None
    assert board.heard == (True, {"w0", "w1"})


def test_a_round_fills_the_figures() -> None:
    """A round goes by: its times, bytes and density show at the trainer and at the worker."""
    board = Board("r")
    board.hear(heartbeat("w0", 4, 4), 0.0)
    board.hear(worker_round("w0", 5), 0.1)
    board.hear(trainer_round(5, total_us=8_000, step=40), 0.2)
    snapshot = board.snapshot(0.3)
    assert (snapshot.trainer.round_p50_ms, snapshot.trainer.nbytes) == (8.0, 40)
    assert (snapshot.trainer.step, snapshot.trainer.transport) == (40, "gloo")
    row = snapshot.members[0]
    assert (row.version, row.verified, row.lag, row.rounds) == (5, 5, 0, 1)
    assert (row.round_p50_ms, row.nbytes, row.density, row.source) == (4.0, 40, 0.01, "gloo")


def test_a_version_is_verifying_until_its_digest_is_found_right() -> None:
    """A worker has applied 6 and still digests it; then it follows again."""
    board = Board("r")
    board.hear(heartbeat("w0", 5, 5), 0.0)
    board.hear(msg.Applied(sender=worker("w0"), epoch=1, version=6), 0.1)
    assert (only(board, 0.2).state, only(board, 0.2).verified) == ("verifying", 5)
    board.hear(msg.Verified(sender=worker("w0"), epoch=1, version=6, digest=1, ok=True), 0.3)
    assert (only(board, 0.4).state, only(board, 0.4).verified) == ("following", 6)


def test_a_mismatch_stays_in_sight_until_the_worker_is_sound() -> None:
    """A digest is wrong, the worker resyncs: the row says so until a verified version is back."""
    board = Board("r")
    board.hear(heartbeat("w0", 5, 5), 0.0)
    board.hear(msg.Verified(sender=worker("w0"), epoch=1, version=6, digest=1, ok=False), 0.1)
    board.hear(heartbeat("w0", None, None), 0.6)
    row = only(board, 0.7)
    assert row.state == "mismatch"
    assert "version 6" in row.note
    board.hear(worker_round("w0", 6, source="log", mismatches=1), 1.0)
    row = only(board, 1.1)
    assert (row.state, row.mismatches, row.source) == ("following", 1, "log")


def test_lagging_and_silence_are_told_with_their_reasons() -> None:
    """A worker says that it lags, then says nothing more; later it is forgotten."""
    board = Board("r", silence_s=4.0, forget_s=60.0)
    board.hear(heartbeat("w0", 5, 5, lagging="readers hold the guard for 6 s"), 0.0)
    assert (only(board, 1.0).state, only(board, 1.0).note) == (
        "lagging",
        "readers hold the guard for 6 s",
    )
    assert (only(board, 9.0).state, only(board, 9.0).note) == ("silent", "not heard for 9 s")
    assert board.snapshot(61.0).members == ()


def test_the_trainer_falls_silent_comes_back_and_says_goodbye() -> None:
    """The trainer's state follows what is heard of it; a late metric does not revive it."""
    board = Board("r", silence_s=4.0)
    board.hear(msg.Beat(sender=TRAINER, epoch=1, version=1), 0.0)
    assert board.snapshot(5.0).trainer.state == "silent"
    board.hear(msg.Beat(sender=TRAINER, epoch=1, version=1), 6.0)
    assert board.snapshot(6.0).trainer.state == "alive"
    board.hear(msg.Bye(sender=TRAINER, epoch=1), 7.0)
    board.hear(trainer_round(2), 7.1)
    assert board.snapshot(7.2).trainer.state == "left"


def test_a_new_life_of_a_worker_starts_with_clean_figures() -> None:
    """A worker is restarted under its name: rounds and mismatches of its old life are gone."""
    board = Board("r")
    board.hear(heartbeat("w0", 5, 5), 0.0)
    board.hear(worker_round("w0", 6, mismatches=2), 0.1)
    assert only(board, 0.2).mismatches == 2
    board.hear(msg.Leave(sender=worker("w0"), epoch=1, reason="SIGTERM"), 0.3)
    assert only(board, 0.4).state == "left"
    board.hear(heartbeat("w0", 6, 6, incarnation="b"), 0.5)
    row = only(board, 0.6)
    assert (row.state, row.mismatches, row.rounds) == ("following", 0, 0)


def test_a_second_process_under_a_name_does_not_take_the_row() -> None:
    """A newcomer says Join under a live worker's name and is refused: the holder's row stays."""
    board = Board("r")
    board.hear(heartbeat("w0", 5, 5), 0.0)
    join = msg.Join(
        sender=worker("w0", "b"), epoch=1, manifest_hash="", offers=(), device="cpu", host="", pid=1
    )
    board.hear(join, 0.1)
    board.hear(
        msg.Refuse(sender=TRAINER, to=worker("w0", "b"), code="name-in-use", reason="taken"), 0.2
    )
    assert (only(board, 0.3).state, only(board, 0.3).version) == ("following", 5)


def test_a_refused_model_is_told_at_the_worker() -> None:
    """A worker with another model is refused: its row says why."""
    board = Board("r")
    join = msg.Join(
        sender=worker("w0"), epoch=1, manifest_hash="", offers=(), device="cpu", host="", pid=1
    )
    board.hear(join, 0.0)
    assert only(board, 0.0).state == "joining"
    reason = "tensor 'lm_head' is missing on the other side"
    board.hear(msg.Refuse(sender=TRAINER, to=worker("w0"), code="manifest", reason=reason), 0.1)
    board.hear(join, 0.2)
    assert (only(board, 0.3).state, only(board, 0.3).note) == ("refused", reason)


def test_an_evicted_member_is_marked_and_the_event_kept() -> None:
    """The trainer puts a member out: row and events say so."""
    board = Board("r")
    board.hear(heartbeat("w0", 5, 5), 0.0)
    event = Event(time_s=0.0, run="r", kind="evict", member="w0", reason="silent for 4.1 s")
    board.hear(event, 1.0)
    assert (only(board, 1.1).state, only(board, 1.1).note) == ("put out", "silent for 4.1 s")
    assert board.snapshot(1.1).events == (event,)


def test_a_new_epoch_forgets_the_versions_of_the_old() -> None:
    """A successor claims the run at version 9: the old head does not count, and stale words of
    the old trainer do not bring it back."""
    board = Board("r")
    board.hear(msg.Beat(sender=TRAINER, epoch=1, version=12), 0.0)
    board.hear(heartbeat("w0", 12, 12), 0.1)
    claim = msg.Claim(
        sender=Sender("trainer", "t2"), epoch=2, version=9, digest=1,
        manifest=Manifest(tensors=()), nonce="n", heartbeat_s=0.5,
    )  # fmt: skip
    board.hear(claim, 0.2)
    board.hear(msg.Beat(sender=TRAINER, epoch=1, version=13), 0.3)
    snapshot = board.snapshot(0.4)
    assert (snapshot.trainer.epoch, snapshot.trainer.version) == (2, 9)
    assert snapshot.members[0].version is None


def test_a_round_for_nobody_is_no_time() -> None:
    """Publishing with no member in: the round has no time to be told."""
    board = Board("r")
    board.hear(trainer_round(1, total_us=0, members=0, transport="log", window=0), 0.0)
    trainer = board.snapshot(0.1).trainer
    assert (trainer.rounds, trainer.round_p50_ms, trainer.transport) == (1, None, "log")


def test_workers_are_listed_as_people_count() -> None:
    """worker-10 comes after worker-2."""
    board = Board("r")
    for name in ("worker-10", "worker-2", "alpha"):
        board.hear(heartbeat(name, 1, 1), 0.0)
    assert [row.name for row in board.snapshot(0.0).members] == ["alpha", "worker-2", "worker-10"]


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        pytest.param([], 0.5, None, id="none"),
        pytest.param([7.0], 0.99, 7.0, id="one"),
        pytest.param([3.0, 1.0, 2.0], 0.5, 2.0, id="middle"),
        pytest.param([float(i) for i in range(1, 101)], 0.99, 99.0, id="p99-of-100"),
        pytest.param([float(i) for i in range(1, 101)], 1.0, 100.0, id="all"),
    ],
)
def test_percentiles_are_values_that_were_measured(
    values: list[float], share: float, expected: float | None
) -> None:
    """A percentile is one of the values: the smallest that enough of them do not exceed."""
    assert percentile(values, share) == expected


def progress(name: str, nbytes: int, state: str = "under way", **changes: object) -> Event:
    """What a worker says that catches up."""
    details = {
        "state": state, "base_version": None, "version": None, "target": 9, "nbytes": nbytes,
        "of_nbytes": 1000, "entries": 0, "of_entries": 2, "elapsed_s": 1.0,
    }  # fmt: skip
    return Event(
        time_s=0.0, run="r", kind="catch-up", member=name, reason=f"{state} {nbytes}",
        details=details | changes,
    )  # fmt: skip


def test_a_worker_that_catches_up_shows_its_share() -> None:
    """It has nothing yet, and says how far it is: the row has the share, and the events only the
    newest of each member's; when it is in, the share is gone."""
    board = Board("r")
    board.hear(msg.Beat(sender=TRAINER, epoch=1, version=9), 0.0)
    board.hear(progress("w0", 0), 0.0)  # of nobody that was heard
    assert board.snapshot(0.0).members == ()
    board.hear(heartbeat("w0", None, None), 0.1)
    assert (only(board, 0.1).state, only(board, 0.1).caught_up) == ("joining", None)
    for nbytes in (0, 250, 430):
        board.hear(progress("w0", nbytes), 0.2)
        board.hear(heartbeat("w0", None, None), 0.3)
        row = only(board, 0.3)
        assert (row.state, row.caught_up) == ("catching up", nbytes / 1000)
    assert row.note == "catching up from the log: 43% of what leads to version 9"
    board.hear(progress("w1", 100), 0.3)
    told = [event.reason for event in board.snapshot(0.3).events]
    assert told == ["under way 430", "under way 100"]
    board.hear(heartbeat("w0", 9, 4), 0.4)
    assert only(board, 0.4).state == "catching up"
    board.hear(progress("w0", 1000, "done", version=9), 0.5)
    board.hear(heartbeat("w0", 9, 9), 0.6)
    row = only(board, 0.6)
    assert (row.state, row.note, row.caught_up) == ("following", "", None)
    board.hear(progress("w0", 10), 0.7)
    assert [event.reason for event in board.snapshot(0.7).events][1:] == [
        "done 1000", "under way 10",
    ]  # fmt: skip


def test_the_share_ends_though_the_last_word_is_lost() -> None:
    """The event of the end never came: whoever holds the target, proven, is in; whoever is torn,
    lags or is silent shows that instead."""
    board = Board("r")
    board.hear(heartbeat("w0", 3, 3), 0.0)
    board.hear(progress("w0", 500), 0.1)
    assert only(board, 0.1).state == "catching up"
    board.hear(heartbeat("w0", 5, 5), 0.2)  # a part of the way
    assert only(board, 0.2).caught_up == 0.5
    board.hear(heartbeat("w0", 5, 5, lagging="readers"), 0.3)
    assert only(board, 0.3).state == "lagging"
    assert (only(board, 9.0).state, only(board, 9.0).caught_up) == ("silent", None)
    board.hear(heartbeat("w0", 9, 9), 9.1)
    assert (only(board, 9.1).state, only(board, 9.1).caught_up) == ("following", None)


@pytest.mark.parametrize(
    "changes",
    [{"state": "broken off"}, {"nbytes": "much"}, {"of_nbytes": 0}, {"nbytes": -1},
     {"nbytes": 1001}, {"target": None}],
    ids=["broken off", "no number", "of nothing", "negative", "more than all", "nowhere"],
)  # fmt: skip
def test_what_is_no_share_is_none(changes: dict[str, object]) -> None:
    """It broke off, or somebody else's release tells other figures: there is no share."""
    board = Board("r")
    board.hear(heartbeat("w0", None, None), 0.0)
    board.hear(progress("w0", 500), 0.1)
    told = progress("w0", 500)
    board.hear(replace(told, details=(told.details or {}) | changes), 0.2)
    assert (only(board, 0.2).state, only(board, 0.2).caught_up) == ("joining", None)

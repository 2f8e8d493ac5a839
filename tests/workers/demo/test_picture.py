"""The demo's picture and lines: pure functions of figures, within 80 columns."""

import io

from msgspec.structs import fields
from rich.console import Console

from sparsecast.messages.metrics import TrainerMetrics
from sparsecast.workers.board import Board
from sparsecast.workers.demo.evidence import WorkerOutcome
from sparsecast.workers.demo.picture import Look, figures, line, picture, sparkline
from sparsecast.workers.demo.progress import Answer, Point, Progress, outcome


def warm(version: int) -> Point:
    """A warm-up update."""
    return Point(version, 0.5, None, 0.57, 4_000_000, 6_308_352, "bitmap")


def rl(version: int, reward: float) -> Point:
    """An RL update."""
    return Point(version, 0.01, reward, 0.0123, 157_000, 6_308_352, "sparse")


def progress(warm_count: int, rewards: list[float]) -> Progress:
    """A demo that has come so far."""
    found = Progress("demo-a1b2", updates=500, warmup=240)
    found.warm += [warm(version) for version in range(1, warm_count + 1)]
    found.rl += [rl(warm_count + i, reward) for i, reward in enumerate(rewards, 1)]
    return found


def look(top: str = "sparsecast top --run demo-a1b2 --bus nats://127.0.0.1:40001") -> Look:
    """What others know."""
    one = WorkerOutcome(applied=340, verified=340, mismatches=0, version=340)
    return Look(
        snapshot=Board("demo-a1b2").snapshot(0.0),
        round_ms=[12.3, 45.6],
        workers={"worker-1": one, "worker-0": one},
        window="gloo",
        top=top,
    )


def round_of(version: int, applied: int) -> TrainerMetrics:
    """A round's metrics, every time in it `version` milliseconds."""
    times = [field.name for field in fields(TrainerMetrics) if field.name.endswith("_us")]
    return TrainerMetrics(
        time_s=0.0, run="r", epoch=1, version=version, base_version=version - 1, changed=1,
        density=0.1, nbytes=1, dense_nbytes=2, encoding="sparse", window=1, transport="gloo",
        attempt=1, members=2, applied=applied, verified=applied,
        **dict.fromkeys(times, 1000 * version),
    )  # fmt: skip


def drawn(found: Progress, seen: Look) -> list[str]:
    """The picture's lines in 80 columns."""
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(picture(found, seen, 83.0))
    return console.export_text().splitlines()


def test_the_reward_is_drawn_from_zero_to_one() -> None:
    """Bars go by the value, not by the range: a flat reward of 0.5 is half-way up, always."""
    assert sparkline([0.0, 0.5, 1.0], 3) == "▁▅█"
    assert sparkline([0.5] * 100, 4) == "▅▅▅▅"
    assert sparkline([0.0] * 50 + [1.0] * 50, 2) == "▁█"
    assert sparkline([2.0, -1.0], 2) == "█▁"
    assert sparkline([], 10) == ""


def test_the_figures_are_medians_and_a_ratio_of_sums() -> None:
    """Share, bytes, encoding and the ratio to dense of some updates."""
    assert figures([rl(1, 0.1), rl(2, 0.1)]) == (
        "1.23% changed, 157 kB an update (sparse), 40.2× fewer bytes than dense"
    )
    assert figures([warm(1)]).startswith("57.0% changed, 4.00 MB an update (bitmap), 1.6×")


def test_the_warm_up_is_labelled_as_what_it_is() -> None:
    """Before RL: the loss, and that the steps are large; no reward that is not there yet."""
    lines = drawn(progress(40, []), look())
    assert any("warm-up update 40 of 240" in text for text in lines)
    assert any("large supervised steps" in text for text in lines)
    assert not any("reward" in text for text in lines)
    assert "warm-up 40/240" in line(progress(40, []), look())


def test_rl_shows_reward_first_and_all_that_was_promised() -> None:
    """In RL: reward, share, bytes, rounds, workers, both answers, the command; 80 columns."""
    found = progress(240, [0.3] * 50 + [0.6] * 50)
    found.early = Answer(240, "5 2 9 1 3", "9 5 3 2 1", right=False)
    found.newest = Answer(340, "5 2 9 1 3", "1 2 3 5 9", right=True)
    found.notes.append("worker-1 ended with SIGKILL\nits last words")
    lines = drawn(found, look())
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert lines[3].startswith("reward   ▃▃")
    assert "0.60  from 0.30" in lines[3]
    assert "1.23% changed, 157 kB an update (sparse), 40.2× fewer" in text
    assert "p50 12.3 ms, p99 45.6 ms" in text
    assert "version 240  sort 5 2 9 1 3 = 9 5 3 2 1 ✗" in text
    assert "version 340  sort 5 2 9 1 3 = 1 2 3 5 9 ✓" in text
    assert "worker-1 ended with SIGKILL" in text
    assert "its last words" not in text
    assert text.index("worker-0") < text.index("worker-1")
    assert "in a second terminal: sparsecast top --run demo-a1b2" in text
    assert "second terminal" not in "\n".join(drawn(found, look(top="")))


def test_the_outcome_sums_up() -> None:
    """The JSON's figures: means of 20, medians of each phase, rounds of the RL phase alone."""
    found = progress(2, [0.1] * 20 + [0.5] * 30 + [0.9] * 20)
    rounds = [
        round_of(version, applied) for version, applied in ((1, 2), (2, 2), (3, 2), (4, 0), (5, 2))
    ]
    worker = WorkerOutcome(applied=72, verified=72, mismatches=0, version=72)
    told = outcome(found, rounds, {"w": worker}, window="gloo", devices={"w": "cpu"})
    assert (told.updates, told.rl_updates) == (72, 70)
    assert (told.density.warmup_p50, told.density.rl_p50) == (0.57, 0.0123)
    assert told.nbytes.total == 2 * 4_000_000 + 70 * 157_000
    assert told.nbytes.dense_total == 72 * 6_308_352
    assert (told.round_ms.p50, told.round_ms.p99) == (3.0, 5.0)
    assert told.reward.first is not None
    assert told.reward.last is not None
    assert (round(told.reward.first, 6), round(told.reward.last, 6)) == (0.1, 0.9)
    assert found.quarters is not None
    assert found.quarters[0] < found.quarters[1]


def test_a_demo_that_got_nowhere_has_no_figures() -> None:
    """Interrupted before the first update: nothing is made up."""
    told = outcome(progress(0, []), [], {}, window="none yet", devices={})
    assert (told.updates, told.density.rl_p50, told.round_ms.p50, told.reward.last) == (
        0,
        None,
        None,
        None,
    )

"""Who plays on which device: the choice for machines with 0, 1, 2, 4 and 8 GPUs."""

import pytest

from sparsecast.messages.errors import SettingsError
from sparsecast.workers.demo.cast import Cast, choose

CPU, ONE = "cpu", "cuda:0"


def chosen(
    gpus: int,
    *,
    device: str = "auto",
    workers: int | None = None,
    window: str = "auto",
    no_nccl: str | None = None,
) -> Cast:
    """A choice where nothing is asked for but what a test says."""
    return choose(gpus, device=device, workers=workers, window=window, no_nccl=no_nccl)


@pytest.mark.parametrize(
    ("gpus", "trainer", "workers"),
    [
        pytest.param(0, CPU, (CPU, CPU), id="0"),
        pytest.param(1, ONE, (ONE, ONE), id="1"),
        pytest.param(2, ONE, ("cuda:1",), id="2"),
        pytest.param(4, ONE, ("cuda:1", "cuda:2"), id="4"),
        pytest.param(8, ONE, ("cuda:1", "cuda:2"), id="8"),
    ],
)
def test_nothing_asked_for(gpus: int, trainer: str, workers: tuple[str, ...]) -> None:
    """`sparsecast demo` uses what is there; with two GPUs one worker, for one GPU a process."""
    cast = chosen(gpus)
    assert (cast.trainer, cast.workers, cast.window) == (trainer, workers, "auto")
    if gpus == 2:
        assert "2 GPUs leave room for 1" in cast.why
    if gpus == 1:
        assert "one GPU for all" in cast.why


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_as_many_workers_as_asked_for_go_by_nccl_where_each_has_a_gpu(gpus: int) -> None:
    """--workers up to one less than the GPUs: one each, none with the trainer."""
    cast = chosen(gpus, workers=gpus - 1)
    assert cast.workers == tuple(f"cuda:{index}" for index in range(1, gpus))
    assert cast.window == "auto"
    assert "for NCCL" in cast.why


def test_more_workers_than_gpus_share_them_and_go_by_gloo() -> None:
    """--workers prevails: three on the one GPU beside the trainer's, told as not by NCCL."""
    cast = chosen(2, workers=3)
    assert (cast.workers, cast.window) == (("cuda:1",) * 3, "gloo")
    assert "3 workers on 1 of 2 GPUs share: not by NCCL" in cast.why
    assert chosen(4, workers=5).workers == ("cuda:1", "cuda:2", "cuda:3", "cuda:1", "cuda:2")


def test_without_nccl_the_gpus_are_used_and_it_is_said_why() -> None:
    """nccl4py is missing on four GPUs: the same devices, another window, and the reason."""
    cast = chosen(4, no_nccl="nccl4py is not installed")
    assert (cast.trainer, cast.workers) == (ONE, ("cuda:1", "cuda:2"))
    assert cast.why == "without NCCL: nccl4py is not installed"
    assert chosen(2, no_nccl="none").workers == ("cuda:1", "cuda:1")


def test_a_window_asked_for_is_taken() -> None:
    """--window bus on GPUs, on the CPU, and nccl where it can be."""
    assert chosen(2, window="bus").window == "bus"
    assert chosen(2, window="bus").workers == ("cuda:1", "cuda:1")
    assert chosen(0, window="gloo").window == "gloo"
    for workers in (None, 1):
        cast = chosen(2, window="nccl", workers=workers)
        assert (cast.workers, cast.window) == (("cuda:1",), "nccl")


def test_the_cpu_is_taken_where_it_is_asked_for() -> None:
    """--device cpu on a machine with eight GPUs."""
    cast = chosen(8, device="cpu", workers=3)
    assert (cast.trainer, cast.workers, cast.why) == (CPU, (CPU,) * 3, "as asked")


@pytest.mark.parametrize(
    ("gpus", "asked", "says"),
    [
        pytest.param(0, {"device": "cuda"}, "torch sees no GPU", id="cuda"),
        pytest.param(0, {"window": "nccl"}, "tensors on GPUs", id="cpu-nccl"),
        pytest.param(8, {"window": "nccl", "device": "cpu"}, "tensors on GPUs", id="as-asked"),
        pytest.param(1, {"window": "nccl"}, "2 GPUs are needed, 1 here", id="one-gpu"),
        pytest.param(2, {"window": "nccl", "workers": 2}, "3 GPUs are needed, 2 here", id="two"),
        pytest.param(2, {"window": "nccl", "no_nccl": "no nccl4py"}, "no nccl4py", id="no-nccl"),
    ],
)
def test_what_cannot_be_is_refused(gpus: int, asked: dict, says: str) -> None:
    """An impossible wish is an error that says what would be needed, not another demo."""
    with pytest.raises(SettingsError, match=says):
        chosen(gpus, **asked)

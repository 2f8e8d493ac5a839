"""Devices as the command line names them."""

import pytest

from sparsecast.messages.errors import SettingsError
from sparsecast.workers.devices import index_of, resolve, several


def test_a_device_that_is_there_gets_its_index() -> None:
    """cuda is the first GPU; cpu stays what it is, with or without GPUs."""
    assert [resolve("cpu", 0), resolve("cpu", 2)] == ["cpu", "cpu"]
    assert [resolve("cuda", 1), resolve("cuda:1", 2)] == ["cuda:0", "cuda:1"]
    assert [index_of("cpu"), index_of("cuda"), index_of("cuda:12")] == [None, 0, 12]


@pytest.mark.parametrize(
    ("device", "gpus", "says"),
    [
        pytest.param("cuda:0", 0, "torch sees no GPU here; use --device cpu", id="no-gpu"),
        pytest.param("cuda:1", 1, "torch sees cuda:0$", id="one"),
        pytest.param("cuda:8", 8, "torch sees cuda:0 to cuda:7", id="eight"),
        pytest.param("cuda:", 8, "expected cpu, cuda or cuda:N", id="empty"),
        pytest.param("gpu0", 8, "expected cpu, cuda or cuda:N", id="word"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    device: str, gpus: int, says: str
) -> None:
    """The error names the device and what to use in its place."""
    with pytest.raises(SettingsError, match=says) as refused:
        resolve(device, gpus)
    assert repr(device) in str(refused.value)


def test_one_or_two_devices_are_read() -> None:
    """auto leaves the choice; one device, or two with a comma; more, or a slip, is refused."""
    assert several("auto") == ()
    assert several("cuda:3") == ("cuda:3",)
    assert several("cuda:0, cuda:1") == ("cuda:0", "cuda:1")
    for wrong in ("cuda:0,cuda:1,cuda:2", "cuda:0,", ""):
        with pytest.raises(SettingsError):
            several(wrong)

"""Settings: the TOML file, and how a command finds its bus."""

from pathlib import Path

import pytest

from sparsecast.messages.errors import SettingsError
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.workers.settings import find_bus, from_file, refuse_credentials

KNOWN = {
    "worker": frozenset({"run", "bus", "name", "max-lag"}),
    "top": frozenset({"run", "bus", "wait-s"}),
}


def write(tmp_path: Path, text: str) -> Path:
    """A settings file."""
    path = tmp_path / "sparsecast.toml"
    path.write_text(text)
    return path


def test_a_table_goes_before_the_top_level(tmp_path: Path) -> None:
    """One file serves all commands: each takes what it knows, its own table last."""
    path = write(
        tmp_path, 'run = "a"\nwait-s = 2.5\n[worker]\nrun = "b"\nmax_lag = 3\n[top]\nbus = "x"\n'
    )
    assert from_file(path, "worker", KNOWN) == {"run": "b", "max_lag": 3}
    assert from_file(path, "top", KNOWN) == {"run": "a", "wait_s": 2.5, "bus": "x"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param('rnu = "a"', "no command has a setting 'rnu'", id="top-level"),
        pytest.param("[worker]\nwait-s = 1", "worker has no setting 'wait-s'", id="table"),
        pytest.param("[dmeo]\nrun = 'a'", "no command has a setting 'dmeo'", id="command"),
        pytest.param("run = ", "is not TOML", id="syntax"),
    ],
)
def test_a_slip_in_the_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    """A key that no command knows is an error that names file and key, never silence."""
    path = write(tmp_path, text)
    with pytest.raises(SettingsError, match=says) as caught:
        from_file(path, "worker", KNOWN)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The file is not there: the error says which."""
    with pytest.raises(SettingsError, match=r"nowhere\.toml: No such file"):
        from_file(tmp_path / "nowhere.toml", "worker", KNOWN)


def test_the_live_broker_is_found_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bus is given: the live broker of this user is taken and named; none: what to type."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(SettingsError, match="sparsecast broker"):
        find_bus(None)
    with Broker(advertise=True) as url:
        found = find_bus(None)
        assert found.url == url
        assert url in found.label
        assert "live broker of this user, pid " in found.label
    with pytest.raises(SettingsError, match="no bus"):
        find_bus(None)


def test_what_is_shown_of_a_bus_has_no_credentials() -> None:
    """A URL with a password comes from the environment: its label leaves the password out."""
    found = find_bus("nats://user:secret@host:4222")
    assert found.url == "nats://user:secret@host:4222"
    assert "secret" not in found.label
    assert "nats://host:4222" in found.label


@pytest.mark.parametrize(
    "url", ["nats://user:secret@host:4222", "nats://secret@host", "nats://a:1,nats://secret@b:2"]
)
def test_credentials_on_a_command_line_are_refused(url: str) -> None:
    """A secret in --bus is refused, and not repeated in the error."""
    with pytest.raises(SettingsError, match="SPARSECAST_BUS") as caught:
        refuse_credentials(url)
    assert "secret" not in str(caught.value)

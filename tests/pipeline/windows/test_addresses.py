"""The address that a window listens on: where the broker is reached, or where the others are."""

import pytest

from sparsecast.pipeline.windows import addresses


def test_the_loopback_is_reached_from_the_loopback() -> None:
    """A broker on this host: its clients listen where only this host reaches them."""
    assert addresses.broker_address("nats://127.0.0.1:4222") == "127.0.0.1"
    assert addresses.broker_address("127.0.0.1") == "127.0.0.1"
    assert addresses.broker_address("nats://user:secret@127.0.0.1:1, nats://other:2") == "127.0.0.1"
    assert addresses.broker_address("tls://[::1]:4222") == "::1"
    assert addresses.is_loopback("127.0.1.1")
    assert addresses.is_loopback("::1")
    assert not addresses.is_loopback("10.0.0.1")


def test_a_host_that_does_not_exist_is_an_error() -> None:
    """A name without an address: OSError, which the window turns into advice."""
    with pytest.raises(OSError, match=r".+"):
        addresses.broker_address("nats://no-such-host.invalid:4222")


def test_an_interface_has_its_address() -> None:
    """The loopback interface is there on every machine; another name is an error."""
    assert addresses.interface_address("lo") == "127.0.0.1"
    with pytest.raises(OSError, match=r".+"):
        addresses.interface_address("nosuch0")


def test_a_loopback_rank_moves_to_where_the_others_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broker is on the trainer's own host, a worker is not: the trainer takes the address by
    which it reaches that worker."""
    asked = []

    def route(host: str) -> str:
        asked.append(host)
        return "10.9.9.1"

    monkeypatch.setattr("sparsecast.pipeline.windows.addresses.route_address", route)
    assert addresses.reach("w", "127.0.0.1", ("127.0.0.1", "10.9.9.2")) == "10.9.9.1"
    assert addresses.reach("w", "127.0.0.1", ("127.0.0.1", "127.0.0.1")) == "127.0.0.1"
    assert addresses.reach("w", "10.9.9.1", ("10.9.9.1", "10.9.9.2")) == "10.9.9.1"
    assert asked == ["10.9.9.2"]

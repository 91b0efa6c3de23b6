"""The tests' own guard: nothing but this machine can be reached, and no example has a deadline."""

import os
import socket

import pytest
from hypothesis import HealthCheck, settings


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_a_socket_elsewhere_is_refused(method):
    with (
        socket.socket() as one,
        pytest.raises(RuntimeError, match=r"192\.0\.2\.1.*no network"),
    ):
        getattr(one, method)(("192.0.2.1", 80))


def test_a_datagram_elsewhere_is_refused():
    with (
        socket.socket(type=socket.SOCK_DGRAM) as one,
        pytest.raises(RuntimeError, match="no network"),
    ):
        one.sendto(b"x", ("192.0.2.1", 53))


def test_a_name_is_not_resolved():
    with pytest.raises(RuntimeError, match=r"example\.org.*no network"):
        socket.create_connection(("example.org", 443))


def test_this_machine_is_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_the_hub_is_offline():
    from huggingface_hub import constants

    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert constants.HF_HUB_OFFLINE


def test_an_example_may_take_any_time():
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check

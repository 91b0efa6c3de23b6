"""What holds for every unit test: no network, no deadline, and a reason where one is skipped."""

import os
import socket

import pytest
from hypothesis import HealthCheck, settings

OFFLINE = "a unit test tried to reach {!r}; unit tests have no network: use a file made in tmp_path"
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# On a busy machine an example may take any time; hypothesis would call it a failure after 0.2 s.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def _is_local(address) -> bool:
    """Whether a socket address is on this machine: a path, or a loopback address."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    return host in {"", "localhost", "::1"} or host.startswith("127.")


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Sockets reach this machine only; anything else raises RuntimeError with the address."""

    def guarded(method):
        def call(self, *arguments):
            if not _is_local(arguments[-1]):  # the address is the last argument of each
                raise RuntimeError(OFFLINE.format(arguments[-1]))
            return method(self, *arguments)

        return call

    def resolve(host, *arguments, **options):
        if not _is_local((host.decode() if isinstance(host, bytes) else host or "",)):
            raise RuntimeError(OFFLINE.format(host))
        return find(host, *arguments, **options)

    find = socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", resolve)
        yield


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config, items):
    """Skip what this run cannot do: no GPU, no source packages, browser tests not asked for."""
    chosen = config.option.markexpr
    missing = {
        "browser": lambda: "browser" not in chosen and "run them with make test-browser",
        "gpu": lambda: not _has_cuda() and "needs a CUDA device",
        "sources": lambda: "LORA2QLORA_SOURCES" not in os.environ and "LORA2QLORA_SOURCES is not set",
    }
    for marker, reason in missing.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (why := reason()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=why))

"""What holds for every unit test: no network, and optional tests are skipped with their reason."""

import os
import socket

import pytest

OFFLINE = "a unit test tried to reach {!r}; unit tests have no network: use a file made in tmp_path"
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(path, SHA-256) of a tiny GGUF that lies in an importable package `tiny_package`."""
    from tiny_gguf import write_tiny_gguf

    package = tmp_path_factory.mktemp("site") / "tiny_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('found, never imported')")
    return package / "tiny.gguf", write_tiny_gguf(package / "tiny.gguf")


@pytest.fixture
def installed(tiny, tmp_path, monkeypatch):
    """The tiny model as an installed package, under the name "tiny", with an empty cache; the cache."""
    from lora2qlora.lab import sources
    from tiny_gguf import COMMAND

    path, sha256 = tiny
    monkeypatch.syspath_prepend(str(path.parent.parent))
    source = sources.ModelSource("nobody/tiny", "tiny_package", path.name, sha256, COMMAND)
    monkeypatch.setitem(sources.MODELS, "tiny", source)
    monkeypatch.setenv("LORA2QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer(tiny, tmp_path_factory):
    """The tiny GGUF's byte tokenizer: copy it before you change it."""
    from lora2qlora.lab.conversion import convert_gguf
    from transformers import AutoTokenizer

    where = convert_gguf(*tiny, tmp_path_factory.mktemp("tiny") / "tiny")
    return AutoTokenizer.from_pretrained(where, padding_side="left")


@pytest.fixture
def model():
    """A fresh Llama of one layer for that tokenizer."""
    from toy import toy_model

    return toy_model()


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

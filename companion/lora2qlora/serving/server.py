"""llama.cpp's server on this machine, for as long as a block runs, and a question to it. Chapter 16."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path

CHILD = Path(__file__).with_name("llama_child.py")
SECONDS_TO_END = 10
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to this machine


@contextlib.contextmanager
def serve(
    model: str | os.PathLike,
    adapters: Sequence[str | os.PathLike] = (),
    context: int = 2048,
    parallel: int = 1,
    threads: int = 1,
    port: int = 0,
    exact: bool = False,
    scale: float = 0.0,
) -> Iterator[str]:
    """Serve a GGUF model, and GGUF adapters over it, on loopback; yields the address, http://127.0.0.1:PORT.

    OpenAI's protocol is under /v1. `context` [tokens], which llama.cpp rounds up to multiples of 256, is for
    each of `parallel` requests at a time; `port` 0 is a free one. `exact` computes as transformers does,
    without flash attention and with keys and values in float32. `scale` is that of all adapters where a
    request names none: 0 is the base alone, llama.cpp's own is 1, which is their sum. `chat` names one by its
    file's name. The server is a child process, which ends with the block or with this process.

    Raises FileNotFoundError; ValueError: two adapters of one name; ImportError: no xllamacpp; RuntimeError:
    the server did not start (a damaged file, an adapter for another base, a port taken), with its last words.
    """
    paths = [Path(path).resolve() for path in (model, *adapters)]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"no such file: {', '.join(missing)}; export_model and export_adapter make them"
        )
    if len(names := [path.stem for path in paths[1:]]) > len(set(names)):
        raise ValueError(f"adapters are told apart by their files' names, these are {names}")
    if importlib.util.find_spec("xllamacpp") is None:
        raise ImportError('llama.cpp is not installed. Run: pip install "xllamacpp>=2026.10.11549"')
    settings = {"model": str(paths[0]), "adapters": [str(path) for path in paths[1:]], "context": context}
    settings |= {"parallel": parallel, "threads": threads, "port": port, "exact": exact, "scale": scale}
    with tempfile.TemporaryFile() as log, _child(settings, log) as child:
        address = child.stdout.readline().decode().strip()
        if not address:
            child.wait()
            log.seek(0)
            said = log.read().decode(errors="replace").partition("Traceback")[0].strip().splitlines()[-6:]
            words = "\n".join(said)
            raise RuntimeError(f"llama.cpp's server did not start (exit code {child.returncode}):\n{words}")
        yield address


@contextlib.contextmanager
def _child(settings: dict, log) -> Iterator[subprocess.Popen]:
    """The server's process; afterwards it is gone, whatever happened."""
    command = [sys.executable, "-P", str(CHILD), json.dumps(settings)]
    pipe = subprocess.PIPE
    # In a session of its own: Ctrl-C is for this process, which then closes the server.
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, start_new_session=True)
    try:
        yield child
    finally:
        child.stdin.close()
        try:
            child.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


def chat(
    address: str,
    messages: list[dict[str, str]],
    adapter: str | None = None,
    max_tokens: int = 64,
    timeout: float = 600.0,
) -> str:
    """The server's greedy answer to a chat, through the adapter of this name or, with None, the base alone.

    An adapter's name is its file's without the ending. The scales of all are sent along each time, as a
    request that names none may get whatever was set before, and llama.cpp ignores an unknown one in silence.

    Raises KeyError: no such adapter; RuntimeError: what the server refuses, in its words, such as a prompt
    beyond the context, or no server there; TimeoutError: not a word in `timeout` [s].
    An interrupt cancels the request.
    """
    with _opened(f"{address}/lora-adapters", None, timeout) as answer:
        loaded = {Path(one["path"]).stem: one["id"] for one in json.load(answer)}
    if adapter is not None and adapter not in loaded:
        raise KeyError(f"no adapter {adapter!r:.80} is served, use one of {sorted(loaded)}, or None")
    scales = [{"id": index, "scale": float(name == adapter)} for name, index in loaded.items()]
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "lora": scales}
    return "".join(_pieces(f"{address}/v1/chat/completions", body, timeout))


def post(address: str, body: dict, timeout: float = 600.0) -> dict:
    """Send a JSON body to an address and return its reply, as any client of OpenAI's protocol does.

    Raises RuntimeError: the server refuses (with its message), or there is no server; TimeoutError:
    nothing arrives within `timeout` [s].
    """
    with _opened(address, body, timeout) as answer:
        return json.load(answer)


def _pieces(address: str, body: dict, timeout: float) -> Iterator[str]:
    """The answer piece by piece; closing it cancels the request, which llama.cpp sees of streams alone."""
    with _opened(address, {**body, "stream": True}, timeout) as answer:
        for line in answer:
            kind, _, said = line.decode().partition(": ")
            if kind == "error" or said.startswith('{"error"'):
                raise RuntimeError(f"llama.cpp broke off: {said.strip()}")
            if kind == "data" and said.startswith("{"):
                yield from (one["delta"].get("content") or "" for one in json.loads(said)["choices"])


@contextlib.contextmanager
def _opened(address: str, body: dict | None, timeout: float) -> Iterator[HTTPResponse]:
    """The answer of an address, to a JSON body if there is one, to be read in the block."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with DIRECT.open(request, timeout=timeout) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = json.loads(said)["error"]["message"]
        raise RuntimeError(f"llama.cpp refuses ({error.code}): {said}") from error
    except TimeoutError:
        raise TimeoutError(f"not a word in {timeout} s; the request is cancelled") from None
    except (urllib.error.URLError, ConnectionError, HTTPException) as error:
        raise RuntimeError(f"no server answers at {address}: {error}") from error

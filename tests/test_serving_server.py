"""serving.server: llama.cpp as a child that says what went wrong, and that never outlives what started it."""

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from lora2qlora.serving import chat, export_adapter, export_model, post, serve, server
from peft import PeftModel
from served import byte_tokenizer, peft_adapter, random_model, small_lm

pytest.importorskip("xllamacpp")
HELLO = [{"role": "user", "content": "Call me"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """base.gguf and two adapters over it, and an adapter for another base."""
    folder = tmp_path_factory.mktemp("served")
    model, tokenizer = small_lm()
    export_model(model, tokenizer, folder / "base.gguf", "F32")
    for seed, name in enumerate(("ahab", "ishmael")):
        peft_adapter(model, folder / name, seed, lora_alpha=64)
        export_adapter(folder / name, model.config, folder / f"{name}.gguf")
    other = random_model("llama")
    peft_adapter(other, folder / "other")
    export_adapter(folder / "other", other.config, folder / "other.gguf")
    return folder


def children():
    """The servers that this process has; other tests may have started processes of their own."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE and str(server.CHILD) in child.cmdline():
                found.append(child.pid)
    return found


@pytest.fixture(autouse=True)
def nothing_left():
    before = children()
    yield
    assert children() == before


@torch.no_grad()
def transformers_says(model, tokenizer, text, count):
    ids = tokenizer(text, return_tensors="pt")
    found = model.generate(**ids, max_new_tokens=count, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(found, skip_special_tokens=True)


def test_each_request_gets_the_adapter_that_it_names(files):
    model, tokenizer = small_lm()
    with serve(
        files / "base.gguf", [files / "ahab.gguf", files / "ishmael.gguf"], 256, exact=True
    ) as address:
        text = post(f"{address}/apply-template", {"messages": HELLO})["prompt"]
        wanted = {None: transformers_says(model, tokenizer, text, 12)}
        for seed, name in enumerate(("ahab", "ishmael")):
            adapted = peft_adapter(model, files / "again", seed, lora_alpha=64)
            wanted[name] = transformers_says(adapted, tokenizer, text, 12)
        assert len(set(wanted.values())) == 3
        for name in (None, "ahab", "ishmael", "ahab", None):
            assert chat(address, HELLO, name, max_tokens=12) == wanted[name]
        for body in ({}, {"lora": []}):  # who knows nothing of adapters gets the base
            assert without_a_name(address, body) == wanted[None]
        with pytest.raises(
            KeyError, match=r"no adapter 'queequeg' is served, use one of \['ahab', 'ishmael'\]"
        ):
            chat(address, HELLO, "queequeg")


def without_a_name(address, body):
    """The answer that a client gets which names no adapter."""
    plain = {"messages": HELLO, "max_tokens": 12, "temperature": 0}
    return post(f"{address}/v1/chat/completions", plain | body)["choices"][0]["message"]["content"]


def test_at_scale_1_a_request_without_a_name_gets_the_sum_and_chat_what_it_names(files):
    model, tokenizer = small_lm()
    adapters = [files / "ahab.gguf", files / "ishmael.gguf"]
    with serve(files / "base.gguf", adapters, 256, exact=True, scale=1.0) as address:
        text = post(f"{address}/apply-template", {"messages": HELLO})["prompt"]
        both = PeftModel.from_pretrained(copy.deepcopy(model), str(files / "ahab"), "ahab")
        both.load_adapter(str(files / "ishmael"), "ishmael")
        both.base_model.set_adapter(["ahab", "ishmael"])
        wanted = transformers_says(both.eval(), tokenizer, text, 12)
        alone = transformers_says(model, tokenizer, text, 12)
        assert wanted != alone
        assert [without_a_name(address, body) for body in ({}, {"lora": []})] == [wanted] * 2
        assert chat(address, HELLO, max_tokens=12) == alone


def test_a_prompt_beyond_the_context_is_refused_and_the_server_goes_on(files):
    with serve(files / "base.gguf", context=64) as address:
        with pytest.raises(RuntimeError, match=r"refuses \(400\): .*exceeds the available context size"):
            chat(address, [{"role": "user", "content": "whale " * 400}])
        assert isinstance(chat(address, HELLO, max_tokens=2), str)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A model that takes 32,768 tokens, some minutes of them."""
    model, path = random_model("llama"), tmp_path_factory.mktemp("long") / "long.gguf"
    model.config.max_position_embeddings = 32_768
    export_model(model, byte_tokenizer(), path, "F32")
    return path


def slots(address):
    with server.DIRECT.open(f"{address}/slots", timeout=60) as answer:
        return json.load(answer)


def test_each_of_parallel_requests_has_the_whole_context(long):
    with serve(long, context=512, parallel=2) as address:
        assert [slot["n_ctx"] for slot in slots(address)] == [512, 512]
        answers = []
        ask = lambda: answers.append(chat(address, HELLO, max_tokens=4))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 4
        assert len(set(answers)) == 1


def test_a_request_that_is_cancelled_frees_its_place(long):
    """Not so one that streams nothing: llama.cpp writes it to its end, and who comes next waits."""
    with serve(long, context=32_768) as address:
        endless = {"messages": HELLO, "max_tokens": 100_000, "ignore_eos": True}
        pieces = server._pieces(f"{address}/v1/chat/completions", endless, 60)
        next(pieces)
        assert slots(address)[0]["is_processing"]
        pieces.close()
        assert is_soon_free(address)
        with pytest.raises(TimeoutError), server._opened(f"{address}/v1/chat/completions", endless, 0.5):
            pass
        assert not is_soon_free(address)


def is_soon_free(address):
    for _ in range(40):
        if not slots(address)[0]["is_processing"]:
            return True
        time.sleep(0.05)
    return False


def test_a_server_that_says_nothing_is_a_timeout(files):
    with serve(files / "base.gguf") as address:
        (child,) = children()
        os.kill(child, signal.SIGSTOP)
        with pytest.raises(TimeoutError, match=r"not a word in 0.2 s"):
            chat(address, HELLO, timeout=0.2)
        os.kill(child, signal.SIGCONT)
        assert isinstance(chat(address, HELLO, max_tokens=2), str)


def refused(error, match, *arguments, **options):
    with pytest.raises(error, match=match), serve(*arguments, **options):
        pytest.fail("it started")


def test_what_cannot_start_says_why(files, tmp_path):
    base, damaged = files / "base.gguf", tmp_path / "damaged.gguf"
    damaged.write_bytes(base.read_bytes()[:100_000])
    refused(FileNotFoundError, "no such file: .*none.gguf", tmp_path / "none.gguf")
    refused(FileNotFoundError, "no such file: .*none.gguf", base, [tmp_path / "none.gguf"])
    refused(RuntimeError, r"(?s)exit code 1.*failed to load model", damaged)
    refused(RuntimeError, r"(?s)failed to load lora adapter.*other.gguf", base, [files / "other.gguf"])
    refused(RuntimeError, r"(?s)failed to load lora adapter.*base.gguf", base, [base])
    (tmp_path / "ahab.gguf").write_bytes((files / "ahab.gguf").read_bytes())
    refused(ValueError, r"\['ahab', 'ahab'\]", base, [files / "ahab.gguf", tmp_path / "ahab.gguf"])


def test_a_port_that_is_taken_is_said(files):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(
            RuntimeError, f"couldn't bind HTTP server socket.*port: {port}", files / "base.gguf", port=port
        )
    with serve(files / "base.gguf", port=port) as address:
        assert address == f"http://127.0.0.1:{port}"


def test_without_llama_cpp_it_says_what_to_install(files, monkeypatch):
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    refused(ImportError, 'pip install "xllamacpp', files / "base.gguf")


def test_an_error_in_the_block_ends_the_server_and_passes(files):
    with pytest.raises(KeyboardInterrupt), serve(files / "base.gguf") as address:
        raise KeyboardInterrupt
    for ask in (lambda: chat(address, HELLO), lambda: post(f"{address}/tokenize", {"content": "a"})):
        with pytest.raises(RuntimeError, match="no server answers at"):
            ask()


def test_a_server_that_does_not_end_is_killed(files, monkeypatch):
    monkeypatch.setattr(server, "SECONDS_TO_END", 0.5)
    with serve(files / "base.gguf"):
        (child,) = children()
        os.kill(child, signal.SIGSTOP)


def test_a_server_that_dies_is_an_error_of_the_request(files):
    with serve(files / "base.gguf") as address:
        (child,) = children()
        os.kill(child, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=10)
        with pytest.raises(RuntimeError, match="no server answers at"):
            chat(address, HELLO)


PARENT = """
import sys, time
from lora2qlora.serving.server import serve
with serve(sys.argv[1]) as address:
    print(address, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_server_ends_with_the_process_that_started_it(how, files):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(files / "base.gguf")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as parent:
        assert parent.stdout.readline().startswith(b"http://127.0.0.1:")
        (child,) = psutil.Process(parent.pid).children()
        parent.send_signal(how)
        parent.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        child.wait(10)  # TimeoutExpired, should it live on

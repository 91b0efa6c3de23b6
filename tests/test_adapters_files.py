"""adapters' files: hostile configs and weights, two writers, killed ones, full disks, published names."""

import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path

import pytest
import torch
from lora2qlora.adapters import (
    CONFIG,
    WEIGHTS,
    add_lora,
    find_targets,
    load_adapter,
    lora_layers,
    peft_types,
    save_adapter,
)
from lora2qlora.adapters import folder as folders
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapters import adapted, assert_unchanged, edit_config, logits, peft_saved, snapshot, tiny_llama
from torch import nn
from transformers import LlamaForCausalLM


def refused(directory, error, message):
    """Loading raises this, and leaves the model alone."""
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_adapter(model, directory)
    assert_unchanged(model, before)


# Configs


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", True, "r must be an integer from 1 on, got True"),
        ("r", 0, "r must be an integer"),
        ("r", 4.0, "r must be an integer"),
        ("r", "4", "r must be an integer"),
        ("r", 10**400, "r must be an integer from 1 on, got 1000"),
        ("lora_alpha", 10**400, "lora_alpha must be a positive number, got 1000"),
        ("lora_alpha", -1, "lora_alpha must be a positive number"),
        ("lora_alpha", [8], "lora_alpha must be a positive number"),
        ("lora_alpha", False, "lora_alpha must be a positive number"),
        ("lora_dropout", 1, r"lora_dropout must be a number in \[0, 1\)"),
        ("lora_dropout", "0.1", r"lora_dropout must be a number in \[0, 1\)"),
        ("target_modules", [], "target_modules must be names"),
        ("target_modules", {"q_proj": 1}, "target_modules must be names"),
        ("target_modules", ["q_proj", 3], "target_modules must be names"),
        ("target_modules", 7, "target_modules must be names"),
        ("target_modules", "(", r"target_modules: '\(' is no regular expression"),
        ("target_modules", "((a|b|[a-z_.0-9])*)*Q", r"named \(\(a\|b\|\[a-z_.0-9\]\)\*\)\*Q; the candidates"),
        ("target_modules", "x" * 300_000, "more than 200000 characters"),
        ("exclude_modules", "*", r"exclude_modules: '\*' is no regular expression"),
        ("exclude_modules", [[]], "exclude_modules must be names"),
        ("rank_pattern", ["q_proj"], "rank_pattern must be integers from 1 on by expression"),
        ("rank_pattern", {"q_proj": 2.0}, "rank_pattern must be integers"),
        ("rank_pattern", {"q_proj": True}, "rank_pattern must be integers"),
        ("rank_pattern", {f"a{i}": 1 for i in range(5001)}, "rank_pattern must be integers"),
        ("alpha_pattern", {"(": 1}, r"alpha_pattern: '\(' is no regular expression"),
        ("alpha_pattern", {"q_proj": 10**400}, "alpha_pattern must be positive numbers"),
        ("alpha_pattern", {"q_proj": None}, "alpha_pattern must be positive numbers"),
        ("use_rslora", "false", "use_rslora must be true or false"),
        ("use_rslora", 1, "use_rslora must be true or false"),
    ],
)
def test_entries_of_a_wrong_type_are_named(tmp_path, key, value, message):
    save_adapter(adapted(), tmp_path)
    edit_config(tmp_path, **{key: value})
    refused(tmp_path, ValueError, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "it is not JSON"),
        (b'{"a":' * 100_000, "it is not JSON"),
        (b'{"r": NaN}', "it is not JSON .NaN is no number"),
        (b'{"r": -Infinity}', "it is not JSON .-Infinity is no number"),
        (b'{"r": 4, "r": 5}', "a key stands there twice"),
        (b'{"r": ' + b"9" * 5000 + b"}", "it is not JSON"),
        (b"\xff\xfe{}", "it is not JSON"),
        (b"[]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b"", "it is not JSON"),
        (b" " * (peft_types.LARGEST + 1), "more than 4194304 bytes"),
    ],
    ids=range(11),
)
def test_damaged_json(tmp_path, text, message):
    save_adapter(adapted(), tmp_path)
    (tmp_path / CONFIG).write_bytes(text)
    refused(tmp_path, ValueError, message)


def test_an_alpha_that_rslora_makes_infinite(tmp_path):
    save_adapter(adapted(), tmp_path)
    edit_config(tmp_path, lora_alpha=1.7e308, use_rslora=True)
    refused(tmp_path, ValueError, "alpha must be a positive number, got inf")


def test_expressions_as_unsloth_writes_them(tmp_path):
    pattern = (
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))"
    )
    theirs = peft_saved(tmp_path, target_modules=pattern, exclude_modules=r"(?!.*up).*\.1\..*")
    model = tiny_llama()
    names = load_adapter(model, tmp_path)
    assert set(names) == set(theirs.targeted_module_names)
    assert len(names) == 3
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_many_ranks_are_read(tmp_path):
    model = tiny_llama(layers=4)
    for i, name in enumerate(find_targets(model, "all-linear")):
        add_lora(model, [name], 1 + i % 7, 3 + i % 5)
    save_adapter(model, tmp_path)
    again = tiny_llama(layers=4)
    load_adapter(again, tmp_path)
    assert {n: (x.rank, x.alpha) for n, x in lora_layers(again).items()} == {
        n: (x.rank, x.alpha) for n, x in lora_layers(model).items()
    }


# Weights


def rewrite_header(directory, change):
    """The header of the weights, as a dict that `change` edits or replaces by bytes; the data stay."""
    raw = (directory / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    text = change(header) or json.dumps(header).encode()
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def set_first(key, value):
    def change(header):
        header[next(name for name in header if name != "__metadata__")][key] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(set_first("dtype", dtype) for dtype in ("F4", "F8_E8M0", "C64", "XX", None, 3)),
        *(set_first("shape", shape) for shape in ([-1], [2**63], [2**40, 2**40], "x", [2.5])),
        set_first("data_offsets", [0, 2**60]),
        lambda _: b"{" * 10_000,
        lambda _: b"\xff" * 40,
        lambda _: b"null",
    ],
    ids=range(15),
)
def test_hostile_headers(tmp_path, change):
    save_adapter(adapted(), tmp_path)
    rewrite_header(tmp_path, change)
    refused(tmp_path, ValueError, r"adapter_model\.safetensors is truncated or not a safetensors file")


@pytest.mark.parametrize(
    ("value", "load_as", "message"),
    [
        (float("nan"), torch.float32, "not finite as torch.float32"),
        (float("-inf"), torch.float32, "not finite as torch.float32"),
        (1e5, torch.float16, "not finite as torch.float16"),
    ],
)
def test_numbers_that_are_not_finite(tmp_path, value, load_as, message):
    save_adapter(adapted(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    first = sorted(tensors)[0]
    tensors[first][0, 0] = value
    save_file(tensors, tmp_path / WEIGHTS)
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{first} holds numbers that are {message}"):
        load_adapter(model, tmp_path, dtype=load_as)
    assert_unchanged(model, before)


def test_float8_weights_do_not_fit(tmp_path):
    save_adapter(adapted(), tmp_path)
    tensors = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    refused(tmp_path, KeyError, r"28 mis-shaped: \S+ torch\.float8_e4m3fn")


# Writers and readers


def filled(alpha):
    model = tiny_llama()
    add_lora(model, ["q_proj"], 4, alpha)
    for layer in lora_layers(model).values():
        nn.init.constant_(layer.lora_B, alpha)
    return model


def forked(function, *arguments):
    """Run it over and over in a child process, until that is killed; returns the child's id."""
    child = os.fork()
    if not child:
        try:
            while True:
                function(*arguments)
        finally:
            os._exit(1)
    return child


def stop(*children):
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_readers_beside_two_writers_find_one_of_them(tmp_path):
    torch.set_num_threads(1)
    models = [filled(8.0), filled(16.0)]
    save_adapter(models[0], tmp_path)
    children = [forked(save_adapter, model, tmp_path) for model in models]
    found = set()
    try:
        for _ in range(60):
            model = tiny_llama(layers=2)
            load_adapter(model, tmp_path)  # under the lock it never finds none either
            layer = next(iter(lora_layers(model).values()))
            found.add((layer.alpha, layer.lora_B[0, 0].item()))
    finally:
        stop(*children)
    assert found == {(8.0, 8.0), (16.0, 16.0)}


def test_the_next_save_tidies_what_a_killed_one_left_and_nothing_else(tmp_path):
    model = adapted(["q_proj"])
    dead, whole = tmp_path / ".writing-abcd_123", tmp_path / ".writing-wholewho"
    mine = [tmp_path / ".writing-notes", tmp_path / ".writing-abcd1234", tmp_path / ".writing-12345678"]
    for folder in (dead, whole, *mine[:2]):
        folder.mkdir()
    for name in (CONFIG, WEIGHTS):  # killed just before the renames
        (whole / name).write_bytes(b"whole")
    (dead / WEIGHTS).write_bytes(b"half")
    (mine[1] / "thesis.txt").write_text("mine")
    mine[2].symlink_to(mine[0])
    save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS, *(path.name for path in mine)}


def test_a_file_says_whose_tensors_it_holds(tmp_path):
    """transformers refuses a file without it; PEFT writes it."""
    save_adapter(adapted(["q_proj"]), tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_live_writer_is_waited_for_and_keeps_its_folder(tmp_path, monkeypatch):
    save_adapter(filled(8.0), tmp_path)
    with folders.replacing(tmp_path, (CONFIG, WEIGHTS)) as partial:
        monkeypatch.setattr(folders, "PATIENCE", 0.1)
        for function in (save_adapter, load_adapter):
            with pytest.raises(TimeoutError, match=r"has been using .* for 0\.1 s"):
                function(filled(16.0) if function is save_adapter else tiny_llama(), tmp_path)
        assert partial.is_dir()
        for name in (CONFIG, WEIGHTS):
            (partial / name).write_bytes((tmp_path / name).read_bytes())
    model = tiny_llama()
    load_adapter(model, tmp_path)
    assert next(iter(lora_layers(model).values())).alpha == 8


def test_readers_do_not_wait_for_each_other_nor_write(tmp_path):
    save_adapter(filled(8.0), tmp_path)
    with folders.locked(tmp_path, alone=False) as is_held:
        assert is_held
        tmp_path.chmod(0o555)
        try:
            load_adapter(tiny_llama(), tmp_path)
        finally:
            tmp_path.chmod(0o755)


def test_where_folders_cannot_be_locked_all_but_the_tidying_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    (tmp_path / ".writing-abcd_123").mkdir()
    save_adapter(filled(8.0), tmp_path)
    load_adapter(tiny_llama(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS, ".writing-abcd_123"}


def test_a_full_disk_is_an_oserror_and_the_old_adapter_stays(tmp_path):
    save_adapter(adapted(["q_proj"]), tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new, limits = adapted("all-linear", rank=8), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_adapter(new, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert len(files[WEIGHTS]) < 8_000


# What is published


def published(model, directory):
    add_lora(model, ["q_proj"], 2, 4)
    save_adapter(model, directory)
    return json.loads((directory / CONFIG).read_text())["base_model_name_or_path"]


@pytest.mark.parametrize("place", ["models/tiny", "tiny", "./models/tiny", "absolute"])
def test_a_folder_is_not_published_wherever_one_stands_when_saving(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    place = str(tmp_path / "models" / "tiny") if place == "absolute" else place
    tiny_llama().save_pretrained(place)
    model = LlamaForCausalLM.from_pretrained(place)
    monkeypatch.chdir("/")
    assert model.name_or_path == place
    assert published(model, tmp_path / "adapter") is None


def test_what_the_hubs_cache_holds_is_published_by_its_name(tmp_path, monkeypatch):
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--owner--tiny"
    tiny_llama().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    by_name = LlamaForCausalLM.from_pretrained("owner/tiny", cache_dir=tmp_path / "hub")
    assert published(by_name, tmp_path / "a") == "owner/tiny"
    by_path = LlamaForCausalLM.from_pretrained(str(repository / "snapshots" / commit))
    assert published(by_path, tmp_path / "b") == "owner/tiny"


NO_NAMES = ["/srv/models/tiny", "~/tiny", "./tiny", "../tiny", "a/../b", r"C:\models\tiny", "a/b/c", "a//b"]
NO_NAMES += [".hid/x", "https://host/owner/name", "owner/", "/tmp/models--../snapshots/abc", "a\nb"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_on_the_hub_is_not_published(tmp_path, name):
    model = tiny_llama()
    model.name_or_path = name
    assert published(model, tmp_path) is None


def test_a_name_set_by_hand_is_published(tmp_path):
    for name in ("owner/model", "gpt2", "Owner-1/model_v1.5-x"):
        model = tiny_llama()
        model.name_or_path = name
        assert published(model, tmp_path) == name
    model = tiny_llama()
    model.name_or_path = Path("owner/model")
    assert published(model, tmp_path) == "owner/model"

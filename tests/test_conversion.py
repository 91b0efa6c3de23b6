"""lab.conversion: a converted model is the one that the book speaks of, or it is refused."""

import copy
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from gguf import GGUFReader
from gguf.quants import dequantize
from lora2qlora.lab import cache, conversion, models, sources
from lora2qlora.lab.models import load_small_lm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_gguf import COMMAND


def whole_models(cache: Path) -> list[Path]:
    return [d for d in cache.iterdir() if d.is_dir()] if cache.exists() else []


def convert_in_a_new_process(tiny, target: Path, before: str = "") -> subprocess.Popen:
    """Start a Python that converts the tiny GGUF into `target`; `before` runs first in it."""
    code = f"""
    from pathlib import Path
    from lora2qlora.lab import conversion
    {before}
    print(conversion.convert_gguf(Path({str(tiny[0])!r}), {tiny[1]!r}, Path({str(target)!r})))
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def small():
    return load_small_lm()


def test_a_fingerprint_is_plain_json_and_repeats(small):
    found = conversion.fingerprint(*small)
    assert json.loads(json.dumps(found)) == found == conversion.fingerprint(*small)
    model, tokenizer = small
    assert (found["eos"], found["eos_id"]) == (tokenizer.eos_token, tokenizer.eos_token_id)
    assert found["stop_id"] == model.generation_config.eos_token_id
    assert found["ids"] == {text: tokenizer(text)["input_ids"] for text in conversion.TEXTS}


def test_the_weights_hash_is_over_names_kinds_shapes_and_bytes_in_order():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2, bias=False)).to(torch.bfloat16)
    expected = hashlib.sha256()
    for name, shape in (("0.bias", [3]), ("0.weight", [3, 2]), ("1.weight", [2, 3])):
        expected.update(f"{name} torch.bfloat16 {shape}\n".encode())
        expected.update(model.get_parameter(name).detach().view(torch.int16).numpy().tobytes())
    assert conversion.hash_weights(model) == expected.hexdigest()


@pytest.mark.parametrize("change", ["one bit", "dtype", "swapped", "shape"])
def test_the_weights_hash_sees_every_change(change):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    other = copy.deepcopy(model)
    if change == "one bit":
        other[1].weight.data.view(torch.int32)[2, 3] ^= 1
    if change == "dtype":
        other[0].bias.data = other[0].bias.data.view(torch.int32).view(torch.uint8).view(torch.bfloat16)
    if change == "swapped":
        other[0].weight, other[1].weight = other[1].weight, other[0].weight
    if change == "shape":
        other[0].weight.data = other[0].weight.data.reshape(2, 8)
    assert conversion.hash_weights(other) != conversion.hash_weights(model)
    assert conversion.hash_weights(copy.deepcopy(model)) == conversion.hash_weights(model)


@pytest.mark.parametrize("change", ["eos", "pad", "stop", "ids"])
def test_a_fingerprint_sees_another_tokenizer(small, change):
    model, tokenizer = copy.deepcopy(small)
    before = conversion.fingerprint(model, tokenizer)
    if change == "eos":
        tokenizer.eos_token = "a"
    if change == "pad":
        tokenizer.pad_token = "b"
    if change == "stop":
        model.generation_config.eos_token_id = 5
    if change == "ids":
        tokenizer.add_tokens(["capital of France"])
    after = conversion.fingerprint(model, tokenizer)
    moved = {key for key in before if before[key] != after[key]}
    assert (
        moved
        == {"eos": {"eos", "eos_id"}, "pad": {"pad", "pad_id"}, "stop": {"stop_id"}, "ids": {"ids"}}[change]
    )


def test_conversion_holds_every_value_of_the_gguf(installed, tiny):
    model, tokenizer = models.load_base_model("tiny")
    stored = {t.name: t for t in GGUFReader(str(tiny[0])).tensors}
    expected = dequantize(stored["blk.0.ffn_up.weight"].data, stored["blk.0.ffn_up.weight"].tensor_type)
    np.testing.assert_array_equal(model.model.layers[0].mlp.up_proj.weight.detach().numpy(), expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.decode(tokenizer("naïve text")["input_ids"]) == "naïve text"
    assert tokenizer.padding_side == "left"


def test_second_load_reads_the_cache_and_not_the_gguf(installed, monkeypatch):
    models.load_base_model("tiny")
    monkeypatch.setattr(conversion, "write_model", lambda *_: pytest.fail("converted twice"))
    models.load_base_model("tiny")


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_gguf_is_refused_and_leaves_nothing(installed, tiny, damage, tmp_path):
    damaged = tmp_path / "tiny.gguf"
    content = tiny[0].read_bytes()
    if damage == "truncated":
        damaged.write_bytes(content[:-1])
    if damage == "altered":
        damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    expected = "is missing" if damage == "missing" else "truncated or altered"
    with pytest.raises(OSError, match=rf"{expected}(.|\n)*{COMMAND} --force-reinstall"):
        conversion.convert_gguf(damaged, tiny[1], installed / "tiny", COMMAND)
    assert not whole_models(installed)
    assert conversion.convert_gguf(tiny[0], tiny[1], installed / "tiny").is_dir()


@pytest.mark.slow
def test_a_full_cache_is_named_and_the_next_run_works(tiny, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    process = convert_in_a_new_process(tiny, tmp_path / "cache" / "tiny", before=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"the model cache {tmp_path / 'cache'} is full" in errors
    assert "LORA2QLORA_CACHE" in errors
    assert not whole_models(tmp_path / "cache")
    assert conversion.convert_gguf(tiny[0], tiny[1], tmp_path / "cache" / "tiny").is_dir()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_errors_of_a_full_disk_are_recognised(tiny, tmp_path, monkeypatch, number):
    def fail(gguf, directory):
        directory.mkdir()
        (directory / "half").write_text("half a model")
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_model", fail)
        with pytest.raises(OSError, match="is full: a converted SmolLM2-135M takes"):
            conversion.convert_gguf(*tiny, tmp_path / "tiny")
    assert not whole_models(tmp_path)


def test_a_read_only_cache_is_named_and_the_next_run_works(tiny):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        directory = Path(name)
        directory.chmod(0o755)
        gguf = Path(shutil.copy(tiny[0], directory / "tiny.gguf"))
        cache = directory / "cache"
        cache.mkdir(mode=0o555)
        with unprivileged(), pytest.raises(OSError, match=r"cannot be written.*LORA2QLORA_CACHE"):
            conversion.convert_gguf(gguf, tiny[1], cache / "tiny")
        cache.chmod(0o755)
        assert not whole_models(cache)
        assert conversion.convert_gguf(gguf, tiny[1], cache / "tiny").is_dir()


def test_a_cache_that_is_a_file_is_named(tiny, tmp_path):
    (tmp_path / "cache").write_text("not a directory")
    with pytest.raises(OSError, match="cannot be written"):
        conversion.convert_gguf(*tiny, tmp_path / "cache" / "tiny")


class unprivileged:
    """Root may write anywhere, so give up its capabilities for a moment; others need nothing."""

    def __enter__(self):
        self.root = os.geteuid() == 0
        if self.root:
            os.seteuid(65534)

    def __exit__(self, *exception):
        if self.root:
            os.seteuid(0)


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_model_and_the_next_run_works(tiny, tmp_path):
    target = tmp_path / "cache" / "tiny"
    stall = """
    import time
    Path.write_text = lambda *a, **k: (print("writing", flush=True), time.sleep(60))
    """
    process = convert_in_a_new_process(tiny, target, before=textwrap.dedent(stall).replace("\n", "\n    "))
    assert process.stdout.readline().strip() == "writing"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not cache.is_complete(target)
    assert target.with_name("tiny.partial").is_dir()
    assert conversion.convert_gguf(*tiny, target) == target
    assert cache.is_complete(target)
    assert not target.with_name("tiny.partial").exists()


def test_two_processes_at_once_convert_once(tiny, tmp_path, monkeypatch):
    count, write_model = [], conversion.write_model

    def counted(*arguments):
        count.append(1)
        time.sleep(0.3)
        write_model(*arguments)

    monkeypatch.setattr(conversion, "write_model", counted)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(conversion.convert_gguf, *tiny, tmp_path / "cache" / "tiny") for _ in range(2)]
    assert {job.result() for job in jobs} == {tmp_path / "cache" / "tiny"}
    assert len(count) == 1


@pytest.mark.slow
def test_two_real_processes_at_once(tiny, tmp_path):
    target = tmp_path / "cache" / "tiny"
    processes = [convert_in_a_new_process(tiny, target) for _ in range(2)]
    for process in processes:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert out.strip() == str(target)
    assert cache.is_complete(target)


# What is refused ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right(tiny, tmp_path_factory):
    """The fingerprint of the tiny model, as a right conversion gives it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = conversion.convert_gguf(*tiny, tmp_path_factory.mktemp("right") / "tiny")
    return conversion.fingerprint(
        AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)
    )


def wrong_eos(directory):
    edit_json(directory / "tokenizer_config.json", eos_token="<|im_start|>")


def no_padding(directory):
    edit_json(directory / "tokenizer_config.json", pad_token=None)


def another_stop(directory):
    edit_json(directory / "generation_config.json", eos_token_id=1)


def lower_case(directory):
    edit_json(directory / "tokenizer.json", normalizer={"type": "Lowercase"})


def one_weight(directory):
    tensors = load_file(directory / "model.safetensors")
    next(iter(tensors.values())).view(torch.int32)[0] ^= 1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (wrong_eos, r"eos: got '<\|im_start\|>', expected '<\|im_end\|>'\neos_id: got 1, expected 2"),
        (no_padding, r"pad: got None, expected '<\|im_end\|>'"),
        (another_stop, "stop_id: got 1, expected 2"),
        (lower_case, r"the ids of 'The capital of France is Paris\.': got \["),
        (one_weight, "weights: got '[0-9a-f]{64}', expected '[0-9a-f]{64}'"),
    ],
)
def test_another_model_than_the_one_meant_is_refused(tiny, right, tmp_path, monkeypatch, damage, said):
    write_model = conversion.write_model

    def write_wrong(gguf, directory):
        write_model(gguf, directory)
        damage(directory)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_model", write_wrong)
        with pytest.raises(cache.ConversionError, match=said) as caught:
            conversion.convert_gguf(*tiny, tmp_path / "tiny", expected=right)
    for package, version in cache.versions().items():
        assert f"{package} {version}" in str(caught.value)
    assert "made another model of tiny.gguf" in str(caught.value)
    assert "pip install --upgrade 'transformers>=5.23,<6'" in str(caught.value)
    assert not whole_models(tmp_path)
    assert conversion.convert_gguf(*tiny, tmp_path / "tiny", expected=right).is_dir()


def test_differences_are_those_of_what_is_expected_and_no_others():
    expected = {"eos": "a", "ids": {"x": [1], "y": [2]}}
    assert (
        conversion.differences({"eos": "a", "more": 1, "ids": {"x": [1], "y": [2], "z": [3]}}, expected) == []
    )
    assert conversion.differences({"ids": {"x": [1, 1]}}, expected) == [
        "eos: got None, expected 'a'",
        "the ids of 'x': got [1, 1], expected [1]",
        "the ids of 'y': got None, expected [2]",
    ]


def test_the_sources_fingerprint_is_what_is_asked_for(installed, tiny, monkeypatch):
    source = replace(sources.MODELS["tiny"], fingerprint={"eos": "x", "ids": {}})
    with pytest.raises(OSError, match=r"eos: got '<\|im_end\|>', expected 'x'"):
        conversion.find_package_model(source)
    assert not whole_models(installed)
    assert sources.MODELS["smollm2-135m"].fingerprint["eos"] == "<|im_end|>"


@pytest.mark.parametrize("version", ["4.57.6", "5.17.0", "5.18.0.dev0"])
def test_a_transformers_that_is_too_old_is_named_before_anything_is_done(
    tiny, tmp_path, monkeypatch, version
):
    made = {"transformers": version, "tokenizers": "0.22.2", "gguf": "0.19.0"}
    (tmp_path / "tiny").mkdir()  # what an older converter left
    (tmp_path / "tiny" / "model.safetensors").write_text("of use to whoever made it")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "versions", lambda: made)
        patch.setattr(conversion, "versions", lambda: made)
        patch.setattr(conversion, "write_model", lambda *_: pytest.fail("converted"))
        expected = (
            rf"(?s)transformers {version}, tokenizers 0\.22\.2, gguf 0\.19\.0: below .*5\.18.*--upgrade"
        )
        with pytest.raises(cache.ConversionError, match=expected):
            conversion.convert_gguf(*tiny, tmp_path / "tiny")
    assert (tmp_path / "tiny" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AttributeError("'LlamaConfig' has no quantization_config"), "failed: AttributeError: 'LlamaConfig'"),
        (SafetensorError("header too small"), "failed: SafetensorError: header too small"),
        (Exception("No space left on device (os error 28)"), "is full: a converted SmolLM2-135M takes"),
        (SafetensorError("Permission denied (os error 13)"), "cannot be written"),
        (ImportError("No module named 'gguf'"), "failed: ImportError: No module named 'gguf'"),
        (FileNotFoundError("no such file"), "^no such file$"),
    ],
)
def test_every_failure_of_a_conversion_is_an_oserror_and_leaves_nothing(
    tiny, tmp_path, monkeypatch, error, said
):
    def fail(gguf, directory):
        directory.mkdir()
        raise error

    released = []

    class Lock(FileLock):
        def __exit__(self, *exception):
            released.append([path.name for path in whole_models(tmp_path)])
            super().__exit__(*exception)

    monkeypatch.setattr(conversion, "write_model", fail)
    monkeypatch.setattr(conversion, "FileLock", Lock)
    with pytest.raises(OSError, match=said) as caught:
        conversion.convert_gguf(*tiny, tmp_path / "tiny")
    assert error in (caught.value, caught.value.__cause__)
    assert released == [[]]  # tidied under the lock: after it, what lies there is another process's


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_what_no_upgrade_would_mend_stays_what_it_is_and_leaves_nothing(tiny, tmp_path, monkeypatch, kind):
    def interrupt(gguf, directory):
        directory.mkdir()
        raise kind

    monkeypatch.setattr(conversion, "write_model", interrupt)
    with pytest.raises(kind):
        conversion.convert_gguf(*tiny, tmp_path / "tiny")
    assert not whole_models(tmp_path)

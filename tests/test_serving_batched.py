"""serving.batched: every row through its own adapter, equal to each alone, and to PEFT's mixed batch."""

import copy
import logging

import bitsandbytes as bnb
import pytest
import torch
from lora2qlora.adapters import add_lora, load_adapter, lora_layers, save_adapter
from lora2qlora.lab.models import keep_trainable
from lora2qlora.lora import LoRALinear
from lora2qlora.qlora import NF4Linear, quantize_base
from lora2qlora.serving import BatchedLoRALinear, load_adapters, use_adapters
from peft import PeftModel
from served import SHAPE, peft_adapter, random_model, random_weights
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

ROWS = ["a", None, "b", "b", "c", "a", None]
OPTIONS = {
    "a": {"r": 4, "lora_alpha": 16},
    "b": {"r": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "c": {"r": 2, "rank_pattern": {"k_proj": 6}, "alpha_pattern": {"up_proj": 3}},
}


def folders(model, tmp_path):
    """Three adapters of different ranks and targets, saved by PEFT."""
    for seed, (name, options) in enumerate(OPTIONS.items()):
        peft_adapter(model, tmp_path / name, seed, **options)
    return {name: tmp_path / name for name in OPTIONS}


def ids(rows=7, length=5):
    return torch.randint(2048, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, x, **options):
    return model(x, **options).logits


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "NF4"])
def test_each_row_is_that_of_its_adapter_alone(quantized, tmp_path):
    """To the bit here but for ranks filled up with zeros, 5e-7: another shape adds up otherwise."""
    base = random_model("llama")
    directories = folders(base, tmp_path)
    if quantized:
        quantize_base(base, compute_dtype=torch.float32)
    model, x = copy.deepcopy(base), ids()
    load_adapters(model, directories)
    use_adapters(model, ROWS)
    got = logits(model, x)
    changed = set()
    for name in (None, *OPTIONS):
        alone = copy.deepcopy(base)
        if name:
            load_adapter(alone, directories[name])
        wanted = logits(alone, x)
        for row, own in enumerate(ROWS):
            if own == name:
                assert (got[row] - wanted[row]).abs().max() <= 2e-6 * wanted.abs().max()
            elif (got[row] - wanted[row]).abs().max() > 1e-2 * wanted.abs().max():
                changed.add((own, name))
    assert len(changed) == 12  # every adapter, and the base, is told from every other


def test_rows_without_an_adapter_are_the_bases_to_the_bit(tmp_path):
    base = random_model("qwen2")
    model = copy.deepcopy(base)
    load_adapters(model, folders(base, tmp_path))
    use_adapters(model, [None, "a", None])
    x = ids(3)
    assert logits(model, x)[[0, 2]].equal(logits(base, x)[[0, 2]])


def test_peft_says_the_same_of_a_mixed_batch(tmp_path):
    base = random_model("qwen3")
    directories = folders(base, tmp_path)
    peft = PeftModel.from_pretrained(copy.deepcopy(base), str(directories["a"]), adapter_name="a").eval()
    for name in ("b", "c"):
        peft.load_adapter(str(directories[name]), adapter_name=name)
    load_adapters(base, directories)
    use_adapters(base, ROWS)
    x = ids()
    wanted = logits(peft, x, adapter_names=[name or "__base__" for name in ROWS])
    assert (logits(base, x) - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("shape", [(3, 8), (3, 1, 8), (3, 5, 8), (3, 2, 5, 8), (3, 0, 8)])
def test_a_layer_takes_rows_of_any_shape(shape):
    torch.manual_seed(0)
    base = nn.Linear(8, 6)
    adapters = {"a": filled(base, 2), "b": filled(base, 4)}
    layer = BatchedLoRALinear(base, adapters)
    use_adapters(layer, ["b", None, "a"])
    x = torch.randn(shape)
    with torch.no_grad():
        wanted = torch.stack([adapters["b"](x[0]), base(x[1]), adapters["a"](x[2])])
        torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-6)


def four_bits(tmp_path):
    """A small model in bitsandbytes' NF4, its folder and three adapters for it, saved by PEFT."""
    base = random_weights(LlamaForCausalLM(LlamaConfig(**SHAPE | {"intermediate_size": 128})))
    base.save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load():
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.float32
        )
        keep_trainable(model)
        return model.eval()

    return load, folders(base, tmp_path)


def test_over_bitsandbytes_each_row_is_that_of_its_adapter_alone_and_of_pefts_mixed_batch(tmp_path):
    load, directories = four_bits(tmp_path)
    model, x = load(), ids()
    replaced = load_adapters(model, directories)
    layers = [model.get_submodule(name) for name in replaced]
    assert {type(layer.base) for layer in layers} == {bnb.nn.Linear4bit}
    assert {(layer.A.dtype, layer.A.device.type) for layer in layers} == {(torch.float32, "cpu")}
    use_adapters(model, ROWS)
    got = logits(model, x)
    peft = PeftModel.from_pretrained(load(), str(directories["a"]), adapter_name="a").eval()
    for name in ("b", "c"):
        peft.load_adapter(str(directories[name]), adapter_name=name)
    wanted = logits(peft, x, adapter_names=[name or "__base__" for name in ROWS])
    assert (got - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    for name in (None, *OPTIONS):
        alone = load()
        if name:
            load_adapter(alone, directories[name])
        rows = [row for row, own in enumerate(ROWS) if own == name]
        wanted = logits(alone, x)
        assert (got[rows] - wanted[rows]).abs().max() <= 2e-6 * wanted.abs().max()
        others = [row for row in range(len(ROWS)) if row not in rows]
        assert (got[others] - wanted[others]).abs().amax((1, 2)).min() > 1e-2 * wanted.abs().max()


def test_the_layer_says_its_base_s_weight_and_bias_as_an_adapted_one_does():
    base = nn.Linear(8, 6)
    layer = BatchedLoRALinear(base, {"a": filled(base, 2)})
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert sorted(layer.state_dict()) == ["A", "B", "base.bias", "base.weight", "scalings"]


def filled(base, rank, alpha=4.0, dtype=torch.float32):
    layer = LoRALinear(base, rank, alpha, dtype=dtype)
    nn.init.normal_(layer.lora_B)
    return layer


def test_an_fp16_base_keeps_its_dtype_and_adapters_theirs():
    torch.manual_seed(0)
    base = nn.Linear(8, 6, dtype=torch.bfloat16)
    adapter = filled(base, 2)
    layer = BatchedLoRALinear(base, {"a": adapter})
    use_adapters(layer, ["a"])
    x = torch.randn(1, 3, 8, dtype=torch.bfloat16)
    assert layer.A.dtype == torch.float32
    got = layer(x)
    assert got.dtype == torch.bfloat16
    assert got.equal(adapter(x))


def test_what_the_layer_copies_is_its_own_and_nothing_trains():
    base = nn.Linear(8, 6)
    adapter = filled(base, 2)
    layer = BatchedLoRALinear(base, {"a": adapter})
    adapter.lora_B.data.zero_()
    assert layer.B.any()
    assert not [p for p in layer.parameters() if p.requires_grad]
    assert not any(buffer.requires_grad for buffer in layer.buffers())


def counting():
    """A backend of torch.compile that runs what it is given, and how many graphs it was given."""
    graphs = []
    return graphs, lambda graph, inputs: (graphs.append(graph), graph.forward)[1]


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not:DeprecationWarning")
@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "NF4"])
def test_other_rows_and_a_swapped_adapter_compile_nothing_again(quantized):
    torch.compiler.reset()
    torch.manual_seed(0)
    base = nn.Linear(64, 32)
    base = NF4Linear.from_linear(base, compute_dtype=torch.float32) if quantized else base
    layer = BatchedLoRALinear(base, {"a": filled(base, 4), "b": filled(base, 8)})
    graphs, backend = counting()
    compiled, x = torch.compile(layer, backend=backend), torch.randn(3, 2, 64)
    with torch.no_grad():
        use_adapters(layer, ["a", "b", None])
        compiled(x)
        before = len(graphs)
        assert before
        use_adapters(layer, [None, "b", "b"])
        new = filled(base, 2, alpha=6.0)
        layer.put("b", new)
        got = compiled(x)
        assert len(graphs) == before
        wanted = torch.stack([base(x[0]), new(x[1]), new(x[2])])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        use_adapters(layer, ["a"])
        compiled(x[:1])
        assert len(graphs) > before  # another shape is seen: the counter counts


def test_what_cannot_be_batched_is_refused():
    base = nn.Linear(8, 6)
    good = filled(base, 2)
    for adapters, match in (
        ({}, "LoRALinears by name"),
        ([good], "LoRALinears by name"),
        ({"a": nn.Linear(8, 6)}, "a must be a plain LoRALinear, got Linear"),
        ({"a": good, "b": filled(nn.Linear(8, 7), 2)}, r"b is for a layer of \[7, 8\], this one is \[6, 8\]"),
        ({"a": good, "b": filled(base, 2, dtype=torch.float64)}, "differ in dtype"),
    ):
        with pytest.raises(ValueError, match=match):
            BatchedLoRALinear(base, adapters)
    with pytest.raises(TypeError, match="merge it first"):
        BatchedLoRALinear(good, {"a": good})


def test_wrong_rows_are_refused():
    base = nn.Linear(8, 6)
    layer = BatchedLoRALinear(base, {"a": filled(base, 2)})
    with pytest.raises(ValueError, match="3 rows in the batch, adapters for 0: use_adapters"):
        layer(torch.zeros(3, 8))
    use_adapters(layer, ["a", None])
    with pytest.raises(ValueError, match="3 rows in the batch, adapters for 2"):
        layer(torch.zeros(3, 8))
    with pytest.raises(KeyError, match="no adapter 'b': use one of a, or None"):
        use_adapters(layer, ["a", "b"])
    assert layer.rows.tolist() == [1, 0]
    with pytest.raises(ValueError, match="0 rows, 1 layers"):
        use_adapters(layer, [])
    with pytest.raises(ValueError, match="1 rows, 0 layers"):
        use_adapters(base, ["a"])


def test_a_swap_that_does_not_fit_changes_nothing():
    base = nn.Linear(8, 6)
    layer = BatchedLoRALinear(base, {"a": filled(base, 2)})
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(KeyError, match="no adapter 'b' here, of a"):
        layer.put("b", filled(base, 2))
    with pytest.raises(ValueError, match="rank 3, the stack holds up to 2"):
        layer.put("a", filled(base, 3))
    with pytest.raises(ValueError, match="is for a layer of"):
        layer.put("a", filled(nn.Linear(6, 6), 2))
    assert all(value.equal(before[key]) for key, value in layer.state_dict().items())


def test_folders_that_do_not_fit_leave_the_model_as_it_was(tmp_path):
    model = random_model("llama")
    directories = folders(model, tmp_path)
    other = random_model("qwen3")
    peft_adapter(other, tmp_path / "other")
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="it may be for another"):
        load_adapters(model, {**directories, "other": tmp_path / "other"})
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        load_adapters(model, {**directories, "none": tmp_path / "none"})
    with pytest.raises(ValueError, match="need folders"):
        load_adapters(model, {})
    assert [type(module) for module in model.modules()] == before
    load_adapters(model, directories)
    with pytest.raises(ValueError, match="without adapters"):
        load_adapters(model, directories)
    add_lora(other, ["q_proj"], 2, 4)
    with pytest.raises(ValueError, match="without adapters"):
        load_adapters(other, directories)


def test_our_own_folders_go_too(tmp_path):
    base = random_model("llama")
    model = copy.deepcopy(base)
    add_lora(model, ["q_proj"], rank=3, alpha=5)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, tmp_path)
    load_adapters(base, {"own": tmp_path})
    use_adapters(base, ["own"] * 2)
    x = ids(2)
    wanted = logits(model, x)
    assert (logits(base, x) - wanted).abs().max() <= 2e-6 * wanted.abs().max()

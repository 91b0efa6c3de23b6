"""adapters over models that are wrapped, offloaded, shared, replaced in part, or read weights themselves."""

import functools
import types

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, cpu_offload, disk_offload
from accelerate.hooks import (
    AlignDevicesHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_submodules,
)
from lora2qlora.adapters import (
    CONFIG,
    WEIGHTS,
    add_lora,
    count_parameters,
    find_targets,
    load_adapter,
    lora_layers,
    merge_lora,
    remove_lora,
    save_adapter,
)
from lora2qlora.lora import LoRALinear, merge
from lora2qlora.qlora import quantize_base
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_adapters import TOKENS, adapted, assert_unchanged, logits, randomize, snapshot, tiny_llama
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

SEQUENCE = AutoModelForSequenceClassification
Q = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_blocks(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = compiled(layer)
    return model


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPED = {
    "DataParallel": nn.DataParallel,
    "compiled": compiled,
    "blocks": compiled_blocks,
    "nested": lambda model: nn.DataParallel(compiled(compiled_blocks(model))),
    "in place": lambda model: model.compile(backend="eager") or model,
}


# Wrapped models


@pytest.mark.parametrize("wrap", [*WRAPPED.values(), ddp], ids=[*WRAPPED, "ddp"])
def test_files_have_the_names_of_the_bare_model(tmp_path, gloo, wrap):
    save_adapter(adapted(["q_proj", "0.mlp.up_proj"]), tmp_path / "bare")
    model = wrap(adapted(["q_proj", "0.mlp.up_proj"]))
    save_adapter(model, tmp_path / "wrapped")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()
    for name, layer in lora_layers(model).items():
        assert model.get_submodule(name) is layer
    merged = merge_lora(model)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    remove_lora(model)
    assert torch.equal(logits(model), logits(tiny_llama()))


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_models_are_adapted_and_loaded(tmp_path, wrap):
    expected = adapted(["q_proj", "0.mlp.up_proj"])
    save_adapter(expected, tmp_path)
    model = wrap(tiny_llama())
    assert torch.equal(logits(model), logits(tiny_llama()))  # so that what is compiled is compiled before
    names = load_adapter(model, tmp_path)
    assert names == list(lora_layers(model))
    assert torch.equal(logits(model), logits(expected))  # the compiled code takes note of the new layers
    model = wrap(tiny_llama())
    logits(model)
    assert len(add_lora(model, ["layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"], 4, 8)) == 2
    assert torch.equal(logits(model), logits(tiny_llama()))
    randomize(model)
    bare = tiny_llama()
    add_lora(bare, ["layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"], 4, 8)
    assert torch.equal(logits(model), logits(randomize(bare)))
    assert not torch.equal(logits(bare), logits(tiny_llama()))


def test_what_registers_its_parameters_is_adapted_before_it_wraps(gloo, tmp_path):
    save_adapter(adapted(["q_proj"]), tmp_path)
    model = ddp(tiny_llama())
    before = snapshot(model)
    for change in (lambda: add_lora(model, ["q_proj"], 4, 8), lambda: load_adapter(model, tmp_path)):
        with pytest.raises(
            ValueError, match=r"wrapped in DistributedDataParallel.*add the adapters to the bare"
        ):
            change()
        assert_unchanged(model, before)


def test_sharded_weights_are_refused(gloo, tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama()
    for layer in model.model.layers:
        fully_shard(layer)
    with pytest.raises(ValueError, match="q_proj is sharded: add the adapters to the whole model"):
        add_lora(model, ["q_proj"], 4, 8)
    model = adapted(["q_proj"])
    for layer in model.model.layers:
        fully_shard(layer)
    with pytest.raises(ValueError, match="q_proj: its adapter is offloaded or sharded"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


class Named(nn.Module):
    """A model that nothing wraps, whose parts are called as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.module, self._orig_mod = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)

    def forward(self, x):
        return self._orig_mod(self.module(x))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, compiled])
def test_a_part_that_is_called_module_keeps_its_name(tmp_path, wrap):
    model = wrap(Named())
    add_lora(model, "all-linear", 2, 4)
    save_adapter(randomize(model), tmp_path)
    again, x = Named(), torch.randn(3, 4)
    assert load_adapter(again, tmp_path) == ["module.0", "_orig_mod"]
    assert torch.equal(again(x), model(x))


def test_a_layer_that_is_compiled_by_itself_is_refused():
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj = compiled(model.model.layers[0].self_attn.q_proj)
    assert count_parameters(model) == count_parameters(tiny_llama())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj\._orig_mod is compiled or wrapped by itself"):
        add_lora(model, ["q_proj"], 4, 8)
    assert_unchanged(model, before)
    assert len(add_lora(model, ["k_proj"], 4, 8)) == 2


# Offloaded models


def offloaded(model, how):
    if how == "cpu":
        cpu_offload(model, torch.device("cpu"))
    elif how == "parent":
        for layer in model.model.layers:
            weights = {key: value.clone() for key, value in layer.self_attn.state_dict().items()}
            hook = AlignDevicesHook("cpu", offload=True, weights_map=weights, place_submodules=True)
            add_hook_to_module(layer.self_attn, SequentialHook(hook))
    elif how == "itself":
        for layer in model.model.layers:
            linear = layer.self_attn.q_proj
            weights = {key: value.clone() for key, value in linear.state_dict().items()}
            add_hook_to_module(linear, AlignDevicesHook("cpu", offload=True, weights_map=weights))
    else:
        disk_offload(model, how, torch.device("cpu"))
    return model


@pytest.mark.parametrize("how", ["cpu", "parent", "itself", "disk"])
def test_offloaded_models_are_refused_until_their_hooks_are_gone(tmp_path, how):
    save_adapter(adapted(["q_proj"]), tmp_path / "adapter")
    how = str(tmp_path / "disk") if how == "disk" else how
    model = offloaded(tiny_llama(), how)
    expected = logits(tiny_llama())
    types_before = [(name, type(module)) for name, module in model.named_modules()]
    for change in (
        lambda: add_lora(model, ["q_proj"], 4, 8),
        lambda: load_adapter(model, tmp_path / "adapter"),
    ):
        with pytest.raises(
            ValueError, match=r"q_proj: accelerate offloads its weights.*remove_hook_from_sub"
        ):
            change()
    assert [(name, type(module)) for name, module in model.named_modules()] == types_before
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="accelerate offloads its weights"):
        count_parameters(model)
    assert torch.equal(logits(model), expected)
    remove_hook_from_submodules(model)
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), logits(adapted(["q_proj"])))
    torch.testing.assert_close(logits(merge_lora(model)), logits(model), rtol=1e-4, atol=1e-5)


def test_an_adapted_model_that_is_offloaded_afterwards(tmp_path):
    model = adapted(["q_proj"])
    expected = logits(model)
    cpu_offload(model, torch.device("cpu"))
    assert torch.equal(logits(model), expected)
    layer = model.get_submodule(Q[0])
    for change in (merge_lora, remove_lora, lambda model: merge(layer)):
        with pytest.raises(ValueError, match="accelerate offloads its weights"):
            change(model)
    with pytest.raises(ValueError, match="its adapter is offloaded or sharded"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert list(lora_layers(model)) == Q
    with pytest.raises(ValueError, match="accelerate offloads its weights"):
        LoRALinear(layer.base, 4, 8)


def test_adapters_stay_where_a_module_above_is_offloaded():
    model = offloaded(adapted(["q_proj"]), "parent")
    with pytest.raises(ValueError, match="q_proj: accelerate offloads its weights"):
        remove_lora(model)
    assert list(lora_layers(model)) == Q


def test_hooks_that_move_inputs_only_are_no_hindrance():
    model = tiny_llama()
    add_hook_to_module(model, AlignDevicesHook("cpu", io_same_device=True))
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn.q_proj, AlignDevicesHook("cpu"))
    add_lora(model, ["q_proj"], 4, 8)
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert torch.equal(logits(randomize(model)), logits(adapted(["q_proj"])))
    with pytest.raises(ValueError, match=r"q_proj: the layer carries a forward of its own.*would lose"):
        merge_lora(model)
    remove_hook_from_submodules(model)
    torch.testing.assert_close(logits(merge_lora(model)), logits(model), rtol=1e-4, atol=1e-5)


def test_adapters_are_not_made_on_meta_beside_real_inputs(tmp_path):
    model = tiny_llama()
    model.model.layers[1].self_attn.q_proj.to("meta")
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(
        ValueError, match=r"1\.self_attn\.q_proj has no numbers yet, it is on the meta device"
    ):
        add_lora(model, ["q_proj"], 4, 8)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    layer = LoRALinear(nn.Linear(4, 4), 2, 4)
    layer.base.to("meta")
    with pytest.raises(ValueError, match="on the meta device, without numbers"):
        merge(layer)
    with torch.device("meta"):
        model = tiny_llama()
    add_lora(model, ["q_proj"], 4, 8)
    with pytest.raises(ValueError, match="its adapter is offloaded or sharded"):
        save_adapter(model, tmp_path)
    assert merge_lora(model).get_submodule(Q[0]).weight.is_meta


# Copies


FORWARDS = {
    "closure": (lambda forward: lambda *a, **k: forward(*a, **k), False),
    "wraps": (lambda forward: functools.wraps(forward)(lambda *a, **k: forward(*a, **k)), False),
    "default": (lambda forward: lambda *a, _forward=forward, **k: _forward(*a, **k), False),
    "decorated": (torch.autocast("cpu", dtype=torch.bfloat16), False),
    "compiled": (compiled, False),
    "inner": (lambda forward: lambda *a, **k: next(run(*a, **k) for run in (forward,)), False),
    "bound": (lambda forward: types.MethodType(forward.__func__, forward.__self__), True),
    "partial": (functools.partial, True),
}


@pytest.mark.parametrize("part", ["", "model.layers.0.mlp"])
@pytest.mark.parametrize(("replace", "is_copied"), FORWARDS.values(), ids=FORWARDS)
def test_a_merged_copy_runs_by_itself_or_is_refused(replace, is_copied, part):
    model = adapted(["q_proj", "up_proj"])
    module = model.get_submodule(part)
    module.forward = replace(module.forward)
    if not is_copied:
        with pytest.raises(
            ValueError, match=f"{part or 'the model'} has a forward that would run the original"
        ):
            merge_lora(model)
        del module.forward
    merged = merge_lora(model)
    expected = logits(merged)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    remove_lora(model)
    assert torch.equal(logits(merged), expected)
    assert expected.any()


kept = {}


def forward_of_a_global(*arguments, **options):
    return kept["forward"](*arguments, **options)


def test_a_forward_that_finds_the_original_among_its_globals_is_refused():
    model = adapted(["q_proj"])
    kept["forward"], model.forward = model.forward, forward_of_a_global
    try:
        with pytest.raises(ValueError, match="the model has a forward that would run the original"):
            merge_lora(model)
    finally:
        kept.clear()
    assert isinstance(merge_lora(model), type(model))  # a forward of no module is nobody's business


def test_hooks_are_copied_unless_they_hold_the_original():
    seen = []
    model = adapted(["q_proj"])
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(module))
    merged = merge_lora(model)
    logits(merged)
    assert seen == [merged.model.layers[0]]
    handle = model.model.layers[1].register_forward_hook(lambda *_: model.lm_head and None)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1 has a _forward_hooks that would run the original"
    ):
        merge_lora(model)
    handle.remove()
    model.get_submodule(Q[0]).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"q_proj: the layer carries _forward_hooks, which a merged one"):
        merge_lora(model)


def test_a_model_that_accelerate_prepared(tmp_path):
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(adapted(["q_proj"]))
    merged = merge_lora(model)
    expected = logits(merged)
    save_adapter(model, tmp_path)
    remove_lora(model)
    assert torch.equal(logits(merged), expected)
    assert load_adapter(model, tmp_path) == Q


# Layers with several names


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"second": self.first})

    def forward(self, x):
        return self.inner["second"](torch.relu(self.first(x)))


@pytest.mark.parametrize("targets", ["all-linear", ["first"]])
def test_a_layer_with_two_names_stays_one(tmp_path, targets):
    model, x = Shared(), torch.randn(3, 4)
    base = model.first
    assert add_lora(model, targets, 2, 4) == ["first"] == list(lora_layers(model))
    assert model.first is model.inner["second"]
    assert isinstance(model.first, LoRALinear)
    save_adapter(randomize(model), tmp_path / "ours")
    again = Shared()
    assert load_adapter(again, tmp_path / "ours") == ["first"]
    assert torch.equal(again(x), model(x))
    get_peft_model(Shared(), LoraConfig(r=2, target_modules=["first"])).save_pretrained(tmp_path / "theirs")
    keys = [load_file(tmp_path / folder / WEIGHTS).keys() for folder in ("ours", "theirs")]
    assert keys[0] == keys[1]
    merged = merge_lora(model)
    assert merged.first is merged.inner["second"]
    torch.testing.assert_close(merged(x), model(x))
    remove_lora(model)
    assert model.first is model.inner["second"] is base


# Models that read weights


def tiny(kind, make=AutoModelForCausalLM, **more):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    return make.from_config(AutoConfig.for_model(kind, **(sizes | {"eos_token_id": 2} | more))).eval()


def tiny_t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_decoder_layers": 2}
    return tiny("t5", AutoModelForSeq2SeqLM, decoder_start_token_id=0, **sizes)


MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
JAMBA = {"num_experts": 2, "mamba_dt_rank": 4, "mamba_d_state": 4, "attn_layer_period": 2}
JAMBA |= {"attn_layer_offset": 1, "use_mamba_kernels": False}
FAMILIES = {
    "llama": (lambda: tiny("llama"), "all-linear", None),
    "mixtral": (lambda: tiny("mixtral", **MIXTRAL), "all-linear", None),
    "bert": (lambda: tiny("bert", AutoModel), "all-linear", None),
    "bloom": (lambda: tiny("bloom", n_layer=2, n_head=4), "all-linear", None),
    "t5": (tiny_t5, "all-linear", None),
    "mamba": (
        lambda: tiny("mamba", state_size=4),
        ["in_proj"],
        r"MambaMixer multiplies .* of dt_proj, out_proj, x_p",
    ),
    "jamba": (
        lambda: tiny("jamba", **JAMBA),
        ["in_proj", "x_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"],
        r"JambaMambaMixer multiplies with the weight of dt_proj itself.*others|targets, of \['down_proj'",
    ),
}


def run(model):
    inputs = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS
    return model(**inputs)[0]


@pytest.mark.parametrize(("make", "targets", "refused"), FAMILIES.values(), ids=FAMILIES)
def test_every_adapter_of_a_family_computes(make, targets, refused):
    model = make()
    before = snapshot(model)
    if refused:
        with pytest.raises(ValueError, match=refused):
            add_lora(model, "all-linear", 4, 8)
        assert_unchanged(model, before)
    model.requires_grad_(False)  # which kernel torch takes hangs on that, and the last bit on the kernel
    with torch.no_grad():
        expected = run(model)
        assert add_lora(model, targets, 4, 8)
        assert torch.equal(run(model), expected)
    output = run(randomize(model))
    assert not torch.allclose(output, expected)
    output.square().sum().backward()
    layers = lora_layers(model)
    used = {"pooler.dense"} if "pooler.dense" in layers else set()  # BERT's pooler makes the second output
    silent = {
        name for name, layer in layers.items() if layer.lora_A.grad is None or not layer.lora_A.grad.any()
    }
    silent |= {
        name for name, layer in layers.items() if layer.lora_B.grad is None or not layer.lora_B.grad.any()
    }
    assert silent == used


class Multiplies(nn.Module):
    def __init__(self, flag=True):
        super().__init__()
        self.proj, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.parts = nn.ModuleList([nn.Linear(4, 4)])
        self.flag = flag

    def forward(self, x):
        if self.flag and self.other.weight is not None:
            return self.helper(x)
        return self.other(x.to(self.proj.weight.dtype))

    def helper(self, x):
        linear = self.proj
        for part in self.parts:
            x = x @ part.weight.T
        return nn.functional.linear(x, linear.weight, linear.bias) + self.other(x)


def test_a_layer_whose_weight_is_multiplied_with_is_found_in_the_source():
    model = nn.Sequential(Multiplies())
    with pytest.raises(
        ValueError, match=r"^Multiplies multiplies with the weight of 0\.parts\.0, proj itself.* of \['oth"
    ):
        add_lora(model, "all-linear", 2, 4)
    assert add_lora(model, ["other"], 2, 4) == ["0.other"]
    with pytest.raises(ValueError, match=r"^Multiplies multiplies"):
        quantize_base(nn.Sequential(Multiplies()))


@pytest.mark.parametrize(
    ("make", "layer", "others"),
    [
        (lambda: nn.MultiheadAttention(8, 2), "out_proj", []),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), "linear1, linear2, out_proj", []),
        (lambda: nn.TransformerDecoderLayer(8, 2, 16), "out_proj", ["linear1", "linear2"]),
    ],
)
def test_attention_of_torch(make, layer, others):
    model = nn.ModuleDict({"block": make()})
    with pytest.raises(ValueError, match=f"multiplies with the weight of {layer} itself.*"):
        add_lora(model, "all-linear", 2, 4)
    if others:
        assert len(add_lora(model, others, 2, 4)) == len(others)


def test_bloom_reads_weights_only_in_a_mode_that_is_off():
    assert len(find_targets(FAMILIES["bloom"][0](), "all-linear")) == 8
    slow = tiny("bloom", n_layer=2, n_head=4, slow_but_exact=True, pretraining_tp=2)
    with pytest.raises(
        ValueError, match=r"BloomAttention, BloomMLP multiplies with the weight of dense, dense_4h"
    ):
        find_targets(slow, "all-linear")


def test_the_weight_of_an_adapted_layer_is_its_bases_and_counted_once(tmp_path):
    model = adapted(["q_proj"])
    layer = model.get_submodule(Q[0])
    assert layer.weight is layer.base.weight
    assert layer.bias is None
    assert sum(p.numel() for p in model.parameters()) == count_parameters(model).total
    assert {key.split(".", 4)[-1] for key in model.state_dict() if key.startswith(Q[0])} == {
        "q_proj.base.weight", "q_proj.lora_A", "q_proj.lora_B",
    }  # fmt: skip
    with pytest.raises(AttributeError, match="'LoRALinear' object has no attribute 'weight'"):
        getattr(LoRALinear(Features(), 2, 4), "weight")  # noqa: B009
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = nn.Parameter(torch.zeros(32, 32))


class Features(nn.Module):
    in_features, out_features = 4, 3


# Heads


def classifier(kind, make, **more):
    return tiny(kind, make, num_labels=25, **more)


def test_all_linear_spares_every_head():
    for model, head in (
        (classifier("llama", SEQUENCE), "score"),
        (classifier("llama", AutoModelForTokenClassification), "score"),
        (classifier("llama", AutoModelForQuestionAnswering), "qa_outputs"),
        (classifier("bert", SEQUENCE), "classifier"),
        (
            classifier("roberta", SEQUENCE, max_position_embeddings=64),
            "classifier.",
        ),
        (
            classifier("distilbert", SEQUENCE, dim=32, hidden_dim=48, n_heads=4),
            "pre_cl",
        ),
    ):
        names = find_targets(model, "all-linear")
        assert names
        assert not [name for name in names if name.startswith(head) or "classifier" in name]
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        base = {name for name in linears if name.startswith(f"{model.base_model_prefix}.")}
        assert set(names) == base
        assert any(name.startswith(head) for name in linears - base)


def test_a_head_is_adapted_where_it_is_named_and_pefts_rule_is_the_same():
    make = functools.partial(classifier, "llama", SEQUENCE)
    peft = get_peft_model(make(), LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    model = make()
    assert set(find_targets(model, "all-linear")) == set(peft.targeted_module_names)
    assert add_lora(model, ["score", "q_proj"], 4, 8)[-1] == "score"
    assert quantize_base(make(), ["score"]) == ["score"]


class WithValues(nn.Module):
    """As TRL wraps a model: a value head beside it, which no get_output_embeddings knows."""

    def __init__(self):
        super().__init__()
        self.pretrained_model = tiny_llama(tied=False)
        self.v_head = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 1))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, compiled])
def test_value_heads_and_wrapped_heads(wrap):
    names = find_targets(wrap(WithValues()), "all-linear")
    assert len(names) == 14
    assert not [name for name in names if "head" in name]
    assert len(find_targets(wrap(classifier("llama", SEQUENCE)), "all-linear")) == 14
    routed = nn.ModuleDict({"block": nn.ModuleDict({"proj": nn.Linear(4, 4)}), "score": nn.Linear(4, 2)})
    assert find_targets(routed, "all-linear") == ["block.proj"]


# What fails in the middle, and what is said


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2, torch.complex64]
)
def test_dtypes_that_cannot_be_drawn_are_refused_before_anything_is_frozen(dtype, tmp_path):
    save_adapter(adapted(["q_proj"]), tmp_path)
    model = tiny_llama()
    before = snapshot(model)
    for change in (
        lambda: add_lora(model, ["q_proj"], 4, 8, dtype=dtype),
        lambda: load_adapter(model, tmp_path, dtype=dtype),
    ):
        with pytest.raises(TypeError, match=rf"q_proj: dtype must be a float dtype of torch, got {dtype}"):
            change()
        assert_unchanged(model, before)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["kaiming_uniform_", "set_submodule"])
def test_what_fails_in_the_middle_changes_nothing(monkeypatch, error, place):
    model = adapted(["q_proj"])
    model.get_submodule(Q[0]).lora_A.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    before = snapshot(model)
    owner = nn.init if place == "kaiming_uniform_" else nn.Module
    whole, calls = getattr(owner, place), []

    def third_fails(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise error("no more")
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, third_fails)
        with pytest.raises(error, match="no more"):
            add_lora(model, ["k_proj", "up_proj"], 4, 8)
    assert len(calls) >= 3
    assert_unchanged(model, before)


def test_what_stands_where_no_linear_layer_does_is_said():
    gpt2 = tiny("gpt2", n_embd=32, n_layer=2, n_head=4)
    said = r"candidates are \[\]; matrices lie in Conv1D x 8, Embedding x 2, but only what has in_features"
    for call in (
        lambda: add_lora(gpt2, "all-linear", 4, 8),
        lambda: add_lora(gpt2, ["c_attn"], 4, 8),
        lambda: quantize_base(gpt2),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(ValueError, match=r"named \['embed_tokens'\].*; so named is Embedding x 1, but only"):
        add_lora(tiny_llama(), ["embed_tokens"], 4, 8)
    with pytest.raises(ValueError, match=r"matrices lie in no module"):
        add_lora(nn.Sequential(nn.ReLU()), "all-linear", 4, 8)

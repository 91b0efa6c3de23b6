"""variants: PEFT's numbers where PEFT has them, and what each variant promises, held to closed forms."""

import copy
import math

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from lora2qlora.adapters import (
    add_lora,
    count_parameters,
    lora_layers,
    merge_cost,
    merge_lora,
    merge_quantized,
    save_adapter,
)
from lora2qlora.lora import LoRALinear
from lora2qlora.low_rank import subspace_similarity
from lora2qlora.qlora import NF4Linear, quantize_base
from lora2qlora.serving import BatchedLoRALinear
from lora2qlora.variants import (
    DoRALinear,
    adapt,
    as_plain_lora,
    eva_start,
    loftq,
    lora_plus_groups,
    pissa,
    rslora_alpha,
)
from lora2qlora.variants.pissa import linear_with
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.testing import assert_close
from toy import toy_model


def a_linear(bias=True, out=24, into=64, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(into, out, bias)


def peft_layer(linear, **options):
    """PEFT's layer over a copy of a linear one, with what `options` set."""
    model = nn.Sequential(copy.deepcopy(linear))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **options)
    return get_peft_model(model, config).base_model.model[0]


@torch.no_grad()
def filled(layer, theirs, seed=1):
    """The same B that is not zero, and the same A, in ours and PEFT's."""
    torch.manual_seed(seed)
    layer.lora_B.normal_()
    theirs.lora_B.default.weight.copy_(layer.lora_B)
    theirs.lora_A.default.weight.copy_(layer.lora_A)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_rslora_scales_as_pefts(rank):
    linear = a_linear()
    config = LoraConfig(r=rank, lora_alpha=6, target_modules=["0"], use_rslora=True)
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(linear)), config).base_model.model[0]
    layer = LoRALinear(linear, rank, rslora_alpha(rank, 6))
    assert math.isclose(layer.scaling, theirs.scaling["default"], rel_tol=1e-12)


@pytest.mark.parametrize(("rank", "alpha"), [(0, 1.0), (4, 0.0), (4, math.nan)])
def test_rslora_refuses_what_has_no_scale(rank, alpha):
    with pytest.raises(ValueError, match="rank >= 1 and alpha > 0"):
        rslora_alpha(rank, alpha)


def test_lora_plus_trains_as_pefts_optimizer_does():
    linear, x = a_linear(), torch.randn(5, 64)
    layer, theirs = LoRALinear(copy.deepcopy(linear), 4, 6), peft_layer(linear)
    filled(layer, theirs)
    ours = torch.optim.AdamW(lora_plus_groups(nn.Sequential(layer), 1e-3, 8.0), weight_decay=0)
    other = create_loraplus_optimizer(
        nn.Sequential(theirs), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0
    )
    for _ in range(3):
        for module, optimizer in ((layer, ours), (theirs, other)):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    assert_close(layer.lora_A, theirs.lora_A.default.weight)
    assert_close(layer.lora_B, theirs.lora_B.default.weight)
    assert not torch.equal(layer.lora_B, torch.zeros_like(layer.lora_B))


def test_lora_plus_has_every_parameter_once_and_magnitudes_with_b():
    model = nn.Sequential(DoRALinear(a_linear(), 4, 6), nn.Linear(24, 2))
    slow, fast = lora_plus_groups(model, 0.1)
    assert {id(p) for p in fast["params"]} == {id(model[0].lora_B), id(model[0].magnitude), id(model[1].bias)}
    training = [p for p in model.parameters() if p.requires_grad]
    assert len(slow["params"]) + len(fast["params"]) == len(training)
    assert (slow["lr"], fast["lr"]) == (0.1, 1.6)


@pytest.mark.parametrize(
    ("rate", "ratio", "said"), [(0, 16, "above 0"), (1e-3, -1, "above 0"), (1e-3, math.nan, "above 0")]
)
def test_lora_plus_refuses_rates(rate, ratio, said):
    with pytest.raises(ValueError, match=said):
        lora_plus_groups(nn.Sequential(LoRALinear(a_linear(), 4, 6)), rate, ratio)


def test_lora_plus_refuses_what_does_not_train():
    frozen = nn.Sequential(LoRALinear(a_linear(), 4, 6)).requires_grad_(False)
    for model in (nn.Sequential(a_linear()), frozen):
        with pytest.raises(ValueError, match="need adapters that train"):
            lora_plus_groups(model, 1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_dora_equals_pefts_over_three_steps(bias):
    linear, x = a_linear(bias), torch.randn(2, 5, 64)
    layer, theirs = DoRALinear(copy.deepcopy(linear), 4, 6), peft_layer(linear, use_dora=True)
    filled(layer, theirs)
    magnitude = theirs.lora_magnitude_vector.default.weight
    mine = [layer.lora_A, layer.lora_B, layer.magnitude]
    pairs = [*zip(mine, (theirs.lora_A.default.weight, theirs.lora_B.default.weight, magnitude), strict=True)]
    optimizers = [torch.optim.SGD([pair[i] for pair in pairs], lr=0.1) for i in (0, 1)]
    for _ in range(3):
        outputs = [module(x) for module in (layer, theirs)]
        assert_close(*outputs)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
        for ours, other in pairs:
            assert ours.grad.any()
            assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
    assert not torch.allclose(layer.magnitude, linear.weight.norm(dim=1), atol=1e-4)


@pytest.mark.parametrize("quantized", [False, True])
def test_dora_starts_as_its_base_and_its_rows_have_the_magnitudes_lengths(quantized):
    base = a_linear()
    base = NF4Linear.from_linear(base, compute_dtype=torch.float32) if quantized else base
    layer, x = DoRALinear(base, 4, 6), torch.randn(3, 64)
    assert_close(layer(x), base(x))
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.magnitude.uniform_(0.5, 2)
    W = base.dequantize(base.weight, torch.float32) if quantized else base.weight
    assert_close((W + layer.delta_weight()).norm(dim=1), layer.magnitude)
    assert_close(layer(x), nn.functional.linear(x, W + layer.delta_weight(), base.bias), rtol=1e-4, atol=1e-5)


def dora_model(quantized):
    """A small Llama with DoRA, moved away from its start."""
    model = toy_model()
    if quantized:
        quantize_base(model, compute_dtype=torch.float32)
    layers = adapt(model, "all-linear", lambda base: DoRALinear(base, 2, 4))
    torch.manual_seed(0)
    for layer in layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
        nn.init.uniform_(layer.magnitude, 0.5, 2)
    return model, torch.arange(3, 11)[None]


def test_dora_merges_into_what_it_computes():
    model, ids = dora_model(quantized=False)
    wanted = model(ids).logits
    assert_close(merge_lora(model)(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    model, ids = dora_model(quantized=True)
    merged = merge_quantized(model, torch.float32)
    assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    cost = merge_cost(model, merged)
    assert math.isclose(cost.kept, 1, abs_tol=1e-5)
    assert cost.error < 1e-5


def test_dora_is_refused_where_a_and_b_alone_are_kept(tmp_path):
    model, _ = dora_model(quantized=False)
    with pytest.raises(ValueError, match="a DoRALinear trains more than A and B"):
        save_adapter(model, tmp_path)
    assert not any(tmp_path.iterdir())
    layer = next(iter(lora_layers(model).values()))
    with pytest.raises(ValueError, match="must be a plain LoRALinear, got DoRALinear"):
        BatchedLoRALinear(layer.base, {"one": layer})


def test_dora_counts_one_magnitude_a_row_more():
    plain = count_parameters(nn.Sequential(LoRALinear(a_linear(), 4, 6)))
    dora = count_parameters(nn.Sequential(DoRALinear(a_linear(), 4, 6)))
    assert (dora.trainable - plain.trainable, dora.total - plain.total) == (24, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_starts_as_pefts(dtype):
    linear = a_linear().to(dtype)
    layer, theirs = pissa(linear, 4, 6), peft_layer(linear, init_lora_weights="pissa")
    options = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 2e-3}
    assert_close(layer.base.weight, theirs.base_layer.weight.detach(), **options)
    assert_close(
        layer.delta_weight(), theirs.get_delta_weight("default").detach(), check_dtype=False, **options
    )
    assert layer.base.weight.dtype == dtype
    x = torch.randn(3, 64, dtype=dtype)
    assert_close(layer(x), linear(x), rtol=0.02, atol=1e-5 if dtype == torch.float32 else 0.02)


def test_pissa_leaves_the_layer_and_takes_its_largest_directions():
    linear = a_linear()
    before = linear.weight.clone()
    layer = pissa(linear, 4, 6)
    assert torch.equal(linear.weight, before)
    assert linear.weight.requires_grad
    assert not layer.base.weight.requires_grad
    assert torch.equal(layer.base.bias, linear.bias)
    assert layer.base.bias.data_ptr() != linear.bias.data_ptr()
    sigma = torch.linalg.svdvals(before)
    assert_close(torch.linalg.svdvals(layer.delta_weight())[:4], sigma[:4], rtol=1e-4, atol=1e-5)
    assert_close(torch.linalg.matrix_norm(layer.base.weight, 2), sigma[4], rtol=1e-4, atol=1e-5)


def test_a_trained_pissa_is_a_plain_adapter_of_twice_the_rank():
    linear, x = a_linear(), torch.randn(3, 64)
    layer = pissa(linear, 4, 6)
    start = copy.deepcopy(layer)
    with torch.no_grad():
        layer.lora_A.add_(torch.randn_like(layer.lora_A))
        layer.lora_B.mul_(1.5)
    plain = as_plain_lora(layer, start, linear)
    assert plain.rank == 8
    assert plain.scaling == layer.scaling
    assert_close(plain(x), layer(x), rtol=1e-4, atol=1e-5)
    wrong = as_plain_lora(layer, copy.deepcopy(layer), linear)
    assert not torch.allclose(wrong(x), layer(x), atol=0.01)
    with pytest.raises(ValueError, match="pass a copy from before training"):
        as_plain_lora(layer, pissa(linear, 3, 6), linear)


@pytest.mark.parametrize("make", [pissa, loftq])
def test_what_is_rounded_already_is_refused(make):
    with pytest.raises(ValueError, match="quantized already"):
        make(NF4Linear.from_linear(a_linear()), 4, 6)
    with pytest.raises(ValueError, match="rank must be in"):
        make(a_linear(), 25, 6)
    with pytest.raises(TypeError, match="plain float weight"):
        make(nn.Conv1d(1, 1, 1), 4, 6)


def error_of(layer, W):
    """‖W - (Ŵ + s B A)‖ / ‖W‖."""
    base = layer.base.dequantize(layer.base.weight, torch.float32)
    return ((W - base - layer.delta_weight()).norm() / W.norm()).item()


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_the_papers_loop_over_bitsandbytes(iterations):
    linear = a_linear(out=64)
    W, update = linear.weight.detach(), torch.zeros(64, 64)
    for _ in range(iterations):
        packed, state = quantize_4bit(W - update, quant_type="nf4")
        Q = dequantize_4bit(packed, state)
        U, S, V = torch.linalg.svd(W - Q)
        update = U[:, :4] @ S[:4].diag() @ V[:4]
    options = {"double_quant": False, "compute_dtype": torch.float32}
    layer = loftq(linear, 4, 6, iterations, **options)
    assert_close(layer.base.dequantize(layer.base.weight, torch.float32), Q, rtol=0, atol=1e-6)
    assert_close(layer.delta_weight(), update, rtol=1e-4, atol=1e-6)
    plain = LoRALinear(NF4Linear.from_linear(linear, **options), 4, 6)
    assert error_of(layer, W) < error_of(plain, W)


def test_loftq_finds_nothing_to_correct_on_the_grid():
    once = NF4Linear.from_linear(a_linear(out=64), double_quant=False)
    linear = nn.Linear(64, 64)
    linear.weight.data = once.dequantize(once.weight, torch.float32).clone()
    layer = loftq(linear, 4, 6, double_quant=False)
    assert layer.delta_weight().abs().max() < 1e-6
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        loftq(linear, 4, 6, 0)


def eva_model(rank=3):
    model = toy_model()
    add_lora(model, ["q_proj", "down_proj"], rank, 4)
    torch.manual_seed(1)
    return model, {"input_ids": torch.randint(3, 250, (4, 16))}


def test_eva_takes_the_principal_directions_of_the_inputs():
    model, batch = eva_model()
    wanted, seen = model(**batch).logits, {}
    for name, layer in lora_layers(model).items():
        layer.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].flatten(0, 1)}))
    model(**batch)
    eva_start(model, [batch])
    assert_close(model(**batch).logits, wanted)
    for name, layer in lora_layers(model).items():
        centred = seen[name] - seen[name].mean(0)
        V = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
        assert_close((V @ layer.lora_A.T).abs(), torch.eye(3), rtol=0, atol=1e-3)


def test_eva_spans_nearly_what_pefts_does_and_no_less_of_the_variance():
    """PEFT's decomposition is randomized (svd_lowrank), so it is near the principal directions only."""
    model, batch = eva_model()
    inputs = {}
    for name, layer in lora_layers(model).items():
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0].flatten(0, 1)}))
    eva_start(model, [batch, batch])
    config = {"r": 3, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "eva"}
    config = LoraConfig(**config, eva_config={"rho": 1.0})
    theirs = get_peft_model(toy_model(), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(theirs, [batch, batch], show_progress_bar=False)
    for name, layer in lora_layers(model).items():
        other = theirs.get_submodule(f"base_model.model.{name}").lora_A.default.weight.detach()
        rows = [torch.linalg.qr(A.detach().T).Q for A in (layer.lora_A, other)]
        assert subspace_similarity(*rows) > 0.9  # of random ones 0.1
        mine, of_peft = (((inputs[name] - inputs[name].mean(0)) @ V).norm() for V in rows)
        assert 0.99 * mine < of_peft < 1.0001 * mine


def test_eva_does_not_look_at_hidden_tokens():
    model, batch = eva_model()
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 10:] = 0
    eva_start(model, [batch | {"attention_mask": mask}])
    short, _ = eva_model()
    eva_start(short, [{"input_ids": batch["input_ids"][:, :10]}])
    for name, layer in lora_layers(model).items():
        assert (
            subspace_similarity(layer.lora_A.detach().T, short.get_submodule(name).lora_A.detach().T) > 0.999
        )


def test_eva_refuses_and_leaves_the_model_as_it_was():
    model, batch = eva_model()
    before = copy.deepcopy(model.state_dict())
    model.train()
    with pytest.raises(ValueError, match="no batches"):
        eva_start(model, [])
    with pytest.raises(ValueError, match="more tokens than the rank, 3; got 3"):
        eva_start(model, [{"input_ids": batch["input_ids"][:1, :3]}])
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):  # the model's own
        eva_start(model, [batch, {"nonsense": 1}])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    nn.init.ones_(next(iter(lora_layers(model).values())).lora_B)
    for other in (model, toy_model()):
        with pytest.raises(ValueError, match="before their training"):
            eva_start(other, [batch])


@pytest.mark.parametrize(
    "make",
    [
        lambda base: LoRALinear(base, 2, 4),
        lambda base: DoRALinear(base, 2, 4),
        lambda base: pissa(base, 2, 4),
        lambda base: loftq(base, 2, 4, compute_dtype=torch.float32),
    ],
    ids=["lora", "dora", "pissa", "loftq"],
)
def test_adapt_trains_what_the_variant_trains_and_nothing_else(make):
    model, ids = toy_model(), torch.arange(3, 11)[None]
    wanted = model(ids).logits
    layers = adapt(model, ["q_proj", "up_proj"], make)
    assert lora_layers(model) == layers
    assert list(layers) == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    training = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert training <= {"lora_A", "lora_B", "magnitude"}
    assert {"lora_A", "lora_B"} <= training
    assert_close(model(ids).logits, wanted, rtol=0, atol=0.05)
    model(ids).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_adapt_changes_nothing_on_an_error():
    model = toy_model()
    before = {name: (id(m), [p.requires_grad for p in m.parameters()]) for name, m in model.named_modules()}

    def picky(base):
        if base.out_features == 64:
            raise ValueError("not this one")
        return LoRALinear(base, 2, 4)

    with pytest.raises(ValueError, match=r"model.layers.0.mlp.gate_proj: not this one"):
        adapt(model, "all-linear", picky)
    after = {name: (id(m), [p.requires_grad for p in m.parameters()]) for name, m in model.named_modules()}
    assert after == before
    add_lora(model, "all-linear", 2, 4)
    with pytest.raises(ValueError, match="adapters already"):
        adapt(model, "all-linear", picky)


def test_loftq_finds_its_correction_in_float32_whatever_the_base_computes_in():
    options = {"double_quant": False, "compute_dtype": torch.bfloat16}
    linear = a_linear().bfloat16()
    layer = loftq(linear, 4, 6, 1, **options)
    missing = linear.weight.float() - layer.base.dequantize(layer.base.weight, torch.float32)
    kept = torch.linalg.svdvals(missing)[:4].square().sum()
    left = (missing - layer.delta_weight()).square().sum()
    assert_close(left, missing.square().sum() - kept, rtol=1e-5, atol=1e-7)


def test_a_plain_adapter_has_the_dtype_that_it_had_and_freezes_the_bias():
    linear = a_linear().bfloat16()
    layer = pissa(linear, 4, 6)
    assert not any(p.requires_grad for p in layer.base.parameters())
    assert not any(p.requires_grad for p in linear_with(a_linear(), torch.zeros(24, 64)).parameters())
    for dtype in (torch.bfloat16, torch.float64):
        started = copy.deepcopy(layer).to(dtype)
        assert as_plain_lora(started, started, copy.deepcopy(linear)).lora_A.dtype == dtype

"""lora: one adapted layer against PEFT, autograd and closed forms; merging; what is frozen or refused."""

import copy
import logging
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora.lora import LoRALinear, check_adapter, is_linear, merge
from peft import LoraConfig, get_peft_model
from torch import nn

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
seeds = st.integers(0, 2**16)


@st.composite
def layers(draw, dtypes=(torch.float32,)):
    """A LoRALinear of any small shape, rank, alpha and bias, with a B that is not zero any more."""
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    torch.manual_seed(draw(seeds))
    base = nn.Linear(*shape, bias=draw(st.booleans()), dtype=draw(st.sampled_from(dtypes)))
    # PEFT's adapters are float64 over a float64 base, and float32 over any other.
    dtype = torch.promote_types(base.weight.dtype, torch.float32)
    rank, alpha = draw(st.integers(1, min(shape))), draw(st.floats(0.1, 64))
    layer = LoRALinear(base, rank, alpha, dtype=dtype)
    nn.init.normal_(layer.lora_B)
    return layer


def batch(layer, *leading):
    return torch.randn(*leading, layer.in_features).to(layer.base.weight.dtype)


def peft_twin(layer, dropout=0.0):
    """PEFT's layer over the same base, with the same A, B, rank and alpha."""
    config = LoraConfig(r=layer.rank, lora_alpha=layer.alpha, target_modules=["0"], lora_dropout=dropout)
    twin = get_peft_model(nn.Sequential(copy.deepcopy(layer.base)), config).base_model.model[0]
    with torch.no_grad():
        twin.lora_A["default"].weight.copy_(layer.lora_A)
        twin.lora_B["default"].weight.copy_(layer.lora_B)
    return twin


def run(module, x, G):
    """The output, and the gradients of x, A and B where G reaches the output."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(G)
    A, B = (module.lora_A, module.lora_B)
    if isinstance(A, nn.ModuleDict):  # PEFT keeps one linear layer for each adapter
        A, B = A["default"].weight, B["default"].weight
    return y.detach(), x.grad, A.grad, B.grad


def magnitudes(layer, x, G):
    """What `run` gives where all numbers are positive, so that nothing cancels: the scale of rounding."""
    positive = copy.deepcopy(layer).double()
    for parameter in positive.parameters():
        parameter.data.abs_()
    return run(positive, x.double().abs(), G.double().abs())


def is_near(got, expected, scale, dtype, steps=4):
    """Whether two tensors differ by a few roundings of `dtype` of numbers as large as `scale`, at most."""
    info = torch.finfo(dtype)
    error = (got.double() - expected.double()).abs()
    return bool((error <= steps * info.eps * (scale + info.smallest_normal)).all())


@settings(max_examples=60, deadline=None)
@given(layers(), st.sampled_from([(), (3,), (2, 3), (0,)]))
def test_outputs_and_gradients_equal_pefts(layer, leading):
    x, G = batch(layer, *leading), torch.randn(*leading, layer.out_features)
    for got, expected, scale in zip(
        run(layer, x, G), run(peft_twin(layer), x, G), magnitudes(layer, x, G), strict=True
    ):
        assert got.shape == expected.shape
        assert is_near(got, expected, scale, torch.float32, steps=50)  # 6e-6


@settings(max_examples=40, deadline=None)
@given(layers(DTYPES))
def test_precisions_equal_pefts(layer):
    twin, x = peft_twin(layer), batch(layer, 4)
    assert layer.lora_A.dtype == twin.lora_A["default"].weight.dtype
    y, (scale, *_) = layer(x), magnitudes(layer, x, torch.ones(4, layer.out_features))
    assert y.dtype == x.dtype
    assert is_near(y, twin(x), scale, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_are_float32_unless_told(dtype):
    base = nn.Linear(4, 3, dtype=dtype)
    default, told = LoRALinear(base, 2, 4), LoRALinear(base, 2, 4, dtype=dtype)
    assert default.lora_A.dtype == default.lora_B.dtype == torch.float32
    assert told.lora_A.dtype == told.lora_B.dtype == dtype
    for layer in (default, told):
        nn.init.normal_(layer.lora_B)
        assert layer(torch.ones(2, 4, dtype=dtype)).dtype == dtype


def test_under_autocast_it_equals_peft():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 12), rank=4, alpha=8)
    nn.init.normal_(layer.lora_B)
    twin, x = peft_twin(layer), batch(layer, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), twin(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


def test_the_same_seed_drops_what_peft_drops():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 12), rank=4, alpha=8, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    twin, x = peft_twin(layer, dropout=0.5), batch(layer, 5)
    results = []
    for module in (layer.train(), twin.train()):
        torch.manual_seed(1)
        results.append(module(x))
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0], layer.eval()(x))


@settings(max_examples=20, deadline=None)
@given(layers())
def test_gradients_by_finite_differences_and_by_hand(layer):
    x = batch(layer, 3).double()
    layer = LoRALinear(layer.base.double(), layer.rank, layer.alpha, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)

    def forward(A, B, x):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    A, B = layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_()
    assert torch.autograd.gradcheck(forward, (A, B, x.clone().requires_grad_()))
    G = torch.randn(3, layer.out_features, dtype=torch.float64)  # the gradient that reaches y
    layer(x).backward(G)
    torch.testing.assert_close(layer.lora_B.grad, layer.scaling * G.T @ (x @ A.T))
    torch.testing.assert_close(layer.lora_A.grad, layer.scaling * B.T @ G.T @ x)


@settings(max_examples=40, deadline=None)
@given(layers(DTYPES), st.floats(0, 0.9))
def test_it_starts_out_equal_to_its_base_to_the_last_bit(layer, dropout):
    fresh = LoRALinear(layer.base, layer.rank, layer.alpha, dropout)
    x = batch(layer, 4)
    assert torch.equal(fresh(x), layer.base(x))
    assert not fresh.lora_B.any()
    assert not fresh.delta_weight().any()


def test_A_starts_as_a_linear_layers_weight_does():
    torch.manual_seed(0)
    A = LoRALinear(nn.Linear(400, 300), rank=200, alpha=1).lora_A
    bound = 1 / math.sqrt(400)  # kaiming uniform with a = √5
    assert A.abs().max() <= bound
    assert A.var().item() == pytest.approx(bound**2 / 3, rel=0.02)
    assert A.mean().item() == pytest.approx(0, abs=bound * 0.02)


@settings(max_examples=30, deadline=None)
@given(layers())
def test_only_the_adapter_gets_gradients(layer):
    layer(batch(layer, 3)).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    count = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert count == layer.rank * (layer.in_features + layer.out_features)


def test_a_training_step_moves_B_first_and_the_base_never():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 5), rank=2, alpha=4)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"lora_B"}  # A's gradient passes through B, which was zero


def test_the_state_dict_and_the_attributes():
    layer = LoRALinear(nn.Linear(6, 5), rank=2, alpha=16)
    assert set(layer.state_dict()) == {"base.weight", "base.bias", "lora_A", "lora_B"}
    assert (layer.rank, layer.alpha, layer.scaling) == (2, 16, 8)
    assert (layer.in_features, layer.out_features) == (6, 5)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((2, 6), (5, 2))
    assert "rank=2, alpha=16" in repr(layer)


@settings(max_examples=30, deadline=None)
@given(layers())
def test_delta_weight_is_what_the_adapter_adds(layer):
    delta = layer.delta_weight()
    assert delta.shape == layer.base.weight.shape
    update = layer(torch.eye(layer.in_features)) - layer.base(torch.eye(layer.in_features))
    scale = layer.base.weight.abs() + magnitude_of_delta(layer) + 1
    assert ((update.T - delta).abs() <= 1e-5 * scale).all()
    by_hand = layer.alpha / layer.rank * layer.lora_B.double() @ layer.lora_A.double()
    assert ((delta - by_hand).abs() <= 1e-6 * scale).all()
    assert torch.linalg.matrix_rank(delta.double(), rtol=1e-5) <= layer.rank


def magnitude_of_delta(layer):
    return layer.scaling * layer.lora_B.abs() @ layer.lora_A.abs()


@settings(max_examples=60, deadline=None)
@given(layers(DTYPES))
def test_merging_changes_the_output_by_rounding_only(layer):
    before = copy.deepcopy(layer.state_dict())
    merged, x = merge(layer), batch(layer, 4)
    assert type(merged) is nn.Linear
    assert merged.weight.dtype == layer.base.weight.dtype
    assert (merged.bias is None) == (layer.base.bias is None)
    assert not any(p.requires_grad for p in merged.parameters())
    exact = layer.base.weight.double() + layer.delta_weight().double()
    of_the_sum = layer.base.weight.abs() + magnitude_of_delta(layer)
    steps = 0.51 if merged.weight.itemsize == 2 else 4  # rounded to half precision once, at the end
    assert is_near(merged.weight, exact, of_the_sum, merged.weight.dtype, steps)
    scale, *_ = magnitudes(layer, x, torch.ones(4, layer.out_features))
    assert is_near(merged(x), layer(x), scale, x.dtype)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    if merged.bias is not None:
        assert torch.equal(merged.bias, layer.base.bias)
        assert merged.bias.data_ptr() != layer.base.bias.data_ptr()
    assert merged.weight.data_ptr() != layer.base.weight.data_ptr()


def test_merging_equals_pefts_merge():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(20, 10), rank=3, alpha=5)
    nn.init.normal_(layer.lora_B)
    twin = peft_twin(layer)
    twin.merge()
    torch.testing.assert_close(merge(layer).weight.data, twin.base_layer.weight.data, rtol=1e-5, atol=1e-5)


def test_merging_draws_no_random_numbers():
    layer, before = LoRALinear(nn.Linear(6, 5), rank=2, alpha=4), torch.get_rng_state()
    merge(layer)
    assert torch.equal(torch.get_rng_state(), before)


def test_train_and_eval_leave_every_weight_alone():
    layer = LoRALinear(nn.Linear(6, 5), rank=2, alpha=4, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    before = copy.deepcopy(layer.state_dict())
    for module in (layer.eval(), layer.train(), layer.eval()):
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_base_is_kept(training):
    layer = LoRALinear(nn.Linear(6, 5).train(training), rank=2, alpha=4, dropout=0.5)
    assert {module.training for module in layer.modules()} == {training}
    assert merge(layer).training == training


class Packed(nn.Module):
    """A base that keeps its weight in a buffer that is no parameter, as quantized layers do."""

    in_features, out_features = 4, 3

    def __init__(self):
        super().__init__()
        self.register_buffer("packed", torch.arange(12, dtype=torch.uint8))

    def forward(self, x):
        return x @ self.packed.view(3, 4).to(x.dtype).T


def test_any_module_with_features_can_be_the_base():
    layer = LoRALinear(Packed(), rank=2, alpha=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4)
    expected = x @ (layer.base.packed.view(3, 4).float() + layer.delta_weight()).T
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(TypeError, match=r"plain float weight as base, got Packed\. Dequantize it into"):
        merge(layer)


@pytest.mark.parametrize("base", [nn.Linear(4, 3), Packed()], ids=["parameters", "buffers"])
def test_the_adapter_is_made_where_the_base_is(base):
    layer = LoRALinear(base.to("meta"), rank=2, alpha=4)
    assert layer.lora_A.device.type == layer.lora_B.device.type == "meta"


class Doubling(nn.Module):
    """A base without a tensor of its own."""

    in_features = out_features = 4

    def forward(self, x):
        return 2 * x


def test_a_base_without_tensors_gets_its_adapter_where_new_tensors_are_made():
    layer, x = LoRALinear(Doubling(), rank=2, alpha=4), torch.randn(3, 4)
    assert torch.equal(layer(x), 2 * x)
    with torch.device("meta"):
        assert LoRALinear(Doubling(), rank=2, alpha=4).lora_A.device.type == "meta"


def linear4bit(weight, bias):
    with warnings.catch_warnings():
        import bitsandbytes as bnb

        base = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], quant_type="nf4", compute_dtype=torch.float32
        )
        base.load_state_dict({"weight": weight, "bias": bias})
        base = base.to("cpu")
    base.support_avx512bf16_for_cpu = False  # the layout for inference, which has no backward
    return base


def test_over_four_bits_it_trains_and_a_merge_names_the_way_that_works():
    import bitsandbytes as bnb

    torch.manual_seed(0)
    layer = LoRALinear(linear4bit(torch.randn(8, 64), torch.randn(8)), rank=2, alpha=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 64)
    y = layer(x)
    y.sum().backward()
    assert layer.lora_A.grad.any()
    assert layer.base.weight.grad is None
    with pytest.raises(
        TypeError, match=r"got Linear4bit\. Dequantize it, with bitsandbytes.*quant_state\), into"
    ):
        merge(layer)
    dequantized = nn.Linear(64, 8)
    weight = layer.base.weight
    dequantized.weight.data = bnb.functional.dequantize_4bit(weight, weight.quant_state).float()
    dequantized.bias.data = layer.base.bias.data
    layer.base = dequantized
    torch.testing.assert_close(merge(layer)(x), y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("make", [LoRALinear, check_adapter], ids=["LoRALinear", "check_adapter"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, r"1\.\.3 for a matrix \[3, 4\], got 0"),
        ({"rank": 4}, ValueError, r"1\.\.3 for a matrix \[3, 4\], got 4"),
        ({"rank": 2.0}, TypeError, "rank must be an int, got 2.0"),
        ({"alpha": 0}, ValueError, "alpha must be a positive number, got 0"),
        ({"alpha": -1.5}, ValueError, "positive number, got -1.5"),
        ({"alpha": math.nan}, ValueError, "positive number, got nan"),
        ({"alpha": math.inf}, ValueError, "positive number, got inf"),
        ({"dropout": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"in \[0, 1\), got -0.1"),
        ({"dtype": torch.int8}, TypeError, "float dtype of torch, got torch.int8"),
        ({"dtype": "float32"}, TypeError, "float dtype of torch, got 'float32'"),
        ({"base": nn.Embedding(4, 3)}, TypeError, "in_features and out_features, got Embedding"),
        ({"base": torch.ones(3, 4)}, TypeError, "in_features and out_features, got Tensor"),
    ],
)
def test_arguments_that_are_refused(make, arguments, error, message):
    base = nn.Linear(4, 3)
    with pytest.raises(error, match=message):
        make(**({"base": base, "rank": 2, "alpha": 4} | arguments))
    assert base.weight.requires_grad  # what is refused changes nothing


def test_an_adapted_layer_is_neither_base_nor_plain():
    layer = LoRALinear(nn.Linear(4, 3), rank=2, alpha=4)
    with pytest.raises(TypeError, match="is a LoRALinear already"):
        LoRALinear(layer, rank=2, alpha=4)
    with pytest.raises(TypeError, match="merge takes a LoRALinear, got Linear"):
        merge(nn.Linear(4, 3))
    assert is_linear(layer)
    assert not is_linear(nn.Bilinear(2, 2, 2))


def test_merging_a_weight_that_is_computed_is_refused():
    layer = LoRALinear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), rank=2, alpha=4)
    with pytest.raises(TypeError, match="plain float weight as base, got ParametrizedLinear"):
        merge(layer)

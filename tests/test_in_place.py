"""lab.in_place: what is done to a model reaches what it should, and nothing else."""

import copy
import inspect
import json

import pytest
import torch
from lora2qlora.adapters import add_lora, lora_layers, merge_lora, remove_lora
from lora2qlora.lab import in_place, models, training
from lora2qlora.nf4 import dequantize_nf4, quantize_nf4
from toy import toy_task


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


def test_changing_linear_weights_reaches_all_but_the_head(installed):
    model, _ = models.load_base_model("tiny")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    seen = []

    def change(weight):
        seen.append(tuple(weight.shape))
        return dequantize_nf4(quantize_nf4(weight))

    names = in_place.change_linear_weights(model, change)
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
        in_place.change_linear_weights(model, lambda weight: weight[:1])
    assert torch.equal(first, before)


def test_changing_linear_weights_of_a_model_without_a_head():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 4))
    bias = model[0].bias.detach().clone()
    assert in_place.change_linear_weights(model, torch.zeros_like) == ["0", "2"]
    assert not model[0].weight.any()
    assert not model[2].weight.any()
    assert torch.equal(model[0].bias, bias)
    assert model[1].weight.eq(1).all()
    with pytest.raises(ValueError, match=r"0: \[2, 3\] cannot become \[2, 5\]"):
        in_place.change_linear_weights(model, lambda weight: weight[:, :1].expand(-1, 5))


def test_an_untied_head_is_left_alone_too(installed):
    model, _ = models.load_base_model("tiny")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    before = model.lm_head.weight.detach().clone()
    assert "lm_head" not in in_place.change_linear_weights(model, torch.zeros_like)
    assert torch.equal(model.lm_head.weight, before)


def test_full_fine_tuning_moves_every_linear_weight_and_nothing_else(model, tokenizer):
    weights = in_place.train_every_linear(model)
    assert sorted(weights) == sorted(
        name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training.train(model, training.make_batches(toy_task(), tokenizer, 4), 2, 1e-3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{name}.weight" for name in weights}


def test_mixed_precision_computes_in_bfloat16_and_updates_in_float32(model, tokenizer):
    in_place.train_every_linear(model)
    batch = next(training.make_batches(toy_task(), tokenizer, batch_size=4))
    exact = training.answer_loss(model, batch).item()
    dtypes, exactly = [], copy.deepcopy(model)
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, inputs, y: dtypes.append(y.dtype))
    in_place.compute_in_bfloat16(model)
    rounded = training.answer_loss(model, batch)
    assert dtypes == [torch.bfloat16]
    assert 0 < abs(rounded.item() - exact) < 0.02 * exact
    rounded.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.zero_grad()
    runs = [
        training.train(m, training.make_batches(toy_task(), tokenizer, 4), 30, 1e-2) for m in (exactly, model)
    ]
    first, last = (runs[0][i].loss for i in (0, -1))
    assert last < 0.95 * first
    assert runs[1][-1].loss == pytest.approx(last, rel=0.02)  # weights cached across steps would stand still


def test_a_copy_in_bfloat16_runs_its_own_weights(model):
    ids = torch.arange(3, 9)[None]
    in_place.compute_in_bfloat16(model)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        copied = copy.deepcopy(model)
        copied.lm_head.weight.zero_()
        assert copied(input_ids=ids).logits.eq(0).all()
        assert torch.equal(model(input_ids=ids).logits, before)
        model.lm_head.weight.zero_()
        copied.lm_head.weight.fill_(1)
        assert copied(input_ids=ids).logits.ne(0).any()


def test_a_merged_copy_in_bfloat16_does_not_notice_what_becomes_of_the_original(model):
    ids = torch.arange(3, 9)[None]
    add_lora(model, ["q_proj", "up_proj"], 4, 8)
    in_place.compute_in_bfloat16(model)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        merged = merge_lora(model)
        before = merged(input_ids=ids).logits
        assert (before - model(input_ids=ids).logits).abs().max() < 0.1 * before.abs().max()
        remove_lora(model)
        assert not torch.equal(model(input_ids=ids).logits, before)
        assert torch.equal(merged(input_ids=ids).logits, before)


def test_bfloat16_is_autocast_of_the_whole_forward_to_the_bit(model):
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    assert in_place.compute_in_bfloat16(model) is model
    ids = torch.arange(3, 9)[None]
    found = model(input_ids=ids, labels=ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = other(input_ids=ids, labels=ids)
    assert torch.equal(found.logits, expected.logits)
    assert found.logits.dtype == torch.bfloat16
    found.loss.backward()
    expected.loss.backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert not torch.is_autocast_enabled("cpu")


def test_bfloat16_changes_nothing_that_transformers_looks_at(model, tmp_path):
    kind, signature = type(model), inspect.signature(model.forward)
    in_place.compute_in_bfloat16(model)
    assert isinstance(model, kind)
    assert (type(model).__name__, type(model).__module__) == (kind.__name__, kind.__module__)
    assert inspect.signature(model.forward) == signature  # generate reads from it what a model takes
    assert model.config._attn_implementation == "eager"
    assert not [key for key in vars(model) if key == "forward"]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [kind.__name__]
    assert kind(model.config)(input_ids=torch.tensor([[3]])).logits.dtype == torch.float32  # the class is not


def test_bfloat16_is_refused_where_the_forward_is_the_instances(model):
    model.forward = model.forward
    kind = type(model)
    with pytest.raises(ValueError, match="forward was replaced, as accelerate does"):
        in_place.compute_in_bfloat16(model)
    assert type(model) is kind

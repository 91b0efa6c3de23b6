"""Targets: states of NF4 layers and of AdamW8bit, in memory and in a file."""

import copy
from pathlib import Path
from random import Random

import torch
from fuzz_judge import Trial, content, model_digest
from fuzz_safetensors import mutate_file
from fuzz_tensors import tensor_leaf
from fuzz_trees import mutate
from lora2qlora.optimizers import AdamW8bit, load_optimizer, save_optimizer
from lora2qlora.qlora import NF4Linear
from torch import Tensor, nn


def nf4_model() -> nn.Sequential:
    """Two NF4 layers, one of each kind, around a norm."""
    first = NF4Linear.from_linear(nn.Linear(8, 16), block_size=32)
    second = NF4Linear.from_linear(nn.Linear(16, 4, bias=False), block_size=32, double_quant=False)
    return nn.Sequential(first, nn.LayerNorm(16), second)


def state_targets(folder: Path) -> dict:
    """Each target by its name: a function of a Random that gives a Trial."""
    torch.manual_seed(0)
    mine, theirs = nf4_model(), nf4_model().state_dict()
    optimizer, path = AdamW(), folder / "good.safetensors"
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.step()
    saved = optimizer.state_dict()
    save_optimizer(optimizer, path)
    data, tried = path.read_bytes(), folder / "tried.safetensors"

    def layer(rng: Random) -> Trial:
        index = rng.choice((0, 2))
        state = {key[2:]: value for key, value in theirs.items() if key.startswith(f"{index}.")}
        return nf4_trial(copy.deepcopy(mine[index]), mutate_state(rng, state), rng)

    def whole(rng: Random) -> Trial:
        return nf4_trial(copy.deepcopy(mine), mutate_state(rng, theirs), rng)

    def optimizer_state(rng: Random) -> Trial:
        target, state = AdamW(before), mutate(rng, saved, tensor_leaf)
        return adam_trial(target, lambda: target.load_state_dict(state), (ValueError,))

    def optimizer_file(rng: Random) -> Trial:
        target = AdamW(before)
        tried.write_bytes(mutate_file(rng, data))
        return adam_trial(target, lambda: load_optimizer(target, tried), (ValueError, OSError))

    return {
        "NF4 layer": layer,
        "NF4 model": whole,
        "AdamW8bit state": optimizer_state,
        "AdamW8bit file": optimizer_file,
    }


def mutate_state(rng: Random, state: dict) -> dict:
    """A state dict with an edit or more; torch itself takes no other keys than strings, and no other root."""
    mutated = mutate(rng, state, tensor_leaf)
    mutated = mutated if isinstance(mutated, dict) else {}
    return {str(key): value for key, value in mutated.items()}


def nf4_trial(model: nn.Module, state: dict, rng: Random) -> Trial:
    """`load_state_dict`, strict or not, by copying or by taking over."""
    strict, assign = rng.random() < 0.6, rng.random() < 0.3
    before = {name: layer_content(layer) for name, layer in nf4_layers(model).items()}
    alone = isinstance(model, NF4Linear)

    def whole_layers(error: Exception | None = None) -> None:
        for name, layer in nf4_layers(model).items():
            now, prefix = layer_content(layer), f"{name}." if name else ""
            assert now in (before[name], loaded(layer, prefix)), f"layer {name!r} is a mixture"
            named = any(line.strip().startswith(prefix) for line in str(error).split("\n\t")[1:])
            assert not named or now == before[name], f"layer {name!r} is named in {error}, and changed"

    def loaded(layer: NF4Linear, prefix: str) -> dict:
        """What the layer holds if all of it is the state's; a bias may be cast, as that of any layer."""
        held = {name: state.get(prefix + name) for name in layer_content(layer)}
        bias = held.get("bias")
        if isinstance(bias, Tensor) and bias.is_floating_point() and not assign:
            held["bias"] = bias.to(layer.bias.dtype)
        return {name: content(held[name]) if isinstance(held[name], Tensor) else None for name in held}

    def accepted(result) -> None:
        whole_layers()
        for name, layer in nf4_layers(model).items():
            assert [*dict(layer.named_buffers())] == [*layer.names], f"{name} has other buffers"
            tensors = [*layer.buffers(), *layer.parameters()]
            assert not any(tensor.requires_grad for tensor in tensors), "the base trains"
            if layer.packed.is_meta:
                continue
            huge = any((tensor.float().abs() > 1e30).any() for tensor in tensors)
            output = layer(torch.ones(1, layer.in_features))
            assert huge or output.isfinite().all(), "the layer's output is not finite"
        assert not strict or not (result.missing_keys or result.unexpected_keys)

    digest = model_digest if alone else (lambda model: torch.get_rng_state().numpy().tobytes())
    return Trial(
        lambda: model.load_state_dict(state, strict=strict, assign=assign),
        (RuntimeError,),
        lambda: digest(model),
        accepted,
        whole_layers,
    )


def nf4_layers(model: nn.Module) -> dict[str, NF4Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def layer_content(layer: NF4Linear) -> dict[str, tuple]:
    return {name: content(tensor) for name, tensor in [*layer.named_buffers(), *layer.named_parameters()]}


class AdamW(AdamW8bit):
    """An optimizer of a tensor with states in 8 bits, a small one, and one in a group of its own."""

    def __init__(self, states: dict | None = None):
        self.parameters = [nn.Parameter(torch.ones(shape)) for shape in ((4, 8), (8,), (40,))]
        groups = [{"params": self.parameters[:2]}, {"params": self.parameters[2:], "lr": 1e-2}]
        super().__init__(groups, block_size=16, min_8bit_size=16)
        for index, state in (states or {}).items():
            self.state[self.parameters[index]] = {name: tensor.clone() for name, tensor in state.items()}
        for parameter in self.parameters:
            parameter.grad = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)

    def digest(self) -> tuple:
        """States, options, and whose they are."""
        states = {
            id(parameter): {key: (id(t), *content(t)) for key, t in state.items()}
            for parameter, state in self.state.items()
        }
        groups = [
            {key: [id(p) for p in value] if key == "params" else repr(value) for key, value in group.items()}
            for group in self.param_groups
        ]
        return states, groups, repr(self.defaults), [content(p) for p in self.parameters]


def adam_trial(target: AdamW, call, promised: tuple[type[Exception], ...]) -> Trial:
    """Load, then save, load again and step: the optimizer works with whatever it accepted."""

    def accepted(_) -> None:
        again, saved = AdamW(), target.state_dict()
        again.load_state_dict(copy.deepcopy(saved))
        for index, state in again.state_dict()["state"].items():
            for name, tensor in state.items():
                assert content(tensor) == content(saved["state"][index][name]), f"{index}.{name} saved again"
        target.step()

    return Trial(call, promised, target.digest, accepted)

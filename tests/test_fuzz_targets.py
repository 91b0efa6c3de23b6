"""Planted defects of the package: each target of `make fuzz` notices those that it is there for."""

import math
from contextlib import suppress

import fuzz_adapters
import fuzz_runner
import fuzz_states
import pytest
import torch
from fuzz_targets import all_targets
from lora2qlora.adapters import lora_layers
from lora2qlora.adapters.patterns import Expression
from lora2qlora.lab import measured
from lora2qlora.optimizers import AdamW8bit
from lora2qlora.qlora import NF4Linear
from torch import nn

load_adapter, load_optimizer = fuzz_adapters.load_adapter, fuzz_states.load_optimizer


def freezing_first(model, directory):
    model.requires_grad_(False)
    return load_adapter(model, directory)


def with_other_numbers(model, directory):
    names = load_adapter(model, directory)
    next(iter(lora_layers(model).values())).lora_A.data[0, 0] += 1
    return names


def with_another_alpha(model, directory):
    names = load_adapter(model, directory)
    layer = lora_layers(model)[names[-1]]
    layer.alpha = math.nextafter(layer.alpha, math.inf)
    return names


def with_an_error_of_its_own(model, directory):
    try:
        return load_adapter(model, directory)
    except ValueError as error:
        raise AttributeError(str(error)) from error


def stepping_first(optimizer, path):
    optimizer.step()
    return load_optimizer(optimizer, path)


def any_record(line):
    with suppress(ValueError):
        return measured.Record({}, 0, {}, {})


DEFECTS = {
    ("adapter config", freezing_first): (fuzz_adapters, "load_adapter"),
    ("adapter weights", freezing_first): (fuzz_adapters, "load_adapter"),
    ("adapter files", freezing_first): (fuzz_adapters, "load_adapter"),
    ("adapter weights", with_other_numbers): (fuzz_adapters, "load_adapter"),
    ("adapter patterns", with_other_numbers): (fuzz_adapters, "load_adapter"),
    ("adapter patterns", with_another_alpha): (fuzz_adapters, "load_adapter"),
    ("adapter config", with_an_error_of_its_own): (fuzz_adapters, "load_adapter"),
    ("adapter files", with_an_error_of_its_own): (fuzz_adapters, "load_adapter"),
    ("NF4 layer", nn.Module._load_from_state_dict): (NF4Linear, "_load_from_state_dict"),
    ("NF4 model", nn.Module._load_from_state_dict): (NF4Linear, "_load_from_state_dict"),
    ("AdamW8bit state", torch.optim.Optimizer.load_state_dict): (AdamW8bit, "load_state_dict"),
    ("AdamW8bit file", torch.optim.Optimizer.load_state_dict): (AdamW8bit, "load_state_dict"),
    ("AdamW8bit file", stepping_first): (fuzz_states, "load_optimizer"),
    ("measured records", any_record): (measured, "_parse"),
    ("expressions", lambda expression, name: True): (Expression, "matches"),
    ("expressions", lambda expression, name: False): (Expression, "matches_end"),
}


@pytest.mark.parametrize(("target", "defect"), DEFECTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_target_notices(monkeypatch, target, defect):
    def only(folder):
        return {target: all_targets(folder)[target]}

    assert not fuzz_runner.run(only, range(60))[target].failures
    monkeypatch.setattr(*DEFECTS[target, defect], defect)
    assert fuzz_runner.run(only, range(60))[target].failures

"""lab.conversion: a converted model is the one that the book speaks of, or it is refused."""

import copy
import hashlib
import json

import pytest
import torch
from lora2qlora.lab import conversion
from lora2qlora.lab.models import load_small_lm


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
        tokenizer.add_tokens(["blank line"])
    after = conversion.fingerprint(model, tokenizer)
    moved = {key for key in before if before[key] != after[key]}
    assert (
        moved
        == {"eos": {"eos", "eos_id"}, "pad": {"pad", "pad_id"}, "stop": {"stop_id"}, "ids": {"ids"}}[change]
    )

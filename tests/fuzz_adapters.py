"""Targets: `load_adapter` on a damaged config, damaged weights, odd files, and patterns that are good."""

import json
import math
import shutil
from pathlib import Path
from random import Random

import torch
from fuzz_files import spoil
from fuzz_json import json_leaf, json_text, pattern
from fuzz_judge import Trial, content, model_digest
from fuzz_safetensors import mutate_file
from fuzz_trees import mutate
from lora2qlora.adapters import CONFIG, WEIGHTS, add_lora, load_adapter, lora_layers, save_adapter
from safetensors.torch import load_file, save
from torch import nn

PROMISED = (OSError, ValueError, KeyError)
LINEARS = {"q_proj": "self_attn", "v_proj": "self_attn", "up_proj": "mlp"}
PATTERNS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
# What PEFT writes besides: options that are not set.
UNSET = """alora_invocation_tokens arrow_config auto_mapping corda_config eva_config exclude_modules
    layer_replication layers_pattern layers_to_transform loftq_config lora_bias lora_ga_config megatron_config
    modules_to_save peft_version qalora_group_size revision target_parameters trainable_token_indices
    use_bdlora use_dora use_qalora use_rslora""".split()


class Tiny(nn.Module):
    """Two blocks of three linear layers with an embedding and a head, named as in a Llama."""

    def __init__(self):
        super().__init__()
        blocks = [{"self_attn": _linears(q_proj=8, v_proj=8), "mlp": _linears(up_proj=12)} for _ in range(2)]
        layers = nn.ModuleList([nn.ModuleDict(block) for block in blocks])
        self.model = nn.ModuleDict({"embed": nn.Embedding(16, 8), "layers": layers})
        self.lm_head = nn.Linear(8, 16, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.model.embed(ids)
        for layer in self.model.layers:
            x = x + layer.self_attn.v_proj(layer.self_attn.q_proj(x)) + layer.mlp.up_proj(x)[..., :8]
        return self.lm_head(x)


def _linears(**sizes: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(8, size) for name, size in sizes.items()})


def adapter_targets(folder: Path) -> dict:
    """Each target by its name: a function of a Random that gives a Trial."""
    torch.manual_seed(0)
    model = Tiny()
    add_lora(model, ["q_proj", "v_proj"], 2, 4)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    save_adapter(model, folder / "good")
    config = json.loads((folder / "good" / CONFIG).read_text(encoding="utf-8"))
    config |= {key: None for key in UNSET} | {"init_lora_weights": True, "fan_in_fan_out": False}
    weights = (folder / "good" / WEIGHTS).read_bytes()

    def damaged_config(rng: Random) -> Trial:
        base = config | ({"rank_pattern": {"q_proj": 2}} if rng.random() < 0.5 else {})
        if rng.random() < 0.3:
            base[rng.choice(PATTERNS)] = rng.choice(
                (pattern(rng), {pattern(rng): 2}, [pattern(rng), "q_proj"])
            )
        else:
            base = mutate(rng, base, json_leaf)
        return _trial(rng, folder, json_text(rng, base), weights)

    def damaged_weights(rng: Random) -> Trial:
        return _trial(rng, folder, json.dumps(config).encode(), mutate_file(rng, weights))

    def odd_files(rng: Random) -> Trial:
        trial = _trial(rng, folder, json.dumps(config).encode(), weights)
        spoil(rng, folder / "tried")
        return trial

    return {
        "adapter config": damaged_config,
        "adapter weights": damaged_weights,
        "adapter patterns": lambda rng: fitting(rng, folder, config),
        "adapter files": odd_files,
    }


def _trial(rng: Random, folder: Path, config: bytes, weights: bytes, expected: dict | None = None) -> Trial:
    """`load_adapter` of these bytes; `expected` rank and alpha of each module, where they are known."""
    path = folder / "tried"
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / CONFIG).write_bytes(config)
    (path / WEIGHTS).write_bytes(weights)
    model, again = Tiny(), rng.random() < 0.25

    def accepted(names):
        check_loaded(model, names, path)
        if again:
            check_saved_again(model, path.parent / "again")
        layers = {name: (layer.rank, layer.alpha) for name, layer in lora_layers(model).items()}
        assert expected is None or layers == expected, f"loaded {layers}, the files say {expected}"

    return Trial(lambda: load_adapter(model, path), PROMISED, lambda: model_digest(model), accepted)


def check_loaded(model: nn.Module, names: list[str], path: Path) -> None:
    """The model holds what the file holds, and all else is frozen."""
    layers, file = lora_layers(model), load_file(path / WEIGHTS)
    assert names == list(layers), f"{names} are said to be loaded, {list(layers)} are"
    assert len(file) == 2 * len(layers), f"{list(layers)} of {list(file)}"
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            mine, theirs = getattr(layer, part), file[f"base_model.model.{name}.{part}.weight"]
            assert mine.dtype == torch.float32, f"{name}.{part} is {mine.dtype}"
            assert content(mine)[-1] == content(theirs.float())[-1], (
                f"{name}.{part} is not what the file holds"
            )
        assert type(layer.rank) is int, f"rank {layer.rank!r}"
        assert type(layer.alpha) in (int, float), f"alpha {layer.alpha!r}"
        assert 0 <= layer.scaling < math.inf, f"alpha {layer.alpha!r}"
        assert type(layer.dropout.p) in (int, float), f"dropout {layer.dropout.p!r}"
    trained = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}, f"{trained} train"
    assert model(torch.arange(4)).shape == (4, 16)


def check_saved_again(model: nn.Module, path: Path) -> None:
    """What a loaded model saves loads as the same adapter."""
    save_adapter(model, path)
    other = Tiny()
    load_adapter(other, path)
    layers, others = lora_layers(model), lora_layers(other)
    assert list(layers) == list(others), f"{list(layers)} saved again are {list(others)}"
    for mine, theirs in zip(layers.values(), others.values(), strict=True):
        assert (mine.rank, mine.alpha, mine.dropout.p) == (theirs.rank, theirs.alpha, theirs.dropout.p)
        assert content(mine.lora_A) == content(theirs.lora_A), "saved again, it has other numbers"
        assert content(mine.lora_B) == content(theirs.lora_B), "saved again, it has other numbers"


def fitting(rng: Random, folder: Path, config: dict) -> Trial:
    """A good adapter of random targets, ranks and alphas by patterns; now and then one thing is damaged."""
    targets = rng.sample(list(LINEARS), rng.randrange(1, 4))
    names = [f"model.layers.{i}.{block}.{linear}" for i in range(2) for linear, block in LINEARS.items()]
    names = [name for name in names if name.split(".")[-1] in targets]
    ranks, alphas = ({key: rng.randrange(1, 9) for key in _keys(rng, names)} for _ in range(2))
    config = config | {"rank_pattern": ranks, "alpha_pattern": alphas, "target_modules": targets}
    config |= {"use_rslora": rng.random() < 0.3, "lora_dropout": rng.choice((0, 0.0, 0.1, None))}
    expected, tensors = {}, {}
    for name in names:
        rank, alpha = _first(ranks, name, config["r"]), _first(alphas, name, config["lora_alpha"])
        expected[name] = (rank, alpha * math.sqrt(rank) if config["use_rslora"] else alpha)
        shapes = {"lora_A": (rank, 8), "lora_B": (12 if name.endswith("up_proj") else 8, rank)}
        for part, shape in shapes.items():
            dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16, torch.float64))
            tensors[f"base_model.model.{name}.{part}.weight"] = torch.ones(shape, dtype=dtype)
    if rng.random() < 0.3:
        return _trial(rng, folder, json_text(rng, mutate(rng, config, json_leaf, 1)), save(tensors))
    return _trial(rng, folder, json.dumps(config).encode(), save(tensors), expected)


def _keys(rng: Random, names: list[str]) -> list[str]:
    """Patterns that are ends of names, in any order."""
    keys = [
        *LINEARS,
        *names,
        *(f"{i}.{block}.{linear}" for i in range(2) for linear, block in LINEARS.items()),
    ]
    return rng.sample(keys, rng.randrange(4))


def _first(pattern: dict, name: str, default):
    """PEFT's rule for patterns that are plain ends of names: the first that fits."""
    return next((v for key, v in pattern.items() if name == key or name.endswith(f".{key}")), default)

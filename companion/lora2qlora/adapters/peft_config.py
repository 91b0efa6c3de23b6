"""PEFT's adapter_config.json, written for a model's adapters and read for a model. Chapter 04."""

import math
import re
from collections import Counter
from pathlib import Path

from torch import nn

from lora2qlora.adapters.base_name import published_name
from lora2qlora.adapters.names import bare_name, naming, unwrapped
from lora2qlora.adapters.patterns import LONGEST, STEPS, Expression
from lora2qlora.adapters.peft_types import check_types, read_json
from lora2qlora.adapters.targets import adaptable, check_targets, heads, is_target, modules, no_target
from lora2qlora.lora import LoRALinear

CONFIG = "adapter_config.json"
# The options that load_adapter follows, or that change nothing an adapter computes. Any other that is set
# is refused by name, and so is an initialization that changes the base.
KNOWN = """peft_type r lora_alpha lora_dropout target_modules exclude_modules rank_pattern alpha_pattern
    use_rslora init_lora_weights bias task_type base_model_name_or_path revision inference_mode auto_mapping
    peft_version eva_config layers_pattern megatron_core qalora_group_size runtime_config
    ensure_weight_tying""".split()
PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}


def write_config(model: nn.Module, layers: dict[str, LoRALinear]) -> dict:
    """The adapter_config.json for layers by their names in the bare model, which `model` may wrap.

    It has the commonest rank and alpha, and patterns for the modules that differ.
    """
    model = unwrapped(model)
    dropouts = sorted({layer.dropout.p for layer in layers.values()})
    if len(dropouts) > 1:
        raise ValueError(f"PEFT's format holds one dropout for all adapters, these have {dropouts}")
    rank, _ = Counter(layer.rank for layer in layers.values()).most_common(1)[0]
    alpha, _ = Counter(layer.alpha for layer in layers.values()).most_common(1)[0]
    exactly = {name: f"^{re.escape(name)}" for name in layers}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": published_name(model),
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropouts[0],
        "target_modules": _write_targets(model, list(layers)),
        "rank_pattern": {exactly[n]: layer.rank for n, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {exactly[n]: layer.alpha for n, layer in layers.items() if layer.alpha != alpha},
    }


def _write_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """Suffixes where they match these modules and no other, else the names, else a regular expression."""
    bare = {bare_name(model, name) for name in modules(model)}
    for targets in (sorted({name.split(".")[-1] for name in names}), names):
        if {name for name in bare if is_target(name, set(targets))} == set(names):
            return targets
    return "|".join(re.escape(name) for name in names)


def read_config(directory: Path) -> dict:
    """A plain LoRA's adapter_config.json; ValueError naming whatever makes it another method."""
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {directory}: pass what save_adapter or PEFT wrote to")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f'{path} does not describe a LoRA: it needs "peft_type": "LORA"')
    refused = {key for key, value in config.items() if value and key not in KNOWN}
    refused |= {key for key, plain in PLAIN.items() if config.get(key, plain[0]) not in plain}
    if refused:
        options = ", ".join(f"{key}={config[key]!r:.80}" for key in sorted(refused))
        raise ValueError(f"{path} is not a plain LoRA, it has {options}: load it with PEFT")
    lacking = [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    if lacking:
        raise ValueError(f"{path} lacks {lacking}")
    check_types(path, config)
    return config


def read_settings(model: nn.Module, config: dict) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each module that the config targets, by the rules of PEFT."""
    candidates = adaptable(model)
    compiled = _compile(config)
    targets, excluded = compiled["target_modules"], compiled["exclude_modules"]
    if config["target_modules"] == "all-linear":
        spared = heads(model)
        targets = {bare_name(model, name) for name, m in candidates.items() if id(m) not in spared}
    bare = {name: bare_name(model, name) for name in modules(model)}
    names = [n for n in bare if bare[n] and is_target(bare[n], targets) and not is_target(bare[n], excluded)]
    impossible = [bare[name] for name in names if name not in candidates]
    if impossible:
        raise ValueError(f"the adapter is for {impossible}, which no linear layer below the LM head is named")
    if not names:
        raise ValueError(no_target(targets, model))
    check_targets(model, names)
    settings = {}
    for name in names:
        rank, alpha = (
            next(
                (value for key, value in compiled[pattern].items() if key.matches_end(bare[name])),
                config[default],
            )
            for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        settings[name] = (rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)
    return settings


def _compile(config: dict) -> dict:
    """The entries that say which modules: sets of names as they are, expressions ready to match."""
    entries = {key: config.get(key) or [] for key in ("target_modules", "exclude_modules")}
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    texts = [
        text
        for text in (*entries.values(), *(k for p in patterns.values() for k in p))
        if isinstance(text, str)
    ]
    if sum(map(len, texts)) > LONGEST:
        raise ValueError(
            f"the expressions of the config have more than {LONGEST} characters: write them shorter"
        )
    left = [STEPS]  # for all together: however many expressions a file has, reading it ends
    for key, value in entries.items():
        entries[key] = naming(key, Expression, value, left) if isinstance(value, str) else set(value)
    for key, pattern in patterns.items():
        entries[key] = {naming(key, Expression, text, left): value for text, value in pattern.items()}
    return entries

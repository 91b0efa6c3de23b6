"""Adapters: LoRA over a whole model, and files in PEFT's format. Chapters 04 and 15.

A directory holds `adapter_config.json` and `adapter_model.safetensors`; PEFT writes and reads the same.
"""

import copy
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lora2qlora.lora import LoRALinear, check_adapter, is_linear, merge

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# The options of PEFT's adapter_config.json that load_adapter follows, or that change nothing an adapter
# computes. Any other that is set is refused by name, and so is an initialization that changes the base.
KNOWN = """peft_type r lora_alpha lora_dropout target_modules exclude_modules rank_pattern alpha_pattern
    use_rslora init_lora_weights bias task_type base_model_name_or_path revision inference_mode auto_mapping
    peft_version eva_config layers_pattern megatron_core qalora_group_size runtime_config
    ensure_weight_tying""".split()
PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has and how many of them train; logical ones, not packed elements."""

    total: int
    trainable: int


def add_lora(
    model: nn.Module,
    targets: list[str] | str,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Put a LoRALinear over every target of a model, in place, and freeze all but the adapters.

    `targets` are suffixes of names, such as ["q_proj", "v_proj"] or ["layers.0.mlp.up_proj"], or
    "all-linear". A candidate is any module with in_features and out_features, quantized ones included,
    but never the LM head, which often shares its weight with the embedding. A second call may adapt more.

    Returns the names replaced. Raises ValueError: a target that no candidate is named (the message lists
    the candidates), or what LoRALinear refuses; the model is unchanged then. LoRA, section 4.2. Chapter 04.
    """
    names = find_targets(model, targets)
    _put(model, {name: (rank, alpha) for name in names}, dropout, dtype)
    return names


def find_targets(model: nn.Module, targets: list[str] | str) -> list[str]:
    """The names of the linear layers that `targets` means, by the rule of `add_lora`; ValueError as there."""
    candidates = _candidates(model)
    if targets == "all-linear":
        targets = list(candidates)
    elif isinstance(targets, str):
        raise ValueError(f'targets must be a list of suffixes or "all-linear"; pass ["{targets}"] for one')
    unmatched = [target for target in targets if not any(_is_target(name, [target]) for name in candidates)]
    if unmatched or not targets:
        raise ValueError(_no_target(unmatched, candidates))
    return [name for name in candidates if _is_target(name, targets)]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def remove_lora(model: nn.Module) -> list[str]:
    """Put the bases back in the place of their LoRALinears; returns the names. All stay frozen."""
    layers = lora_layers(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer.base)
    return list(layers)


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy of the model in which `merge` has turned each LoRALinear into a plain nn.Linear, frozen.

    Raises ValueError: the model carries no adapters; TypeError: an adapted base is quantized, for which
    the message of `merge` says what to call instead. Chapters 04 and 15.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model carries no adapters to merge: add_lora or load_adapter first")
    merged = {id(layer): naming(name, merge, layer) for name, layer in layers.items()}
    return copy.deepcopy(model, merged)  # deepcopy takes what stands in its memo, and copies the rest


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's parameters, each once however often it is used, and those that train.

    A linear layer's weight counts in_features x out_features, however it is stored: packed 4-bit weights
    hold two in a byte. Works on models without data, made under torch.device("meta"). Chapters 04, 11.
    """
    total = trainable = 0
    seen = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        is_plain_linear = is_linear(module) and not isinstance(module, LoRALinear)
        logical = module.in_features * module.out_features if is_plain_linear else 0
        if is_plain_linear and not isinstance(getattr(module, "weight", None), Tensor):
            total += logical  # packed in buffers, or an object of its own
        for name, parameter in own.items():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            size = logical if is_plain_linear and name == "weight" else parameter.numel()
            total += size
            trainable += size * parameter.requires_grad
    return ParameterCount(total, trainable)


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write a model's adapters to a directory, in PEFT's format; other files there stay as they are.

    All is written under another name first. The last three steps are renames, during which the directory
    holds no config and hence no adapter: a reader finds the old one, the new one or none, never a mix.

    Raises ValueError: the model carries no adapters, or they differ in dropout, of which the format
    holds one. The real libraries also write a README.md, and the path of a base that has no name on the
    Hub. Chapter 04.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped; its names are the file's
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model carries no adapters to save: add_lora or load_adapter first")
    config = json.dumps(_write_config(model, layers), indent=2, sort_keys=True)
    tensors = {}
    for name, layer in layers.items():
        for key, weight in zip(_keys(name), (layer.lora_A, layer.lora_B), strict=True):
            tensors[key] = weight.detach().cpu().contiguous()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".writing-", dir=directory) as partial:
        Path(partial, WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        Path(partial, CONFIG).write_text(config, encoding="utf-8")
        Path(directory, CONFIG).unlink(missing_ok=True)
        os.replace(Path(partial, WEIGHTS), directory / WEIGHTS)
        os.replace(Path(partial, CONFIG), directory / CONFIG)


def load_adapter(
    model: nn.Module, directory: str | os.PathLike, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Put the adapter that `save_adapter` or PEFT saved over a model, in place, ready to train further.

    Follows PEFT's targets, per-module ranks and alphas, and rsLoRA's scaling, which becomes α √r over r.
    Returns the names replaced. On any error the model is as it was before.

    Raises FileNotFoundError: no adapter there; ValueError: options that change what LoRA computes, such as
    DoRA (named), a pickle, a damaged file, or adapters on the model already; KeyError: missing, extra or
    mis-shaped keys, as an adapter for another model has. Chapter 04.
    """
    if lora_layers(model):
        raise ValueError("the model carries adapters already: remove_lora, or merge_lora, first")
    directory = Path(directory)
    config = _read_config(directory)
    settings = _read_settings(model, config)
    tensors = _read_weights(directory)
    expected = {}
    for name, (rank, _) in settings.items():
        base = model.get_submodule(name)
        expected |= zip(_keys(name), ((rank, base.in_features), (base.out_features, rank)), strict=True)
    _check_keys(directory / WEIGHTS, tensors, expected)
    _put(model, settings, config.get("lora_dropout") or 0.0, dtype, tensors)
    return list(settings)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that can be adapted, by name: not the LM head, nor what is adapted already."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError("the model carries PEFT's own adapters: pass the base model that PEFT was given")
    get_heads = [getattr(module, "get_output_embeddings", lambda: None) for module in model.modules()]
    heads = {id(get_head()) for get_head in get_heads}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module
        for name, module in _modules(model).items()
        if is_linear(module)
        and not isinstance(module, LoRALinear)
        and id(module) not in heads
        and id(getattr(module, "weight", None)) not in embeddings
    }


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules below the model by name, as if it carried no adapters: without the insides of those."""
    inside = tuple(f"{name}." for name in lora_layers(model))
    return {name: m for name, m in model.named_modules() if name and not name.startswith(inside)}


def _is_target(name: str, targets: list[str] | str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or suffixes."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _no_target(wanted: list[str] | str, candidates: dict[str, nn.Module]) -> str:
    """What to say when nothing is named as wanted: the candidates, by the last part of their names."""
    last = {name if name.split(".")[-1].isdigit() else name.split(".")[-1] for name in candidates}
    return f"no linear layer to adapt is named {wanted}; the candidates are {sorted(last)}"


def _put(
    model: nn.Module,
    settings: dict[str, tuple[int, float]],
    dropout: float,
    dtype: torch.dtype,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Check all, build all, fill A and B from `tensors`, freeze all but adapters, replace, in order."""
    bases = {name: model.get_submodule(name) for name in settings}
    for name, (rank, alpha) in settings.items():
        naming(name, check_adapter, bases[name], rank, alpha, dropout, dtype)
    layers = {name: LoRALinear(bases[name], *settings[name], dropout, dtype) for name in settings}
    if tensors is not None:
        for name, layer in layers.items():
            for key, weight in zip(_keys(name), (layer.lora_A, layer.lora_B), strict=True):
                weight.data.copy_(tensors[key])
    adapters = {id(p) for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in adapters)
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def naming(name: str, function, *arguments):
    """Call the function; what it raises names the module that it was about."""
    try:
        return function(*arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _keys(name: str) -> tuple[str, str]:
    """PEFT's keys for the A and the B of one module."""
    return f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"


def _write_config(model: nn.Module, layers: dict[str, LoRALinear]) -> dict:
    """The adapter_config.json: the commonest rank and alpha, and patterns for the modules that differ."""
    dropouts = sorted({layer.dropout.p for layer in layers.values()})
    if len(dropouts) > 1:
        raise ValueError(f"PEFT's format holds one dropout for all adapters, these have {dropouts}")
    rank, _ = Counter(layer.rank for layer in layers.values()).most_common(1)[0]
    alpha, _ = Counter(layer.alpha for layer in layers.values()).most_common(1)[0]
    base = getattr(model, "name_or_path", None) or None
    exactly = {name: f"^{re.escape(name)}" for name in layers}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": None if base and os.path.isdir(base) else base,  # no path of this machine
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
    for targets in (sorted({name.split(".")[-1] for name in names}), names):
        if {name for name in _modules(model) if _is_target(name, targets)} == set(names):
            return targets
    return "|".join(re.escape(name) for name in names)


def _read_config(directory: Path) -> dict:
    """A plain LoRA's adapter_config.json; ValueError naming whatever makes it another method."""
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {directory}: pass what save_adapter or PEFT wrote to")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON ({error}): save or download it again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f'{path} does not describe a LoRA: it needs "peft_type": "LORA"')
    refused = {key for key, value in config.items() if value and key not in KNOWN}
    refused |= {key for key, plain in PLAIN.items() if config.get(key, plain[0]) not in plain}
    if refused:
        options = ", ".join(f"{key}={config[key]!r}" for key in sorted(refused))
        raise ValueError(f"{path} is not a plain LoRA, it has {options}: load it with PEFT")
    lacking = [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    if lacking:
        raise ValueError(f"{path} lacks {lacking}")
    return config


def _read_settings(model: nn.Module, config: dict) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each module that the config targets, by the rules of PEFT."""
    candidates = _candidates(model)
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    if targets == "all-linear":
        targets = list(candidates)
    names = [n for n in _modules(model) if _is_target(n, targets) and not _is_target(n, excluded)]
    impossible = [name for name in names if name not in candidates]
    if impossible:
        raise ValueError(f"the adapter is for {impossible}, which no linear layer below the LM head is named")
    if not names:
        raise ValueError(_no_target(targets, candidates))

    def choose(pattern: str, name: str, default):
        matches = (v for k, v in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({k})$", name))
        return next(matches, default)

    settings = {}
    for name in names:
        rank = choose("rank_pattern", name, config["r"])
        alpha = choose("alpha_pattern", name, config["lora_alpha"])
        settings[name] = (rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)
    return settings


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors on the CPU; never a pickle."""
    path = directory / WEIGHTS
    if not path.is_file() and (directory / PICKLE).is_file():
        raise ValueError(
            f"{directory} holds {PICKLE}, a pickle, which can run code when it is read: "
            f"load it with PEFT if you trust it, and save it again as {WEIGHTS}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS} in {directory}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): get it again") from error


def _check_keys(path: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[int, int]]) -> None:
    """KeyError unless the file holds exactly the expected keys, with the expected shapes, as floats."""
    both = sorted(expected.keys() & tensors.keys())
    wrong = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "extra": sorted(tensors.keys() - expected.keys()),
        "mis-shaped": [
            f"{key} {tensors[key].dtype} {list(tensors[key].shape)}, here float {list(expected[key])}"
            for key in both
            if tuple(tensors[key].shape) != expected[key] or not tensors[key].is_floating_point()
        ],
    }
    found = [f"{len(keys)} {what}: {'; '.join(keys[:4])}" for what, keys in wrong.items() if keys]
    if found:
        raise KeyError(f"{path} does not fit this model, it may be for another. " + ". ".join(found))

"""The config of a causal model of transformers, out of what one may have at hand: a file, a dict, a model."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Source = "str | os.PathLike | Mapping | PreTrainedConfig | nn.Module"


def read_config(source: Source) -> "PreTrainedConfig":
    """The config of `source`: a published config.json or its folder, its dict, a config, or a model.

    Of a nested config, that of a model which also sees or hears, it is the part for text.

    Raises TypeError: none of these, or not of a model that predicts the next token; ValueError: a file that
    holds no config, or a model type that this version of transformers does not know; OSError: no such file.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    config = getattr(source, "config", None) if isinstance(source, nn.Module) else source
    if isinstance(config, str | os.PathLike):
        config = _read_file(Path(config))
    if isinstance(config, Mapping):
        config = _of_dict(dict(config))
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            "need a causal language model of transformers, its config, or the dict or path of its "
            f"config.json; got {type(source).__name__}"
        )
    text = config.get_text_config(decoder=True)
    if text.model_type not in CAUSAL or text.is_encoder_decoder:
        raise TypeError(
            f"need a causal language model, got {type(source).__name__} of type {text.model_type!r}"
        )
    if isinstance(source, nn.Module) and type(source).__name__ not in CAUSAL.values():
        raise TypeError(f"need a causal language model, with its head; got {type(source).__name__}")
    return text


def _read_file(path: Path) -> dict:
    """The dict of a config.json, of which `path` may be the folder."""
    if path.is_dir():
        path = path / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no text, or no JSON
        raise ValueError(f"{path} is not the config.json of a model: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not the config.json of a model: it holds a {type(found).__name__}")
    return found


def _of_dict(found: dict) -> "PreTrainedConfig":
    """The config that a config.json describes."""
    from transformers import CONFIG_MAPPING

    family = found.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise ValueError(f"no model type that transformers knows: model_type is {family!r:.60}")
    try:
        return CONFIG_MAPPING[family].from_dict(found)
    except Exception as error:  # each family checks in its own way, and with errors of its own
        words = " ".join(str(error).split())
        raise ValueError(f"no config of a {family} model ({type(error).__name__}: {words:.200})") from error

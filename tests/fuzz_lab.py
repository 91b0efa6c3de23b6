"""Targets that are cheap besides: a file of measured results, and the config of a model."""

from pathlib import Path
from random import Random
from types import SimpleNamespace

from fuzz_json import json_leaf, json_text
from fuzz_judge import Trial, model_digest
from fuzz_trees import mutate
from lora2qlora.adapters import count_parameters
from lora2qlora.lab import measured
from lora2qlora.memory import shape_of
from torch import nn

RECORD = {
    "configuration": {"part": "step", "size": "full", "job": "a", "rank": 8},
    "seed": 0,
    "figures": {"seconds": 1.5, "curve": [1.0, 2.0]},
    "provenance": {"date": "2026-01-01", "device": "CPU", "commit": "unknown"},
}
CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "vocab_size": 16,
    "head_dim": None,
    "tie_word_embeddings": False,
    "model_type": "llama",
    "_attn_implementation": "sdpa",
}


def lab_targets(folder: Path) -> dict:
    """Each target by its name: a function of a Random that gives a Trial."""

    def records(rng: Random) -> Trial:
        lines = [json_text(rng, RECORD, 0), json_text(rng, mutate(rng, RECORD, json_leaf))]
        rng.shuffle(lines)
        (folder / "gpu.jsonl").write_bytes(b"\n".join(lines) + b"\n" * rng.randrange(2))

        def accepted(loaded) -> None:
            assert measured.is_recorded("gpu", RECORD["configuration"], 0, folder)
            for record in loaded:
                types = [type(record.configuration), type(record.figures), type(record.provenance)]
                assert types == [dict] * 3, f"a record of {types}"
                assert type(record.seed) is int, f"seed {record.seed!r}"

        return Trial(lambda: measured.load("gpu", folder), (OSError, ValueError), lambda: None, accepted)

    def shape(rng: Random) -> Trial:
        model, config = ShapedLlama(), mutate(rng, CONFIG, json_leaf)
        config = config if isinstance(config, dict) else {}
        model.config = SimpleNamespace(**{str(key): value for key, value in config.items()})

        def accepted(shape) -> None:
            assert shape.parameters == count_parameters(model).total

        return Trial(lambda: shape_of(model), (TypeError, ValueError), lambda: model_digest(model), accepted)

    return {"measured records": records, "shape of a config": shape}


class ShapedLlama(nn.Module):
    """A model with the parameters of a Llama of CONFIG, by shape."""

    def __init__(self):
        super().__init__()
        shapes = [(8, 8), (4, 8), (4, 8), (8, 8), (16, 8), (16, 8), (8, 16), (16, 8)]
        self.embed = nn.Embedding(16, 8)
        self.linears = nn.ModuleList([nn.Linear(i, o, bias=False) for o, i in shapes])
        self.norms = nn.ModuleList([nn.RMSNorm(8) for _ in range(3)])

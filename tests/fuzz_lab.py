"""Targets that are cheap besides: a file of measured results, and the config of a model."""

from pathlib import Path
from random import Random

from fuzz_json import json_leaf, json_text
from fuzz_judge import Trial
from fuzz_trees import mutate
from lora2qlora.lab import measured
from lora2qlora.memory import shape_of

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
    "tie_word_embeddings": False,
    "model_type": "llama",
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
        config = mutate(rng, CONFIG, json_leaf)

        def accepted(found) -> None:
            sizes = {"hidden_size": found.hidden, "num_hidden_layers": found.layers}
            sizes |= {"intermediate_size": found.intermediate, "vocab_size": found.vocabulary}
            said = {name: config.get(name, size) for name, size in sizes.items()}  # else the family's own
            assert sizes == said, f"{sizes} of {config}"

        return Trial(
            lambda: shape_of(config), (TypeError, ValueError, OSError), lambda: repr(config), accepted
        )

    shape_of(CONFIG)  # what transformers imports at the first is not an input's time
    return {"measured records": records, "shape of a config": shape}

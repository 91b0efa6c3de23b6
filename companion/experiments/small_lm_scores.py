"""small_lm.py, how good is it? Bits a byte beside n-grams and compressors; how far the weights have moved."""

import gzip
import lzma
import math

import numpy as np
import torch
from small_lm_text import VALIDATION, Documents, stream


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

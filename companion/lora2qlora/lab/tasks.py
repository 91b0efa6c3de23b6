"""Three downstream tasks and two texts for perplexity, from small files that come with the package.

    wordnet   a definition -> the category of the noun it defines        25 answers
    cmudict   a spelling   -> its phonemes in ARPAbet, without stress     thousands of answers
    spam      a message    -> spam or ham                                  2 answers

Each task is a prompt, three fixed splits without a duplicate between them, and a metric. Nothing is
downloaded and nothing is written; each file is checked against its SHA-256 before it is read.
`companion/experiments/build_data.py` says how every row was chosen, and rebuilds the files.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from .sources import read_sums

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

DATA = files("lora2qlora.lab") / "data"
Metric = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A downstream task.

    `train`, `validation`, `test`: Datasets with the columns "input" and "target", both strings.
    `prompt(input)`: the text up to where the answer begins. It ends without a space: the trainer appends
    " " + target and then the model's end-of-text token.
    `metric(predictions, targets)`: figures by name, the main one first.
    `labels`: every answer there is, or None where answers are not a choice of a few.
    `baseline`: the most frequent answer of `train`, which a model must beat to have learnt anything.
    `max_answer_tokens`: room for the longest answer and its end, in tokens.
    """

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset
    prompt: Callable[[str], str]
    metric: Metric
    labels: tuple[str, ...] | None
    baseline: str
    max_answer_tokens: int


# Metrics: each raises ValueError where the lists are empty or differ in length -------------------


def accuracy_and_f1(
    predictions: Sequence[str],
    targets: Sequence[str],
) -> dict[str, float]:
    """Share of right answers, and F1 averaged over the categories among the targets.

    An answer that is no category at all counts as wrong, and lowers no precision.
    """
    pairs = _paired(predictions, targets)
    labels = sorted({target for _, target in pairs})
    return {
        "accuracy": _accuracy(pairs),
        "macro_f1": sum(_f1(pairs, label) for label in labels) / len(labels),
    }


def spam_scores(predictions: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Share of right answers; recall averaged over the classes among the targets; F1 of "spam"."""
    pairs = _paired(predictions, targets)
    labels = sorted({target for _, target in pairs})
    recalls = [_accuracy([pair for pair in pairs if pair[1] == label]) for label in labels]
    return {
        "accuracy": _accuracy(pairs),
        "balanced_accuracy": sum(recalls) / len(recalls),
        "f1": _f1(pairs, "spam"),
    }


def phoneme_scores(predictions: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Share of words with every phoneme right, and edits per phoneme of the targets.

    The error rate is the sum of Levenshtein distances over the sum of the targets' lengths, as word
    error rate is in speech recognition: 0 is perfect, and answers that run on can exceed 1.
    """
    pairs = [(p.split(), t.split()) for p, t in _paired(predictions, targets)]
    phonemes = sum(len(target) for _, target in pairs)
    if phonemes == 0:
        raise ValueError("the targets hold no phoneme at all")
    return {
        "exact_match": sum(p == t for p, t in pairs) / len(pairs),
        "phoneme_error_rate": sum(levenshtein(p, t) for p, t in pairs) / phonemes,
    }


def levenshtein(a: Sequence, b: Sequence) -> int:
    """Fewest insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _paired(predictions: Sequence[str], targets: Sequence[str]) -> list[tuple[str, str]]:
    if len(predictions) != len(targets) or len(targets) == 0:
        raise ValueError(
            "a metric needs as many predictions as targets and at least one, "
            f"got {len(predictions)} predictions and {len(targets)} targets"
        )
    return [(p.strip(), t.strip()) for p, t in zip(predictions, targets, strict=True)]


def _accuracy(pairs: list[tuple[str, str]]) -> float:
    return sum(p == t for p, t in pairs) / len(pairs)


def _f1(pairs: list[tuple[str, str]], label: str) -> float:
    """2 TP / (2 TP + FP + FN), and 0 where the label is neither predicted nor asked for."""
    right = sum(p == t == label for p, t in pairs)
    claimed_or_asked = sum((p == label) + (t == label) for p, t in pairs)
    return 2 * right / claimed_or_asked if claimed_or_asked else 0.0


# Loading ----------------------------------------------------------------------------------------

TASKS = {  # prompt, metric, whether the answers are a choice of a few, max_answer_tokens
    "wordnet": ("Definition: {}\nCategory:".format, accuracy_and_f1, True, 4),
    "cmudict": ("Word: {}\nPhonemes:".format, phoneme_scores, False, 24),
    "spam": ("Message: {}\nSpam or ham:".format, spam_scores, True, 4),
}
TEXTS = ("sotu", "moby_dick")


def load_task(name: str) -> Task:
    """The task called "wordnet", "cmudict" or "spam"; the same rows in the same order every time.

    Raises ValueError for another name or an altered data file, FileNotFoundError for a missing one.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: the tasks are {', '.join(TASKS)}")
    prompt, metric, is_choice, max_answer_tokens = TASKS[name]
    table = _read(name)
    splits = {split: _split(table, split) for split in ("train", "validation", "test")}
    answers = Counter(splits["train"]["target"])
    return Task(
        name=name,
        **splits,
        prompt=prompt,
        metric=metric,
        labels=tuple(sorted(answers)) if is_choice else None,
        baseline=min(answers, key=lambda answer: (-answers[answer], answer)),
        max_answer_tokens=max_answer_tokens,
    )


def load_text(name: str) -> Dataset:
    """The columns "title" and "text" of "sotu" or "moby_dick", one row an address or a chapter.

    "sotu" goes from 1790 to 2021, oldest first; "moby_dick" in the book's order. Raises as `load_task`.
    """
    from datasets import Dataset

    if name not in TEXTS:
        raise ValueError(f"unknown text {name!r}: the texts are {', '.join(TEXTS)}")
    return Dataset.from_dict(_read(name).to_pydict())


def _split(table: pyarrow.Table, split: str) -> Dataset:
    from datasets import Dataset

    rows = [row for row in table.to_pylist() if row["split"] == split]
    return Dataset.from_dict({key: [row[key] for row in rows] for key in ("input", "target")})


def _read(name: str) -> pyarrow.Table:
    """A data file, once its bytes are what SHA256SUMS says."""
    import pyarrow
    from pyarrow import parquet

    file = f"{name}.parquet"
    for needed in ("SHA256SUMS", file):
        if not (DATA / needed).is_file():
            raise FileNotFoundError(f"the data file {needed} is missing from {DATA}: reinstall lora2qlora")
    expected = read_sums(DATA / "SHA256SUMS").get(file)
    content = (DATA / file).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"the data file {file} is altered: its SHA-256 is {found}, SHA256SUMS has {expected}. "
            "Reinstall lora2qlora, or rebuild it with companion/experiments/build_data.py"
        )
    return parquet.read_table(pyarrow.BufferReader(content))

"""The tasks: splits without leakage, metrics against outside rules, files that are what they were."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora.lab import tasks

DATA = Path(str(tasks.DATA))
SPLITS = ("train", "validation", "test")
SIZES = {"wordnet": (4000, 500, 1000), "cmudict": (6000, 500, 1000), "spam": (2000, 300, 500)}


@cache
def load(name):
    return tasks.load_task(name)


def inputs(name):
    """A task's inputs by split, as lists that a test may add to."""
    return {split: list(getattr(load(name), split)["input"]) for split in SPLITS}


# Leakage: each finder lists what ought not to be; each test plants one case more and sees it found ---


def words_of(text):
    return re.findall(r"[a-z0-9]+", text.casefold())


def same_words(splits):
    """Texts that differ in nothing but case, punctuation and white space, in one split or in two."""
    seen = defaultdict(list)
    for texts in splits.values():
        for text in texts:
            seen[" ".join(words_of(text))].append(text)
    return [found for found in seen.values() if len(found) > 1]


def inflections(word):
    """A word's regular inflections, by the rules of English spelling."""
    stems = {word, word + word[-1], word.removesuffix("e")}
    stems |= {word[:-1] + "i"} if word.endswith("y") else set()
    endings = "s es ed ing ings er ers est ly ness ment ments y".split()
    return {stem + ending for stem in stems for ending in endings} - {word}


def same_base(splits):
    """A word of one split, and an inflection of it in another."""
    home = {word: split for split, words in splits.items() for word in words}
    pairs = ((word, other) for word in home for other in inflections(word) if other in home)
    return [(word, other) for word, other in pairs if home[word] != home[other]]


def nearly_same(splits, threshold=0.3):
    """Texts of two splits whose runs of three words overlap (Jaccard) by `threshold` or more."""
    rows = [(split, text) for split, texts in splits.items() for text in texts]
    runs = [set(zip(w, w[1:], w[2:], strict=False)) for w in (words_of(text) for _, text in rows)]
    holders = defaultdict(list)
    for row, own in enumerate(runs):
        for run in own:
            holders[run].append(row)
    shared = Counter(pair for held in holders.values() for pair in combinations(held, 2))
    return [
        (rows[a][1], rows[b][1])
        for (a, b), common in shared.items()
        if rows[a][0] != rows[b][0] and common >= threshold * len(runs[a] | runs[b])
    ]


@pytest.mark.parametrize("name", SIZES)
def test_no_text_stands_twice(name):
    splits = inputs(name)
    assert same_words(splits) == []
    original = splits["train"][7]
    planted = "  " + original.upper().replace(" ", ",\n") + "!"
    assert same_words({**splits, "test": [*splits["test"], planted]}) == [[original, planted]]


def test_words_of_one_base_share_a_split():
    splits = inputs("cmudict")
    assert same_base(splits) == []
    pairs = [("hamper", "hampering"), ("bake", "baking"), ("stop", "stopped"), ("carry", "carries")]
    for base, other in pairs:
        assert same_base({"train": [base], "test": [other]}) == [(base, other)]
        assert same_base({"train": [base, other], "test": []}) == []
    present = set().union(*splits.values())
    base = next(w for w in splits["train"] if w + "s" not in present and not w.endswith("s"))
    assert (base, base + "s") in same_base({**splits, "test": [*splits["test"], base + "s"]})


def test_messages_of_two_splits_are_not_nearly_the_same():
    splits = inputs("spam")
    assert nearly_same(splits) == []
    original = max(splits["train"], key=lambda text: len(words_of(text)))
    words = original.split()
    middle = len(words) // 2
    planted = " ".join(["Dear Ishmael,", *words[4:middle], "whale", *words[middle:]])
    assert nearly_same({**splits, "test": [*splits["test"], planted]}) == [(original, planted)]


# What the splits hold -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_splits_have_the_promised_rows(name):
    task = load(name)
    assert task.name == name
    for split, size in zip(SPLITS, SIZES[name], strict=True):
        rows = getattr(task, split)
        assert rows.column_names == ["input", "target"]
        assert len(rows) == size
        for text in [*rows["input"], *rows["target"]]:
            assert text
            assert text.isascii()
            assert text.isprintable()
            assert text == " ".join(text.split())


@pytest.mark.parametrize("name", ["wordnet", "spam"])
def test_every_split_holds_every_label_in_its_share(name):
    task = load(name)
    assert list(task.labels) == sorted(set(task.train["target"]))
    whole = Counter(target for split in SPLITS for target in getattr(task, split)["target"])
    for split in SPLITS:
        found = Counter(getattr(task, split)["target"])
        assert set(found) == set(task.labels)
        for label, count in whole.items():
            assert abs(found[label] - count * found.total() / whole.total()) <= 1.5


def test_the_labels_are_those_of_the_sources():
    assert load("spam").labels == ("ham", "spam")
    assert load("cmudict").labels is None
    assert len(load("wordnet").labels) == 25
    train = load("wordnet").train
    kinds = Counter(t for g, t in zip(train["input"], train["target"], strict=True) if "genus" in g)
    assert set(dict(kinds.most_common(2))) == {"plant", "animal"}


def test_phonemes_are_arpabet_without_stress():
    arpabet = (
        "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
    ).split()
    task = load("cmudict")
    assert {p for split in SPLITS for t in getattr(task, split)["target"] for p in t.split()} == set(arpabet)
    for word in set().union(*inputs("cmudict").values()):
        assert re.fullmatch("[a-z]{3,10}", word)


def test_inputs_keep_their_lengths():
    for text in set().union(*inputs("wordnet").values()):
        assert 20 <= len(text) <= 160
        assert '"' not in text.removeprefix('"')
    for text in set().union(*inputs("spam").values()):
        assert 80 <= len(text) <= 500


def test_messages_hold_no_address_link_or_telephone_number():
    private = re.compile(r"\w@\w+\.\w|://|www\.|\b\d{3}[ .-]\d{3}[ .-]\d{4}\b")
    leaks = re.compile(r"\bwrote:|^(from|subject|received): |begin forwarded|mailing list\n", re.IGNORECASE)
    for text in set().union(*inputs("spam").values()):
        assert not private.search(text)
        assert not leaks.search(text)
    assert private.search("write to queequeg@example.org")
    assert leaks.search("Ishmael wrote: call me")


@pytest.mark.parametrize("name", SIZES)
def test_prompts_end_where_the_answer_begins(name):
    task = load(name)
    prompt = task.prompt("a {curious} input")
    assert "a {curious} input" in prompt
    assert prompt == prompt.strip()
    assert prompt.endswith(":")
    assert task.prompt(task.test[0]["input"]) != task.prompt(task.test[1]["input"])


@pytest.mark.parametrize("name", SIZES)
def test_no_constant_answer_beats_the_baseline_on_train(name):
    task = load(name)
    targets = list(task.train["target"])
    right = Counter(targets)
    assert right[task.baseline] == max(right.values())
    scores = task.metric([task.baseline] * len(targets), targets)
    main = next(iter(scores))
    assert scores[main] == pytest.approx(right[task.baseline] / len(targets))
    for answer in task.labels or sorted(right)[:20]:
        assert task.metric([answer] * len(targets), targets)[main] <= scores[main]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_every_answer_fits_in_max_answer_tokens(name):
    from lora2qlora.lab.models import load_base_model
    from lora2qlora.lab.training import encode

    _, tokenizer = load_base_model()
    task = load(name)
    longest = max(
        sum(label >= 0 for label in encode(tokenizer, task.prompt("x"), target)["labels"])
        for split in SPLITS
        for target in set(getattr(task, split)["target"])
    )
    assert longest <= task.max_answer_tokens <= 2 * longest


# Metrics ------------------------------------------------------------------------------------------


def test_accuracy_and_f1_by_hand():
    # act: 1 right, 1 missed -> 2/3. body: 1 right, 1 wrongly said -> 2/3. time: 0. "whale" is no category.
    scores = tasks.accuracy_and_f1(["act", "body", " body ", "whale"], ["act", "act", "body", "time"])
    assert list(scores) == ["accuracy", "macro_f1"]
    assert scores == pytest.approx({"accuracy": 2 / 4, "macro_f1": (2 / 3 + 2 / 3 + 0) / 3})


def test_spam_scores_by_hand():
    # spam: 2 of 3 found, 1 of 5 ham taken for it -> precision 2/3, recall 2/3, F1 2/3; ham recall 4/5.
    targets = ["spam"] * 3 + ["ham"] * 5
    scores = tasks.spam_scores(["spam", "spam", "ham", "spam", "ham", "ham", "ham", "ham"], targets)
    assert list(scores) == ["accuracy", "balanced_accuracy", "f1"]
    expected = {"accuracy": 6 / 8, "balanced_accuracy": (2 / 3 + 4 / 5) / 2, "f1": 2 / 3}
    assert scores == pytest.approx(expected)
    assert tasks.spam_scores(["ham"], ["ham"]) == {"accuracy": 1.0, "balanced_accuracy": 1.0, "f1": 0.0}


def test_phoneme_scores_by_hand():
    # Right; one of three substituted; one inserted to two: 0 + 1 + 1 edits on 2 + 3 + 2 phonemes.
    scores = tasks.phoneme_scores(["AH  P", "B AE D", "G OW T"], ["AH P", "B EH D", "G OW"])
    assert list(scores) == ["exact_match", "phoneme_error_rate"]
    assert scores == pytest.approx({"exact_match": 1 / 3, "phoneme_error_rate": 2 / 7})
    assert tasks.phoneme_scores(["", ""], ["AH P", "B"]) == {"exact_match": 0.0, "phoneme_error_rate": 1.0}
    assert tasks.phoneme_scores(["B B B"], ["P"])["phoneme_error_rate"] == 3.0


labels = st.lists(st.sampled_from(["ham", "spam", "eggs"]), min_size=1, max_size=12)


@settings(deadline=None)
@given(labels, st.randoms())
def test_metrics_of_perfect_constant_and_reordered_answers(targets, random):
    kinds = Counter(targets)
    for metric in (tasks.accuracy_and_f1, tasks.spam_scores):
        perfect = metric(targets, targets)
        assert {v for k, v in perfect.items() if k != "f1"} == {1.0}
        assert perfect.get("f1", 1.0) == float("spam" in kinds or metric is tasks.accuracy_and_f1)
        predictions = [random.choice(["ham", "spam", "eggs", "whale"]) for _ in targets]
        order = random.sample(range(len(targets)), len(targets))
        reordered = metric([predictions[i] for i in order], [targets[i] for i in order])
        assert reordered == pytest.approx(metric(predictions, targets))
    share = kinds["spam"] / len(targets)  # F1 of always saying spam, in closed form: 2p / (1 + p)
    constant = tasks.spam_scores(["spam"] * len(targets), targets)
    assert constant["accuracy"] == pytest.approx(share)
    assert constant["f1"] == pytest.approx(2 * share / (1 + share))
    assert constant["balanced_accuracy"] == pytest.approx((share > 0) / len(kinds))
    macro = tasks.accuracy_and_f1(["spam"] * len(targets), targets)["macro_f1"]
    assert macro == pytest.approx(2 * share / (1 + share) / len(kinds))


def distance(a, b):
    """Levenshtein's distance as it is defined, by recursion."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return distance(a[1:], b[1:])
    return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))


phonemes = st.lists(st.sampled_from(["AA", "B", "CH"]), max_size=5)


@settings(deadline=None)
@given(phonemes, phonemes)
def test_levenshtein_is_the_recursive_definition(a, b):
    assert tasks.levenshtein(a, b) == distance(a, b)


def test_levenshtein_of_textbook_pairs():
    assert tasks.levenshtein("kitten", "sitting") == 3
    assert tasks.levenshtein("intention", "execution") == 5
    assert tasks.levenshtein("", "whale") == 5


@pytest.mark.parametrize("metric", [tasks.accuracy_and_f1, tasks.spam_scores, tasks.phoneme_scores])
def test_metrics_refuse_lists_that_are_empty_or_uneven(metric):
    with pytest.raises(ValueError, match="got 0 predictions and 0 targets"):
        metric([], [])
    with pytest.raises(ValueError, match="got 1 predictions and 2 targets"):
        metric(["ham"], ["ham", "spam"])
    with pytest.raises(ValueError, match="got 2 predictions and 0 targets"):
        metric(load("spam").test["input"][:2], load("spam").test.select([])["input"])


def test_phoneme_scores_refuse_targets_without_phonemes():
    with pytest.raises(ValueError, match="no phoneme"):
        tasks.phoneme_scores(["AA"], [" "])


# Texts --------------------------------------------------------------------------------------------


def test_texts_are_few_whole_sentences():
    texts = {name: tasks.load_text(name) for name in tasks.TEXTS}
    assert sum(len(t.encode()) for rows in texts.values() for t in rows["text"]) <= 250_000
    for rows in texts.values():
        assert rows.column_names == ["title", "text"]
        assert len(set(rows["title"])) == len(rows) >= 5
        for text in rows["text"]:
            assert 7_000 <= len(text) <= 14_000
            assert text.rstrip('"”\n')[-1] in ".!?"
            assert {c for c in text if not c.isascii()} <= set("—–’‘“”")
            assert text.replace("\n", "").isprintable()
    years = [int(title[:4]) for title in texts["sotu"]["title"]]
    assert years == sorted(years)
    assert (years[0], years[-1]) == (1790, 2021)
    assert texts["sotu"]["title"][0] == "1790, George Washington"
    assert texts["moby_dick"]["text"][0].startswith("Call me Ishmael.")


# Loading ------------------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'wordnets': the tasks are wordnet, cmudict, spam"):
        tasks.load_task("wordnets")
    with pytest.raises(ValueError, match="unknown text 'ulysses': the texts are sotu, moby_dick"):
        tasks.load_text("ulysses")


@pytest.mark.parametrize("name", SIZES)
def test_loading_twice_gives_the_same_rows(name):
    again = tasks.load_task(name)
    for split in SPLITS:
        assert getattr(again, split).to_dict() == getattr(load(name), split).to_dict()


@pytest.fixture
def copied_data(tmp_path, monkeypatch):
    copy = shutil.copytree(DATA, tmp_path / "data")
    monkeypatch.setattr(tasks, "DATA", copy)
    return copy


@pytest.mark.parametrize("file", ["spam.parquet", "sotu.parquet"])
def test_an_altered_or_missing_file_is_named(copied_data, file):
    def read():
        return tasks.load_task("spam") if file == "spam.parquet" else tasks.load_text("sotu")

    path = copied_data / file
    content = path.read_bytes()
    for altered in (content[:-1], content[:500] + b"!" + content[501:], b""):
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=f"data file {file} is altered"):
            read()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"data file {file} is missing"):
        read()
    path.write_bytes(content)
    read()
    (copied_data / "SHA256SUMS").unlink()
    with pytest.raises(FileNotFoundError, match="data file SHA256SUMS is missing"):
        read()


def test_a_file_without_a_sum_is_refused(copied_data):
    sums = copied_data / "SHA256SUMS"
    lines = sums.read_text().splitlines()
    sums.write_text("\n".join(line for line in lines if "spam.parquet" not in line))
    with pytest.raises(ValueError, match=r"spam\.parquet is altered.*SHA256SUMS has None"):
        tasks.load_task("spam")


def test_data_is_small_and_each_file_has_its_notice():
    files = {path.name: path for path in DATA.iterdir() if path.is_file()}  # the folder is test_models.py's
    sources = {*SIZES, *tasks.TEXTS}
    extracts = {f"{s}{end}" for s in sources for end in (".parquet", ".LICENSE.txt")}
    chats = {"support_desk.jsonl", "support_desk.LICENSE.txt"}
    assert set(files) == extracts | chats | {"SHA256SUMS"}
    assert sum(path.stat().st_size for path in files.values()) <= 2_500_000
    assert {path.name for path in DATA.iterdir()} - set(files) <= {"small_lm"}
    phrases = {
        "wordnet": "Permission to use, copy, modify and distribute this software and",
        "cmudict": "Redistribution and use in source and binary forms",
        "spam": "Creative Commons Zero v1.0 Universal",
        "sotu": "Open Data Commons Public Domain Dedication",
        "moby_dick": "Open Data Commons Public Domain Dedication",
        "support_desk": "Copyright (c) 2017, Gunther Cox All rights reserved.",
    }
    assert phrases.keys() == sources | {"support_desk"}
    for source in phrases:
        text = (DATA / f"{source}.LICENSE.txt").read_text(encoding="utf-8")
        assert phrases[source] in text
        assert "Changes: " in text


FRESH = """
import os, sys
from lora2qlora.lab import tasks
assert not {"datasets", "pyarrow", "torch"} & sys.modules.keys()
tasks.load_task("wordnet"), tasks.load_text("sotu")
written = [os.path.join(root, f) for root, _, names in os.walk(os.environ["HOME"]) for f in names]
assert not written, written
"""


@pytest.mark.slow
def test_importing_is_light_and_loading_writes_nothing(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", FRESH], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr

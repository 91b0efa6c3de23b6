"""build_data.py, two tasks on words.

WordNet: noun gloss -> category. The category is the lexicographer file the synset stands in (lexnames(5WN),
files 04 to 28; 03, "noun.Tops", holds the roots of the hierarchy and no one kind of thing). Examples, in
quotation marks, are dropped; a gloss that two categories share is dropped as well, for it has no one answer.

CMUdict: spelling -> phonemes. Stress digits are dropped (AH0 -> AH): 39 phonemes, short answers, and no
question on where a name is stressed. Kept are words of 3 to 10 letters with one pronunciation, at least one
vowel letter, and at most one phoneme more than letters: no abbreviations, which are spelled aloud.
"""

import re
from collections import defaultdict

from data_splits import UNWANTED, Row, normalised

CATEGORIES = (
    "act animal artifact attribute body cognition communication event feeling food group location motive "
    "object person phenomenon plant possession process quantity relation shape state substance time"
).split()


def wordnet_rows(files: dict[str, bytes]) -> list[Row]:
    """Definitions of 20 to 160 characters, each with its category."""
    by_key = defaultdict(set)
    for line in files["usr/share/wordnet/data.noun"].decode("ascii").splitlines():
        if line.startswith(" ") or line[9:11] == "03":
            continue
        gloss = re.sub(r'[;:,]?\s*"[^"]*("|$).*', "", line.split(" | ", 1)[1])
        gloss = " ".join(gloss.split()).strip(" ;:,")
        if 20 <= len(gloss) <= 160 and not UNWANTED.search(gloss):
            by_key[normalised(gloss)].add((gloss, CATEGORIES[int(line[9:11]) - 4]))
    unambiguous = (found for found in by_key.values() if len({target for _, target in found}) == 1)
    return [min(found) for found in unambiguous]


ENDINGS = ("ness", "ment", "iest", "ing", "est", "ier", "er", "ed", "es", "ly", "s", "e", "i", "y")


def base_form(word: str) -> str:
    """A stem that a word's inflections share. It merges too much rather than too little."""
    while True:
        ending = next((e for e in ENDINGS if word.endswith(e) and len(word) - len(e) >= 2), "")
        shorter = word.removesuffix(ending)
        if len(shorter) > 2 and shorter[-1] == shorter[-2]:
            shorter = shorter[:-1]
        if shorter == word:
            return word
        word = shorter


def cmudict_rows(files: dict[str, bytes]) -> list[Row]:
    """Words with one pronunciation, each with its phonemes, a space between them."""
    entries = [line.split() for line in files["data/dict.txt"].decode("utf-8").splitlines() if line]
    several = {word.partition("(")[0] for word, *_ in entries if "(" in word}
    rows = []
    for word, *phonemes in entries:
        plain = re.fullmatch(r"[A-Z]{3,10}", word) and re.search(r"[AEIOUY]", word)
        fits = len(phonemes) <= len(word) + 1
        if plain and fits and word not in several and not UNWANTED.search(word):
            rows.append((word.lower(), re.sub(r"\d", "", " ".join(phonemes))))
    return rows

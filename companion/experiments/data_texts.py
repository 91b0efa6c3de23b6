"""build_data.py, texts for perplexity: presidential addresses, and chapters of Moby Dick."""

import json

from data_splits import Row

ADDRESSES = (
    "1790_george_washington_n 1823_james_monroe_dr 1862_abraham_lincoln_r 1901_theodore_roosevelt_r "
    "1941_franklin_d_roosevelt_d 1962_john_f_kennedy_d 1986_ronald_reagan_r 2002_george_w_bush_r "
    "2021_joseph_r_biden_d"
).split()
CHAPTERS = (1, 2, 16, 28, 36, 41, 42, 132, 135)


def cut(text: str, limit: int = 14_000) -> str:
    """At most `limit` characters, up to the end of a sentence."""
    text = text.strip()
    return text if len(text) <= limit else text[: text.rindex(". ", 0, limit) + 1]


def sotu_rows(files: dict[str, bytes]) -> list[Row]:
    """(title, text) of addresses from 1790 to 2021, oldest first."""
    return [(_title(name), cut(files[f"data/{name}.txt"].decode("utf-8"))) for name in ADDRESSES]


def _title(name: str) -> str:
    year, *words, _party = name.split("_")
    return f"{year}, " + " ".join(word.capitalize() + "." * (len(word) == 1) for word in words)


def moby_dick_rows(files: dict[str, bytes]) -> list[Row]:
    """(title, text) of chapters, in the book's order."""
    chapters = [json.loads(files[f"data/chapter_{number}.json"]) for number in CHAPTERS]
    return [(f"{c['chapter']}. {c['title'].rstrip('.')}", cut(c["text"])) for c in chapters]

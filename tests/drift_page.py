"""The tables of book/versions.md, made from the record of `make drift`: `python tests/drift_page.py`.

What stands between the two marks is written here; the prose around them is written by hand. Standard
library alone.
"""

import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).parent / "stacks" / "record.json"
PAGE = "book/versions.md"
MARKS = ("<!-- from the record of make drift -->", "<!-- end of the record -->")


def pins(root: Path) -> dict[str, str]:
    """Canonical name and version of each line `- name==version` of environment.yml, Python included."""
    text = (root / "environment.yml").read_text(encoding="utf-8")
    found = re.findall(r"^ *- ([\w.-]+)==?([\w.]+)", text, re.M)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def tables(root: Path, record: dict[str, dict]) -> str:
    """Packages by stack, and checks by stack; of an empty record, that there is none."""
    if not record:
        return "No run of `make drift` is on record yet. What is said below was seen in single trials."
    names = list(dict.fromkeys(name for entry in record.values() for name in entry["versions"]))
    pinned, stacks = pins(root), list(record)
    lines = [f"| package | pins | {' | '.join(stacks)} |", "| :-- " * (len(stacks) + 2) + "|"]
    for name in names:
        found = [pinned.get(name), *(record[stack]["versions"].get(name) for stack in stacks)]
        lines.append(f"| {name} | {' | '.join(version or '–' for version in found)} |")
    lines += ["", f"| check | {' | '.join(stacks)} |", "| :-- " * (len(stacks) + 1) + "|"]
    lines.append(f"| run on | {' | '.join(record[stack]['date'] for stack in stacks)} |")
    checks = list(dict.fromkeys(name for entry in record.values() for name in entry["checks"]))
    for name in ("environment", *(name for name in checks if name != "environment")):
        cells = (_cell(record[stack]["checks"].get(name)) for stack in stacks)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(result: dict | None) -> str:
    """How one check ended, in a cell of the table."""
    if result is None:
        return "–"
    note = result["note"].replace("|", "\\|").replace("`", "'")
    minutes = f"{result['seconds'] / 60:.1f} min"
    said = f"passed, {minutes}" if result["passed"] else f"**failed**, {minutes}"
    return f"{said} ({note})" if note else said


def page(root: Path, record: dict[str, dict]) -> str:
    """The whole page with the tables of this record; ValueError where the marks are not there once each."""
    text = (root / PAGE).read_text(encoding="utf-8")
    if [text.count(mark) for mark in MARKS] != [1, 1]:
        raise ValueError(f"{PAGE} needs the lines {MARKS[0]!r} and {MARKS[1]!r}, once each")
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{tables(root, record)}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def write(root: Path = ROOT, record: Path = RECORD) -> None:
    """Put the record into the page; whole or not at all."""
    text = page(root, json.loads(record.read_text(encoding="utf-8")))
    partial = (root / PAGE).with_suffix(".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, root / PAGE)


if __name__ == "__main__":
    write()
    print(f"wrote {PAGE}")

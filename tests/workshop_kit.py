"""_build/workshop: everything a teacher hands out, as a folder and as one zip; `make workshop` writes both.

`book/` holds the learners' notebooks, `book/solutions/` the book's own; beside them stands what `make setup`
needs. Two runs give the same bytes: files in order, the time of each 1980, ids of cells made from the book's.
"""

import argparse
import re
import shutil
import sys
import zipfile
from pathlib import Path

import nbformat
from book_notebook import read_chapter
from book_repository import address, repository_files
from workshop_learner import learner

ROOT = Path(__file__).resolve().parents[1]
NAME = "lora2qlora-workshop"
COPIED = ("LICENSE", "environment.yml", "pyproject.toml", "companion/lora2qlora/")
TARGETS = ("help", "setup", "lab", "$(VENV)/.installed", "$(VENV)/.package", "$(VENV)/.model")
README = (ROOT / "tests" / "workshop_readme.txt").read_text(encoding="utf-8")


def makefile(text: str) -> str:
    """The book's Makefile with what works in the kit: setup, lab and help."""
    head, rules = text.split(".PHONY:")
    head = "# `make setup` once, with a network; then `make lab`.\n" + head.split("\n", 1)[1]
    blocks = re.split(r"(?m)^(?=\S.*?:(?!=))", rules)
    kept = [block for block in blocks if block.split(":")[0] in TARGETS]
    return f"{head}.PHONY: help setup lab\n\n" + "".join(kept).replace("make book, make test, ", "")


def contents(root: Path = ROOT) -> dict[str, bytes]:
    """The kit's files by name, in order."""
    files = {"README.md": README.format(address=address(root)).encode()}
    files["Makefile"] = makefile((root / "Makefile").read_text(encoding="utf-8")).encode()
    for path in repository_files(root):
        name = path.relative_to(root).as_posix()
        if name.startswith(COPIED):
            files[name] = path.read_bytes()
    for path in sorted((root / "book").glob("[0-9]*.ipynb")):
        notebook, _ = learner(read_chapter(path))
        files[f"book/{path.name}"] = (nbformat.writes(notebook).rstrip("\n") + "\n").encode()
        files[f"book/solutions/{path.name}"] = path.read_bytes()
    return dict(sorted(files.items()))


def solved(notebook, filled: dict[str, str]):
    """The learner's notebook with what the book has put into the cells to fill in."""
    for cell in notebook.cells:
        cell.source = filled.get(cell.id, cell.source)
    return notebook


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """The files below `folder`, which is emptied first, and beside it the zip."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = folder / f"{NAME}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in files.items():
            (folder / NAME / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / NAME / name).write_bytes(content)
            entry = zipfile.ZipInfo(f"{NAME}/{name}")  # its time is 1980-01-01
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            zipped.writestr(entry, content)
    return archive


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--to", type=Path, default=ROOT / "_build" / "workshop")
    archive = write(parser.parse_args(arguments).to, files := contents())
    print(f"{archive}: {len(files)} files, {archive.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The rules that the book keeps as a whole: its pages, its links, its words, its address.

A rule takes the repository's root and returns a list of problems, each naming the place.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml
from book_notebook import definitions, directives, read_chapter, undescribed, unfenced
from book_repository import address, strays, text_files

# Bracketed, so that this list does not find itself.
FOREIGN = re.compile(
    r"(?<![\w.:/~-])/(?:[w]ork|[r]oot|[h]ome)/\w"
    r"|\b[a]rtifactory\b|\b[d]evpi\b|registry\.[n]pmjs\.org|files\.[p]ythonhosted\.org"
    r"|https?://(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d|https?://[\w.-]+\.[i]nternal\b",
    re.I,
)


def book_pages(root: Path) -> list[Path]:
    """The pages below book/: .md and .ipynb, but for names that start with `_` or `.`.

    Nor what a chapter writes when it runs: it goes to book/runs/, which git ignores.
    """
    book = root / "book"
    return [
        path
        for path in sorted(book.rglob("*"))
        if path.suffix in {".md", ".ipynb"}
        and not any(part.startswith(("_", ".")) for part in path.relative_to(book).parts)
        and path.relative_to(book).parts[0] != "runs"
    ]


def _proses(root: Path) -> Iterator[tuple[str, Path, str]]:
    """(place, file, markdown) of every page, the README, the changes and the guide for contributors."""
    others = ("README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md", ".github/pull_request_template.md")
    for path in [*book_pages(root), *(root / name for name in others)]:
        if path.suffix == ".ipynb":
            yield from ((cell.where, path, cell.source) for cell in read_chapter(path).prose)
        elif path.exists():
            yield str(path.relative_to(root)), path, path.read_text(encoding="utf-8")


def pages_in_toc(root: Path) -> list[str]:
    """_toc.yml names every page once, and nothing else."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))

    def entries(node) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key in {"root", "file"}:
                yield re.sub(r"\.(md|ipynb)$", "", value)
            elif isinstance(value, dict | list):
                yield from entries(value)

    pages = Counter(str(p.relative_to(root).with_suffix("").as_posix()) for p in book_pages(root))
    listed = Counter(entries(toc))
    problems = [f"_toc.yml: no page {entry}.md or .ipynb" for entry in listed - pages]
    return problems + [f"_toc.yml: {page} is missing" for page in pages - listed]


def prose_without_code(root: Path) -> list[str]:
    """A .md page has no code cells: they would have no outputs and no test."""
    return [
        f"{path.relative_to(root)}: a code-cell; code lives in notebooks"
        for path in book_pages(root)
        if path.suffix == ".md"
        and re.search(r"^ *(`{3,}|:{3,})\{code-cell\}", path.read_text(encoding="utf-8"), re.M)
    ]


def page_alt_text(root: Path) -> list[str]:
    """Every picture of a .md page, of the README too, says what it shows."""
    return [
        f"{place}: {problem}"
        for place, path, markdown in _proses(root)
        if path.suffix == ".md"
        for problem in undescribed(markdown)
    ]


def local_links(root: Path) -> list[str]:
    """Every link to a file, every picture and every included file is there."""
    problems = []
    for place, path, markdown in _proses(root):
        text = re.sub(r"`[^`\n]+`|\$[^$\n]+\$", "", unfenced(markdown))
        targets = re.findall(r"\]\(<?([^)\s>]+)", text)
        targets += re.findall(r"<(?:img|a)\b[^>]*?(?:src|href)=[\"']([^\"']+)", text)
        named = {"image", "figure", "include", "literalinclude"}
        targets += [d.argument for d in directives(markdown) if d.name in named]
        for target in targets:
            file = re.sub(r"[#?].*", "", target)
            if re.match(r"[a-z]+:", file) or "." not in Path(file).name:
                continue  # another host, or a label that Sphinx resolves
            base = root if file.startswith("/") else path.parent
            if not (base / file.lstrip("/")).exists():
                problems.append(f"{place}: no file {target}")
    return problems


def unique_names(root: Path) -> list[str]:
    """No function or class is defined in two chapters, nor twice in one."""
    seen: dict[str, str] = {}
    problems = []
    for path in book_pages(root):
        for cell in read_chapter(path).code if path.suffix == ".ipynb" else []:
            for node in definitions(cell.tree):
                if node.name in seen:
                    problems.append(f"{cell.where}: {node.name} is defined in {seen[node.name]}")
                seen.setdefault(node.name, cell.where)
    return problems


def plain_words(root: Path) -> list[str]:
    """The prose never says that something is done simply."""
    return [
        f"{place}: {found.group()!r}; leave it out"
        for place, _, markdown in _proses(root)
        for found in re.finditer(r"\bsimply\b", markdown, re.I)
    ]


def project_alone(root: Path) -> list[str]:
    """The project speaks of itself: no machine's paths, no private host, nothing of its making."""
    return [
        f"{path.relative_to(root)}: {found.group()!r}"
        for path in text_files(root)
        for found in FOREIGN.finditer(_text(path))
    ]


def _text(path: Path) -> str:
    """A file's text; a notebook's without its pictures."""
    if path.suffix == ".ipynb":
        cells = read_chapter(path).cells
        return "\n".join(text for cell in cells for text in (cell.source, *cell.output_texts))
    return path.read_bytes().decode("utf-8", "replace")


def one_address(root: Path) -> list[str]:
    """The repository's address is everywhere that of _config.yml, and the README names it."""
    problems = strays(root)
    if address(root) not in (root / "README.md").read_text(encoding="utf-8"):
        problems.append(f"README.md: does not name {address(root)}")
    return problems


BOOK_RULES = (
    pages_in_toc, prose_without_code, page_alt_text, local_links, unique_names,
    plain_words, project_alone, one_address,
)  # fmt: skip

"""A chapter as a learner's notebook: nothing run, and predictions, verdicts and exercises to fill in.

A predict cell becomes `predicted_x = ...` and, below it, the cell itself: the guess is kept, and the claim's
own figure is used from there on, so that any guess is good. A verdict cell becomes what it measured, a word
to fill in, and a check; a solution a stub of the names that its assertions and printed lines read, and these
as checks.
"""

import ast
from collections.abc import Iterator

import nbformat
import workshop_answers as answers
import workshop_cells
import workshop_checks
from book_notebook import Chapter
from book_outputs import METADATA
from workshop_prose import SOLUTION_END, SOLUTION_START, plain_markdown

TOOLS = """\
import types

check = types.ModuleType("check")  # what the cells below call; nothing here to learn
exec(r'''{source}''', check.__dict__)"""


def learner(chapter: Chapter):
    """(The notebook, {id of a cell to fill in: what the book has there})."""
    cells, filled = [], {}
    for name, cell, pieces in _pieces(chapter):
        if pieces is None:
            cells.append(nbformat.v4.new_markdown_cell(plain_markdown(cell.source), id=name))
        for piece, source, tags, *answer in pieces or ():
            cells.append(_code(piece, source, tags))
            if answer:
                filled[piece] = answer[0]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=METADATA, nbformat_minor=5)
    return notebook, filled


def _pieces(chapter: Chapter) -> Iterator[tuple]:
    """(id, cell, code cells in its place: each (id, source, tags) and, to fill in, the book's source)."""
    kept, has_page = _kept_of_verdicts(chapter), "PAGE" in _all_stores(chapter)
    label, group = "", []
    for raw, cell in zip(chapter.notebook["cells"], chapter.cells, strict=True):
        name = raw["id"]
        if cell.kind == "markdown":
            if group and SOLUTION_END.search(cell.source):
                yield name, cell, workshop_cells.exercise(label, group)
                group = []
            inside = bool(group) or (bool(label) and not SOLUTION_END.search(cell.source))
            label = found[1] if (found := SOLUTION_START.search(cell.source)) else label if inside else ""
            if not inside and plain_markdown(cell.source):
                yield name, cell, None
        elif "solution" in cell.tags:
            group.append((name, cell))
        elif "predict" in cell.tags:
            yield name, cell, workshop_cells.prediction(name, cell)
        elif "verdict" in cell.tags:
            yield name, cell, workshop_cells.verdict(name, cell, kept[name], has_page)
        else:
            yield name, cell, [(name, cell.source, cell.tags)]
        if "colab" in cell.tags:
            yield name, cell, [(f"{name}-check", TOOLS.format(source=_source()), ["hide-cell"])]
    if group:
        yield group[0][0], group[0][1], workshop_cells.exercise(label, group)


def _source() -> str:
    """The text of workshop_checks.py."""
    with open(workshop_checks.__file__, encoding="utf-8") as file:
        return file.read()


def _code(name: str, source: str, tags: list[str]):
    """A code cell without outputs; Jupyter folds the ones that the book folds."""
    metadata = {"tags": list(tags)} if tags else {}
    if any(tag.startswith("hide-") for tag in tags):
        metadata["jupyter"] = {"source_hidden": True}
    return nbformat.v4.new_code_cell(source, id=name, metadata=metadata)


def _all_stores(chapter: Chapter) -> set[str]:
    return {name for cell in chapter.code for line in cell.tree.body for name in answers.stores(line)}


def _kept_of_verdicts(chapter: Chapter) -> dict[str, list[ast.stmt]]:
    """By cell id, the statements of each verdict cell that measure, or whose names are read later."""
    kept, later = {}, set()
    for raw, cell in zip(reversed(chapter.notebook["cells"]), reversed(chapter.cells), strict=True):
        body = cell.tree.body if cell.kind == "code" else []
        if "verdict" in cell.tags:
            body = kept[raw["id"]] = _needed(body, later)
        for line in reversed(body):
            later = (later - answers.stores(line)) | answers.loads(line)
    return kept


def _needed(body: list[ast.stmt], later: set[str]) -> list[ast.stmt]:
    """What of a verdict cell a learner is given: no assertion, no printed line, no word."""
    wanted, found = set(later), []
    for line in reversed(body):
        names = answers.stores(line)
        measures = any(name.startswith("measured") for name in names)
        if isinstance(line, ast.Assert) or answers.is_print(line) or not names:
            continue
        if measures or (names & wanted and not any(n.startswith("verdict") for n in names)):
            found.insert(0, line)
            wanted = (wanted - names) | answers.loads(line)
    return [_without_asserts(line) for line in found]


def _without_asserts(line: ast.stmt) -> ast.stmt:
    if isinstance(line, ast.For):
        line.body = [inner for inner in line.body if not isinstance(inner, ast.Assert)]
    return line

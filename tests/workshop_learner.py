"""A chapter as a learner's notebook: nothing run, and predictions, verdicts and exercises to fill in.

A predict cell becomes `predicted_x = ...` and, below it, the cell itself: the guess is kept, and the claim's own
figure is used from there on, so that any guess is good. A verdict cell becomes what it measured, a word to fill in,
and a check; a solution a stub of the names that its assertions and printed lines read, and these as checks.
"""

import ast
import re
from collections.abc import Iterator

import nbformat
import workshop_answers as answers
import workshop_checks
from book_notebook import Cell, Chapter
from book_outputs import METADATA
from workshop_prose import SOLUTION_END, SOLUTION_START, plain_markdown

FILL, GIVEN = "fill-in", "check"
COMPARE = 'print("No value to check here: compare what you did with the solution.")'
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
                yield name, cell, _exercise(label, group)
                group = []
            inside = bool(group) or (bool(label) and not SOLUTION_END.search(cell.source))
            label = found[1] if (found := SOLUTION_START.search(cell.source)) else label if inside else ""
            if not inside and plain_markdown(cell.source):
                yield name, cell, None
        elif "solution" in cell.tags:
            group.append((name, cell))
        elif "predict" in cell.tags:
            yield name, cell, _prediction(name, cell)
        elif "verdict" in cell.tags:
            yield name, cell, _verdict(name, cell, kept[name], has_page)
        else:
            yield name, cell, [(name, cell.source, cell.tags)]
        if "colab" in cell.tags:
            yield name, cell, [(f"{name}-check", TOOLS.format(source=_source()), ["hide-cell"])]
    if group:
        yield group[0][0], group[0][1], _exercise(label, group)


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


def guessed(cell: Cell) -> list[str]:
    """The predicted_* names of a cell that one value answers."""
    names = []
    for line in cell.tree.body:
        value = getattr(line, "value", None)
        compound = ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp
        if isinstance(line, ast.Assign) and not isinstance(value, compound):
            names += sorted(name for name in answers.stores(line) if name.startswith("predicted"))
    return names


def _prediction(name: str, cell: Cell) -> list:
    """The guess to fill in, then the chapter's own cell."""
    if not (names := guessed(cell)):
        return [(name, cell.source, cell.tags)]
    said = [_comment(cell.source, each) for each in names]
    fill = "# Your guess, before you measure. The claim has a figure; what do you expect?\n"
    fill += "\n".join(f"{each} = ...{about}" for each, about in zip(names, said, strict=True))
    given = f"check.guess({', '.join(f'{n}={n}' for n in names)})\n"
    given += f"# From here on the names stand for what the claim says.\n{cell.source}"
    book = "\n".join(f"{n} = 0" for n in names)  # any guess will do
    return [(f"{name}-fill", fill, [FILL], book), (name, given, [GIVEN])]


def _comment(source: str, name: str) -> str:
    """The comment that stands beside an assignment, if there is one."""
    found = re.search(rf"(?m)^{name} = (?:[^#\n(]*|\(\n[^#\n]*)(#.*)$", source)
    return f"  {found[1]}" if found else ""


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


def words(cell: Cell) -> tuple[str, list[str]]:
    """("Claim 3", ["FAILS"]) of a verdict cell, as its stored output says; two words where it depends."""
    said = next(text for text in cell.output_texts if text)
    claim = re.search(r"Claim \d+", said)
    found = re.findall(r"HOLDS|FAILS|FALSE|UNDECIDED", said)
    mixed = "FALSE" in found and "HOLDS" in found
    first = ["HOLDS", "FAILS"] if mixed else [found[0].replace("FALSE", "FAILS")]
    return claim[0] if claim else "the claim", first


def _verdict(name: str, cell: Cell, kept: list[ast.stmt], has_page: bool) -> list:
    """What was measured, the word to fill in, and its check."""
    claim, found = words(cell)
    variable = f"verdict_{claim.split()[-1]}"
    measured = sorted(
        {n for line in cell.tree.body for n in answers.loads(line) | answers.stores(line) if n[:8] == "measured"}
    )
    lines = [ast.unparse(line) for line in kept]
    lines += [f"check.show({', '.join(f'{n}={n}' for n in measured)})"]
    fill = f'# {claim}: does it hold? "HOLDS", "FAILS" or "UNDECIDED".\n{variable} = ...'
    hashes = sorted(workshop_checks.secret(claim, word) for word in found)
    page = ", page=PAGE" if has_page else ""
    checks = f"check.verdict({claim!r}, {variable}, {hashes}{page})"
    return [
        (f"{name}-given", "\n".join(lines), [GIVEN]),
        (f"{name}-fill", fill, [FILL], f"{variable} = {found[0]!r}"),
        (name, checks, [GIVEN]),
    ]


def _exercise(label: str, group: list[tuple[str, Cell]]) -> list:
    """A stub with the names to define, and the checks."""
    name, cells = group[0][0], [cell for _, cell in group]
    body = [line for cell in cells for line in cell.tree.body]
    made = {each for line in body for each in answers.stores(line)}
    tests = [line for line in body if answers.is_check(line) and answers.loads(line) & made]
    prints = [line for line in body if answers.is_print(line)]
    told = answers.printed(label, prints, "".join(text for cell in cells for text in cell.output_texts))
    checks = [line for test in tests for line in answers.hidden(test)] + told
    read = set().union(set(), *map(answers.loads, tests), *map(answers.loads, prints if told else []))
    names = _in_order(made & read, body) or _in_order(answers.asserted(body) & made, body)
    stub = "\n".join(_stub(each, body) for each in names)
    fill = f"# Exercise {label}. Give each name its value; add lines as you like.\n{stub}"
    check = "\n".join([f"check.filled({', '.join(f'{n}={n}' for n in names)})", *(checks or [COMPARE])])
    return [(f"{name}-fill", fill, [FILL], "\n".join(cell.source for cell in cells)), (name, check, [GIVEN])]


def _in_order(names: set[str], body: list[ast.stmt]) -> list[str]:
    """The names in the order in which the solution makes them."""
    order = dict.fromkeys(n for line in body for n in sorted(answers.stores(line)) if n in names)
    return list(order)


def _stub(name: str, body: list[ast.stmt]) -> str:
    """`name = ...`, or the head of a function."""
    for line in body:
        if isinstance(line, ast.FunctionDef) and line.name == name:
            return f"\n\ndef {name}({ast.unparse(line.args)}):\n    ...\n"
    return f"{name} = ..."

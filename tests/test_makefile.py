"""make: a failed installation never counts as done, with the oldest make that readers have too."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VENV = """#!/bin/sh
# Stands for Python: `-m venv FOLDER` makes a folder whose pip answers {code}.
[ "$2" = venv ] || exit 0
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho Collecting torch\\nexit {code}\\n' > "$3/bin/pip"
chmod +x "$3/bin/pip"
"""


@pytest.fixture
def setup(tmp_path):
    """A function that runs `make setup` with a pip that ends in `code`: (exit code, output, folder)."""
    for name in ("Makefile", "environment.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)

    def run(code):
        python = tmp_path / "python"
        python.write_text(VENV.format(code=code), encoding="utf-8")
        python.chmod(0o755)
        # The flags of an outer make would reach this one.
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        command = ["make", "setup", f"PYTHON={python}", "VENV=env"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr, tmp_path / "env"

    return run


def test_a_failed_installation_is_not_done(setup):
    code, output, folder = setup(3)
    assert code != 0
    assert "installing failed" in output
    assert "Collecting torch" in output
    assert not (folder / ".installed").exists()
    assert "Ready" not in output


def test_each_command_in_the_list_is_phony():
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    phony = set(re.search(r"^\.PHONY:(.*)$", text, re.M)[1].split())
    assert phony == set(re.findall(r"^([a-z-]+):.*## ", text, re.M))


def test_slides_need_the_environment_and_nothing_else():
    command = ["make", "-n", "slides", "VENV=env", "MAKEFLAGS="]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "env/bin/python tests/slides_page.py" in done.stdout
    assert "env/.package" not in done.stdout


def test_an_installation_that_ends_well_is_done(setup):
    code, output, folder = setup(0)
    assert code == 0, output
    assert {".installed", ".package", ".model"} <= {path.name for path in folder.iterdir()}
    assert (folder / "pins.txt").read_text().startswith("accelerate==")
    assert "Ready" in output


def test_the_address_is_set_without_an_environment(tmp_path):
    for name in ("Makefile", "environment.yml", "_config.yml", "tests/book_repository.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "repository", "URL=https://github.com/me/mine", f"PYTHON={sys.executable}", "VENV=env"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "rewrote _config.yml\nthe address is https://github.com/me/mine\n"
    assert not (tmp_path / "env").exists()

"""The stacks that `make drift` builds: each a Python, a list of requirements, and a folder of its own.

`oldest` is made of the lower bounds of pyproject.toml, `colab` of the list in stacks/colab.txt and then the
book's own first cell, `newest` of whatever the index has within the ranges. Standard library alone.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from book_repository import address, repository_files

TESTS = Path(__file__).parent
FOLDER = ".drift"
COLAB = "stacks/colab.txt"


@dataclass(frozen=True)
class Stack:
    """`requirements` are installed together; then the package comes, editable or through the Colab cell.

    `python` is a version such as 3.11, or "" for the interpreter that runs this and its environment.
    """

    name: str
    python: str
    requirements: tuple[str, ...]
    by_cell: bool = False


def stacks(root: Path) -> dict[str, Stack]:
    """The three stacks by name; between them they run every Python that pyproject.toml promises."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tools = tools_of(project)
    listed = (root / "tests" / COLAB).read_text(encoding="utf-8")
    pins = tuple(line for line in listed.splitlines() if line and not line.startswith("#"))
    built = (
        Stack("oldest", "3.11", tuple(map(floor, (*project["dependencies"], *tools)))),
        Stack("colab", noted(listed, "python"), (*pins, *tools), by_cell=True),
        Stack("newest", "3.12", (*project["dependencies"], *tools)),
    )
    return {stack.name: stack for stack in built}


def tools_of(project: dict) -> list[str]:
    """What the tests need beside the package, from its table in pyproject.toml."""
    return project["optional-dependencies"]["test"]


def here(root: Path) -> Stack:
    """This very Python: as it is, or, in Colab's image, after the book's cell and with the tests' tools."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    image = all(importlib.util.find_spec(name) for name in ("google", "google.colab"))
    return Stack("here", "", tuple(tools_of(project)) if image else (), by_cell=image)


def noted(text: str, key: str) -> str:
    """The value of a line `# key: value`; ValueError where there is none."""
    if not (found := re.search(rf"^# {key}: (\S+)$", text, re.M)):
        raise ValueError(f"{COLAB} has no line '# {key}: ...'")
    return found[1]


def floor(requirement: str) -> str:
    """`name>=1.2,<3; marker` as `name==1.2; marker`; ValueError for a requirement without a lower bound."""
    bounds, *marker = requirement.split(";")
    found = re.fullmatch(r"\s*([\w.-]+)\s*>=\s*([\w.]+)\s*(?:,\s*<\s*[\w.]+\s*)?", bounds)
    if not found:
        raise ValueError(f"{requirement!r} in pyproject.toml is not of the form name>=1.2 or name>=1.2,<3")
    return ";".join([f"{found[1]}=={found[2]}", *marker])


def models(root: Path) -> list[str]:
    """The models' packages, which are installed without their dependencies."""
    text = (root / "environment.yml").read_text(encoding="utf-8")
    return re.search(r"^# no-deps: (.+)$", text, re.M)[1].split()


def find_python(version: str) -> str:
    """An interpreter of this version, from PATH or from pyenv; OSError where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [sys.executable, f"python{version}", *sorted(map(str, pyenv.glob(f"{version}*/bin/python")))]
    asks = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        if not (path := shutil.which(candidate)):
            continue
        said = subprocess.run([path, "-c", asks], capture_output=True, text=True, check=False)
        if said.stdout.strip() == version:
            return path
    raise OSError(
        f"no Python {version} on PATH, which this stack needs; install one and run make drift again"
    )


def build(root: Path, stack: Stack, run, fresh: bool = False) -> str:
    """The interpreter of the stack's environment, built unless one of the same requirements is there.

    `run(command)` runs a command and raises RuntimeError where it fails. An environment that a cell has
    changed gets its list again, so that the cell finds what Colab has.
    """
    pip = ["-m", "pip", "install", "--no-compile", "--progress-bar", "off"]
    if not stack.python:
        if stack.requirements:
            run([sys.executable, *pip, *stack.requirements])
        return sys.executable
    folder = root / FOLDER / stack.name
    python, mark = folder / "venv" / "bin" / "python", folder / "built.json"
    base = find_python(stack.python)
    key = json.dumps([base, stack.requirements, _digest(root / "pyproject.toml"), models(root)], indent=1)
    same = mark.exists() and mark.read_text(encoding="utf-8") == key
    if fresh or not same:
        shutil.rmtree(folder, ignore_errors=True)
        run([base, "-m", "venv", str(folder / "venv")])
        run([str(python), *pip, *stack.requirements, *([] if stack.by_cell else ["-e", str(root)])])
        if not stack.by_cell:
            run([str(python), *pip, "--no-deps", *models(root)])
        mark.write_text(key, encoding="utf-8")
    elif stack.by_cell:
        run([str(python), *pip, *stack.requirements])
    return str(python)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def colab_cell(root: Path, source: Path) -> str:
    """The first code cell of the quickstart, which installs from the folder `source` instead of the web."""
    notebook = json.loads((root / "book" / "00_quickstart.ipynb").read_text(encoding="utf-8"))
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    text, web = "".join(cell["source"]), f"git+{address(root)}"
    if web not in text:
        raise ValueError(f"the first code cell of the quickstart does not install {web}")
    return text.replace(web, str(source))


def copy_source(root: Path, to: Path) -> Path:
    """The repository's files alone in a new folder: pip builds in place, and would find older builds here."""
    shutil.rmtree(to, ignore_errors=True)
    for path in repository_files(root):
        target = to / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return to

"""One list of versions: the pins of environment.yml are exact, installed, and within our ranges.

A rule takes a repository's root (and, where it asks what is installed, a function that says so) and
returns a list of problems; `test_book_checks.py` proves that each can fail.
"""

import importlib.metadata
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
OWN = "lora2qlora"
SPHINX_STACK = ("jupyter-book", "sphinx-exercise", "sphinxcontrib-bibtex")
EXACT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([0-9][A-Za-z0-9.!]*)")


def entries(root: Path) -> list[str]:
    """The `pip:` block of environment.yml and the packages of its `# no-deps:` line."""
    text = (root / "environment.yml").read_text(encoding="utf-8")
    listed = yaml.safe_load(text)["dependencies"]
    pip = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    return [*pip, *(p for line in re.findall(r"^# no-deps: (.+)$", text, re.M) for p in line.split())]


def is_exact(entry: str) -> re.Match | None:
    """Name and version of an entry that is an exact pin, with or without a marker behind a semicolon."""
    return EXACT.fullmatch(entry.partition(";")[0].strip())


def pins(root: Path) -> dict[str, Version]:
    """Canonical name and version of each entry that is an exact pin, and meant for this platform."""
    found = [match for entry in entries(root) if (match := is_exact(entry)) and is_meant(entry)]
    return {canonicalize_name(match[1]): Version(match[2]) for match in found}


def is_meant(entry: str) -> bool:
    """Whether an entry has no marker, such as `; sys_platform == "linux"`, or one that is true here."""
    return (marker := Requirement(entry).marker) is None or marker.evaluate()


def requirements(root: Path) -> list[Requirement]:
    """The dependencies and the extras of pyproject.toml that this platform needs."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {}).values()
    listed = [Requirement(text) for text in (*project["dependencies"], *(r for e in extras for r in e))]
    return [r for r in listed if r.name != OWN and (not r.marker or r.marker.evaluate({"extra": ""}))]


def exact_pins(root: Path) -> list[str]:
    """Each entry reads name==version, without a local part such as +cpu, and stands once."""
    listed = entries(root)
    problems = [f"environment.yml: {e!r} is not name==version" for e in listed if not is_exact(e)]
    names = Counter(canonicalize_name(re.split(r"[=<>~!+ \[]", entry)[0]) for entry in listed)
    problems += [f"environment.yml: {name} stands {n} times" for name, n in names.items() if n > 1]
    return problems if names["torch"] else [*problems, "environment.yml: torch is not pinned"]


def python_pin(root: Path) -> list[str]:
    """environment.yml names one Python, which pyproject.toml allows."""
    listed = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    found = [entry for entry in listed if isinstance(entry, str) and entry.startswith("python")]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = re.fullmatch(r"python=(\d+\.\d+)", found[0]) if len(found) == 1 else None
    if not version or not SpecifierSet(project["requires-python"]).contains(version[1]):
        return [f"environment.yml: {found}, expected python=X.Y in {project['requires-python']}"]
    return []


def pins_are_in_ranges(root: Path) -> list[str]:
    """Each dependency of pyproject.toml is a range, is pinned, and its pin lies in that range."""
    pinned = pins(root)
    problems = []
    for needed in requirements(root):
        version = pinned.get(canonicalize_name(needed.name))
        if version is None:
            problems.append(f"environment.yml: {needed.name} of pyproject.toml is not pinned")
        elif not needed.specifier.contains(version, prereleases=True):
            problems.append(f"environment.yml: {needed.name}=={version} is outside {needed.specifier}")
        if not needed.specifier or "==" in str(needed.specifier):
            problems.append(f"pyproject.toml: {needed} is not a range; exact pins stand in environment.yml")
    return problems


def pins_are_installed(root: Path, installed: Callable[[str], str] = importlib.metadata.version) -> list[str]:
    """Each pin is the version that is installed (torch's +cpu or +cu128 aside)."""
    problems = []
    for name, version in pins(root).items():
        try:
            found = installed(name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found == "none" or Version(found).public != str(version):
            problems.append(f"environment.yml: {name}=={version}, installed is {found}; run make setup")
    return problems


def sphinx_stack_is_pinned(
    root: Path, needs: Callable[[str], list[str] | None] = importlib.metadata.requires
) -> list[str]:
    """Jupyter Book 1 is frozen: all that it installs, however deep, is pinned."""
    pinned = pins(root)
    seen, ahead = set(), list(SPHINX_STACK)
    while ahead:
        name = canonicalize_name(ahead.pop())
        if name in seen:
            continue
        seen.add(name)
        needed = [Requirement(text) for text in needs(name) or []] if name in pinned else []
        ahead += [r.name for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]
    return [
        f"environment.yml: {name}, which {SPHINX_STACK[0]} needs, is not pinned"
        for name in seen - set(pinned)
    ]


def binder_reads_the_list(root: Path) -> list[str]:
    """Binder's environment is environment.yml itself, by a link."""
    link = root / ".binder" / "environment.yml"
    if link.is_symlink() and link.resolve() == (root / "environment.yml").resolve():
        return []
    return [".binder/environment.yml: must be a link to ../environment.yml"]


RULES = (
    exact_pins, python_pin, pins_are_in_ranges, pins_are_installed, sphinx_stack_is_pinned,
    binder_reads_the_list,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_versions_keep(rule):
    problems = rule(ROOT)
    assert not problems, "\n".join(["", rule.__doc__, *problems])

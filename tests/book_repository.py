"""The repository's address: one source, `_config.yml`, and every place that repeats it.

`python tests/book_repository.py https://github.com/owner/name` rewrites them all, and touches
nothing else; `--check` lists what differs from `_config.yml`, and `--remind` says in one line whether the
address is still a placeholder. It needs the standard library alone.
"""

import argparse
import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = re.compile(rb"^repository:[^\n]*\n(?:[ \t]+[^\n]*\n|\n)*?[ \t]+url:[ \t]*(\S+)", re.M)
PLACEHOLDER_OWNER = "your_account"
END = r"(?=\.git\b|\.?(?![\w.-]))"  # "name" also ends before ".git" and before a full stop


def repository_files(root: Path) -> list[Path]:
    """Every file that git tracks or would track; without git, all that .gitignore leaves."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others"]
    try:
        listing = subprocess.run([*command, "--exclude-standard"], capture_output=True, text=True, check=True)
        paths = [root / name for name in listing.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = _walk(root)
    return sorted({path for path in paths if path.is_file()})


def _walk(root: Path) -> list[Path]:
    """The files below `root` but for .git and the plain patterns of .gitignore."""
    listed = root / ".gitignore"
    lines = listed.read_text(encoding="utf-8").split() if listed.exists() else []
    patterns = [".git", *(line.rstrip("/") for line in lines if not line.startswith("#"))]

    def kept(name: str) -> bool:
        return not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = filter(kept, folders)
        found += [Path(folder) / name for name in files if kept(name)]
    return found


def text_files(root: Path) -> list[Path]:
    """The repository's own text files: no link, nothing binary, nothing vendored."""
    own = [p for p in repository_files(root) if not p.is_symlink() and not {"mathjax", "axe"} & {*p.parts}]
    return [path for path in own if b"\0" not in path.read_bytes()]


def normalise(url: str) -> str:
    """`https://host/owner/name`, without a trailing slash or `.git`.

    Raises ValueError on anything else.
    """
    address = re.sub(r"(\.git)?/*$", "", url.strip())
    if not re.fullmatch(r"https://[A-Za-z0-9.-]+\.[A-Za-z]+/[\w.-]+/[\w.-]+", address):
        raise ValueError(f"got {url!r}; the address must read https://host/owner/name")
    return address


def address(root: Path) -> str:
    """The address in `_config.yml`. Raises ValueError when it has none."""
    found = CONFIG.search((root / "_config.yml").read_bytes())
    if not found:
        raise ValueError(f"{root / '_config.yml'} has no repository.url")
    return found.group(1).decode().strip("\"'")


def forms(url: str) -> list[str]:
    """The ways in which pages write an address: a clone, a badge, Binder, Colab, the pages."""
    host, owner, name = url.removeprefix("https://").split("/")
    slug = f"{owner}/{name}"
    starts = [f"{host}/", f"{host}:", "mybinder.org/v2/gh/", "raw.githubusercontent.com/"]
    starts += ["colab.research.google.com/github/", "img.shields.io/github/*/"]
    return [start + slug for start in starts] + [f"{owner}.github.io/{name}"]


def _pattern(form: str) -> str:
    return r"(?<![\w.-])" + re.escape(form).replace(r"\*", r"([\w/-]+)") + END


def rewrite(root: Path, url: str) -> list[Path]:
    """Put `url` wherever the address of `_config.yml` stands; returns the files changed.

    `_config.yml` is written last, so that a run cut short is finished by running it again.
    """
    pairs = list(zip(forms(address(root)), forms(normalise(url)), strict=True))
    changed = []
    for path in sorted(text_files(root), key=lambda path: path == root / "_config.yml"):
        before = after = path.read_bytes()
        for old, new in pairs:
            replacement = new.replace("*", r"\1").encode()
            after = re.sub(_pattern(old).encode(), replacement, after)
        if after != before:
            _write(path, after)
            changed.append(path)
    return changed


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.chmod(path.stat().st_mode)
    os.replace(temporary, path)


def strays(root: Path) -> list[str]:
    """Addresses of this project that are not the one in `_config.yml`.

    A stray has our repository's name under another owner or host, or the placeholder's owner.
    """
    right = address(root)
    host, owner, name = right.removeprefix("https://").split("/")
    slug = rf"([\w.-]+/{re.escape(name)}|{PLACEHOLDER_OWNER}/[\w-]+)"
    starts = r"(https://[\w.-]+/|/gh/|/github/|githubusercontent\.com/)"
    pages = rf"https://([\w-]+)\.github\.io/{re.escape(name)}{END}"
    problems = []
    for path in text_files(root):
        if path.parent.name == "tests":  # the addresses in their examples are made up
            continue
        text = path.read_bytes().decode("utf-8", "replace")
        found = [match.groups() for match in re.finditer(starts + slug + END, text)]
        wrong = [s + f for s, f in found if f != f"{owner}/{name}"]
        wrong += [s + f for s, f in found if s.startswith("https") and s != f"https://{host}/"]
        wrong += [f"{who}.github.io" for who in re.findall(pages, text) if who != owner]
        problems += [f"{path.relative_to(root)}: {it} is not {right}" for it in sorted(set(wrong))]
    return problems


def reminder(url: str) -> str:
    """What to do where `url` has the placeholder's owner, else nothing."""
    if url.split("/")[-2:-1] != [PLACEHOLDER_OWNER]:
        return ""
    return f"{url} is a placeholder, its links lead nowhere: make repository URL=https://github.com/you/yours"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when all is well, 1 with what to do when it is not."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url", nargs="?", help="the new address, https://host/owner/name")
    parser.add_argument("--check", action="store_true", help="change nothing, list what differs")
    parser.add_argument("--remind", action="store_true", help="say so if the address is a placeholder")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.check + given.remind + bool(given.url) != 1:
        parser.error("give either an address or --check or --remind")
    if given.remind:
        if line := reminder(address(given.root)):
            print(line)
        return 0
    if given.check:
        problems = strays(given.root)
        print("\n".join(problems) or f"every address is {address(given.root)}")
        return 1 if problems else 0
    try:
        changed = rewrite(given.root, given.url)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for path in changed:
        print(f"rewrote {path.relative_to(given.root)}")
    print(f"the address is {address(given.root)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

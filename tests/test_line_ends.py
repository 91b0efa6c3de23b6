"""A clone has our bytes, also where git turns line ends into those of Windows: checksums are of bytes."""

import shutil
import subprocess
from pathlib import Path

import pytest
from book_repository import repository_files

ROOT = Path(__file__).resolve().parents[1]
HEAVY = 2_000_000  # bytes; a few files above it are left out, and none of them is of a kind of its own


def git(folder, *words):
    told = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *told, "-C", str(folder), *words], check=True, capture_output=True)


def windows_clone(folder, attributes):
    """The repository's files in a clone with core.autocrlf=true: {name: (our bytes, the clone's)}."""
    origin, clone = folder / "origin", folder / "clone"
    paths = [path for path in repository_files(ROOT) if path.stat().st_size < HEAVY and not path.is_symlink()]
    for path in paths:
        target = origin / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if not attributes:
        (origin / ".gitattributes").unlink()
    git(origin, "init", "-q")
    git(origin, "add", "-A")
    git(origin, "commit", "-q", "-m", "all")
    git(folder, "clone", "-q", "-c", "core.autocrlf=true", str(origin), str(clone))
    names = [path.relative_to(ROOT) for path in paths if attributes or path.name != ".gitattributes"]
    return {str(name): ((ROOT / name).read_bytes(), (clone / name).read_bytes()) for name in names}


@pytest.mark.parametrize("attributes", [True, False], ids=["with .gitattributes", "without"])
def test_a_clone_on_windows_has_our_bytes(tmp_path, attributes):
    files = windows_clone(tmp_path, attributes)
    changed = {name for name, (ours, theirs) in files.items() if ours != theirs}
    sums = {name for name in files if name.endswith("SHA256SUMS")}
    assert len(sums) == 3
    if attributes:
        assert not changed
    else:  # so the test sees what the file prevents
        assert sums < changed
        assert any(name.endswith(".LICENSE.txt") for name in changed)

"""`make repository URL=...`: every place that repeats the address is rewritten, nothing else is."""

import importlib.metadata
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import book_repository
import pytest
from book_checks import colab_cell
from book_notebook import read_chapter
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ("00_quickstart", "13_qlora_on_a_gpu")
OLD, NEW = "https://github.com/old-owner/old-name", "https://gitlab.com/new.owner/new_name"
FILES = {
    "_config.yml": f'title: A book\nrepository:\n  branch: main\n  url: "{OLD}"  # one\nhtml: {{}}\n',
    "README.md": f"[![x]({OLD}/actions/badge.svg)]({OLD})\r\n`git clone {OLD}.git`. See {OLD}.\n"
    "https://mybinder.org/v2/gh/old-owner/old-name/main?urlpath=lab\n"
    "https://colab.research.google.com/github/old-owner/old-name/blob/main/book/00.ipynb\n"
    "https://img.shields.io/github/license/old-owner/old-name https://old-owner.github.io/old-name/\n"
    "git@github.com:old-owner/old-name.git\n",
    "book/00_quickstart.ipynb": '{"source": ["%pip install -q \\"git+' + OLD + '\\""]}',
    "tests/test_it.py": f"url = {OLD!r}\n",
}
OTHERS = f"{OLD}er {OLD}-two old-owner/old-name.txt https://github.com/else/old-name\n"


@pytest.fixture
def repository(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "others.md").write_text(OTHERS)
    (tmp_path / "picture.png").write_bytes(b"\0" + OLD.encode())
    return tmp_path


def test_the_old_address_stands_nowhere_and_the_rest_is_byte_for_byte_the_same(repository):
    assert book_repository.main([NEW + ".git/", "--root", str(repository)]) == 0
    assert book_repository.address(repository) == NEW
    for name, before in FILES.items():
        after = (repository / name).read_bytes()
        assert b"old-owner" not in after
        there = before.replace(OLD, NEW).replace("old-owner.github.io", "new.owner.github.io")
        there = there.replace("github.com:old", "gitlab.com:old")
        assert (
            after
            == there.replace("old-owner/old-name", "new.owner/new_name")
            .replace("/old-name", "/new_name")
            .encode()
        )
    assert (repository / "others.md").read_text() == OTHERS
    assert (repository / "picture.png").read_bytes() == b"\0" + OLD.encode()


def test_there_and_back_gives_the_same_bytes(repository):
    book_repository.rewrite(repository, "https://github.com/a/b")
    book_repository.rewrite(repository, OLD)
    assert {name: (repository / name).read_bytes().decode() for name in FILES} == FILES


def test_the_same_address_changes_nothing(repository):
    assert book_repository.rewrite(repository, OLD) == []


def test_a_file_keeps_its_mode(repository):
    script = repository / "README.md"
    script.chmod(0o755)
    book_repository.rewrite(repository, NEW)
    assert stat.S_IMODE(os.stat(script).st_mode) == 0o755


@pytest.mark.parametrize("files", [0, 1, 2, 3])
def test_a_run_cut_short_is_finished_by_the_next(repository, monkeypatch, files):
    write, written = book_repository._write, []

    def some_only(path, content):
        if len(written) == files:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    monkeypatch.setattr(book_repository, "_write", some_only)
    with pytest.raises(KeyboardInterrupt):
        book_repository.rewrite(repository, NEW)
    monkeypatch.undo()
    book_repository.rewrite(repository, NEW)
    assert not any("old-owner" in (repository / name).read_text() for name in FILES)


@pytest.mark.parametrize(
    "url",
    ["", "owner/name", "http://github.com/owner/name", "https://github.com/owner", "https://github.com/a/b/c",
     "https://github.com/ow ner/name", "https://github/owner/name", "git@github.com:owner/name"],
)  # fmt: skip
def test_anything_but_an_address_is_refused(repository, url, capsys):
    with pytest.raises(ValueError, match="must read https://host/owner/name"):
        book_repository.normalise(url)
    if url:
        assert book_repository.main([url, "--root", str(repository)]) == 1
        assert "must read https://host/owner/name" in capsys.readouterr().err
    assert book_repository.address(repository) == OLD


def test_a_config_without_an_address_is_named(tmp_path):
    (tmp_path / "_config.yml").write_text("repository:\n  branch: main\nother:\n  url: https://x.org/a/b\n")
    with pytest.raises(ValueError, match=r"_config.yml has no repository.url"):
        book_repository.address(tmp_path)


@pytest.mark.parametrize(
    "stray",
    [
        "https://github.com/another/old-name",
        "https://gitlab.com/old-owner/old-name",
        "git+https://github.com/" + book_repository.PLACEHOLDER_OWNER + "/whatever",
        "https://mybinder.org/v2/gh/another/old-name/main",
        "https://colab.research.google.com/github/another/old-name/blob/main/x.ipynb",
        "https://another.github.io/old-name/",
    ],
)
def test_check_finds_an_address_that_is_not_the_one(repository, stray, capsys):
    (repository / "others.md").unlink()
    assert book_repository.main(["--check", "--root", str(repository)]) == 0
    (repository / "page.md").write_text(f"See [it]({stray}).\n")
    assert book_repository.main(["--check", "--root", str(repository)]) == 1
    assert "page.md" in capsys.readouterr().out


@pytest.mark.parametrize("with_git", [False, True])
def test_the_repository_s_files_are_those_that_git_would_track(tmp_path, with_git):
    if with_git:
        if shutil.which("git") is None:
            pytest.skip("needs git")
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name in (".gitignore", "page.md", ".github/guide.md", "_build/page.md", "x.egg-info/PKG-INFO"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# built\n_build/\n*.egg-info/\n")
    found = {str(path.relative_to(tmp_path)) for path in book_repository.repository_files(tmp_path)}
    assert found == {".gitignore", "page.md", ".github/guide.md"}


# --- a copy of this book, and its reader on Colab ------------------------------------------------


@pytest.fixture
def book(tmp_path):
    """The files of this repository that a reader meets first, under a new address."""
    names = ("_config.yml", "environment.yml", "README.md", *(f"book/{name}.ipynb" for name in CHAPTERS))
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    book_repository.rewrite(tmp_path, NEW)
    return tmp_path


def on_colab(root, chapter, installs, monkeypatch):
    """Run a chapter's first cell with a pip that installs `installs` and nothing else; what pip was asked."""
    asked, there = [], ["torch"]

    def pip(_, line):
        asked.append(line)
        there.extend(installs)

    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    found = lambda: [SimpleNamespace(name=name, version="2") for name in dict.fromkeys(there)]  # noqa: E731
    monkeypatch.setattr(importlib.metadata, "distributions", found)
    source = read_chapter(root / "book" / f"{chapter}.ipynb").code[0].source
    shell = SimpleNamespace(run_line_magic=pip)
    exec(TransformerManager().transform_cell(source), {"get_ipython": lambda: shell})
    return asked


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_installs_from_the_new_address(chapter, book, monkeypatch, capsys):
    assert not colab_cell(read_chapter(book / "book" / f"{chapter}.ipynb"))
    asked = on_colab(book, chapter, ["lora2qlora"], monkeypatch)
    assert [line for line in asked if "git+" in line] == [
        f'install -q "torch=={{had[\'torch\']}}" "git+{NEW}"'
    ]
    assert capsys.readouterr().out == "torch 2 as it was\n"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_reader_whose_address_has_no_package_is_told_what_to_do(chapter, monkeypatch):
    told = "^lora2qlora was not installed: give this cell the address of your copy$"
    with pytest.raises(ImportError, match=told):
        on_colab(ROOT, chapter, [], monkeypatch)


def test_the_readme_names_the_new_address_and_says_what_a_placeholder_is(book):
    text = (book / "README.md").read_text(encoding="utf-8")
    assert f"git clone {NEW} " in text
    assert f"github/{NEW.removeprefix('https://gitlab.com/')}/blob/main/book/00_quickstart.ipynb" in text
    assert f"`{book_repository.PLACEHOLDER_OWNER}` in it is a placeholder: `make repository URL=" in text
    assert book_repository.strays(book) == []


@pytest.mark.parametrize("owner", [book_repository.PLACEHOLDER_OWNER, "someone"])
def test_a_placeholder_is_told_in_one_line_and_a_real_address_in_none(owner, repository, capsys):
    book_repository.rewrite(repository, f"https://github.com/{owner}/a-book")
    assert book_repository.main(["--remind", "--root", str(repository)]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == ("make repository URL=" in line) == (owner != "someone")


@pytest.mark.parametrize("arguments", [[], ["--check", "--remind"], ["--remind", NEW]])
def test_one_thing_is_asked_at_a_time(arguments):
    with pytest.raises(SystemExit, match="2"):
        book_repository.main(arguments)

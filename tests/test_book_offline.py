"""The zip of the site: the same bytes each time, and all that a page asks for."""

import os
import zipfile

import pytest
from book_offline import pack


def site(root):
    """A site of three files and two that are the build's own."""
    folder = root / "_build" / "html" / "book"
    folder.mkdir(parents=True)
    for name in ("../index.html", "a.html", "a.png", "../.buildinfo", "../404.html"):
        (folder / name).write_text(name, encoding="utf-8")


def test_the_zip_holds_the_site_in_one_folder(tmp_path):
    site(tmp_path)
    with zipfile.ZipFile(pack(tmp_path)) as packed:
        top = "from_lora_to_qlora/"
        assert packed.namelist() == [top + name for name in ("book/a.html", "book/a.png", "index.html")]
        assert packed.read(top + "book/a.png") == b"a.png"


def test_two_runs_give_the_same_bytes(tmp_path):
    site(tmp_path)
    first = pack(tmp_path).read_bytes()
    for path in (tmp_path / "_build" / "html").rglob("*.*"):
        os.utime(path, (1e9, 1e9))
    assert pack(tmp_path).read_bytes() == first


def test_without_a_site_it_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="make book"):
        pack(tmp_path)

"""`make outputs`: two runs give the same bytes; a chapter whose run fails stays as it was."""

import json

import book_outputs
import nbformat
import pytest
from nbclient import NotebookClient


def notebook(path, *sources):
    """A notebook with these code cells, as a front end might leave it."""
    new = nbformat.v4
    cells = [new.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources, 1)]
    cells[0].metadata = {"tags": ["predict"], "execution": {"iopub.status.busy": "2026"}, "collapsed": True}
    language = {"name": "python", "version": "3.11.7"}
    metadata = {"kernelspec": {"name": "my-kernel", "display_name": "Mine"}, "language_info": language}
    nbformat.write(new.new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A chapter after one run, and the bytes of a second run."""
    path = notebook(
        tmp_path_factory.mktemp("book") / "00_small.ipynb",
        "import sys, time\nfor step in range(3):\n    print(step, flush=True)\n    time.sleep(0.02)",
        "import os\nprint(os.environ['HF_HUB_OFFLINE'], os.environ['https_proxy'])\nos.listdir()",
    )
    assert book_outputs.main([str(path)]) == 0
    return path, book_outputs.execute(path)


def test_two_runs_give_the_same_bytes(stored, capsys):
    path, again = stored
    assert path.read_text() == again
    assert list(path.parent.iterdir()) == [path]


def test_outputs_are_stored_joined_and_metadata_is_normalised(stored):
    first, second = json.loads(stored[1])["cells"]
    assert [output["text"] for output in first["outputs"]] == [["0\n", "1\n", "2\n"]]
    assert second["outputs"][0]["text"] == ["1 http://127.0.0.1:9\n"]
    assert second["outputs"][1]["data"]["text/plain"] == ["['00_small.ipynb']"]
    assert (first["metadata"], first["id"], first["execution_count"]) == ({"tags": ["predict"]}, "cell-1", 1)
    assert json.loads(stored[1])["metadata"] == book_outputs.METADATA


@pytest.mark.slow
def test_check_passes_on_true_outputs_and_names_the_cell_of_a_false_one(stored, capsys):
    path, text = stored
    assert book_outputs.main(["--check", str(path)]) == 0
    false = text.replace('"2\\n"', '"3\\n"')
    assert false != text
    path.write_text(false)
    assert book_outputs.main(["--check", str(path)]) == 1
    assert "00_small.ipynb: cell 1 differs in its outputs" in capsys.readouterr().out
    assert path.read_text() == false
    path.write_text(text)


@pytest.mark.parametrize(
    ("source", "timeout", "why"),
    [
        ("1 / 0", 600, "ZeroDivisionError: division by zero"),
        ("import time\ntime.sleep(600)", 1, "past the time limit"),
        ("import os\nos._exit(1)", 600, "kernel died"),
    ],
)
def test_a_failure_names_the_cell_and_leaves_the_file(tmp_path, monkeypatch, capsys, source, timeout, why):
    def client(cells, **options):  # the limit is the last cell's alone: a busy machine may start slowly
        assert options["timeout"] == timeout
        limit = {"timeout_func": lambda cell: timeout if cell is cells.cells[-1] else 600}
        return NotebookClient(cells, **limit, **options)

    monkeypatch.setattr(book_outputs, "NotebookClient", client)
    path = notebook(tmp_path / "00_fails.ipynb", "print(1)", source)
    before = path.read_bytes()
    assert book_outputs.main([str(path), "--timeout", str(timeout)]) == 1
    message = capsys.readouterr().err
    assert "00_fails.ipynb cell 2 failed" in message
    assert why in message
    assert "The file is unchanged" in message
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_chapter_fails(tmp_path, capsys):
    assert book_outputs.main([str(tmp_path / "99_no.ipynb")]) == 1
    assert "99_no.ipynb" in capsys.readouterr().err


def test_a_write_that_fails_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "00.ipynb"
    path.write_text("before")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(book_outputs.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        book_outputs.write(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]

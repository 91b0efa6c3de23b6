"""The checks can fail: a small good book keeps every rule, and each defect is caught by one rule.

Each entry of CHAPTER_DEFECTS and REPOSITORY_DEFECTS puts one defect into a good temporary
repository and names the rule that must report it; all other rules must stay silent.
"""

import importlib.metadata
import inspect
import json
import shutil
from functools import partial
from types import ModuleType

import book_checks
import book_pages
import pytest
import test_layout
import test_pins
from book_checks import NOTEBOOK_RULES
from book_notebook import Chapter, read_chapter
from book_outputs import METADATA
from book_pages import BOOK_RULES
from book_repository import PLACEHOLDER_OWNER

ADDRESS = "https://github.com/an-owner/a-book"
ALT = "A line that falls from four to one."
PNG = {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo="}, "metadata": {}}
ROOT = "/" + "home/reader"  # written apart, so that the rules do not find it here


# --- a good chapter ------------------------------------------------------------------------------


def prose(text):
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def code(source, *tags, outputs=(), alt=None):
    metadata = ({"tags": list(tags)} if tags else {}) | ({"mystnb": {"image": {"alt": alt}}} if alt else {})
    return {"cell_type": "code", "metadata": metadata, "outputs": list(outputs), "source": source}


def printed(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": [text]}


def claim(number):
    return [
        prose(f"You predict claim {number}."),
        code(f"predicted_{number} = {number}", "predict"),
        prose("Now you measure."),
        code(f"measured_{number} = naive_double({number}) / 2"),
        code(
            f"assert measured_{number} == predicted_{number}\nprint('claim {number} holds')",
            "verdict",
            outputs=[printed(f"claim {number} holds\n")],
        ),
    ]


def exercise(number):
    return [
        prose(f"```{{exercise}} Double it\n:label: double-{number}\n\nDouble {number}.\n```"),
        prose(f"```{{solution-start}} double-{number}\n:class: dropdown\n```"),
        code(f"assert naive_double({number}) == 2 * {number}", "solution"),
        prose("```{solution-end}\n```"),
    ]


def good_cells():
    opening = (
        "# 00 Quickstart\n\nYou double a number and see that it holds.\n\n"
        "## Before you start\n\nYou need nothing. It takes two minutes.\n\n"
        "## Claims\n\n1. One doubles.\n2. Two doubles.\n3. Three doubles.\n\n"
        f"![{ALT}](_static/line.png) and [the notation](notation.md)\n\n```text\n# not a title\n```"
    )
    return [
        prose(opening),
        code(
            book_checks.COLAB_CELL.format(address=ADDRESS, model_packages=NO_DEPS.split(": ")[1].strip()),
            "colab",
            "hide-cell",
        ),
        prose("### Build: a sum\n\nYou add."),
        code("def naive_double(x):\n    return x + x", "naive"),
        prose("**Meet.** The package shows its source."),
        code("from lora2qlora.lab.notebook import show_source\n\nshow_source(abs)"),
        prose(":::{admonition} Trust\nBoth agree.\n:::"),
        code("assert naive_double(2) == 4"),
        *claim(1),
        *claim(2),
        *claim(3),
        prose("You look at two curves."),
        code("plot(1)", "hide-input", outputs=[PNG], alt=ALT),
        code("plot(2)", "hide-input", outputs=[PNG], alt=ALT),
        prose("## Takeaways\n\n- It doubles.\n\n## Exercises"),
        *exercise(1),
        *exercise(2),
        *exercise(3),
        prose("## Further reading\n\n- A paper.\n\n## Next: low rank\n\nYou go on."),
    ]


def numbered(cells):
    """The cells with ids and execution counts."""
    counts = iter(range(1, len(cells) + 1))
    for index, cell in enumerate(cells):
        cell.setdefault("id", f"cell-{index}")
        if cell["cell_type"] == "code":
            cell["execution_count"] = next(counts)
    return cells


def good_notebook():
    return {
        "cells": numbered(good_cells()),
        "metadata": json.loads(json.dumps(METADATA)),
        "nbformat": 4,
        "nbformat_minor": 5,
    }


# --- a good repository ---------------------------------------------------------------------------

INSTALLED = {"torch": "2.13.0+cpu", "jupyter-book": "1.0.4.post1", "sphinx": "7.4.7"}
INSTALLED |= {"sphinx-exercise": "1.2.1", "sphinxcontrib-bibtex": "2.7.0"}
NEEDS = {"jupyter-book": ["sphinx>=7", "black; extra == 'lint'"], "sphinx": ["Sphinx-Exercise"]}
PINS = "".join(f"      - {name}=={version.split('+')[0]}\n" for name, version in INSTALLED.items())
PINS += "      - elsewhere==1; sys_platform == 'nowhere'\n"
INSTALLED |= {"a-model": "0.1", "some-weights": "0.2"}
NO_DEPS = "# no-deps: a-model==0.1 some-weights==0.2\n"
LAB_MODULE = "from ..lora import LoRALinear\n"
FOLDER, FILES_OF_FOLDER = "companion/lora2qlora/optimizers", test_layout.FOLDERS["optimizers"]
README = f"""\
# A book

{ADDRESS} and [its pages](book/index.md)

```
book/            chapters
  notation.md    symbols
companion/       lora2qlora/ (the package)
├── lora2qlora/  rooms
tests/           one file a room
_config.yml  _toc.yml   its format
environment.yml  pins
pyproject.toml   settings
Makefile  LICENSE  README.md
CITATION.cff  CHANGELOG.md
```
"""
INDEX = f"""\
# A book

![{ALT}](_static/line.png)

[Start](00_quickstart.ipynb#claims), [a label](first), `[x](no.md)` and <https://example.org/a.md>

```{{figure}} _static/line.png
:alt: {ALT}
```
"""
CITATION = """\
cff-version: 1.2.0
message: Cite it.
title: A book
authors:
  - name: Its authors
version: 0.1.0
"""
FORM = """\
name: It fails
description: A cell ends with an error.
body:
  - type: textarea
    id: check
    attributes:
      label: What `python -m lora2qlora.lab.check` prints
  - type: input
    id: failed
    attributes:
      label: What you ran
"""
TOC = """\
format: jb-book
root: book/index
parts:
  - caption: Start
    chapters:
      - file: book/00_quickstart
      - file: book/notation.md
"""
PYPROJECT = """\
[project]
name = "lora2qlora"
version = "0.1.0"
requires-python = ">=3.10"
dependencies = ["torch>=2.6,<3", "tomli>=1; python_version < '3.0'"]
[project.optional-dependencies]
book = ["jupyter_book>=1.0.4,<2"]
all = ["lora2qlora[book]"]
"""
FILES = {
    "_config.yml": f"title: A book\nrepository:\n  url: {ADDRESS}\n",
    "_toc.yml": TOC,
    "environment.yml": NO_DEPS + "dependencies:\n  - python=3.11\n  - pip\n  - pip:\n" + PINS,
    "pyproject.toml": PYPROJECT,
    "Makefile": "book:\n\t@set -o pipefail; \\\n\techo 'a | b' | cat || exit 1\n",
    "LICENSE": "MIT\n",
    "README.md": README,
    "CITATION.cff": CITATION,
    "CHANGELOG.md": "# Changes\n\n## 0.1.0\n\n- [It](book/index.md) is there.\n",
    ".github/ISSUE_TEMPLATE/fails.yml": FORM,
    ".github/ISSUE_TEMPLATE/config.yml": "blank_issues_enabled: true\n",
    ".gitignore": "_build/\n*.egg-info/\n",
    ".github/CONTRIBUTING.md": "See [the README](../README.md).\n",
    ".github/workflows/tests.yml": "permissions:\n  contents: read\njobs:\n  test:\n    steps:\n"
    "      - uses: actions/checkout@v4\n      - run: make book\n",
    "book/index.md": INDEX,
    "book/notation.md": "# Notation\n",
    "book/_static/line.png": "\0PNG",
    "companion/lora2qlora/__init__.py": '"""Rooms; no pickle is needed, torch.load neither."""\n',
    "companion/lora2qlora/low_rank.py": "def truncated_svd(matrix, rank):\n    return matrix[:rank]\n",
    "companion/lora2qlora/lora.py": "from .low_rank import truncated_svd\n\n\n"
    "class LoRALinear:\n    svd = truncated_svd\n",
    "companion/lora2qlora/lab/__init__.py": "# as long as a module may be\n" * 200,
    "companion/experiments/sweep.py": "# as long as a script may be\n" * 300,
    **{f"companion/lora2qlora/lab/{name}.py": LAB_MODULE for name in test_layout.LAB},
    f"{FOLDER}/__init__.py": "".join(
        f"from lora2qlora.optimizers import {name}\n" for name in FILES_OF_FOLDER
    ),
    **{f"{FOLDER}/{name}.py": LAB_MODULE + "from . import adam\n" for name in FILES_OF_FOLDER[1:]},
    f"{FOLDER}/{FILES_OF_FOLDER[0]}.py": LAB_MODULE,
    **{f"tests/test_{name}.py": "" for name in (*test_layout.LAB, "low_rank", "lora", "optimizers")},
    "_build/html/page.md": "[broken](nowhere.md)",
    "lora2qlora.egg-info/PKG-INFO": "",
}


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A repository that keeps every rule."""
    root = tmp_path_factory.mktemp("good") / "repository"
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / ".binder").mkdir()
    (root / ".binder" / "environment.yml").symlink_to("../environment.yml")
    (root / "book" / "00_quickstart.ipynb").write_text(json.dumps(good_notebook()), encoding="utf-8")
    return root


def installed(name):
    """What importlib.metadata.version would say, had we installed INSTALLED."""
    if name not in INSTALLED:
        raise importlib.metadata.PackageNotFoundError(name)
    return INSTALLED[name]


REPOSITORY_RULES = (*BOOK_RULES, *test_layout.RULES, *test_pins.RULES)
ASKS = {
    test_pins.pins_are_installed: partial(test_pins.pins_are_installed, installed=installed),
    test_pins.sphinx_stack_is_pinned: partial(test_pins.sphinx_stack_is_pinned, needs=NEEDS.get),
}


def chapter_problems(chapter):
    return {rule.__name__: found for rule in NOTEBOOK_RULES if (found := rule(chapter))}


def repository_problems(root):
    return {rule.__name__: found for rule in REPOSITORY_RULES if (found := ASKS.get(rule, rule)(root))}


def test_a_good_chapter_keeps_every_rule(good):
    assert chapter_problems(read_chapter(good / "book" / "00_quickstart.ipynb")) == {}


def test_a_good_repository_keeps_every_rule(good):
    assert repository_problems(good) == {}


# --- one defect each, in a chapter ---------------------------------------------------------------


def both(*edits):
    """Several edits, one after the other."""

    def edit(target):
        for one in edits:
            one(target)

    return edit


def find(notebook, text):
    """The first cell that holds `text`."""
    return next(cell for cell in notebook["cells"] if text in cell["source"])


def swap(old, new):
    """Replace text in the first cell that holds it."""

    def edit(notebook):
        cell = find(notebook, old)
        cell["source"] = cell["source"].replace(old, new, 1)

    return edit


def put(text, **fields):
    """Set fields of the first cell that holds `text`."""
    return lambda notebook: find(notebook, text).update(fields)


def tags(text, *names):
    """Set the tags of the first cell that holds `text`."""
    return lambda notebook: find(notebook, text)["metadata"].update(tags=list(names))


def after(text, *cells):
    """Add cells behind the first cell that holds `text`."""

    def edit(notebook):
        place = notebook["cells"].index(find(notebook, text)) + 1
        notebook["cells"][place:place] = [
            cell | {"id": f"added-{n}"} for n, cell in enumerate(json.loads(json.dumps(cells)))
        ]

    return edit


def drop(text, how_many=1):
    """Remove the first cell that holds `text`, and those behind it."""

    def edit(notebook):
        place = notebook["cells"].index(find(notebook, text))
        del notebook["cells"][place : place + how_many]

    return edit


def runs(source):
    """Add a cell that runs `source`, with prose before it."""
    return after("assert naive_double(2) == 4", prose("You try."), code(source))


def shows(**output):
    """Add a cell with one output."""
    return after("assert naive_double(2) == 4", prose("You try."), code("show()", outputs=[output]))


def tells(text):
    """Add prose."""
    return after("assert naive_double(2) == 4", prose(text))


def data(kind, text):
    return {"output_type": "display_data", "data": {kind: text}, "metadata": {}}


def ignore_three(notebook):
    for number in (1, 2, 3):
        tags(f"measured_{number} = ", "nbval-ignore-output")(notebook)
    for text in ("assert naive_double(1)", "assert naive_double(3)"):
        tags(text, "solution", "nbval-ignore-output")(notebook)


def longer_cells(notebook):
    for cell in notebook["cells"]:
        if cell["source"].startswith(("measured", "predicted", "assert measured", "from", "assert naive")):
            cell["source"] += "\n1" * 8


LONG = "\n".join(f"    x += {i}" for i in range(12))
CHAPTER_DEFECTS = [
    ("valid_format", "old format", lambda nb: nb.update(nbformat_minor=4)),
    ("valid_format", "no id", lambda nb: nb["cells"][0].pop("id")),
    ("valid_format", "one id twice", lambda nb: nb["cells"][1].update(id="cell-0")),
    ("valid_format", "not in the schema", lambda nb: nb["cells"][0].update(colour="red")),
    ("clean_metadata", "another kernel", lambda nb: nb["metadata"]["kernelspec"].update(name="mine")),
    ("clean_metadata", "a version", lambda nb: nb["metadata"]["language_info"].update(version="3.11.7")),
    ("clean_metadata", "widgets", lambda nb: nb["metadata"].update(widgets={})),
    ("clean_metadata", "timing", lambda nb: nb["cells"][1]["metadata"].update(execution={})),
    ("known_tags", "a misspelt tag", tags("measured_1 = ", "verdcit")),
    ("parses", "not Python", runs("print 'one'")),
    ("executed", "never run", put("measured_2 = ", execution_count=None)),
    ("executed", "run twice", put("measured_2 = ", execution_count=40)),
    ("executed", "run alone", lambda nb: nb["cells"][1].update(execution_count=2)),
    ("no_errors", "an error", shows(output_type="error", ename="E", evalue="", traceback=["E"])),
    ("no_stderr", "a warning", shows(**printed("careful\n", "stderr"))),
    ("no_absolute_paths", "in code", runs(f"open('{ROOT}/x')")),
    ("no_absolute_paths", "in prose", tells(f"Look into `{ROOT}`.")),
    ("no_absolute_paths", "in a stream", shows(**printed("/tmp/x.bin\n"))),
    ("no_absolute_paths", "in a result", shows(**data("text/plain", ["PosixPath('/content')"]))),
    ("no_absolute_paths", "on Windows", runs(r"open('C:\\Users\\you')")),
    ("no_object_addresses", "an address", shows(**printed("<object at 0x7fe37c6c7340>\n"))),
    ("no_trailing_semicolon", "at the end", runs("plot(1);")),
    ("no_trailing_semicolon", "before a comment", runs("plot(1);  # quiet\nplot(2)")),
    ("few_ignored_outputs", "five of sixteen", ignore_three),
    ("no_network", "requests", runs("import requests")),
    ("no_network", "urllib", runs("from urllib.request import urlopen as get")),
    ("no_network", "datasets", runs("d = datasets.load_dataset(name)")),
    ("no_network", "a file's kind without a file", runs('d = load_dataset("json")')),
    ("no_network", "an address as a file", runs('d = load_dataset("json", data_files="hf://a/b.json")')),
    ("no_network", "the Hub", runs("path = hf_hub_download(repo, file)")),
    ("no_network", "a model by name", runs("AutoModel.from_pretrained('gpt2')")),
    ("no_network", "a pipeline", runs("pipeline('text-generation', model='owner/name')")),
    ("no_network", "a shell line", runs("!ls")),
    ("no_network", "a shell line kept", runs("files = !ls")),
    ("no_network", "a shell cell", runs("%%bash\nls")),
    ("no_network", "pip", runs("%pip install x")),
    ("no_network", "a web address", runs("pd.read_csv('https://example.org/x.csv')")),
    ("no_network", "curl", runs("run('curl -O x')")),
    ("no_widgets", "an import", runs("import ipywidgets")),
    ("no_widgets", "a notebook bar", runs("from tqdm.auto import tqdm")),
    ("no_widgets", "an output", shows(**data("application/vnd.jupyter.widget-view+json", {"a": 1}))),
    ("no_remote_media", "a picture", tells(f"![{ALT}](https://example.org/x.png)")),
    ("no_remote_media", "a script", shows(**data("text/html", '<script src="//cdn.org/x.js">'))),
    ("no_remote_media", "a frame", tells("<iframe width='1' src='https://example.org'></iframe>")),
    ("no_formula_in_output", "a power", shows(**data("text/markdown", "| size |\n| --- |\n| $r^{0.5}$ |"))),
    ("safe_loading", "pickle", runs("import pickle")),
    ("safe_loading", "torch.load", runs("torch.load(path)")),
    ("safe_loading", "remote code", runs("model(path, trust_remote_code=True)")),
    ("colab_cell", "another address", swap(ADDRESS, "https://github.com/old/a-book")),
    ("colab_cell", "another version", swap("a-model==0.1", "a-model==0.2")),
    ("colab_cell", "a package short", swap(" some-weights==0.2", "")),
    ("colab_cell", "an old torchao left", swap("    %pip uninstall -qq -y torchao\n", "")),
    ("colab_cell", "torch free to move", swap("\"torch=={had['torch']}\" ", "")),
    ("colab_cell", "in sight", tags("google.colab", "colab")),
    ("colab_cell", "twice", tags("assert naive_double(2)", "colab")),
    ("colab_cell", "not first", after("# 00 Quickstart", code("early = 1", "hide-cell"))),
    ("opening", "two titles", tells("# Another title")),
    ("opening", "no title", swap("# 00 Quickstart\n\n", "")),
    ("opening", "no promise", swap("You double a number and see that it holds.\n\n", "")),
    ("opening", "two sentences", swap("it holds.", "it holds. You see more.")),
    ("numbered_title", "no number", swap("# 00 Quickstart", "# Quickstart")),
    ("numbered_title", "another number", swap("# 00 Quickstart", "# 01 Quickstart")),
    *[
        ("sections", f"without {name}", swap(name, f"Not {name}"))
        for name in ("Before you start", "Claims", "Takeaways", "Exercises", "Further reading", "Next")
    ],
    ("sections", "one twice", tells("## Takeaways")),
    (
        "sections",
        "out of order",
        both(swap("Takeaways", "X"), swap("Next", "Takeaways"), swap("## X", "## Next")),
    ),
    ("duration", "no minutes", swap(" It takes two minutes.", "")),
    ("claims", "two claims", swap("3. Three doubles.", "")),
    ("claims", "a wrong number", swap("3. Three", "4. Three")),
    ("claims", "one without a verdict", swap("3. Three doubles.", "3. Three doubles.\n4. Four.")),
    ("build_meet_trust", "no Build", swap("Build:", "Made:")),
    ("build_meet_trust", "no Meet", swap("**Meet.**", "Then.")),
    ("build_meet_trust", "no Trust", swap("} Trust", "} Belief")),
    ("build_meet_trust", "nothing built", swap("def naive_double", "def double")),
    ("build_meet_trust", "nothing shown", swap("show_source(abs)", "abs(1)")),
    (
        "build_meet_trust",
        "Trust before Meet",
        both(swap("**Meet.**", "**T.**"), swap("} Trust", "} Meet"), swap("**T.**", "**Trust.**")),
    ),
    ("naive_functions", "13 lines", swap("    return x + x", f"{LONG}\n    return x")),
    (
        "verdicts",
        "only two",
        both(tags("assert measured_3"), swap("3. Three doubles.\n", ""), swap("2. Two", "2. Two\n3. Two")),
    ),
    ("verdicts", "no assert", swap("assert measured_1 == predicted_1", "measured_1 == predicted_1")),
    ("verdicts", "silent", put("assert measured_1", outputs=[])),
    ("verdicts", "two lines", put("assert measured_1", outputs=[printed("one\ntwo\n")])),
    (
        "verdicts",
        "a result too",
        put("assert measured_1", outputs=[printed("a\n"), data("text/plain", ["1"])]),
    ),
    ("predictions", "no prediction", swap("predicted_2 = 2", "expected = 2")),
    ("predictions", "no measurement", swap("measured_2 = ", "found = ")),
    (
        "predictions",
        "afterwards",
        both(
            swap("predicted_2 = 2", "m"),
            swap("measured_2 = naive_double(2) / 2", "measured_2 = 2\npredicted_2 = 2"),
        ),
    ),
    (
        "predictions",
        "again afterwards",
        swap("measured_2 = naive_double(2) / 2", "measured_2 = predicted_2 = 2"),
    ),
    (
        "predictions",
        "one of two afterwards",
        both(
            swap("measured_2 = naive_double(2) / 2", "measured_2 = 2\npredicted_2 = 2\nmeasured = 2"),
            swap("assert measured_2", "assert measured == measured_2"),
        ),
    ),
    ("nothing_hidden", "a function", tags("def naive_double", "hide-input")),
    ("nothing_hidden", "a verdict", tags("assert measured_1", "verdict", "hide-input")),
    ("cell_lengths", "26 lines", runs("\n".join(["1"] * 26))),
    ("cell_lengths", "long on the whole", longer_cells),
    ("prose_before_code", "three in a row", after("measured_1 = ", code("1"))),
    ("prose_before_code", "a hidden one between", after("measured_1 = ", code("1"), code("2", "hide-input"))),
    ("figures", "only one", put("plot(1)", outputs=[])),
    ("figure_alt_text", "none", lambda nb: find(nb, "plot(1)")["metadata"].pop("mystnb")),
    (
        "figure_alt_text",
        "too short",
        lambda nb: find(nb, "plot(1)")["metadata"]["mystnb"]["image"].update(alt="A line."),
    ),
    ("image_alt_text", "none", tells("![](_static/line.png)")),
    ("image_alt_text", "too short", tells("![plot](_static/line.png)")),
    ("image_alt_text", "in a directive", tells("```{figure} _static/line.png\n:name: line\n```")),
    ("image_alt_text", "in HTML", tells('<img src="_static/line.png">')),
    ("exercises", "only two", drop("{exercise} Double it\n:label: double-2", 4)),
    ("exercises", "no label", after("Double 3.", prose("```{exercise}\nDo it.\n```"))),
    ("solutions", "one missing", drop("{solution-start} double-2", 3)),
    ("solutions", "not folded", swap(":class: dropdown", ":hidden:")),
    ("solutions", "asserts nothing", swap("assert naive_double(1) == 2 * 1", "naive_double(1)")),
    ("solutions", "no code", drop("assert naive_double(1) == 2 * 1")),
    ("solutions", "not tagged", tags("assert naive_double(1) == 2 * 1")),
    ("solutions", "tagged elsewhere", tags("assert naive_double(2) == 4", "solution")),
    ("solutions", "never ended", drop("{solution-end}")),
    ("solutions", "of code that cannot run", swap("{solution-start} double-1", "{solution} double-1")),
    ("own_names", "a room's class", runs("class LoRALinear:\n    pass")),
    ("own_names", "a room's function", runs("def truncated_svd(m):\n    return m")),
]


@pytest.mark.parametrize(
    ("rule", "edit"),
    [pytest.param(rule, edit, id=f"{rule}-{what}") for rule, what, edit in CHAPTER_DEFECTS],
)
def test_a_chapter_s_defect_is_caught_by_its_rule(good, rule, edit):
    notebook = good_notebook()
    edit(notebook)
    if rule not in ("executed", "valid_format"):
        numbered(notebook["cells"])
    assert notebook != good_notebook()
    path = good / "book" / "00_quickstart.ipynb"
    problems = chapter_problems(Chapter(path, json.loads(json.dumps(notebook))))
    assert list(problems) == [rule], problems
    assert all(path.name in problem for problem in problems[rule])


def test_rows_of_one_s_own_may_be_loaded_as_datasets_does(good):
    notebook = good_notebook()
    runs('d = load_dataset("json", data_files=files)')(notebook)
    numbered(notebook["cells"])
    path = good / "book" / "00_quickstart.ipynb"
    assert not chapter_problems(Chapter(path, json.loads(json.dumps(notebook))))


def test_what_a_chapter_writes_when_it_runs_is_no_page(good):
    before = book_pages.book_pages(good)
    for folder in ("runs/mine/adapter", "more"):
        (good / "book" / folder).mkdir(parents=True)
        (good / "book" / folder / "README.md").write_text("# Model card\n")
    found = [path for path in book_pages.book_pages(good) if path not in before]
    for folder in ("runs", "more"):  # other tests have the same repository
        shutil.rmtree(good / "book" / folder)
    assert found == [good / "book/more/README.md"]


# --- one defect each, in a repository ------------------------------------------------------------


def text(name, old, new):
    """Replace text in a file."""

    def edit(root):
        before = (root / name).read_text(encoding="utf-8")
        assert old in before
        (root / name).write_text(before.replace(old, new, 1), encoding="utf-8")

    return edit


def file(name, content=""):
    """Add a file."""

    def edit(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")

    return edit


def gone(name):
    """Remove a file."""
    return lambda root: (root / name).unlink()


def second_chapter(*cells, stem="02_updates_are_low_rank"):
    """Add a chapter with these code cells, and its entry in the table of contents."""

    def edit(root):
        notebook = good_notebook() | {
            "cells": numbered([code("import lora2qlora.low_rank"), *map(code, cells)])
        }
        file(f"book/{stem}.ipynb", json.dumps(notebook))(root)
        text("_toc.yml", "      - file: book/00", f"      - file: book/{stem}\n      - file: book/00")(root)

    return edit


def replaced_link(root):
    (root / ".binder" / "environment.yml").unlink()
    shutil.copy(root / "environment.yml", root / ".binder" / "environment.yml")


WORKFLOW = ".github/workflows/tests.yml"
ISSUE = ".github/ISSUE_TEMPLATE/fails.yml"
PACKAGE = "companion/lora2qlora"
BODY = "".join(f"    x += {i}\n" for i in range(41))
DOC = '    """One.\n' + "    More.\n" * 15 + '    """\n'
REPOSITORY_DEFECTS = [
    ("pages_in_toc", "a page missing", file("book/faq.md", "# More\n")),
    ("pages_in_toc", "an entry of no page", text("_toc.yml", "book/notation.md", "book/notations")),
    (
        "pages_in_toc",
        "an entry twice",
        text("_toc.yml", "      - file: book/n", "      - file: book/index\n      - file: book/n"),
    ),
    ("prose_without_code", "a code cell", file("book/notation.md", "# N\n\n```{code-cell}\n1\n```\n")),
    ("page_alt_text", "in a page", file("book/notation.md", "# N\n\n![](_static/line.png)\n")),
    (
        "page_alt_text",
        "in the README",
        text("README.md", "# A book", "# A book\n\n![x](book/_static/line.png)"),
    ),
    ("local_links", "a page", file("book/notation.md", "# N\n\n[x](nowhere.md)\n")),
    ("local_links", "a picture", text("book/index.md", "](_static/line.png)", "](_static/no.png)")),
    (
        "local_links",
        "a figure",
        text("book/index.md", "{figure} _static/line.png", "{figure} _static/no.png"),
    ),
    ("local_links", "in the README", text("README.md", "(book/index.md)", "(index.md)")),
    ("local_links", "in a chapter", gone("book/_static/line.png")),
    ("unique_names", "in two chapters", second_chapter("def naive_double(y):\n    return 2 * y")),
    ("plain_words", "simply", file("book/notation.md", "# N\n\nYou " + "simply" + " add.\n")),
    ("project_alone", "a machine's path", file("companion/experiments/run.py", f"# see {ROOT}/x\n")),
    ("project_alone", "a private host", file("tests/test_x.py", "# https://pypi." + "internal/simple\n")),
    ("one_address", "another owner", file("book/notation.md", "# N\n\n<https://github.com/old/a-book>\n")),
    (
        "one_address",
        "the placeholder",
        file("book/notation.md", f"# N\n\nhttps://github.com/{PLACEHOLDER_OWNER}/x\n"),
    ),
    ("one_address", "not in the README", text("README.md", ADDRESS, "Here")),
    ("root_entries", "a stray file", file("notes.txt")),
    ("root_entries", "a stray folder", file("docs/page.txt")),
    ("root_entries", "no licence", both(gone("LICENSE"), text("README.md", "LICENSE  ", ""))),
    ("readme_tree", "a name that is not there", text("README.md", "notation.md    ", "notations.md   ")),
    ("readme_tree", "a name left out", text("README.md", "Makefile  LICENSE", "LICENSE")),
    ("readme_tree", "no tree", text("README.md", "\nbook/ ", "\nbooks ")),
    ("package_files", "a module of no room", both(file(f"{PACKAGE}/utils.py"), file("tests/test_utils.py"))),
    ("package_files", "a module in lab", both(file(f"{PACKAGE}/lab/extra.py"), file("tests/test_extra.py"))),
    ("package_files", "a folder", file(f"{PACKAGE}/kernels/nf4.py")),
    ("package_files", "lab is not whole", gone(f"{PACKAGE}/lab/tasks.py")),
    ("data_is_packaged", "a new folder", file(f"{PACKAGE}/lab/data/more/words.jsonl")),
    ("package_files", "a file in a room", file(f"{FOLDER}/extra.py")),
    ("package_files", "a room is not whole", gone(f"{FOLDER}/paging.py")),
    ("package_files", "a room without __init__", gone(f"{FOLDER}/__init__.py")),
    ("package_files", "a room as file and folder", file(f"{FOLDER}.py")),
    (
        "floors",
        "a room below",
        text(f"{PACKAGE}/low_rank.py", "def", "from lora2qlora.lora import LoRALinear\n\n\ndef"),
    ),
    ("floors", "a room below, by name", text(f"{PACKAGE}/low_rank.py", "def", "from . import lora\n\n\ndef")),
    (
        "floors",
        "inside a function",
        text(f"{PACKAGE}/low_rank.py", "    return", "    import lora2qlora.lora\n    return"),
    ),
    (
        "floors",
        "lab",
        text(f"{PACKAGE}/lora.py", "from .low_rank", "from .lab.models import x\nfrom .low_rank"),
    ),
    ("floors", "lab in the package", file(f"{PACKAGE}/__init__.py", "from lora2qlora.lab import models\n")),
    (
        "floors",
        "the package itself",
        text(f"{PACKAGE}/lora.py", "from .low_rank import", "from lora2qlora import"),
    ),
    ("floors", "a file below", file(f"{FOLDER}/adam.py", "from lora2qlora.optimizers.paging import x\n")),
    ("floors", "a file below, by name", file(f"{FOLDER}/adam.py", "from . import paging\n")),
    (
        "floors",
        "a file below, in a function",
        file(f"{FOLDER}/adam.py", "def f():\n    from .paging import x\n"),
    ),
    (
        "floors",
        "a file's own room",
        file(f"{FOLDER}/paging.py", "from lora2qlora.optimizers import adam_step\n"),
    ),
    ("floors", "a file's own room, whole", file(f"{FOLDER}/paging.py", "import lora2qlora.optimizers\n")),
    ("floors", "a room below, in a folder", file(f"{FOLDER}/paging.py", "from ..fast import x\n")),
    ("floors", "lab backwards", text(f"{PACKAGE}/lab/tasks.py", LAB_MODULE, "from .training import x\n")),
    ("floors", "lab in a folder", file(f"{FOLDER}/__init__.py", "from ..lab.models import x\n")),
    ("rooms_have_tests", "a room", gone("tests/test_lora.py")),
    ("rooms_have_tests", "a room that is a folder", gone("tests/test_optimizers.py")),
    ("rooms_have_tests", "a module of lab", gone("tests/test_tasks.py")),
    ("chapters_have_rooms", "a chapter of no plan", second_chapter(stem="21_more")),
    ("chapters_have_rooms", "a wrong number", second_chapter(stem="03_low_rank")),
    ("chapters_have_rooms", "no room", second_chapter("import lora2qlora.nf4", stem="07_nf4")),
    ("chapters_have_rooms", "its room unused", second_chapter(stem="03_lora")),
    ("workflows_call_make", "a command of its own", text(WORKFLOW, "make book", "pip install -e .")),
    ("workflows_call_make", "an unknown target", text(WORKFLOW, "make book", "make pages")),
    ("workflows_call_make", "a floating action", text(WORKFLOW, "checkout@v4", "checkout@main")),
    ("workflows_call_make", "rights to write", text(WORKFLOW, "contents: read", "contents: write")),
    ("failures_in_pipes_count", "a pipe", text("Makefile", "set -o pipefail; ", "")),
    ("failures_in_pipes_count", "a second pipe", text("Makefile", "exit 1\n", "exit 1\n\techo a | cat\n")),
    (
        "failures_in_pipes_count",
        "flags that old makes ignore",
        text("Makefile", "book:", ".SHELLFLAGS := -c\nbook:"),
    ),
    (
        "workflows_call_make",
        "an image of anyone's",
        text(WORKFLOW, "    steps:", "    container: someone/image:latest\n    steps:"),
    ),
    ("workflows_call_make", "no rights named", text(WORKFLOW, "permissions:\n  contents: read\n", "")),
    ("citation", "an old version", text("CITATION.cff", "version: 0.1.0", "version: 0.0.9")),
    ("citation", "another title", text("CITATION.cff", "A book", "Another book")),
    ("citation", "a field of no schema", text("CITATION.cff", "message", "licence: MIT\nmessage")),
    ("citation", "no message", text("CITATION.cff", "message: Cite it.\n", "")),
    ("citation", "another schema", text("CITATION.cff", "1.2.0", "1.1.0")),
    ("citation", "a type of no schema", text("CITATION.cff", "message", "type: book\nmessage")),
    ("citation", "a nameless author", text("CITATION.cff", "- name", "- orcid")),
    ("citation", "no change told", text("CHANGELOG.md", "## 0.1.0", "## 0.0.9")),
    ("issue_forms", "a part of no kind", text(ISSUE, "type: input", "type: line")),
    ("issue_forms", "no words", text(ISSUE, "description: A cell ends with an error.\n", "")),
    ("issue_forms", "one name twice", text(ISSUE, "id: failed", "id: check")),
    ("issue_forms", "no label", text(ISSUE, "label: What you ran", "placeholder: What you ran")),
    ("issue_forms", "another question first", text(ISSUE, "lora2qlora.lab.check", "lora2qlora.lab")),
    ("local_links", "of the changes", text("CHANGELOG.md", "book/index.md", "book/no.md")),
    ("safe_sources", "pickle", file("companion/experiments/run.py", "from pickle import load\n")),
    ("safe_sources", "torch.load", text(f"{PACKAGE}/lora.py", "svd = ", "state = torch.load\n    svd = ")),
    (
        "safe_sources",
        "remote code",
        text(f"{PACKAGE}/low_rank.py", "matrix[:rank]", "f(trust_remote_code=False)"),
    ),
    ("file_sizes", "201 lines", file(f"{PACKAGE}/lab/__init__.py", "x = 0\n" * 201)),
    ("file_sizes", "a script of 301 lines", file("companion/experiments/run.py", "x = 0\n" * 301)),
    ("function_sizes", "41 lines", text(f"{PACKAGE}/low_rank.py", "    return", BODY + "    return")),
    ("function_sizes", "a long docstring", text(f"{PACKAGE}/low_rank.py", "    return", DOC + "    return")),
    (
        "no_clock_in_tests",
        "a time",
        file("tests/test_x.py", "import time\n\nassert time.time() < 3\n"),
    ),
    ("no_clock_in_tests", "by name", file("tests/test_x.py", "from time import perf_counter_ns as now\n")),
    (
        "exact_pins",
        "a local part",
        text("environment.yml", "torch==2.13.0", "torch==2.13.0\n      - extra==1+cpu"),
    ),
    ("exact_pins", "a range", text("environment.yml", "      - torch", "      - numpy>=1.26\n      - torch")),
    ("exact_pins", "a bare name", text("environment.yml", "      - torch", "      - numpy\n      - torch")),
    (
        "exact_pins",
        "a range for a platform",
        text("environment.yml", "      - torch", "      - x>=1; os_name == 'a'\n      - torch"),
    ),
    ("exact_pins", "twice", text("environment.yml", "      - torch", "      - Torch==2.13.0\n      - torch")),
    ("python_pin", "outside", text("environment.yml", "python=3.11", "python=3.9")),
    ("python_pin", "no version", text("environment.yml", "python=3.11", "python")),
    ("pins_are_in_ranges", "outside a range", text("pyproject.toml", "torch>=2.6,<3", "torch>=3")),
    (
        "pins_are_in_ranges",
        "outside an extra",
        text("pyproject.toml", "jupyter_book>=1.0.4", "jupyter_book>=1.1"),
    ),
    ("pins_are_in_ranges", "not pinned", text("pyproject.toml", '"torch', '"scipy>=1", "torch')),
    ("pins_are_in_ranges", "no range", text("pyproject.toml", "torch>=2.6,<3", "torch")),
    ("pins_are_in_ranges", "a pin in pyproject", text("pyproject.toml", "torch>=2.6,<3", "torch==2.13.0")),
    ("pins_are_installed", "another version", text("environment.yml", "exercise==1.2.1", "exercise==1.2.2")),
    (
        "pins_are_installed",
        "not installed",
        text("environment.yml", "      - torch", "      - idna==3\n      - torch"),
    ),
    (
        "pins_are_installed",
        "not installed here",
        text("environment.yml", "      - torch", "      - idna==3; os_name != 'a'\n      - torch"),
    ),
    ("sphinx_stack_is_pinned", "a part of it", text("environment.yml", "      - sphinx==7.4.7\n", "")),
    ("binder_reads_the_list", "a copy", replaced_link),
]


@pytest.mark.parametrize(
    ("rule", "edit"),
    [pytest.param(rule, edit, id=f"{rule}-{what}") for rule, what, edit in REPOSITORY_DEFECTS],
)
def test_a_repository_s_defect_is_caught_by_its_rule(good, tmp_path, rule, edit):
    root = tmp_path / "repository"
    shutil.copytree(good, root, symlinks=True)
    edit(root)
    problems = repository_problems(root)
    assert list(problems) == [rule], problems
    assert all(": " in problem for problem in problems[rule])


# --- no rule without a defect --------------------------------------------------------------------


def rules_of(module: ModuleType):
    """The public functions of a module that return a list of problems."""
    functions = [
        f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__
    ]
    return {f for f in functions if f.__name__[0] != "_" and f.__annotations__.get("return") == list[str]}


def test_every_rule_is_applied_and_has_a_defect():
    written = (
        rules_of(book_checks)
        | rules_of(book_pages)
        | rules_of(test_layout)
        | rules_of(test_pins) - {test_pins.entries}
    )
    assert set(NOTEBOOK_RULES) | set(REPOSITORY_RULES) == written
    assert {rule for rule, _, _ in CHAPTER_DEFECTS} == {rule.__name__ for rule in NOTEBOOK_RULES}
    assert {rule for rule, _, _ in REPOSITORY_DEFECTS} == {rule.__name__ for rule in REPOSITORY_RULES}

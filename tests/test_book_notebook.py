"""Reading prose as the checks do: code blocks set aside, directives and titled blocks found."""

import pytest
from book_notebook import Chapter, Directive, directives, undescribed, unfenced

TEXT = """\
before
```python
# not a title
```
```{exercise} One
:label: one
:class: dropdown wide

Do it.
```
between
````{exercise-start}
:label: two
````
:::{note}
~~~
## not a title
```{image} no.png
~~~
kept
:::
```{code-block} python
# nor this
```
after
"""


def test_code_blocks_are_set_aside_and_directives_stay():
    kept = unfenced(TEXT)
    assert "title" not in kept
    assert "nor this" not in kept
    assert [word for word in ("before", "Do it.", "between", "kept", "after") if word not in kept] == []


def test_a_fence_that_closes_a_directive_opens_nothing():
    assert directives(TEXT) == [
        Directive("exercise", "One", {"label": "one", "class": "dropdown wide"}),
        Directive("exercise-start", "", {"label": "two"}),
        Directive("note", "", {}),
    ]


@pytest.mark.parametrize(
    ("markdown", "count"),
    [
        ("![A line that falls from four to one.](a.png)", 0),
        ("![A line](a.png) and ![](b.png)", 2),
        ("```\n![](a.png)\n```", 0),
        ('<img alt="A line that falls from four to one." src="a.png">', 0),
        ('<img src="a.png"/>', 1),
        ("```{image} a.png\n:width: 3em\n:alt: A line that falls from four to one.\n```", 0),
        ("```{image} a.png\n```", 1),
    ],
)
def test_pictures_without_a_description_are_found(markdown, count):
    assert len(undescribed(markdown)) == count


def test_blocks_are_cut_at_headings_boxes_and_bold_leads(tmp_path):
    sources = [
        "# Title\n\nPromise.\n\n## Before you *start*\n\nTwo minutes.",
        ":::{admonition} Claims: three\n1. One.\n:::",
        "**Build.** You add.\n\n```\n## no\n```",
    ]
    cells = [{"cell_type": "markdown", "source": text} for text in sources]
    blocks = Chapter(tmp_path, {"cells": cells}).blocks
    assert [(block.title, block.cell) for block in blocks] == [
        ("before you *start", 0),
        ("claims", 1),
        ("build", 2),
    ]
    assert "1. One." in blocks[1].text

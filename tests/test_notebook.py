"""lab.notebook: what is shown is the installed source, tables are whole, figures look alike."""

import inspect
import re

import IPython.display
import matplotlib.pyplot as plt
import pytest
from lora2qlora.lab import notebook, training
from matplotlib.colors import to_rgb


@pytest.fixture
def shown(monkeypatch):
    """Call a function and return the one piece of Markdown that it displays."""

    def call(function, *arguments) -> str:
        displayed = []
        monkeypatch.setattr(IPython.display, "display", displayed.append)
        function(*arguments)
        (output,) = displayed
        return output.data

    return call


@pytest.mark.parametrize("obj", [training.encode, training.StepRecord, notebook])
def test_show_source_shows_what_is_installed(obj, shown):
    assert shown(notebook.show_source, obj) == f"```python\n{inspect.getsource(obj).rstrip()}\n```"


@pytest.mark.parametrize("name", ["encode", "collate", "answer_loss", "choose", "mean_loss"])
def test_show_source_shows_an_idea_without_its_refusals(name, shown):
    source = shown(notebook.show_source, getattr(training, name))
    assert re.match(rf"```python\n(@torch\.no_grad\(\)\n)?def {name}\(", source)
    assert not re.search("guard|check", source)


@pytest.mark.parametrize("obj", [3, len, "text"])
def test_show_source_refuses_what_has_none(obj):
    with pytest.raises(TypeError, match="takes a function, class or module"):
        notebook.show_source(obj)


def test_show_table_is_markdown_and_keeps_bars_in_cells(shown):
    table = shown(notebook.show_table, [{"a": 1, "b": "x|y"}, {"a": 2, "b": "z"}])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", "| 1 | x\\|y |", "| 2 | z |"]


@pytest.mark.parametrize("rows", [[], [{"a": 1}, {"b": 1}], [{"a": 1, "b": 2}, {"b": 1, "a": 2}]])
def test_show_table_refuses_rows_that_do_not_fit(rows):
    with pytest.raises(ValueError, match="rows with the same keys"):
        notebook.show_table(rows)


def test_plot_style_is_the_same_whatever_came_before():
    notebook.plot_style()
    first = dict(plt.rcParams)
    plt.rcParams["font.size"] = 3
    notebook.plot_style()
    assert dict(plt.rcParams) == first


def test_colours_stand_out_from_white_and_from_one_another():
    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name in ("full", "lora", "qlora"):
        assert 1.05 / (luminance(notebook.COLORS[name]) + 0.05) >= 3, name
    assert len(set(notebook.COLORS.values())) == len(notebook.COLORS)

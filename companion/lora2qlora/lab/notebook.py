"""What a chapter's cells share: the source of a package object, tables, and one look for all figures."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Mapping

# One colour, one meaning, all book long (Okabe and Ito's palette, distinct to colour-blind readers).
COLORS = {
    "full": "#4C4C4C",
    "lora": "#0072B2",
    "qlora": "#D55E00",
    "base": "#8C8C8C",  # what no method has touched
    "good": "#009E73",
    "other": "#CC79A7",
    "highlight": "#E69F00",
}


def show_source(obj) -> None:
    """Show the source of a function or class of the package, as it is installed now.

    Raises TypeError for an object that has no Python source (a number, a built-in).
    """
    from IPython.display import Markdown, display

    try:
        source = textwrap.dedent(inspect.getsource(obj))
    except (TypeError, OSError) as error:
        raise TypeError(f"show_source takes a function, class or module in Python, got {obj!r}") from error
    display(Markdown(f"```python\n{source.rstrip()}\n```"))


def show_table(rows: Iterable[Mapping[str, object]]) -> None:
    """Show rows (mappings with the same keys) as a table; its columns are the keys of the first row.

    Raises ValueError where there are no rows or their keys differ.
    """
    from IPython.display import Markdown, display

    rows = list(rows)
    if not rows or any(list(row) != list(rows[0]) for row in rows):
        raise ValueError(f"show_table needs rows with the same keys, got {[list(row) for row in rows]}")

    def line(cells):
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    head = [line(rows[0]), line("---" for _ in rows[0])]
    display(Markdown("\n".join(head + [line(row.values()) for row in rows])))


def plot_style() -> None:
    """The book's look for matplotlib: figures one column wide, no box, a light grid."""
    import matplotlib.pyplot as plt

    plt.rcdefaults()
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": 120,
            "figure.constrained_layout.use": True,
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.prop_cycle": plt.cycler(color=list(COLORS.values())),
            "grid.color": "#E5E5E5",
            "lines.linewidth": 2.0,
            "legend.frameon": False,
            "svg.hashsalt": "lora2qlora",
        }
    )

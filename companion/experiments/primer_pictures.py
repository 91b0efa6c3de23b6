"""The four pictures of book/primer.md, as SVG files that are the same bytes at every run.

python companion/experiments/primer_pictures.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from lora2qlora.lab.notebook import COLORS, plot_style
from matplotlib.patches import FancyArrowPatch, Rectangle

STATIC = Path(__file__).resolve().parents[2] / "book" / "_static"
# Invented accuracies in per cent, one pair a seed; the page works them through.
ONE, OTHER = np.array([71, 66, 74, 69, 70]), np.array([69, 65, 71, 68, 67])


def floats():
    """The bits of three formats, and the numbers of bf16 between 1 and 1.07 beside those of fp16."""
    fig, (bits, line) = plt.subplots(2, 1, figsize=(7, 3.4), height_ratios=[3, 2])
    parts = (("sign", "highlight"), ("exponent", "good"), ("fraction", "lora"))
    for row, (name, counts) in enumerate({"fp32": (1, 8, 23), "bf16": (1, 8, 7), "fp16": (1, 5, 10)}.items()):
        left = 0
        for (part, color), count in zip(parts, counts, strict=True):
            for bit in range(left, left + count):
                bits.add_patch(Rectangle((bit, -row), 0.9, 0.7, color=COLORS[color], lw=0))
            if part != "sign":
                text = f"{part}, {count}" if count > 6 else str(count)
                bits.text(
                    left + count / 2, 0.35 - row, text, ha="center", va="center", color="white", fontsize=8
                )
            left += count
        bits.text(-0.5, 0.35 - row, name, ha="right", va="center")
    bits.text(0.4, 0.8, "sign", ha="center", fontsize=8)
    bits.set(xlim=(-4, 33), ylim=(-2.1, 1.2))
    bits.axis("off")
    for row, (name, fraction, color) in enumerate((("bf16", 7, "lora"), ("fp16", 10, "base"))):
        there = 1 + np.arange(0, 0.071, 2.0**-fraction)
        line.plot(there, np.full(len(there), -row), "|", color=COLORS[color], ms=14, mew=1.5)
        line.text(0.996, -row, name, ha="right", va="center")
    line.set(xlabel="value", yticks=[], xlim=(0.99, 1.072), ylim=(-1.6, 0.6))
    line.spines["left"].set_visible(False)
    line.grid(False)
    return fig


def sums():
    """Sums of n random signs beside √n, and the sum of numbers with one sign."""
    steps = np.random.default_rng(0).choice([-1, 1], (30, 400)).cumsum(axis=1)
    fig, ax = plt.subplots(figsize=(7, 2.8))
    n = np.arange(1, 401)
    ax.plot(n[::4], steps.T[::4], color=COLORS["base"], lw=0.6, alpha=0.5)
    ax.plot(n, np.sqrt(n), color=COLORS["lora"], label=r"$\pm\sqrt{n}$")
    ax.plot(n, -np.sqrt(n), color=COLORS["lora"])
    ax.plot(n, n, color=COLORS["highlight"], ls="--", label="$n$: all with the same sign")
    ax.set(xlabel="how many numbers, $n$", ylabel="their sum", ylim=(-75, 100), xlim=(0, 400))
    ax.legend(loc="upper right")
    return fig


def attention():
    """One token asks, three tokens answer: query, keys, shares, values."""
    fig, ax = plt.subplots(figsize=(7, 3.2))
    ax.set(xlim=(0, 10), ylim=(0, 5))
    ax.axis("off")
    shares = {"the": 0.1, "river": 0.7, "bank": 0.2}
    for x, (token, share) in zip((1.2, 4.0, 6.8), shares.items(), strict=True):
        _box(ax, x, 0.3, token, "#DDDDDD", "black")
        _box(ax, x - 0.62, 1.6, "key", COLORS["good"])
        _box(ax, x + 0.62, 1.6, "value", COLORS["other"])
        for side in (-0.62, 0.62):
            _arrow(ax, (x, 0.8), (x + side, 1.6))
        ax.text(x - 0.62, 2.65, f"{share:.0%}", ha="center", va="center", fontsize=11, weight="bold")
        _arrow(ax, (x - 0.62, 2.1), (x - 0.62, 2.45))
        _arrow(ax, (x + 0.62, 2.1), (8.9, 3.85), width=0.6 + 5 * share, color=COLORS["other"])
    _box(ax, 8.9, 1.6, "query", COLORS["highlight"])
    _arrow(ax, (6.8 + 0.55, 0.55), (8.9, 1.6))
    ax.plot([0.1, 8.9, 8.9], [3.0, 3.0, 2.1], color=COLORS["highlight"], ls=":", lw=1.5)
    ax.text(0.1, 3.15, "the query, compared with each key, gives each token a share", fontsize=9)
    _box(ax, 8.9, 3.9, "output for “bank”", "#DDDDDD", "black", width=2.1)
    return fig


def _box(ax, x, y, text, color, ink="white", width=1.1):
    ax.add_patch(Rectangle((x - width / 2, y), width, 0.5, color=color, lw=0, zorder=3))
    ax.text(x, y + 0.25, text, ha="center", va="center", color=ink, fontsize=9, zorder=4)


def _arrow(ax, start, end, width=1.2, color="black"):
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, lw=width, color=color, alpha=0.7)
    )


def differences():
    """Five pairs of results, and their differences against four thresholds."""
    apart = ONE - OTHER
    error = apart.std(ddof=1) / np.sqrt(len(apart))
    fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3), width_ratios=[2, 3])
    for a, b in zip(ONE, OTHER, strict=True):
        left.plot([0, 1], [b, a], "-", color=COLORS["base"], lw=1)
    left.plot(np.zeros(5), OTHER, "o", color=COLORS["base"])
    left.plot(np.ones(5), ONE, "o", color=COLORS["lora"])
    left.set(ylabel="accuracy [%]", xlim=(-0.4, 1.4), title="five pairs")
    left.set_xticks([0, 1], ["method 2", "method 1"])
    mean, reach = apart.mean(), 2 * error
    right.axvspan(mean - reach, mean + reach, color=COLORS["lora"], alpha=0.2, lw=0)
    right.axvline(mean, color=COLORS["lora"])
    right.plot(apart, 0.25 + 0.05 * np.arange(5), "o", color=COLORS["lora"], ms=5)
    for row, threshold in enumerate((0, 1, 1.5, 3)):
        verdict = (
            "HOLDS" if threshold < mean - reach else "FAILS" if threshold > mean + reach else "UNDECIDED"
        )
        right.plot([threshold], [-row], "k|", ms=14, mew=2)
        right.text(3.35, -row, f"more than {threshold}: {verdict}", va="center", fontsize=9)
    right.set(xlabel="difference [points]", yticks=[], xlim=(-0.3, 6), ylim=(-3.6, 0.8))
    right.set(title="the difference, ± two standard errors")
    right.set_xticks(range(4))
    right.grid(False)
    return fig


if __name__ == "__main__":
    plot_style()
    for draw in (floats, sums, attention, differences):
        figure = draw()
        figure.savefig(STATIC / f"primer_{draw.__name__}.svg", metadata={"Date": None, "Creator": None})

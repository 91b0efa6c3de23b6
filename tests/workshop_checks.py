"""What a learner notebook checks with: its text stands in a folded cell of each, so it imports little.

Answers are kept as salted hashes: they stop a glance, not a search. A check that passes prints one line;
one that does not stops the notebook with one sentence and no traceback.
"""

import contextlib
import hashlib
import io
import math
import sys

GUESSES = {}  # by name, what was guessed before it was measured
WORDS = ("HOLDS", "FAILS", "UNDECIDED")


class Check(Exception):
    """Something to do. Jupyter shows the sentence alone."""

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {self}"]


class FillIn(Check):
    """A cell that still holds `...`."""


class NotYet(Check):
    """A cell whose answer is not the book's."""


def is_open(value):
    """Whether this is `...`, or a function of which nothing is written."""
    code = getattr(value, "__code__", None)
    return value is ... or (code is not None and code.co_code == (lambda: None).__code__.co_code)


def filled(**values):
    """FillIn, unless every name has a value."""
    if missing := [name for name, value in values.items() if is_open(value)]:
        raise FillIn(f"the cell above is yours: replace `...`. Still open: {', '.join(missing)}")


def plain(value):
    """A value as text, the same from NumPy, torch and Python."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        return "{" + ",".join(f"{plain(k)}:{plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(plain, value)) + "]"
    if isinstance(value, (set, frozenset)):
        return "{" + ",".join(sorted(map(plain, value))) + "}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def secret(salt, value):
    """The hash that stands for a value."""
    return hashlib.sha256(f"{salt}|{plain(value)}".encode()).hexdigest()[:12]


def expect(what, good):
    """One line when it is right, NotYet when not."""
    if not good:
        raise NotYet(f"{what} is not yet what the book computes. Look at the exercise again.")
    print(f"right: {what}")


def same(what, value, answer):
    """The value is the answer, to six digits."""
    expect(what, secret(what, value) == answer)


def within(what, value, step, answers):
    """The value, to the nearest `step`, is one of the answers."""
    expect(f"{what}, to about {step:.1g}", secret(what, math.floor(float(value) / step)) in answers)


def order(what, left, right, answers):
    """How the two compare: which is larger."""
    sign = "<" if left < right else ">" if left > right else "="
    expect(what, secret(what, sign) in answers)


@contextlib.contextmanager
def says(what, answer):
    """What is printed inside is, to the letter, what the solution prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield
    print(said.getvalue(), end="")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        print("On a GPU a chapter may take a larger model: compare this line with the solution yourself.")
        return
    expect(f"this line, as rounded, in {what}", secret(what, said.getvalue().strip()) == answer)


def guess(**values):
    """Keep guesses. Any will do, but there must be one."""
    filled(**values)
    GUESSES.update(values)


def number(value):
    """The value, or an effect's mean, as a float; None where it is something else."""
    value = value.mean if hasattr(value, "pairs") else value
    if isinstance(value, (bool, str)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def show(**values):
    """Each measured value on a line of its own, beside the guess."""
    for name, value in values.items():
        told = number(value)
        print(f"{name} = {plain(value)[:150] if told is None else f'{told:.4g}'}", end="")
        if (error := getattr(value, "error", None)) is not None:
            print(f", standard error {error:.2g}, {value.pairs} pairs", end="")
        guessed = GUESSES.get(name.replace("measured", "predicted", 1), ...)
        if guessed is not ...:
            print(f"; you guessed {plain(guessed)}", end="")
        if None not in (told, number(guessed)) and told:
            print(f", which is {abs(number(guessed) - told) / abs(told):.0%} off", end="")
        print()


def verdict(what, word, answers, page=True):
    """The word is the book's verdict; elsewhere than on the page's model it is only shown."""
    filled(verdict=word)
    if word not in WORDS:
        raise NotYet(f"a verdict is one of {', '.join(WORDS)}, got {word!r}")
    if not page:
        print(f"{what}: {word}. This is not the page's model, so nothing is compared.")
        return
    expect(f"{what} {word}", secret(what, word) in answers)
    if len(answers) > 1:
        print("It depends on the case: the solution says where it holds and where it does not.")

"""Regular expressions from a file, matched in bounded time. Chapter 04.

Python's `re` tries one way after the other, and some expressions have more ways than there are atoms: a
config with `((a|b)*)*c` would never end, and nothing can stop it. Here each part of an expression takes the
set of all places where it may begin and gives the set of all where it can end: the same answers, but for a
name without letters, with no way tried twice. (The package `regex` has a time limit, but takes all memory
when it compiles `((a{1000}){1000}){1000}`; RE2 knows no look-ahead, which files of adapters have.)
"""

import re
import warnings
from re import _constants as codes
from re import _parser

LONGEST = 200_000  # characters of all expressions of a file: compiling takes some 20 microseconds for each
STEPS = 3_000_000  # how many pairs of a part and a place may be tried, over all names: about two seconds
ONE_WAY = re.compile(
    r"\^?(?:[\w.-]|\\[.-])*"
)  # a name with its dots, escaped or not: one way only, `re` is safe
SPACE, DIGIT, WORD = (re.compile(pattern) for pattern in (r"\s", r"\d", r"\w"))
CATEGORIES = {
    codes.CATEGORY_SPACE: (SPACE, True),
    codes.CATEGORY_NOT_SPACE: (SPACE, False),
    codes.CATEGORY_DIGIT: (DIGIT, True),
    codes.CATEGORY_NOT_DIGIT: (DIGIT, False),
    codes.CATEGORY_WORD: (WORD, True),
    codes.CATEGORY_NOT_WORD: (WORD, False),
}
SINGLE = {codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN, codes.RANGE, codes.CATEGORY}


class Expression:
    """A regular expression of Python without flags, references to groups, and atomic or possessive parts.

    `left` [how many steps may still be taken] may be shared with others. Raises ValueError, at once or
    while matching: what is no regular expression, has one of those, or takes more steps.
    """

    def __init__(self, pattern: str, left: list[int] | None = None):
        self.pattern, self.left = pattern, [STEPS] if left is None else left
        try:
            with warnings.catch_warnings(action="ignore"):  # of sets that a later Python may read otherwise
                compiled = re.compile(pattern)  # finds errors that parsing alone does not
                self.plain = compiled if ONE_WAY.fullmatch(pattern) else None
                self.parts = None if self.plain else _parser.parse(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{pattern!r:.80} is no regular expression ({error})") from error
        if compiled.flags & ~re.UNICODE:
            raise ValueError(f"{pattern!r:.80} has flags, which are not followed here")

    def matches(self, name: str) -> bool:
        """Whether the whole of a name is what the expression describes, as `re.fullmatch` says."""
        return self._matches_from(name, {0})

    def matches_end(self, name: str) -> bool:
        """Whether the expression describes a whole name, or all that follows one of its dots."""
        return self._matches_from(name, {0} | {at + 1 for at, letter in enumerate(name) if letter == "."})

    def _matches_from(self, name: str, starts: set[int]) -> bool:
        if self.plain:
            return any(self.plain.fullmatch(name, at) for at in starts)
        try:
            return len(name) in self._ends(self.parts, name, starts)
        except RecursionError as error:
            raise ValueError(f"{self.pattern!r:.80} is nested too deep") from error

    def _ends(self, parts, name: str, starts: set[int]) -> set[int]:
        """Where in a name parts that follow one another can end, if the first begins at any of `starts`."""
        places = starts
        for code, argument in parts:
            self.left[0] -= len(places) + 1
            if self.left[0] < 0:
                raise ValueError(f"{self.pattern!r:.80} takes too long to match: write it shorter")
            places = self._part(code, argument, name, places)
            if not places:
                break
        return places

    def _part(self, code, argument, name: str, starts: set[int]) -> set[int]:
        """Where one part can end that begins at any of `starts`."""
        if code in SINGLE:
            return {at + 1 for at in starts if at < len(name) and _is_one(code, argument, name[at])}
        if code is codes.AT:
            return {at for at in starts if _is_at(argument, name, at)}
        if code is codes.SUBPATTERN and not argument[1] | argument[2]:
            return self._ends(argument[3], name, starts)
        if code is codes.BRANCH:
            return set().union(*(self._ends(branch, name, starts) for branch in argument[1]))
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            return self._repeat(*argument, name, starts)
        if code in (codes.ASSERT, codes.ASSERT_NOT):
            wanted = code is codes.ASSERT
            return {at for at in starts if self._is_there(*argument, name, at) == wanted}
        raise ValueError(f"{self.pattern!r:.80} has {str(code).lower()}, which is not followed here")

    def _repeat(self, least: int, most: int, parts, name: str, starts: set[int]) -> set[int]:
        """Where least to most repetitions can end. More than letters are left reach nothing new."""
        bound = len(name) + 1
        new = starts
        for _ in range(min(least, bound)):
            new = self._ends(parts, name, new)
        found = set(new)
        for _ in range(min(most - least, bound)):
            new = self._ends(parts, name, new) - found
            if not new:
                break
            found |= new
        return found

    def _is_there(self, direction: int, parts, name: str, at: int) -> bool:
        """Whether parts begin at a place, or (direction -1) end there: a look behind has one width."""
        back = parts.getwidth()[0]
        if direction > 0:
            return bool(self._ends(parts, name, {at}))
        return at >= back and at in self._ends(parts, name, {at - back})


def _is_one(code, argument, letter: str) -> bool:
    """Whether one letter is what a part for a single letter describes."""
    if code is codes.ANY:
        return letter != "\n"
    if code is codes.IN:
        negated = argument[0][0] is codes.NEGATE
        return negated != any(_is_one(*item, letter) for item in argument[negated:])
    if code is codes.RANGE:
        return argument[0] <= ord(letter) <= argument[1]
    if code is codes.CATEGORY:
        kind, wanted = CATEGORIES[argument]
        return (kind.match(letter) is not None) == wanted
    return (ord(letter) == argument) == (code is codes.LITERAL)


def _is_at(where, name: str, at: int) -> bool:
    """Whether an anchor holds before the letter `at` of a name."""
    if where in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
        return at == 0
    if where is codes.AT_END_STRING:
        return at == len(name)
    if where is codes.AT_END:
        return name[at:] in ("", "\n")
    before = name[at - 1 : at] if at else ""
    is_word = [WORD.match(letter) is not None for letter in (before, name[at : at + 1])]
    return (is_word[0] != is_word[1]) == (where is codes.AT_BOUNDARY)

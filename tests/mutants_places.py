"""Where a file can be changed, and how: mutmut's operators, and statements left out."""

from collections.abc import Iterator
from itertools import accumulate

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider, WhitespaceInclusivePositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

# Never entered. A test that an error is raised kills `raise` left out; its words are its own affair.
CLOSED = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Raise)
# As mutmut has it: what these are given is too dull to change.
DULL = ("len", "isinstance")


def places(source: str) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """The source once for each change, the function it is in, and the lines of its statement."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    at, finder = wrapper.resolve(WhitespaceInclusivePositionProvider), _Finder()
    wrapper.visit(finder)
    starts = [0, *accumulate(len(line) for line in source.splitlines(keepends=True))]
    for node, new, function, lines in finder.found:
        place = at[node]
        start, end = (starts[edge.line - 1] + edge.column for edge in (place.start, place.end))
        yield source[:start] + wrapper.module.code_for_node(new) + source[end:], function, lines


def changes(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """What a node is replaced by, one after the other."""
    if isinstance(node, cst.Raise) or (isinstance(node, cst.Expr) and isinstance(node.value, cst.Call)):
        yield cst.Pass()
        return
    for kind, operator in mutation_operators:
        if isinstance(node, kind):
            made = list(operator(node))
            yield from made[:1] if operator is operator_string else made  # not in capitals as well


class _Finder(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider, WhitespaceInclusivePositionProvider)

    def __init__(self):
        super().__init__()
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, str, tuple[int, int]]] = []
        self.names: list[str] = []
        self.statements: list[tuple[int, int]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.names.append(node.name.value)
        if isinstance(node, cst.BaseSmallStatement):
            self.statements.append(self._lines(node))
        is_open = not isinstance(node, CLOSED) and not _is_dull(node)
        if is_open or isinstance(node, cst.Raise):
            lines = self.statements[-1] if self.statements else self._lines(node)
            self.found += [(node, new, ".".join(self.names), lines) for new in changes(node)]
        return is_open

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.names.pop()
        if isinstance(node, cst.BaseSmallStatement):
            self.statements.pop()

    def _lines(self, node: cst.CSTNode) -> tuple[int, int]:
        """First and last line; an operator has no other place than with its spaces."""
        place = self.get_metadata(PositionProvider, node, None)
        place = place or self.get_metadata(WhitespaceInclusivePositionProvider, node)
        return place.start.line, place.end.line


def _is_dull(node: cst.CSTNode) -> bool:
    """Calls of len and isinstance, __all__, and a docstring or another string that stands alone."""
    if isinstance(node, cst.Call):
        return isinstance(node.func, cst.Name) and node.func.value in DULL
    if isinstance(node, cst.Assign):
        return any(isinstance(t.target, cst.Name) and t.target.value == "__all__" for t in node.targets)
    return isinstance(node, cst.Expr) and isinstance(node.value, cst.SimpleString | cst.ConcatenatedString)

"""A chapter as the checks read it: cells with their code parsed, prose cut into titled blocks."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

TITLE = re.compile(r"#{2,6} +(.+)|[`:]{3,} *\{[\w-]+\} +(.+)|\*\*(.+?)\*\*")
FENCE = re.compile(r" *(`{3,}|~{3,}|:{3,}) *(.*)")
CODE = re.compile(r"(?!\{)|\{(code|code-block|math|raw|parsed-literal)\}")
DIRECTIVE = re.compile(r"^ *(?:`{3,}|:{3,})\{([\w-]+)\} *(.*)$((?:\n *:[\w-]+:.*$)*)", re.M)


@dataclass(frozen=True)
class Cell:
    """One cell: its place in words, its text, its tags, its outputs."""

    where: str
    kind: str
    source: str
    metadata: dict
    outputs: list
    count: int | None

    @property
    def tags(self) -> list[str]:
        """The cell's tags."""
        return self.metadata.get("tags", [])

    @property
    def hidden(self) -> bool:
        """Whether a page folds the code away."""
        return any(tag.startswith(("hide-", "remove-")) for tag in self.tags)

    @property
    def python(self) -> str:
        """The code with IPython's magics turned into calls."""
        return TransformerManager().transform_cell(self.source)

    @cached_property
    def tree(self) -> ast.Module:
        """The code as Python parses it; empty when it cannot."""
        try:
            return ast.parse(self.python)
        except SyntaxError:
            return ast.Module([], [])

    @property
    def output_texts(self) -> Iterator[str]:
        """What the cell shows as text: streams, tracebacks, and data that is not a picture."""
        for output in self.outputs:
            yield join(output.get("text", ""))
            yield "\n".join(output.get("traceback", []))
            for kind, data in output.get("data", {}).items():
                if not kind.startswith("image/"):
                    yield join(data) if isinstance(data, str | list) else json.dumps(data)

    @property
    def figures(self) -> int:
        """How many PNG pictures the cell shows."""
        return sum("image/png" in output.get("data", {}) for output in self.outputs)


@dataclass(frozen=True)
class Block:
    """Prose under one title: a heading below level 1, a titled directive or a bold lead.

    The title is in lower case, without marks, up to its first colon: `## Next: the SVD`,
    `:::{admonition} Next` and `**Next.** The SVD` are all `next`. `cell` counts from 0.
    """

    title: str
    cell: int
    text: str


@dataclass(frozen=True)
class Chapter:
    """A notebook as it lies on disk, read without repairing anything."""

    path: Path
    notebook: dict

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def root(self) -> Path:
        """The repository the chapter stands in."""
        return self.path.parents[1]

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells, numbered from 1 in `where`."""
        return [
            Cell(
                f"{self.name} cell {number}",
                cell["cell_type"],
                join(cell["source"]),
                cell.get("metadata", {}),
                cell.get("outputs", []),
                cell.get("execution_count"),
            )
            for number, cell in enumerate(self.notebook["cells"], 1)
        ]

    @cached_property
    def code(self) -> list[Cell]:
        """The code cells that hold anything."""
        return [cell for cell in self.cells if cell.kind == "code" and cell.source.strip()]

    @cached_property
    def prose(self) -> list[Cell]:
        """The markdown cells."""
        return [cell for cell in self.cells if cell.kind == "markdown"]

    @cached_property
    def blocks(self) -> list[Block]:
        """The prose below the opening, cut at its titles."""
        found = []
        for index, cell in enumerate(self.cells):
            for line in unfenced(cell.source).splitlines() if cell.kind == "markdown" else []:
                if match := TITLE.match(line):
                    title = next(filter(None, match.groups())).split(":")[0]
                    found.append(Block(title.strip(" .*_`#").lower(), index, line))
                elif found:
                    last = found.pop()
                    found.append(Block(last.title, last.cell, f"{last.text}\n{line}"))
        return found


def read_chapter(path: Path) -> Chapter:
    """The chapter at `path`."""
    return Chapter(path, json.loads(path.read_text(encoding="utf-8")))


def join(text: str | list[str]) -> str:
    """A notebook's text, which may be stored as a list of lines."""
    return text if isinstance(text, str) else "".join(text)


def unfenced(markdown: str) -> str:
    """Markdown without its code blocks; directives stay, with their content."""
    kept, ahead = [], []  # `ahead` holds each open fence and whether it holds code
    for line in markdown.splitlines():
        fence = FENCE.match(line)
        inside_code = bool(ahead) and ahead[-1][1]
        if fence and not fence[2].strip() and ahead and fence[1].startswith(ahead[-1][0]):
            ahead.pop()
        elif fence and not inside_code:
            is_code = fence[1][0] != ":" and bool(CODE.match(fence[2]))
            ahead.append((fence[1], is_code))
            inside_code = is_code
        if not inside_code:
            kept.append(line)
    return "\n".join(kept)


@dataclass(frozen=True)
class Directive:
    """`{name} argument` with its `:option: value` lines."""

    name: str
    argument: str
    options: dict[str, str]


def directives(markdown: str) -> list[Directive]:
    """The MyST directives of a text, in order."""
    return [
        Directive(name, argument.strip(), dict(re.findall(r":([\w-]+): *(.*)", options)))
        for name, argument, options in DIRECTIVE.findall(unfenced(markdown))
    ]


def modules(node: ast.AST) -> list[str]:
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def definitions(tree: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    """The functions and classes that a module or a cell defines at its top level."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node for node in tree.body if isinstance(node, kinds)]


def undescribed(markdown: str) -> list[str]:
    """The pictures of a text that lack a description of 20 characters."""
    text = unfenced(markdown)
    described = [(target, alt) for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)", text)]
    for tag in re.findall(r"<img\b[^>]*>", text):
        alt = re.search(r"\balt=[\"']([^\"']*)", tag)
        described.append((tag[:60], alt[1] if alt else ""))
    for directive in directives(text):
        if directive.name in {"image", "figure"}:
            described.append((directive.argument, directive.options.get("alt", "")))
    return [f"alt text {alt!r} of {image}, 20 characters do" for image, alt in described if len(alt) < 20]

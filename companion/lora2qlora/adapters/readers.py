"""Linear layers whose weight a model multiplies with itself, instead of calling the layer. Chapter 04.

An adapter over such a layer would be passed by without a word: nn.MultiheadAttention hands
`self.out_proj.weight` to a function, Mamba's fused kernel takes `self.out_proj.weight`. They are found in the
source of the forward passes. A weight that is asked for its dtype or device only is no multiplication.
"""

import ast
import inspect
import textwrap
from functools import cache

from torch import nn

# What may be asked of a weight, or done with it, without its numbers.
HARMLESS = """dtype device shape size dim ndim numel element_size requires_grad is_cuda is_meta layout
    isinstance hasattr getattr type id len to type_as zeros_like ones_like empty_like""".split()
# What a condition may consist of, beside attributes of `self`, to be judged when an adapter is added.
FIXED = (ast.Name, ast.Constant, ast.BoolOp, ast.UnaryOp, ast.Compare, ast.boolop, ast.unaryop, ast.cmpop)
FIXED += (ast.expr_context,)
Path = tuple[str, ...]


def read_directly(model: nn.Module) -> dict[int, str]:
    """The class that multiplies with its weight, for each such module below the model, by the module's id."""
    found = {}
    for module in model.modules():
        for path, conditions in _reads(type(module)) if module._modules else ():
            if all(_holds(test, module) in (wanted, None) for test, wanted in conditions):
                found |= {id(child): type(module).__name__ for child in _follow(module, path)}
    return found


def _follow(module: nn.Module, path: Path) -> list[nn.Module]:
    """The modules at a path of attributes, where * is any child."""
    modules = [module]
    for part in path:
        nested = [list(m.children()) if part == "*" else [m._modules.get(part)] for m in modules]
        modules = [m for children in nested for m in children if m is not None]
    return modules


@cache
def _reads(kind: type) -> list[tuple[Path, list]]:
    """Where the modules are whose weight a class's forward pass multiplies with, each with its conditions."""
    found, seen, waiting = [], set(), ["forward"]
    for name in waiting:
        for owner in kind.__mro__[: kind.__mro__.index(nn.Module)] if name not in seen else ():
            function = vars(owner).get(name)
            function = inspect.unwrap(getattr(function, "fget", getattr(function, "__func__", function)))
            if inspect.isfunction(function):
                reader = _Reader(function)
                found += reader.found
                waiting += reader.asked
                if "super" not in function.__code__.co_names:
                    break
        seen.add(name)
    return found


class _Reader(ast.NodeVisitor):
    """Walks one method: `asked` is what it reads of `self`, `found` the weights that it multiplies with."""

    def __init__(self, function):
        self.found, self.asked, self.conditions, self.parents, self.aliases = [], [], [], [], {}
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        except (OSError, SyntaxError):  # written in no file: nothing can be said
            return
        if getattr(tree, "args", None) and tree.args.args:
            self.aliases[tree.args.args[0].arg] = ()
            self.generic_visit(tree)

    def path(self, node: ast.AST) -> Path | None:
        """Where a module is, seen from `self`, if an expression says so by attributes, indices and names."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id)
        if isinstance(node, ast.Attribute | ast.Subscript):
            start = self.path(node.value)
            return None if start is None else (*start, node.attr if isinstance(node, ast.Attribute) else "*")
        return None

    def visit(self, node: ast.AST) -> None:
        self.parents.append(node)
        super().visit(node)
        self.parents.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        path = self.path(node.value)
        if path is not None and isinstance(node.targets[0], ast.Name):
            self.aliases[node.targets[0].id] = path

    def visit_For(self, node: ast.For) -> None:
        path = self.path(node.iter)
        if path is not None and isinstance(node.target, ast.Name):
            self.aliases[node.target.id] = (*path, "*")
        self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        for branch, wanted in ((node.body, True), (node.orelse, False)):
            self.conditions.append((node.test, wanted))
            for child in branch if isinstance(branch, list) else [branch]:
                self.visit(child)
            self.conditions.pop()

    visit_IfExp = visit_If

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self.path(node)
        if path and len(path) == 1:
            self.asked.append(path[0])
        is_read = path and len(path) > 1 and path[-1] == "weight" and isinstance(node.ctx, ast.Load)
        if is_read and not self.is_harmless():
            self.found.append((path[:-1], list(self.conditions)))
        self.generic_visit(node)

    def is_harmless(self) -> bool:
        """Whether what is done with the expression that is being visited leaves its numbers alone."""
        for node in reversed(self.parents[:-1]):
            if isinstance(node, ast.Attribute) and node.attr == "data":
                continue
            if isinstance(node, ast.Compare):
                return all(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops)
            called = node.func if isinstance(node, ast.Call) else node
            return getattr(called, "attr", getattr(called, "id", None)) in HARMLESS
        return False


def _holds(test: ast.expr, module: nn.Module) -> bool | None:
    """Whether a condition on the plain attributes of `self` holds; None where that cannot be said."""
    for node in ast.walk(test):
        is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if not isinstance(node, FIXED) and not (is_own and node.attr != "training"):
            return None
        if isinstance(node, ast.Name) and node.id != "self":
            return None
    try:
        return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), {}, {"self": module}))
    except (AttributeError, TypeError):
        return None

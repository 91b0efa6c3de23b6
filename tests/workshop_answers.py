"""A solution's own assertions and printed lines, as checks that do not give the answer away.

`x == 44` becomes a hash of 44; `0.5 < x < 0.6` the hashes of its steps; `a < b` the hash of the sign; a
printed line the hash of its text. What is left in clear compares two things that a learner has.
"""

import ast

import workshop_checks

STEPS = 8  # into which a range is cut, at least
SIGNS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
PLAIN = (
    ast.Constant,
    ast.UnaryOp,
    ast.BinOp,
    ast.Tuple,
    ast.List,
    ast.Set,
    ast.Dict,
    ast.operator,
    ast.unaryop,
)


def constant(node: ast.expr):
    """(True, value) of an expression of literals alone, else (False, None)."""
    if not all(isinstance(n, (*PLAIN, ast.expr_context)) for n in ast.walk(node)):
        return False, None
    return True, eval(compile(ast.Expression(node), "literal", "eval"), {"__builtins__": {}})


def loads(node: ast.AST) -> set[str]:
    """The names that some code reads."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def stores(statement: ast.stmt) -> set[str]:
    """The names that a statement leaves behind; a comprehension leaves none."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(a.asname or a.name).split(".")[0] for a in statement.names}
    inner = {
        id(n)
        for c in ast.walk(statement)
        if isinstance(c, ast.comprehension | ast.Lambda | ast.FunctionDef)
        for n in ast.walk(c)
    }
    names = (n for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return {n.id for n in names if id(n) not in inner}


def is_print(statement: ast.stmt) -> bool:
    """Whether this is print(...)."""
    call = getattr(statement, "value", None) if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func) == "print"


def is_check(statement: ast.stmt) -> bool:
    """Whether a statement asserts; a loop does not, since it tells too much of the way."""
    called = ast.unparse(statement.value.func) if _is_call(statement) else ""
    return isinstance(statement, ast.Assert) or called.endswith("assert_close")


def of_the_end(tests: list[ast.stmt]) -> list[ast.stmt]:
    """The tests, or none where one denies another: they stand between steps, and are checked at the end."""
    texts = {ast.unparse(line).removeprefix("assert ") for line in tests}
    return [] if any(f"not {text}" in texts for text in texts) else tests


def asserted(body: list[ast.stmt]) -> set[str]:
    """The names that assertions at any depth read."""
    found = (n for line in body for n in ast.walk(line) if isinstance(n, ast.stmt) and is_check(n))
    return set().union(set(), *map(loads, found))


def _is_call(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)


def hidden(statement: ast.stmt) -> list[str]:
    """The lines that check what an assertion asserts; in a loop or a call, the assertion itself."""
    if not isinstance(statement, ast.Assert):
        return [ast.unparse(statement)]
    test = statement.test
    if not isinstance(test, ast.Compare):
        return [_call("expect", test, "")]
    terms = [test.left, *test.comparators]
    pairs = list(zip(terms, test.ops, terms[1:], strict=False))
    if len(pairs) == 2 and (line := _range(pairs)):
        return [line]
    known = [constant(t)[1] for t in terms if constant(t)[0]]
    if known and all(isinstance(op, ast.Eq) for op in test.ops):
        return [_call("same", t, repr(_hash(t, known[0]))) for t in terms if not constant(t)[0]]
    return [_pair(*pair) for pair in pairs]


def _pair(left: ast.expr, op: ast.cmpop, right: ast.expr) -> str:
    """One comparison."""
    text = f"{ast.unparse(left)} against {ast.unparse(right)}"
    if sign := SIGNS.get(type(op)):
        answers = [workshop_checks.secret(text, s) for s in sign]
        return f"check.order({text!r}, {ast.unparse(left)}, {ast.unparse(right)}, {answers})"
    return _call("expect", ast.Compare(left, [op], [right]), "")


def _range(pairs: list) -> str:
    """`low < x < high` with numbers at both ends."""
    (low_node, first, x), (_, second, high_node) = pairs
    (is_low, low), (is_high, high) = constant(low_node), constant(high_node)
    if not (is_low and is_high) or not {type(first), type(second)} <= {ast.Lt, ast.LtE} or low == 0:
        return ""
    step = float(f"{(high - low) / STEPS:.0e}")
    answers = [_hash(x, k) for k in range(int(low // step), int(high // step) + 1)]
    return _call("within", x, f"{step}, {sorted(answers)}")


def _hash(term: ast.expr, value) -> str:
    return workshop_checks.secret(ast.unparse(term), value)


def _call(name: str, term: ast.expr, rest: str) -> str:
    text = ast.unparse(term)
    return f"check.{name}({', '.join(filter(None, [repr(text), text, rest]))})"


def printed(label: str, prints: list[ast.stmt], output: str) -> list[str]:
    """The solution's printed lines, compared with the hash of what it printed."""
    if not prints or not output.strip() or not set().union(*map(loads, prints)) - {"print"}:
        return []
    answer = workshop_checks.secret(label, output.strip())
    return [f"with check.says({label!r}, {answer!r}):", *(f"    {ast.unparse(p)}" for p in prints)]

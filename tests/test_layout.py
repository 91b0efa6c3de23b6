"""The layout: the root, the README's tree, the floors of the package, chapter ↔ room ↔ test.

A rule takes a repository's root and returns a list of problems; `test_book_checks.py` proves that
each can fail.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from book_checks import unsafe_loading
from book_notebook import read_chapter
from book_repository import repository_files

ROOT = Path(__file__).resolve().parents[1]
TOP = {"book", "companion", "tests", "_config.yml", "_toc.yml", "environment.yml", "pyproject.toml"}
TOP |= {"Makefile", "LICENSE", "README.md", "CITATION.cff", "CHANGELOG.md"}
# The fields that a citation file may have, by the schema of CFF 1.2.0; the first four it must have.
CFF = ("cff-version", "message", "title", "authors")
CFF_MAY = ("abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license")
CFF_MAY += ("license-url", "preferred-citation", "references", "repository", "repository-artifact")
CFF_MAY += ("repository-code", "type", "url", "version")
FORM_PARTS = {"markdown", "input", "textarea", "dropdown", "checkboxes"}
# The images in which a workflow's job may run: the one that Colab publishes.
IMAGES = ("us-docker.pkg.dev/colab-images/public/runtime:latest",)
# A room imports only rooms that stand before it.
ROOMS = ("low_rank", "lora", "adapters", "blockwise", "nf4", "double_quantization", "qlora")
ROOMS += ("memory", "optimizers", "fast", "serving", "sharding", "variants")
# The rooms that are folders. A file there imports rooms above, and files of its folder that stand before it.
FOLDERS = {
    "adapters": (
        "names", "patterns", "readers", "targets", "checks", "model", "merging",
        "base_name", "peft_types", "peft_config", "folder", "peft_files",
    ),
    "nf4": ("codebook", "weight"),
    "qlora": ("state", "checks", "layer", "model"),
    "memory": (
        "config", "families", "shape", "presets", "base", "methods", "ledger", "divided", "tape", "linears",
        "norms", "attention", "block", "ranks", "step", "prediction", "tracker", "simulation", "static",
        "traffic",
    ),
    "optimizers": ("adam", "checks", "adamw_8bit", "state_file", "paging"),
    "fast": ("operators", "inputs", "library", "adam", "triton_kernels", "weights"),
    "serving": (
        "folders", "batched", "gguf_names", "gguf_shape", "gguf_tokenizer", "gguf_file", "gguf_adapter",
        "gguf", "llama_child", "server",
    ),
    "sharding": ("parameters", "checks", "model"),
    "variants": ("model", "rslora", "lora_plus", "dora", "pissa", "loftq", "eva"),
}  # fmt: skip
# A file of lab imports rooms, and files of lab that stand before it.
LAB = ("terminal", "sources", "cache", "conversion", "profiles", "in_place", "model_folder", "models")
LAB += ("tasks", "guards", "batches", "scores", "training", "chat_rows", "chat_file")
LAB += ("chat_split", "chat", "output_folder", "measured", "run_card", "checkpoints", "noise", "notebook")
LAB += ("machine", "installed", "check")
NOT_PYTHON = {"lab": {"data", "records"}, "fast": {"fast.cpp"}}
CLOCKS = re.compile(r"(time|perf_counter|process_time|thread_time|monotonic)(_ns)?")
# Chapter by chapter, the room it is about; None where the book has none.
CHAPTERS = {
    "00_quickstart": "lab",
    "01_low_rank": "low_rank",
    "02_updates_are_low_rank": "low_rank",
    "03_lora": "lora",
    "04_adapters": "adapters",
    "05_rank_across_tasks": None,
    "06_blockwise": "blockwise",
    "07_nf4": "nf4",
    "08_double_quantization": "double_quantization",
    "09_quantization_quality": None,
    "10_qlora": "qlora",
    "11_memory": "memory",
    "12_optimizers": "optimizers",
    "13_qlora_on_a_gpu": None,
    "14_fast": "fast",
    "15_merging": "adapters",
    "16_serving": "serving",
    "17_many_gpus": "sharding",
    "18_variants": "variants",
    "19_lora_versus_qlora": None,
    "20a_faq_training": None,
    "20b_faq_memory": None,
    "20c_faq_files": None,
}


def _package(root: Path) -> Path:
    return root / "companion" / "lora2qlora"


def _sources(root: Path) -> list[Path]:
    return sorted((root / "companion").rglob("*.py"))


def root_entries(root: Path) -> list[str]:
    """The root holds the entries of TOP and dot-files, and nothing else."""
    found = {path.relative_to(root).parts[0] for path in repository_files(root)}
    stray = {name for name in found - TOP if not name.startswith(".")}
    problems = [f"{name}: does not belong in the root" for name in sorted(stray)]
    return problems + [f"{name}: missing from the root" for name in sorted(TOP - found)]


def readme_tree(root: Path) -> list[str]:
    """The tree in README.md names all of TOP, and nothing that is not there.

    The tree is the first code block with a line that starts with `book/`. Names stand in columns,
    two spaces or more apart, before the words that explain them; an indented line is inside the
    last directory less indented.
    """
    named = list(_tree((root / "README.md").read_text(encoding="utf-8")))
    problems = [
        f"README.md: the tree names {name}, which is not there"
        for name in named
        if not (root / name).exists()
    ]
    missing = {name for name in TOP if (root / name).exists()} - {name.rstrip("/") for name in named}
    return problems + [f"README.md: the tree does not name {name}" for name in sorted(missing)]


def _tree(readme: str) -> Iterator[str]:
    """The paths that the README's tree names."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, re.M | re.S)
    block = next((text for text in blocks if re.search(r"^\W*book/(\s|$)", text, re.M)), "")
    parents = []
    for line in re.sub("[│├└─]", " ", block).splitlines():
        indent = len(line) - len(line.lstrip())
        parents = [(depth, path) for depth, path in parents if depth < indent]
        base = parents[-1][1] if parents else ""
        for name in re.split(r"\s{2,}", line.strip()):
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", name) or not re.search(
                r"[./]|^Makefile$|^LICENSE$", name
            ):
                break
            yield base + name
            if name.endswith("/"):
                parents.append((indent, base + name))


def package_files(root: Path) -> list[str]:
    """The package holds lab and rooms, as files or as folders; a folder holds its files, and all of them."""
    package, files = _package(root), {f"{room}.py" for room in ROOMS if room not in FOLDERS}
    allowed = {package: {"__init__.py", "lab", *FOLDERS, *files}}
    required = [package / "__init__.py"]
    for folder, names in {"lab": LAB, **FOLDERS}.items():
        modules = {f"{name}.py" for name in ("__init__", *names)}
        allowed[package / folder] = modules | NOT_PYTHON.get(folder, set())
        if folder == "lab" or (package / folder).exists():
            required += sorted(package / folder / module for module in modules)
    problems = [f"{path.relative_to(root)}: missing" for path in required if not path.exists()]
    for path in repository_files(root):
        for folder, names in allowed.items():
            if path.is_relative_to(folder) and path.relative_to(folder).parts[0] not in names:
                problems.append(f"{path.relative_to(root)}: not a part of the package's layout")
    return problems


def data_is_packaged(root: Path) -> list[str]:
    """What is no module in the package is package data in pyproject.toml; a wheel lacks it otherwise."""
    tool = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get("tool", {})
    listed = tool.get("setuptools", {}).get("package-data", {})
    patterns = [
        (root / "companion" / Path(*package.split(".")) / pattern).as_posix()
        for package, found in listed.items()
        for pattern in found
    ]
    return [
        f"{path.relative_to(root)}: is in no package-data of pyproject.toml"
        for path in repository_files(root)
        if path.is_relative_to(_package(root)) and path.suffix != ".py" and not any(map(path.match, patterns))
    ]


def floors(root: Path) -> list[str]:
    """A room imports only rooms above it, a file in a folder also files before it; no room imports lab."""
    problems = []
    for place, allowed in _plan():
        path = _package(root) / f"{place}.py"
        for name in _imports(root, path) if path.exists() else ():
            if name not in allowed and name.split(".")[0] not in allowed:
                problems.append(
                    f"{path.relative_to(root)}: imports {name or 'the package'}, allowed are {allowed}"
                )
    return problems


def _plan() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every module and what it may import: rooms, and `room.file` of its own folder."""
    yield "__init__", ROOMS
    for i, room in enumerate(ROOMS):
        yield room, ROOMS[:i]
        files = tuple(f"{room}.{name}" for name in FOLDERS.get(room, ()))
        for j, file in enumerate(files):
            yield file.replace(".", "/"), ROOMS[:i] + files[:j]
        yield f"{room}/__init__", ROOMS[:i] + files
    files = tuple(f"lab.{name}" for name in LAB)
    for j, file in enumerate(files):
        yield file.replace(".", "/"), ROOMS + files[:j]


def _imports(root: Path, path: Path) -> Iterator[str]:
    """What a module of lora2qlora imports from lora2qlora: `lora.LoRALinear`, `memory.tape`, `lab`, or ""."""
    package = path.relative_to(root / "companion").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        dotted = []
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = package[: len(package) + 1 - node.level] if node.level else ()
            start = ".".join([*inside, *([node.module] if node.module else [])])
            dotted = [f"{start}.{alias.name}" for alias in node.names]
        for name in dotted:
            top, *rest = name.split(".")
            if top == "lora2qlora":
                yield ".".join(rest[:2])


def rooms_have_tests(root: Path) -> list[str]:
    """Each room and each module of lab has its tests/test_<name>.py."""
    modules = [*_package(root).glob("*.py"), *(_package(root) / "lab").glob("*.py")]
    modules += [_package(root) / room for room in FOLDERS if (_package(root) / room).exists()]
    return [
        f"tests/test_{module.stem}.py: missing, {module.relative_to(root)} has no test"
        for module in sorted(modules)
        if module.stem != "__init__" and not (root / "tests" / f"test_{module.stem}.py").exists()
    ]


def chapters_have_rooms(root: Path) -> list[str]:
    """Each notebook is a chapter of the plan; its room exists, and the chapter imports it."""
    problems = []
    for path in sorted((root / "book").glob("[!._]*.ipynb")):
        if path.stem not in CHAPTERS:
            problems.append(f"{path.relative_to(root)}: not in the plan of chapters")
            continue
        room = CHAPTERS[path.stem]
        if room is None:
            continue
        if not (_package(root) / room).exists() and not (_package(root) / f"{room}.py").exists():
            problems.append(f"{path.relative_to(root)}: its room {room} is missing")
        source = "\n".join(cell.source for cell in read_chapter(path).code)
        if not re.search(rf"\b(lora2qlora\.{room}\b|from lora2qlora import .*\b{room}\b)", source):
            problems.append(f"{path.relative_to(root)}: does not import its room lora2qlora.{room}")
    return problems


def safe_sources(root: Path) -> list[str]:
    """No pickle, no torch.load, no trust_remote_code in the package and its experiments."""
    return [
        f"{path.relative_to(root)}: {reason}"
        for path in _sources(root)
        for reason in unsafe_loading(ast.parse(path.read_text(encoding="utf-8")))
    ]


def file_sizes(root: Path) -> list[str]:
    """A module of the package has at most 200 lines, a script of an experiment at most 300."""
    problems = []
    for path in _sources(root):
        most = 200 if path.is_relative_to(_package(root)) else 300
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > most:
            problems.append(f"{path.relative_to(root)}: {lines} lines, at most {most}")
    return problems


def function_sizes(root: Path) -> list[str]:
    """A function has at most 40 lines below its docstring, and a docstring at most 15."""
    problems = []
    for path in _sources(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            where = f"{path.relative_to(root)}: {node.name}"
            documented = len((ast.get_docstring(node) or "").splitlines())
            body = (
                node.end_lineno - node.body[bool(documented)].lineno + 1
                if len(node.body) > bool(documented)
                else 0
            )
            if documented > 15:
                problems.append(f"{where}: docstring of {documented} lines, at most 15")
            if body > 40:
                problems.append(f"{where}: {body} lines, at most 40")
    return problems


def no_clock_in_tests(root: Path) -> list[str]:
    """No test reads a clock: on a busy machine it would fail. Count the work; `make bench` takes times."""
    problems = []
    for path in sorted((root / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "time":
                names = [node.attr]
            problems += [f"{path.relative_to(root)}: reads time.{n}" for n in names if CLOCKS.fullmatch(n)]
    return problems


def failures_in_pipes_count(root: Path) -> list[str]:
    """A recipe with a pipe begins with `set -o pipefail;`: make 3.81 reads no .SHELLFLAGS."""
    text = (root / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    problems = []
    for line in text.splitlines():
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line).replace("||", "")
        if line.startswith("\t") and "|" in bare and not re.match(r"\t@?set -o pipefail;", line):
            problems.append(f"Makefile: {line.strip()[:60]!r} has a pipe and no 'set -o pipefail;' before it")
    if re.search(r"^\.(SHELLFLAGS|ONESHELL)\b", text, re.M):
        problems.append("Makefile: .SHELLFLAGS or .ONESHELL, which make 3.81 does not read")
    return problems


def workflows_call_make(root: Path) -> list[str]:
    """A workflow runs targets of the Makefile only, may only read, and pins actions to a version.

    A job's container is from IMAGES.
    """
    targets = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.M)
    problems = []
    for path in sorted((root / ".github" / "workflows").glob("*.yml")):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        wrong = [s["run"] for s in steps if "run" in s and s["run"] not in {f"make {t}" for t in targets}]
        wrong += [
            s["uses"] for s in steps if "uses" in s and not re.fullmatch(r"actions/[\w-]+@v\d+", s["uses"])
        ]
        jobs = workflow["jobs"].values()
        wrong += [f"container {c}" for job in jobs if (c := job.get("container")) not in (None, *IMAGES)]
        if workflow.get("permissions") != {"contents": "read"}:
            wrong.append("permissions, expected contents: read (a job may ask for more)")
        problems += [f"{path.relative_to(root)}: {it}" for it in wrong]
    return problems


def citation(root: Path) -> list[str]:
    """CITATION.cff has the fields of CFF 1.2.0, and the title and the version that stand elsewhere."""
    read = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    title = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["title"]
    changes = re.search(r"^## (\S+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    wrong = [f"no {field}" for field in CFF if not read.get(field)]
    wrong += [f"{field} is no field of CFF" for field in read if field not in (*CFF, *CFF_MAY)]
    for field, wanted in {"cff-version": "1.2.0", "title": title, "version": project["version"]}.items():
        if read.get(field) != wanted:
            wrong.append(f"{field} is {read.get(field)!r}, expected {wanted!r}")
    if read.get("type", "software") not in ("software", "dataset"):
        wrong.append(f"type {read['type']!r}, expected software or dataset")
    people = [author for author in read.get("authors") or [] if isinstance(author, dict)]
    if any(not {"name", "family-names", "given-names", "alias"} & set(author) for author in people):
        wrong.append("an author without a name")
    problems = [f"CITATION.cff: {it}" for it in wrong]
    if not changes or changes[1] != project["version"]:
        problems.append(f"CHANGELOG.md: its first heading must be ## {project['version']}")
    return problems


def issue_forms(root: Path) -> list[str]:
    """Each form for issues is one that GitHub can show; one asks for what `lora2qlora.lab.check` prints."""
    problems, asked = [], False
    for path in sorted((root / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        wrong = [f"no {field}" for field in ("name", "description", "body") if not form.get(field)]
        parts = form.get("body") or []
        names = [part["id"] for part in parts if "id" in part]
        wrong += [f"a part of type {part['type']!r}" for part in parts if part["type"] not in FORM_PARTS]
        wrong += [f"two parts called {name}" for name in set(names) if names.count(name) > 1]
        wrong += ["a part without a label" for part in parts if not part.get("attributes", {}).get("label")]
        problems += [f"{path.relative_to(root)}: {it}" for it in wrong]
        asked |= bool(parts) and "lora2qlora.lab.check" in str(parts[0])
    return problems if asked else [*problems, ".github/ISSUE_TEMPLATE: no form asks for lab.check first"]


RULES = (
    root_entries, readme_tree, package_files, data_is_packaged, floors, rooms_have_tests, chapters_have_rooms,
    safe_sources, file_sizes, function_sizes, no_clock_in_tests, failures_in_pipes_count, workflows_call_make,
    citation, issue_forms,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps(rule):
    problems = rule(ROOT)
    assert not problems, "\n".join(["", rule.__doc__, *problems])


def import_alone(statement: str) -> set[str]:
    """The top modules that a fresh Python has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_is_light():
    assert import_alone("import lora2qlora") - import_alone("pass") == {"lora2qlora"}


def test_importing_the_rooms_loads_torch_and_no_library_of_models():
    heavy = {"transformers", "datasets", "peft", "bitsandbytes", "accelerate", "matplotlib"}
    loaded = import_alone("import " + ", ".join(f"lora2qlora.{room}" for room in ROOMS))
    assert "torch" in loaded
    assert not heavy & loaded


def test_a_heavy_import_would_be_seen():
    assert "json" in import_alone("import json.decoder")

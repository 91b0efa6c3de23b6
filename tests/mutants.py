"""Mutants: plant one small defect at a time in a room, and see whether the room's tests notice.

`python tests/mutants.py [--room nf4] [--sample 200] [--seed 1] [--again]`; `make mutants` brings its tools.
A sample whose survivors were killed says nothing of the rest: the share is then that of another seed.
The defects are mutmut's (its operators on libcst's trees) and two of our own: a call that stands alone
and a `raise` are left out. mutmut's runner does not fit here: it expects `src/`, passes over decorated
functions (`merge`, `step`, cached tables), and its trampolines hide sources that tests and Triton read.

No mutants are made of annotations (jaxtyping's shapes), docstrings, decorators and imports, nor of the
words of an error: `raise` is taken whole, as tests match the words that matter. A string is changed once.
mutants_equivalent.toml lists what no test can tell from the original, each with its reason.
"""

import argparse
import ast
import contextlib
import difflib
import json
import math
import os
import random
import sys
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "companion" / "lora2qlora"
EQUIVALENT = ROOT / "tests" / "mutants_equivalent.toml"
RESULTS = ROOT / "_build" / "mutants"
LEAST = 0.95
ROOMS = ("low_rank", "lora", "adapters", "blockwise", "nf4", "double_quantization", "qlora")
ROOMS += ("memory", "optimizers", "fast", "serving", "sharding", "variants")


@dataclass(frozen=True)
class Mutant:
    """A defect: the lines that go and come, the function they are in, and the whole file with it."""

    file: str  # relative to the package
    function: str  # dotted, "" at the top of a module
    old: str
    new: str
    lines: tuple[int, int]  # of the statement, first and last
    code: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What stays the same when other lines of the file change."""
        return self.file, self.function, self.old, self.new


def files_of(room: str, package: Path = PACKAGE) -> list[Path]:
    """The Python files of a room."""
    path = package / f"{room}.py"
    return [path] if path.exists() else sorted((package / room).glob("*.py"))


def mutants_of(path: Path, package: Path = PACKAGE) -> list[Mutant]:
    """All mutants of a file that are valid Python and mean something else than it and each other."""
    from mutants_places import places

    source = path.read_text(encoding="utf-8")
    found = {ast.dump(ast.parse(source)): None}  # 3.4e38 and 3.4e+38 are the same
    for code, function, lines in places(source):
        with contextlib.suppress(SyntaxError):
            meaning = ast.dump(ast.parse(code))
            old, new = changed_lines(source, code)
            found.setdefault(meaning, Mutant(str(path.relative_to(package)), function, old, new, lines, code))
    return list(filter(None, found.values()))


def changed_lines(source: str, code: str) -> tuple[str, str]:
    """The lines that only the one and only the other has, stripped and joined by newlines."""
    old, new = source.splitlines(), code.splitlines()
    diff = list(difflib.unified_diff(old, new, n=0, lineterm=""))[2:]
    return tuple("\n".join(line[1:].strip() for line in diff if line.startswith(sign)) for sign in "-+")


def equivalents(path: Path = EQUIVALENT) -> dict[tuple[str, str, str, str], str]:
    """The keys of the listed mutants, each with its reason; an entry has one reason for several `new`."""
    listed = tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", [])
    return {(m["file"], m["function"], m["old"], new): m["reason"] for m in listed for new in m["new"]}


def stale(listed: dict[tuple[str, str, str, str], str], package: Path = PACKAGE) -> list[str]:
    """Listed mutants whose lines are no longer in their function."""
    problems = []
    for file, function, old, _ in listed:
        path = package / file
        source = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = {line.strip() for line in lines_of(source, function)}
        if not old.strip() or not set(old.splitlines()) <= lines:
            problems.append(f"{file}: {function or 'the module'} has no longer {old!r}")
    return problems


def lines_of(source: str, function: str) -> list[str]:
    """The lines of a function given by its dotted name, or of the module for ""."""
    scope = ast.parse(source)
    for name in filter(None, function.split(".")):
        scope = next((n for n in ast.walk(scope) if getattr(n, "name", None) == name), ast.Module([], []))
    lines = source.splitlines()
    return lines if not function else lines[getattr(scope, "lineno", 1) - 1 : getattr(scope, "end_lineno", 0)]


def report(room: str, made: int, outcomes: dict[Mutant, str], listed: set) -> tuple[str, bool]:
    """A line of the table for a room, and whether its share reaches LEAST."""
    counts = Counter("equivalent" if m.key in listed else outcome for m, outcome in outcomes.items())
    told = len(outcomes) - counts["equivalent"]
    share = (counts["caught"] + counts["time-out"]) / told if told else 1.0
    left = 1 - len(outcomes) / made if made else 0.0  # of the mutants; a full run has no error
    error = math.sqrt(share * (1 - share) / told * left) if told else 0.0
    cells = (made, len(outcomes), *(counts[c] for c in ("caught", "time-out", "equivalent", "survived")))
    line = f"{room:20}" + "".join(f"{c:>11}" for c in cells) + f"{share:>10.1%}"
    return line + (f" ± {error:.1%}" if left else ""), share >= LEAST


def save(room: str, outcomes: dict[Mutant, str]) -> None:
    """Keep the outcomes under _build for the next look, and for --again."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = [{k: v for k, v in asdict(m).items() if k != "code"} | {"is": o} for m, o in outcomes.items()]
    (RESULTS / f"{room}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False), encoding="utf-8")


def survivors(room: str) -> set[tuple[str, str, str, str]]:
    """The keys of the mutants that survived the last run of a room."""
    kept = json.loads((RESULTS / f"{room}.json").read_text(encoding="utf-8"))
    return {(m["file"], m["function"], m["old"], m["new"]) for m in kept if m["is"] == "survived"}


def main() -> int:
    """Run, print the table and the survivors; 1 where a room is below LEAST or the list is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--room", choices=ROOMS, help="only this room")
    parser.add_argument("--sample", type=int, default=0, help="this many mutants a room, the same each time")
    parser.add_argument("--seed", type=int, default=0, help="another one gives another sample")
    parser.add_argument("--again", action="store_true", help="only the survivors of the last run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    from mutants_run import Workshop

    listed, good = equivalents(), True
    workshop, table = Workshop(ROOT, options.jobs), []
    for room in [options.room] if options.room else ROOMS:
        made = [m for path in files_of(room) for m in mutants_of(path)]
        if options.again:
            last = survivors(room)
            made = [m for m in made if m.key in last]
        few = options.sample and options.sample < len(made)
        some = random.Random(options.seed).sample(made, options.sample) if few else made
        outcomes = workshop.run(room, some)
        save(room, outcomes)
        line, enough = report(room, len(made), outcomes, set(listed))
        table.append(line)
        good = good and enough
        for m, outcome in outcomes.items():
            if (outcome == "survived") != (m.key in listed):
                what = f"listed as equivalent, but {outcome}" if m.key in listed else outcome
                print(f"\n{m.file}:{m.lines[0]} {m.function}: {what}\n- {m.old}\n+ {m.new}", flush=True)
        print(line, flush=True)
    heads = ("made", "tried", "caught", "time-out", "equivalent", "survived", "share")
    print("", f"{'room':20}" + "".join(f"{h:>{11 - (h == 'share')}}" for h in heads), *table, sep="\n")
    for problem in (problems := stale(listed)):
        print(problem)
    return 0 if good and not problems else 1


if __name__ == "__main__":
    sys.exit(main())

"""Does the book still work with the versions that readers have? `make drift` builds stacks and asks.

`python tests/drift.py [oldest] [colab] [newest] [--fresh]` builds each stack below .drift/, runs every
check in it with an empty model cache, stores the record, writes the tables of book/versions.md from it,
prints them, and exits 1 unless every check of every stack passed. `--here` checks the environment of the
Python that runs this, in which nothing is built. Standard library alone.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import drift_page
from drift_checks import CELL, Result, checks, environment, planned, run
from drift_record import entry, line, problems, store, table
from drift_stacks import FOLDER, Stack, build, copy_source, here, stacks

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).parent / "stacks" / "record.json"


def check(stack: Stack, root: Path, fresh: bool) -> dict:
    """Build a stack and run its checks: the stack's part of the record."""
    folder = root / FOLDER / stack.name
    results = dict.fromkeys(planned(stack.by_cell), Result(False, 0, "not run"))
    started = time.monotonic()
    try:
        python = prepare(stack, root, fresh)
    except (RuntimeError, OSError, ValueError) as error:
        results["environment"] = Result(False, time.monotonic() - started, str(error))
        return entry(stack, "", results)
    results["environment"] = Result(True, time.monotonic() - started)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    for name, command in checks(python, stack.by_cell).items():
        if name == CELL:  # it alone needs the network
            command = [*command, str(copy_source(root, folder / "source"))]
        log = folder / "logs" / f"{name.replace(' ', '_')}.log"
        results[name] = run(command, log, environment(folder, offline=name != CELL), root)
        print(line(stack.name, name, asdict(results[name])), flush=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return entry(stack, python, results)


def prepare(stack: Stack, root: Path, fresh: bool) -> str:
    """The interpreter of the stack's environment; RuntimeError with the log of what failed."""
    folder = root / FOLDER / stack.name
    log = folder.with_name(f"{stack.name}-build.log")

    def must(command: list[str]) -> None:
        print(f"{stack.name:8} {' '.join(command)[:100]}", flush=True)
        done = run(command, log, environment(folder, offline=False), root)
        if not done.passed:
            raise RuntimeError(f"{done.note} (see {log.relative_to(root)})")

    return build(root, stack, must, fresh)


def main(
    arguments: list[str] | None = None, root: Path = ROOT, path: Path = RECORD, checked: Callable = check
) -> int:
    """The command line; 1 unless every check of every stack asked for passed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = stacks(root)
    parser.add_argument("stacks", nargs="*", help=f"of {', '.join(known)}; all of them where none is named")
    parser.add_argument("--fresh", action="store_true", help="build the environments anew")
    parser.add_argument("--here", action="store_true", help="check the environment of this Python instead")
    given = parser.parse_args(arguments)
    if unknown := set(given.stacks) - set(known):
        parser.error(f"no stack {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    asked = [known[name] for name in given.stacks or known]
    if given.here:  # the record and the page are of the stacks that anyone can build
        asked, path = [here(root)], root / FOLDER / "here.json"
    record = {}
    for stack in asked:
        record[stack.name] = checked(stack, root, given.fresh)
        store({stack.name: record[stack.name]}, path)
    if not given.here:
        drift_page.write(root, path)
    wrong = problems(record, asked)
    print("", table(record), "", *([f"{len(wrong)} failed:", *wrong] if wrong else ["no drift"]), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

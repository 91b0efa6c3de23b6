"""Runs learners' notebooks as they are, or with the solutions put in, and records the seconds these take.

`python tests/workshop_run.py 00 03` prints them; `--record` keeps them in tests/workshop_seconds.json.
"""

import argparse
import json
import sys
from pathlib import Path

import nbformat
from book_notebook import read_chapter
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from workshop_kit import solved
from workshop_learner import learner

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "workshop_seconds.json"
CLOCK = "import os as _os\nprint(*_os.times()[:4])"  # of this process and its children


def run(notebook, timeout: int = 900) -> tuple[float, str]:
    """(CPU-seconds, "") of a whole run, or (0, what a cell stopped with)."""
    cells = [*notebook.cells, nbformat.v4.new_code_cell(CLOCK, id="clock")]
    copy = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    try:
        NotebookClient(copy, timeout=timeout, resources={"metadata": {"path": str(ROOT / "book")}}).execute()
    except CellExecutionError as error:
        at = next(c for c in copy.cells if any(o.output_type == "error" for o in c.get("outputs", [])))
        return 0.0, f"{error.ename}: {error.evalue}\nin cell {at.id}:\n{at.source[:300]}"
    return sum(map(float, copy.cells[-1].outputs[0]["text"].split())), ""


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 when a notebook does not run through."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("numbers", nargs="*", help="of chapters, as 00 or 20a; default: all")
    parser.add_argument("--record", action="store_true", help="keep the seconds")
    given = parser.parse_args(arguments)
    failed = False
    for path in sorted((ROOT / "book").glob("[0-9]*.ipynb")):
        number = path.name.split("_")[0]
        if given.numbers and number not in given.numbers:
            continue
        seconds, stopped = run(solved(*learner(read_chapter(path))))
        failed |= bool(stopped)
        print(f"{path.stem}: {stopped or f'{seconds:.0f} CPU-seconds'}", flush=True)
        if given.record and not stopped:
            kept = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
            kept[path.stem] = round(seconds)
            RECORD.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

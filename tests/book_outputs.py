"""Re-execute chapters and store their outputs: `python tests/book_outputs.py [book/NN.ipynb ...]`.

Two runs give the same bytes: no timings, no execution metadata, one kernelspec, streams joined.
A chapter whose run fails is left as it was. `--check` runs, compares, and writes nothing.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
BLACK_HOLE = "http://127.0.0.1:9"  # port 9 discards: whatever asks a proxy here gets nowhere
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
OFFLINE = {"HF_HUB_OFFLINE": "1", "no_proxy": "", "NO_PROXY": ""} | dict.fromkeys(PROXIES, BLACK_HOLE)
METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
CELL_METADATA = ("mystnb", "tags")


class ThisPython(KernelSpecManager):
    """Knows one kernel: the Python that runs this script."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The kernel of `sys.executable`, under any name."""
        launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        quiet = ["--IPKernelApp.log_level=ERROR"]  # else a notice on plain TCP, each time
        return KernelSpec(argv=launch + quiet, display_name="Python 3", language="python")


def execute(path: Path, timeout: int = 300, progress=lambda done, of: None) -> str:
    """The text of the notebook at `path` after a fresh run in its own folder.

    `progress` is called with the cells done and their number. Raises RuntimeError that names the
    cell which failed.
    """
    notebook = nbformat.read(path, as_version=4)
    cells = len(notebook.cells)
    current = [0]

    def started(cell, cell_index):
        current[0] = cell_index
        progress(cell_index, cells)

    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisPython()),
        timeout=timeout,
        startup_timeout=600,
        iopub_timeout=120,  # [s]; after the usual 4 a busy machine's outputs would be lost
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
        on_cell_start=started,
        resources={"metadata": {"path": str(path.parent)}},
    )
    with tempfile.TemporaryDirectory() as profile:  # no startup files, no history of the user's
        environment = os.environ | OFFLINE | {"IPYTHONDIR": profile}
        try:
            client.execute(cleanup_kc=True, env=environment)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise RuntimeError(_failure(path, notebook, current[0], error)) from error
    return clean(notebook)


def _failure(path: Path, notebook, index: int, error: Exception) -> str:
    """What failed, where, and what to do."""
    if isinstance(error, CellExecutionError):
        why = f"{error.ename}: {error.evalue}"
    elif isinstance(error, CellTimeoutError):
        why = "it ran past the time limit (--timeout, in seconds)"
    else:
        why = "the kernel died; is there enough memory?"
    source = "\n".join(f"    {line}" for line in notebook.cells[index].source.splitlines())
    return (
        f"{path.name} cell {index + 1} failed: {why}\n{source}\n"
        "  The file is unchanged. Mend the cell (make lab opens it) and run make outputs again."
    )


def clean(notebook) -> str:
    """The notebook as stable text: our metadata, the cells' tags and figures, nothing of a run."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in CELL_METADATA if key in cell.metadata}
        cell.metadata = nbformat.from_dict(kept)
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


def write(path: Path, text: str) -> None:
    """Replace `path` whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def difference(stored: str, fresh: str) -> str:
    """Names the first cell in which two notebooks differ, or "" when their bytes are equal."""
    if stored == fresh:
        return ""
    pair = [nbformat.reads(text, as_version=4) for text in (stored, fresh)]
    for number, (old, new) in enumerate(zip(*(one.cells for one in pair), strict=True), 1):
        parts = [part for part in new if old.get(part) != new[part]]
        if parts:
            return f"cell {number} differs in its {', '.join(parts)}"
    return "its notebook metadata or its formatting differs"


def bar(name: str):
    """A progress callback that rewrites one line on a terminal and is silent elsewhere."""

    def show(done: int, of: int) -> None:
        if sys.stdout.isatty():
            print(f"\r{name}: cell {done + 1} of {of} ", end="", flush=True)

    return show


def refresh(path: Path, timeout: int, check: bool) -> bool:
    """Run one chapter; store the result or, with `check`, compare. True when all is well."""
    started = time.monotonic()
    print(f"{path.name}: running ...", end="" if sys.stdout.isatty() else "\n", flush=True)
    try:
        stored = path.read_bytes().decode("utf-8")
        fresh = execute(path, timeout, bar(path.name))
    except (RuntimeError, OSError, nbformat.ValidationError) as error:
        print(f"\n{error}", file=sys.stderr)
        return False
    took = f"({time.monotonic() - started:.0f} s)"
    changed = difference(stored, fresh)
    if check and changed:
        print(f"\r{path.name}: {changed} from a fresh run; run make outputs {took}")
        return False
    if changed:
        write(path, fresh)
    print(f"\r{path.name}: {'outputs stored' if changed else 'the same bytes'} {took}")
    return True


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 when a chapter fails or, with --check, differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("chapters", nargs="*", type=Path, help="default: all of book/*.ipynb")
    parser.add_argument("--check", action="store_true", help="compare with a fresh run, store none")
    parser.add_argument("--timeout", type=int, default=300, help="seconds a cell may take")
    given = parser.parse_args(arguments)
    chapters = given.chapters or sorted((ROOT / "book").glob("[!.]*.ipynb"))
    done = [refresh(path.resolve(), given.timeout, given.check) for path in chapters]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What each stack must pass: the checks of `make drift`, in their order, and how one is run.

A check is a command that exits 0. Whatever cannot run has failed: a missing file, no test found, a test
skipped for a reason that is not in ALLOWED, a time limit. Standard library alone.
"""

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "companion" / "lora2qlora"
CELL = "Colab cell"
MINUTES = 60  # a check takes one to six where the machine does nothing else
NOTEBOOKS = ("00_quickstart", "04_adapters", "10_qlora", "13_qlora_on_a_gpu")
# Why a test may be skipped, in the words that pytest prints: what no stack of ours could change.
ALLOWED = ("needs a CUDA device", "AVX512-BF16 only")
BLACK_HOLE = "http://127.0.0.1:9"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "no_proxy": "", "NO_PROXY": ""}
OFFLINE |= {f"{kind}_proxy": BLACK_HOLE for kind in ("http", "https", "all")}
OFFLINE |= {f"{kind}_PROXY": BLACK_HOLE for kind in ("HTTP", "HTTPS", "ALL")}
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LORA2QLORA_PROFILE", "PYTEST_ADDOPTS")


@dataclass(frozen=True)
class Result:
    """How a check ended: `note` is pytest's count where it passed, and the first error where not."""

    passed: bool
    seconds: float
    note: str = ""


def rooms() -> list[str]:
    """The rooms of the package and the modules of its lab: each has its tests/test_<name>.py."""
    found = [*PACKAGE.iterdir(), *(PACKAGE / "lab").glob("*.py")]
    names = {path.stem for path in found if path.suffix == ".py" or (path / "__init__.py").exists()}
    return sorted(names - {"__init__", "lab"})


def checks(python: str, by_cell: bool) -> dict[str, list[str]]:
    """Each check's command, in the order in which they run."""
    # A library's warning is no drift; with the pinned versions, where every warning counts, it is an error.
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rfEs", "-W", "default"]
    lax = [*pytest, "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "3000"]
    cell = {CELL: [python, "tests/drift_inside.py", "cell"]} if by_cell else {}
    return {
        **cell,
        "imports": [python, "tests/drift_inside.py", "imports"],
        "fingerprint": [python, "tests/drift_inside.py", "fingerprint"],
        "unit tests": [
            *pytest,
            "-m",
            "not bench and not slow",
            *(f"tests/test_{name}.py" for name in rooms()),
        ],
        **{f"chapter {name[:2]}": [*lax, f"book/{name}.ipynb"] for name in NOTEBOOKS},
    }


def planned(by_cell: bool) -> list[str]:
    """The names of all checks of a stack, that of its environment first."""
    return ["environment", *checks("", by_cell)]


def environment(folder: Path, offline: bool = True) -> dict[str, str]:
    """The environment of a stack's commands: its own model cache, no packages of the caller's."""
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    kept |= {"LORA2QLORA_CACHE": str(folder / "cache"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return kept | OFFLINE if offline else kept


def run(command: list[str], log: Path, env: dict[str, str], root: Path, minutes: float = MINUTES) -> Result:
    """Run one command in `root`, its output in `log`; what it started ends with it."""
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=root, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(minutes * 60)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
    except OSError as error:
        return Result(False, time.monotonic() - started, f"could not run: {error}")
    text = log.read_bytes().decode("utf-8", "replace")
    if code is None:
        problem = f"ran past {minutes:g} minutes"
    elif code:
        problem = first_error(text)
    else:
        problem = skipped(text) or ("pytest" in command and not counted(text) and "no test was found")
    return Result(not problem, time.monotonic() - started, problem or counted(text))


def _end(process: subprocess.Popen) -> None:
    """Kernels and workers of a command that did not end by itself end here."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def counted(text: str) -> str:
    """pytest's last word, such as "257 passed, 3 skipped", or ""."""
    found = re.findall(r"^=*\s*((?:\d+ \w+, )*\d+ passed(?:, \d+ \w+)*) in ", text, re.M)
    return re.sub(r", \d+ deselected", "", found[-1]) if found else ""


def skipped(text: str) -> str:
    """The first test that was skipped for a reason of its own, or ""."""
    lines = re.findall(r"^SKIPPED (.+)$", text, re.M)
    return next((f"skipped {line}" for line in lines if not any(why in line for why in ALLOWED)), "")


def first_error(text: str) -> str:
    """The line that says best what went wrong: pytest's first failure, else the last line of all."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines() if line.strip()]
    # pytest adds the reason or not, by the terminal's width and by CI=true; what was raised says it better.
    told = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    raised = re.findall(
        r"^(?:E\s+)?([\w.]*(?:Error|Exception|Warning)\b(?!.*Traceback).*)$", "\n".join(lines), re.M
    )
    words = told[:1] + raised[:1] or lines[-1:] or ["no output"]
    return ": ".join(words)[:300]

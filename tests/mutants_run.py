"""Run a room's tests on its mutants: one process that has everything imported, and a fork for each mutant.

A fork works on a copy of the package in which one file is a mutant, and imports it anew, so that tables
made on import, cached values, sources and child processes are all the mutant's. It runs the tests that
reach the changed lines, the quickest first, and stops at the first that fails.
"""

import contextlib
import gc
import importlib
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import coverage
import pytest
from mutants_choice import Choice

PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not bench and not browser and not long")
PYTEST += ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # what is imported before the fork
# A compiler that keeps what it has made: the same source and flags give the same library.
COMPILER = """#!/bin/sh
for target; do :; done
for one; do [ "$one" = "$target" ] || flags="$flags $one"; done
key=$({{ echo "$flags"; cat {sources}; }} | sha256sum | cut -c 1-32)
[ -f "{folder}/$key" ] || {{ {compiler} "$@" && cp "$target" "{folder}/$$"; }} || exit 1
[ -f "{folder}/$key" ] || mv "{folder}/$$" "{folder}/$key"
cp "{folder}/$key" "$target"
"""
BROKEN = 70  # the exit status where this file fails, and not a test


class Workshop:
    """Copies of the package to break, and forks that test them."""

    def __init__(self, root: Path, jobs: int, patience: float = 20):
        self.root, self.jobs = root, jobs
        self.patience = patience  # [s] for a test, beside ten times what it took
        os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        sys.path.insert(0, str(root / "tests"))
        self.kept = tempfile.TemporaryDirectory(prefix="mutants-")  # as long as this object
        self.folder = Path(self.kept.name)
        self.slots = [self.folder / str(i) for i in range(jobs)]
        package = root / "companion" / "lora2qlora"
        for slot in self.slots:
            shutil.copytree(package, slot / "lora2qlora", ignore=shutil.ignore_patterns("lab", "__pycache__"))
            (slot / "lora2qlora" / "lab").symlink_to(package / "lab")

        self._keep_compiled()

    def _keep_compiled(self) -> None:
        """Let CXX, which fast asks for, compile the same once and not in each fork."""
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++")), None)
        sources = " ".join(map(str, self.slots[0].rglob("*.cpp")))
        if compiler and sources:
            script, kept = self.folder / "compiler", self.folder / "compiled"
            kept.mkdir()
            script.write_text(COMPILER.format(compiler=compiler, folder=kept, sources=sources))
            script.chmod(0o755)
            os.environ["CXX"] = str(script)

    def run(self, room: str, mutants: list) -> dict:
        """caught, time-out or survived for each mutant, by test_<room>.py and test_<room>_*.py."""
        tests = self.root / "tests"
        files = [str(p) for p in (tests / f"test_{room}.py", *sorted(tests.glob(f"test_{room}_*.py")))]
        seconds, lines, children = self._measure(files)
        self._check_unchanged(files, seconds)
        waiting, running, outcomes = list(mutants), {}, dict.fromkeys(mutants, "")
        progress = _Progress(room, len(mutants))
        while waiting or running:
            while waiting and len(running) < self.jobs:
                mutant = waiting.pop(0)
                slot = next(s for s in self.slots if s not in [busy for _, busy in running.values()])
                chosen = _reaching(mutant, lines, children, seconds)
                pid = self._fork(slot, mutant, files, chosen)
                running[pid] = mutant, slot
            self._collect(running, outcomes)
            progress.tell(len(mutants) - len(waiting) - len(running))
        return outcomes

    def _measure(self, files: list[str]) -> tuple[dict[str, float], dict, set[str]]:
        """Seconds of each test that passes, per file and line who reaches it, and who has child processes."""
        slot, kept = self.slots[0], self.folder / "measured"

        def work():
            sys.dont_write_bytecode = False  # compiled once, of the unchanged files, for all forks
            tracer = coverage.Coverage(data_file=None, source=[str(slot / "lora2qlora")], config_file=False)
            tracer.start()
            choice = Choice(tracer=tracer)
            sys.addaudithook(choice.audit)
            code = pytest.main([*PYTEST[1:], *files], plugins=[choice])
            tracer.stop()
            data, lines = tracer.get_data(), {}
            for path in data.measured_files():
                file = str(Path(path).relative_to((slot / "lora2qlora").resolve()))
                lines[file] = data.contexts_by_lineno(path)
            modules = [name for name in sys.modules if self._is_not_ours(name)]
            passed = {t: s for t, s in choice.seconds.items() if t not in choice.failed}
            kept.write_bytes(
                pickle.dumps((passed, choice.uses, lines, choice.parents, modules, choice.failed))
            )
            return 0 if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and passed else BROKEN

        if code := _wait(self._child(slot, work)):
            raise RuntimeError(f"counting lines failed ({code}):\n{(slot / 'log').read_text()[-2000:]}")
        seconds, uses, lines, parents, modules, failed = pickle.loads(kept.read_bytes())
        if failed:
            print("left out, as they fail while lines are counted:", *failed, sep="\n  ")
        _import_all(modules)
        lines = {file: _tests_of(at, seconds, uses) for file, at in lines.items()}
        return seconds, lines, _tests_of({0: parents}, seconds, uses)[0]

    def _is_not_ours(self, name: str) -> bool:
        """Whether a module lies outside of the package and the tests, whose helpers import the package."""
        file = getattr(sys.modules[name], "__file__", None) or ""
        return not name.startswith(("lora2qlora", "__")) and not file.startswith(str(self.root / "tests"))

    def _check_unchanged(self, files: list[str], seconds: dict[str, float]) -> None:
        """The package as it is passes in a fork; RuntimeError otherwise."""
        if code := _wait(self._fork(self.slots[0], None, files, seconds)):
            said = (self.slots[0] / "log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"tests fail without a mutant (pytest says {code}): {files}\n{said}")

    def _fork(self, slot: Path, mutant, files: list[str], chosen: dict[str, float]) -> int:
        """The pid of a child that tests one mutant, or none; without tests it ends as if all passed."""
        if mutant:
            broken = slot / "lora2qlora" / mutant.file
            broken.write_text(mutant.code, encoding="utf-8")

        def work():
            return pytest.main([*PYTEST, *files], plugins=[Choice(chosen, patience=self.patience)])

        return self._child(slot, work if chosen else lambda: 0)

    def _child(self, slot: Path, work: Callable[[], int]) -> int:
        """Fork, with the package of `slot` the one that is imported; the exit status is what work gives."""
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code = BROKEN
        try:
            os.setsid()
            gc.disable()
            sys.dont_write_bytecode = True  # else a mutant of the same second and size stays
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            log = os.open(slot / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(self.root)
            os.environ["PYTHONPATH"] = str(slot)
            sys.path.insert(0, str(slot))
            code = int(work())
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)

    def _collect(self, running: dict, outcomes: dict) -> None:
        """Wait for one; note how it ended, and mend its copy."""
        pid, status = os.wait()
        mutant, slot = running.pop(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # its own children
        code = os.waitstatus_to_exitcode(status)
        if code in (pytest.ExitCode.USAGE_ERROR, BROKEN):
            raise RuntimeError(f"could not run: {mutant.key}\n{(slot / 'log').read_text()[-2000:]}")
        outcomes[mutant] = {0: "survived", -signal.SIGALRM: "time-out"}.get(code, "caught")
        shutil.copy2(self.root / "companion" / "lora2qlora" / mutant.file, slot / "lora2qlora" / mutant.file)


def _reaching(mutant, lines: dict, children: set[str], seconds: dict[str, float]) -> dict[str, float]:
    """The tests that reach a mutant's lines; where none is seen to, those that may.

    These are the ones that reach the line above, as a tracer (torch.compile) runs lines that are not seen,
    and those with child processes.
    """
    first, last = mutant.lines
    at = lines.get(mutant.file, {})
    found = set().union(*(at.get(line, set()) for line in range(first, last + 1)))
    above = next((at[line] for line in range(first, 0, -1) if at.get(line)), set())
    return {test: seconds[test] for test in found or children | above}


def _tests_of(contexts: dict, seconds: dict[str, float], uses: dict) -> dict[int, set[str]]:
    """Per line the tests that reach it; what is run on import is reached by all."""
    users = defaultdict(set)
    for test in seconds:
        for fixture in uses[test]:
            users[fixture].add(test)
    all_tests = set(seconds)
    return {
        line: set().union(*(all_tests if c == "" else {c} & all_tests | users.get(c, set()) for c in names))
        for line, names in contexts.items()
    }


def _import_all(modules: list[str]) -> None:
    """Import what the tests import, so that no fork has to; what cannot be is left to them.

    RuntimeError where the package is among it: every mutant would survive.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules:
            with contextlib.suppress(BaseException):
                importlib.import_module(name)
    if any(name.startswith("lora2qlora") for name in sys.modules):
        raise RuntimeError("the package is imported before the forks: no mutant would be tested")
    gc.collect()
    gc.freeze()  # a fork need not look through what will stay


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class _Progress:
    """How far a room is: all the time on a terminal, once a minute elsewhere."""

    def __init__(self, room: str, of: int):
        self.room, self.of, self.start, self.told = room, of, time.monotonic(), time.monotonic()

    def tell(self, done: int) -> None:
        now, live = time.monotonic(), sys.stderr.isatty()
        if live or now - self.told > 60:
            self.told = now
            begin, end = ("\r", " ") if live else ("", "\n")
            text = f"{begin}{self.room}: {done} of {self.of}, {now - self.start:.0f} s"
            print(text, end=end, file=sys.stderr, flush=True)

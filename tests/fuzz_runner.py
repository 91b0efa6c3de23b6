"""Inputs by the thousand in a process of their own, which dies of an input that does not end. `make fuzz`.

A seed is an input: it names a target and all that is random about it. SEED=123 COUNT=1 tries that one again.
"""

import argparse
import contextlib
import faulthandler
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from fuzz_judge import PACKAGE, Trial, Verdict, judge, place

Targets = dict[str, Callable[[Random], Trial]]
MakeTargets = Callable[[Path], Targets]  # given a folder of their own
LIMITS = (2.0, 60.0)  # [s] for one input: of processor, which is just on a busy machine, and of wall


@dataclass
class Tally:
    """What happened to one target: how often each outcome, and each kind of failure with its first seeds."""

    outcomes: Counter = field(default_factory=Counter)
    failures: dict[str, list[int]] = field(default_factory=dict)  # kind -> all its seeds
    details: dict[str, str] = field(default_factory=dict)  # kind -> the first message

    def add(self, seed: int, verdict: Verdict) -> None:
        self.outcomes[verdict.outcome] += 1
        if verdict.failure:
            self.failures.setdefault(verdict.failure, []).append(seed)
            self.details.setdefault(verdict.failure, verdict.detail)


def trial_of(targets: Targets, seed: int) -> Trial:
    """The input of a seed, for the target whose turn it is."""
    name = list(targets)[seed % len(targets)]
    return targets[name](Random(f"{name} {seed}"))


def run(
    make_targets: MakeTargets, seeds: range, seconds: float = math.inf, limits=LIMITS
) -> dict[str, Tally]:
    """Try every seed, or as many as fit in `seconds` [s]; one that hangs or kills its worker is a failure."""
    tallies, start = {}, time.monotonic()
    for name, seed, verdict in verdicts(make_targets, seeds, limits):
        tallies.setdefault(name, Tally()).add(seed, verdict)
        if sys.stderr.isatty() and (seed - seeds.start) % 1000 == 0:
            print(f"\r{seed - seeds.start:,} of {len(seeds):,} inputs", end="", file=sys.stderr, flush=True)
        if time.monotonic() - start > seconds:
            break
    return tallies


def verdicts(make_targets: MakeTargets, seeds: range, limits=LIMITS) -> Iterator[tuple[str, int, Verdict]]:
    """(target, seed, verdict) of every seed, from as many processes as it takes, one after another."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_fast_folder()) as folder:
        targets = make_targets(Path(folder))
        names = list(targets)
        while seeds:
            for seed, verdict in _one_worker(targets, seeds, limits, Path(folder, "trace")):
                yield names[seed % len(names)], seed, verdict
                seeds = range(seed + 1, seeds.stop)


def _one_worker(targets: Targets, seeds: range, limits, trace: Path) -> Iterator[tuple[int, Verdict]]:
    """Verdicts from one process, until it is done or an input was its end."""
    trace.write_bytes(b"")
    here, there = multiprocessing.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12: torch has threads
        worker = multiprocessing.get_context("fork").Process(
            target=_work, args=(targets, seeds, limits[0], trace, there), daemon=True
        )
        worker.start()
    there.close()
    expected = seeds.start
    try:
        while expected < seeds.stop:
            if not here.poll(limits[1]):
                os.kill(worker.pid, signal.SIGPROF)  # it writes down where it was, and dies
            try:
                seed, verdict = here.recv()
            except EOFError:
                worker.join()
                yield expected, _end_of(worker.exitcode, trace)
                return
            expected = seed + 1
            yield seed, verdict
    finally:
        worker.kill()
        worker.join()


def _end_of(exit_code: int, trace: Path) -> Verdict:
    """What to call the end of a worker, with the place from the traceback that it left."""
    frames = re.findall(r'File "(.+)", line (\d+) in (\S+)', trace.read_text())
    ours = [frame for frame in frames if Path(frame[0]).is_relative_to(PACKAGE)]
    path, line, function = [*ours, *frames, ("unknown", "0", "?")][0]
    kind = "hangs" if exit_code == -signal.SIGPROF else f"the process ends with {exit_code}"
    return Verdict("no end", f"{kind} in {Path(path).name}:{line} {function}")


def _work(targets: Targets, seeds: range, cpu_seconds: float, trace: Path, pipe) -> None:
    """In the worker: try seed after seed and report each. The kernel ends it when an input takes too long."""
    with trace.open("w") as file, contextlib.suppress(BrokenPipeError):
        torch.set_num_threads(1)  # a fork has none of the threads that its parent had
        faulthandler.enable(file, all_threads=False)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        faulthandler.register(signal.SIGPROF, file, all_threads=False, chain=True)
        warnings.simplefilter("ignore")  # while an input is made
        for seed in seeds:
            pipe.send((seed, _judged(targets, seed, cpu_seconds)))


def _judged(targets: Targets, seed: int, cpu_seconds: float) -> Verdict:
    """The verdict on one seed's input; one that cannot be made is a failure, of the harness."""
    try:
        trial = trial_of(targets, seed)
    except Exception as error:
        return Verdict("no input", f"no input: {type(error).__name__} from {place(error)}", str(error))
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return judge(trial)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def summary(tallies: dict[str, Tally], seconds: float) -> list[str]:
    """A line a target, then a block a kind of failure."""
    lines = [f"{'target':20}{'inputs':>9}{'accepted':>10}  refused"]
    for name, tally in tallies.items():
        refused = ", ".join(f"{k} {n}" for k, n in tally.outcomes.most_common() if k != "accepted")
        lines.append(f"{name:20}{tally.outcomes.total():9,}{tally.outcomes['accepted']:10,}  {refused}")
    total = sum(tally.outcomes.total() for tally in tallies.values())
    kinds = [(name, kind, seeds) for name, tally in tallies.items() for kind, seeds in tally.failures.items()]
    lines.append(
        f"{total:,} inputs, {total / max(seconds, 1e-9):,.0f} a second, {len(kinds)} kinds of failure"
    )
    for name, kind, seeds in sorted(kinds, key=lambda it: -len(it[2])):
        lines += [
            f"{name}: {kind}",
            f"    {len(seeds)} times, seeds {seeds[:3]}; {tallies[name].details[kind]}",
        ]
    return lines


def main() -> int:
    """What `make fuzz` runs; 1 where anything failed."""
    from fuzz_targets import all_targets

    parser = argparse.ArgumentParser(description="damaged files and states, by the thousand")
    parser.add_argument("--seed", type=int, default=0, help="the first input")
    parser.add_argument("--count", type=int, default=1_000_000, help="how many inputs")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long")
    asked, start = parser.parse_args(), time.monotonic()
    tallies = run(all_targets, range(asked.seed, asked.seed + asked.count), asked.seconds)
    print("", *summary(tallies, time.monotonic() - start), sep="\n")
    return any(tally.failures for tally in tallies.values())


if __name__ == "__main__":
    sys.exit(main())

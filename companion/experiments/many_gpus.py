"""Chapter 17: many GPUs, stood for by 1, 2 and 4 processes on gloo: bytes, losses, checkpoints, failures.

Every part starts its processes by torchrun as users do, and appends a record to records/many_gpus.jsonl.
What has a record is skipped: cut it anywhere, start it again, and it goes on. Minutes on two cores.

    python companion/experiments/many_gpus.py                 # every part
    python companion/experiments/many_gpus.py bytes losses    # some
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lora2qlora.adapters.peft_files import WEIGHTS
from lora2qlora.lab import measured
from lora2qlora.memory import divided_memory, training_memory
from lora2qlora.memory.methods import trained_tensors
from many_gpus_models import METHODS, SHAPE
from safetensors.torch import load_file

NAME, HERE = "many_gpus", Path(__file__).parent
RANKS = (1, 2, 4)
LIMIT = 600  # seconds for any part


def torchrun(ranks: int) -> list[str]:
    """What follows `python` to start so many processes; nothing for one."""
    started = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return started if ranks > 1 else []


def launch(
    script: str, ranks: int, *arguments: str, may_fail: bool = False, by: list | None = None
) -> tuple[dict, str, float]:
    """Figures, what was said, and seconds of a script under torchrun, or started `by` other words."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "figures.json")
        started = torchrun(ranks) if by is None else by
        command = [sys.executable, *started, str(HERE / script), *arguments]
        start = time.monotonic()
        done = subprocess.run(
            [*command, "--out", str(out)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        )
        seconds = time.monotonic() - start
        if done.returncode and not may_fail:
            raise RuntimeError(
                f"{script} {' '.join(arguments)} with {ranks} processes:\n{done.stdout[-4000:]}"
            )
        figures = json.loads(out.read_text()) if out.exists() else {}
        return figures, done.stdout, round(seconds, 1)


def computed(method: str, engine: str, ranks: int) -> dict:
    """What the ledger says: static and peak [bytes] of a rank."""
    which, divided = METHODS[method], ranks if engine == "fsdp2" else 1
    static = divided_memory(SHAPE, which, ranks=divided).total
    peak = training_memory(SHAPE, which, 2, 64, True, ranks=divided).total
    # DDP's buckets hold a copy of all gradients.
    return {"static": static, "peak": peak + (engine == "ddp") * buckets(which)}


def buckets(method) -> int:
    return sum(size for _, size in trained_tensors(SHAPE, method))


def part_bytes() -> None:
    """Static and peak bytes of every rank, measured, and what the ledger says."""
    for ranks in RANKS:
        setting = {"part": "bytes", "ranks": ranks}
        if measured.is_recorded(NAME, setting, 0):
            continue
        figures = launch("many_gpus_work.py", ranks, "bytes")[0]["figures"]
        for key, found in figures.items():
            method, engine = key.split()
            figures[key] = {"measured": found}
            if method in METHODS:
                figures[key]["computed"] = computed(method, engine, ranks)
        measured.record(NAME, setting, figures, 0)
        say(setting)


def part_apart() -> None:
    """Bytes of every rank when embedding and head are gathered each in its turn."""
    for ranks in RANKS[1:]:
        setting = {"part": "apart", "ranks": ranks}
        if not measured.is_recorded(NAME, setting, 0):
            figures = launch("many_gpus_work.py", ranks, "apart")[0]["figures"]
            measured.record(NAME, setting, figures, 0)
            say(setting)


def part_losses() -> None:
    """Losses of one process and of several with the same global batches; the adapters they save."""
    setting = {"part": "losses", "ranks": list(RANKS)}
    if measured.is_recorded(NAME, setting, 0):
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = {n: launch("many_gpus_work.py", n, "losses", "--folder", folder)[0]["figures"] for n in RANKS}
        adapters = {path.name: load_file(path / WEIGHTS) for path in Path(folder).iterdir()}
    figures = {"losses": {str(n): run for n, run in runs.items()}, "largest difference": {}, "adapters": {}}
    for n in RANKS[1:]:
        for key, losses in runs[n].items():
            method, _, rows, divide = key.split()
            # One process divides by the count of all tokens either way.
            one = runs[1][f"{method} one {rows} {divide}"]
            worst = max(abs(a - b) for a, b in zip(one, losses, strict=True))
            figures["largest difference"][f"{n} {key}"] = worst
    one = adapters.pop("one-1")
    for name, other in adapters.items():
        largest = max((one[key] - other[key]).abs().max().item() for key in one)
        figures["adapters"][name] = {"same names": one.keys() == other.keys(), "largest difference": largest}
    measured.record(NAME, setting, figures, 0)
    say(setting)


def part_resume() -> None:
    """A checkpoint of two processes, resumed by one, two and four, against the run that was not cut."""
    setting = {"part": "resume", "save": 4, "steps": 8}
    if measured.is_recorded(NAME, setting, 0):
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = launch("many_gpus_work.py", 2, "train", "--folder", folder, "--save", "4")[0]["figures"]
        figures = {"not cut": whole}
        for ranks in RANKS:
            run = launch("many_gpus_work.py", ranks, "train", "--folder", folder)[0]["figures"]
            worst = max(abs(run["losses"][step] - whole["losses"][step]) for step in run["losses"])
            figures[f"resumed on {ranks}"] = run | {"largest difference": worst}
    measured.record(NAME, setting, figures, 0)
    say(setting)


def part_kill() -> None:
    """Rank 1 dies in step 6, in the middle of a forward pass; the run is started again."""
    setting = {"part": "kill", "save": 4, "steps": 8, "kill": 6}
    if measured.is_recorded(NAME, setting, 0):
        return
    with tempfile.TemporaryDirectory() as folder:
        options = ("train", "--folder", folder, "--save", "4")
        _, said, seconds = launch("many_gpus_work.py", 2, *options, "--kill", "6", may_fail=True)
        again = launch("many_gpus_work.py", 2, *options)[0]["figures"]
        whole = launch("many_gpus_work.py", 2, "train", "--folder", tempfile.mkdtemp(dir=folder))[0][
            "figures"
        ]
    lines = [line.strip() for line in said.splitlines()]
    told = [line for line in lines if "Signal 9" in line or "Connection closed by peer" in line]
    worst = max(abs(again["losses"][step] - whole["losses"][step]) for step in again["losses"])
    figures = {"seconds until all ended": seconds, "said": sorted({line[-200:] for line in told})[:4]}
    figures |= {"resumed at": again["first"], "largest difference": worst}
    measured.record(NAME, setting, figures, 0)
    say(setting)


def part_trainer() -> None:
    """The Trainer by `accelerate launch` with a config file, with and without make_shardable; and alone."""
    setting = {"part": "trainer", "ranks": 2}
    if measured.is_recorded(NAME, setting, 0):
        return
    script = "many_gpus_trainer.py"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "fsdp2.yaml")
        subprocess.run([sys.executable, str(HERE / script), "--write-config", str(config)], check=True)
        by = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        adapters = [f"{folder}/one", f"{folder}/two"]
        figures = {
            "one process": launch(script, 1, "--adapter", adapters[0])[0]["figures"],
            "accelerate launch": launch(script, 2, "--adapter", adapters[1], by=by)[0]["figures"],
            "without make_shardable": launch(script, 2, "--plain", by=by)[0]["figures"],
        }
        one, two = (load_file(Path(path, WEIGHTS)) for path in adapters)
    losses = [figures[name]["losses"] for name in ("one process", "accelerate launch")]
    figures["largest difference"] = max(abs(a - b) for a, b in zip(*losses, strict=True))
    figures["adapter"] = max((one[key] - two[key]).abs().max().item() for key in one.keys() | two.keys())
    measured.record(NAME, setting, figures, 0)
    say(setting)


def part_failures() -> None:
    """What goes wrong, and its cure."""
    for case in ("cases", "hang"):
        setting = {"part": "failures", "which": case}
        if measured.is_recorded(NAME, setting, 0):
            continue
        options = ["--hang"] if case == "hang" else []
        figures = launch("many_gpus_failures.py", 2, *options, may_fail=case == "hang")[0]["figures"]
        measured.record(NAME, setting, figures, 0)
        say(setting)


def say(setting: dict) -> None:
    print("recorded", *setting.values(), flush=True)


PARTS = {
    "bytes": part_bytes,
    "apart": part_apart,
    "failures": part_failures,
    "resume": part_resume,
    "kill": part_kill,
    "losses": part_losses,
    "trainer": part_trainer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    for part in parser.parse_args().parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()

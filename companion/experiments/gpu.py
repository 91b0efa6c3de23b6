"""The book's headline claims at full shape, on a GPU. Chapters 05, 09, 11, 13 and 14 show the records.

Four parts, in order of worth:
  correctness  NF4, double quantization and the Triton kernels against bitsandbytes' CUDA kernels
  memory       one training step of 7B to 65B shapes, held to the memory of a card, against the ledger
  speed        dequantizing, the fused matmul, and training steps of a 7B shape
  quality      the rank sweep, the atlas of formats and the recipe on SmolLM2, with more seeds and steps

The second base of chapter 09 needs no GPU: small_lm.py trains it in minutes, and its text, not the
machine, bounds how good it gets.
A part is a list of jobs; a job is one record in records/gpu.jsonl, with the device in its configuration.
What has a record is skipped, so a run that was cut goes on where it was; a job that fails is reported, the
others go on, and the exit status is 1. --toy runs all of it in small, on any device, and keeps no record
unless --records says where.

    python companion/experiments/gpu.py
    python companion/experiments/gpu.py --parts memory speed --seconds 540 --records out
    python companion/experiments/gpu.py --toy --device cpu
"""

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lora2qlora.lab import measured

PARTS = ("correctness", "memory", "speed", "quality")


def jobs(part: str, device: str, size: str) -> dict:
    """The runs of a part by name; each takes no argument and returns its figures."""
    return importlib.import_module(f"gpu_{part}").jobs(device, size)


def configuration(part: str, name: str, device: str, size: str) -> dict:
    """What identifies a record: the part, the job, the size and the device's own name."""
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return {"part": part, "job": name, "size": size, "device": card}


def run(part: str, name: str, job, wanted: dict, directory: Path | None) -> bool:
    """Run one job and record it; whether it succeeded."""
    started = time.perf_counter()
    print(f"{part}: {name} …", flush=True)
    try:
        figures = job()
        measured.record("gpu", wanted, figures, 0, directory)
    except Exception:  # any failure of one job must not cost the others
        traceback.print_exc()
        print(f"{part}: {name} FAILED", flush=True)
        return False
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"{part}: {name} {figures} ({time.perf_counter() - started:.0f} s)", flush=True)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run what has no record yet; 1 if a job failed, 2 if time ran out first, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--jobs", nargs="+", help="only jobs whose name contains one of these")
    parser.add_argument("--toy", action="store_true", help="small shapes, on any device")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no job after this long")
    parser.add_argument("--records", type=Path, help="folder for gpu.jsonl (default: the package's records)")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device here; a dry run on a CPU is --toy --device cpu")
    size = "toy" if options.toy else "full"
    started, failed = time.monotonic(), 0
    with TemporaryDirectory() as scratch:
        directory = options.records or (Path(scratch) if options.toy else None)
        for part in options.parts:
            for name, job in jobs(part, options.device, size).items():
                wanted = configuration(part, name, options.device, size)
                chosen = not options.jobs or any(text in name for text in options.jobs)
                if not chosen or measured.is_recorded("gpu", wanted, 0, directory):
                    continue
                if time.monotonic() - started > options.seconds:
                    print("time is up; start it again to go on", flush=True)
                    return 2
                failed += not run(part, name, job, wanted, directory)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

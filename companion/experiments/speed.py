"""Chapter 14: how long the fast paths take, beside bitsandbytes, PEFT and the plain paths, in one run.

Each part first asserts that all variants compute the same. Then they take turns, one call each a round; a
figure is the median over rounds of a ratio within a round, so that whatever else slows the machine slows
both. Run it on a machine that does nothing else. Appends to records/speed.jsonl; a run that has a record is
skipped. The part `triton` needs the package triton and compares only: kernels run in Triton's interpreter.

    python companion/experiments/speed.py                      # everything, about half an hour on two cores
    python companion/experiments/speed.py --parts layer step
"""

import argparse
import json

import torch
from lora2qlora.lab import measured
from speed_adam import PARAMETERS, adam_part
from speed_layer import LAYERS, layer_part
from speed_machine import machine_part
from speed_step import STEP_VARIANTS, step_part, weigh
from speed_triton import interpreted, triton_part
from speed_weights import SHAPES, dequantize_part, nested_part, quantize_part, vectors_part


def main(arguments: list[str] | None = None) -> None:
    """Run and record what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="tiny sizes and no real model: a dry run")
    names = ["machine", "quantize", "dequantize", "nested", "vectors", "layer", "adam", "step", "triton"]
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--weigh", metavar="VARIANT", help="print one variant's peak bytes and stop")
    parser.add_argument("--interpreted", metavar="SHAPES", help="compare the Triton kernels and stop")
    options = parser.parse_args(arguments)
    if options.weigh:
        print(weigh(options.weigh))
        return
    if options.interpreted:
        print(json.dumps(interpreted(json.loads(options.interpreted))))
        return
    for part, configuration, make in plan(options.parts, options.rounds, options.small):
        configuration = {"part": part, "rounds": options.rounds, **configuration}
        configuration["threads"] = torch.get_num_threads()
        if measured.is_recorded("speed", configuration, 0):
            print(f"{configuration}: recorded already", flush=True)
            continue
        figures = make()
        measured.record("speed", configuration, figures, 0)
        shown = {
            k: v for k, v in figures.items() if k not in ("seconds", "pieces", "nested_seconds", "profile")
        }
        print(f"{configuration}: {shown}", flush=True)


def plan(parts: list[str], rounds: int, small: bool):
    """(part, configuration, function that makes the figures) of every run asked for."""
    sizes = {
        "machine": (machine_part, 64 if small else 4096),
        "quantize": (quantize_part, [[64, 128]] if small else SHAPES),
        "dequantize": (dequantize_part, [[64, 128]] if small else SHAPES),
        "nested": (nested_part, [[64, 128]] if small else [[2048, 2048], [4096, 4096]]),
        "vectors": (vectors_part, [64, 128] if small else [4096, 4096]),
        "layer": (layer_part, [([64, 128], 2)] if small else LAYERS),
        "adam": (adam_part, 5000 if small else PARAMETERS),
        "step": (step_part, STEP_VARIANTS),
        "triton": (triton_part, [[64, 64], [70, 130]]),
    }
    for part in parts:
        make, size = sizes[part]
        for configuration, run in make(rounds, size):
            yield part, configuration, run


if __name__ == "__main__":
    main()

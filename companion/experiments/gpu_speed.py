"""gpu.py, part 3: how fast, beside the peak of matmul and of copying measured in the same job.

Variants take turns, round by round, and the figures are medians of seconds with all rounds kept. Equality is
asserted before anything is timed. `fraction_of_copy` is bytes read and written over the time, divided by
the same of a plain copy; `fraction_of_peak` the same for multiply-adds.
"""

import gc
import statistics
import time

import bitsandbytes
import gpu_models
import torch
from bitsandbytes import functional as bnb
from gpu_memory import TOY, config_of
from lora2qlora.double_quantization import double_quantize
from lora2qlora.memory import SHAPES, LlamaShape
from lora2qlora.nf4 import dequantize_nf4, quantize_nf4

ROUNDS = {"full": 15, "toy": 2}
# [out, in] of a weight to dequantize: 134 million numbers, and as many as a layer of LLaMA-65B holds
WEIGHTS = {"full": ((16384, 8192), (22016, 8192)), "toy": ((64, 128),)}
LAYER = {"full": (4096, 4096), "toy": (64, 128)}  # of the fused matmul
ROWS = {"full": (64, 128, 256, 512, 1024, 4096), "toy": (16,)}
LENGTHS = {"full": (512, 2048, 8192), "toy": (32,)}  # tokens of one sequence
SQUARE = {"full": 8192, "toy": 64}


def seconds_of(function, device: str) -> float:
    """How long one call takes, until the device is done."""
    if not device.startswith("cuda"):
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def take_turns(functions: dict, device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, one call a round; two rounds to warm up are dropped."""
    taken = {name: [] for name in functions}
    for _ in range(rounds + 2):
        for name, function in functions.items():
            taken[name].append(seconds_of(function, device))
    return {name: times[2:] for name, times in taken.items()}


def summary(taken: dict[str, list[float]]) -> dict:
    """Median seconds, and every round."""
    return {name: {"median": statistics.median(times), "rounds": times} for name, times in taken.items()}


def ceilings(device: str, size: str) -> dict:
    """What bounds everything: a copy in bf16 and a square product; each a function and its bytes or FLOPs."""
    n = SQUARE[size]
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    source = torch.randn(2 * n, n, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return {
        "copy": (lambda: target.copy_(source), 2 * source.nbytes),
        "matmul": (lambda: torch.mm(a, b), 2 * n**3),
    }


def dequantize(device: str, size: str, shape: tuple[int, int]) -> dict:
    """A nested NF4 weight to bf16 in a reused buffer: plain, fast, bitsandbytes, and a copy."""
    from lora2qlora import fast

    w = torch.randn(shape, dtype=torch.bfloat16, device=device)
    q = double_quantize(quantize_nf4(w))
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    out = torch.empty_like(w)
    into = {"out": torch.empty_like(w)} if w.is_cuda else {}  # bitsandbytes takes no buffer on a CPU
    functions = {
        "fast": lambda: fast.dequantize_nf4(q, out=out),
        "plain": lambda: dequantize_nf4(q, out=out),
        "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state, **into),
        "copy": ceilings(device, size)["copy"][0],
    }
    expected = dequantize_nf4(q)
    if not torch.equal(fast.dequantize_nf4(q, out=out), expected):
        raise ValueError("the fast dequantizer gives other numbers than the plain one")
    found = summary(take_turns(functions, device, ROUNDS[size]))
    moved = q.nbytes + out.nbytes
    rate = ceilings(device, size)["copy"][1] / found["copy"]["median"]
    for name in ("fast", "plain", "bitsandbytes"):
        found[name]["fraction_of_copy"] = moved / found[name]["median"] / rate
    over = found["bitsandbytes"]["median"] / found["fast"]["median"]
    return found | {"shape": list(shape), "moved_bytes": moved, "fast_over_bitsandbytes": over}


def multiply(device: str, size: str, rows: int) -> dict:
    """x Wᵀ of a nested NF4 weight, bf16: the fused kernel, bitsandbytes, dequantize-then-multiply, dense."""
    from lora2qlora import fast

    shape = LAYER[size]
    w = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
    x = torch.randn(rows, shape[1], dtype=torch.bfloat16, device=device)
    q = double_quantize(quantize_nf4(w))
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    dense = dequantize_nf4(q)
    expected = x.float() @ dense.float().T
    functions = {
        "dequantize, multiply": lambda: x @ fast.dequantize_nf4(q).T,
        "bitsandbytes": lambda: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state),
        "dense": lambda: x @ dense.T,
    }
    if device.startswith("cuda"):
        functions["fused"] = lambda: fast.matmul_triton(x, q)
    figures = {"shape": list(shape), "rows": rows}
    for name, function in functions.items():
        error = (function().float() - expected).norm() / expected.norm()
        if error > 0.02:
            raise ValueError(f"{name} is off by {error:.1%}")
        figures[f"{name}: relative difference"] = float(error)
    return figures | summary(take_turns(functions, device, ROUNDS[size]))


def step_jobs(device: str, size: str, length: int) -> dict:
    """One training step of a 7B shape (TOY in a dry run), batch 1: every method but full in turns."""
    shape = SHAPES["LLaMA-7B"] if size == "full" else TOY
    methods = [m for m in gpu_models.METHODS if m != "full"]
    steps = {}
    for method in methods:
        model = gpu_models.build(config_of(shape), method, 16, device)
        steps[method] = gpu_models.make_step(model, 1, length)
    losses = {method: float(step()) for method, step in steps.items()}
    if losses["qlora"] != losses["qlora-fast"]:
        raise ValueError(f"the fast path gives another loss than the plain one: {losses}")
    peak = ceilings(device, size)
    functions = {**steps, **{name: function for name, (function, _) in peak.items()}}
    found = {"losses": losses} | summary(take_turns(functions, device, ROUNDS[size] // 3 + 1))
    add_rates(found, shape, length, peak["matmul"][1] / found["matmul"]["median"])
    del steps, functions
    gc.collect()
    return found


def full_step(device: str, size: str, length: int) -> dict:
    """Full fine-tuning of the same shape in bf16, states and all, by itself: it leaves no room for others."""
    shape = SHAPES["LLaMA-7B"] if size == "full" else TOY
    model = gpu_models.build(config_of(shape), "full", 0, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    step = gpu_models.make_step(model, 1, length, optimizer)
    found = summary(take_turns({"full": step}, device, ROUNDS[size] // 3 + 1))
    peak = ceilings(device, size)["matmul"]
    measured = summary(take_turns({"matmul": peak[0]}, device, ROUNDS[size]))
    found |= measured
    add_rates(found, shape, length, peak[1] / measured["matmul"]["median"])
    del model, step, optimizer, trained
    gc.collect()
    return found


def add_rates(found: dict, shape: LlamaShape, length: int, peak: float) -> None:
    """Tokens a second, and the share of the matmul peak, to each method's figures.

    Counted are the multiply-adds of the weights: forward once more for checkpointing, backward once for the
    inputs, and once more for the weights where they train. Attention's own are left out.
    """
    linear = shape.layers * sum(out * in_ for out, in_ in shape.linears.values())
    head = shape.vocabulary * shape.hidden
    for name in set(found) & set(gpu_models.METHODS):
        passes = 4 if name == "full" else 3
        flops = 2 * length * (passes * linear + (2 if name != "full" else 3) * head)
        found[name]["tokens_per_second"] = length / found[name]["median"]
        found[name]["fraction_of_peak"] = flops / found[name]["median"] / peak


def jobs(device: str, size: str) -> dict:
    """The part's runs by name, each without an argument."""
    found = {}
    for shape in WEIGHTS[size]:
        found[f"dequantize {list(shape)}"] = lambda s=shape: dequantize(device, size, s)
    for rows in ROWS[size]:
        found[f"multiply, {rows} rows"] = lambda n=rows: multiply(device, size, n)
    for length in LENGTHS[size]:
        found[f"step of 7B, {length} tokens"] = lambda n=length: step_jobs(device, size, n)
    for length in LENGTHS[size]:
        found[f"full step of 7B, {length} tokens"] = lambda n=length: full_step(device, size, n)
    return found

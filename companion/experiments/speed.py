"""Chapter 14: how long the fast paths take, beside bitsandbytes, PEFT and the plain paths, in one run.

Each part first asserts that all variants compute the same. Then they take turns, one call each a round; a
figure is the median over rounds of a ratio within a round, so that whatever else slows the machine slows
both. Run it on a machine that does nothing else. Appends to records/speed.jsonl; a run that has a record is
skipped. The part `triton` needs the package triton and compares only: kernels run in Triton's interpreter.

    python companion/experiments/speed.py                      # everything, about half an hour on two cores
    python companion/experiments/speed.py --parts layer step
"""

import argparse
import copy
import ctypes
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.cextension import lib
from lora2qlora import fast, nf4, optimizers
from lora2qlora.adapters import add_lora
from lora2qlora.double_quantization import QuantizedAbsmax, double_quantize
from lora2qlora.fast import library
from lora2qlora.lab import measured
from lora2qlora.lab.models import keep_trainable, load_base_model
from lora2qlora.lora import LoRALinear
from lora2qlora.nf4 import NF4Weight, nf4_codebook
from lora2qlora.qlora import NF4Linear, quantize_base
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

SHAPES = [[4096, 4096], [4096, 11008]]
DTYPES = ["float32", "bfloat16"]
LAYER = {"rank": 16, "alpha": 16, "dtype": "bfloat16"}
# A 7B model's q_proj, whose dense bfloat16 weight has 32 MiB, and one of a model with 1B, with 8 MiB.
LAYERS = [([size, size], rows) for size in (4096, 2048) for rows in (16, 128, 512, 2048)]
STEP = {"model": "smollm2-135m", "batch": 4, "length": 128, "rank": 16, "alpha": 16, "dtype": "bfloat16"}
STEP_VARIANTS = ["peft_bnb", "fast", "plain", "lora", "peft_lora"]
PARAMETERS = 16_000_000


def take_turns(variants: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, one call a round in turn; two rounds before that warm up."""
    seconds = {name: [] for name in variants}
    for number in range(rounds + 2):
        for name, call in variants.items():
            started = time.perf_counter()
            call()
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def speedups(seconds: dict[str, list[float]], reference: str) -> dict[str, float]:
    """How many times as fast as the reference each variant is: the median over rounds."""
    return {
        name: statistics.median(a / b for a, b in zip(seconds[reference], times, strict=True))
        for name, times in seconds.items()
    }


# The parts. Each yields (configuration, function that makes the figures).


def quantize_part(rounds: int, shapes: list[list[int]]):
    """Quantize: bitsandbytes, the plain path, the fast path."""
    for shape in shapes:
        for dtype in DTYPES:
            yield {"shape": shape, "dtype": dtype}, lambda s=shape, d=dtype: time_quantize(s, d, rounds)


def time_quantize(shape, dtype, rounds):
    torch.manual_seed(0)
    w = torch.randn(shape, dtype=getattr(torch, dtype))
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4")
    for quantize in (nf4.quantize_nf4, fast.quantize_nf4):
        q = quantize(w)
        assert torch.equal(q.packed, packed.view(-1))
        assert torch.equal(q.absmax, state.absmax)
    variants = {
        "bitsandbytes": lambda: bnb.functional.quantize_4bit(w, quant_type="nf4"),
        "plain": lambda: nf4.quantize_nf4(w),
        "fast": lambda: fast.quantize_nf4(w),
    }
    seconds = take_turns(variants, rounds)
    return {"seconds": seconds, "speedup": speedups(seconds, "bitsandbytes")}


def dequantize_part(rounds: int, shapes: list[list[int]]):
    """Dequantize, step by step from the plain path to the fast one, and bitsandbytes in two ways."""
    for shape in shapes:
        for dtype in DTYPES:
            yield {"shape": shape, "dtype": dtype}, lambda s=shape, d=dtype: time_dequantize(s, d, rounds)


def raw_kernel(q: NF4Weight, out: torch.Tensor) -> None:
    """bitsandbytes' C function alone, into a buffer, called as its CPU backend calls it."""
    kernels = {
        torch.float32: lib.cdequantize_blockwise_cpu_nf4_fp32,
        torch.bfloat16: lib.cdequantize_blockwise_cpu_nf4_bf16,
    }
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (q.packed, q.absmax, out)]
    kernels[out.dtype](*pointers, *[ctypes.c_longlong(n) for n in (q.block_size, *out.shape)])


def formula(packed, absmax, codebook, out):
    """What `nf4.dequantize_nf4` computes, in three lines for torch.compile."""
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(len(absmax), -1)
    out.view(len(absmax), -1).copy_(codebook[codes.int()] * absmax[:, None])


def time_dequantize(shape, dtype, rounds):
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    q = nf4.quantize_nf4(torch.randn(shape, dtype=dtype))
    nested = double_quantize(q)
    state = bnb.functional.QuantState(
        q.absmax, torch.Size(shape), dtype=dtype, blocksize=64, quant_type="nf4"
    )
    out, codebook, packed = torch.empty(shape, dtype=dtype), nf4_codebook(), q.packed.view(-1, 1)
    compiled = torch.compile(formula, dynamic=False)
    variants = {
        "bitsandbytes": lambda: bnb.functional.dequantize_4bit(packed, state),
        "raw": lambda: raw_kernel(q, out),
        "plain": lambda: nf4.dequantize_nf4(q),
        "plain_buffer": lambda: nf4.dequantize_nf4(q, out=out),
        "compiled_buffer": lambda: compiled(q.packed, q.absmax, codebook, out),
        "fast": lambda: fast.dequantize_nf4(q),
        "fast_buffer": lambda: fast.dequantize_nf4(q, out=out),
    }
    expected = nf4.dequantize_nf4(q)
    for name, call in variants.items():
        out.fill_(7)
        result = call()
        assert torch.equal(out if result is None else result, expected), name
    seconds = take_turns(variants, rounds)
    assert torch.equal(fast.dequantize_nf4(nested), nf4.dequantize_nf4(nested))
    doubly = {
        "single": variants["fast_buffer"],
        "double": lambda: fast.dequantize_nf4(nested, out=out),
    }
    nested_seconds = take_turns(doubly, rounds)
    return {
        "seconds": seconds,
        "speedup": speedups(seconds, "bitsandbytes"),
        "over_raw": speedups(seconds, "raw"),
        "nested_seconds": nested_seconds,
        "double_quantization_time": 1 / speedups(nested_seconds, "single")["double"],
    }


def nested_part(rounds: int, shapes: list[list[int]]):
    """What double quantization costs: bitsandbytes' public call and the fast kernel, with and without it."""
    for shape in shapes:
        yield {"shape": shape, "dtype": "bfloat16"}, lambda s=shape: time_nested(s, rounds)


def time_nested(shape, rounds):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    theirs = [
        bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
        for nested in (False, True)
    ]
    ours, out = [fast.quantize_nf4(w)], torch.empty_like(w)
    ours.append(double_quantize(ours[0]))
    variants = {}
    for name, q, (packed, state) in zip(("single", "double"), ours, theirs, strict=True):
        variants[f"fast_{name}"] = lambda q=q: fast.dequantize_nf4(q, out=out)
        variants[f"bitsandbytes_{name}"] = lambda p=packed, s=state: bnb.functional.dequantize_4bit(p, s)
        expected = nf4.dequantize_nf4(q)
        assert torch.equal(fast.dequantize_nf4(q), expected)
        got = bnb.functional.dequantize_4bit(packed, state)
        assert (got - expected).norm() < 0.01 * expected.norm()  # a few absmax codes differ
    seconds = take_turns(variants, rounds)
    ratios = {
        code: 1 / speedups(seconds, f"{code}_single")[f"{code}_double"] for code in ("fast", "bitsandbytes")
    }
    return {"seconds": seconds, "time_over_single": ratios}


def vectors_part(rounds: int, shape: list[int]):
    """The fast path compiled for this processor, and for one that has AVX2 alone, against the plain one."""
    for processor in ("native", "x86-64-v3"):
        configuration = {"shape": shape, "dtype": "bfloat16", "processor": processor}
        yield configuration, lambda p=processor: time_vectors(shape, p, rounds)


def time_vectors(shape, processor, rounds):
    native = library.FLAGS
    library.FLAGS = [flag.replace("native", processor) for flag in native]
    library.load_library.cache_clear()
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, out = fast.quantize_nf4(w), torch.empty_like(w)
    assert torch.equal(q.packed, nf4.quantize_nf4(w).packed)
    assert torch.equal(fast.dequantize_nf4(q), nf4.dequantize_nf4(q))
    assert library.load_library() is not None
    variants = {
        "quantize": {"plain": lambda: nf4.quantize_nf4(w), "fast": lambda: fast.quantize_nf4(w)},
        "dequantize": {
            "plain": lambda: nf4.dequantize_nf4(q, out=out),
            "fast": lambda: fast.dequantize_nf4(q, out=out),
        },
    }
    seconds = {work: take_turns(pair, rounds) for work, pair in variants.items()}
    library.FLAGS = native
    library.load_library.cache_clear()
    return {
        "seconds": seconds,
        "over_plain": {work: speedups(times, "plain")["fast"] for work, times in seconds.items()},
        "processor_has": torch.backends.cpu.get_cpu_capability(),
    }


def layer_part(rounds: int, layers: list[tuple[list[int], int]]):
    """One QLoRA layer, forward and backward, and the pieces that its time is made of."""
    for shape, rows in layers:
        yield LAYER | {"shape": shape, "rows": rows}, lambda s=shape, n=rows: time_layer(s, n, rounds)


def bitsandbytes_layer(linear: nn.Linear) -> nn.Module:
    """PEFT's LoRA over a Linear4bit with double quantization."""
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, torch.bfloat16, True, "nf4")
    layer.weight = bnb.nn.Params4bit(
        linear.weight.detach().clone(), compress_statistics=True, quant_type="nf4", module=layer
    )
    wrapper = nn.Sequential(layer.to("cpu"))
    keep_trainable(wrapper)
    wrapper.is_loaded_in_4bit = True
    config = LoraConfig(r=LAYER["rank"], lora_alpha=LAYER["alpha"], target_modules=["0"])
    return get_peft_model(wrapper, config).base_model.model[0]


def same_bytes(layer) -> NF4Linear:
    """Our layer over the very tensors of PEFT's Linear4bit."""
    state = layer.base_layer.weight.quant_state
    absmax = QuantizedAbsmax(state.absmax, state.state2.absmax, state.offset, state.state2.blocksize)
    packed = layer.base_layer.weight.data.view(-1)
    return NF4Linear(NF4Weight(packed, absmax, torch.Size(state.shape), state.dtype, state.blocksize))


def build_layers(linear: nn.Linear) -> dict[str, nn.Module]:
    """The layer in each variant, with the same weights and the same adapter."""
    layers = {"peft_bnb": bitsandbytes_layer(linear)}
    for name in ("plain", "fast", "lora"):
        base = copy.deepcopy(linear) if name == "lora" else same_bytes(layers["peft_bnb"])
        layers[name] = LoRALinear(base, LAYER["rank"], LAYER["alpha"])
    fast.use_fast(layers["fast"])
    nn.init.normal_(layers["lora"].lora_B, std=0.01)
    theirs = layers["peft_bnb"]
    pairs = [(theirs.lora_A["default"].weight, theirs.lora_B["default"].weight)]
    pairs += [(layers[name].lora_A, layers[name].lora_B) for name in ("plain", "fast")]
    for A, B in pairs:
        A.data.copy_(layers["lora"].lora_A)
        B.data.copy_(layers["lora"].lora_B)
    return {name: layer.train() for name, layer in layers.items()}


def run_layer(layer, x, grad):
    """Forward and backward; output, gradient of the input, gradients of the adapter."""
    x.grad = None
    trained = [p for p in layer.parameters() if p.requires_grad]
    for p in trained:
        p.grad = None
    y = layer(x)
    y.backward(grad)
    return [y, x.grad, *[p.grad for p in trained]]


def time_layer(shape, rows, rounds):
    torch.manual_seed(0)
    out, in_ = shape
    linear = nn.Linear(in_, out, bias=False, dtype=torch.bfloat16)
    layers = build_layers(linear)
    x = torch.randn(rows, in_, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(rows, out, dtype=torch.bfloat16)
    results = {name: run_layer(layer, x, grad) for name, layer in layers.items()}
    for ours, plain, theirs in zip(*[results[n] for n in ("fast", "plain", "peft_bnb")], strict=True):
        assert torch.equal(ours, plain)  # bit for bit
        assert (ours - theirs).norm() < 0.01 * theirs.norm()  # PEFT adds in another order, in bfloat16
    variants = {name: lambda m=layer: run_layer(m, x, grad) for name, layer in layers.items()}
    seconds = take_turns(variants, rounds)
    pieces = take_turns(layer_pieces(layers, linear, x.detach(), grad), rounds)
    return {
        "seconds": seconds,
        "pieces": pieces,
        "speedup": speedups(seconds, "peft_bnb"),
        "time_over_lora": {n: 1 / s for n, s in speedups(seconds, "lora").items()},
        "profile": {name: profile_ops(variants[name]) for name in ("peft_bnb", "fast")},
    }


def layer_pieces(layers, linear, x, grad):
    """The work inside one call, piece by piece: W dequantized twice, two products with W, the whole LoRA."""
    theirs, weight = layers["peft_bnb"].base_layer.weight, linear.weight.detach()
    q = layers["plain"].base.weight
    return {
        "lora": lambda: run_layer(layers["lora"], x.requires_grad_(), grad),
        "products": lambda: (F.linear(x.detach(), weight), grad @ weight),
        "bitsandbytes": lambda: [
            bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state) for _ in range(2)
        ],
        "plain": lambda: [nf4.dequantize_nf4(q, torch.bfloat16) for _ in range(2)],
        "fast": lambda: [fast.dequantize_to_scratch(q, torch.bfloat16) for _ in range(2)],
    }


def profile_ops(call, repeats: int = 5) -> dict[str, float]:
    """The operations that take the most time of their own, and the share of each; the rest as "other"."""
    with profile(activities=[ProfilerActivity.CPU]) as report:
        for _ in range(repeats):
            call()
    times = Counter({e.key: e.self_cpu_time_total for e in report.key_averages()})
    whole = sum(times.values())
    shares = {key: value / whole for key, value in times.most_common(8)}
    return shares | {"other": 1 - sum(shares.values())}


def step_part(rounds: int, variants: list[str]):
    """A training step of the real model: every variant's time in one run, each one's peak in its own."""
    yield STEP | {"variants": variants}, lambda: time_step(variants, rounds)


def build_model(variant: str):
    """SmolLM2 in bfloat16 that trains as `variant` says, and its optimizer."""
    nf4_by_theirs = "nf4" if variant == "peft_bnb" else None
    model, _ = load_base_model(STEP["model"], torch.bfloat16, nf4_by_theirs, "cpu")
    if variant in ("peft_bnb", "peft_lora"):
        config = LoraConfig(r=STEP["rank"], lora_alpha=STEP["alpha"], target_modules="all-linear")
        model = get_peft_model(model, config)
    if variant == "peft_bnb":
        keep_trainable(model)
    if variant in ("fast", "plain"):
        quantize_base(model)
    if variant == "fast":
        fast.use_fast(model)
    if not variant.startswith("peft"):
        add_lora(model, "all-linear", STEP["rank"], STEP["alpha"])
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(p, std=0.01)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model.train(), torch.optim.AdamW(trained, lr=1e-5)


def train_step(model, optimizer, tokens) -> float:
    """One step; the loss."""
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def step_tokens() -> torch.Tensor:
    return torch.randint(49152, (STEP["batch"], STEP["length"]), generator=torch.Generator().manual_seed(0))


def time_step(names, rounds):
    tokens = step_tokens()
    built = {name: build_model(name) for name in names}
    losses = {name: train_step(*pair, tokens) for name, pair in built.items()}
    if {"fast", "plain"} <= set(names):
        assert losses["fast"] == losses["plain"], losses  # bit for bit
    if {"fast", "peft_bnb"} <= set(names):
        assert abs(losses["fast"] / losses["peft_bnb"] - 1) < 0.01, losses  # bfloat16
    variants = {name: lambda p=pair: train_step(*p, tokens) for name, pair in built.items()}
    seconds = take_turns(variants, rounds)
    figures = {"seconds": seconds, "losses": losses, "speedup": speedups(seconds, names[0])}
    figures["profile"] = {name: profile_ops(variants[name], 1) for name in names}
    peaks = {}
    for name in names:
        command = [sys.executable, __file__, "--weigh", name]
        peaks[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return figures | {"peak_bytes": peaks}


def weigh(variant: str) -> int:
    """Bytes that a process holds at most during a step, less what it held before it loaded the model."""
    tokens, before = step_tokens(), resident("VmRSS")
    model, optimizer = build_model(variant)
    for _ in range(2):
        train_step(model, optimizer, tokens)
    ctypes.CDLL(None).malloc_trim(0)  # gives back what loading and quantizing needed and freed
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is held now
    train_step(model, optimizer, tokens)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of memory this process holds now (VmRSS), or has held at most (VmHWM); Linux."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def adam_part(rounds: int, parameters: int):
    """A step of 8-bit AdamW."""
    yield {"parameters": parameters, "dtype": "float32"}, lambda: time_adam(parameters, rounds)


def time_adam(parameters, rounds):
    makers = {
        "bitsandbytes": bnb.optim.AdamW8bit,
        "plain": optimizers.AdamW8bit,
        "fast": optimizers.AdamW8bit,
        "torch_32bit": torch.optim.AdamW,
    }
    torch.manual_seed(0)
    start, grad = torch.randn(parameters), torch.randn(parameters)
    weights, steps = {}, {}
    for name, make in makers.items():
        weights[name] = nn.Parameter(start.clone())
        weights[name].grad = grad.clone()
        optimizer = make([weights[name]], lr=1e-3, weight_decay=0.01)
        if name == "fast":
            optimizer.update = fast.adam_step_8bit
        steps[name] = optimizer.step
    for _ in range(3):
        for step in steps.values():
            step()
    moved = {name: weight.detach() - start for name, weight in weights.items()}
    for other, limit in (("plain", 1e-3), ("bitsandbytes", 0.1), ("torch_32bit", 0.1)):
        apart = (moved["fast"] - moved[other]).norm() / moved["fast"].norm()
        assert apart < limit, (other, apart)
    seconds = take_turns(steps, rounds)
    return {"seconds": seconds, "speedup": speedups(seconds, "bitsandbytes")}


def machine_part(rounds: int, size: int):
    """What this machine can do at most: bytes copied, and bf16 and fp32 arithmetic in a large product."""
    yield {"size": size}, lambda: time_machine(size, rounds)


def time_machine(size, rounds):
    source, target = torch.ones(size, size), torch.ones(size, size)
    half = torch.randn(size, size).bfloat16()
    variants = {
        "copy": lambda: target.copy_(source),
        "fresh": lambda: source.clone(),
        "float32": lambda: source @ target,
        "bfloat16": lambda: half @ half,
    }
    best = {name: min(times) for name, times in take_turns(variants, rounds).items()}
    return {
        "bytes_per_second": 2 * source.nbytes / best["copy"],
        "fresh_bytes_per_second": 2 * source.nbytes / best["fresh"],
        "float32_flops_per_second": 2 * size**3 / best["float32"],
        "bfloat16_flops_per_second": 2 * size**3 / best["bfloat16"],
    }


def triton_part(rounds: int, shapes: list[list[int]]):
    """The Triton kernels in Triton's interpreter against the plain path; compared, not timed."""
    if importlib.util.find_spec("triton") is None:
        print("triton: the package triton is not installed, left out", flush=True)
        return
    yield {"shapes": shapes}, lambda: run_interpreted(shapes)


def run_interpreted(shapes):
    command = [sys.executable, __file__, "--interpreted", json.dumps(shapes)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def interpreted(shapes) -> dict:
    """Weights compared, how many differ, and the largest relative error of the fused product."""
    import triton

    compared = differ = 0
    error = 0.0
    torch.manual_seed(0)
    for shape in shapes:
        w = torch.randn(shape)
        for block_size in (32, 64, 100):
            plain = nf4.quantize_nf4(w, block_size)
            for q in (plain, double_quantize(plain)):
                for dtype in (torch.float32, torch.float16):
                    expected = nf4.dequantize_nf4(q, dtype)
                    got = fast.dequantize_triton(q, torch.empty(shape, dtype=dtype))
                    compared += expected.numel()
                    differ += int((got != expected).sum())
                x = torch.randn(5, shape[-1])
                y, product = fast.matmul_triton(x, q), x @ nf4.dequantize_nf4(q).T
                error = max(error, ((y - product).norm() / product.norm()).item())
    return {"compared": compared, "differ": differ, "product_error": error, "triton": triton.__version__}


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
    """(part, configuration, function) of every run asked for."""
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

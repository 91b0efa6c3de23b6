"""gpu.py, part 1: NF4 and double quantization against bitsandbytes' kernels on this device.

Each figure is a count of differences, or what a kernel gives for an input at the edge; nothing is judged
here. bitsandbytes' CUDA kernels and its CPU kernels differ, so the device is part of every record.
"""

import re
import subprocess
import sys
from pathlib import Path

import torch
from bitsandbytes import functional as bnb
from lora2qlora.double_quantization import double_quantize
from lora2qlora.nf4 import dequantize_nf4, nf4_codebook, quantize_nf4

TESTS = Path(__file__).parents[2] / "tests"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = {"full": ((4096, 4096), (4096, 11008), (1000, 333), (7, 9)), "toy": ((64, 128), (10, 33), (7, 9))}


def weights(shape, dtype, device, seed=0):
    """Normal numbers as large as those of a trained weight, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype).to(device)


def supported(block_size: int, device: str) -> bool:
    """Whether bitsandbytes has a kernel of this block size here; the smallest is missing on some devices."""
    try:
        bnb.quantize_4bit(torch.ones(block_size, 1, device=device), blocksize=block_size, quant_type="nf4")
    except (ValueError, RuntimeError):
        return False
    return True


def compare(device: str, size: str) -> dict:
    """Differing bytes, constants and results, for each dtype and block size, summed over the shapes."""
    figures = {}
    for block_size in BLOCK_SIZES:
        if not supported(block_size, device):
            figures[f"block {block_size}"] = "not supported by bitsandbytes here"
            continue
        for dtype in DTYPES:
            counts = {"bytes": 0, "of_bytes": 0, "absmax": 0, "of_absmax": 0, "values": 0, "of_values": 0}
            for shape in SHAPES[size]:
                for key, value in differences(weights(shape, dtype, device), block_size).items():
                    counts[key] += value
            figures[f"block {block_size}, {str(dtype).removeprefix('torch.')}"] = counts
    return figures


def differences(w: torch.Tensor, block_size: int) -> dict[str, int]:
    """How many packed bytes, absmax values and dequantized numbers differ from bitsandbytes'."""
    ours = quantize_nf4(w, block_size)
    packed, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
    theirs = bnb.dequantize_4bit(packed, state)
    return {
        "bytes": int((ours.packed != packed.view(-1)).sum()),
        "of_bytes": packed.numel(),
        "absmax": int((ours.absmax != state.absmax).sum()),
        "of_absmax": state.absmax.numel(),
        "values": int((dequantize_nf4(ours).view(-1) != theirs.view(-1)).sum()),
        "of_values": w.numel(),
    }


def compare_nested(device: str, size: str) -> dict:
    """Double quantization: differing 8-bit codes, the largest step between them, differing group scales."""
    w = weights(SHAPES[size][0], torch.float32, device)
    ours = double_quantize(quantize_nf4(w)).absmax
    _, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    steps = (ours.codes.int() - state.absmax.view(-1).int()).abs()
    return {
        "codes": int((steps > 0).sum()),
        "of_codes": steps.numel(),
        "largest_step": int(steps.max()),
        "scales": int((ours.scales != state.state2.absmax).sum()),
        "of_scales": ours.scales.numel(),
        "offset_difference": abs(float(ours.offset) - float(state.offset)),
    }


def edge_inputs() -> dict[str, torch.Tensor]:
    """A block of 64 each: on a midpoint, all zero, minus zero, subnormal, NaN, infinite."""
    c = nf4_codebook()
    tie = torch.zeros(64)
    tie[0], tie[1] = 1.0, float((c[8] + c[9]) / 2)
    one = torch.zeros(64)
    one[0] = 1.0
    minus_zero = one.clone()
    minus_zero[1] = -0.0
    nan, infinite = one.clone(), one.clone()
    nan[1], infinite[1] = float("nan"), float("inf")
    return {
        "tie": tie,
        "zeros": torch.zeros(64),
        "minus zero": minus_zero,
        "subnormal": one * 1e-40,
        "nan": nan,
        "infinity": infinite,
    }


def edges(device: str) -> dict:
    """What bitsandbytes gives for each input at the edge: first byte, absmax, first two results as text."""
    figures = {}
    for name, block in edge_inputs().items():
        packed, state = bnb.quantize_4bit(block.to(device), blocksize=64, quant_type="nf4")
        values = bnb.dequantize_4bit(packed, state).view(-1)
        try:
            ours = f"0x{int(quantize_nf4(block).packed[0]):02x}"
        except ValueError:
            ours = "ValueError"
        figures[name] = {
            "first_byte": f"0x{int(packed.view(-1)[0]):02x}",
            "our_first_byte": ours,
            "absmax": str(float(state.absmax[0])),
            "first_values": [str(value) for value in values[:2].tolist()],
        }
    return figures


def marked_tests() -> dict:
    """`pytest -m gpu` in a process of its own: how many passed, failed or were skipped, and which failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)  # it shows paths of this machine
    not_passed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+)", done.stdout, re.M)
    return {"exit": done.returncode, **counts, "not_passed": not_passed}


def triton_dequantize(device: str, size: str) -> dict:
    """Our compiled Triton kernel against the plain path, with one and two levels of constants."""
    from lora2qlora import fast

    if not device.startswith("cuda"):
        return {"skipped": "needs a CUDA device"}
    figures = {}
    for shape in SHAPES[size]:
        for dtype in DTYPES:
            q = quantize_nf4(weights(shape, dtype, device))
            for name, weight in (("plain", q), ("nested", double_quantize(q))):
                wrong = (fast.dequantize_nf4(weight) != dequantize_nf4(weight)).sum()
                figures[f"{list(shape)}, {str(dtype).removeprefix('torch.')}, {name}"] = int(wrong)
    return figures


def jobs(device: str, size: str) -> dict:
    """The part's runs by name, each without an argument."""
    return {
        "against bitsandbytes": lambda: compare(device, size),
        "double quantization": lambda: compare_nested(device, size),
        "edges": lambda: edges(device),
        "tests marked gpu": marked_tests,
        "triton dequantize": lambda: triton_dequantize(device, size),
    }

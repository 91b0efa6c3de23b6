"""speed.py, the Triton kernels in Triton's interpreter: compared with the plain path, not timed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from lora2qlora import fast, nf4
from lora2qlora.double_quantization import double_quantize

SCRIPT = Path(__file__).with_name("speed.py")


def triton_part(rounds: int, shapes: list[list[int]]):
    """The Triton kernels in Triton's interpreter against the plain path; compared, not timed."""
    if importlib.util.find_spec("triton") is None:
        print("triton: the package triton is not installed, left out", flush=True)
        return
    yield {"shapes": shapes}, lambda: run_interpreted(shapes)


def run_interpreted(shapes):
    command = [sys.executable, str(SCRIPT), "--interpreted", json.dumps(shapes)]
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

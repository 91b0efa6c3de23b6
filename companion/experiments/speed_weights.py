"""speed.py, NF4 weights: quantize, dequantize, double quantization, and the processor's vectors."""

import ctypes

import bitsandbytes as bnb
import torch
from bitsandbytes.cextension import lib
from lora2qlora import fast, nf4
from lora2qlora.double_quantization import double_quantize
from lora2qlora.fast import library
from lora2qlora.nf4 import NF4Weight, nf4_codebook
from speed_rounds import speedups, take_turns

SHAPES = [[4096, 4096], [4096, 11008]]
DTYPES = ["float32", "bfloat16"]


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

"""The same bytes sooner: NF4 in C++ on a CPU, in Triton on a GPU, and 8-bit Adam in C++. Chapter 14.

Each function has the signature of the plain one and gives the same results, and hands over to the plain one
whatever it does not take itself. The C++ is compiled when it is first needed, once a process, in a second or
two; where that fails, one warning says so and the plain path stays. Without the package `triton` the plain
path stays on a GPU.
"""

import ctypes
import math
import os
import shutil
import subprocess
import threading
import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from lora2qlora import blockwise, nf4, optimizers
from lora2qlora.blockwise import BlockwiseQuantized
from lora2qlora.double_quantization import QuantizedAbsmax, dynamic_codebook
from lora2qlora.nf4 import NF4Weight, nf4_codebook
from lora2qlora.qlora import NF4Linear

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
constexpr = getattr(tl, "constexpr", None)

# No flag that relaxes arithmetic: a product and a sum are rounded one by one, and small numbers stay.
FLAGS = "-std=c++17 -O3 -march=native -ffp-contract=off -fno-math-errno -fopenmp -shared -fPIC".split()

# Sixteen numbers at a time. A table of sixteen floats is one register of AVX-512, and looking up sixteen
# codes in it is one instruction. GCC writes it as __builtin_shuffle; elsewhere a loop does the same.
CPP = r"""
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef int64_t longs __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

static inline floats look_up(floats table, ints index) {
#ifdef __clang__
    floats out;
    for (int k = 0; k < 16; ++k) out[k] = table[index[k] & 15];
    return out;
#else
    return __builtin_shuffle(table, index & 15);
#endif
}

// Sixteen packed bytes, one in each lane; what stands above the byte is not cleared.
static inline ints spread(const uint8_t *packed) {
    int64_t word[2];
    std::memcpy(word, packed, 16);
    ints a = (ints)(word[0] + longs{}), b = (ints)(word[1] + longs{});
    ints four = __builtin_shufflevector(a, b, 0, 0, 0, 0, 1, 1, 1, 1, 16, 16, 16, 16, 17, 17, 17, 17);
    return four >> ints{0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24};
}

// Thirty-two weights in their order: the first of each byte, then the second.
static inline void store(float *out, floats first, floats second) {
    floats a = __builtin_shufflevector(first, second, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22,
                                       7, 23);
    floats b = __builtin_shufflevector(first, second, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                       15, 31);
    std::memcpy(out, &a, 64);
    std::memcpy(out + 16, &b, 64);
}

// The bits of the nearest bfloat16 in the upper half, ties to even; a NaN stays one.
static inline ints round_to_bf16(floats x) {
    ints bits = (ints)x;
    return x == x ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fc00000;
}

static inline void store(uint16_t *out, floats first, floats second) {
    ints pairs = (round_to_bf16(second) & -65536) | (round_to_bf16(first) >> 16 & 65535);
    std::memcpy(out, &pairs, 64);
}

struct Absmax {  // of a block: as it is stored, or code by code from a group's scale and the offset
    const float *values;
    const uint8_t *codes;
    const float *codebook, *offset;
    int64_t group;
    float operator()(int64_t block) const {
        return codes ? codebook[codes[block]] * values[block / group] + *offset : values[block];
    }
};

template <class T>
static void dequantize(const uint8_t *packed, Absmax absmax, const float *codebook, T *out, int64_t count,
                       int64_t size, int threads) {
    floats table;
    std::memcpy(&table, codebook, 64);
    int64_t blocks = (count + size - 1) / size;
    #pragma omp parallel for num_threads(threads) if (count > 32768)
    for (int64_t block = 0; block < blocks; ++block) {
        float s = absmax(block);
        int64_t i = block * size, end = i + size < count ? i + size : count;
        for (; i + 32 <= end; i += 32) {
            ints codes = spread(packed + i / 2);
            store(out + i, look_up(table, codes >> 4) * s, look_up(table, codes) * s);
        }
        if (i < end) {
            uint8_t rest[16] = {};
            T last[32];
            std::memcpy(rest, packed + i / 2, (end - i + 1) / 2);
            ints codes = spread(rest);
            store(last, look_up(table, codes >> 4) * s, look_up(table, codes) * s);
            std::memcpy(out + i, last, (end - i) * sizeof(T));
        }
    }
}

static inline ints load(const float *w) {
    ints bits;
    std::memcpy(&bits, w, 64);
    return bits;
}

static inline ints load(const uint16_t *w) {
    halves half;
    std::memcpy(&half, w, 32);
    return __builtin_convertvector(half, ints) << 16;
}

// Returns whether any number was not finite.
template <class T>
static int quantize(const T *w, const float *codebook, uint8_t *packed, float *absmax, int64_t count,
                    int64_t size, int threads) {
    floats middle;
    for (int k = 0; k < 15; ++k) middle[k] = (codebook[k] + codebook[k + 1]) / 2;
    middle[15] = INFINITY;
    int64_t blocks = (count + size - 1) / size;
    int wrong = 0;
    #pragma omp parallel for num_threads(threads) if (count > 32768) reduction(|:wrong)
    for (int64_t block = 0; block < blocks; ++block) {
        int64_t start = block * size, here = start + size < count ? size : count - start;
        int64_t whole = here / 16 * 16;
        T rest[16] = {};  // zeros fill it up, so that an odd count ends with the code of zero
        std::memcpy(rest, w + start + whole, (here - whole) * sizeof(T));
        ints largest = load(rest) & 0x7fffffff;  // without its sign a float orders as its bits do
        for (int64_t i = 0; i < whole; i += 16) {
            ints bits = load(w + start + i) & 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        int32_t top = 0;
        for (int k = 0; k < 16; ++k) top = largest[k] > top ? largest[k] : top;
        wrong |= top >= 0x7f800000;  // infinity, and NaN above it
        float s;
        std::memcpy(&s, &top, 4);
        absmax[block] = s;
        s = s > 1e-38f ? s : 1e-38f;
        float inverse = 1 / s;
        for (int64_t i = 0; i < here; i += 16) {
            floats x = (floats)load(i < whole ? w + start + i : rest);
            x = here == size ? x * inverse : x / s;
            ints code = {};
            for (int step = 8; step; step /= 2) code -= (x > look_up(middle, code + (step - 1))) * step;
            uint8_t bytes[8];
            for (int k = 0; k < 8; ++k) bytes[k] = code[2 * k] << 4 | code[2 * k + 1];
            std::memcpy(packed + (start + i) / 2, bytes, i < whole ? 8 : (here - whole + 1) / 2);
        }
    }
    return wrong;
}

struct State {  // one of Adam's two: codes and absmax, codebook, midpoints, and where to begin to search
    uint8_t *codes;
    float *absmax;
    const float *codebook, *middle;
    const uint8_t *start;
    void write(const float *x, int64_t from, int64_t here, int64_t block, bool whole) {
        float s = 0;
        for (int64_t i = 0; i < here; ++i) s = std::fabs(x[i]) > s ? std::fabs(x[i]) : s;
        absmax[block] = s;
        s = s > 1e-38f ? s : 1e-38f;
        float inverse = 1 / s;
        for (int64_t i = 0; i < here; ++i) {
            float scaled = whole ? x[i] * inverse : x[i] / s;
            uint32_t bits;
            std::memcpy(&bits, &scaled, 4);
            int code = start[bits >> 16];
            while (scaled > middle[code]) ++code;
            codes[from + i] = code;
        }
    }
};

extern "C" {
void dequantize_nf4(const uint8_t *packed, const float *values, const uint8_t *codes, const float *map,
                    const float *offset, int64_t group, const float *codebook, void *out, int bf16,
                    int64_t count, int64_t size, int threads) {
    Absmax absmax{values, codes, map, offset, group};
    if (bf16) dequantize(packed, absmax, codebook, (uint16_t *)out, count, size, threads);
    else dequantize(packed, absmax, codebook, (float *)out, count, size, threads);
}

int quantize_nf4(const void *w, int bf16, const float *codebook, uint8_t *packed, float *absmax,
                 int64_t count, int64_t size, int threads) {
    if (bf16) return quantize((const uint16_t *)w, codebook, packed, absmax, count, size, threads);
    return quantize((const float *)w, codebook, packed, absmax, count, size, threads);
}

// options: beta1, 1 - beta1, beta2, 1 - beta2, root of 1 - beta2^t, eps, 1 - lr * decay, -lr / (1 - beta1^t)
void adam(float *x, const float *grad, State *m, State *v, const float *options, int64_t count, int64_t size,
          int threads) {
    float b1 = options[0], c1 = options[1], b2 = options[2], c2 = options[3];
    float root = options[4], eps = options[5], keep = options[6], rate = options[7];
    int64_t blocks = (count + size - 1) / size;
    #pragma omp parallel num_threads(threads) if (count > 32768)
    {
        float *first = new float[2 * size], *second = first + size;
        #pragma omp for
        for (int64_t block = 0; block < blocks; ++block) {
            int64_t from = block * size, here = from + size < count ? size : count - from;
            float sm = m->absmax[block], sv = v->absmax[block];
            for (int64_t i = 0; i < here; ++i) {
                float g = grad[from + i];
                float a = m->codebook[m->codes[from + i]] * sm * b1;
                float b = v->codebook[v->codes[from + i]] * sv * b2;
                first[i] = std::fma(c1, g, a);
                second[i] = std::fma(c2 * g, g, b);
                float below = std::sqrt(second[i]) / root + eps;
                x[from + i] = x[from + i] * keep + rate * first[i] / below;
            }
            m->write(first, from, here, block, here == size);
            v->write(second, from, here, block, here == size);
        }
        delete[] first;
    }
}
}
"""


class _State(ctypes.Structure):
    """Pointers to one of Adam's states and to its tables, as the C++ has them."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "absmax", "codebook", "middle", "start")]


@cache
def _library() -> ctypes.CDLL | None:
    """The C++ functions, compiled now and for this processor; None, and one warning, where that fails."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    reason = "no C++ compiler is on PATH (g++, c++ or clang++; CXX names another)"
    if compiler:
        with TemporaryDirectory() as directory:
            source, target = Path(directory, "fast.cpp"), Path(directory, "fast.so")
            source.write_text(CPP, encoding="utf-8")
            try:
                command = [compiler, *FLAGS, str(source), "-o", str(target)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                return _declare(ctypes.CDLL(str(target)))
            except (OSError, subprocess.CalledProcessError) as error:
                said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                reason = f"{compiler} could not compile it: {said[0] if said else 'it said nothing'}"
    warnings.warn(f"lora2qlora.fast takes the plain path on the CPU: {reason}", stacklevel=3)
    return None


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The types of the C++ functions' arguments: p a pointer, n a 64-bit integer, i an int."""
    types = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int}
    for name, letters in {
        "dequantize_nf4": "pppppnppinni",
        "quantize_nf4": "pipppnni",
        "adam": "pppppnni",
    }.items():
        getattr(library, name).argtypes = [types[letter] for letter in letters]
    library.quantize_nf4.restype = ctypes.c_int
    library.dequantize_nf4.restype = library.adam.restype = None
    return library


@cache
def _nf4_table() -> Tensor:
    return nf4_codebook()


@cache
def _dynamic_table() -> Tensor:
    return dynamic_codebook()


def quantize_nf4(w: Float[Tensor, "..."], block_size: int = 64) -> NF4Weight:
    """`nf4.quantize_nf4`, the same bytes, in C++ for float32 and bfloat16 on a CPU; one pass over the weight.

    A block size that is odd, other dtypes and devices, and an empty weight take the plain path. It raises
    what the plain one raises. QLoRA, section 3. Chapter 14.
    """
    taken = isinstance(w, Tensor) and w.is_cpu and w.layout == torch.strided and w.numel() > 0
    taken = taken and w.dtype in (torch.float32, torch.bfloat16)
    taken = taken and isinstance(block_size, int) and block_size > 0 and block_size % 2 == 0
    if not taken or (library := _library()) is None:
        return nf4.quantize_nf4(w, block_size)
    flat = w.detach().reshape(-1).contiguous()
    packed = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32)
    wrong = library.quantize_nf4(
        flat.data_ptr(),
        flat.dtype == torch.bfloat16,
        _nf4_table().data_ptr(),
        packed.data_ptr(),
        absmax.data_ptr(),
        flat.numel(),
        block_size,
        torch.get_num_threads(),
    )
    if wrong:
        return nf4.quantize_nf4(w, block_size)  # which says what is wrong, and where
    return NF4Weight(packed, absmax, w.shape, w.dtype, block_size)


def dequantize_nf4(
    q: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Float[Tensor, "..."]:
    """`nf4.dequantize_nf4`, the same bits, in C++ on a CPU and in Triton on a GPU; quantized absmax included.

    A quantized absmax is read block by block inside the kernel, without a tensor in between. On a CPU it
    takes float32 and bfloat16; the rest takes the plain path. It raises what the plain one raises.
    Chapter 14.
    """
    wanted = out.dtype if out is not None and dtype is None else dtype or q.dtype
    constants = _constants(q)
    device = q.packed.device
    if not _fits(q, constants, wanted, out) or not _is_ready(device):
        return nf4.dequantize_nf4(q, dtype, out)
    if out is None:
        out = torch.empty(q.shape, dtype=wanted, device=device)
    if not q.packed.is_cpu:
        return dequantize_triton(q, out)
    values, codes, offset, group = constants
    nested = (codes.data_ptr(), _dynamic_table().data_ptr(), offset.data_ptr()) if group else (None,) * 3
    _library().dequantize_nf4(
        q.packed.data_ptr(),
        values.data_ptr(),
        *nested,
        group,
        _nf4_table().data_ptr(),
        out.data_ptr(),
        wanted == torch.bfloat16,
        out.numel(),
        q.block_size,
        torch.get_num_threads(),
    )
    return out


def _constants(q: NF4Weight) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """An absmax as the kernels read it: values, and where it is quantized its codes, offset, group size."""
    if isinstance(q.absmax, QuantizedAbsmax):
        return q.absmax.scales, q.absmax.codes, q.absmax.offset, q.absmax.group_size
    return (q.absmax if isinstance(q.absmax, Tensor) else q.absmax.dequantize()), None, None, 0


def _fits(q: NF4Weight, constants: tuple, dtype: torch.dtype, out: Tensor | None) -> bool:
    """Whether a kernel may read and write here: it does not look at sizes itself."""
    values, codes, offset, group = constants
    count = math.prod(q.shape)
    blocks = -(-count // q.block_size)
    need = [(q.packed, torch.uint8, -(-count // 2)), (values, torch.float32, blocks)]
    if group:
        groups = -(-blocks // group)
        need = [need[0], (values, torch.float32, groups), (codes, torch.uint8, blocks)]
        need.append((offset, torch.float32, 1))
    right = all(
        t.dtype == kind and t.numel() >= size and t.is_contiguous() and t.device == q.packed.device
        for t, kind, size in need
    )
    if out is not None:
        right = right and out.shape == q.shape and out.dtype == dtype and out.is_contiguous()
        right = right and out.device == q.packed.device
    kinds = (torch.float32, torch.bfloat16) if q.packed.is_cpu else blockwise.FLOATS
    return right and count > 0 and q.block_size % 2 == 0 and dtype in kinds


def _is_ready(device: torch.device) -> bool:
    """Whether there is a kernel for this device."""
    if device.type == "cpu":
        return _library() is not None
    return device.type == "cuda" and triton is not None


class _Scratch(threading.local):
    """Memory of a thread, as large as the largest weight it was asked for."""

    memory = torch.empty(0, dtype=torch.uint8)


_scratch = _Scratch()


def dequantize_to_scratch(q: NF4Weight, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """`dequantize_nf4` into memory that the next call in this thread overwrites; copy what you keep.

    One piece of memory serves all shapes and dtypes. On a GPU the allocator hands out warm memory anyway, so
    there every call has its own. Chapter 14.
    """
    if not q.packed.is_cpu or not dtype.is_floating_point:
        return dequantize_nf4(q, dtype)
    size = math.prod(q.shape) * dtype.itemsize
    if _scratch.memory.nbytes < size:
        with torch.inference_mode(False):  # else a later training step could not use it
            _scratch.memory = torch.empty(size, dtype=torch.uint8)
    return dequantize_nf4(q, dtype, _scratch.memory[:size].view(dtype).view(q.shape))


def use_fast(model: nn.Module) -> None:
    """Hand `dequantize_to_scratch` to every NF4Linear of a model, as its `dequantize`.

    Results keep their bits. Where there is no kernel for a layer's device the plain path stays; for a CPU a
    warning says so, once a process. Raises ValueError: the model has no NF4Linear. Chapter 14.
    """
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no NF4Linear to make fast: quantize_base first")
    for layer in layers:
        if _is_ready(layer.packed.device):
            layer.dequantize = dequantize_to_scratch


def adam_step_8bit(
    x: Float[Tensor, " n"],
    grad: Float[Tensor, " n"],
    m: BlockwiseQuantized,
    v: BlockwiseQuantized,
    step: int,
    group: dict,
    codebooks: tuple[Tensor, Tensor],
) -> None:
    """`optimizers.adam_step_8bit` in one pass of C++, for float32 x and gradient on a CPU.

    Set it as an `AdamW8bit`'s `update`. A last bit of x, m or v may differ from the plain path's, which fuses
    multiplication and addition on some processors, and so may a code beside a midpoint. Chapter 14.
    """
    tensors = (m.indices, m.absmax, v.indices, v.absmax)
    taken = all(t.is_cpu and t.is_contiguous() for t in (x, grad, *tensors, *codebooks))
    taken = taken and x.dtype == grad.dtype == torch.float32 and len(x) > 0
    if not taken or (library := _library()) is None:
        return optimizers.adam_step_8bit(x, grad, m, v, step, group, codebooks)
    lr, (beta1, beta2) = group["lr"], group["betas"]
    root, rate = math.sqrt(1 - beta2**step), -lr / (1 - beta1**step)
    keep = 1 - lr * group["weight_decay"]
    options = torch.tensor([beta1, 1 - beta1, beta2, 1 - beta2, root, group["eps"], keep, rate])
    states, tables = [], []
    for q, codebook in zip((m, v), codebooks, strict=True):
        middle, start = _search_tables(tuple(codebook.tolist()))
        tables += [middle, start]
        pointers = [t.data_ptr() for t in (q.indices, q.absmax, codebook, middle, start)]
        states.append(_State(*pointers))
    library.adam(
        x.data_ptr(),
        grad.data_ptr(),
        *[ctypes.addressof(state) for state in states],
        options.data_ptr(),
        len(x),
        m.block_size,
        torch.get_num_threads(),
    )


@cache
def _search_tables(codebook: tuple[float, ...]) -> tuple[Float[Tensor, " codes"], UInt8[Tensor, "65536"]]:
    """The midpoints of a codebook, infinity last, and for the upper 16 bits of a float the least code."""
    values = torch.tensor(codebook, dtype=torch.float32)
    middle = (values[:-1] + values[1:]) / 2
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    least = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    start = torch.bucketize(least.nan_to_num(0.0), middle).to(torch.uint8)
    return torch.cat([middle, middle.new_tensor([math.inf])]), start


# On a GPU. The kernels are plain functions until they are used, so that they can be read without Triton.


def dequantize_kernel(
    packed, values, codes, code_map, offset, codebook, out, count, block_size, group_size,
    NESTED: constexpr, BYTES: constexpr,
):  # fmt: skip
    """A program reads BYTES packed bytes and writes two weights for each; the absmax is made on the way."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = 2 * byte < count
    pair = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    block = 2 * byte // block_size
    s = tl.load(values + (block // group_size if NESTED else block), mask=inside, other=0.0)
    if NESTED:
        code = tl.load(codes + block, mask=inside, other=0).to(tl.int32)
        s = tl.load(code_map + code) * s + tl.load(offset)
    first, second = tl.load(codebook + (pair >> 4)) * s, tl.load(codebook + (pair & 15)) * s
    weights = tl.interleave(first, second).to(out.dtype.element_ty)
    element = tl.program_id(0).to(tl.int64) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    tl.store(out + element, weights, mask=element < count)


def matmul_kernel(
    x, packed, values, codes, code_map, offset, codebook, y, rows, outs, block_size, group_size,
    INS: constexpr, NESTED: constexpr, M: constexpr, N: constexpr, K: constexpr,
):  # fmt: skip
    """A program makes M x N of y = x Wᵀ: K columns of W at a time are dequantized, and never stored."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    unit = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, INS, K):
        column, byte = start + tl.arange(0, K), start // 2 + tl.arange(0, K // 2)
        inside = (unit[:, None] < outs) & (2 * byte[None, :] < INS)
        place = unit[:, None] * (INS // 2) + byte[None, :]
        pair = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
        block = 2 * place // block_size
        s = tl.load(values + (block // group_size if NESTED else block), mask=inside, other=0.0)
        if NESTED:
            code = tl.load(codes + block, mask=inside, other=0).to(tl.int32)
            s = tl.load(code_map + code) * s + tl.load(offset)
        first, second = tl.load(codebook + (pair >> 4)) * s, tl.load(codebook + (pair & 15)) * s
        weights = tl.interleave(first, second).to(x.dtype.element_ty)
        within = (row[:, None] < rows) & (column[None, :] < INS)
        piece = tl.load(x + row[:, None].to(tl.int64) * INS + column[None, :], mask=within, other=0.0)
        total = tl.dot(piece, tl.trans(weights), total, input_precision="ieee")
    place = row[:, None].to(tl.int64) * outs + unit[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(row[:, None] < rows) & (unit[None, :] < outs))


@cache
def _jit(kernel):
    return triton.jit(kernel)


def _triton_constants(q: NF4Weight) -> tuple:
    """What both kernels read besides the packed bytes; tensors that are not used are stood in for."""
    values, codes, offset, group = _constants(q)
    device = q.packed.device
    nested = (codes, _dynamic_table().to(device), offset) if group else (q.packed, values, values)
    return values, *nested, _nf4_table().to(device)


def dequantize_triton(q: NF4Weight, out: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The weight written into `out`, contiguous and on the same device, by one Triton kernel. Chapter 14.

    Multiplication and addition are not fused, so the bits are the plain path's. What may be asked of it
    `dequantize_nf4` checks.
    """
    group = _constants(q)[3]
    size = 1024
    grid = (triton.cdiv(out.numel(), 2 * size),)
    _jit(dequantize_kernel)[grid](
        q.packed, *_triton_constants(q), out, out.numel(), q.block_size, group or 1, bool(group), size,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def matmul_triton(x: Float[Tensor, "*batch in"], q: NF4Weight) -> Float[Tensor, "*batch out"]:
    """x Ŵᵀ by one Triton kernel that dequantizes tile by tile: no dense weight is ever stored.

    Equal to `x @ dequantize_nf4(q, x.dtype).T` but for the order of a sum, kept in float32. For few rows it
    reads a quarter of a bf16 weight's bytes; for many the same tile is dequantized again for every M rows.

    Raises ValueError: x and q do not fit each other, or a row or a block of q has an odd number of weights.
    Chapter 14.
    """
    if len(q.shape) != 2 or x.shape[-1] != q.shape[1] or x.device != q.packed.device:
        raise ValueError(
            f"x is {list(x.shape)} on {x.device}, the weight {list(q.shape)} on {q.packed.device}: "
            f"need [..., in] and [out, in] on one device"
        )
    if q.shape[1] % 2 or q.block_size % 2:
        raise ValueError(f"need rows and blocks of even length, got {q.shape[1]} and {q.block_size}")
    outs, ins = q.shape
    flat = x.reshape(-1, ins).contiguous()
    y = torch.empty(len(flat), outs, dtype=x.dtype, device=x.device)
    group, (m, n, k) = _constants(q)[3], (16, 64, 64)
    grid = (triton.cdiv(len(flat), m), triton.cdiv(outs, n))
    _jit(matmul_kernel)[grid](
        flat, q.packed, *_triton_constants(q), y, len(flat), outs, q.block_size, group or 1,
        ins, bool(group), m, n, k, enable_fp_fusion=False,
    )  # fmt: skip
    return y.view(*x.shape[:-1], outs)

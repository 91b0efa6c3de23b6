"""NF4 on a GPU, in Triton: dequantize, and multiply without ever storing a dense weight. Chapter 14.

The kernels are plain functions until they are used, so that they can be read without Triton.
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from lora2qlora.blockwise import table
from lora2qlora.double_quantization import DYNAMIC_VALUES
from lora2qlora.fast.inputs import constants_of
from lora2qlora.fast.operators import nothing, operator
from lora2qlora.nf4 import NF4_VALUES, NF4Weight

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
constexpr = getattr(tl, "constexpr", None)


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


def _tables(values: Tensor, codes: Tensor | None, offset: Tensor | None, packed: Tensor) -> tuple:
    """What both kernels read besides the packed bytes; tensors that are not used are stood in for."""
    nested = (packed, values, values) if codes is None else (codes, table(DYNAMIC_VALUES, packed), offset)
    return values, *nested, table(NF4_VALUES, packed)


def _dequantize(packed, values, codes, offset, group, block_size, out) -> None:
    size = 1024
    grid = (triton.cdiv(out.numel(), 2 * size),)
    torch.autograd.graph.increment_version(out)
    _jit(dequantize_kernel)[grid](
        packed, *_tables(values, codes, offset, packed), out, out.numel(), block_size, group or 1,
        bool(group), size, enable_fp_fusion=False,
    )  # fmt: skip


def dequantize_triton(q: NF4Weight, out: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The weight written into `out`, contiguous and on the same device, by one Triton kernel. Chapter 14.

    Multiplication and addition are not fused, so the bits are the plain path's. What may be asked of it
    `dequantize_nf4` checks.
    """
    dequantize(q.packed, *constants_of(q), q.block_size, out)
    return out


def _matmul(x, packed, values, codes, offset, group, block_size, outs) -> Tensor:
    y = torch.empty(len(x), outs, dtype=x.dtype, device=x.device)
    m, n, k = 16, 64, 64
    grid = (triton.cdiv(len(x), m), triton.cdiv(outs, n))
    _jit(matmul_kernel)[grid](
        x, packed, *_tables(values, codes, offset, packed), y, len(x), outs, block_size, group or 1,
        x.shape[1], bool(group), m, n, k, enable_fp_fusion=False,
    )  # fmt: skip
    return y


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
    y = matmul(x.reshape(-1, ins).contiguous(), q.packed, *constants_of(q), q.block_size, outs)
    return y.view(*x.shape[:-1], outs)


WEIGHT = "Tensor packed, Tensor values, Tensor? codes, Tensor? offset, int group, int block_size"
dequantize = operator(f"dequantize_triton({WEIGHT}, Tensor(a!) out) -> ()", _dequantize, nothing)
matmul = operator(
    f"matmul_triton(Tensor x, {WEIGHT}, SymInt outs) -> Tensor",
    _matmul,
    lambda x, packed, values, codes, offset, group, block_size, outs: x.new_empty(x.shape[0], outs),
)

"""The linear layers of a block, forward and backward: trained, or frozen, in NF4, adapted.

Here and in the operations built on it, forward gives a size and its pullback. A pullback takes over the
gradient of the output and returns that of the input, or None.
"""

from collections.abc import Callable

from lora2qlora.memory.methods import Full, LoRA, QLoRA
from lora2qlora.memory.shape import LlamaShape
from lora2qlora.memory.tape import Size, Tape
from lora2qlora.nf4 import PIECE


class Linears:
    """The linear layers of one shape as the method has them, for so many tokens."""

    def __init__(self, tape: Tape, shape: LlamaShape, method: Full | LoRA | QLoRA, tokens: int):
        self.tape, self.method, self.tokens, self.sizes = tape, method, tokens, shape.linears
        self.full, self.width = isinstance(method, Full), method.dtype.itemsize
        self.adapted_names = () if self.full else method.chosen(shape.linears)
        self.biased = shape.biases

    def __call__(self, name: str, x: Size):
        """The layer of this name."""
        out, in_ = self.sizes[name]
        base = self.quantized if isinstance(self.method, QLoRA) else self.plain
        if name in self.adapted_names:
            return self.adapted(x, out, in_, base)
        return base(x, out, in_, name in self.biased)

    def plain(self, x: Size, out: int, in_: int, biased: bool = False):
        """y = x Wᵀ. Only a weight that trains keeps its input."""
        tape, n, width = self.tape, self.tokens, self.width
        saved = [tape.save(x)] if self.full else []
        saved += [tape.save(Size(0, "weights", False))] if x.needs else []  # W itself: no byte more
        y = tape.new(n * out * width, needs=x.needs or self.full)

        def pullback(gradient, of_x=None):
            tape.load(*saved)
            if self.full:
                tape.new(out * in_ * width, "gradients")
                tape.new(out * biased * width, "gradients")
            if x.needs:
                of_x = tape.add(of_x, tape.new(n * in_ * width))
            tape.drop(gradient)
            tape.release(*saved)
            return of_x

        return y, pullback

    def quantized(self, x: Size, out: int, in_: int, biased: bool = False):
        """y = x Ŵᵀ, with Ŵ dequantized for the moment, forward and backward."""
        tape, n, width, compute = self.tape, self.tokens, self.width, self.method.compute_dtype.itemsize
        cast_x = tape.cast(x, n * in_ * compute, keep=True)
        weight = self.dequantize(out * in_)
        y = tape.new(n * out * compute)
        tape.drop(weight, cast_x)
        saved = [tape.save(Size(0, "weights", False))] if x.needs else []
        y = tape.cast(y, n * out * width)
        y.needs = x.needs

        def pullback(gradient, of_x=None):
            gradient = tape.cast(gradient, n * out * compute)
            tape.load(*saved)
            weight = self.dequantize(out * in_)
            of_cast_x = tape.new(n * in_ * compute)
            tape.drop(weight, gradient)
            tape.release(*saved)
            return tape.add(of_x, tape.cast(of_cast_x, n * in_ * width))

        return y, pullback

    def dequantize(self, count: int) -> Size:
        """The dense weight, by way of its absmax values and of pieces of some 2^18 numbers."""
        tape, method = self.tape, self.method
        dense = tape.new(count * method.compute_dtype.itemsize)
        blocks = 4 * -(-count // method.block_size)
        absmax = []
        if method.group_size is not None:
            steps = [tape.new(blocks) for _ in range(2)]
            absmax = [tape.new(blocks)]
            tape.drop(*steps)
        piece = max(1, PIECE // (2 * method.block_size)) * 2 * method.block_size
        # Codes in 8 and in 32 bits and values in 32; from the second piece on the last values are there too.
        tape.drop(tape.new(64 + (9 * count if count <= piece else 13 * piece)), *absmax)
        return dense

    def adapted(self, x: Size, out: int, in_: int, base: Callable):
        """y = base(x) + (α / r) B A x as `LoRALinear` has it, with a cast wherever the dtypes differ."""
        tape, n, width, rank = self.tape, self.tokens, self.width, self.method.rank
        own = self.method.adapter_dtype.itemsize
        wide = max(own, width)
        y, pull_base = base(x, out, in_)
        cast_x = tape.cast(x, n * in_ * own, keep=True)
        saved_x = tape.save(cast_x)
        unscaled = tape.new(n * rank * own)
        tape.drop(cast_x)
        low = tape.new(n * rank * own)
        tape.drop(unscaled)
        saved_low = tape.save(low)
        update = tape.new(n * out * own)
        total = tape.new(n * out * wide)
        tape.drop(update)
        total = tape.cast(total, n * out * width)
        tape.drop(y, low)
        total.needs = True

        def pullback(gradient, of_x=None):
            gradient = tape.cast(gradient, n * out * wide)
            of_y = tape.cast(gradient, n * out * width, keep=True) if x.needs else None
            gradient = tape.cast(gradient, n * out * own)
            tape.load(saved_low, saved_x)
            tape.new(out * rank * own, "gradients")
            of_low = tape.new(n * rank * own)
            tape.drop(gradient)
            tape.release(saved_low)
            of_unscaled = tape.new(n * rank * own)
            tape.drop(of_low)
            tape.new(rank * in_ * own, "gradients")
            if x.needs:
                of_cast_x = tape.new(n * in_ * own)
            tape.drop(of_unscaled)
            tape.release(saved_x)
            if not x.needs:
                return None
            of_x = tape.add(of_x, tape.cast(of_cast_x, n * in_ * width))
            return pull_base(of_y, of_x)

        return total, pullback

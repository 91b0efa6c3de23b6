"""RMSNorm on the tape, forward and backward, in the three ways in which models have it."""

from lora2qlora.memory.methods import Full, LoRA, QLoRA
from lora2qlora.memory.shape import LlamaShape
from lora2qlora.memory.tape import Size, Slot, Tape


class Norms:
    """The norms of one shape: squares, mean, root and product in float32, then the weight."""

    def __init__(self, tape: Tape, shape: LlamaShape, method: Full | LoRA | QLoRA):
        self.tape, self.kind = tape, shape.traits.norm
        self.full, self.width = isinstance(method, Full), method.dtype.itemsize

    def __call__(self, x: Size, vectors: int, dim: int):
        """`vectors` of `dim` numbers, each brought to a mean square of 1 and multiplied by the weight."""
        tape, short, exact = self.tape, 4 * vectors, 4 * vectors * dim
        cast_x = tape.cast(x, exact, keep=True)
        saved = [tape.save(cast_x)] if x.needs else []
        square = tape.new(exact)
        mean = tape.new(short)
        tape.drop(square)
        shifted = tape.new(short)
        if self.kind == "shifted":  # its mean has no name, and goes at once
            tape.drop(mean)
        root = tape.new(short)
        saved += [tape.save(root)] if x.needs else []
        tape.drop(shifted)
        saved += [tape.save(cast_x), tape.save(root)] if x.needs else []
        product = tape.new(exact)
        tape.drop(root, cast_x)
        weigh = self.cast_first if self.kind == "cast" else self.cast_last
        y, pull_weight = weigh(x, product, dim)
        if self.kind != "shifted":
            tape.drop(mean)

        def pullback(gradient):
            gradient = pull_weight(gradient)
            return self.back(gradient, saved, vectors, dim) if x.needs else None

        return y, pullback

    def cast_first(self, x: Size, product: Size, dim: int):
        """The product is cast back, then the weight multiplies it, as in a Llama."""
        tape, size = self.tape, x.size
        scaled = tape.cast(product, size, keep=True)
        saved = [tape.save(scaled)] if self.full else []
        y = tape.new(size, needs=x.needs or self.full)
        tape.drop(scaled, product)

        def pullback(gradient):
            of_scaled = tape.new(size) if x.needs else None
            if self.full:
                tape.load(*saved)
                long = tape.new(size)
                tape.new(self.width * dim, "gradients")
                tape.drop(long)
                tape.release(*saved)
            tape.drop(gradient)
            return of_scaled

        return y, pullback

    def cast_last(self, x: Size, product: Size, dim: int):
        """The weight multiplies in float32, in Gemma after 1 was added to it."""
        tape, size, exact = self.tape, x.size, product.size
        saved = [tape.save(product)] if self.full else []
        if self.kind == "shifted":
            as_float = tape.new(4 * dim if self.width < 4 else 0)
            weight = tape.new(4 * dim)
            tape.drop(as_float)
            saved += [tape.save(weight)] if x.needs else []
        weighed = tape.new(exact)
        if self.kind == "shifted":
            tape.drop(weight)
        y = tape.cast(weighed, size, keep=True)
        y.needs = x.needs or self.full
        tape.drop(weighed, product)

        def pullback(gradient):
            gradient = tape.cast(gradient, exact)
            tape.load(*saved)
            of_product = tape.new(exact) if x.needs else None
            if self.full:
                long = tape.new(exact)
                tape.new(self.width * dim, "gradients")
                tape.drop(long)
            tape.drop(gradient)
            tape.release(*saved)
            return of_product

        return y, pullback

    def back(self, gradient: Size, saved: list[Slot], vectors: int, dim: int) -> Size:
        """The backward pass from the product on: the hungriest of the small operations."""
        tape, short, exact, size = self.tape, 4 * vectors, 4 * vectors * dim, self.width * vectors * dim
        square, root, *both = saved
        tape.load(*saved)
        gradient = tape.cast(gradient, exact)
        of_x, long, of_root = tape.new(exact), tape.new(exact), tape.new(short)
        tape.drop(long, gradient)
        tape.release(*both)
        powers, of_shifted = [tape.new(short), tape.new(short)], tape.new(short)
        tape.drop(of_root, *powers)
        tape.release(root)
        of_square = tape.new(exact)
        tape.drop(of_shifted)
        doubled, of_x_too = [tape.new(exact), tape.new(exact)], tape.new(exact)
        tape.drop(of_square, *doubled)
        tape.release(square)
        return tape.cast(tape.add(of_x, of_x_too), size)

"""A transformer block, forward and backward: norms, attention and MLP, as transformers has them."""

from lora2qlora.memory.linears import Linears
from lora2qlora.memory.methods import Full, LoRA, QLoRA
from lora2qlora.memory.shape import LlamaShape
from lora2qlora.memory.tape import Size, Slot, Tape


class Block:
    """Any one of a model's blocks: on the tape they do not differ."""

    def __init__(self, tape: Tape, shape: LlamaShape, method: Full | LoRA | QLoRA, tokens: int):
        self.tape, self.shape, self.tokens = tape, shape, tokens
        self.full, self.width = isinstance(method, Full), method.dtype.itemsize
        self.linear = Linears(tape, shape, method, tokens)

    def __call__(self, x: Size):
        """Attention and MLP, each behind a norm and added to what came in."""
        tape, size = self.tape, self.tokens * self.shape.hidden * self.width
        normed, pull_norm = self.norm(x)
        mixed, pull_attention = self.attention(normed)
        tape.drop(normed)
        middle = tape.new(size, needs=mixed.needs or x.needs)
        tape.drop(mixed)
        normed, pull_second = self.norm(middle)
        changed, pull_mlp = self.mlp(normed)
        tape.drop(normed)
        y = tape.new(size, needs=changed.needs or middle.needs)
        tape.drop(changed, middle)

        def pullback(gradient):
            for needs, pulls in (
                (middle.needs, (pull_mlp, pull_second)),
                (x.needs, (pull_attention, pull_norm)),
            ):
                branch = tape.hold(gradient)
                for pull in pulls:
                    branch = pull(branch) if branch else None
                if not needs:
                    tape.drop(gradient)
                    return None
                gradient = tape.add(gradient, branch) if branch else gradient
            return gradient

        return y, pullback

    def norm(self, x: Size):
        """RMSNorm as transformers has it: squares, mean, root and product in float32, then cast back."""
        tape, short, exact = self.tape, 4 * self.tokens, 4 * self.tokens * self.shape.hidden
        size = x.size
        cast_x = tape.cast(x, exact, keep=True)
        saved = [tape.save(cast_x)] if x.needs else []
        square = tape.new(exact)
        mean = tape.new(short)
        tape.drop(square)
        shifted = tape.new(short)
        root = tape.new(short)
        saved += [tape.save(root)] if x.needs else []
        tape.drop(shifted)
        saved += [tape.save(cast_x), tape.save(root)] if x.needs else []
        product = tape.new(exact)
        tape.drop(root, cast_x)
        scaled = tape.cast(product, size, keep=True)
        saved_scaled = [tape.save(scaled)] if self.full else []
        y = tape.new(size, needs=x.needs or self.full)
        tape.drop(scaled, product, mean)

        def pullback(gradient):
            of_scaled = tape.new(size) if x.needs else None
            if self.full:
                tape.load(*saved_scaled)
                long = tape.new(size)
                tape.new(self.width * self.shape.hidden, "gradients")
                tape.drop(long)
                tape.release(*saved_scaled)
            tape.drop(gradient)
            return self.norm_back(of_scaled, saved) if x.needs else None

        return y, pullback

    def norm_back(self, gradient: Size, saved: list[Slot]) -> Size:
        """The backward pass of `norm` from its last cast on: the hungriest of the small operations."""
        tape, short, exact = self.tape, 4 * self.tokens, 4 * self.tokens * self.shape.hidden
        square, root, *both = saved
        size, gradient = gradient.size, tape.cast(gradient, exact)
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

    def attention(self, x: Size):
        """q, k and v, turned by their positions, sdpa, and the output projection."""
        tape = self.tape
        q, pull_q = self.linear("q_proj", x)
        k, pull_k = self.linear("k_proj", x)
        v, pull_v = self.linear("v_proj", x)
        turned = [self.turn(q), self.turn(k)]
        tape.drop(q, k)
        needs = q.needs or k.needs or v.needs
        saved = [tape.save(t) for t in (*turned, v)] if needs else []
        mixed = tape.new(q.size, needs=needs)
        log_sums = tape.new(4 * self.tokens * self.shape.heads)
        saved += [tape.save(mixed), tape.save(log_sums)] if needs else []
        tape.drop(log_sums)
        y, pull_o = self.linear("o_proj", mixed)
        tape.drop(mixed, v, *turned)

        def pullback(gradient):
            gradient = pull_o(gradient)
            if not needs:
                return None
            of_q, of_k, of_v = (tape.new(t.size) for t in (q, k, v))
            tape.drop(gradient)
            tape.release(*saved)
            of_k = self.turn_back(of_k, k.needs)
            of_q = self.turn_back(of_q, q.needs)
            of_x = None
            if v.needs:
                of_x = pull_v(of_v)
            else:
                tape.drop(of_v)
            for t, by_head, pull in ((k, of_k, pull_k), (q, of_q, pull_q)):
                if t.needs:  # it lies in memory head by head, and is copied
                    gradient = tape.new(t.size)
                    tape.drop(by_head)
                    of_x = pull(gradient, of_x)
            return of_x

        return y, pullback

    def turn(self, x: Size) -> Size:
        """Rotary positions: x cos + (x turned by halves) sin."""
        tape, size = self.tape, x.size
        by_cos, negated = tape.new(size), tape.new(size // 2)
        halves = tape.new(size)
        tape.drop(negated)
        by_sin = tape.new(size)
        tape.drop(halves)
        y = tape.new(size, needs=x.needs)
        tape.drop(by_cos, by_sin)
        return y

    def turn_back(self, gradient: Size, needs: bool) -> Size | None:
        """The backward pass of `turn`."""
        tape, size = self.tape, gradient.size
        if not needs:
            tape.drop(gradient)
            return None
        by_sin, negated = tape.new(size), tape.new(size // 2)
        first = tape.new(size)
        tape.drop(negated)
        second = tape.new(size)
        tape.drop(by_sin)
        both = tape.add(first, second)
        by_cos = tape.new(size)
        tape.drop(gradient)
        return tape.add(both, by_cos)

    def mlp(self, x: Size):
        """down(silu(gate(x)) · up(x))."""
        tape = self.tape
        gate, pull_gate = self.linear("gate_proj", x)
        saved_gate = [tape.save(gate)] if gate.needs else []
        opened = tape.new(gate.size, needs=gate.needs)
        tape.drop(gate)
        up, pull_up = self.linear("up_proj", x)
        saved = [tape.save(opened)] if up.needs else []
        saved += [tape.save(up)] if opened.needs else []
        product = tape.new(up.size, needs=opened.needs or up.needs)
        tape.drop(opened, up)
        y, pull_down = self.linear("down_proj", product)
        tape.drop(product)

        def pullback(gradient):
            gradient, of_x = pull_down(gradient), None
            if not product.needs:
                return None
            of_opened = tape.new(up.size) if opened.needs else None
            of_up = tape.new(up.size) if up.needs else None
            tape.drop(gradient)
            tape.release(*saved)
            if of_up:
                of_x = pull_up(of_up)
            if of_opened:
                of_gate = tape.new(up.size)
                tape.drop(of_opened)
                tape.release(*saved_gate)
                of_x = pull_gate(of_gate, of_x)
            return of_x

        return y, pullback

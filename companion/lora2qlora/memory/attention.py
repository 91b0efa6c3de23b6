"""Attention on the tape, forward and backward: q, k and v, their positions, sdpa, the output projection."""

from lora2qlora.memory.linears import Linears
from lora2qlora.memory.norms import Norms
from lora2qlora.memory.shape import LlamaShape
from lora2qlora.memory.tape import Size, Tape


class Attention:
    """The attention of one shape, for so many tokens."""

    def __init__(self, tape: Tape, shape: LlamaShape, linear: Linears, norm: Norms, tokens: int):
        self.tape, self.shape, self.tokens, self.width = tape, shape, tokens, linear.width
        self.linear, self.norm = linear, norm

    def __call__(self, x: Size, turns: bool = True):
        """Everything between two norms; without `turns`, the layer has no rotary positions."""
        tape, traits = self.tape, self.shape.traits
        (q, k, v), held, pull_all = self.together(x) if traits.fused else self.apart(x)
        turned = [self.turn(t.size, t.needs) if turns else tape.hold(t) for t in (q, k)]
        if not traits.fused:
            tape.drop(q, k)
        needs = q.needs or k.needs or v.needs
        # Parts of one projection keep it whole.
        saved = [tape.save(t) for t in (*turned, held or v)] if needs else []
        mixed = tape.new(q.size, needs=needs)
        log_sums = tape.new(4 * self.tokens * self.shape.heads)
        saved += [tape.save(mixed), tape.save(log_sums)] if needs else []
        tape.drop(log_sums)
        if traits.fused:  # joined parts lie head by head in memory, and so does what comes of them
            by_head, mixed = mixed, tape.new(q.size, needs=needs)
            tape.drop(by_head)
        y, pull_o = self.linear("o_proj", mixed)
        tape.drop(mixed, held or v, *turned)

        def pullback(gradient):
            gradient = pull_o(gradient)
            if not needs:
                return None
            of_q, of_k, of_v = (tape.new(t.size) for t in (q, k, v))
            tape.drop(gradient)
            tape.release(*saved)
            if turns:
                of_k = self.turn_back(of_k, k.needs)
                of_q = self.turn_back(of_q, q.needs)
            return pull_all(of_q, of_k, of_v, turns)

        return y, pullback

    def apart(self, x: Size):
        """A projection each for q, k and v, the first two normed in some families."""
        tape, late = self.tape, self.shape.traits.norm == "shifted"
        parts = {}
        for name in "qkv":
            parts[name] = self.linear(f"{name}_proj", x)
            if not late:
                parts[name] = self.normed(name, *parts[name])
        if late:
            parts |= {name: self.normed(name, *parts[name]) for name in "qk"}
        (q, pull_q), (k, pull_k), (v, pull_v) = (parts[name] for name in "qkv")

        def pullback(of_q, of_k, of_v, turns):
            of_x = None
            if v.needs:
                of_x = pull_v(of_v, None)
            else:
                tape.drop(of_v)
            for t, by_head, pull in ((k, of_k, pull_k), (q, of_q, pull_q)):
                if t.needs:
                    of_x = pull(by_head, of_x, turns) if pull is not pull_v else None
                elif not turns:
                    tape.drop(by_head)
            return of_x

        return (q, k, v), None, pullback

    def normed(self, name: str, y: Size, pull):
        """A projection, or its norm; a gradient that lies in memory head by head is copied."""
        if name == "v":
            return y, pull
        kind, tape, dim = self.shape.traits.head_norm, self.tape, self.shape.head_dim
        size = y.size
        pull_norm = None
        if kind:
            width = size // self.tokens // self.width
            vectors = self.tokens * (width // dim if kind == "head" else 1)
            before = y
            y, pull_norm = self.norm(y, vectors, dim if kind == "head" else width)
            tape.drop(before)

        def pullback(gradient, of_x, turned=True):
            if kind == "head":
                gradient = pull_norm(gradient)
            if gradient and turned:
                by_head, gradient = gradient, tape.new(size)
                tape.drop(by_head)
            if kind == "width":
                gradient = pull_norm(gradient)
            return pull(gradient, of_x) if gradient else of_x

        return y, pullback

    def together(self, x: Size):
        """One projection, of which q, k and v are parts; the gradient of each is as large as the whole."""
        tape = self.tape
        whole, pull = self.linear("qkv_proj", x)
        q, kv = (width * self.tokens * self.width for width in self.shape.widths)
        parts = [Size(size, "transient", whole.needs) for size in (q, kv, kv)]

        def pullback(of_q, of_k, of_v, turns):
            total = None
            for part in (of_v, of_k, of_q):
                one = tape.new(whole.size)
                tape.drop(part)
                total = tape.add(total, one)
            return pull(total)

        return parts, whole, pullback

    def turn(self, size: int, needs: bool) -> Size:
        """Rotary positions: x cos + (x turned by halves) sin."""
        tape, exact = self.tape, self.exact(size)
        by_cos, negated = tape.new(exact), tape.new(size // 2)
        halves = tape.new(size)
        tape.drop(negated)
        by_sin = tape.new(exact)
        tape.drop(halves)
        y = tape.new(exact, needs=needs)
        tape.drop(by_cos, by_sin)
        if self.shape.traits.fused:  # joined with what is not turned, of which there is nothing
            parts, y = y, tape.new(size, needs=needs)
            tape.drop(parts)
        y = tape.cast(y, size)
        y.needs = needs
        return y

    def exact(self, size: int) -> int:
        """[bytes] of as many numbers in the angles' dtype."""
        return size // self.width * 4 if self.shape.traits.wide_angles else size

    def turn_back(self, gradient: Size, needs: bool) -> Size | None:
        """The backward pass of `turn`."""
        tape, size = self.tape, gradient.size
        if not needs:
            tape.drop(gradient)
            return None
        gradient = tape.cast(gradient, self.exact(size))
        by_sin = tape.cast(tape.new(self.exact(size)), size)
        negated = tape.new(size // 2)
        first = tape.new(size)
        tape.drop(negated)
        second = tape.new(size)
        tape.drop(by_sin)
        both = tape.add(first, second)
        by_cos = tape.cast(tape.new(self.exact(size)), size)
        tape.drop(gradient)
        return tape.add(both, by_cos)

"""A transformer block on the tape, forward and backward: norms, attention and MLP."""

from lora2qlora.memory.attention import Attention
from lora2qlora.memory.linears import Linears
from lora2qlora.memory.methods import Full, LoRA, QLoRA
from lora2qlora.memory.norms import Norms
from lora2qlora.memory.shape import LlamaShape
from lora2qlora.memory.tape import Size, Tape


class Block:
    """A model's blocks, which differ on the tape only in whether they have rotary positions."""

    def __init__(self, tape: Tape, shape: LlamaShape, method: Full | LoRA | QLoRA, tokens: int):
        self.tape, self.shape, self.tokens = tape, shape, tokens
        self.linear, self.norms = Linears(tape, shape, method, tokens), Norms(tape, shape, method)
        self.attention = Attention(tape, shape, self.linear, self.norms, tokens)

    def __call__(self, x: Size, turns: bool = True):
        """Attention and MLP, each added to what came in."""
        middle, pull_attention = self.branch(x, lambda normed: self.attention(normed, turns))
        y, pull_mlp = self.branch(middle, self.fused_mlp if self.shape.traits.fused else self.mlp)
        self.tape.drop(middle)

        def pullback(gradient):
            gradient = pull_mlp(gradient)
            return pull_attention(gradient) if gradient else None

        return y, pullback

    def branch(self, x: Size, operate):
        """x + norm(operate(norm(x))), with the norms that the family has, times a number in some."""
        tape, norms = self.tape, self.shape.traits.norms
        steps = [self.norm] if norms != "after" else []
        steps += [operate]
        steps += [self.norm] if norms != "before" else []
        steps += [self.scale] if self.shape.traits.scaled == "all" else []
        pulls, changed = [], tape.hold(x)
        for step in steps:
            before = changed
            changed, pull = step(changed)
            pulls.append(pull)
            tape.drop(before)
        y = tape.new(x.size, needs=changed.needs or x.needs)
        tape.drop(changed)

        def pullback(gradient):
            branch = tape.hold(gradient)
            for pull in reversed(pulls):
                branch = pull(branch) if branch else None
            if not x.needs:
                tape.drop(gradient)
                return None
            return tape.add(gradient, branch) if branch else gradient

        return y, pullback

    def norm(self, x: Size):
        """RMSNorm over the hidden states."""
        return self.norms(x, self.tokens, self.shape.hidden)

    def scale(self, x: Size):
        """x times a number."""
        tape, size = self.tape, x.size
        y = tape.new(size, needs=x.needs)

        def pullback(gradient):
            of_x = tape.new(size)
            tape.drop(gradient)
            return of_x

        return y, pullback

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

    def fused_mlp(self, x: Size):
        """The same with gate and up in one projection, of which both are parts that keep it whole."""
        tape = self.tape
        both, pull_both = self.linear("gate_up_proj", x)
        size, needs = both.size // 2, both.needs
        saved = [tape.save(both)] if needs else []
        opened = tape.new(size, needs=needs)
        saved += [tape.save(both), tape.save(opened)] if needs else []
        product = tape.new(size, needs=needs)
        tape.drop(opened)
        y, pull_down = self.linear("down_proj", product)
        tape.drop(product, both)

        def pullback(gradient):
            gradient = pull_down(gradient)
            if not needs:
                return None
            of_up, of_opened = tape.new(size), tape.new(size)
            tape.drop(gradient)
            tape.release(*saved[1:])
            of_gate = tape.new(size)
            tape.drop(of_opened)
            tape.release(saved[0])
            of_both = tape.new(2 * size)
            tape.drop(of_up, of_gate)
            return pull_both(of_both)

        return y, pullback

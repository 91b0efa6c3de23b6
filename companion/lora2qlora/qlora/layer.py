"""QLoRA's base: a linear layer whose frozen weight is stored in NF4. QLoRA, sections 2 and 3. Chapter 10."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lora2qlora.double_quantization import QuantizedAbsmax, double_quantize
from lora2qlora.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from lora2qlora.qlora.checks import check_linear
from lora2qlora.qlora.state import check_weight, loading_misfits, shapes_alone, stored_tensors


class DequantizeAndMultiply(torch.autograd.Function):
    """x Ŵᵀ + bias; Ŵ lives only while it is multiplied with, once forward and once backward."""

    @staticmethod
    def forward(ctx, x, bias, layer, packed, *constants):
        ctx.layer = layer
        ctx.save_for_backward(packed, *constants)  # tensors that the layer holds anyway: no byte more
        with _without_autocast(x):
            return F.linear(x, layer.dequantize(layer.assemble(packed, *constants), x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        stored = ctx.saved_tensors  # once: gradient checkpointing gives each tensor back one time
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            with _without_autocast(grad):
                grad_x = grad @ ctx.layer.dequantize(ctx.layer.assemble(*stored), grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, None, *[None for _ in stored]


def _without_autocast(x: Tensor):
    """A context in which products keep the dtype of their factors; meta tensors know no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class NF4Linear(nn.Module):
    """y = x Ŵᵀ + bias, with W [out, in] stored in NF4 and frozen.

    Each forward pass dequantizes W to `compute_dtype`, multiplies, and lets the dense weight go; so does the
    backward pass, which needs it for the gradient of x. Saved in between are the packed bytes alone, which
    the layer holds anyway. x is cast to `compute_dtype`, autocast or not, and y to the dtype of x.

    `packed` and the constants are buffers: `.to(device)` moves them, and `.half()` or `.to(dtype)` leaves
    them as they are. `dequantize(NF4Weight, dtype) -> [out, in]` may be set to a faster function.

    Raises TypeError: no NF4Weight, a dtype that is no float, x that is none; ValueError: a weight that is no
    matrix, parts that do not fit or are not finite, a bias of another shape. As in any cast, what is beyond
    the range of `compute_dtype`, 65,504 for float16, becomes inf. QLoRA, equation 5. Chapter 10.
    """

    dequantize: Callable[[NF4Weight, torch.dtype], Tensor] = staticmethod(dequantize_nf4)

    def __init__(
        self,
        weight: NF4Weight,
        bias: Float[Tensor, " out"] | None = None,
        compute_dtype: torch.dtype = torch.bfloat16,
    ):
        check_weight(weight, bias, compute_dtype)
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.block_size, self.dtype, self.compute_dtype = weight.block_size, weight.dtype, compute_dtype
        self.group_size = getattr(weight.absmax, "group_size", None)
        self.names = tuple(stored_tensors(weight))
        for name, tensor in stored_tensors(weight).items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> "NF4Linear":
        """The same layer with its weight in NF4, in the same mode; the bias is shared, and frozen.

        A layer on the meta device gives one on the meta device, to load a state dict into with assign=True.
        Raises TypeError: not a plain nn.Linear with a float weight; ValueError: numbers not finite, hooks.
        """
        check_linear(linear, block_size)
        if linear.weight.is_meta:
            weight = shapes_alone(linear.weight, block_size, 256 if double_quant else None)
        else:
            weight = quantize_nf4(linear.weight.detach(), block_size)
            weight = double_quantize(weight) if double_quant else weight
        return cls(weight, linear.bias, compute_dtype).train(linear.training)

    @property
    def weight(self) -> NF4Weight:
        """The weight as `nf4` knows it, made of the layer's own tensors; nothing is copied."""
        return self.assemble(*[getattr(self, name) for name in self.names])

    def assemble(self, packed: Tensor, *constants: Tensor) -> NF4Weight:
        """An NF4Weight of this layer's shape from its tensors."""
        absmax = constants[0] if self.group_size is None else QuantizedAbsmax(*constants, self.group_size)
        shape = torch.Size((self.out_features, self.in_features))
        return NF4Weight(packed, absmax, shape, self.dtype, self.block_size)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if not x.is_floating_point():
            raise TypeError(f"a linear layer takes floats, got {x.dtype}")
        stored = [getattr(self, name) for name in self.names]
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return DequantizeAndMultiply.apply(x.to(self.compute_dtype), bias, self, *stored).to(x.dtype)

    def _apply(self, fn, recurse: bool = True):
        """Moves buffers as any module does, but a cast to another dtype leaves them as they are."""
        before = {name: getattr(self, name) for name in self.names}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self

    def get_extra_state(self) -> Int[Tensor, "4"]:
        """[out, in, block size, group size or 0], which goes with the buffers into a state dict."""
        form = (self.out_features, self.in_features, self.block_size, self.group_size or 0)
        return torch.tensor(form, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing is left to set: a state dict of another form is refused before."""

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        """As any module, but a layer is loaded whole or, where anything is wrong, not at all.

        Its tensors come together and alone, strict or not (torch says so only afterwards), the bias and the
        form among them: a transposed weight has as many packed bytes, and other blocks may have as many
        constants. Nothing stored is cast. A model's other layers are loaded or refused each for itself.
        """
        assign = metadata.get("assign_to_params_buffers", False)
        if wrong := loading_misfits(self, state_dict, prefix, assign):
            errors.extend(wrong)
        else:
            keys = [prefix + name for name in self.names if prefix + name in state_dict]
            frozen = {key: state_dict[key].detach() for key in keys}  # a parameter, assigned, would stay one
            state_dict = {**state_dict, **frozen}
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        kind = "double quantization" if self.group_size else "plain absmax"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block_size={self.block_size}, {kind}, {self.compute_dtype}"
        )

"""DoRA: the length of each row of the weight trains apart from its direction. Chapter 18."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lora2qlora.adapters.merging import dense_weight
from lora2qlora.lora import LoRALinear


class DoRALinear(LoRALinear):
    """y = m ⊙ (W + s B A) x / ‖W + s B A‖ + bias, with one norm and one magnitude m [out] for each row.

    m starts as the norms of W's rows, so that the layer starts out equal to its base. The norms are made anew
    in each forward pass and count as constants in the backward pass (section 4.3). `base` is any that
    LoRALinear takes; a quantized one is dequantized once more for the norms, which is what makes DoRA slow.

    There is no dropout: PEFT's would act on the base's output too. Raises as LoRALinear; TypeError: a base
    whose weight cannot be read. Liu and others 2024 (arXiv 2402.09353), equation 5.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dtype: torch.dtype = torch.float32):
        super().__init__(base, rank, alpha, dtype=dtype)
        self.magnitude = nn.Parameter(self.row_norms().to(self.lora_A))

    @torch.no_grad()
    def row_norms(self) -> Float[Tensor, " out"]:
        """‖W + s B A‖ of each row, in float32, without a gradient."""
        return (dense_weight(self.base) + update_of_direction(self)).norm(dim=1)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = self.base(x)
        bias = 0 if self.base.bias is None else self.base.bias
        low = F.linear(x.to(self.lora_A.dtype), self.lora_A) * self.scaling
        times = self.magnitude / self.row_norms().to(self.magnitude.dtype)
        return ((y - bias + F.linear(low, self.lora_B)) * times + bias).to(y.dtype)

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """The update of the weight as a whole: m (W + s B A) / ‖W + s B A‖ - W, in float32."""
        W = dense_weight(self.base)
        times = (self.magnitude.float() / self.row_norms())[:, None]
        return (W + update_of_direction(self)) * times - W


def update_of_direction(layer: LoRALinear) -> Float[Tensor, "out in"]:
    """s B A in float32."""
    return layer.scaling * (layer.lora_B.float() @ layer.lora_A.float())

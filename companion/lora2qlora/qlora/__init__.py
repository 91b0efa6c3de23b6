"""QLoRA's base: linear layers whose frozen weights are stored in NF4. Chapter 10.

QLoRA is `LoRALinear` over `NF4Linear`: `quantize_base(model)`, then `add_lora(model, ...)`. Nothing else
of the model changes. QLoRA, sections 2 and 3.
"""

from lora2qlora.qlora.checks import check_linear
from lora2qlora.qlora.layer import DequantizeAndMultiply, NF4Linear
from lora2qlora.qlora.model import quantize_base
from lora2qlora.qlora.state import check_weight

__all__ = ["DequantizeAndMultiply", "NF4Linear", "check_linear", "check_weight", "quantize_base"]

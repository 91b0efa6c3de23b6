"""A model of transformers, with its tokenizer, as the one file that llama.cpp reads. Chapter 16."""

import os
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from torch import Tensor, nn

from lora2qlora.adapters.base_name import published_name
from lora2qlora.adapters.names import unwrapped
from lora2qlora.lora import LoRALinear
from lora2qlora.qlora import NF4Linear
from lora2qlora.serving.batched import BatchedLoRALinear
from lora2qlora.serving.gguf_adapter import export_adapter
from lora2qlora.serving.gguf_file import write_gguf
from lora2qlora.serving.gguf_names import FAMILIES, gguf_name, in_llama_cpp_order
from lora2qlora.serving.gguf_shape import check_config, rope_factors, write_shape
from lora2qlora.serving.gguf_tokenizer import write_tokenizer

__all__ = ["KINDS", "export_adapter", "export_model"]
# llama.cpp's number for a file of matrices of this kind, and the largest number that one can hold. Scales of
# blocks are float16: a block of Q8_0 holds up to 127 times that, one of Q4_0 up to 8.
KINDS = {
    "F32": (LlamaFileType.ALL_F32, float("inf")),
    "F16": (LlamaFileType.MOSTLY_F16, 65504.0),
    "Q8_0": (LlamaFileType.MOSTLY_Q8_0, 65504.0 * 127),
    "Q4_0": (LlamaFileType.MOSTLY_Q4_0, 65504.0 * 8),
}


def export_model(model: nn.Module, tokenizer, path: str | os.PathLike, kind: str = "F16") -> None:
    """Write a model of transformers (llama, qwen2, qwen3) and its tokenizer as a GGUF, whole or not at all.

    `kind` is how matrices are stored, the embedding included: F32, F16, or in blocks of 32 in a row Q8_0
    (8.5 bits a weight) or Q4_0 (4.5). Norms and biases are float32. The chat template goes with the
    tokenizer. Of its origin the file says the model's name on the Hub, if any. Tensors are converted one at
    a time.

    Raises ValueError, with nothing written: another architecture or tokenizer, adapters, quantized weights,
    a head that the config calls tied and that is not, rows that blocks do not divide, numbers that are not
    finite or that the kind cannot hold; OSError: a full disk. Chapter 16.
    """
    model = unwrapped(model)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r:.80}")
    weights = _weights(model)
    tensors, config = {}, model.config
    if (factors := rope_factors(config)) is not None:
        tensors["rope_freqs.weight"] = "", factors, GGMLQuantizationType.F32
    for name, weight in weights.items():
        module, _, part = name.rpartition(".")
        tensors[f"{gguf_name(module)}.{part}"] = module, weight, _kind(name, weight, kind)
    write_gguf(
        Path(path),
        config.model_type,
        lambda writer: _write_keys(writer, model, tokenizer, kind),
        {name: (weight.shape, stored) for name, (_, weight, stored) in tensors.items()},
        (
            quantize(in_llama_cpp_order(weight.float().cpu().numpy(), module, config), stored)
            for module, weight, stored in tensors.values()
        ),
    )


def _write_keys(writer: GGUFWriter, model: nn.Module, tokenizer, kind: str) -> None:
    """All that stands before the tensors."""
    rows = len(model.get_input_embeddings().weight)
    writer.add_type("model")
    if name := published_name(model):
        writer.add_name(name)
    writer.add_file_type(KINDS[kind][0])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    write_shape(writer, model.config, rows)
    write_tokenizer(writer, tokenizer, rows)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights by name, a tied head left out; ValueError where a GGUF cannot hold the model."""
    for name, module in model.named_modules():
        _check_weight(name, module)
    config = getattr(model, "config", None)
    if type(model).__name__ not in FAMILIES.values():
        known = ", ".join(FAMILIES.values())
        raise ValueError(f"a GGUF is written here of {known}, got {type(model).__name__}")
    check_config(config)
    for name, module in model.named_modules():
        is_plain = type(module) in (nn.Linear, nn.Embedding) or type(module).__name__.endswith("RMSNorm")
        if not is_plain and any(True for _ in module.parameters(recurse=False)):
            raise ValueError(f"{name} is a {type(module).__name__}, which no GGUF of {config.model_type} has")
    tensors = model.state_dict()
    is_tied = config.tie_word_embeddings
    if is_tied and not tensors.pop("lm_head.weight").equal(tensors["model.embed_tokens.weight"]):
        raise ValueError(
            "the config says that head and embedding are one (tie_word_embeddings), but they differ: "
            "a trained head needs model.config.tie_word_embeddings = False, else call model.tie_weights()"
        )
    return tensors


def _check_weight(name: str, module: nn.Module) -> None:
    """ValueError for a module with an adapter over it, or whose weight is quantized or elsewhere."""
    if isinstance(module, LoRALinear | BatchedLoRALinear) or type(module).__module__.startswith("peft."):
        raise ValueError(
            f"{name} carries an adapter: save_adapter and export_adapter make a file of it beside the "
            "base's, or merge first (merge_lora, merge_quantized, PEFT's merge_and_unload), then export"
        )
    weight = getattr(module, "weight", None)
    if isinstance(module, NF4Linear) or hasattr(weight, "quant_state") or hasattr(module, "quant_type"):
        raise ValueError(
            f"{name} is quantized ({type(module).__name__}): GGUF has no such weights. Export the model "
            "in the precision that it was published in, or dequantize first: merge_quantized returns "
            "a plain model"
        )
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        raise ValueError(f"{name} has no numbers here, it is on meta or offloaded: load the whole model")


def _kind(name: str, tensor: Tensor, kind: str) -> GGMLQuantizationType:
    """How a tensor is stored: a vector in float32; ValueError where its numbers or its rows do not go in."""
    kind = kind if tensor.ndim > 1 else "F32"
    chosen, largest = GGMLQuantizationType[kind], KINDS[kind][1]
    block, _ = GGML_QUANT_SIZES[chosen]
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, need floats")
    if tensor.shape[-1] % block:
        raise ValueError(
            f"{name} has rows of {tensor.shape[-1]}, which {kind}'s blocks of {block} do not divide"
        )
    peak = tensor.abs().max().item()
    if not (peak <= largest and peak < float("inf")):
        raise ValueError(f"{name} has numbers up to {peak}, more than {kind} holds, or that are no numbers")
    return chosen

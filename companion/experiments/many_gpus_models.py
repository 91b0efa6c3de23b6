"""Models for many_gpus.py: a tiny Llama in every method, divided by every engine, and batches for them."""

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from lora2qlora.adapters import add_lora
from lora2qlora.memory import Full, LlamaShape, LoRA, QLoRA
from lora2qlora.qlora import quantize_base
from lora2qlora.sharding import shard
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = LlamaShape(hidden=128, layers=6, heads=4, intermediate=344, vocabulary=512)
RANK = 8
METHODS = {
    "full": Full(torch.float32),
    "lora": LoRA(RANK, dtype=torch.float32),
    "qlora": QLoRA(RANK, dtype=torch.float32, compute_dtype=torch.float32),
}


def build(method: str, seed: int = 0, checkpointing: bool = False, storage: torch.dtype = torch.float32):
    """The tiny Llama with `method` over it: full, lora, qlora, or bnb (LoRALinear over bitsandbytes)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=SHAPE.hidden,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.heads,
        intermediate_size=SHAPE.intermediate,
        vocab_size=SHAPE.vocabulary,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if method == "qlora":
        quantize_base(model, "all-linear", True, torch.float32)
    if method == "bnb":
        quantize_by_bitsandbytes(model, storage)
    if method != "full":
        add_lora(model, "all-linear", RANK, 2 * RANK)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def quantize_by_bitsandbytes(model: nn.Module, storage: torch.dtype) -> None:
    """Its Linear4bit in the place of the linears of all blocks, NF4 with double quantization."""
    for name, linear in [(n, m) for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]:
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.float32,
            quant_type="nf4",
            quant_storage=storage,
        )
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            quant_type="nf4",
            quant_storage=storage,
            module=layer,  # which keeps the quant_state when the parameter is replaced by its part
        )
        model.model.layers.set_submodule(name, layer.to("cpu"))


def divide(model: nn.Module, engine: str) -> nn.Module:
    """The model under an engine: one (as it is), ddp, fsdp2, or apart: embedding and head as blocks, too."""
    if engine == "fsdp2":
        shard(model)
    if engine == "apart":
        shard(model, blocks=[model.model.embed_tokens, *model.model.layers, model.lm_head])
    return DistributedDataParallel(model) if engine == "ddp" else model


def batch_of(step: int, rows: int = 8, length: int = 32, ragged: bool = False) -> dict[str, torch.Tensor]:
    """The global batch of a step; ragged rows train on fewer and fewer tokens."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(SHAPE.vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    if ragged:
        for row in range(rows):
            labels[row, : row * length // rows] = -100
    return {"input_ids": ids, "labels": labels}


def my_part(batch: dict) -> dict:
    """This rank's rows of a global batch."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return {key: rows.chunk(ranks)[rank] for key, rows in batch.items()}


def loss_of(model: nn.Module, batch: dict, divide_by: str) -> torch.Tensor:
    """This rank's loss so that the mean over ranks is the global one, or what each calls its mean.

    `global`: the sum over this rank's tokens × ranks / the count of all ranks' tokens. `local`: the mean over
    this rank's tokens, which weighs ranks equally however many tokens they have.
    """
    if divide_by == "local":
        return model(**batch).loss
    count = (batch["labels"][:, 1:] != -100).sum()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if dist.is_initialized():
        dist.all_reduce(count)
    return model(**batch, num_items_in_batch=count).loss * ranks


def mean_of_ranks(loss: torch.Tensor) -> float:
    """The mean over all ranks of a loss."""
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]

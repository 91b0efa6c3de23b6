"""gpu.py, part 2: the peak of a training step at the shapes of LLaMA, held to the memory of a card.

Batch 1, 512 tokens, rank 64 on every linear layer, gradient checkpointing, AdamW, as for the totals in the
QLoRA paper's figure of memory. The process may take no more than the card it stands for; whether it ran
out of memory is part of the record, beside what the ledger says. Full fine-tuning is a ledger's entry alone.
"""

import gc
from dataclasses import asdict, dataclass

import gpu_models
import torch
from lora2qlora.adapters import count_parameters
from lora2qlora.memory import (
    ADAMW_FUSED,
    PHASES,
    SHAPES,
    LlamaShape,
    LoRA,
    QLoRA,
    storage_bytes,
    track_step,
    training_memory,
)
from transformers import LlamaConfig

TOY = LlamaShape(hidden=128, layers=2, heads=4, intermediate=352, vocabulary=512)


@dataclass(frozen=True)
class Case:
    """A shape, how it trains, and the bytes of the card that it is to fit."""

    shape: str
    method: LoRA
    card_bytes: int
    length: int = 512


def cases() -> dict[str, Case]:
    """By name, in order of worth."""
    found = {}
    for shape, gigabytes, dtypes in (
        ("LLaMA-65B", 48, ("float32", "bfloat16")),
        ("LLaMA-33B", 24, ("bfloat16", "float32")),
        ("LLaMA-13B", 16, ("float32",)),
        ("LLaMA-7B", 8, ("float32",)),
    ):
        for dtype in dtypes:
            method = QLoRA(rank=64, adapter_dtype=getattr(torch, dtype))
            found[f"QLoRA {shape} on {gigabytes} GB, {dtype} adapters"] = Case(
                shape, method, gigabytes * 10**9
            )
    for shape, gigabytes in (("LLaMA-7B", 24), ("LLaMA-13B", 48)):
        found[f"LoRA {shape} on {gigabytes} GB"] = Case(shape, LoRA(rank=64), gigabytes * 10**9)
    return found


def config_of(shape: LlamaShape) -> LlamaConfig:
    """The config of transformers for a shape."""
    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
    )


def measure(case: Case, device: str, size: str, steps: int = 2) -> dict:
    """Bytes by component and the peak of a further step, and what the ledger says of them."""
    shape = SHAPES[case.shape] if size == "full" else TOY
    ledger = training_memory(shape, case.method, 1, case.length, checkpointing=True, optimizer=ADAMW_FUSED)
    figures = {"ledger": asdict(ledger), "predicted_bytes": ledger.total, "card_bytes": case.card_bytes}
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.card_bytes / total), device)
    try:
        figures |= train(shape, case, device, steps)
    except torch.cuda.OutOfMemoryError as error:
        figures |= {"out_of_memory": True, "message": str(error)[:300]}
    finally:
        if cuda:
            figures["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        gc.collect()
    return figures


def train(shape: LlamaShape, case: Case, device: str, steps: int) -> dict:
    """Build, train some steps, weigh."""
    kind = "qlora" if isinstance(case.method, QLoRA) else "lora"
    dtype = case.method.adapter_dtype
    model = gpu_models.build(config_of(shape), kind, case.method.rank, device, adapter_dtype=dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    step = gpu_models.make_step(model, 1, case.length, torch.optim.AdamW(trained, lr=1e-4, fused=True))
    losses = [step() for _ in range(steps)]
    report = track_step(model, step.optimizer, step.rows)
    return {
        "parameters": count_parameters(model).total,
        "trained_bytes": sum(p.nbytes for p in trained),
        "model_bytes": storage_bytes(model),
        "optimizer_bytes": storage_bytes(step.optimizer),
        "peak_bytes": report.peak_bytes,
        "peaks_of_phases": dict(zip(PHASES, report.peaks, strict=True)),
        "losses": [float(loss) for loss in losses],
    }


def jobs(device: str, size: str) -> dict:
    """The part's runs by name, each without an argument."""
    return {name: lambda case=case: measure(case, device, size) for name, case in cases().items()}

"""small_lm.py, the training: a model, the rate and the batch of every step, and checkpoints to go on from."""

import hashlib
import json
import math
import statistics
import time
from pathlib import Path

import torch
import writing
from lora2qlora.lab.training import compute_in_bfloat16, progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

EVERY = 200  # steps between two checkpoints
CURVE_WINDOWS = 32  # of validation text, for a point of the curve


def make_model(settings: dict, seed: int):
    """An untrained Llama with input and output embeddings tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=settings["vocabulary"],
        hidden_size=settings["hidden_size"],
        intermediate_size=settings["intermediate_size"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["heads"],
        max_position_embeddings=settings["window"],
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def rate(step: int, settings: dict) -> float:
    """The learning rate of a step, counted from 0: up, level, and down in a straight line."""
    up = (step + 1) / settings["warmup"]
    down = (settings["steps"] - step) / settings["decay"]
    return settings["learning_rate"] * min(1.0, up, down)


def batch(tokens: torch.Tensor, step: int, settings: dict, seed: int) -> torch.Tensor:
    """The windows [batch, window + 1] of a step: an epoch cuts the text anew and shuffles the cuts."""
    size, length = settings["batch_size"], settings["window"]
    steps = (len(tokens) - 1 - length) // length // size  # of an epoch
    if steps < 1:
        raise ValueError(f"{len(tokens)} tokens are too few for {size} windows of {length}")
    epoch, place = divmod(step, steps)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    shift = torch.randint(length, (1,), generator=generator)
    order = torch.randperm(steps * size, generator=generator)[place * size : (place + 1) * size]
    return tokens[(shift + length * order)[:, None] + torch.arange(length + 1)]


def loss_of(model, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy [nats a token] of windows [batch, length + 1]."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def train(model, tokens, validation, settings: dict, seed: int, folder: Path) -> dict:
    """Train, from a checkpoint in the folder on if there is one; the curve, and the CPU seconds of all runs.

    What was reached before the learning rate fell stays in a file of its own, for a longer run to go on.
    """
    level = folder / f"small_lm-{seed}.safetensors"
    falling = folder / f"small_lm-{seed}-of-{settings['steps']}.safetensors"
    matrices, gains = ([p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (1, 0))
    groups = [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": gains}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    state = {"step": 0, "curve": [], "cpu_seconds": 0.0}
    if found := [path for path in (falling, level) if path.exists()]:
        state = load_checkpoint(found[0], model, optimizer, settings, seed)
        print(f"resumed after step {state['step']}", flush=True)
    compute_in_bfloat16(model).train()
    started, losses = time.process_time() - state["cpu_seconds"], []
    for step in progress(range(state["step"], settings["steps"]), "train"):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings)
        loss = loss_of(model, batch(tokens, step, settings, seed))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss of step {step} is {losses[-1]}: lower the learning rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % EVERY == 0 or step + 1 == settings["steps"]:
            point = {"step": step + 1, "train_loss": statistics.mean(losses)}
            point["validation_loss"] = curve_loss(model, validation, settings)
            losses = []
            state["curve"].append(point)
            state |= {"step": step + 1, "cpu_seconds": time.process_time() - started}
            is_level = step <= settings["steps"] - settings["decay"]
            save_checkpoint(level if is_level else falling, model, optimizer, settings, seed, state)
            print(f"{point} {state['cpu_seconds']:.0f} CPU seconds", flush=True)
    model.eval()
    return state


@torch.no_grad()
def curve_loss(model, tokens: torch.Tensor, settings: dict) -> float:
    """Mean loss [nats a token] over windows spread evenly over the validation text."""
    length = settings["window"]
    starts = torch.linspace(0, len(tokens) - 1 - length, CURVE_WINDOWS).long()
    windows = tokens[starts[:, None] + torch.arange(length + 1)]
    model.eval()
    losses = [loss_of(model, part).item() for part in windows.split(settings["batch_size"])]
    model.train()
    return statistics.mean(losses)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors: safetensors itself does not notice a changed byte among the numbers."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()


def save_checkpoint(path: Path, model, optimizer, settings: dict, seed: int, state: dict) -> None:
    """Weights and AdamW's two averages in one safetensors file, whole or not at all."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = optimizer.state[parameter][key]
    header = {"settings": settings, "seed": seed, "state": state, "digest": digest(tensors)}
    with writing.whole(path) as partial:
        save_file(tensors, partial, {key: json.dumps(value) for key, value in header.items()})


def load_checkpoint(path: Path, model, optimizer, settings: dict, seed: int) -> dict:
    """Fill model and optimizer, return the state. Raises ValueError: damaged, or of another run."""
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            header = {key: json.loads(value) for key, value in file.metadata().items()}
        fits = header["digest"] == digest(tensors)
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"the checkpoint {path} is damaged: delete it to start anew [{error}]") from error
    if not fits:
        raise ValueError(f"the checkpoint {path} is damaged, its digest differs: delete it to start anew")
    before, state = header["settings"], header["state"]
    free = {"steps": 0, "decay": 0}  # as long as the rates so far are the same
    same = before | free == settings | free and header["seed"] == seed
    if not same or any(rate(s, before) != rate(s, settings) for s in range(state["step"])):
        raise ValueError(f"the checkpoint {path} is of another run, with {before}: delete it to start anew")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            averages = {key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = averages | {"step": torch.tensor(float(state["step"]))}
    return state

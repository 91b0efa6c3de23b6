"""Chapter 18: what each method of PEFT does over a base in NF4: runs or not, parameters, time, file.

Every method adapts all linear layers of SmolLM2 over bitsandbytes, at its defaults or at rank 8 where it has
ranks, and takes a few steps. What fails is recorded with the first words of its error, as a reader would meet
them. One record a method in records/peft_methods.jsonl; resumes. Times are for a machine that does nothing
else: plain LoRA is measured first and last. LoRA-GA, which first needs gradients, is left out.

    python companion/experiments/peft_methods.py
"""

import argparse
import contextlib
import gc
import logging
import tempfile
import time
import warnings
from pathlib import Path

import peft
import torch
from lora2qlora.lab import measured
from lora2qlora.lab.models import load_base_model
from lora2qlora.memory import track_step
from peft import get_peft_model, prepare_model_for_kbit_training

SETTINGS = {"model": "smollm2-135m", "rank": 8, "batch": 4, "length": 64, "steps": 4}
LORA = {"r": 8, "lora_alpha": 16}
CORDA = {"init_lora_weights": "corda"}
# What a reader would write: the class of the config, and the options beside the targets.
METHODS = {
    "LoRA": ("LoraConfig", LORA),
    "rsLoRA": ("LoraConfig", LORA | {"use_rslora": True}),
    "DoRA": ("LoraConfig", LORA | {"use_dora": True}),
    "PiSSA": ("LoraConfig", LORA | {"init_lora_weights": "pissa"}),
    "OLoRA": ("LoraConfig", LORA | {"init_lora_weights": "olora"}),
    "orthogonal start": ("LoraConfig", LORA | {"init_lora_weights": "orthogonal"}),
    "CorDA": ("LoraConfig", LORA | CORDA),
    "MiCA": ("LoraConfig", LORA | {"init_lora_weights": "mica"}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 12, "target_r": 8, "total_step": 100}),
    "VeRA": ("VeraConfig", {}),
    "PVeRA": ("PveraConfig", {}),
    "RandLoRA": ("RandLoraConfig", {}),
    "VB-LoRA": ("VBLoRAConfig", {"vector_length": 64}),
    "FourierFT": ("FourierFTConfig", {}),
    "WaveFT": ("WaveFTConfig", {}),
    "C3A": ("C3AConfig", {"block_size": 64}),
    "(IA)3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "OFT": ("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": True}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8}),
    "HRA": ("HRAConfig", {}),
    "RoAd": ("RoadConfig", {}),
    "MiSS": ("MissConfig", {"r": 8}),
    "GraLoRA": ("GraloraConfig", {"r": 8}),
    "HiRA": ("HiraConfig", {"r": 8}),
    "Lily": ("LilyConfig", {"r": 8}),
    "LoHa": ("LoHaConfig", {"r": 8}),
    "LoKr": ("LoKrConfig", {"r": 8}),
    "DeLoRA": ("DeloraConfig", {"r": 8}),
    "PSOFT": ("PsoftConfig", {}),
    "SHiRA": ("ShiraConfig", {"r": 8}),
    "TinyLoRA": ("TinyLoraConfig", {}),
    "Uni-LoRA": ("UniLoraConfig", {}),
    "layer norms": ("LNTuningConfig", None),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 16}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 16}),
    "LoRA again": ("LoraConfig", LORA),
}
WITHOUT_TARGETS = ("PromptTuningConfig", "PrefixTuningConfig")


def config_of(name: str):
    """PEFT's config of a method, for all linear layers where it takes layers."""
    kind, options = METHODS[name]
    if options is None:
        options = {"target_modules": ["input_layernorm", "post_attention_layernorm"]}
    elif kind not in WITHOUT_TARGETS:
        options = {"target_modules": "all-linear"} | options
    return getattr(peft, kind)(task_type="CAUSAL_LM", **options)


def run(name: str, settings: dict) -> dict:
    """The facts about one method; `failed` [str] is the first line of an error, and the stage it came at."""
    base, _ = load_base_model(settings["model"], quantization="nf4")
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    ids = torch.randint(1000, (settings["batch"], settings["length"]))
    with torch.no_grad():
        wanted = base(input_ids=ids).logits
    figures, stage = {}, "adding"
    try:
        model = get_peft_model(base, config_of(name)).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        figures["trainable"] = sum(p.numel() for p in trained)
        stage = "training"
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        figures["moved_at_start"] = (
            (logits - wanted).abs().max().item() if logits.shape == wanted.shape else -1.0
        )
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        before = [p.detach().clone() for p in trained]
        figures |= steps(model.train(), optimizer, ids, settings["steps"])
        figures["moved"] = sum(not torch.equal(a, b) for a, b in zip(before, trained, strict=True)) / len(
            trained
        )
        stage = "saving"
        figures["file_bytes"] = saved_bytes(model)
        stage = "merging"
        model.merge_and_unload()
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        figures |= {"stage": stage, "failed": f"{type(error).__name__}: {said[0]:.160}"}
    return figures


def steps(model, optimizer, ids, count: int) -> dict[str, float]:
    """The least CPU time of a step [s], after one that makes the states, and the peak of another [bytes].

    No peak where a method keeps its numbers in sparse tensors, whose storages cannot be looked at.
    """
    found, times = {}, []
    for k in range(count):
        began = time.process_time()
        if k == 1:
            with contextlib.suppress(NotImplementedError):
                found["peak_bytes"] = track_step(model, optimizer, ids).peak_bytes
            continue
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - began)
    return found | {"seconds_a_step": min(times[1:] or times)}


def saved_bytes(model) -> int:
    """The size of the file that PEFT writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def main(arguments: list[str] | None = None) -> None:
    """Run the methods that have no record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), choices=tuple(METHODS))
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # of 36 methods, each with its own
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in options.methods:
        asked = SETTINGS | {"method": name}
        if measured.is_recorded("peft_methods", asked, 0):
            continue
        figures = run(name, asked)
        gc.collect()
        measured.record("peft_methods", asked, figures, 0)
        print(name, figures, flush=True)


if __name__ == "__main__":
    main()

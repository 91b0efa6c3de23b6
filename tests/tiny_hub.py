"""A cache of the Hugging Face Hub that holds tiny models under the names of large ones.

A chapter under the profile "t4" or "large" loads a model that no test machine has. The stand-ins have the
architecture, the special tokens, the template and the generation settings of the published ones. Their
weights are those of the book's own small language model, for a page asserts that its model knows English.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from chat_templates import FORMS
from lora2qlora.lab.models import load_small_lm
from transformers import GenerationConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

COMMIT = "0123456789abcdef" * 2 + "01234567"  # of the snapshot; the Hub's are SHA-1 sums
NO_SAMPLING = {"bos": "<|im_start|>", "pad": "<|im_end|>", "eos": ("<|im_end|>",)}
SAMPLING = {"bos": "<|endoftext|>", "pad": "<|endoftext|>", "eos": ("<|im_end|>", "<|endoftext|>")}


@dataclass(frozen=True)
class Published:
    """What a published model has beside its weights: `special` as a tokenizer names it, `generation` too."""

    form: str  # of chat_templates: its special tokens and its end
    special: dict[str, str]
    generation: dict
    qwen: bool = False


SMOLLM2 = Published("SmolLM2", {"bos_token": "<|im_start|>", "pad_token": "<|im_end|>"}, NO_SAMPLING)
QWEN = Published(
    "Qwen2.5",
    {"pad_token": "<|endoftext|>"},
    SAMPLING | {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    qwen=True,
)
MODELS = {
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": SMOLLM2,
    "Qwen/Qwen2.5-7B-Instruct": QWEN,
    "Qwen/Qwen2.5-32B-Instruct": QWEN,
}


def write_hub(home: Path) -> dict[str, str]:
    """Lay the cache out below `home`; the environment in which any process finds the models, offline."""
    for name, published in MODELS.items():
        folder = home / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")
        write_model(folder / "snapshots" / COMMIT, published)
    places = {"HF_HOME": home, "HF_HUB_CACHE": home / "hub", "HF_DATASETS_CACHE": home / "datasets"}
    return {key: str(path) for key, path in places.items()} | {"HF_HUB_OFFLINE": "1"}


def write_model(folder: Path, published: Published) -> None:
    """A model's files as `from_pretrained` reads them, in shards as those of the large models are."""
    small, tokenizer = load_small_lm()
    form = FORMS[published.form]
    tokenizer.add_special_tokens({"additional_special_tokens": list(form.special)})
    tokenizer.add_special_tokens({"eos_token": form.end} | published.special)
    tokenizer.chat_template = FORMS["SmolLM2"].template  # both published ones add a system turn
    tokenizer.save_pretrained(folder)
    rows = len(tokenizer) + (61 if published.qwen else 0)  # Qwen2.5 has more rows than tokens, too
    model = enlarged(small, rows)
    model = as_qwen2(model) if published.qwen else model
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in (*form.special, "<|endoftext|>")}
    settings = dict(published.generation)
    bos, pad, *eos = (ids[text] for text in (settings.pop("bos"), settings.pop("pad"), *settings.pop("eos")))
    model.config.bos_token_id, model.config.eos_token_id = bos, eos[0]
    model.config.pad_token_id = None if published.qwen else pad
    model.generation_config = GenerationConfig(
        bos_token_id=bos, pad_token_id=pad, eos_token_id=eos if len(eos) > 1 else eos[0], **settings
    )
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="2MB")


@torch.no_grad()
def enlarged(model: LlamaForCausalLM, rows: int) -> LlamaForCausalLM:
    """The model with `rows` rows of embedding, the new ones the mean of the others: likely nowhere."""
    before = model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.get_input_embeddings().weight[len(before) :] = before.mean(dim=0)
    return model


def as_qwen2(llama: LlamaForCausalLM) -> Qwen2ForCausalLM:
    """The same function as a Qwen2: biases of zero at q, k and v, and a head of its own."""
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keep += ("num_key_value_heads", "rms_norm_eps", "rope_parameters")
    shape = {key: getattr(llama.config, key) for key in keep}
    qwen = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=False))
    weights = llama.state_dict()
    for name in qwen.state_dict():
        if name.endswith("_proj.bias"):
            weights[name] = torch.zeros_like(qwen.state_dict()[name])
    qwen.load_state_dict(weights)
    return qwen.eval()

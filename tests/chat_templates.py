"""Chat templates for tests: the forms in which instruct models publish a plain chat, each written anew.

Each has its jinja text, its special tokens and the end of an answer. They render what the published ones
render for messages without tools; `refuses_system` and `rewrites` say what those do besides.
"""

from dataclasses import dataclass

LOOP = "{% for m in messages %}"
DONE = "{% endfor %}"
ASKED = "{{% if add_generation_prompt %}}{}{{% endif %}}"


@dataclass(frozen=True)
class Form:
    """A published form: its template, its special tokens, and the token that ends an answer."""

    template: str
    special: tuple[str, ...]
    end: str
    refuses_system: bool = False
    rewrites: bool = False


def turns(before: str, after: str, prompt: str) -> str:
    """A template that puts the same text before and after every turn."""
    return LOOP + before + "{{ m['content'] }}" + after + DONE + ASKED.format(prompt)


NO_SYSTEM = "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
CHATML = turns("<|im_start|>{{ m['role'] }}\n", "<|im_end|>\n", "<|im_start|>assistant\n")
FORMS = {
    "SmolLM2": Form(
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        + CHATML,
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "Qwen2.5": Form(CHATML, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), "<|im_end|>"),
    "Qwen3": Form(  # the last answer has its thoughts before it, earlier ones have lost theirs
        f"{LOOP}<|im_start|>{{{{ m['role'] }}}}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n" + DONE + ASKED.format("<|im_start|>assistant\n"),
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        rewrites=True,
    ),
    "Llama-3": Form(
        "<|begin_of_text|>"
        + turns(
            "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "Gemma": Form(
        f"<bos>{LOOP}{NO_SYSTEM}<start_of_turn>"
        "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
        + DONE
        + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        refuses_system=True,
    ),
    "Mistral": Form(
        f"<s>{LOOP}{NO_SYSTEM}{{% if m['role'] == 'user' %}}[INST] {{{{ m['content'] }}}} [/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}" + DONE,
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        refuses_system=True,
    ),
    "Phi-3": Form(
        turns("<|{{ m['role'] }}|>\n", "<|end|>\n", "<|assistant|>\n"),
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
    ),
    "OLMo-2": Form(  # the end token is the padding token too, and only answers have one
        f"<|endoftext|>{LOOP}<|{{{{ m['role'] }}}}|>\n{{{{ m['content'] }}}}"
        "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{% if not loop.last or "
        "m['role'] != 'assistant' %}\n{% endif %}"
        + DONE + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        (),
        "<|endoftext|>",
    ),
    "Granite": Form(
        turns(
            "<|start_of_role|>{{ m['role'] }}<|end_of_role|>",
            "<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        "<|end_of_text|>",
    ),
    "marked": Form(  # says itself what the assistant writes
        f"{LOOP}<|im_start|>{{{{ m['role'] }}}}\n{{% if m['role'] == 'assistant' %}}{{% generation %}}"
        "{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}"
        + DONE
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
}  # fmt: skip

"""Chapter 20: which arguments of older tutorials TRL still takes, and whether QLoRA trains by its SFTTrainer.

TRL is not among the book's packages. Install it beside them, in a folder of its own, so that nothing else
changes:

    pip install --no-deps --target /tmp/trl trl
    PYTHONPATH=/tmp/trl python companion/experiments/trl_arguments.py

One record a release of TRL in records/trl_arguments.jsonl: what each call says, empty where it is taken, and
the losses of a few steps of QLoRA.
"""

import tempfile
import warnings

from datasets import Dataset
from lora2qlora.lab import measured
from lora2qlora.lab.models import load_base_model
from peft import LoraConfig, prepare_model_for_kbit_training

ROWS = [{"prompt": "The cat says", "completion": " meow."}] * 8
# The call as a tutorial has it, and how to write it now.
OLD = {
    "SFTConfig(max_seq_length=...)": "SFTConfig(max_length=...)",
    "SFTTrainer(dataset_text_field=...)": "SFTConfig(dataset_text_field=...)",
    "SFTTrainer(packing=...)": "SFTConfig(packing=...)",
    "SFTTrainer(max_seq_length=...)": "SFTConfig(max_length=...)",
    "SFTTrainer(tokenizer=...)": "SFTTrainer(processing_class=...)",
}
VALUES = {"max_seq_length": 16, "max_length": 16, "dataset_text_field": "text", "packing": False}


def call(text: str, model, tokenizer, folder: str) -> None:
    """Do what a text such as "SFTConfig(packing=...)" says."""
    from trl import SFTConfig, SFTTrainer

    name, argument = text.removesuffix("=...)").split("(")
    options = {argument: VALUES.get(argument, tokenizer)}
    if name == "SFTConfig":
        SFTConfig(folder, use_cpu=True, **options)
    else:
        args = SFTConfig(folder, use_cpu=True, report_to=[])
        options = {"processing_class": tokenizer} | options
        SFTTrainer(model, args=args, train_dataset=Dataset.from_list(ROWS), **options)


def answer(text: str, *arguments) -> str:
    """What Python says to a call; empty where it is taken."""
    try:
        call(text, *arguments)
    except TypeError as error:
        return str(error)
    return ""


def losses(folder: str, steps: int = 3) -> list[float]:
    """Losses of a few steps of QLoRA on SmolLM2, by SFTTrainer."""
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load_base_model("smollm2-135m", quantization="nf4", device="cpu")
    args = SFTConfig(
        folder,
        use_cpu=True,
        report_to=[],
        max_steps=steps,
        per_device_train_batch_size=2,
        logging_steps=1,
        learning_rate=1e-3,
        max_length=32,
    )
    trainer = SFTTrainer(
        prepare_model_for_kbit_training(model),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Try the release of TRL that is installed, unless it is on record."""
    try:
        import trl
    except ImportError as error:
        raise SystemExit("TRL is not installed: see the first lines of this script") from error
    warnings.simplefilter("ignore")
    asked = {"trl": trl.__version__, "model": "smollm2-135m"}
    if measured.is_recorded("trl_arguments", asked, 0):
        return print(f"TRL {trl.__version__}: recorded already")
    model, tokenizer = load_base_model("smollm2-135m", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        said = {text: answer(text, model, tokenizer, folder) for text in [*OLD, *OLD.values()]}
        figures = {"said": said, "losses": losses(folder)}
    measured.record("trl_arguments", asked, figures, 0)
    print(figures)


if __name__ == "__main__":
    main()

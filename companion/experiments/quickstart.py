"""Chapter 00, repeated: the quickstart's run, over seeds, on a 4-bit and on a 32-bit base.

One run is the chapter's own training with another seed for the adapters' start and the order of the rows.
Appends to records/quickstart.jsonl and resumes where it was cut: a run that has a record is skipped.

    python companion/experiments/quickstart.py --seeds 5
"""

import argparse

import torch
from lora2qlora.lab import measured
from lora2qlora.lab.models import load_base_model
from lora2qlora.lab.tasks import load_task, load_text
from lora2qlora.lab.training import choose, evaluate, make_batches, perplexity, train
from peft import LoraConfig, get_peft_model

# What the chapter's "cpu" profile does; the chapter asserts that these are its settings.
SETTINGS = {
    "model": "smollm2-135m",
    "task": "wordnet",
    "rank": 8,
    "alpha": 16,
    "steps": 40,
    "batch_size": 8,
    "learning_rate": 2e-3,
}
TEST_ROWS = 300
PAGE_ROWS = 100  # the first of them, which the chapter itself scores


def run(settings: dict, quantization: str | None, seed: int) -> dict[str, float]:
    """Fine-tune once: accuracies before and after, the loss of the last ten steps, perplexities."""
    model, tokenizer = load_base_model(settings["model"], quantization=quantization)
    task, text = load_task(settings["task"]), load_text("sotu").select([0])
    page = task.test.select(range(PAGE_ROWS))
    chosen = choose(model, tokenizer, [task.prompt(row) for row in page["input"]], task.labels)
    before = perplexity(model, text, tokenizer)
    torch.manual_seed(seed)
    lora = LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules="all-linear")
    model = get_peft_model(model, lora)
    batches = make_batches(task, tokenizer, settings["batch_size"], seed=seed)
    history = train(model, batches, settings["steps"], settings["learning_rate"], seed=seed)
    metrics = evaluate(model, task, tokenizer, limit=TEST_ROWS)
    first = task.metric(metrics.predictions[:PAGE_ROWS], metrics.targets[:PAGE_ROWS])
    return {
        "accuracy": metrics.values["accuracy"],
        "accuracy_page_rows": first["accuracy"],
        "choice_before_page_rows": task.metric(chosen, page["target"][:])["accuracy"],
        "loss": sum(record.loss for record in history[-10:]) / 10,
        "perplexity_before": before,
        "perplexity_after": perplexity(model, text, tokenizer),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run what has no record yet, seed by seed, so that a cut leaves both bases equally far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    options = parser.parse_args(arguments)
    settings = SETTINGS | {"steps": options.steps}
    print(measured.provenance())
    for seed in range(options.seeds):
        for quantization in ("nf4", None):
            configuration = settings | {"quantization": quantization, "test_rows": TEST_ROWS}
            if measured.is_recorded("quickstart", configuration, seed):
                print(f"seed {seed}, {quantization}: recorded already")
                continue
            figures = run(settings, quantization, seed)
            measured.record("quickstart", configuration, figures, seed)
            print(f"seed {seed}, {quantization}: {figures}", flush=True)


if __name__ == "__main__":
    main()

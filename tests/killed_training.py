"""A tiny LoRA run under transformers' Trainer, ended by SIGKILL at many places and resumed.

    python tests/killed_training.py FOLDER

FOLDER/whole is never ended. Each of PLACES has FOLDER/<place>, ended there and then resumed. What a process
that came to its end did is in attempt-0.json or, when it resumed, in attempt-1.json: the checkpoint it
started from, the warnings of the search for it, each step's loss. A process is a fork of this one, so that
the libraries are imported once.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from lora2qlora.lab.checkpoints import newest_whole_checkpoint
from peft import LoraConfig, get_peft_model
from toy import toy_model
from transformers import Trainer, TrainerCallback, TrainingArguments

STEPS, EVERY, BROKEN = 8, 2, 6  # steps in all, between two checkpoints, and the one that is half-written
# In a step, or in checkpoint-6 in the middle of the file, or behind the file.
PLACES = ("step", "adapter_model.safetensors", "optimizer.pt", "behind rng_state.pth", "trainer_state.json")


def end_process(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Recording(Trainer):
    """Keeps each step's loss with all its digits."""

    losses: dict

    def training_step(self, *arguments, **options):
        loss = super().training_step(*arguments, **options)
        self.losses[self.state.global_step + 1] = loss.item()
        return loss


class EndInStep(TrainerCallback):
    def on_substep_end(self, args, state, control, **_):
        if state.global_step == BROKEN - 1:  # between the two halves of step 6
            end_process()


def end_at(place: str) -> None:
    """End this process while checkpoint-6 is written, by way of the functions that open its files."""
    wanted = f"checkpoint-{BROKEN}/{place.removeprefix('behind ')}"

    def broken(write, name_at):
        def call(*arguments, **options):
            name = str(arguments[name_at])
            write(*arguments, **options)
            if name.endswith(wanted):
                if not place.startswith("behind "):
                    os.truncate(name, os.path.getsize(name) // 2)
                end_process()

        return call

    import peft.peft_model
    from transformers import TrainerState

    torch.save = broken(torch.save, 1)
    peft.peft_model.safe_save_file = broken(peft.peft_model.safe_save_file, 1)
    TrainerState.save_to_json = broken(TrainerState.save_to_json, 1)


def trainer(folder: Path) -> Recording:
    torch.manual_seed(0)
    model = get_peft_model(
        toy_model().train(), LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear")
    )
    ids = torch.randint(3, 250, (24, 12), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=EVERY,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_total_limit=3,
    )
    made = Recording(model=model, args=arguments, train_dataset=rows)
    made.losses = {}
    return made


def train(folder: Path, attempt: int, place: str | None) -> None:
    made = trainer(folder)
    if place == "step":
        made.add_callback(EndInStep())
    elif place:
        end_at(place)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = newest_whole_checkpoint(folder)
    made.train(resume_from_checkpoint=start)
    said = [str(warning.message) for warning in caught]
    outcome = {"start": start and start.name, "warnings": said, "losses": made.losses}
    (folder / f"attempt-{attempt}.json").write_text(json.dumps(outcome))


def in_a_fork(folder: Path, attempt: int, place: str | None) -> int:
    """The signal that ended a process which trains, or 0; an error in it is the error here."""
    child = os.fork()
    if child == 0:
        try:
            train(folder, attempt, place)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"{folder.name}, attempt {attempt} failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main(folder: Path) -> None:
    trainer(folder / "whole")  # what libraries do once only, no fork has to do again
    ended = {"whole": in_a_fork(folder / "whole", 0, None)}
    for place in PLACES:
        ended[place] = in_a_fork(folder / place, 0, place)
        in_a_fork(folder / place, 1, None)
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

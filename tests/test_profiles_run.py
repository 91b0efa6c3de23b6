"""The chapters that choose a profile run from end to end under "t4" and "large", on a CPU and offline.

The models of those profiles are stand-ins from `tiny_hub`. What a figure says of a model is not tested
here, only that every cell runs, on the names, the settings and the branches of that profile.
"""

import json
from pathlib import Path

import nbformat
import pytest
import tiny_hub
from book_outputs import execute

BOOK = Path(__file__).resolve().parents[1] / "book"
QUICKSTART, RECIPE = "00_quickstart.ipynb", "13_qlora_on_a_gpu.ipynb"
# What a CPU and a model of 3 million parameters need, by chapter: (in the page, in its place, why).
# Each must be found once in the page; nothing else of it is changed. The recipe keeps its 16 bits: float16
# with autocast and a scaled loss under "t4", bfloat16 with autocast under "large". The quickstart asks the
# machine, takes bfloat16 on a GPU alone, and so runs here in float32.
LEARNS_LITTLE = "a model of 3 million parameters learns little of the task"
SLOW = "time: most CPUs have no arithmetic in 16 bits, and theirs is ten times slower"
NO_GPU = "the page asks for autocast on a GPU alone"
SWITCHES = {
    QUICKSTART: (
        ('{"model": models[profile]}', '{"model": models[profile], "steps": 30}', "time"),
        ("losses[-10:].mean() < frequency_loss", "losses[-10:].mean() < losses[0]", LEARNS_LITTLE),
        ("assert measured_gain > predicted_gain", "assert measured_gain >= 0", LEARNS_LITTLE),
        ("assert told < trained", "assert told <= trained", LEARNS_LITTLE),
        ("len(task.train))) < measured_after", "len(task.train))) < 1", LEARNS_LITTLE),
    ),
    RECIPE: (
        ("    fp16=GPU and ", "    fp16=", NO_GPU),
        ("    bf16=GPU and ", "    bf16=", NO_GPU),
        (
            "trainer.remove_callback(PrinterCallback)",
            "if arguments.fp16:\n"
            "    trainer.accelerator.native_amp = True\n"
            "    trainer.accelerator.scaler = torch.amp.GradScaler('cpu')\n"
            "assert trainer.accelerator.native_amp\n"
            "trainer.remove_callback(PrinterCallback)",
            "accelerate leaves float16's autocast and its scaler out on a CPU, and says nothing",
        ),
        ("512, 1024)[NUMBER]", "64, 64)[NUMBER]", SLOW),
        ("200, 200)[NUMBER]", "10, 10)[NUMBER]", SLOW),
        ("(12, 60, 60)[NUMBER]", "(12, 6, 6)[NUMBER]", "time"),
        ("time.sleep(1)", "time.sleep(0.1)", "a tiny model's last steps may not last a second"),
    ),
}


def switched(notebook, switches):
    """The notebook with each switch made in its code; ValueError where one is not found exactly once."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for before, after, _ in switches:
        found = [cell for cell in code if before in cell.source]
        if sum(cell.source.count(before) for cell in code) != 1:
            raise ValueError(f"{before!r} stands in {len(found)} cells, expected once: mend SWITCHES")
        found[0].source = found[0].source.replace(before, after)
    return notebook


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """The environment of a kernel that sees the tiny models, and no GPU."""
    return tiny_hub.write_hub(tmp_path_factory.mktemp("huggingface")) | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def run(hub, tmp_path, monkeypatch):
    """Runs a notebook in a folder of its own; RuntimeError names the cell that fails."""

    def run(notebook, profile):
        for key, value in (hub | {"LORA2QLORA_PROFILE": profile}).items():
            monkeypatch.setenv(key, value)
        path = tmp_path / "page.ipynb"
        nbformat.write(notebook, path)
        return nbformat.reads(execute(path, timeout=600), as_version=4)

    return run


PLANTED = """\
from lora2qlora.lab.profiles import choose_profile

batch_size = {"t4": 0}.get(choose_profile(), 4)
if choose_profile() == "large":
    print(batch_sise)
print(list(range(0, 8, batch_size)))"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "error"),
    [("cpu", ""), ("t4", "cell 2 failed: ValueError"), ("large", "cell 2 failed: NameError")],
)
def test_a_defect_of_one_profile_is_found(profile, error, run):
    cells = [nbformat.v4.new_markdown_cell("# Page"), nbformat.v4.new_code_cell(PLANTED)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    if not error:
        assert run(notebook, profile).cells[1].outputs[0]["text"] == "[0, 4]\n"
        return
    with pytest.raises(RuntimeError, match=error):
        run(notebook, profile)


@pytest.mark.parametrize("source", ["steps = 60", "steps = 24  # or steps = 24", ""])
def test_a_switch_that_no_longer_fits_is_found(source):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    with pytest.raises(ValueError, match="mend SWITCHES"):
        switched(notebook, [("steps = 24", "steps = 2", "time")])


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["t4", "large"])
@pytest.mark.parametrize("chapter", [QUICKSTART, RECIPE])
def test_a_chapter_runs(chapter, profile, run, tmp_path):
    notebook = run(switched(nbformat.read(BOOK / chapter, as_version=4), SWITCHES[chapter]), profile)
    if chapter == RECIPE:  # in 16 bits, and resumed to the last digit, with the state of the scaler
        folder = tmp_path / "runs" / "support-desk"
        card = json.loads((folder / "adapter" / "run_card.json").read_text(encoding="utf-8"))
        assert card["settings"]["dtype"] == {"t4": "torch.float16", "large": "torch.bfloat16"}[profile]
        assert (folder / "checkpoint-6" / "scaler.pt").exists() == (profile == "t4")
        assert "Claim 3 HOLDS" in str([cell.get("outputs") for cell in notebook.cells])

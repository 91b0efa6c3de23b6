"""companion/experiments/many_gpus.py: it resumes, and its records agree with the ledger."""

import pytest
import torch
from lora2qlora.lab import measured
from test_experiments import script


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    return script("many_gpus", tmp_path, monkeypatch)


def test_what_has_a_record_is_skipped(experiment, monkeypatch):
    launched = []

    def launch(name, ranks, *arguments, **_):
        launched.append((name, ranks, *arguments))
        engines = ["one"] if ranks == 1 else ["ddp", "fsdp2"]
        found = {f"{m} {e}": [{"static": 1, "peak": 2}] * ranks for m in ("full", "bnb") for e in engines}
        return {"figures": found}, "", 1.0

    monkeypatch.setattr(experiment, "launch", launch)
    experiment.part_bytes()
    assert launched == [("many_gpus_work.py", ranks, "bytes") for ranks in (1, 2, 4)]
    experiment.part_bytes()
    assert len(launched) == 3
    two = measured.load("many_gpus")[1]
    assert two.configuration == {"part": "bytes", "ranks": 2}
    assert (
        two.figures["full fsdp2"]["computed"]["static"] == experiment.computed("full", "fsdp2", 2)["static"]
    )
    assert "computed" not in two.figures["bnb ddp"]


def test_the_records_agree_with_the_ledger():
    """Within 1 % in every process, as the ledger is now; bytes of a record are those of that commit."""
    records = [r for r in measured.load("many_gpus") if r.configuration["part"] == "bytes"]
    assert {r.configuration["ranks"] for r in records} == {1, 2, 4}
    for record in records:
        for name, found in record.figures.items():
            for rank in found["measured"] if "computed" in found else ():
                for key, value in found["computed"].items():
                    assert rank[key] == pytest.approx(value, rel=0.01), (record.configuration, name, key)


def test_embedding_and_head_apart_take_less():
    """Between steps a rank holds the same; at the peak, less than where both are gathered for the pass."""
    found = {
        (r.configuration["part"], r.configuration.get("ranks")): r.figures
        for r in measured.load("many_gpus")
        if r.configuration["part"] in ("bytes", "apart")
    }
    for ranks in (2, 4):
        for name, figures in found["apart", ranks].items():
            together = found["bytes", ranks][name.replace("apart", "fsdp2")]["measured"]
            assert [f["static"] for f in figures] == [f["static"] for f in together], name
            assert max(f["peak"] for f in figures) < 0.97 * max(f["peak"] for f in together), name


def test_the_records_say_the_same_training():
    (losses,) = [r.figures for r in measured.load("many_gpus") if r.configuration["part"] == "losses"]
    for name, largest in losses["largest difference"].items():
        if name.endswith("ragged local"):
            assert largest > 1e-4  # another loss altogether
        else:
            assert largest < 2e-6, name
    resumed = next(r.figures for r in measured.load("many_gpus") if r.configuration["part"] == "resume")
    assert all(resumed[f"resumed on {n}"]["largest difference"] < 2e-6 for n in (1, 2, 4))


def test_ragged_rows_weigh_by_their_tokens(experiment):
    """Halves of a ragged batch have other counts, so that the mean of means is not the mean."""
    from many_gpus_models import batch_of, build, loss_of

    batch = batch_of(0, ragged=True)
    counts = [(part[:, 1:] != -100).sum().item() for part in batch["labels"].chunk(2)]
    assert counts[0] > 1.5 * counts[1]
    model = build("lora")
    torch.testing.assert_close(loss_of(model, batch, "global"), loss_of(model, batch, "local"))


@pytest.mark.slow
def test_two_processes_by_torchrun_hold_what_is_recorded(experiment):
    figures = experiment.launch("many_gpus_work.py", 2, "bytes")[0]["figures"]
    for name in ("full fsdp2", "qlora fsdp2", "lora ddp"):
        expected = experiment.computed(*name.split(), 2)
        for rank in figures[name]:
            assert {key: rank[key] for key in expected} == pytest.approx(expected, rel=0.001)

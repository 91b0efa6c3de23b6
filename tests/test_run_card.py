"""lab.run_card: what a card says is so, it is read as it was written, and it gives nobody away."""

import getpass
import hashlib
import json
import math
import os
import platform
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora2qlora.lab import run_card as module
from lora2qlora.lab.chat_file import chat_file
from lora2qlora.lab.run_card import load_run_card, run_card, save_run_card

HOME = "/".join(("", "home", "ahab"))  # no path of a machine stands in the project

SETTINGS = {"model": "smollm2-135m", "rank": 8, "targets": ("q_proj", "v_proj"), "seed": 7, "data_seed": 8}
FIGURES = {"loss": 0.25, "accuracy": {"before": 0.5, "after": None}, "steps": [1, 2]}


def test_a_card_says_what_was_run(tmp_path):
    path = chat_file("support-desk")
    card = run_card(SETTINGS, path, FIGURES)
    assert card["settings"] == SETTINGS | {"targets": ["q_proj", "v_proj"]}
    assert card["seeds"] == {"seed": 7, "data_seed": 8}
    assert card["figures"] == FIGURES
    lines = path.read_bytes().splitlines()
    data = card["data"]
    assert (data["name"], data["bytes"]) == (path.name, path.stat().st_size)
    assert data["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data["rows"] + sum(data["refused"].values()) == len(lines)
    assert data["rows"] + data["refused"]["no assistant turn"] == len(
        {json.dumps(json.loads(x)["messages"]) for x in lines}
    )
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "datasets")}
    assert card["versions"].items() >= (versions | {"python": platform.python_version()}).items()
    assert {"bitsandbytes", "lora2qlora"} < card["versions"].keys()
    passed = datetime.now(UTC) - datetime.strptime(card["date"], "%Y-%m-%dT%H:%M:%S%z")
    assert timedelta(0) <= passed < timedelta(hours=1)
    assert card["device"]


def test_a_card_gives_nobody_away(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(chat_file("support-desk").read_bytes())
    text = save_run_card(tmp_path / "run", run_card(SETTINGS, path, FIGURES)).read_text(encoding="utf-8")
    for private in (str(tmp_path), str(Path.home()), platform.node(), f"/{getpass.getuser()}"):
        assert private not in text


def test_a_card_is_read_as_it_was_written(tmp_path):
    card = run_card(SETTINGS | {"note": "Zürich — 鯨"}, None, FIGURES)
    assert card["data"] is None
    path = save_run_card(tmp_path / "runs" / "first", card)
    assert load_run_card(path.parent) == card
    assert [p.name for p in path.parent.iterdir()] == ["run_card.json"]


def test_a_card_is_a_copy():
    figures = {"losses": [1.0]}
    card = run_card(SETTINGS, None, figures)
    figures["losses"].append(2.0)
    assert card["figures"] == {"losses": [1.0]}


numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
trees = st.recursive(numbers, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text("abc"), x))


@given(st.dictionaries(st.text("abc", min_size=1), trees, max_size=4))
def test_any_plain_figures_survive(tmp_path_factory, figures):
    folder = tmp_path_factory.mktemp("run")
    save_run_card(folder, run_card(SETTINGS, None, figures))
    assert load_run_card(folder)["figures"] == figures


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"loss": math.nan}, r"figures\.loss is nan, no finite number"),
        ({"by": {"task": [1.0, -math.inf]}}, r"figures\.by\.task\[1\] is -inf"),
        ({"loss": torch.tensor(1.0)}, r"figures\.loss is a Tensor.*use \.item\(\)"),
        ({"loss": torch.ones(1).numpy()[0]}, r"figures\.loss is a float32"),
        ({3: 1.0}, r"figures has the key 3, a int"),
        ({"folder": Path("runs")}, r"figures\.folder is a P\w+Path"),
        ({"folder": f"{HOME}/runs"}, rf"figures\.folder names '{HOME}/runs'"),
        ({"folder": "see C:\\Users\\ahab"}, r"figures\.folder names 'C:"),
        ({"folder": "/ahab"}, r"figures\.folder names '/ahab'"),
        ({f"{HOME}/x": 1}, rf"figures names '{HOME}"),
    ],
)
def test_what_is_no_plain_json_or_private_is_refused_by_its_key(tmp_path, figures, said):
    with pytest.raises(ValueError, match=said):
        run_card(SETTINGS, None, figures)
    card = run_card(SETTINGS, None, {}) | {"figures": figures}
    with pytest.raises(ValueError, match=said):
        save_run_card(tmp_path / "run", card)
    assert not (tmp_path / "run").exists()


def test_figures_that_hold_themselves_are_refused():
    figures = {}
    figures["figures"] = figures
    with pytest.raises(ValueError, match="holds itself"):
        run_card(SETTINGS, None, figures)


@pytest.mark.parametrize("settings", [{}, {"rank": 8}, {"seed": None}])
def test_a_run_without_a_seed_has_no_card(settings):
    with pytest.raises(ValueError, match="settings have no seed"):
        run_card(settings, None, {})


def test_a_missing_data_file_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        run_card(SETTINGS, tmp_path / "no.jsonl", {})


def test_a_card_that_was_cut_or_is_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_run_card(tmp_path)
    path = save_run_card(tmp_path, run_card(SETTINGS, None, FIGURES))
    whole = path.read_bytes()
    for content in (whole[:-20], b"", b"[]", b"\xff", b"[" * 10**5, whole.replace(b"0.25", b"NaN")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run_card\.json is no run card: "):
            load_run_card(tmp_path)
    with pytest.raises(ValueError, match="a run card has settings, seeds"):
        save_run_card(tmp_path, {"settings": {}})


def test_an_interrupted_write_leaves_the_old_card(tmp_path, monkeypatch):
    card = run_card(SETTINGS, None, FIGURES)
    path = save_run_card(tmp_path, card)
    before = path.read_bytes()

    def full_disk(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_run_card(tmp_path, card | {"figures": {}})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [module.FILE]

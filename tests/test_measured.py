"""lab.measured: records are appended whole, say where they come from, and are found again."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import torch
from book_checks import ABSOLUTE
from lora2qlora.lab import measured


def test_what_is_recorded_is_loaded(tmp_path):
    first = measured.record("toy", {"rank": 8, "task": "x"}, {"loss": 0.5}, seed=1, directory=tmp_path)
    second = measured.record("toy", {"rank": 16, "task": "x"}, {"loss": 0.25}, seed=1, directory=tmp_path)
    assert measured.load("toy", tmp_path) == [first, second]
    assert first.figures == {"loss": 0.5}


def test_a_record_says_where_it_comes_from(tmp_path):
    found = measured.record("toy", {}, {}, seed=0, directory=tmp_path).provenance
    assert found["torch"] == metadata.version("torch")
    assert found["bitsandbytes"] == metadata.version("bitsandbytes")
    assert set(found) == {"date", "device", "python", "commit", *measured.VERSIONS_OF}
    assert all(isinstance(value, str) and value for value in found.values())


def test_resuming_knows_a_run_by_configuration_and_seed(tmp_path):
    measured.record("toy", {"ranks": (1, 2)}, {}, seed=3, directory=tmp_path)
    assert measured.is_recorded("toy", {"ranks": (1, 2)}, seed=3, directory=tmp_path)
    assert not measured.is_recorded("toy", {"ranks": (1, 2)}, seed=4, directory=tmp_path)
    assert not measured.is_recorded("toy", {"ranks": (1, 3)}, seed=3, directory=tmp_path)
    assert not measured.is_recorded("other", {}, seed=3, directory=tmp_path)


def test_records_are_found_by_some_of_their_configuration(tmp_path):
    asked = [{"rank": 8, "shape": [2, 3]}, {"rank": 16, "shape": [2, 3]}, {"shape": [2, 4]}]
    first, second, third = (measured.record("toy", one, {}, 0, tmp_path) for one in asked)
    assert measured.matching("toy", tmp_path, shape=[2, 3]) == [first, second]
    assert measured.matching("toy", tmp_path, shape=[2, 3], rank=16) == [second]
    assert measured.matching("toy", tmp_path, rank=None) == []
    assert measured.matching("toy", tmp_path) == [first, second, third]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(1.0), {1, 2}])
def test_what_is_not_plain_json_is_refused_and_nothing_is_lost(tmp_path, value):
    measured.record("toy", {}, {"loss": 1.0}, seed=0, directory=tmp_path)
    before = (tmp_path / "toy.jsonl").read_bytes()
    with pytest.raises(ValueError, match="must be plain, finite JSON"):
        measured.record("toy", {}, {"loss": value}, seed=1, directory=tmp_path)
    assert (tmp_path / "toy.jsonl").read_bytes() == before


def test_an_interrupted_append_loses_nothing(tmp_path, monkeypatch):
    measured.record("toy", {}, {"loss": 1.0}, seed=0, directory=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            measured.record("toy", {}, {"loss": 2.0}, seed=1, directory=tmp_path)
    assert [r.seed for r in measured.load("toy", tmp_path)] == [0]
    measured.record("toy", {}, {"loss": 2.0}, seed=1, directory=tmp_path)
    assert [r.seed for r in measured.load("toy", tmp_path)] == [0, 1]


HERE = "/" + "home/reader/x"  # written apart, so that the checks of the book do not find it here


@pytest.mark.parametrize(
    "figures",
    [
        {"file": HERE},
        {"runs": [{"tail": f"Traceback:\n{HERE}, line 3"}]},
        {HERE: 1.0},
        {"link": "file:" + "//x"},
        {"file": "D:" + "\\data\\x"},
        {"file": "D:" + "/data/x"},
    ],
)
def test_a_path_of_this_machine_is_refused_and_nothing_is_written(tmp_path, figures):
    with pytest.raises(ValueError, match=r"is published, but names '.+' of this"):
        measured.record("toy", {}, figures, seed=0, directory=tmp_path)
    with pytest.raises(ValueError, match="is published"):
        measured.record("toy", figures, {}, seed=0, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_links_and_fractions_are_no_paths(tmp_path):
    texts = ["meta-llama/Llama-2-7b", "https://a.org/b/c#d", "tokens/s", "1/2 / 3", "/", "q: why", "a\n/b"]
    assert measured.record("toy", {"texts": texts}, {}, seed=0, directory=tmp_path).configuration


def test_what_a_killed_process_left_is_tidied(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # killed in the middle: nothing tidies up
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(type(tmp_path), "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            measured.record("toy", {}, {"loss": 1.0}, seed=0, directory=tmp_path)
    assert (tmp_path / ".toy.partial").exists()
    measured.record("toy", {}, {"loss": 2.0}, seed=1, directory=tmp_path)
    assert [r.seed for r in measured.load("toy", tmp_path)] == [1]
    assert {path.name for path in tmp_path.iterdir()} <= {"toy.jsonl", ".toy.lock"}


def test_a_record_is_one_line_whatever_its_text(tmp_path):
    text = "one\u2028two\x85three\rfour"
    first = {"configuration": {}, "seed": 0, "figures": {"text": text}, "provenance": {}}
    (tmp_path / "toy.jsonl").write_text(json.dumps(first, ensure_ascii=False), encoding="utf-8")
    measured.record("toy", {}, {"text": text}, seed=1, directory=tmp_path)
    assert [r.figures["text"] for r in measured.load("toy", tmp_path)] == [text, text]


def test_writers_at_once_all_land(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda s: measured.record("toy", {}, {}, seed=s, directory=tmp_path), range(8)))
    assert sorted(r.seed for r in measured.load("toy", tmp_path)) == list(range(8))


def test_no_records_and_damaged_records_are_named(tmp_path):
    measured.record("toy", {}, {}, seed=0, directory=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no records of 'tou'.*there are: toy"):
        measured.load("tou", tmp_path)
    path = tmp_path / "toy.jsonl"
    path.write_text(path.read_text() + json.dumps({"figures": {}}) + "\n")
    with pytest.raises(ValueError, match=r"toy\.jsonl, line 2 is not a record"):
        measured.load("toy", tmp_path)
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="line 1 is not a record"):
        measured.load("toy", tmp_path)


@pytest.mark.parametrize("name", ["../toy", "Toy", ""])
def test_names_are_plain(tmp_path, name):
    with pytest.raises(ValueError, match="an experiment's name"):
        measured.load(name, tmp_path)


def test_records_in_the_package_can_be_read():
    for path in measured.RECORDS.glob("*.jsonl"):
        assert measured.load(path.stem)
        assert not ABSOLUTE.search(path.read_text(encoding="utf-8"))


def test_gpu_records_are_found_by_part_and_job_and_toy_runs_are_left_out(tmp_path):
    assert measured.on_gpu("speed", directory=tmp_path) == []
    for part, job, size in (
        ("speed", "step, 512 tokens", "full"),
        ("speed", "dequantize", "full"),
        ("speed", "step, 32 tokens", "toy"),
        ("memory", "step", "full"),
    ):
        measured.record("gpu", {"part": part, "job": job, "size": size}, {}, 0, tmp_path)
    assert [r.configuration["job"] for r in measured.on_gpu("speed", directory=tmp_path)] == [
        "step, 512 tokens",
        "dequantize",
    ]
    (found,) = measured.on_gpu("speed", "step", tmp_path)
    assert found.configuration["job"] == "step, 512 tokens"


GOOD = {"configuration": {}, "seed": 0, "figures": {}, "provenance": {}}


@pytest.mark.parametrize(
    "line",
    [
        b"null",
        b"[]",
        b"3",
        b"",
        b"\xff",
        b"[" * 100_000,
        json.dumps(GOOD).encode()[:-3],
        json.dumps(GOOD | {"more": 1}).encode(),
        json.dumps(GOOD | {"configuration": []}).encode(),
        json.dumps(GOOD | {"figures": None}).encode(),
        json.dumps(GOOD | {"provenance": "here"}).encode(),
        json.dumps(GOOD | {"seed": None}).encode(),
        json.dumps(GOOD | {"seed": True}).encode(),
        json.dumps(GOOD | {"figures": {"loss": float("nan")}}).encode(),
        json.dumps(GOOD | {"figures": {"loss": float("-inf")}}).encode(),
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_added_behind_it(tmp_path, line):
    measured.record("toy", {}, {}, seed=0, directory=tmp_path)
    path = tmp_path / "toy.jsonl"
    damaged = path.read_bytes() + line + b"\n"
    path.write_bytes(damaged)
    for call in (
        lambda: measured.load("toy", tmp_path),
        lambda: measured.record("toy", {}, {}, seed=1, directory=tmp_path),
        lambda: measured.is_recorded("toy", {}, seed=1, directory=tmp_path),
    ):
        with pytest.raises(ValueError, match=r"toy\.jsonl, line 2 is not a record"):
            call()
    assert path.read_bytes() == damaged


def test_a_last_line_without_its_end_keeps_its_own_line(tmp_path):
    measured.record("toy", {}, {}, seed=0, directory=tmp_path)
    path = tmp_path / "toy.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    measured.record("toy", {}, {}, seed=1, directory=tmp_path)
    assert [r.seed for r in measured.load("toy", tmp_path)] == [0, 1]
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("seed", [None, 0.5, "1", True])
def test_a_record_that_could_not_be_loaded_is_not_written(tmp_path, seed):
    with pytest.raises(ValueError, match="seed must be int"):
        measured.record("toy", {}, {}, seed=seed, directory=tmp_path)
    assert not (tmp_path / "toy.jsonl").exists()


@pytest.mark.parametrize("where", ["write_bytes", "replace"])
def test_a_full_disk_is_named_and_leaves_the_file_as_it_was(tmp_path, monkeypatch, where):
    measured.record("toy", {}, {"loss": 1.0}, seed=0, directory=tmp_path)
    before = (tmp_path / "toy.jsonl").read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def cut(path, content):
        with path.open("wb") as file:
            file.write(content[:5])
        full()

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, where, cut) if where == "write_bytes" else (os, where, full)))
        with pytest.raises(OSError, match=r"cannot add a record to .*toy\.jsonl: No space left") as caught:
            measured.record("toy", {}, {}, seed=1, directory=tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "toy.jsonl").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"toy.jsonl", ".toy.lock"}


def test_gpu_records_of_another_form_are_passed_over(tmp_path):
    for configuration in (
        {},
        {"part": "speed"},
        {"part": "speed", "size": "full"},
        {"part": [1], "size": "full"},
    ):
        measured.record("gpu", configuration, {}, 0, tmp_path)
    assert len(measured.on_gpu("speed", directory=tmp_path)) == 1
    assert measured.on_gpu("speed", "step", tmp_path) == []

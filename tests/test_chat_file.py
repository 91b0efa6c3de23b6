"""The built-in chat files: found by name, whole or refused, and as raw as they are said to be."""

import json
import shutil
from collections import Counter

import pytest
from lora2qlora.lab import chat_file
from lora2qlora.lab.chat_rows import ROLES, read_chats


@pytest.fixture(scope="module")
def rows():
    lines = chat_file.chat_file("support-desk").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def copied_data(tmp_path, monkeypatch):
    for name in ("support_desk.jsonl", "SHA256SUMS"):
        shutil.copy(chat_file.DATA / name, tmp_path)
    monkeypatch.setattr(chat_file, "DATA", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["support_desk", "", None, ["support-desk"]])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(KeyError, match=r"unknown chat file .*support-desk"):
        chat_file.chat_file(name)


def test_a_file_that_is_altered_or_missing_is_refused(copied_data):
    path = chat_file.chat_file("support-desk")
    assert path.parent == copied_data
    path.write_bytes(path.read_bytes().replace(b"router", b"rooter", 1))
    with pytest.raises(OSError, match=r"'support-desk' is not whole: .*altered.*Reinstall lora2qlora"):
        chat_file.chat_file("support-desk")
    path.unlink()
    with pytest.raises(OSError, match=r"not whole: .*support_desk\.jsonl is missing"):
        chat_file.chat_file("support-desk")
    (copied_data / "SHA256SUMS").write_text(f"{'0' * 64}  other.jsonl\n")
    with pytest.raises(OSError, match=r"has no line for support_desk\.jsonl"):
        chat_file.chat_file("support-desk")


def test_the_support_desk_is_raw(rows):
    """Counted here without `read_chats`, and held against what it refuses."""
    chats = read_chats(chat_file.chat_file("support-desk"))
    texts = [json.dumps(row["messages"]) for row in rows]
    no_answer = [row for row in rows if len(row["messages"]) < 2]
    assert len(chats.rows) + len(no_answer) == len(set(texts)) < len(rows)
    assert len(chats.rows) + len(chats.refused) == len(rows)
    repeats = len(texts) - len(set(texts))
    assert chats.reasons() == {"duplicate": repeats, "no assistant turn": len(no_answer)}
    assert no_answer


def test_roles_take_turns_and_a_row_knows_its_source(rows):
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == [ROLES[1 + turn % 2] for turn in range(len(roles))]
    sources = Counter(row["source"] for row in rows)
    assert list(sources) == sorted(sources)
    assert sources.most_common(1)[0][0] == "tech_support"


def test_a_path_is_found_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "support-desk"
    own.write_text("{}")
    assert chat_file.find_chats("support-desk").samefile(own)
    own.unlink()
    assert chat_file.find_chats("support-desk") == chat_file.chat_file("support-desk")


@pytest.mark.parametrize("data", ["mine.jsonl", "folder/mine.jsonl", "a/b/c", "support desk"])
def test_what_is_not_there_is_said_with_what_would_do(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError, match=r"no file '.*a Hub dataset owner/name, or one of support-desk"):
        chat_file.find_chats(data)


def test_a_hub_dataset_becomes_a_file_once_and_whole(tmp_path, monkeypatch):
    import datasets

    asked, rows = [], [{"messages": [{"role": "user", "content": "Zürich?"}]}]

    def load(name, split):
        asked.append((name, split))
        if name == "some/broken":
            raise ConnectionError("no network")
        return datasets.Dataset.from_list(rows)

    monkeypatch.setenv("LORA2QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", load)
    paths = {chat_file.find_chats("some/chats") for _ in range(2)}
    assert asked == [("some/chats", "train")]
    assert [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()] == rows
    assert "Zürich" in next(iter(paths)).read_text("utf-8")
    with pytest.raises(OSError, match=r"cannot load 'some/broken' from the Hub .*no network"):
        chat_file.find_chats("some/broken")
    assert [path.name for path in next(iter(paths)).parent.iterdir()] == ["some--chats.jsonl"]

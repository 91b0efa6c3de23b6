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

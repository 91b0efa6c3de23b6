"""Chats from files: what is read, what is refused, and with which words."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora2qlora.lab.chat_rows import read_chats, what_is_wrong


def say(role, content):
    return {"role": role, "content": content}


GOOD = [say("user", "Ahoy?"), say("assistant", "Aye.")]
LONG = [say("system", "Be brief."), *GOOD, say("user", "Where?"), say("assistant", "Here.")]


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    return path


def write(path, rows):
    """The rows in the format that the file's name asks for."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"messages": rows}), path)
    elif path.suffix == ".csv":
        quoted = (json.dumps(row).replace('"', '""') for row in rows)
        path.write_text("messages\n" + "".join(f'"{row}"\n' for row in quoted), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"messages": row} for row in rows]), encoding="utf-8")
    else:
        write_lines(path, *({"messages": row} for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    chats = read_chats(write(tmp_path / f"chats.{kind}", [GOOD, LONG]))
    assert chats.rows == [GOOD, LONG]
    assert chats.refused == []


def test_two_columns_of_texts_are_a_question_and_an_answer(tmp_path):
    (tmp_path / "c.csv").write_text('prompt,completion\n"Ahoy?",Aye.\n"Two\nlines",Yes\n', encoding="utf-8")
    assert read_chats(tmp_path / "c.csv").rows == [GOOD, [say("user", "Two\nlines"), say("assistant", "Yes")]]


def test_refused_lines_are_named_and_the_others_kept(tmp_path):
    path = write_lines(
        tmp_path / "c.jsonl",
        {"messages": GOOD},
        b'{"messages": [',
        b"",
        b'{"messages": "\xff"}',
        {"messages": GOOD, "source": "elsewhere"},
        {"text": "Ahoy"},
        b"[" * 100_000,
        {"messages": LONG},
    )
    chats = read_chats(path)
    assert chats.rows == [GOOD, LONG]
    assert [line for line, _ in chats.refused] == [2, 4, 5, 6, 7]
    kinds = ["broken JSON", "not UTF-8", "duplicate", "no messages", "broken JSON"]
    assert [reason.partition(":")[0] for _, reason in chats.refused] == kinds
    assert chats.refused[2][1] == "duplicate: the same chat as in 1"
    assert chats.reasons() == {"broken JSON": 2, "duplicate": 1, "no messages": 1, "not UTF-8": 1}


BAD = {
    "no messages": [[], None, "Ahoy", {"role": "user"}],
    "no message": [["Ahoy"], [{"role": "user"}], [None]],
    "unknown role": [[say("tool", "x"), *GOOD], [say(None, "x")], [say(["user"], "x")]],
    "content is no text": [[GOOD[0], say("assistant", None)], [say("user", 3), GOOD[1]], [say("user", [])]],
    "empty content": [[GOOD[0], say("assistant", " \n")], [say("user", ""), GOOD[1]]],
    "unknown field": [[GOOD[0], GOOD[1] | {"tool_calls": [1]}]],
    "no assistant turn": [GOOD[:1], [say("system", "Be brief."), GOOD[0]]],
    "system turn": [[*GOOD, say("system", "Be brief.")]],
    "no question": [[GOOD[1]], [say("system", "Be brief."), GOOD[1], GOOD[0]]],
    "two turns of one role": [[GOOD[0], *GOOD], [*GOOD, GOOD[1]]],
}


@pytest.mark.parametrize(("kind", "messages"), [(kind, bad) for kind, all_ in BAD.items() for bad in all_])
def test_what_cannot_train_is_refused_by_kind(kind, messages):
    assert what_is_wrong(messages).startswith(f"{kind}: ")


@pytest.mark.parametrize("messages", [GOOD, LONG, [*GOOD, GOOD[0]], [GOOD[0], GOOD[1] | {"name": None}]])
def test_what_can_train_is_not_refused(messages):
    assert what_is_wrong(messages) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=4) | JSON)
def test_any_json_is_judged_in_words(messages):
    reason = what_is_wrong(messages)
    assert reason is None or ": " in reason


def test_a_file_of_which_nothing_is_left_is_one_clear_error(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", {"messages": GOOD[:1]}, b"{")
    with pytest.raises(ValueError, match=r"c\.jsonl holds no chat .*1: no assistant turn.*2: broken JSON"):
        read_chats(path)
    with pytest.raises(ValueError, match="it is empty"):
        read_chats(write_lines(tmp_path / "e.jsonl"))


@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.csv", "c.parquet"])
def test_a_missing_file_is_an_os_error(tmp_path, name):
    with pytest.raises(FileNotFoundError):
        read_chats(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("c.json", b"{", "no JSON in UTF-8.*jsonl"),
        ("c.json", b"\xff", "no JSON in UTF-8"),
        ("c.json", b'{"messages": []}', "must hold a list of rows, got dict"),
        ("c.csv", b'messages\n"open', "no CSV in UTF-8"),
        ("c.csv", b"messages\n\xff", "no CSV in UTF-8"),
        ("c.parquet", b"PAR1", "no whole parquet file"),
        ("c.txt", b"Ahoy", r"read from \.jsonl, \.json, \.csv, \.parquet, got '\.txt'"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_says_why(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_chats(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"messages": GOOD}).encode())
    assert read_chats(path).rows == [GOOD]

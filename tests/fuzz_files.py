"""What may lie in the place of one of an adapter's files."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

from lora2qlora.adapters import CONFIG, WEIGHTS


def spoil(rng: Random, path: Path) -> None:
    """Something else in the place of a file: nothing, a folder, a link, a pipe, another format, noughts."""
    victim = path / rng.choice((CONFIG, WEIGHTS))
    victim.unlink()
    make, argument = rng.choice(list(_things(victim)))
    make(argument)


def _things(path: Path) -> Iterator[tuple]:
    yield (lambda _: None), None
    yield path.mkdir, 0o777
    yield path.symlink_to, path
    yield path.symlink_to, path.with_name("nowhere")
    yield path.symlink_to, path.parent
    yield path.symlink_to, path.parents[1] / "good" / path.name  # which is as good as the file
    yield (lambda _: os.mkfifo(path)), None
    yield path.with_name("adapter_model.bin").write_bytes, b"\x80\x04K\x01."
    yield path.write_bytes, b""
    yield path.write_bytes, b"\x00" * 1_000_000
    yield (lambda _: shutil.rmtree(path.parent)), None
    yield (lambda _: (shutil.rmtree(path.parent), path.parent.write_bytes(b"a file"))), None

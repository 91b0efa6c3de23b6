"""How the experiments write files: each is there whole, or as it was before."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes `path` when the block ends.

    Where the block fails (a full disk, Ctrl-C), `path` is as it was and nothing is left beside it. Two
    writers at once do not meet; the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder, path.name)
        os.replace(Path(folder, path.name), path)

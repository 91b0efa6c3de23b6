"""A folder with one writer at a time, whose readers never see what is half written. Chapter 04."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

PARTIAL = ".writing-"
PATIENCE = 60  # seconds for which one waits for others


@contextmanager
def locked(directory: Path, alone: bool) -> Iterator[bool]:
    """Hold the folder: alone to write, or together with others who read. Yields whether it is held.

    The lock is on the folder itself (flock) and leaves no file; it ends with the process that holds it. Where
    there is none (Windows, some network drives, folders that may not be read) nothing is held.
    Raises TimeoutError: others hold it for PATIENCE seconds.
    """
    try:
        import fcntl

        handle = os.open(directory, os.O_RDONLY)
    except (ImportError, PermissionError):
        yield False
        return
    try:
        yield _take(fcntl, handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, directory)
    finally:
        os.close(handle)  # and the lock with it


def _take(fcntl, handle: int, kind: int, directory: Path) -> bool:
    """Take a lock as soon as nobody stands against it; False where the file system has none."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                raise TimeoutError(f"another process has been using {directory} for {PATIENCE} s") from None
            time.sleep(0.005)
        except OSError:
            return False


@contextmanager
def replacing(directory: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """A folder inside `directory` to write files of these names into; on leaving, they take their places.

    The first of the names is what makes the folder valid: it is taken away first and put there last, so that
    whoever reads without a lock finds the old files, the new ones or nothing, never a mix. What a killed
    process left is tidied. On an error in the block nothing is replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory, alone=True) as is_held:
        if is_held:
            _tidy(directory, names)
        with TemporaryDirectory(prefix=PARTIAL, dir=directory) as partial:
            yield Path(partial)
            if len(names) > 1:  # one file alone is replaced at once
                (directory / names[0]).unlink(missing_ok=True)
            for name in reversed(names):
                os.replace(Path(partial, name), directory / name)


def _tidy(directory: Path, names: tuple[str, ...]) -> None:
    """Remove the folders of dead writers; whoever holds the lock knows that none of them lives."""
    for path in directory.glob(f"{PARTIAL}*"):
        is_ours = (
            re.fullmatch(rf"{re.escape(PARTIAL)}\w{{8}}", path.name)
            and path.is_dir()
            and not path.is_symlink()
        )
        with suppress(OSError):
            if is_ours and {inner.name for inner in path.iterdir()} <= set(names):
                shutil.rmtree(path)

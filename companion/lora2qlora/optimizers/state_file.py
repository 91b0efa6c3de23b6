"""An optimizer's state in a safetensors file."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

PARTIAL = ".writing-"


def save_optimizer(optimizer: torch.optim.Optimizer, path: str | os.PathLike) -> None:
    """Write an optimizer's state to a safetensors file: the old file or the new one is there, never a part.

    Works for any whose states are tensors and whose options are plain numbers. What a killed save left in the
    folder is removed. Of two that write at once the later one's file stays.

    Raises ValueError: other states or options; OSError: it cannot be written, a full disk too. Chapter 12.
    """
    path, saved = Path(path), optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value for index, state in saved["state"].items() for name, value in state.items()
    }
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}: states of tensors alone can be saved")
    try:
        groups = json.dumps(saved["param_groups"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"options of plain numbers alone can be saved: {error}") from error
    with _partial(path) as partial:
        try:
            contiguous = {name: value.contiguous() for name, value in tensors.items()}
            save_file(contiguous, partial / path.name, metadata={"param_groups": groups})
        except SafetensorError as error:  # no OSError, though the disk is full
            raise OSError(f"{path} could not be written, the old file stays: {error}") from error
        os.replace(partial / path.name, path)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A folder beside a file to write it into, on the same disk, so that it can take the file's place."""
    handle = None
    try:
        with suppress(ImportError, OSError):  # no locks on Windows, nor on some network drives
            import fcntl

            handle = os.open(path.parent, os.O_RDONLY)
            with suppress(BlockingIOError):  # another writer lives
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _tidy(path)
            fcntl.flock(handle, fcntl.LOCK_SH)  # together with other writers, but with nobody who tidies
        with TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as partial:
            yield Path(partial)
    finally:
        if handle is not None:
            os.close(handle)  # and the lock with it


def _tidy(path: Path) -> None:
    """Remove what writers of this file left who were killed; none of them lives."""
    for left in path.parent.glob(f"{PARTIAL}*"):
        if left.is_dir() and not left.is_symlink() and {one.name for one in left.iterdir()} <= {path.name}:
            shutil.rmtree(left, ignore_errors=True)


def load_optimizer(optimizer: torch.optim.Optimizer, path: str | os.PathLike) -> None:
    """Take over the state that `save_optimizer` wrote; the optimizer is unchanged on any error.

    Raises FileNotFoundError; ValueError: a file that is cut short or no such file, or what the optimizer's
    own `load_state_dict` refuses. Chapter 12.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, need a file that save_optimizer wrote")
    states: dict[int, dict] = {}
    try:
        with safe_open(path, framework="pt") as file:
            groups = json.loads((file.metadata() or {})["param_groups"])
            if not all(isinstance(group["params"], list) for group in groups):
                raise ValueError("params are no list")
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                index, name = key.split(".", 1)
                states.setdefault(int(index), {})[name] = file.get_tensor(key)
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is cut short, or no optimizer's state ({error}): save it again") from error
    optimizer.load_state_dict({"state": states, "param_groups": groups})

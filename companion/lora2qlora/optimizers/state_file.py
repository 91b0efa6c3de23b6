"""An optimizer's state in a safetensors file."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def save_optimizer(optimizer: torch.optim.Optimizer, path: str | os.PathLike) -> None:
    """Write an optimizer's state to a safetensors file: the old file or the new one is there, never a part.

    Works for any whose states are tensors and whose options are plain numbers. Chapter 12.
    """
    path, saved = Path(path), optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value.contiguous()
        for index, state in saved["state"].items()
        for name, value in state.items()
    }
    groups = json.dumps(saved["param_groups"])
    with TemporaryDirectory(prefix=".writing-", dir=path.parent) as partial:
        save_file(tensors, Path(partial, path.name), metadata={"param_groups": groups})
        os.replace(Path(partial, path.name), path)


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
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is cut short, or no optimizer's state ({error}): save it again") from error
    optimizer.load_state_dict({"state": states, "param_groups": groups})

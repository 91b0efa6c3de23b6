"""The name of the model that an adapter is for, fit to be published. Chapter 04."""

import os
import re

from torch import nn

ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
SNAPSHOT = re.compile(r".*[/\\]models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?", re.DOTALL)


def published_name(model: nn.Module) -> str | None:
    """The model's name on the Hub, None where it has none: no path of this machine gets into a file.

    A path into the Hub's cache says the name. Any other must look like one and be no folder here. Where it is
    what transformers loaded the model from, it must also be in the Hub's cache, as `models/tiny` may be a
    folder that lay elsewhere; what somebody set as `model.name_or_path` afterwards is taken for a name.
    """
    name = str(getattr(model, "name_or_path", None) or "")
    if cached := SNAPSHOT.fullmatch(name):
        name = cached[1].replace("--", "/", 1)
        return name if ON_THE_HUB.fullmatch(name) else None
    if not ON_THE_HUB.fullmatch(name) or ".." in name or os.path.exists(name):
        return None
    loaded_from = getattr(getattr(model, "config", None), "_name_or_path", None)
    return None if loaded_from == name and not _is_cached(name) else name


def _is_cached(name: str) -> bool:
    """Whether the Hub's cache on this machine holds a model of this name."""
    from huggingface_hub import constants, file_download

    folder = file_download.repo_folder_name(repo_id=name, repo_type="model")
    return os.path.isdir(os.path.join(constants.HF_HUB_CACHE, folder, "snapshots"))

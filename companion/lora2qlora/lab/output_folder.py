"""Where a training run writes: on the reader's Drive, in Colab's own disk, or beside the notebook."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

COLAB = Path("/content")
DRIVE = COLAB / "drive" / "MyDrive"
MOUNT = 'from google.colab import drive; drive.mount("/content/drive")'


def output_folder(name: str) -> Path:
    """The folder of the run called `name`, made where there is none yet. Chapter 13.

    On Colab it is lora2qlora/NAME in the mounted Drive; without a Drive /content/runs/NAME, and a printed
    warning that Colab deletes it. Elsewhere it is runs/NAME in the working folder, which a notebook shares.

    Raises ValueError for a name that is no plain one, OSError where the folder cannot be made.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"a run's name has letters, digits, '-', '_' and '.' only, got {name!r}")
    if not on_colab():
        folder = Path("runs") / name
    elif DRIVE.is_dir():
        folder = DRIVE / "lora2qlora" / name
    else:
        folder = COLAB / "runs" / name
        print(f"{folder} is lost when Colab ends this machine. To keep it, first mount your Drive: {MOUNT}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def on_colab() -> bool:
    """Whether this is a machine of Google Colab: its kernel has loaded google.colab, or its image says so."""
    return "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ

"""What only a terminal sees: progress bars and notices. A notebook's outputs are the same at every run."""

from __future__ import annotations

import contextlib
import io
import sys

from tqdm import tqdm


def progress(iterable, description: str):
    """A progress bar on a terminal, nothing elsewhere (stored outputs must not change from run to run)."""
    return tqdm(iterable, desc=description, disable=not sys.stderr.isatty(), leave=False)


def notice(text: str) -> None:
    """A line on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


@contextlib.contextmanager
def quiet_unless_terminal():
    """Progress bars on a terminal; none where stderr is kept, as in a notebook's stored outputs."""
    from transformers.utils import logging as transformers_logging

    if sys.stderr.isatty() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader draws its bar regardless
            yield
    finally:
        transformers_logging.enable_progress_bar()

"""What chapters need to run experiments: models, tasks, training, records, notebook helpers.

The rooms of the package never import the lab. Importing the lab silences, in this one place, three
messages of other libraries that a reader can do nothing about.
"""

import logging
import warnings

# bitsandbytes, on a CPU: a hint about optional kernels, at import.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# PEFT 0.21 reads a property that transformers 5.23 has renamed.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# tqdm asks for ipywidgets in a notebook; the book shows no progress bar there.
warnings.filterwarnings("ignore", "IProgress not found")

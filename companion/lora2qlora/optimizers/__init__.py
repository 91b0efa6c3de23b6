"""Adam's two states in 8 bits, their bytes, and what paging them moves. Chapter 12.

The states are stored block by block, as `blockwise` stores any tensor, and read back to 32 bits piece by
piece while a step is taken. Paging is a simulation: pages are counted, no memory is asked for.
"""

from lora2qlora.optimizers.adam import adam_step, adam_step_8bit, unsigned_dynamic_codebook
from lora2qlora.optimizers.adamw_8bit import STATES, AdamW8bit, adam_state_bytes
from lora2qlora.optimizers.paging import PagedMemory, PageTraffic, page_traffic
from lora2qlora.optimizers.state_file import load_optimizer, save_optimizer

__all__ = [  # noqa: RUF022 (in the order in which one meets them)
    "unsigned_dynamic_codebook", "adam_step", "adam_step_8bit",
    "AdamW8bit", "STATES", "adam_state_bytes",
    "save_optimizer", "load_optimizer",
    "PagedMemory", "PageTraffic", "page_traffic",
]  # fmt: skip

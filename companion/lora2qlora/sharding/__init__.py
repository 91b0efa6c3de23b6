"""A QLoRA model over several cards: torch's FSDP2 divides its NF4 bytes as any other parameter. Chapter 17.

FSDP2 divides parameters and leaves buffers whole on every card. `NF4Linear` has buffers, so its bytes become
frozen parameters of 8-bit integers, under the same names: nothing casts those, and a state dict is the same.
"""

from lora2qlora.sharding.checks import check_shardable
from lora2qlora.sharding.model import save_sharded_adapter, shard, whole
from lora2qlora.sharding.parameters import make_plain, make_shardable

__all__ = ["check_shardable", "make_plain", "make_shardable", "save_sharded_adapter", "shard", "whole"]

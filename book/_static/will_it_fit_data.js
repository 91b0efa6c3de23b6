/* Written by tests/test_will_it_fit.py from lora2qlora.memory; the test compares. */
var WILL_IT_FIT_DATA = {
 "components": [
  "weights",
  "constants",
  "adapters",
  "gradients",
  "optimizer",
  "activations",
  "logits",
  "transient"
 ],
 "linears": [
  "q_proj",
  "k_proj",
  "v_proj",
  "o_proj",
  "gate_proj",
  "up_proj",
  "down_proj"
 ],
 "piece": 262144,
 "shapes": {
  "SmolLM2-135M": {
   "hidden": 576,
   "layers": 30,
   "heads": 9,
   "intermediate": 1536,
   "vocabulary": 49152,
   "kv_heads": 3,
   "tied": true,
   "head_dim": 64
  },
  "Llama-3.2-1B": {
   "hidden": 2048,
   "layers": 16,
   "heads": 32,
   "intermediate": 8192,
   "vocabulary": 128256,
   "kv_heads": 8,
   "tied": true,
   "head_dim": 64
  },
  "LLaMA-7B": {
   "hidden": 4096,
   "layers": 32,
   "heads": 32,
   "intermediate": 11008,
   "vocabulary": 32000,
   "kv_heads": 32,
   "tied": false,
   "head_dim": 128
  },
  "Llama-3.1-8B": {
   "hidden": 4096,
   "layers": 32,
   "heads": 32,
   "intermediate": 14336,
   "vocabulary": 128256,
   "kv_heads": 8,
   "tied": false,
   "head_dim": 128
  },
  "LLaMA-13B": {
   "hidden": 5120,
   "layers": 40,
   "heads": 40,
   "intermediate": 13824,
   "vocabulary": 32000,
   "kv_heads": 40,
   "tied": false,
   "head_dim": 128
  },
  "LLaMA-33B": {
   "hidden": 6656,
   "layers": 60,
   "heads": 52,
   "intermediate": 17920,
   "vocabulary": 32000,
   "kv_heads": 52,
   "tied": false,
   "head_dim": 128
  },
  "LLaMA-65B": {
   "hidden": 8192,
   "layers": 80,
   "heads": 64,
   "intermediate": 22016,
   "vocabulary": 32000,
   "kv_heads": 64,
   "tied": false,
   "head_dim": 128
  },
  "Llama-2-70B": {
   "hidden": 8192,
   "layers": 80,
   "heads": 64,
   "intermediate": 28672,
   "vocabulary": 32000,
   "kv_heads": 8,
   "tied": false,
   "head_dim": 128
  },
  "175B": {
   "hidden": 12288,
   "layers": 96,
   "heads": 96,
   "intermediate": 32768,
   "vocabulary": 50257,
   "kv_heads": 96,
   "tied": false,
   "head_dim": 128
  },
  "SmolLM2-360M": {
   "hidden": 960,
   "layers": 32,
   "heads": 15,
   "intermediate": 2560,
   "vocabulary": 49152,
   "kv_heads": 5,
   "tied": true,
   "head_dim": 64
  },
  "SmolLM2-1.7B": {
   "hidden": 2048,
   "layers": 24,
   "heads": 32,
   "intermediate": 8192,
   "vocabulary": 49152,
   "kv_heads": 32,
   "tied": true,
   "head_dim": 64
  },
  "Llama-3.2-3B": {
   "hidden": 3072,
   "layers": 28,
   "heads": 24,
   "intermediate": 8192,
   "vocabulary": 128256,
   "kv_heads": 8,
   "tied": true,
   "head_dim": 128
  },
  "Llama-3.3-70B": {
   "hidden": 8192,
   "layers": 80,
   "heads": 64,
   "intermediate": 28672,
   "vocabulary": 128256,
   "kv_heads": 8,
   "tied": false,
   "head_dim": 128
  },
  "Mistral-7B-v0.3": {
   "hidden": 4096,
   "layers": 32,
   "heads": 32,
   "intermediate": 14336,
   "vocabulary": 32768,
   "kv_heads": 8,
   "tied": false,
   "head_dim": 128
  }
 },
 "methods": {
  "full": {
   "kind": "full",
   "width": 2
  },
  "lora": {
   "kind": "lora",
   "width": 2,
   "rank": 16,
   "targets": [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj"
   ],
   "own": 4
  },
  "qlora": {
   "kind": "qlora",
   "width": 2,
   "rank": 16,
   "targets": [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj"
   ],
   "own": 4,
   "block_size": 64,
   "group_size": 256,
   "compute": 2
  }
 },
 "optimizers": {
  "AdamW, 32-bit states": {
   "states": 2,
   "state_bytes": 4,
   "counter_bytes": 4,
   "own_copies": 0,
   "all_copies": 0,
   "block_size": null,
   "smallest": 0,
   "shared_bytes": 0
  },
  "AdamW, as torch has it": {
   "states": 2,
   "state_bytes": null,
   "counter_bytes": 4,
   "own_copies": 0,
   "all_copies": 1,
   "block_size": null,
   "smallest": 0,
   "shared_bytes": 0
  },
  "AdamW, fused": {
   "states": 2,
   "state_bytes": null,
   "counter_bytes": 4,
   "own_copies": 0,
   "all_copies": 0,
   "block_size": null,
   "smallest": 0,
   "shared_bytes": 0
  },
  "AdamW, 8-bit states": {
   "states": 2,
   "state_bytes": 1,
   "counter_bytes": 0,
   "own_copies": 0,
   "all_copies": 0,
   "block_size": 256,
   "smallest": 4096,
   "shared_bytes": 2048
  },
  "SGD": {
   "states": 0,
   "state_bytes": null,
   "counter_bytes": 0,
   "own_copies": 0,
   "all_copies": 0,
   "block_size": null,
   "smallest": 0,
   "shared_bytes": 0
  },
  "SGD with momentum": {
   "states": 1,
   "state_bytes": null,
   "counter_bytes": 0,
   "own_copies": 0,
   "all_copies": 0,
   "block_size": null,
   "smallest": 0,
   "shared_bytes": 0
  }
 }
};

/* Written by tests/decision_page.py (make decision-page) from records and chapters' outputs. */
var DECISION_FIGURES = {
 "figures": {
  "small_model": {
   "text": "134.5 million",
   "from": "chapter 00, output"
  },
  "prompt_before": {
   "text": "26%",
   "from": "chapter 19, output"
  },
  "prompt_after": {
   "text": "67%",
   "from": "chapter 19, output"
  },
  "facts_rank": {
   "text": "3",
   "from": "chapter 02, output"
  },
  "targets": {
   "text": "1.3",
   "from": "chapter 04, output"
  },
  "names": {
   "text": "0.6%",
   "from": "chapter 04, output"
  },
  "rate_low": {
   "text": "1.25",
   "from": "chapter 05, output"
  },
  "rate_high": {
   "text": "2.18",
   "from": "chapter 05, output"
  },
  "full_gain": {
   "text": "1.06",
   "from": "chapter 05, output"
  },
  "forget": {
   "text": "2.56 (1.16 to 5.67)",
   "from": "chapter 05, output"
  },
  "peak_share": {
   "text": "48%",
   "from": "chapter 05, output"
  },
  "q_text": {
   "text": "1.30",
   "from": "chapter 09, output"
  },
  "adam_moves": {
   "text": "over 50 times",
   "from": "chapter 12, output"
  },
  "adam_8bit": {
   "text": "less than 0.01 nats",
   "from": "chapter 12, output"
  },
  "full_torch": {
   "text": "53.9",
   "from": "chapter 12, output"
  },
  "full_8bit": {
   "text": "40.6",
   "from": "chapter 12, output"
  },
  "bf16_merge": {
   "text": "96%",
   "from": "chapter 15, output"
  },
  "original": {
   "text": "0.07 ± 0.02",
   "from": "chapter 15, output"
  },
  "gguf_f32": {
   "text": "50",
   "from": "chapter 16, output"
  },
  "gguf_f16": {
   "text": "47",
   "from": "chapter 16, output"
  },
  "gguf_q8": {
   "text": "21",
   "from": "chapter 16, output"
  },
  "gguf_q4": {
   "text": "0",
   "from": "chapter 16, output"
  },
  "many_merged": {
   "text": "54.0",
   "from": "chapter 16, output"
  },
  "many_apart": {
   "text": "1.5",
   "from": "chapter 16, output"
  },
  "gathered": {
   "text": "1.6",
   "from": "chapter 16, output"
  },
  "ddp": {
   "text": "0.08",
   "from": "chapter 17, output"
  },
  "link_lora": {
   "text": "22.9",
   "from": "chapter 17, output"
  },
  "link_qlora": {
   "text": "6.2",
   "from": "chapter 17, output"
  },
  "dora": {
   "text": "+11% ± 9%",
   "from": "chapter 18, output"
  },
  "pissa": {
   "text": "+11% ± 6%",
   "from": "chapter 18, output"
  },
  "full_time": {
   "text": "1.3",
   "from": "chapter 19, output"
  },
  "swap": {
   "text": "15%",
   "from": "chapter 19, output"
  },
  "q_worse": {
   "text": "4.5%",
   "from": "chapter 19, output"
  },
  "q_pairs": {
   "text": "11",
   "from": "chapter 19, output"
  },
  "prompt_loss": {
   "text": "0.38",
   "from": "chapter 20a, output"
  },
  "bf16_sum": {
   "text": "1.000",
   "from": "chapter 20b, output"
  },
  "fp16_square": {
   "text": "inf",
   "from": "chapter 20b, output"
  },
  "rank": {
   "text": "8",
   "value": 8.0,
   "from": "chapter 13, settings"
  },
  "rate_seven": {
   "text": "0.0002",
   "value": 0.0002,
   "from": "chapter 13, settings"
  },
  "rate_large": {
   "text": "0.0001",
   "value": 0.0001,
   "from": "chapter 13, settings"
  },
  "held_out": {
   "text": "10%",
   "value": 0.1,
   "from": "chapter 13, settings"
  },
  "held_few": {
   "text": "30%",
   "value": 0.3,
   "from": "chapter 13, settings"
  },
  "step_rows": {
   "text": "16",
   "value": 16.0,
   "from": "chapter 13, settings"
  },
  "alpha": {
   "text": "16",
   "value": 16.0,
   "from": "chapter 13, settings"
  },
  "rank_ratio": {
   "text": "1.02 (0.98 to 1.07, 9 pairs)",
   "from": "record rank_sweep"
  },
  "few_rows": {
   "text": "384",
   "value": 384,
   "from": "record rank_sweep"
  },
  "rate_small": {
   "text": "0.0032",
   "from": "record rank_sweep"
  },
  "rate_full": {
   "text": "0.0003",
   "from": "record rank_sweep"
  },
  "q_loss": {
   "text": "0.98 (0.92 to 1.06, 9 pairs)",
   "from": "records quantization_atlas and rank_sweep"
  },
  "slower_cpu": {
   "text": "8%",
   "from": "record speed"
  },
  "merge16": {
   "text": "100%",
   "from": "record merging"
  },
  "merge4": {
   "text": "2% to 34%",
   "from": "record merging"
  },
  "slower_gpu": {
   "text": "28% to 56%",
   "from": "chapter 14, output"
  },
  "slower_gpu_basis": {
   "text": "Two reports, of torchtune and of LitGPT; this book measured it on no GPU.",
   "from": "chapter 14, output"
  },
  "vllm_lora": {
   "text": "equal",
   "from": "Adapter conformance"
  },
  "vllm_dora": {
   "text": "refused",
   "from": "Adapter conformance"
  }
 },
 "links": {
  "19_lora_versus_qlora#when-neither": "chapter 19, “When neither”",
  "05_rank_across_tasks#in-practice": "chapter 05, “In practice”",
  "04_adapters#many-tasks-one-base": "chapter 04, “Many tasks, one base”",
  "05_rank_across_tasks#against-full-fine-tuning": "chapter 05, “Against full fine-tuning”",
  "19_lora_versus_qlora#accuracy": "chapter 19, “Accuracy”",
  "19_lora_versus_qlora#in-practice": "chapter 19, “In practice”",
  "17_many_gpus#how-long-do-the-cards-wait": "chapter 17, “How long do the cards wait?”",
  "17_many_gpus#what-is-divided-and-what-is-not": "chapter 17, “What is divided, and what is not”",
  "will_it_fit#what-is-counted-and-what-is-not": "Will it fit?, “What is counted, and what is not”",
  "13_qlora_on_a_gpu#recipe-ladder": "chapter 13, “When memory runs out”",
  "17_many_gpus#in-practice": "chapter 17, “In practice”",
  "17_many_gpus#ddp-and-a-model-split-by-layers": "chapter 17, “DDP, and a model split by layers”",
  "17_many_gpus#which-engine": "chapter 17, “Which engine?”",
  "05_rank_across_tasks#which-rank": "chapter 05, “Which rank”",
  "02_updates_are_low_rank#a-task-that-needs-high-rank": "chapter 02, “A task that needs high rank”",
  "05_rank_across_tasks#which-rate": "chapter 05, “Which rate”",
  "13_qlora_on_a_gpu#recipe-settings": "chapter 13, “Settings”",
  "04_adapters#which-layers": "chapter 04, “Which layers”",
  "18_variants#on-equal-terms": "chapter 18, “On equal terms”",
  "18_variants#in-practice": "chapter 18, “In practice”",
  "12_optimizers#in-practice": "chapter 12, “In practice”",
  "13_qlora_on_a_gpu#recipe-model": "chapter 13, “The model”",
  "20b_faq_memory#faq-16-bit-adapters": "chapter 20b, “Adapters in 16 bits hardly move”",
  "20b_faq_memory#faq-t4": "chapter 20b, “A T4 has no bf16: what now?”",
  "20a_faq_training#faq-prompt-loss": "chapter 20a, “Should the tokens of the prompt count in the loss?”",
  "13_qlora_on_a_gpu#recipe-rows": "chapter 13, “Your rows”",
  "15_merging#in-practice": "chapter 15, “In practice”",
  "15_merging#every-way-on-a-real-model": "chapter 15, “Every way, on a real model”",
  "16_serving#does-it-answer-as-the-notebook-did": "chapter 16, “Does it answer as the notebook did?”",
  "16_serving#in-practice": "chapter 16, “In practice”",
  "conformance#what-to-do": "Adapter conformance, “What to do”",
  "16_serving#when-to-use-something-else": "chapter 16, “When to use something else”",
  "16_serving#many-adapters-on-one-base": "chapter 16, “Many adapters on one base”",
  "14_fast#what-it-is-worth": "chapter 14, “What it is worth”",
  "14_fast#on-a-gpu": "chapter 14, “On a GPU”",
  "19_lora_versus_qlora#speed": "chapter 19, “Speed”",
  "04_adapters#the-file": "chapter 04, “The file”",
  "09_quantization_quality#repaired-but-not-healed": "chapter 09, “Repaired, but not healed”",
  "05_rank_across_tasks#what-is-forgotten": "chapter 05, “What is forgotten”",
  "12_optimizers#is-it-still-adam": "chapter 12, “Is it still Adam?”"
 }
};

/* The page "Quiz": five questions a part, as JSON. tests/test_quiz.py holds its figures to the chapters' outputs.
   `why` explains an answer; what stands in backquotes there, its chapter prints. `said` is where a wrong answer is given. */
var QUIZ = [
 {
  "part": "I",
  "title": "Low rank",
  "chapters": "01 to 05",
  "questions": [
   {
    "id": "tail",
    "ask": "You fully fine-tune a model and take the change of one weight apart. What do you find?",
    "chapter": "02_updates_are_low_rank",
    "section": "Cut the update, keep the gain",
    "anchor": "cut-the-update-keep-the-gain",
    "options": [
     {
      "text": "Eight directions hold nearly all of it: full fine-tuning makes updates of low rank.",
      "right": false,
      "why": "At rank 8 `the median keeps 70%` of the energy, and the rest is a long tail. The paper supposes a low “intrinsic” rank, which is about what the task needs, not about what training makes.",
      "said": {
       "name": "the LoRA paper",
       "url": "https://arxiv.org/abs/2106.09685"
      }
     },
     {
      "text": "A long tail, of which the task needs little.",
      "right": true,
      "why": "In the median update eight directions hold 70% of the energy, and yet `rank 8 keeps 97% of the gain`. The tail is there, and the task hardly uses it."
     },
     {
      "text": "High rank, so an adapter of rank 8 must lose what lies beyond it: the rank bounds the information.",
      "right": false,
      "why": "The update does have a long tail, but cut to rank 8 it `keeps 97% of the gain`. Even 64 facts without anything in common could be picked out: `rank 8 recalls 64, 64, 64 of 64 from the three starts`.",
      "said": {
       "name": "self-adaptive-llms #3",
       "url": "https://github.com/SakanaAI/self-adaptive-llms/issues/3"
      }
     }
    ]
   },
   {
    "id": "zero-b",
    "ask": "Why does LoRA start with A random and B at zero?",
    "chapter": "03_lora",
    "section": "Which factor is zero?",
    "anchor": "which-factor-is-zero",
    "options": [
     {
      "text": "It does not matter which of the two is zero, as long as one is.",
      "right": false,
      "why": "Both starts leave the model as it was, but they do not train alike. On the small problem with Adam, each at its best rate, `the other start ends higher, × 2.4`.",
      "said": {
       "name": "LoRA #98",
       "url": "https://github.com/microsoft/LoRA/issues/98"
      }
     },
     {
      "text": "Zeros in B throw away what the pretrained weights know, so that training writes it anew.",
      "right": false,
      "why": "The pretrained weight stays whole beside the adapter; a B of zero only silences the adapter. What disturbs a model is a start with both at random: `perplexity × 2.5` before training.",
      "said": {
       "name": "LoRA #114",
       "url": "https://github.com/microsoft/LoRA/issues/114"
      }
     },
     {
      "text": "So that the model starts as it was, and B has a gradient in the first step.",
      "right": true,
      "why": "With B at zero the product BA is zero, and the gradient of B comes through A, which is not. The mirror image starts there too, but `the other start ends higher, × 2.4`."
     }
    ]
   },
   {
    "id": "alpha",
    "ask": "Training with Adam, you take four times the α and a quarter of the learning rate. What comes out?",
    "chapter": "03_lora",
    "section": "What α does",
    "anchor": "what-does",
    "options": [
     {
      "text": "The same run: α only multiplies the learning rate.",
      "right": false,
      "why": "That would hold if a step were as large as its gradient. Adam moves each number by about the learning rate, whatever the gradient. At a quarter of the rate the losses differ by `× 212`.",
      "said": {
       "name": "bitsandbytes #762",
       "url": "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/762"
      }
     },
     {
      "text": "Another run: the two do not cancel.",
      "right": true,
      "why": "With Adam, c times the α acts as √c times the learning rate and a start of A that is √c times as large. Here the losses differ by `× 212` at a quarter of η and by `× 8.8` at half of it."
     },
     {
      "text": "A safe run in any case, as long as α is at least twice the rank.",
      "right": false,
      "why": "Twice the rank is a common convention, and a fixed α spares you one search. It makes no learning rate a good one: here the losses differ by `× 212` at a quarter of η.",
      "said": {
       "name": "unsloth #1304",
       "url": "https://github.com/unslothai/unsloth/issues/1304"
      }
     }
    ]
   },
   {
    "id": "targets",
    "ask": "You can afford a fixed number of trainable parameters. Which layers get adapters?",
    "chapter": "04_adapters",
    "section": "Which layers",
    "anchor": "which-layers",
    "options": [
     {
      "text": "Queries and values alone, as in the LoRA paper.",
      "right": false,
      "why": "The paper compared only weights of attention. At an equal budget, with the rank adjusted, `Attention alone ends with 1.3 times the loss`.",
      "said": {
       "name": "peft #974",
       "url": "https://github.com/huggingface/peft/pull/974"
      }
     },
     {
      "text": "Attention. The MLP's layers make little difference.",
      "right": false,
      "why": "At an equal budget they do: `Attention alone ends with 1.3 times the loss`. The thread reports one task of long contexts, without an equal budget.",
      "said": {
       "name": "LongLoRA #78",
       "url": "https://github.com/JIA-Lab-research/LongLoRA/issues/78"
      }
     },
     {
      "text": "All linear layers, each at a lower rank.",
      "right": true,
      "why": "For the same number of parameters, `Attention alone ends with 1.3 times the loss`, on a small model and beyond what seeds do."
     }
    ]
   },
   {
    "id": "rank",
    "ask": "You raise the rank from 1 to 64, in short runs on three tasks. What does the test loss do?",
    "chapter": "05_rank_across_tasks",
    "section": "Which rank",
    "anchor": "which-rank",
    "options": [
     {
      "text": "Nothing beyond what another seed does.",
      "right": true,
      "why": "The verdict is `UNDECIDED, with nine pairs`; on the mean of the three tasks, more than seven per cent is ruled out. What rises is the time of a step: `rank 64 takes at least a tenth longer than rank 1: HOLDS`."
     },
     {
      "text": "It falls: more rank captures more complex patterns.",
      "right": false,
      "why": "More rank can hold more, but these tasks did not need it: `rank 64 is better than rank 1: UNDECIDED, with nine pairs`. Longer runs with more data may.",
      "said": {
       "name": "LightX2V #203",
       "url": "https://github.com/ModelTC/LightX2V/issues/203"
      }
     },
     {
      "text": "It rises: a higher rank needs more epochs to get to the same loss.",
      "right": false,
      "why": "With α / r as the scale one learning rate served all ranks, and no rank was left behind after the same number of steps: `one rate for all ranks, on this grid: HOLDS`.",
      "said": {
       "name": "alpaca-lora #226",
       "url": "https://github.com/tloen/alpaca-lora/issues/226"
      }
     }
    ]
   }
  ]
 },
 {
  "part": "II",
  "title": "Four bits",
  "chapters": "06 to 09",
  "questions": [
   {
    "id": "blocks",
    "ask": "Why does QLoRA quantize in blocks of 64 weights?",
    "chapter": "06_blockwise",
    "section": "The best block size",
    "anchor": "the-best-block-size",
    "options": [
     {
      "text": "To confine outliers. Without outliers blocks would not be worth their bits.",
      "right": false,
      "why": "Blocks do confine outliers. But on normal random numbers, which have none, `blocks pay even where there are no outliers`: the largest of 64 numbers is smaller than the largest of a million.",
      "said": {
       "name": "the QLoRA paper",
       "url": "https://arxiv.org/abs/2305.14314"
      }
     },
     {
      "text": "Each block has an absmax of its own, and at 64 its bits are well spent.",
      "right": true,
      "why": "Where an absmax takes 8 bits, `64 is within 5 % of the best block size`. And `blocks pay even where there are no outliers`."
     },
     {
      "text": "It is what the kernels can do. Smaller blocks would always be better, for little more memory.",
      "right": false,
      "why": "Smaller blocks round more finely, but each costs an absmax. If you have bits to spare, take a finer code first: `a finer code before smaller blocks: HOLDS`.",
      "said": {
       "name": "bitsandbytes #1854",
       "url": "https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1854"
      }
     }
    ]
   },
   {
    "id": "nf4",
    "ask": "What are the sixteen values of NF4?",
    "chapter": "07_nf4",
    "section": "Least error",
    "anchor": "least-error",
    "options": [
     {
      "text": "Four-bit fixed-point numbers, evenly spread from −1 to 1.",
      "right": false,
      "why": "That is int4. NF4's values lie closer together around zero, where most weights are, and on trained weights that pays: `NF4 before int4 and FP4 on trained weights: HOLDS`.",
      "said": {
       "name": "stable-diffusion.cpp #525",
       "url": "https://github.com/leejet/stable-diffusion.cpp/issues/525"
      }
     },
     {
      "text": "Sixteen values of which each is used equally often.",
      "right": false,
      "why": "So the paper's construction is often read. Divided by the absmax of its block, a bell is no bell any more: in blocks of 64 `one code is used 5.4 times as often as another`.",
      "said": {
       "name": "the QLoRA paper",
       "url": "https://arxiv.org/abs/2305.14314"
      }
     },
     {
      "text": "Edges of equal slices of a bell curve, with an exact zero.",
      "right": true,
      "why": "They are quantiles, divided by the outermost. On normal numbers in blocks of 64 the values fitted to that very error do hardly better: `least mean absolute error to 1 %: HOLDS`."
     }
    ]
   },
   {
    "id": "double",
    "ask": "What does double quantization quantize, and at what price?",
    "chapter": "08_double_quantization",
    "section": "What it costs",
    "anchor": "what-it-costs",
    "options": [
     {
      "text": "The absmax values, to 8 bits. The weights' error hardly grows.",
      "right": true,
      "why": "It saves 0.37 bits a weight, and `the error grows by 0.24% at most`."
     },
     {
      "text": "The absmax values. As an extra step with possible side effects it is better left off.",
      "right": false,
      "why": "The side effect can be measured: `the error grows by 0.24% at most`. The obvious way to save these bits without it, larger blocks, is worse: `11% more error at the same bits`.",
      "said": {
       "name": "h2o-llmstudio #403",
       "url": "https://github.com/h2oai/h2o-llmstudio/pull/403"
      }
     },
     {
      "text": "The absmax values. Two dequantizations instead of one make every step noticeably slower.",
      "right": false,
      "why": "Two they are, but there is only one absmax for 64 weights. Measured, the whole takes `1.01 (0.98 to 1.04) times as long` (chapter 14).",
      "said": {
       "name": "vllm #19742",
       "url": "https://github.com/vllm-project/vllm/pull/19742"
      },
      "chapter": "14_fast"
     }
    ]
   },
   {
    "id": "formats",
    "ask": "On weights that nobody had rounded before, is NF4 the best of this book's four-bit formats?",
    "chapter": "09_quantization_quality",
    "section": "Weights that nobody has rounded",
    "anchor": "weights-that-nobody-has-rounded",
    "options": [
     {
      "text": "Yes. It is the optimal format for normal weights.",
      "right": false,
      "why": "Against int4 with as many bits it is ahead. But affine int4, with five bits for each, it does not beat: `NF4 before affine int4 at 5 bits: UNDECIDED, with 144 windows`.",
      "said": {
       "name": "the QLoRA paper",
       "url": "https://arxiv.org/abs/2305.14314"
      }
     },
     {
      "text": "No. In small blocks affine int4 is better.",
      "right": false,
      "why": "By the error in the weights it is, here too. By what the small model says of a text the two cannot be told apart: `affine int4 less NF4, blocks of 32: -0.5 ± 1.1`. The models of the thread may differ.",
      "said": {
       "name": "bitsandbytes #2086",
       "url": "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2086"
      }
     },
     {
      "text": "Ahead of int4; against affine int4 it is undecided.",
      "right": true,
      "why": "`NF4 before int4 at 4.5 bits: HOLDS`, and `NF4 before affine int4 at 5 bits: UNDECIDED, with 144 windows`."
     }
    ]
   },
   {
    "id": "healed",
    "ask": "You fine-tune with LoRA over an NF4 base. How much of the damage done by four bits is undone?",
    "chapter": "09_quantization_quality",
    "section": "Repaired, but not healed",
    "anchor": "repaired-but-not-healed",
    "options": [
     {
      "text": "All of it: after fine-tuning, NF4 matches 16 bits.",
      "right": false,
      "why": "On the task it nearly does, with one exception: `no higher loss on any task: FAILS, on the pronunciations`. On other text it does not: `at most a tenth more perplexity on other text: FAILS on every task`.",
      "said": {
       "name": "the QLoRA paper",
       "url": "https://arxiv.org/abs/2305.14314"
      }
     },
     {
      "text": "On the task most of it; on other text the model stays worse.",
      "right": true,
      "why": "Training repairs what its loss sees. Elsewhere the rounding stays: `at most a tenth more perplexity on other text: FAILS on every task`."
     },
     {
      "text": "None. Four bits will do for running a model, and are bad for training.",
      "right": false,
      "why": "The base is not trained, it is only read. Over it LoRA made up for four bits on two tasks of three, and for most of it on the third: `no higher loss on any task: FAILS, on the pronunciations`.",
      "said": {
       "name": "alpaca-lora #56",
       "url": "https://github.com/tloen/alpaca-lora/issues/56"
      }
     }
    ]
   }
  ]
 },
 {
  "part": "III",
  "title": "QLoRA",
  "chapters": "10 to 14",
  "questions": [
   {
    "id": "dequantize",
    "ask": "When is a four-bit weight of QLoRA turned back into 16 bits?",
    "chapter": "10_qlora",
    "section": "How many dense weights at a time?",
    "anchor": "how-many-dense-weights-at-a-time",
    "options": [
     {
      "text": "Never. The product is computed in four bits, so casts are avoided.",
      "right": false,
      "why": "No product has a factor in four bits: `97% of the FLOPs are in bf16, 3% in fp32, none in 4 bits`. Four bits are how a weight is stored.",
      "said": {
       "name": "optimum-quanto #277",
       "url": "https://github.com/huggingface/optimum-quanto/issues/277"
      }
     },
     {
      "text": "In every step, forward and again backward, one layer at a time.",
      "right": true,
      "why": "In one step of the whole model `210 times forward and 207 times backward`. The dense weight is dropped as soon as its product is done."
     },
     {
      "text": "In every step for the whole model, so in the end it takes the memory of LoRA.",
      "right": false,
      "why": "One layer is there at a time. Over the first six blocks the dense weights alive come to `at most 83 MB with the naive layer, 3.5 MB with NF4Linear`, which saves only packed bytes.",
      "said": {
       "name": "qlora #168",
       "url": "https://github.com/artidoro/qlora/issues/168"
      }
     }
    ]
   },
   {
    "id": "prepare",
    "ask": "Is prepare_model_for_kbit_training needed?",
    "chapter": "10_qlora",
    "section": "Each line switched off",
    "anchor": "each-line-switched-off",
    "options": [
     {
      "text": "Yes. Without it training goes wrong silently.",
      "right": false,
      "why": "Nothing goes wrong: `without it all 42 adapters get their gradients`. Freezing is done by PEFT anyway.",
      "said": {
       "name": "bitsandbytes #1569",
       "url": "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1569"
      }
     },
     {
      "text": "Yes. It is what saves the memory.",
      "right": false,
      "why": "What saves memory is the checkpointing that it switches on, which you can have without it. Its cast to 32 bits takes memory: 126 MB of parameters instead of 69, `| no call at all | 42 | 69 | 32 |`.",
      "said": {
       "name": "peft #902",
       "url": "https://github.com/huggingface/peft/issues/902"
      }
     },
     {
      "text": "No. Its checkpointing helps, its cast to 32 bits costs memory.",
      "right": true,
      "why": "`without it all 42 adapters get their gradients`. Switch checkpointing on yourself, and you have what matters."
     }
    ]
   },
   {
    "id": "percent",
    "ask": "How much of the memory of full fine-tuning does QLoRA save?",
    "chapter": "11_memory",
    "section": "How much less?",
    "anchor": "how-much-less",
    "options": [
     {
      "text": "That depends on the tokens: in 16 settings of one model, from less than nothing to nine tenths.",
      "right": true,
      "why": "`QLoRA: -10% to 94%`. Only the bytes of weights, gradients and optimizer states are fixed; activations grow with the tokens."
     },
     {
      "text": "About 75 per cent, and LoRA about 50.",
      "right": false,
      "why": "Of 16 settings there is none in which both are true: `both figures fit in 0 of 16 settings`. `from 16 bits to 4.127: 74% less` is true of the linear layers' weights alone.",
      "said": {
       "name": "the answer that this book began with",
       "url": "index.html"
      }
     },
     {
      "text": "Always a good part: its parameters have fewer bits, so it takes less in every setting.",
      "right": false,
      "why": "The parameters do, and activations do not. Adapters in 32 bits even copy their inputs, so that with many tokens and no checkpointing QLoRA can take more: `QLoRA: -10% to 94%`.",
      "said": {
       "name": "fms-hf-tuning #373",
       "url": "https://github.com/foundation-model-stack/fms-hf-tuning/issues/373"
      }
     }
    ]
   },
   {
    "id": "optimizer",
    "ask": "QLoRA on a 7B model at rank 16 misses your card by two gigabytes. You switch to an 8-bit, paged AdamW. Does it fit?",
    "chapter": "12_optimizers",
    "section": "What it saves",
    "anchor": "what-it-saves",
    "options": [
     {
      "text": "Yes. 8-bit states take 75 per cent less GPU memory.",
      "right": false,
      "why": "Of the *states*, which are small here: adapters have few parameters. `QLoRA on 7B at rank 16 saves 5% of its memory`. In full fine-tuning they do decide.",
      "said": {
       "name": "the guide of bitsandbytes",
       "url": "https://huggingface.co/docs/bitsandbytes/v0.50.1/optimizers"
      }
     },
     {
      "text": "Yes. A paged optimizer moves to main memory whatever is missing.",
      "right": false,
      "why": "It can move its states and nothing else, and for these adapters they are a fraction of a gigabyte: `QLoRA on 7B at rank 16 saves 5% of its memory` with 8-bit states.",
      "said": {
       "name": "bitsandbytes #1898",
       "url": "https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1898"
      }
     },
     {
      "text": "No. The adapters' states are too small to save that much.",
      "right": true,
      "why": "`QLoRA on 7B at rank 16 saves 5% of its memory`, a quarter of a gigabyte. Shorten the text, take fewer rows, or switch on checkpointing."
     }
    ]
   },
   {
    "id": "slow",
    "ask": "A step of QLoRA takes longer than one of LoRA. What helps most?",
    "chapter": "14_fast",
    "section": "A floor, counted",
    "anchor": "a-floor-counted",
    "options": [
     {
      "text": "A product in four bits. Good kernels for it are missing.",
      "right": false,
      "why": "QLoRA has no such product: `the products are those of LoRA, dtype by dtype`. It is slower because weights are turned back before each product.",
      "said": {
       "name": "alpaca-lora #56",
       "url": "https://github.com/tloen/alpaca-lora/issues/56"
      }
     },
     {
      "text": "More tokens in each pass.",
      "right": true,
      "why": "Turning weights back takes the same time whatever the batch, and the products grow with it. At 2,048 rows on the fast path it is `1.02 (1.00 to 1.03) times as long as LoRA`."
     },
     {
      "text": "Switching double quantization off.",
      "right": false,
      "why": "Measured, dequantizing with it takes `1.01 (0.98 to 1.04) times as long`, which decides nothing, and you would pay with 0.37 bits a weight.",
      "said": {
       "name": "LitGPT's table",
       "url": "https://github.com/Lightning-AI/litgpt/blob/main/tutorials/resource-tables.md"
      }
     }
    ]
   }
  ]
 },
 {
  "part": "IV",
  "title": "Shipping",
  "chapters": "15 to 18",
  "questions": [
   {
    "id": "merge",
    "ask": "You call PEFT's merge_and_unload on a QLoRA model whose base is in four bits. What is left of the training?",
    "chapter": "15_merging",
    "section": "Every way, on a real model",
    "anchor": "every-way-on-a-real-model",
    "options": [
     {
      "text": "All but small rounding errors.",
      "right": false,
      "why": "The errors are small beside the weight and large beside the update. `of what training gained, 3% is left`.",
      "said": {
       "name": "peft #1043",
       "url": "https://github.com/huggingface/peft/issues/1043"
      }
     },
     {
      "text": "All of it: a merge gives a 16-bit model.",
      "right": false,
      "why": "torchtune's merge does. PEFT's call rounds the sum to four bits again, and most weights return to where they were: `of what training gained, 3% is left`.",
      "said": {
       "name": "torchtune #869",
       "url": "https://github.com/meta-pytorch/torchtune/issues/869"
      }
     },
     {
      "text": "Next to nothing.",
      "right": true,
      "why": "The dequantized weight is on a grid point, the update is smaller than half a step, and rounding brings it back: `of what training gained, 3% is left`."
     }
    ]
   },
   {
    "id": "dequantized",
    "ask": "You trained over NF4 and want one 16-bit model that behaves like the one you trained. What do you merge into?",
    "chapter": "15_merging",
    "section": "Every way, on a real model",
    "anchor": "every-way-on-a-real-model",
    "options": [
     {
      "text": "Into the dequantized weights: the sum in float32, stored in 16 bits.",
      "right": true,
      "why": "`in float16 the largest KL divergence is 4e-06 nats`: to all purposes the model that was trained."
     },
     {
      "text": "Into the original weights: they have the true precision, so the result is better.",
      "right": false,
      "why": "The adapter has never seen them. On the task such a merge is `worse on the task: HOLDS, over 9 adapters`. (On other text it can be better.)",
      "said": {
       "name": "unsloth-zoo #810",
       "url": "https://github.com/unslothai/unsloth-zoo/pull/810"
      }
     },
     {
      "text": "It cannot be had: with a base in four bits rounding errors are unavoidable.",
      "right": false,
      "why": "They are unavoidable if the sum goes back to four bits. In 16 bits `the largest KL divergence is 4e-06 nats`.",
      "said": {
       "name": "peft #2321",
       "url": "https://github.com/huggingface/peft/issues/2321"
      }
     }
    ]
   },
   {
    "id": "gguf",
    "ask": "Your model answers well in the notebook and badly as a GGUF file. No error is raised. Where do you look first?",
    "chapter": "16_serving",
    "section": "When the GGUF and the notebook disagree",
    "anchor": "when-the-gguf-and-the-notebook-disagree",
    "options": [
     {
      "text": "At the way in which Ollama or llama.cpp serves models.",
      "right": false,
      "why": "Given the same model it gives the same answers: `F32 with the adapter keeps 50 of 50`.",
      "said": {
       "name": "unsloth #976",
       "url": "https://github.com/unslothai/unsloth/issues/976"
      }
     },
     {
      "text": "At the steps of the conversion and at the chat template.",
      "right": true,
      "why": "A complete conversion keeps the answers, and `none of the 6 omissions raises an error`."
     },
     {
      "text": "Anywhere but at the quantization, if it is Q8_0: its loss of quality is extremely low.",
      "right": false,
      "why": "A low loss is not the same answer: `Q8_0 keeps 42% of the answers` of this small model. Compare in F32 first, so that the format is out of the question.",
      "said": {
       "name": "a model card",
       "url": "https://huggingface.co/tensorblock/SmolLM2-135M-Instruct-GGUF"
      }
     }
    ]
   },
   {
    "id": "cards",
    "ask": "You divide a QLoRA run between two cards with FSDP2. How much memory does each card need?",
    "chapter": "17_many_gpus",
    "section": "What is divided, and what is not",
    "anchor": "what-is-divided-and-what-is-not",
    "options": [
     {
      "text": "Half of what one needs: parameters, gradients and optimizer states are sharded.",
      "right": false,
      "why": "These are, and activations, logits and whatever is gathered are not. For the small model `two processes need 92% each`.",
      "said": {
       "name": "the FSDP guide of bitsandbytes",
       "url": "https://huggingface.co/docs/bitsandbytes/fsdp_qlora"
      }
     },
     {
      "text": "It does not run: FSDP and four-bit weights do not go together.",
      "right": false,
      "why": "So it was in some tools. Stored so that they can be divided, four-bit weights train under FSDP2 as on one card: `losses differ by at most 1.4e-06`.",
      "said": {
       "name": "torchtune #844",
       "url": "https://github.com/meta-pytorch/torchtune/issues/844"
      }
     },
     {
      "text": "More than half, and as much as before if the four-bit weights are stored in the default way.",
      "right": true,
      "why": "Of QLoRA little can be divided: `two processes need 92% each`. And with default settings the base stays whole: `in uint8 each holds 100%`."
     }
    ]
   },
   {
    "id": "pissa",
    "ask": "You put PiSSA in the place of LoRA and change nothing else. What happens to the test loss?",
    "chapter": "18_variants",
    "section": "One rate for all",
    "anchor": "one-rate-for-all",
    "options": [
     {
      "text": "It falls: under identical settings PiSSA is better.",
      "right": false,
      "why": "At LoRA's best rate it is worse: `PiSSA's loss against LoRA's, at LoRA's rate: +33% ± 10%, 6 pairs`.",
      "said": {
       "name": "the PiSSA paper",
       "url": "https://arxiv.org/abs/2404.02948"
      }
     },
     {
      "text": "It rises: PiSSA wants a lower learning rate.",
      "right": true,
      "why": "`PiSSA's best rate is one step of the grid (a factor of 3.2) below LoRA's`, so LoRA's rate is too high for it."
     },
     {
      "text": "It rises: PiSSA is the worse method.",
      "right": false,
      "why": "At LoRA's rate it is. Each tuned, they are within 5 per cent, `PiSSA HOLDS`: a comparison at one rate compares rates.",
      "said": {
       "name": "MiLoRA #3",
       "url": "https://github.com/sufenlp/MiLoRA/issues/3"
      }
     }
    ]
   }
  ]
 },
 {
  "part": "V",
  "title": "Answers",
  "chapters": "19 and 20",
  "questions": [
   {
    "id": "loss-zero",
    "ask": "The Trainer logs a loss of exactly 0 from the first step on, in float32. What has happened?",
    "chapter": "20a_faq_training",
    "section": "The loss is 0, or NaN",
    "anchor": "the-loss-is-0-or-nan",
    "options": [
     {
      "text": "The model learns too fast. A lower learning rate helps.",
      "right": false,
      "why": "Nothing has been learnt before the first step. The log shows `[0.0, 0.0]`, and without its filter `[nan, nan]`: there was nothing to average.",
      "said": {
       "name": "fast-stable-diffusion #2608",
       "url": "https://github.com/TheLastBen/fast-stable-diffusion/issues/2608"
      }
     },
     {
      "text": "No token is labelled. The loss is 0 / 0, a NaN that the log shows as 0.",
      "right": true,
      "why": "`logged: [0.0, 0.0]`, and `without the filter: [nan, nan]`. Look at the labels of one row."
     },
     {
      "text": "Half precision overflows. Training without it cures that.",
      "right": false,
      "why": "In fp16 it may, and then NaN comes from there. This run is in float32, so look at the labels: without the filter the log has `[nan, nan]`.",
      "said": {
       "name": "qlora #135",
       "url": "https://github.com/artidoro/qlora/issues/135"
      }
     }
    ]
   },
   {
    "id": "endless",
    "ask": "After training with pad_token = eos_token the model answers rightly, and then goes on and on. Why?",
    "chapter": "20a_faq_training",
    "section": "The model never stops talking",
    "anchor": "the-model-never-stops-talking",
    "options": [
     {
      "text": "It has not trained long enough to predict the end.",
      "right": false,
      "why": "No number of steps teaches what is not in the loss: `padding masked by its token: 0 of 4 end tokens are labelled`.",
      "said": {
       "name": "unsloth #419",
       "url": "https://github.com/unslothai/unsloth/issues/419"
      }
     },
     {
      "text": "Its configuration lacks the ids of the padding and end tokens.",
      "right": false,
      "why": "They tell generation where to stop, once the model produces the end. Here it never does: `each answer without its end: 12 tokens, stopped: False`.",
      "said": {
       "name": "llama-cookbook #640",
       "url": "https://github.com/meta-llama/llama-cookbook/issues/640"
      }
     },
     {
      "text": "The collator masked the end tokens together with the padding.",
      "right": true,
      "why": "`padding masked by its token: 0 of 4 end tokens are labelled`. Masked by position, all four are, and the model stops."
     }
    ]
   },
   {
    "id": "continue",
    "ask": "You want to go on training an adapter that you saved. What do you do?",
    "chapter": "20a_faq_training",
    "section": "A second get_peft_model: the trained adapter is gone",
    "anchor": "a-second-get-peft-model-the-trained-adapter-is-gone",
    "options": [
     {
      "text": "Load it with is_trainable=True, and leave the model as it is.",
      "right": true,
      "why": "Then `42 of 42 matrices B are as they were saved`. (The optimizer's state is only in the checkpoints of the Trainer.)"
     },
     {
      "text": "Load it, then call get_peft_model with its settings again.",
      "right": false,
      "why": "That puts a new adapter of the same name in its place: `42 of 42 matrices B are zero`.",
      "said": {
       "name": "unsloth #1492",
       "url": "https://github.com/unslothai/unsloth/issues/1492"
      }
     },
     {
      "text": "Load it, and call model.train().",
      "right": false,
      "why": "That switches dropout on. The loaded adapter stays frozen: `as loaded: 0 parameters train`.",
      "said": {
       "name": "peft #184",
       "url": "https://github.com/huggingface/peft/issues/184"
      }
     }
    ]
   },
   {
    "id": "half",
    "ask": "You load a model in four bits, and a count of its parameters gives about half as many. Why?",
    "chapter": "20b_faq_memory",
    "section": "The model has half its parameters",
    "anchor": "the-model-has-half-its-parameters",
    "options": [
     {
      "text": "Quantization has frozen the others.",
      "right": false,
      "why": "Frozen parameters count like all others. Every weight is there: `num_parameters: 134,515,008`.",
      "said": {
       "name": "bitsandbytes #834",
       "url": "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/834"
      }
     },
     {
      "text": "Two codes share a byte, and the bytes were counted.",
      "right": true,
      "why": "`in 4 bits: 81,430,848 elements`; with the packed ones counted twice it is the model's `134,515,008`."
     },
     {
      "text": "It was not quantized to four bits: its weights are uint8.",
      "right": false,
      "why": "uint8 is the box, and each holds two codes of four bits. Hence the count: `in 4 bits: 81,430,848 elements`.",
      "said": {
       "name": "bitsandbytes #1203",
       "url": "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1203"
      }
     }
    ]
   },
   {
    "id": "serve",
    "ask": "You will serve over an NF4 base. For training, the 16-bit base would fit too. Over which do you train?",
    "chapter": "19_lora_versus_qlora",
    "section": "Accuracy",
    "anchor": "accuracy",
    "options": [
     {
      "text": "Over 16 bits. The adapter is in 16 bits, so it goes with either base.",
      "right": false,
      "why": "It loads over either. But over NF4 it meets the rounding errors for the first time: `over NF4, LoRA's adapter has +15% loss`.",
      "said": {
       "name": "unsloth #3209",
       "url": "https://github.com/unslothai/unsloth/issues/3209"
      }
     },
     {
      "text": "Over 16 bits. Training over a quantized base costs accuracy in any case.",
      "right": false,
      "why": "On average over three tasks that is not decided here: `all nine: -1.6%, ± 7.0%`. What counts is the base that will serve: `trained over NF4 is better over NF4: HOLDS`.",
      "said": {
       "name": "peft #902",
       "url": "https://github.com/huggingface/peft/issues/902"
      }
     },
     {
      "text": "Over NF4.",
      "right": true,
      "why": "`trained over NF4 is better over NF4: HOLDS`. The adapter learns with the errors that it will be served with."
     }
    ]
   }
  ]
 }
];

/* A shape out of a published config.json, as shape_of of lora2qlora.memory reads it: tests/test_will_it_fit.py
   compares. Nothing here touches the page; what is refused is thrown as an Error with the reason. */
"use strict";

WillItFit.config = (function () {
  var DATA = WILL_IT_FIT_DATA;
  /* What transformers takes where a config.json is silent; Gemma's rely on it. */
  var DEFAULTS = {
    llama: [4096, 32, 32, null, 11008, 32000],
    mistral: [4096, 32, 32, 8, 14336, 32000],
    ministral: [4096, 32, 32, 8, 14336, 32000],
    cwm: [6144, 64, 48, 8, 21504, 128256],
    qwen2: [4096, 32, 32, 32, 22016, 151936],
    smollm3: [2048, 36, 16, 4, 11008, 128256],
    qwen3: [4096, 32, 32, 32, 22016, 151936],
    phi3: [3072, 32, 32, null, 8192, 32064],
    olmo2: [4096, 32, 32, null, 11008, 50304],
    gemma3_text: [2304, 26, 8, 4, 9216, 262208],
    granite: [4096, 32, 32, null, 11008, 32000]
  };
  var SIZES = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size"];
  var HEADS = { cwm: 128, qwen3: 128, gemma3_text: 256 };
  var WINDOWS = { mistral: 4096, ministral: 4096, cwm: 8192, qwen2: 4096, qwen3: 4096, gemma3_text: 4096 };
  var TIED = ["smollm3", "gemma3_text"];
  var SEE_ALL = ["llama", "olmo2", "granite"];
  var INSTEAD = " In Python, simulate_step of lora2qlora.memory counts a step of any causal model.";
  /* Larger sizes than any model has: they would keep the page busy, or leave the whole numbers. */
  var MOST = { num_hidden_layers: 1000, vocab_size: 1e7 };

  function has(object, key) { return Object.prototype.hasOwnProperty.call(object, key); }
  function isObject(value) { return value !== null && typeof value === "object" && !Array.isArray(value); }
  function given(config, key, otherwise) { return has(config, key) ? config[key] : otherwise; }

  /* The part for text of a nested config, else the config itself. */
  function textPart(config) {
    var inner = ["text_config", "decoder", "generator"].filter(function (key) {
      return has(config, key) && isObject(config[key]);
    });
    if (!inner.length) { return config; }
    var part = config[inner[0]];
    if (has(part, "model_type") || config.model_type !== "gemma3") { return part; }
    return Object.assign({}, part, { model_type: "gemma3_text" });
  }

  function isMixture(config) {
    return /moe|mixtral/i.test(config.model_type) || Object.keys(config).some(function (key) {
      return /^(num_(local_)?experts|n_routed_experts|moe_)/.test(key) && config[key];
    });
  }

  function checkFamily(config) {
    var name = config.model_type;
    if (typeof name !== "string") { throw new Error("This config names no model_type, so its family is not known."); }
    if (isMixture(config)) {
      throw new Error("A model of type " + name + " is a mixture of experts, of which every token takes only some. " +
        "The page knows none." + INSTEAD);
    }
    if (config.is_encoder_decoder === true) {
      throw new Error("A model of type " + name + " has an encoder and a decoder. The page counts causal models, " +
        "which predict the next token.");
    }
    if (!has(DATA.families, name)) {
      throw new Error("Models of type " + name + " are not known to the page. It knows the types " +
        Object.keys(DATA.families).join(", ") + "." + INSTEAD);
    }
  }

  /* A number that must be whole and not too large. */
  function whole(name, value) {
    var most = MOST[name] || 1e6;
    if (typeof value !== "number" || value % 1 !== 0 || value < 1 || value > most) {
      throw new Error(name + " must be a whole number from 1 to " + most + ", and is " + JSON.stringify(value) + ".");
    }
    return value;
  }

  /* What a model of a family known may do that the ledger does not count. */
  function checkUncounted(config) {
    var rope = config.rope_scaling || config.rope_parameters || {}, odd = {};
    var part = given(rope, "partial_rotary_factor", given(config, "partial_rotary_factor", 1));
    var activation = config.hidden_act || config.hidden_activation || "silu";
    if (part !== null && part !== 1) { odd.partial_rotary_factor = part; }
    if (["silu", "gelu", "gelu_pytorch_tanh"].indexOf(activation) < 0) { odd.hidden_act = activation; }
    ["final_logit_softcapping", "use_bidirectional_attention", "attention_dropout", "resid_pdrop",
      "embd_pdrop"].forEach(function (key) { if (config[key]) { odd[key] = config[key]; } });
    Object.keys(odd).forEach(function (key) {
      throw new Error("The page does not count " + key + ", which is " + JSON.stringify(odd[key]) + " here." + INSTEAD);
    });
  }

  /* The linear layers that have a bias. */
  function biases(config) {
    var family = config.model_type, found = [];
    if (family === "qwen2") { return DATA.linears.slice(0, 3); }
    if (family === "phi3") { return found; }
    if (config.attention_bias) { found = DATA.linears.slice(0, 4); }
    return config.mlp_bias ? found.concat(DATA.linears.slice(4)) : found;
  }

  /* Every which layer has no rotary positions. */
  function unturned(config, layers) {
    var turned = config.no_rope_layers, every;
    if (config.model_type === "smollm3" && !turned) {
      every = whole("no_rope_layer_interval", given(config, "no_rope_layer_interval", 4));
      return every <= layers ? every : null;
    }
    if (!Array.isArray(turned) || turned.every(Boolean)) { return null; }
    every = turned.findIndex(function (turns) { return !turns; }) + 1;
    if (!turned.every(function (turns, at) { return Boolean(turns) === ((at + 1) % every !== 0); })) {
      throw new Error("Layers without rotary positions must come evenly; no_rope_layers has another order." + INSTEAD);
    }
    return every;
  }

  /* Whether some layer's attention slides a window, where the config does not list the layers' kinds. */
  function slidesUnlisted(config, layers, turnless) {
    var family = config.model_type;
    if (family === "qwen2" || family === "qwen3") { return given(config, "max_window_layers", 28) < layers; }
    if (family === "smollm3") { return Boolean(config.use_sliding_window) && turnless !== null; }
    if (family === "cwm") { return layers > 1; }
    if (family === "gemma3_text") { return given(config, "sliding_window_pattern", 6) > 1; }
    return true;
  }

  /* How far back attention reaches where it slides a window, else null. */
  function slidingWindow(config, layers, turnless) {
    var family = config.model_type, kinds = config.layer_types;
    var reach = given(config, "sliding_window", has(WINDOWS, family) ? WINDOWS[family] : null);
    if ((family === "qwen2" || family === "qwen3") && !config.use_sliding_window) { return null; }
    if (!reach || SEE_ALL.indexOf(family) >= 0) { return null; }
    var slides = Array.isArray(kinds) && kinds.length ? kinds.indexOf("sliding_attention") >= 0
      : slidesUnlisted(config, layers, turnless);
    return slides ? whole("sliding_window", reach) : null;
  }

  function checkHeads(shape) {
    if (shape.heads % shape.kv_heads) {
      throw new Error("num_key_value_heads, " + shape.kv_heads + ", must divide num_attention_heads, " + shape.heads + ".");
    }
    if (shape.head_dim % 2) { throw new Error("A head must have an even size, and has " + shape.head_dim + "."); }
  }

  /* The shape of a config. */
  function shapeOf(found) {
    if (!isObject(found)) { throw new Error("This is no config.json: it holds no object."); }
    var config = textPart(found), sizes, family = config.model_type, shape;
    checkFamily(config);
    checkUncounted(config);
    sizes = SIZES.map(function (key, at) {
      var value = given(config, key, DEFAULTS[family][at]);
      return value === null && key === "num_key_value_heads" ? null : whole(key, value);
    });
    shape = { hidden: sizes[0], layers: sizes[1], heads: sizes[2], intermediate: sizes[4], vocabulary: sizes[5],
      kv_heads: sizes[3] || sizes[2], tied: Boolean(given(config, "tie_word_embeddings", TIED.indexOf(family) >= 0)),
      form: DATA.families[family], biases: biases(config), unturned: unturned(config, sizes[1]) };
    shape.head_dim = whole("head_dim",
      given(config, "head_dim", has(HEADS, family) ? HEADS[family] : null) || sizes[0] / sizes[2]);
    shape.window = slidingWindow(config, shape.layers, shape.unturned);
    checkHeads(shape);
    return shape;
  }

  /* The shape of the text of a config.json. */
  function read(text) {
    var found;
    if (text.length > 1e6) { throw new Error("This is too long for a config.json."); }
    try { found = JSON.parse(text); } catch (error) { throw new Error("This is not JSON: " + error.message + "."); }
    return shapeOf(found);
  }

  function familyOf(text) { return textPart(JSON.parse(text)).model_type; }

  return { read: read, familyOf: familyOf };
}());

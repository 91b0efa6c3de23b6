/* The ledger of lora2qlora.memory, operation by operation, and the page "Will it fit?" around it.
   tests/test_will_it_fit.py holds its sums to those of the Python ledger, to the byte. */
"use strict";

var WillItFit = (function () {
  var DATA = WILL_IT_FIT_DATA;
  var COMPONENTS = DATA.components;

  function ceil(a, b) { return Math.floor((a + b - 1) / b); }

  /* --- what is trained ------------------------------------------------------------------- */

  function linears(shape) {
    var q = shape.heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim;
    var h = shape.hidden, i = shape.intermediate;
    return { q_proj: [q, h], k_proj: [kv, h], v_proj: [kv, h], o_proj: [h, q],
             gate_proj: [i, h], up_proj: [i, h], down_proj: [h, i] };
  }

  function inLinears(shape) {
    var all = linears(shape), sum = 0;
    DATA.linears.forEach(function (name) { sum += all[name][0] * all[name][1]; });
    return sum;
  }

  function parameters(shape) {
    var block = inLinears(shape) + 2 * shape.hidden;
    return shape.layers * block + shape.hidden + (shape.tied ? 1 : 2) * shape.vocabulary * shape.hidden;
  }

  /* [numbers, bytes] of every tensor that trains, in the order of model.parameters(). */
  function trained(shape, method) {
    var all = linears(shape), block = [], counts = [], width = method.width, n;
    if (method.kind === "full") {
      DATA.linears.forEach(function (name) { block.push(all[name][0] * all[name][1]); });
      block.push(shape.hidden, shape.hidden);
      counts.push(shape.vocabulary * shape.hidden);
    } else {
      width = method.own;
      DATA.linears.forEach(function (name) {
        if (method.targets.indexOf(name) < 0) { return; }
        block.push(method.rank * all[name][1], method.rank * all[name][0]);
      });
    }
    for (n = 0; n < shape.layers; n += 1) { counts = counts.concat(block); }
    if (method.kind === "full") {
      counts.push(shape.hidden);
      if (!shape.tied) { counts.push(shape.vocabulary * shape.hidden); }
    }
    return counts.map(function (count) { return [count, count * width]; });
  }

  function kept(optimizer, count, size) {
    var state;
    if (count < optimizer.smallest) {
      state = 4 * count;
    } else {
      state = optimizer.state_bytes === null ? size : optimizer.state_bytes * count;
      if (optimizer.block_size) { state += 4 * ceil(count, optimizer.block_size); }
    }
    return optimizer.states * state + optimizer.counter_bytes;
  }

  function staticMemory(shape, method, optimizer) {
    var held = {}, all = linears(shape), tensors = trained(shape, method), shared = false;
    COMPONENTS.forEach(function (name) { held[name] = 0; });
    held.weights = (parameters(shape) - shape.layers * inLinears(shape)) * method.width;
    held.weights += 8 * Math.floor(shape.head_dim / 2);
    DATA.linears.forEach(function (name) {
      var count = all[name][0] * all[name][1], blocks;
      if (method.kind !== "qlora") { held.weights += shape.layers * count * method.width; return; }
      blocks = ceil(count, method.block_size);
      held.weights += shape.layers * ceil(count, 2);
      held.constants += shape.layers * (method.group_size === null
        ? 4 * blocks : blocks + 4 * ceil(blocks, method.group_size) + 4);
    });
    tensors.forEach(function (tensor) {
      if (method.kind !== "full") { held.adapters += tensor[1]; }
      held.optimizer += kept(optimizer, tensor[0], tensor[1]);
      shared = shared || tensor[0] >= optimizer.smallest;
    });
    if (shared) { held.optimizer += optimizer.shared_bytes; }
    return held;
  }

  /* --- a tape of sizes ---------------------------------------------------------------------- */

  var EARLY_STOP = {};

  function Tape(held) {
    this.held = held; this.total = 0; this.peaks = []; this.block = null; this.again = null;
    this.fullest = null; this.most = 0;
    for (var i = 0; i < COMPONENTS.length; i += 1) { this.total += held[COMPONENTS[i]]; }
    this.mark();
  }
  Tape.prototype.snapshot = function () {
    var held = this.held;
    this.most = this.total;
    this.fullest = COMPONENTS.map(function (name) { return held[name]; });
  };
  Tape.prototype.mark = function () {
    if (this.fullest) { this.peaks.push(this.fullest); }
    this.snapshot();
  };
  Tape.prototype.make = function (size, kind, needs) {
    kind = kind || "transient";
    this.held[kind] += size;
    this.total += size;
    if (this.total > this.most) { this.snapshot(); }
    var tensor = { size: size, kind: kind, needs: !!needs, holders: 1, saved: 0 };
    if (this.again) { this.again.made.push(tensor); }
    return tensor;
  };
  Tape.prototype.hold = function (tensor) { tensor.holders += 1; return tensor; };
  Tape.prototype.drop = function () {
    for (var i = 0; i < arguments.length; i += 1) {
      var tensor = arguments[i];
      tensor.holders -= 1;
      if (!tensor.holders) { this.held[tensor.kind] -= tensor.size; this.total -= tensor.size; }
    }
  };
  Tape.prototype.move = function (tensor, kind) {
    this.held[tensor.kind] -= tensor.size;
    this.held[kind] += tensor.size;
    tensor.kind = kind;
  };
  Tape.prototype.save = function (tensor) {
    var slot;
    if (this.block) {
      slot = { tensor: null, block: this.block };
      this.block.slots.push(slot);
      return slot;
    }
    if (this.again) {
      slot = this.again.slots[this.again.next];
      this.again.next += 1;
    } else {
      slot = { tensor: null, block: null };
    }
    slot.tensor = this.hold(tensor);
    tensor.saved += 1;
    if (tensor.kind === "transient") { this.move(tensor, "activations"); }
    if (this.again && this.again.next === this.again.slots.length) { throw EARLY_STOP; }
    return slot;
  };
  Tape.prototype.load = function (slots) {
    for (var i = 0; i < slots.length; i += 1) {
      if (slots[i].tensor === null) { this.recompute(slots[i].block); }
    }
  };
  Tape.prototype.recompute = function (block) {
    var made, i;
    this.again = { slots: block.slots, next: 0, made: [] };
    try { block.forward(); } catch (stop) { if (stop !== EARLY_STOP) { throw stop; } }
    made = this.again.made;
    this.again = null;
    for (i = 0; i < made.length; i += 1) {
      if (made[i].holders > made[i].saved) { made[i].holders = made[i].saved + 1; this.drop(made[i]); }
    }
  };
  Tape.prototype.release = function (slots) {
    for (var i = 0; i < slots.length; i += 1) {
      var tensor = slots[i].tensor;
      slots[i].tensor = null;
      tensor.saved -= 1;
      if (!tensor.saved && tensor.holders > 1 && tensor.kind === "activations") {
        this.move(tensor, "transient");
      }
      this.drop(tensor);
    }
  };
  Tape.prototype.add = function (first, second) {
    if (first) { this.drop(first); }
    return second;
  };

  /* --- a training step ---------------------------------------------------------------------- */

  function Step(tape, shape, method, batch, length, checkpointing) {
    this.tape = tape; this.shape = shape; this.method = method; this.checkpointing = checkpointing;
    this.batch = batch; this.length = length; this.tokens = batch * length;
    this.full = method.kind === "full"; this.width = method.width; this.linears = linears(shape);
    this.compute = method.kind === "qlora" ? method.compute : method.width;
  }

  Step.prototype.run = function () {
    var tape = this.tape, shape = this.shape, n = this.tokens, pulls = [], l, made;
    tape.make(8 * n);
    var embedded = tape.make(n * shape.hidden * this.width, "", this.full || this.checkpointing);
    var x = embedded, positions = tape.make(8 * this.length), angles = [];
    for (l = 0; l < 2; l += 1) {
      angles.push(tape.make(this.length * shape.head_dim * this.width, "activations"));
    }
    tape.hold(embedded);
    for (l = 0; l < shape.layers; l += 1) {
      made = this.checkpointing ? this.checkpointed(x) : this.block(x);
      pulls.push(made[1]);
      tape.drop(x);
      x = made[0];
    }
    made = this.norm(x);
    tape.drop(x, embedded);
    if (!this.checkpointing) { tape.drop(positions); }
    var end = this.loss(made[0]), gradient = made[1](end.gradient);
    for (l = shape.layers - 1; l >= 0; l -= 1) { gradient = pulls[l](gradient); }
    tape.drop(angles[0], angles[1]);
    if (this.checkpointing) { tape.drop(positions); }
    if (this.full) {
      tape.make(shape.vocabulary * shape.hidden * this.width, "gradients");
      if (shape.tied) { tape.drop(end.weight); }
    }
    if (gradient) { tape.drop(gradient); }
    tape.drop(end.losses[0], end.losses[1]);
  };

  Step.prototype.loss = function (x) {
    var tape = this.tape, shape = this.shape, n = this.tokens, weight = null;
    var wide = n * shape.vocabulary * this.width, exact = n * shape.vocabulary * 4;
    var saved = this.full ? [tape.save(x)] : [];
    var logits = tape.make(wide, "logits");
    var asFloat = this.width !== 4 ? tape.make(exact, "logits") : tape.hold(logits);
    var padded = tape.make(8 * this.batch * (this.length + 1));
    var labels = this.batch > 1 ? tape.make(8 * n) : tape.hold(padded);
    var logSoftmax = tape.make(exact, "logits");
    var loss = tape.make(4), weights = tape.make(4);
    tape.drop(asFloat, padded, logits, x);
    tape.mark();
    var one = tape.make(4), ofLoss = tape.make(exact, "logits");
    tape.drop(labels, weights);
    var ofLogits = tape.make(exact, "logits"), exactGradient;
    tape.drop(ofLoss, logSoftmax);
    if (this.width !== 4) {
      exactGradient = ofLogits;
      ofLogits = tape.make(wide, "logits");
      tape.drop(exactGradient);
    }
    if (this.full) { weight = tape.make(shape.vocabulary * shape.hidden * this.width, "gradients"); }
    var gradient = tape.make(n * shape.hidden * this.width);
    tape.drop(ofLogits);
    tape.release(saved);
    return { gradient: gradient, weight: weight, losses: [loss, one] };
  };

  Step.prototype.checkpointed = function (x) {
    var self = this, tape = this.tape;
    tape.block = { forward: function () { self.block(x); }, slots: [] };
    var made = this.block(x);
    tape.block = null;
    var keptInput = tape.hold(x);
    if (keptInput.kind === "transient") { tape.move(keptInput, "activations"); }
    return [made[0], function (gradient) {
      gradient = made[1](gradient);
      tape.drop(keptInput);
      return gradient;
    }];
  };

  Step.prototype.block = function (x) {
    var tape = this.tape, size = this.tokens * this.shape.hidden * this.width;
    var first = this.norm(x), attention = this.attention(first[0]);
    tape.drop(first[0]);
    var middle = tape.make(size, "", attention[0].needs || x.needs);
    tape.drop(attention[0]);
    var second = this.norm(middle), mlp = this.mlp(second[0]);
    tape.drop(second[0]);
    var y = tape.make(size, "", mlp[0].needs || middle.needs);
    tape.drop(mlp[0], middle);
    var halves = [[middle.needs, [mlp[1], second[1]]], [x.needs, [attention[1], first[1]]]];
    return [y, function (gradient) {
      for (var i = 0; i < 2; i += 1) {
        var branch = tape.hold(gradient);
        for (var k = 0; k < 2; k += 1) { branch = branch ? halves[i][1][k](branch) : null; }
        if (!halves[i][0]) { tape.drop(gradient); return null; }
        if (branch) { gradient = tape.add(gradient, branch); }
      }
      return gradient;
    }];
  };

  Step.prototype.norm = function (x) {
    var self = this, tape = this.tape, n = this.tokens, h = this.shape.hidden, width = this.width;
    var exact = width !== 4 ? tape.make(4 * n * h, "", x.needs) : tape.hold(x);
    var saved = x.needs ? [tape.save(exact)] : [];
    var square = tape.make(4 * n * h), mean = tape.make(4 * n);
    tape.drop(square);
    var shifted = tape.make(4 * n), root = tape.make(4 * n);
    if (x.needs) { saved.push(tape.save(root)); }
    tape.drop(shifted);
    if (x.needs) { saved.push(tape.save(exact)); saved.push(tape.save(root)); }
    var product = tape.make(4 * n * h);
    tape.drop(root, exact);
    var scaled = width !== 4 ? tape.make(width * n * h) : tape.hold(product);
    var savedScaled = this.full ? [tape.save(scaled)] : [];
    var y = tape.make(width * n * h, "", x.needs || this.full);
    tape.drop(scaled, product, mean);
    return [y, function (gradient) {
      var ofScaled = x.needs ? tape.make(width * n * h) : null, long;
      if (self.full) {
        tape.load(savedScaled);
        long = tape.make(width * n * h);
        tape.make(width * h, "gradients");
        tape.drop(long);
        tape.release(savedScaled);
      }
      tape.drop(gradient);
      return x.needs ? self.backThroughRoot(ofScaled, saved) : null;
    }];
  };

  Step.prototype.backThroughRoot = function (gradient, saved) {
    var tape = this.tape, exact = 4 * this.tokens * this.shape.hidden, short = 4 * this.tokens, before;
    if (this.width !== 4) { before = gradient; gradient = tape.make(exact); tape.drop(before); }
    var ofX = tape.make(exact), long = tape.make(exact), ofRoot = tape.make(short);
    tape.drop(long, gradient);
    tape.release([saved[2], saved[3]]);
    var a = tape.make(short), b = tape.make(short), ofShifted = tape.make(short);
    tape.drop(ofRoot, a, b);
    tape.release([saved[1]]);
    var ofSquare = tape.make(exact);
    tape.drop(ofShifted);
    a = tape.make(exact); b = tape.make(exact);
    var ofXToo = tape.make(exact);
    tape.drop(ofSquare, a, b);
    tape.release([saved[0]]);
    gradient = tape.add(ofX, ofXToo);
    if (this.width !== 4) {
      before = gradient;
      gradient = tape.make(this.width * this.tokens * this.shape.hidden);
      tape.drop(before);
    }
    return gradient;
  };

  Step.prototype.attention = function (x) {
    var self = this, tape = this.tape, n = this.tokens, saved = [];
    var q = this.linear("q_proj", x), k = this.linear("k_proj", x), v = this.linear("v_proj", x);
    var turnedQ = this.turn(q[0]), turnedK = this.turn(k[0]);
    tape.drop(q[0], k[0]);
    var needs = q[0].needs || k[0].needs || v[0].needs;
    if (needs) { saved = [tape.save(turnedQ), tape.save(turnedK), tape.save(v[0])]; }
    var mixed = tape.make(q[0].size, "", needs), logSums = tape.make(4 * n * this.shape.heads);
    if (needs) { saved.push(tape.save(mixed)); saved.push(tape.save(logSums)); }
    tape.drop(logSums);
    var o = this.linear("o_proj", mixed);
    tape.drop(mixed, v[0], turnedQ, turnedK);
    return [o[0], function (gradient) {
      gradient = o[1](gradient, null);
      if (!needs) { return null; }
      var ofQ = tape.make(q[0].size), ofK = tape.make(k[0].size), ofV = tape.make(v[0].size), ofX = null;
      tape.drop(gradient);
      tape.release(saved);
      ofK = self.turnBack(ofK, k[0].needs);
      ofQ = self.turnBack(ofQ, q[0].needs);
      [[v, ofV], [k, ofK], [q, ofQ]].forEach(function (pair) {
        var made = pair[0], of = pair[1], byHead;
        if (!made[0].needs) { if (of) { tape.drop(of); } return; }
        if (made !== v) { byHead = of; of = tape.make(made[0].size); tape.drop(byHead); }
        ofX = made[1](of, ofX);
      });
      return ofX;
    }];
  };

  Step.prototype.turn = function (x) {
    var tape = this.tape, size = x.size, byCos = tape.make(size), negated = tape.make(Math.floor(size / 2));
    var halves = tape.make(size);
    tape.drop(negated);
    var bySin = tape.make(size);
    tape.drop(halves);
    var y = tape.make(size, "", x.needs);
    tape.drop(byCos, bySin);
    return y;
  };

  Step.prototype.turnBack = function (gradient, needs) {
    var tape = this.tape, size = gradient.size;
    if (!needs) { tape.drop(gradient); return null; }
    var bySin = tape.make(size), negated = tape.make(Math.floor(size / 2)), first = tape.make(size);
    tape.drop(negated);
    var second = tape.make(size);
    tape.drop(bySin);
    var both = tape.add(first, second), byCos = tape.make(size);
    tape.drop(gradient);
    return tape.add(both, byCos);
  };

  Step.prototype.mlp = function (x) {
    var tape = this.tape, gate = this.linear("gate_proj", x), saved = [];
    var savedGate = gate[0].needs ? [tape.save(gate[0])] : [];
    var opened = tape.make(gate[0].size, "", gate[0].needs);
    tape.drop(gate[0]);
    var up = this.linear("up_proj", x);
    if (up[0].needs) { saved.push(tape.save(opened)); }
    if (opened.needs) { saved.push(tape.save(up[0])); }
    var product = tape.make(up[0].size, "", opened.needs || up[0].needs);
    tape.drop(opened, up[0]);
    var down = this.linear("down_proj", product);
    tape.drop(product);
    return [down[0], function (gradient) {
      var ofX = null, ofOpened, ofUp, ofGate;
      gradient = down[1](gradient, null);
      if (!product.needs) { return null; }
      ofOpened = opened.needs ? tape.make(up[0].size) : null;
      ofUp = up[0].needs ? tape.make(up[0].size) : null;
      tape.drop(gradient);
      tape.release(saved);
      if (ofUp) { ofX = up[1](ofUp, ofX); }
      if (ofOpened) {
        ofGate = tape.make(up[0].size);
        tape.drop(ofOpened);
        tape.release(savedGate);
        ofX = gate[1](ofGate, ofX);
      }
      return ofX;
    }];
  };

  Step.prototype.linear = function (name, x) {
    var out = this.linears[name][0], in_ = this.linears[name][1];
    var base = this.method.kind === "qlora" ? this.quantized : this.plain;
    if (this.full || this.method.targets.indexOf(name) < 0) { return base.call(this, x, out, in_); }
    return this.adapted(x, out, in_, base);
  };

  function nothing() { return { size: 0, kind: "weights", needs: false, holders: 1, saved: 0 }; }

  Step.prototype.plain = function (x, out, in_) {
    var full = this.full, tape = this.tape, n = this.tokens, width = this.width;
    var saved = full ? [tape.save(x)] : [];
    if (x.needs) { saved.push(tape.save(nothing())); }
    var y = tape.make(n * out * width, "", x.needs || full);
    return [y, function (gradient, ofX) {
      tape.load(saved);
      if (full) { tape.make(out * in_ * width, "gradients"); }
      if (x.needs) { ofX = tape.add(ofX, tape.make(n * in_ * width)); }
      tape.drop(gradient);
      tape.release(saved);
      return ofX;
    }];
  };

  Step.prototype.quantized = function (x, out, in_) {
    var self = this, tape = this.tape, n = this.tokens, compute = this.compute, width = this.width;
    var differs = compute !== width;
    var castX = this.cast(x, n * in_ * compute, differs, true), weight = this.dequantize(out * in_);
    var y = tape.make(n * out * compute);
    tape.drop(weight, castX);
    var saved = x.needs ? [tape.save(nothing())] : [];
    y = this.cast(y, n * out * width, differs, false);
    y.needs = x.needs;
    return [y, function (gradient, ofX) {
      gradient = self.cast(gradient, n * out * compute, differs, false);
      tape.load(saved);
      var dense = self.dequantize(out * in_), ofCastX = tape.make(n * in_ * compute);
      tape.drop(dense, gradient);
      tape.release(saved);
      return tape.add(ofX, self.cast(ofCastX, n * in_ * width, differs, false));
    }];
  };

  Step.prototype.cast = function (tensor, size, differs, keep) {
    if (!differs) { return keep ? this.tape.hold(tensor) : tensor; }
    var other = this.tape.make(size);
    if (!keep) { this.tape.drop(tensor); }
    return other;
  };

  Step.prototype.dequantize = function (count) {
    var tape = this.tape, method = this.method, dense = tape.make(count * this.compute);
    var blocks = 4 * ceil(count, method.block_size), absmax = null, a, b;
    if (method.group_size !== null) {
      a = tape.make(blocks); b = tape.make(blocks); absmax = tape.make(blocks);
      tape.drop(a, b);
    }
    var piece = Math.max(1, Math.floor(DATA.piece / (2 * method.block_size))) * 2 * method.block_size;
    tape.drop(tape.make(64 + (count <= piece ? 9 * count : 13 * piece)));
    if (absmax) { tape.drop(absmax); }
    return dense;
  };

  Step.prototype.adapted = function (x, out, in_, base) {
    var self = this, tape = this.tape, n = this.tokens, width = this.width, rank = this.method.rank;
    var own = this.method.own, wide = Math.max(own, width), made = base.call(this, x, out, in_);
    var castX = this.cast(x, n * in_ * own, own !== width, true), savedX = tape.save(castX);
    var unscaled = tape.make(n * rank * own);
    tape.drop(castX);
    var low = tape.make(n * rank * own);
    tape.drop(unscaled);
    var savedLow = tape.save(low), update = tape.make(n * out * own), total = tape.make(n * out * wide);
    tape.drop(update);
    total = this.cast(total, n * out * width, wide !== width, false);
    tape.drop(made[0], low);
    total.needs = true;
    return [total, function (gradient, ofX) {
      gradient = self.cast(gradient, n * out * wide, wide !== width, false);
      var ofY = x.needs ? self.cast(gradient, n * out * width, wide !== width, true) : null, ofCastX = null;
      gradient = self.cast(gradient, n * out * own, wide !== own, false);
      tape.load([savedLow, savedX]);
      tape.make(out * rank * own, "gradients");
      var ofLow = tape.make(n * rank * own);
      tape.drop(gradient);
      tape.release([savedLow]);
      var ofUnscaled = tape.make(n * rank * own);
      tape.drop(ofLow);
      tape.make(rank * in_ * own, "gradients");
      if (x.needs) { ofCastX = tape.make(n * in_ * own); }
      tape.drop(ofUnscaled);
      tape.release([savedX]);
      if (!x.needs) { return null; }
      ofX = tape.add(ofX, self.cast(ofCastX, n * in_ * width, own !== width, false));
      return made[1](ofY, ofX);
    }];
  };

  /* The fullest moment of each phase: an object of component and bytes for each. */
  function forecast(shape, method, batch, length, checkpointing, optimizer) {
    var tape = new Tape(staticMemory(shape, method, optimizer)), all = 0, last = 0, i, copies;
    new Step(tape, shape, method, batch, length, checkpointing).run();
    tape.mark();
    var sizes = trained(shape, method).map(function (tensor) { return tensor[1]; });
    sizes.forEach(function (size) { all += size; });
    tape.drop(tape.make(optimizer.all_copies * all));
    sizes.forEach(function (size) {
      if (!optimizer.own_copies) { return; }
      copies = [tape.make(last)];
      for (i = 0; i < optimizer.own_copies; i += 1) { copies.push(tape.make(size)); }
      copies.forEach(function (copy) { tape.drop(copy); });
      last = size;
    });
    tape.peaks.push(tape.fullest);
    return tape.peaks.map(function (peak) {
      var ledger = { total: 0 };
      COMPONENTS.forEach(function (name, at) { ledger[name] = peak[at]; ledger.total += peak[at]; });
      return ledger;
    });
  }

  /* --- the page ------------------------------------------------------------------------------ */

  var PARTS = [
    ["weights", "weights", "#8C8C8C"], ["constants", "quantization constants", "#5B5B5B"],
    ["adapters", "adapters", "#009E73"], ["gradients", "gradients", "#E69F00"],
    ["optimizer", "optimizer states", "#CC79A7"], ["activations", "activations", "#56B4E9"],
    ["logits", "logits", "#F0E442"], ["transient", "for a moment", "#D5D5D5"]
  ];
  var PHASES = ["in the forward pass", "in the backward pass", "while the optimizer steps"];

  function find(name) { return document.getElementById("fit-" + name); }
  function grouped(number) { return String(number).replace(/\B(?=(\d{3})+(\.|$))/g, ","); }
  function gigabytes(bytes) { return grouped((bytes / 1e9).toFixed(bytes < 99.5e9 ? 1 : 0)); }

  function fill(select, names, chosen) {
    names.forEach(function (name) {
      var option = document.createElement("option");
      option.textContent = option.value = name;
      option.selected = name === chosen;
      select.appendChild(option);
    });
  }

  function chosenMethod() {
    var method = JSON.parse(JSON.stringify(DATA.methods[find("method").value]));
    if (method.kind !== "full") {
      method.rank = Math.pow(2, Number(find("rank").value));
      method.own = Number(find("adapters").value);
      if (find("targets").value === "qv") { method.targets = ["q_proj", "v_proj"]; }
    }
    return method;
  }

  function show() {
    var method = chosenMethod(), batch = Number(find("batch").value);
    var length = Math.pow(2, Number(find("length").value)), card = Number(find("card").value) * Math.pow(2, 30);
    var phases = forecast(DATA.shapes[find("model").value], method, batch, length,
      find("checkpointing").checked, DATA.optimizers[find("optimizer").value]);
    var at = 0;
    phases.forEach(function (ledger, i) { if (ledger.total > phases[at].total) { at = i; } });
    find("length-value").textContent = grouped(length);
    find("batch-value").textContent = String(batch);
    find("rank-value").textContent = method.kind === "full" ? "–" : String(method.rank);
    ["rank", "targets", "adapters"].forEach(function (name) { find(name).disabled = method.kind === "full"; });
    draw(phases[at], card, PHASES[at]);
  }

  function draw(ledger, card, when) {
    var bar = find("bar"), rows = find("parts"), left = 0, full = Math.max(ledger.total, card) * 1.04;
    var room = card - ledger.total;
    find("answer").textContent = (room >= 0 ? "It fits, with " + gigabytes(room) + " GB to spare: "
      : "It does not fit, by " + gigabytes(-room) + " GB: ") + gigabytes(ledger.total) + " of " +
      gigabytes(card) + " GB, fullest " + when + ".";
    bar.textContent = "";
    rows.textContent = "";
    bar.setAttribute("aria-label", find("answer").textContent);
    PARTS.forEach(function (part) {
      var piece = document.createElement("div"), width = ledger[part[0]] / full * 100;
      piece.className = "fit-part";
      piece.style.left = left + "%";
      piece.style.width = width + "%";
      piece.style.background = part[2];
      piece.title = part[1];
      bar.appendChild(piece);
      left += width;
      rows.appendChild(row(part[1], ledger[part[0]], part[2]));
    });
    var line = document.createElement("div"), label = document.createElement("span");
    line.className = "fit-card";
    line.style.left = card / full * 100 + "%";
    label.textContent = "the card, " + gigabytes(card) + " GB";
    if (card / full < 0.3) { label.style.right = "auto"; label.style.left = "0.3rem"; }
    line.appendChild(label);
    bar.appendChild(line);
    var total = row("total", ledger.total, null);
    total.className = "fit-total";
    rows.appendChild(total);
  }

  function row(name, bytes, color) {
    var line = document.createElement("tr"), head = document.createElement("th");
    head.scope = "row";
    if (color) {
      var swatch = document.createElement("span");
      swatch.className = "fit-swatch";
      swatch.style.background = color;
      head.appendChild(swatch);
    }
    head.appendChild(document.createTextNode(name));
    line.appendChild(head);
    [grouped(bytes), grouped((bytes / 1e9).toFixed(2))].forEach(function (text) {
      var cell = document.createElement("td");
      cell.textContent = text;
      line.appendChild(cell);
    });
    return line;
  }

  function start() {
    if (!find("model")) { return; }
    fill(find("model"), Object.keys(DATA.shapes), "LLaMA-7B");
    fill(find("optimizer"), Object.keys(DATA.optimizers), "AdamW, as torch has it");
    document.querySelector("#fit form").addEventListener("input", show);
    show();
  }

  if (typeof document !== "undefined") {
    if (document.readyState === "loading") { document.addEventListener("DOMContentLoaded", start); } else { start(); }
  }

  return { forecast: forecast, parameters: parameters };
}());

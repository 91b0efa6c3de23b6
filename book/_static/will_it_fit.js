/* The ledger of lora2qlora.memory, operation by operation: this script says what the Python files say, in
   their order. tests/test_will_it_fit.py holds its sums to those of the Python ledger, to the byte. */
"use strict";

var WillItFit = (function () {
  var DATA = WILL_IT_FIT_DATA;
  var COMPONENTS = DATA.components;

  function ceil(a, b) { return Math.floor((a + b - 1) / b); }
  function sum(numbers) { return numbers.reduce(function (a, b) { return a + b; }, 0); }
  function repeat(times, list) {
    var all = [], n;
    for (n = 0; n < times; n += 1) { all = all.concat(list); }
    return all;
  }

  /* --- shapes ------------------------------------------------------------------------------- */

  function traits(shape) { return DATA.forms[shape.form]; }

  /* Numbers in q, and in k or v, of one token. */
  function widths(shape) { return [shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim]; }

  /* [out, in] of the linear layers of one block, by name, in the order in which they are used. */
  function linears(shape) {
    var q = widths(shape)[0], kv = widths(shape)[1], h = shape.hidden, i = shape.intermediate;
    if (traits(shape).fused) {
      return { qkv_proj: [q + 2 * kv, h], o_proj: [h, q], gate_up_proj: [2 * i, h], down_proj: [h, i] };
    }
    return { q_proj: [q, h], k_proj: [kv, h], v_proj: [kv, h], o_proj: [h, q],
             gate_proj: [i, h], up_proj: [i, h], down_proj: [h, i] };
  }

  /* The names of the linear layers in the order of model.parameters(). */
  function order(shape) {
    var names = Object.keys(linears(shape));
    return traits(shape).fused ? [names[1], names[0]].concat(names.slice(2)) : names;
  }

  function inLinears(shape) {
    var all = linears(shape);
    return sum(Object.keys(all).map(function (name) { return all[name][0] * all[name][1]; }));
  }

  /* Numbers in every tensor of one block, in the order of model.parameters(). */
  function blockTensors(shape) {
    var all = linears(shape), counts = [], form = traits(shape);
    order(shape).forEach(function (name) {
      counts.push(all[name][0] * all[name][1]);
      if (shape.biases.indexOf(name) >= 0) { counts.push(all[name][0]); }
      if (name !== "o_proj") { return; }
      if (form.head_norm === "head") { counts.push(shape.head_dim, shape.head_dim); }
      if (form.head_norm === "width") { counts = counts.concat(widths(shape)); }
    });
    return counts.concat(repeat(form.norms === "both" ? 4 : 2, [shape.hidden]));
  }

  /* How many sets of rotary angles there are. */
  function angleKinds(shape) {
    var far = traits(shape).far;
    return far !== null && shape.layers >= far ? 2 : 1;
  }

  function parameters(shape) {
    return shape.layers * sum(blockTensors(shape)) + shape.hidden +
      (shape.tied ? 1 : 2) * shape.vocabulary * shape.hidden;
  }

  /* --- what trains, and what is held between two steps ---------------------------------------- */

  /* Those of a model's linear layers that are adapted; all of them is all, whatever they are called. */
  function adaptedNames(shape, method) {
    var names = order(shape);
    if (method.kind === "full") { return []; }
    if (DATA.linears.every(function (name) { return method.targets.indexOf(name) >= 0; })) { return names; }
    method.targets.forEach(function (name) {
      if (names.indexOf(name) < 0) { throw new Error("The model has no layer " + name + "."); }
    });
    return names.filter(function (name) { return method.targets.indexOf(name) >= 0; });
  }

  /* [numbers, bytes] of every tensor that trains, in the order of model.parameters(). */
  function trained(shape, method) {
    var all = linears(shape), outer = [shape.vocabulary * shape.hidden], counts = [], width = method.own;
    if (method.kind === "full") {
      counts = outer.concat(repeat(shape.layers, blockTensors(shape)), [shape.hidden], shape.tied ? [] : outer);
      width = method.width;
    } else {
      adaptedNames(shape, method).forEach(function (name) {
        counts.push(method.rank * all[name][1], method.rank * all[name][0]);
      });
      counts = repeat(shape.layers, counts);
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

  /* Bytes beside the codes of a weight of so many numbers in NF4. */
  function nf4Constants(count, method) {
    var blocks = ceil(count, method.block_size);
    return method.group_size === null ? 4 * blocks : blocks + 4 * ceil(blocks, method.group_size) + 4;
  }

  function staticMemory(shape, method, optimizer) {
    var held = {}, all = linears(shape), shared = false;
    COMPONENTS.forEach(function (name) { held[name] = 0; });
    held.weights = (parameters(shape) - shape.layers * inLinears(shape)) * method.width;
    held.weights += angleKinds(shape) * 8 * Math.floor(shape.head_dim / 2);
    if (traits(shape).scaled === "embedding") { held.weights += method.width; }
    Object.keys(all).forEach(function (name) {
      var count = all[name][0] * all[name][1];
      if (method.kind !== "qlora") { held.weights += shape.layers * count * method.width; return; }
      held.weights += shape.layers * ceil(count, 2);
      held.constants += shape.layers * nf4Constants(count, method);
    });
    trained(shape, method).forEach(function (tensor) {
      if (method.kind !== "full") { held.adapters += tensor[1]; }
      held.optimizer += kept(optimizer, tensor[0], tensor[1]);
      shared = shared || tensor[0] >= optimizer.smallest;
    });
    if (shared) { held.optimizer += optimizer.shared_bytes; }
    return held;
  }

  /* --- a model divided among cards ------------------------------------------------------------- */

  /* A parameter as FSDP2 sees it: rows along its first dimension, numbers in a row, bytes of a number. */
  function parameter(rows, numbers, width, kind, trains) {
    return { rows: rows, numbers: numbers, width: width, kind: kind || "weights", trains: !!trains };
  }
  /* Numbers in the part that the first card holds. */
  function part(p, ranks) { return ceil(p.rows, ranks) * p.numbers; }
  function partBytes(p, ranks) { return part(p, ranks) * p.width; }
  function partsOf(list, ranks) { return sum(list.map(function (p) { return partBytes(p, ranks); })); }
  function training(list) { return list.filter(function (p) { return p.trains; }); }

  function blockParameters(shape, method) {
    var width = method.width, full = method.kind === "full", found = [], all = linears(shape);
    var chosen = adaptedNames(shape, method), vectors = blockTensors(shape);
    function without(count) { vectors.splice(vectors.indexOf(count), 1); }
    order(shape).forEach(function (name) {
      var out = all[name][0], in_ = all[name][1];
      without(out * in_);
      if (chosen.indexOf(name) >= 0) {
        found.push(parameter(method.rank, in_, method.own, "adapters", true));
        found.push(parameter(out, method.rank, method.own, "adapters", true));
      }
      if (method.kind !== "qlora") {
        found.push(parameter(out, in_, width, "weights", full));
      } else {
        found.push(parameter(ceil(out * in_, 2), 1, 1));
        if (method.group_size !== null) {
          found.push(parameter(ceil(out * in_, method.block_size), 1, 1, "constants"));
        }
      }
      if (shape.biases.indexOf(name) >= 0) {
        without(out);
        found.push(parameter(out, 1, width, "weights", full));
      }
    });
    return found.concat(vectors.map(function (count) { return parameter(count, 1, width, "weights", full); }));
  }

  function outerParameters(shape, method) {
    var full = method.kind === "full", norm = parameter(shape.hidden, 1, method.width, "weights", full);
    var table = parameter(shape.vocabulary, shape.hidden, method.width, "weights", full);
    return shape.tied ? [table, norm] : [table, norm, table];
  }

  function allParameters(shape, method) {
    var outer = outerParameters(shape, method);
    return outer.slice(0, 1).concat(repeat(shape.layers, blockParameters(shape, method)), outer.slice(1));
  }

  /* What the first card holds between two steps: parts of parameters and states, and buffers whole. */
  function dividedMemory(shape, method, optimizer, ranks) {
    var held = {}, all = linears(shape), shared = false;
    COMPONENTS.forEach(function (name) { held[name] = 0; });
    held.weights = angleKinds(shape) * 8 * Math.floor(shape.head_dim / 2);
    if (traits(shape).scaled === "embedding") { held.weights += method.width; }
    allParameters(shape, method).forEach(function (p) {
      held[p.kind] += partBytes(p, ranks);
      if (!p.trains) { return; }
      held.optimizer += kept(optimizer, part(p, ranks), partBytes(p, ranks));
      shared = shared || part(p, ranks) >= optimizer.smallest;
    });
    if (shared) { held.optimizer += optimizer.shared_bytes; }
    if (method.kind !== "qlora") { return held; }
    Object.keys(all).forEach(function (name) {
      var count = all[name][0] * all[name][1];
      var codes = method.group_size === null ? 0 : ceil(count, method.block_size);
      held.constants += shape.layers * (nf4Constants(count, method) - codes);
    });
    return held;
  }

  /* One card: nothing is gathered, nothing reduced. */
  function nothingToDo() {}
  var UNDIVIDED = { forward: nothingToDo, leave: nothingToDo, freeLate: nothingToDo, backward: nothingToDo,
                    reduce: nothingToDo, end: nothingToDo };

  /* What FSDP2 gathers, lets go and reduces in a step; group 0 is what lies outside of the blocks. */
  function Groups(tape, shape, method, ranks) {
    function group(list) {
      return { gathered: ranks * partsOf(list, ranks), reduced: partsOf(training(list), ranks), buffer: null,
               whole: null, gradients: [], done: false };
    }
    this.tape = tape; this.ranks = ranks; this.late = null; this.reducing = null;
    this.groups = [group(outerParameters(shape, method))];
    while (this.groups.length <= shape.layers) { this.groups.push(group(blockParameters(shape, method))); }
    this.current = this.groups[0];
    tape.made = [];
  }
  Groups.prototype.gather = function (group) {
    if (!group.whole && !group.buffer) { group.buffer = this.tape.make(group.gathered); }
  };
  Groups.prototype.copyOut = function (group) {
    if (!group.whole) { group.whole = this.tape.make(group.gathered); }
  };
  Groups.prototype.letGo = function (group) {
    if (group.whole) { this.tape.drop(group.whole); }
    group.whole = null;
  };
  Groups.prototype.forward = function (number) {
    var group = this.groups[number];
    this.gather(group);
    this.copyOut(group);
    this.freeLate();
    this.late = group.buffer;
    group.buffer = null;
  };
  Groups.prototype.leave = function (number) { this.letGo(this.groups[number]); };
  Groups.prototype.freeLate = function () {
    if (this.late) { this.tape.drop(this.late); }
    this.late = null;
  };
  Groups.prototype.turnTo = function (group) {
    this.current.gradients = this.current.gradients.concat(this.tape.made);
    this.tape.made = [];
    this.current = group;
  };
  Groups.prototype.backward = function (number) {
    var group = this.groups[number], following = number ? number - 1 : this.groups.length - 1;
    this.turnTo(group);
    this.gather(group);
    if (group.buffer) {
      this.copyOut(group);
      this.tape.drop(group.buffer);
      group.buffer = null;
    }
    if (following) { this.gather(this.groups[following]); }
  };
  Groups.prototype.reduce = function (number) {
    var group = this.groups[number], part;
    this.turnTo(this.groups[0]);
    this.letGo(group);
    group.done = true;
    this.freeReducing();
    if (!group.reduced) { return; }
    this.reducing = this.tape.make(this.ranks * group.reduced);
    this.tape.dropAll(group.gradients);
    part = this.tape.make(group.reduced, "gradients");
    if (this.tape.adds) { this.tape.drop(part); }  // to the part of the sequences before
  };
  Groups.prototype.freeReducing = function () {
    if (this.reducing) { this.tape.drop(this.reducing); }
    this.reducing = null;
  };
  Groups.prototype.end = function () {
    var self = this;
    this.groups.forEach(function (group, number) { if (!group.done) { self.reduce(number); } });
    this.freeReducing();
  };

  /* --- a tape of sizes ---------------------------------------------------------------------- */

  var EARLY_STOP = {};

  function Tape(held) {
    this.held = held; this.total = 0; this.peaks = []; this.curve = []; this.block = null; this.again = null;
    this.fullest = null; this.most = 0; this.accumulates = false; this.late = null; this.made = null;
    for (var i = 0; i < COMPONENTS.length; i += 1) { this.total += held[COMPONENTS[i]]; }
    this.mark();
  }
  Tape.prototype.snapshot = function () {
    var held = this.held;
    this.most = this.total;
    this.fullest = COMPONENTS.map(function (name) { return held[name]; });
  };
  Tape.prototype.mark = function () {
    this.curve.push(this.total);
    if (this.fullest) { this.peaks.push(this.fullest); }
    this.snapshot();
  };
  Tape.prototype.make = function (size, kind, needs) {
    kind = kind || "transient";
    this.held[kind] += size;
    this.total += size;
    this.curve.push(this.total);
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
  /* Two gradients of one tensor, added in place. */
  Tape.prototype.add = function (first, second) {
    if (first) { this.drop(first); }
    return second;
  };
  /* A tensor in a dtype in which it takes `size` bytes: itself, if it does already. */
  Tape.prototype.cast = function (tensor, size, kind, keep) {
    if (tensor.size === size) { return keep ? this.hold(tensor) : tensor; }
    var other = this.make(size, kind);
    if (!keep) { this.drop(tensor); }
    return other;
  };
  /* The gradient of a weight. Where gradients of sequences before are there, it is added to them and goes:
     for certain once the next one comes. */
  Tape.prototype.gradient = function (size, keep) {
    if (this.made) {  // a model divided among cards
      this.made.push(this.make(size, "gradients"));
      return this.made[this.made.length - 1];
    }
    if (!this.accumulates) { return this.make(size, "gradients"); }
    if (!size) { return null; }  // the bias that a layer lacks
    var made = this.make(size), before = this.late;
    this.late = keep ? null : made;
    if (before) { this.drop(before); }
    return made;
  };
  Tape.prototype.settle = function () {
    if (this.late) { this.drop(this.late); }
    this.late = null;
  };
  Tape.prototype.several = function (count, size) {
    var made = [];
    while (made.length < count) { made.push(this.make(size)); }
    return made;
  };
  Tape.prototype.dropAll = function (tensors) { this.drop.apply(this, tensors); };

  /* --- a training step ---------------------------------------------------------------------- */

  /* Everything forward gives [a tensor, its pullback]. A pullback takes over the gradient of the output and
     returns that of the input, or null. */
  function Step(tape, shape, method, batch, length, checkpointing, groups) {
    this.groups = groups;
    this.tape = tape; this.shape = shape; this.method = method; this.checkpointing = checkpointing;
    this.form = traits(shape); this.batch = batch; this.length = length; this.tokens = batch * length;
    this.full = method.kind === "full"; this.width = method.width; this.linears = linears(shape);
    this.adapted_names = adaptedNames(shape, method); this.compute = method.compute;
  }

  Step.prototype.run = function () {
    var tape = this.tape, shape = this.shape, groups = this.groups, pulls = [], l, made;
    tape.make(8 * this.tokens);
    groups.forward(0);
    var first = this.embedding(), x = first[0], positions = tape.make(8 * this.length);
    var angles = this.angles(), embedded = tape.hold(x);
    for (l = 1; l <= shape.layers; l += 1) {
      groups.forward(l);
      made = this.layer(x, !shape.unturned || l % shape.unturned > 0);
      groups.leave(l);
      pulls.push([made[1], x.needs]);
      tape.drop(x);
      x = made[0];
    }
    made = this.norm(x);
    tape.drop(x, embedded);
    if (!this.checkpointing) { tape.drop(positions); }
    var end = this.loss(made[0]), gradient = made[1](end.gradient);
    for (l = shape.layers; l > 0; l -= 1) {
      groups.backward(l);
      gradient = pulls[l - 1][0](gradient);
      if (pulls[l - 1][1]) { groups.reduce(l); }
      if (l === this.form.far) { tape.dropAll(angles.slice(2)); }
    }
    tape.dropAll(angles.slice(0, 2));
    if (this.checkpointing) { tape.drop(positions); }
    first[1](gradient, end.weight);
    groups.end();
    tape.dropAll(end.losses);
  };

  Step.prototype.angles = function () {
    var made = [], size = this.length * this.shape.head_dim * (this.form.wide_angles ? 4 : this.width);
    while (made.length < 2 * angleKinds(this.shape)) { made.push(this.tape.make(size, "activations")); }
    return made;
  };

  Step.prototype.layer = function (x, turns) {
    return this.checkpointing ? this.checkpointed(x, turns) : this.block(x, turns);
  };

  /* The first hidden states, in some families times a number. */
  Step.prototype.embedding = function () {
    var self = this, tape = this.tape, shape = this.shape, needs = this.full || this.checkpointing;
    var x = tape.make(this.tokens * shape.hidden * this.width, "", needs), scaled = null, leaf = null;
    if (this.form.scaled) {
      leaf = x;
      scaled = this.scale(x);
      x = scaled[0];
      if (this.full || !needs || this.form.scaled !== "all") { tape.drop(leaf); leaf = null; }
    }
    return [x, function (gradient, ofHead) {
      if (scaled && gradient) { gradient = scaled[1](gradient); }
      if (leaf) { tape.drop(leaf); }
      if (self.full) {
        self.gradient(shape.vocabulary * shape.hidden);
        if (shape.tied) { tape.drop(ofHead); }
      }
      if (gradient) { tape.drop(gradient); }
    }];
  };

  /* The gradient of so many weights of the base. */
  Step.prototype.gradient = function (count, keep) { return this.tape.gradient(count * this.width, keep); };

  /* LM head and cross-entropy in float32, forward and backward. */
  Step.prototype.loss = function (x) {
    var tape = this.tape, shape = this.shape, n = this.tokens, weight = null;
    var wide = n * shape.vocabulary * this.width, exact = n * shape.vocabulary * 4;
    var saved = this.full ? [tape.save(x)] : [];
    var logits = this.scaledLogits(tape.make(wide, "logits"));
    var asFloat = tape.cast(logits, exact, "logits", true);
    var padded = tape.make(8 * this.batch * (this.length + 1));
    var labels = this.batch > 1 ? tape.make(8 * n) : tape.hold(padded);
    var logSoftmax = tape.make(exact, "logits");
    var loss = tape.make(4), weights = tape.make(4);
    tape.drop(asFloat, padded, logits, x);
    this.groups.freeLate();
    tape.mark();
    var one = tape.make(4), ofLoss;
    this.groups.backward(0);
    ofLoss = tape.make(exact, "logits");
    tape.drop(labels, weights);
    var ofLogits = tape.make(exact, "logits");
    tape.drop(ofLoss, logSoftmax);
    ofLogits = this.scaledLogits(tape.cast(ofLogits, wide, "logits"));
    if (this.full) { weight = this.gradient(shape.vocabulary * shape.hidden, shape.tied); }
    var gradient = tape.make(n * shape.hidden * this.width);
    tape.drop(ofLogits);
    tape.release(saved);
    return { gradient: gradient, weight: weight, losses: [loss, one] };
  };

  /* Logits, or their gradient, times a number in some families. */
  Step.prototype.scaledLogits = function (logits) {
    if (this.form.scaled !== "all") { return logits; }
    var scaled = this.tape.make(logits.size, "logits");
    this.tape.drop(logits);
    return scaled;
  };

  Step.prototype.checkpointed = function (x, turns) {
    var self = this, tape = this.tape;
    tape.block = { forward: function () { self.block(x, turns); }, slots: [] };
    var made = this.block(x, turns);
    tape.block = null;
    var keptInput = tape.hold(x);
    if (keptInput.kind === "transient") { tape.move(keptInput, "activations"); }
    return [made[0], function (gradient) {
      gradient = made[1](gradient);
      tape.drop(keptInput);
      return gradient;
    }];
  };

  Step.prototype.block = function (x, turns) {
    var self = this;
    var first = this.branch(x, function (normed) { return self.attention(normed, turns); });
    var second = this.branch(first[0], function (normed) {
      return self.form.fused ? self.fusedMlp(normed) : self.mlp(normed);
    });
    this.tape.drop(first[0]);
    return [second[0], function (gradient) {
      gradient = second[1](gradient);
      return gradient ? first[1](gradient) : null;
    }];
  };

  /* x + norm(operate(norm(x))), with the norms that the family has, times a number in some. */
  Step.prototype.branch = function (x, operate) {
    var tape = this.tape, norm = this.norm.bind(this), steps = [operate], pulls = [], changed = tape.hold(x);
    if (this.form.norms !== "after") { steps.unshift(norm); }
    if (this.form.norms !== "before") { steps.push(norm); }
    if (this.form.scaled === "all") { steps.push(this.scale.bind(this)); }
    steps.forEach(function (step) {
      var before = changed, made = step(changed);
      changed = made[0];
      pulls.unshift(made[1]);
      tape.drop(before);
    });
    var y = tape.make(x.size, "", changed.needs || x.needs);
    tape.drop(changed);
    return [y, function (gradient) {
      var branch = tape.hold(gradient);
      pulls.forEach(function (pull) { branch = branch ? pull(branch) : null; });
      if (!x.needs) { tape.drop(gradient); return null; }
      return branch ? tape.add(gradient, branch) : gradient;
    }];
  };

  Step.prototype.norm = function (x) { return this.norms(x, this.tokens, this.shape.hidden); };

  /* x times a number. */
  Step.prototype.scale = function (x) {
    var tape = this.tape, size = x.size;
    return [tape.make(size, "", x.needs), function (gradient) {
      var ofX = tape.make(size);
      tape.drop(gradient);
      return ofX;
    }];
  };

  /* --- RMSNorm in the three ways in which models have it ---------------------------------------- */

  Step.prototype.norms = function (x, vectors, dim) {
    var self = this, tape = this.tape, short = 4 * vectors, exact = 4 * vectors * dim;
    var shiftedKind = this.form.norm === "shifted", castX = tape.cast(x, exact, "", true);
    var saved = x.needs ? [tape.save(castX)] : [];
    var square = tape.make(exact), mean = tape.make(short);
    tape.drop(square);
    var shifted = tape.make(short);
    if (shiftedKind) { tape.drop(mean); }
    var root = tape.make(short);
    if (x.needs) { saved.push(tape.save(root)); }
    tape.drop(shifted);
    if (x.needs) { saved.push(tape.save(castX)); saved.push(tape.save(root)); }
    var product = tape.make(exact);
    tape.drop(root, castX);
    var made = this.form.norm === "cast" ? this.castFirst(x, product, dim) : this.castLast(x, product, dim);
    if (!shiftedKind) { tape.drop(mean); }
    return [made[0], function (gradient) {
      gradient = made[1](gradient);
      return x.needs ? self.backThroughRoot(gradient, saved, vectors, dim) : null;
    }];
  };

  /* The product is cast back, then the weight multiplies it, as in a Llama. */
  Step.prototype.castFirst = function (x, product, dim) {
    var self = this, tape = this.tape, size = x.size, scaled = tape.cast(product, size, "", true);
    var saved = this.full ? [tape.save(scaled)] : [];
    var y = tape.make(size, "", x.needs || this.full);
    tape.drop(scaled, product);
    return [y, function (gradient) {
      var ofScaled = x.needs ? tape.make(size) : null, long;
      if (self.full) {
        tape.load(saved);
        long = tape.make(size);
        self.gradient(dim);
        tape.drop(long);
        tape.release(saved);
      }
      tape.drop(gradient);
      return ofScaled;
    }];
  };

  /* The weight multiplies in float32, in Gemma after 1 was added to it. */
  Step.prototype.castLast = function (x, product, dim) {
    var self = this, tape = this.tape, size = x.size, exact = product.size, weight = null, asFloat;
    var saved = this.full ? [tape.save(product)] : [];
    if (this.form.norm === "shifted") {
      asFloat = tape.make(this.width < 4 ? 4 * dim : 0);
      weight = tape.make(4 * dim);
      tape.drop(asFloat);
      if (x.needs) { saved.push(tape.save(weight)); }
    }
    var weighed = tape.make(exact);
    if (weight) { tape.drop(weight); }
    var y = tape.cast(weighed, size, "", true);
    y.needs = x.needs || this.full;
    tape.drop(weighed, product);
    return [y, function (gradient) {
      gradient = tape.cast(gradient, exact);
      tape.load(saved);
      var ofProduct = x.needs ? tape.make(exact) : null, long;
      if (self.full) {
        long = tape.make(exact);
        self.gradient(dim);
        tape.drop(long);
      }
      tape.drop(gradient);
      tape.release(saved);
      return ofProduct;
    }];
  };

  Step.prototype.backThroughRoot = function (gradient, saved, vectors, dim) {
    var tape = this.tape, short = 4 * vectors, exact = short * dim;
    tape.load(saved);
    gradient = tape.cast(gradient, exact);
    var ofX = tape.make(exact), long = tape.make(exact), ofRoot = tape.make(short);
    tape.drop(long, gradient);
    tape.release(saved.slice(2));
    var powers = tape.several(2, short), ofShifted = tape.make(short);
    tape.drop(ofRoot);
    tape.dropAll(powers);
    tape.release([saved[1]]);
    var ofSquare = tape.make(exact);
    tape.drop(ofShifted);
    var doubled = tape.several(2, exact), ofXToo = tape.make(exact);
    tape.drop(ofSquare);
    tape.dropAll(doubled);
    tape.release([saved[0]]);
    return tape.cast(tape.add(ofX, ofXToo), this.width * vectors * dim);
  };

  /* --- attention --------------------------------------------------------------------------------- */

  /* Everything between two norms; without `turns`, the layer has no rotary positions. */
  Step.prototype.attention = function (x, turns) {
    var self = this, tape = this.tape, fused = this.form.fused;
    var parts = fused ? this.together(x) : this.apart(x), q = parts.q, k = parts.k, v = parts.v;
    var whole = parts.held || v, turned = [q, k].map(function (t) {
      return turns ? self.turn(t.size, t.needs) : tape.hold(t);
    });
    if (!fused) { tape.drop(q, k); }
    var needs = q.needs || k.needs || v.needs, saved = [];
    if (needs) { saved = [turned[0], turned[1], whole].map(function (t) { return tape.save(t); }); }
    var mixed = tape.make(q.size, "", needs), logSums = tape.make(4 * this.tokens * this.shape.heads), byHead;
    if (needs) { saved.push(tape.save(mixed)); saved.push(tape.save(logSums)); }
    tape.drop(logSums);
    if (fused) { byHead = mixed; mixed = tape.make(q.size, "", needs); tape.drop(byHead); }
    var o = this.linear("o_proj", mixed);
    tape.drop(mixed, whole, turned[0], turned[1]);
    return [o[0], function (gradient) {
      gradient = o[1](gradient, null);
      if (!needs) { return null; }
      var ofQ = tape.make(q.size), ofK = tape.make(k.size), ofV = tape.make(v.size);
      tape.drop(gradient);
      tape.release(saved);
      if (turns) {
        ofK = self.turnBack(ofK, k.needs);
        ofQ = self.turnBack(ofQ, q.needs);
      }
      return parts.pull(ofQ, ofK, ofV, turns);
    }];
  };

  /* A projection each for q, k and v, the first two normed in some families. */
  Step.prototype.apart = function (x) {
    var self = this, tape = this.tape, late = this.form.norm === "shifted", made = {};
    ["q", "k", "v"].forEach(function (name) {
      made[name] = self.linear(name + "_proj", x);
      if (!late && name !== "v") { made[name] = self.normed(made[name]); }
    });
    if (late) { ["q", "k"].forEach(function (name) { made[name] = self.normed(made[name]); }); }
    function pull(ofQ, ofK, ofV, turns) {
      var ofX = null;
      if (made.v[0].needs) { ofX = made.v[1](ofV, null); } else { tape.drop(ofV); }
      [[made.k, ofK], [made.q, ofQ]].forEach(function (pair) {
        if (pair[0][0].needs) {
          ofX = pair[0][1](pair[1], ofX, turns);
        } else if (!turns) {
          tape.drop(pair[1]);
        }
      });
      return ofX;
    }
    return { q: made.q[0], k: made.k[0], v: made.v[0], held: null, pull: pull };
  };

  /* A projection, or its norm; a gradient that lies in memory head by head is copied. */
  Step.prototype.normed = function (made) {
    var tape = this.tape, kind = this.form.head_norm, dim = this.shape.head_dim, size = made[0].size;
    var y = made[0], pullNorm = null, width, vectors, after;
    if (kind) {
      width = size / this.tokens / this.width;
      vectors = this.tokens * (kind === "head" ? width / dim : 1);
      after = this.norms(y, vectors, kind === "head" ? dim : width);
      tape.drop(y);
      y = after[0];
      pullNorm = after[1];
    }
    return [y, function (gradient, ofX, turned) {
      var byHead;
      if (kind === "head") { gradient = pullNorm(gradient); }
      if (gradient && turned) { byHead = gradient; gradient = tape.make(size); tape.drop(byHead); }
      if (kind === "width") { gradient = pullNorm(gradient); }
      return gradient ? made[1](gradient, ofX) : ofX;
    }];
  };

  function like(size, needs) { return { size: size, kind: "transient", needs: needs, holders: 1, saved: 0 }; }

  /* One projection, of which q, k and v are parts; the gradient of each is as large as the whole. */
  Step.prototype.together = function (x) {
    var tape = this.tape, made = this.linear("qkv_proj", x), each = this.tokens * this.width;
    var q = widths(this.shape)[0] * each, kv = widths(this.shape)[1] * each, needs = made[0].needs;
    function pull(ofQ, ofK, ofV) {
      var total = null;
      [ofV, ofK, ofQ].forEach(function (part) {
        var one = tape.make(made[0].size);
        tape.drop(part);
        total = tape.add(total, one);
      });
      return made[1](total, null);
    }
    return { q: like(q, needs), k: like(kv, needs), v: like(kv, needs), held: made[0], pull: pull };
  };

  /* Bytes of as many numbers in the angles' dtype. */
  Step.prototype.exact = function (size) { return this.form.wide_angles ? size / this.width * 4 : size; };

  /* Rotary positions: x cos + (x turned by halves) sin. */
  Step.prototype.turn = function (size, needs) {
    var tape = this.tape, exact = this.exact(size), parts;
    var byCos = tape.make(exact), negated = tape.make(Math.floor(size / 2)), halves = tape.make(size);
    tape.drop(negated);
    var bySin = tape.make(exact);
    tape.drop(halves);
    var y = tape.make(exact, "", needs);
    tape.drop(byCos, bySin);
    if (this.form.fused) { parts = y; y = tape.make(size, "", needs); tape.drop(parts); }
    y = tape.cast(y, size);
    y.needs = needs;
    return y;
  };

  Step.prototype.turnBack = function (gradient, needs) {
    var tape = this.tape, size = gradient.size, exact = this.exact(size);
    if (!needs) { tape.drop(gradient); return null; }
    gradient = tape.cast(gradient, exact);
    var bySin = tape.cast(tape.make(exact), size);
    var negated = tape.make(Math.floor(size / 2)), first = tape.make(size);
    tape.drop(negated);
    var second = tape.make(size);
    tape.drop(bySin);
    var both = tape.add(first, second), byCos = tape.cast(tape.make(exact), size);
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

  /* The same with gate and up in one projection, of which both are parts that keep it whole. */
  Step.prototype.fusedMlp = function (x) {
    var tape = this.tape, made = this.linear("gate_up_proj", x), both = made[0], needs = both.needs;
    var size = both.size / 2, saved = needs ? [tape.save(both)] : [], opened = tape.make(size, "", needs);
    if (needs) { saved.push(tape.save(both)); saved.push(tape.save(opened)); }
    var product = tape.make(size, "", needs);
    tape.drop(opened);
    var down = this.linear("down_proj", product);
    tape.drop(product, both);
    return [down[0], function (gradient) {
      gradient = down[1](gradient, null);
      if (!needs) { return null; }
      var ofUp = tape.make(size), ofOpened = tape.make(size);
      tape.drop(gradient);
      tape.release(saved.slice(1));
      var ofGate = tape.make(size);
      tape.drop(ofOpened);
      tape.release([saved[0]]);
      var ofBoth = tape.make(2 * size);
      tape.drop(ofUp, ofGate);
      return made[1](ofBoth, null);
    }];
  };

  /* --- the linear layers of a block ---------------------------------------------------------------- */

  Step.prototype.linear = function (name, x) {
    var out = this.linears[name][0], in_ = this.linears[name][1];
    var base = this.method.kind === "qlora" ? this.quantized : this.plain;
    if (this.adapted_names.indexOf(name) >= 0) { return this.adapted(x, out, in_, base); }
    return base.call(this, x, out, in_, this.shape.biases.indexOf(name) >= 0);
  };

  function nothing() { return { size: 0, kind: "weights", needs: false, holders: 1, saved: 0 }; }

  Step.prototype.plain = function (x, out, in_, biased) {
    var self = this, full = this.full, tape = this.tape, n = this.tokens, width = this.width;
    var saved = full ? [tape.save(x)] : [];
    if (x.needs) { saved.push(tape.save(nothing())); }
    var y = tape.make(n * out * width, "", x.needs || full);
    return [y, function (gradient, ofX) {
      tape.load(saved);
      if (full) { self.gradient(out * in_); self.gradient(biased ? out : 0); }
      if (x.needs) { ofX = tape.add(ofX, tape.make(n * in_ * width)); }
      tape.drop(gradient);
      tape.release(saved);
      return ofX;
    }];
  };

  Step.prototype.quantized = function (x, out, in_) {
    var self = this, tape = this.tape, n = this.tokens, compute = this.compute, width = this.width;
    var castX = tape.cast(x, n * in_ * compute, "", true), weight = this.dequantize(out * in_);
    var y = tape.make(n * out * compute);
    tape.drop(weight, castX);
    var saved = x.needs ? [tape.save(nothing())] : [];
    y = tape.cast(y, n * out * width);
    y.needs = x.needs;
    return [y, function (gradient, ofX) {
      gradient = tape.cast(gradient, n * out * compute);
      tape.load(saved);
      var dense = self.dequantize(out * in_), ofCastX = tape.make(n * in_ * compute);
      tape.drop(dense, gradient);
      tape.release(saved);
      return tape.add(ofX, tape.cast(ofCastX, n * in_ * width));
    }];
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
    var tape = this.tape, n = this.tokens, width = this.width, rank = this.method.rank, own = this.method.own;
    var wide = Math.max(own, width), made = base.call(this, x, out, in_);
    var castX = tape.cast(x, n * in_ * own, "", true), savedX = tape.save(castX);
    var unscaled = tape.make(n * rank * own);
    tape.drop(castX);
    var low = tape.make(n * rank * own);
    tape.drop(unscaled);
    var savedLow = tape.save(low), update = tape.make(n * out * own), total = tape.make(n * out * wide);
    tape.drop(update);
    total = tape.cast(total, n * out * width);
    tape.drop(made[0], low);
    total.needs = true;
    return [total, function (gradient, ofX) {
      gradient = tape.cast(gradient, n * out * wide);
      var ofY = x.needs ? tape.cast(gradient, n * out * width, "", true) : null, ofCastX = null;
      gradient = tape.cast(gradient, n * out * own);
      tape.load([savedLow, savedX]);
      tape.gradient(out * rank * own);
      var ofLow = tape.make(n * rank * own);
      tape.drop(gradient);
      tape.release([savedLow]);
      var ofUnscaled = tape.make(n * rank * own);
      tape.drop(ofLow);
      tape.gradient(rank * in_ * own);
      if (x.needs) { ofCastX = tape.make(n * in_ * own); }
      tape.drop(ofUnscaled);
      tape.release([savedX]);
      if (!x.needs) { return null; }
      ofX = tape.add(ofX, tape.cast(ofCastX, n * in_ * width));
      return made[1](ofY, ofX);
    }];
  };

  /* --- a whole step --------------------------------------------------------------------------------- */

  /* The optimizer's turn: what it needs for all parameters at once, or for one after the other. */
  function update(tape, sizes, optimizer) {
    var last = 0;
    tape.mark();
    tape.drop(tape.make(optimizer.all_copies * sum(sizes)));
    if (!optimizer.own_copies) { return; }
    sizes.forEach(function (size) {
      var before = tape.make(last);
      tape.dropAll([before].concat(tape.several(optimizer.own_copies, size)));
      last = size;
    });
  }

  /* The whole step: bytes held after every allocation, and the fullest moment of each phase. With `accumulates`
     it is the last of several passes, and finds the gradients of those before it. `ranks` are cards, each with
     such a batch, among which FSDP2 divides the model. */
  function rehearse(shape, method, batch, length, checkpointing, optimizer, accumulates, ranks) {
    if (shape.window && shape.window <= length) {
      throw new Error("Attention in this model slides a window of " + shape.window + " tokens, which takes a " +
        "mask from that length on. The page does not count the mask: simulate_step of the package does.");
    }
    var divided = ranks > 1, sizes, held, tape, groups = UNDIVIDED;
    sizes = divided ? training(allParameters(shape, method)).map(function (p) { return partBytes(p, ranks); })
      : trained(shape, method).map(function (tensor) { return tensor[1]; });
    held = divided ? dividedMemory(shape, method, optimizer, ranks) : staticMemory(shape, method, optimizer);
    if (accumulates) { held.gradients = sum(sizes); }
    tape = new Tape(held);
    tape.accumulates = Boolean(accumulates) && !divided;
    tape.adds = Boolean(accumulates);
    if (divided) { groups = new Groups(tape, shape, method, ranks); }
    new Step(tape, shape, method, batch, length, checkpointing, groups).run();
    tape.settle();
    update(tape, sizes, optimizer);
    tape.peaks.push(tape.fullest);
    return { curve: tape.curve, peaks: tape.peaks };
  }

  /* The fullest moment of each phase of that step: an object of component and bytes for each. */
  function forecast() {
    return rehearse.apply(null, arguments).peaks.map(function (peak) {
      var ledger = { total: sum(peak) };
      COMPONENTS.forEach(function (name, at) { ledger[name] = peak[at]; });
      return ledger;
    });
  }

  return { rehearse: rehearse, forecast: forecast, parameters: parameters, linears: linears };
}());

/* The page "What should I do?": from a model, cards, rows and a way to deploy to one answer for each output, by
   the rules of decision_rules.js, the figures of decision_figures.js and the ledger of will_it_fit.js. */
"use strict";

var Decision = (function () {
  var PAGE = WillItFit.page, KINDS = DECISION_RULES.kinds, METHODS = ["full", "lora", "qlora"];
  var OUTPUTS = Object.assign({}, DECISION_RULES.outputs, DECISION_RULES_AFTER.outputs);
  var FIGURES = DECISION_FIGURES.figures, LINKS = DECISION_FIGURES.links;
  var FREE = 0.1;  // the share of a card that stays free, as in chapter 13
  var SIZES = [["small", 1e9], ["middle", 6e9], ["seven", 20e9], ["large", Infinity]];  // parameters below
  var MOST_ROWS = 1e9;

  function start() {
    return { model: "Llama-3.1-8B", card: 24, cards: 1, chip: "bf16", rows: 1000, length: 512, task: "classify",
      deploy: "apart", aim: "cost", keep: "no" };
  }

  /* --- rules ------------------------------------------------------------------------------------------ */

  /* Every rule of an output whose conditions these kinds meet; the test sees to it that there is exactly one. */
  function matching(output, kinds) {
    return OUTPUTS[output].rules.filter(function (rule) {
      return Object.keys(rule["if"]).every(function (kind) { return rule["if"][kind].indexOf(kinds[kind]) >= 0; });
    });
  }

  function first(output, kinds) { return matching(output, kinds)[0]; }

  function fill(text, live) {
    return text.replace(/\{(\w+)\}/g, function (_, name) { return name in live ? live[name] : FIGURES[name].text; });
  }

  /* --- what a question amounts to --------------------------------------------------------------------- */

  function sizeOf(shape) {
    var count = WillItFit.parameters(shape);
    return SIZES.filter(function (size) { return count < size[1]; })[0][0];
  }

  function rowsKind(rows) {
    var seen = FIGURES.few_rows.value;
    return rows < seen ? "few" : rows <= 10 * seen ? "like" : "many";
  }

  /* The setting of "Will it fit?" for a method in a place, on cards of which a tenth stays free. */
  function settingOf(question, method, place) {
    return { model: question.model, method: method, card: question.card * (1 - FREE),
      cards: place === "one" ? 1 : question.cards, optimizer: first("optimizer", { method: method, place: place }).set,
      length: question.length, batch: 1, rank: FIGURES.rank.value, targets: "all", adapters: 4, outside: 4,
      checkpointing: true, wide: first("dtype", { method: method, chip: question.chip }).set === "wide" };
  }

  function bytesOf(question, shape, method, place) {
    return PAGE.measure(settingOf(question, method, place), shape).ledger.total;
  }

  function room(question) { return PAGE.cardBytes({ card: question.card * (1 - FREE) }); }

  /* Bytes of a method on one card, and on each of several, and where it fits. */
  function fitOf(question, shape, method) {
    var most = room(question), alone = bytesOf(question, shape, method, "one"), each = null, place = "no";
    if (question.cards > 1) { each = bytesOf(question, shape, method, "divided"); }
    if (each !== null && each <= most) { place = "divided"; }
    if (alone <= most) { place = "one"; }
    return { alone: alone, each: each, place: place };
  }

  /* The kinds that the rules ask for; train and method are what their own rules set. */
  function kindsOf(question, shape, fits) {
    var kinds = { size: sizeOf(shape), rows: rowsKind(question.rows), several: question.cards > 1 ? "yes" : "no" };
    ["task", "deploy", "chip", "aim", "keep"].forEach(function (kind) { kinds[kind] = question[kind]; });
    METHODS.forEach(function (method) { kinds[method] = fits[method].place; });
    kinds.train = first("train", kinds).set;
    kinds.method = first("method", kinds).set;
    kinds.place = kinds[kinds.method];
    return kinds;
  }

  /* --- the numbers of this question --------------------------------------------------------------------- */

  /* The bytes of all adapters and their states, which nothing divides when they are saved. */
  function saved(question, shape, method) {
    var setting = settingOf(question, method, "one"), less, more = PAGE.measure(setting, shape).ledger;
    less = PAGE.measure(PAGE.changed(setting, { optimizer: "AdamW, 8-bit states" }), shape).ledger;
    return { adapters: more.adapters, total: more.total - less.total };
  }

  function cureOf(rungs) {
    var found = rungs.filter(function (rung) { return rung.first; })[0];
    return found ? "It would, with the changes below down to: " + found.words + "."
      : "Nor would it with all the changes below.";
  }

  function liveOf(question, shape, kinds, total, rungs) {
    var adapter = saved(question, shape, kinds.method === "full" ? "lora" : kinds.method);
    return { gb: PAGE.gigabytes(total), room: PAGE.gigabytes(room(question)), cards: String(question.cards),
      cure: rungs.length ? cureOf(rungs) : "", saved: (adapter.total / 1e9).toFixed(2),
      steps: PAGE.grouped(Math.ceil(question.rows / FIGURES.step_rows.value)),
      adapter_mb: PAGE.grouped((adapter.adapters / 1e6).toFixed(adapter.adapters < 99.5e6 ? 1 : 0)),
      model_gb: PAGE.gigabytes(2 * WillItFit.parameters(shape)) };
  }

  /* --- the answer ----------------------------------------------------------------------------------------- */

  /* What to do: the kinds, where each method fits, the bytes, the changes that would help, one answer an output. */
  function decide(question, shape) {
    var fits = {}, kinds, setting, ledger, rungs, live;
    METHODS.forEach(function (method) { fits[method] = fitOf(question, shape, method); });
    kinds = kindsOf(question, shape, fits);
    setting = settingOf(question, kinds.method, kinds.place);
    ledger = PAGE.measure(setting, shape).ledger;
    rungs = kinds.place === "no" ? PAGE.ladder(setting, shape) : [];
    live = liveOf(question, shape, kinds, ledger.total, rungs);
    return { kinds: kinds, fits: fits, setting: setting, ledger: ledger, ladder: rungs,
      answers: Object.keys(OUTPUTS).map(function (output) {
        var rule = first(output, kinds);
        return { output: output, title: OUTPUTS[output].title, say: fill(rule.say, live), why: fill(rule.why, live),
          open: rule.open ? fill(rule.open, live) : "", see: rule.see, link: LINKS[rule.see] };
      }) };
  }

  /* --- the address ---------------------------------------------------------------------------------------- */

  function kindIn(kind) { return PAGE.among(Object.keys(KINDS[kind])); }

  function rowsIn(text) {
    return /^[1-9]\d{0,9}$/.test(text) && Number(text) <= MOST_ROWS ? Number(text) : undefined;
  }

  var READERS = { model: PAGE.named(WILL_IT_FIT_DATA.shapes), card: PAGE.among(PAGE.cards),
    cards: PAGE.among(PAGE.counts), chip: kindIn("chip"), rows: rowsIn, length: PAGE.among(PAGE.powers(6, 15)),
    task: kindIn("task"), deploy: kindIn("deploy"), aim: kindIn("aim"), keep: kindIn("keep") };

  function readAddress(hash, question) { return PAGE.readAddress(hash, question, READERS); }
  function writeAddress(question) { return PAGE.writeAddress(question, READERS); }

  return { start: start, kinds: KINDS, outputs: OUTPUTS, matching: matching, decide: decide, readers: READERS,
           rowsIn: rowsIn, readAddress: readAddress, writeAddress: writeAddress };
}());

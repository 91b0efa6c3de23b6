/* The page "Will it fit?" around the ledger of will_it_fit.js: the setting, what to change where it does not
   fit, the address, and the drawing. Only the last part touches the page. What a reader gives is only ever set
   as text. */
"use strict";

WillItFit.page = (function () {
  var DATA = WILL_IT_FIT_DATA;
  var CARDS = [8, 12, 16, 24, 32, 40, 48, 80, 141];
  var COUNTS = [1, 2, 4, 8, 16];  // cards
  var OWN = "own";  // the model of a pasted config.json, which has no name
  var EIGHT_BIT = "AdamW, 8-bit states";

  function has(object, key) { return Object.prototype.hasOwnProperty.call(object, key); }
  function grouped(number) { return String(number).replace(/\B(?=(\d{3})+(\.|$))/g, ","); }
  function gigabytes(bytes) { return grouped((bytes / 1e9).toFixed(bytes < 99.5e9 ? 1 : 0)); }
  /* A card sold with 16 GB has 16 * 2^30 bytes. */
  function cardBytes(setting) { return setting.card * Math.pow(2, 30); }
  function changed(setting, changes) { return Object.assign({}, setting, changes); }

  /* --- a setting, and its bytes ---------------------------------------------------------------------- */

  function start() {
    return { model: "LLaMA-7B", method: "qlora", card: 24, cards: 1, optimizer: "AdamW, as torch has it", length: 512,
      batch: 1, rank: 16, targets: "all", adapters: 4, outside: 4, checkpointing: true };
  }

  function isFused(shape) { return DATA.forms[shape.form].fused; }

  /* A `wide` setting, which the page "What should I do?" has, holds and computes in 32 bits. */
  function methodOf(setting, shape) {
    var method = JSON.parse(JSON.stringify(DATA.methods[setting.method]));
    if (setting.wide) { method.width = 4; }
    if (setting.wide && method.kind === "qlora") { method.compute = 4; }
    if (method.kind === "full") { return method; }
    method.rank = setting.rank;
    method.own = setting.adapters;
    if (setting.targets === "qv") { method.targets = isFused(shape) ? ["qkv_proj"] : ["q_proj", "v_proj"]; }
    if (method.kind === "qlora") { method.width = setting.outside; }
    return method;
  }

  /* The fullest moment, and in which phase it is. */
  function measure(setting, shape) {
    var phases = WillItFit.forecast(shape, methodOf(setting, shape), setting.batch, setting.length,
      setting.checkpointing, DATA.optimizers[setting.optimizer], setting.accumulates, setting.cards);
    var at = 0;
    phases.forEach(function (ledger, i) { if (ledger.total > phases[at].total) { at = i; } });
    return { ledger: phases[at], phase: at };
  }

  /* --- what to change where it does not fit ------------------------------------------------------------- */

  /* Each rung: its words, and the setting that it makes of one; null where it is so already. */
  var RUNGS = [
    function (s) {
      return s.batch > 1 && ["1 sequence at a time, the gradients of " + s.batch + " added up (accumulation)",
        changed(s, { batch: 1, accumulates: true })];
    },
    function (s) { return !s.checkpointing && ["activation checkpointing", changed(s, { checkpointing: true })]; },
    function (s) {
      return /^AdamW/.test(s.optimizer) && s.optimizer !== EIGHT_BIT &&
        ["optimizer states in 8 bits", changed(s, { optimizer: EIGHT_BIT })];
    },
    function (s) {
      return s.length > 1 && ["half the length, " + grouped(s.length / 2) + " tokens", changed(s, { length: s.length / 2 })];
    },
    function (s, shape) {
      return s.method !== "full" && s.targets !== "qv" && ["adapters on " + attentionOnly(shape),
        changed(s, { targets: "qv" })];
    },
    function (s) {
      return s.method !== "full" && s.rank > 1 && ["half the rank, " + s.rank / 2, changed(s, { rank: s.rank / 2 })];
    }
  ];

  function attentionOnly(shape) { return isFused(shape) ? "the joined q, k and v alone" : "q and v alone"; }

  /* The bytes of a model by name, or null where the ledger refuses it at this length. */
  function totalOf(setting, name) {
    try { return measure(setting, DATA.shapes[name]).ledger.total; } catch (error) { return null; }
  }

  /* The largest of the smaller models that fits, of the same name if one does; else the smallest of them. */
  function smallerModel(setting, shape) {
    var most = WillItFit.parameters(shape), stem = setting.model.split("-")[0], room = cardBytes(setting);
    var names = Object.keys(DATA.shapes).filter(function (name) {
      return WillItFit.parameters(DATA.shapes[name]) < most && totalOf(setting, name) !== null;
    });
    names.sort(function (a, b) { return WillItFit.parameters(DATA.shapes[b]) - WillItFit.parameters(DATA.shapes[a]); });
    var fitting = names.filter(function (name) { return totalOf(setting, name) <= room; });
    var related = fitting.filter(function (name) { return name.split("-")[0] === stem; });
    return related[0] || fitting[0] || names[names.length - 1] || null;
  }

  /* What to change, in order, each change on top of those before: its words, its bytes, whether it fits, and
     whether it is the first that does. */
  function ladder(setting, shape) {
    var rungs = [], room = cardBytes(setting), reached = false;
    function add(words, total) {
      rungs.push({ words: words, total: total, fits: total <= room, first: !reached && total <= room });
      reached = reached || total <= room;
    }
    RUNGS.forEach(function (rung) {
      var change = rung(setting, shape);
      if (!change) { return; }
      setting = change[1];
      add(change[0], measure(setting, shape).ledger.total);
    });
    var name = smallerModel(setting, shape);
    if (name) { add("a smaller model, " + name, totalOf(setting, name)); }
    return rungs;
  }

  /* --- the setting in the address ------------------------------------------------------------------------ */

  function among(values) {
    return function (text) { return values.filter(function (value) { return String(value) === text; })[0]; };
  }
  function named(object) { return function (text) { return has(object, text) ? text : undefined; }; }
  function powers(first, last) {
    var all = [], n;
    for (n = first; n <= last; n += 1) { all.push(Math.pow(2, n)); }
    return all;
  }
  function upTo(last) {
    var all = [], n;
    for (n = 1; n <= last; n += 1) { all.push(n); }
    return all;
  }
  var READ = {
    model: named(DATA.shapes), method: named(DATA.methods), card: among(CARDS), cards: among(COUNTS), optimizer: named(DATA.optimizers),
    length: among(powers(6, 15)), batch: among(upTo(32)), rank: among(powers(0, 8)), targets: among(["all", "qv"]),
    adapters: among([4, 2]), outside: among([4, 2]),
    checkpointing: function (text) { return text === "1" ? true : text === "0" ? false : undefined; }
  };

  /* A setting with what an address says of it; what makes no sense there is left as it was. `readers` has a
     function for each key: of a text to a value, or to undefined. */
  function readAddress(hash, setting, readers) {
    var changes = {}, read = readers || READ;
    hash.replace(/^#/, "").split("&").forEach(function (pair) {
      var at = pair.indexOf("="), key = pair.slice(0, at), value;
      if (at < 1 || !has(read, key)) { return; }
      try { value = read[key](decodeURIComponent(pair.slice(at + 1))); } catch (error) { return; }
      if (value !== undefined) { changes[key] = value; }
    });
    return changed(setting, changes);
  }

  /* The address of a setting, without a model that has no name. */
  function writeAddress(setting, readers) {
    return "#" + Object.keys(readers || READ).filter(function (key) {
      return key !== "model" || setting.model !== OWN;
    }).map(function (key) {
      var value = setting[key];
      return key + "=" + encodeURIComponent(typeof value === "boolean" ? Number(value) : value);
    }).join("&");
  }

  /* --- the page ------------------------------------------------------------------------------------------ */

  var PARTS = [
    ["weights", "weights", "#8C8C8C"], ["constants", "quantization constants", "#5B5B5B"],
    ["adapters", "adapters", "#009E73"], ["gradients", "gradients", "#E69F00"],
    ["optimizer", "optimizer states", "#CC79A7"], ["activations", "activations", "#56B4E9"],
    ["logits", "logits", "#F0E442"], ["transient", "for a moment", "#D5D5D5"]
  ];
  var PHASES = ["in the forward pass", "in the backward pass", "while the optimizer steps"];

  var own = null;  // the shape of a pasted config.json

  function find(name) { return document.getElementById("fit-" + name); }
  function element(tag, text) {
    var made = document.createElement(tag);
    made.textContent = text;
    return made;
  }

  function fill(select, pairs) {
    pairs.forEach(function (pair) {
      var option = element("option", pair[1]);
      option.value = pair[0];
      select.appendChild(option);
    });
  }
  function twice(name) { return [name, name]; }

  function shapeNow(setting) { return setting.model === OWN ? own : DATA.shapes[setting.model]; }

  function fromForm() {
    return { model: find("model").value, method: find("method").value, card: Number(find("card").value),
      cards: Number(find("cards").value), optimizer: find("optimizer").value, length: Math.pow(2, Number(find("length").value)),
      batch: Number(find("batch").value), rank: Math.pow(2, Number(find("rank").value)),
      targets: find("targets").value, adapters: Number(find("adapters").value),
      outside: Number(find("outside").value), checkpointing: find("checkpointing").checked };
  }

  function toForm(setting) {
    ["model", "method", "card", "cards", "optimizer", "batch", "targets", "adapters", "outside"].forEach(function (name) {
      find(name).value = setting[name];
    });
    find("length").value = Math.log2(setting.length);
    find("rank").value = Math.log2(setting.rank);
    find("checkpointing").checked = setting.checkpointing;
  }

  function show() {
    var setting = fromForm(), shape = shapeNow(setting), full = setting.method === "full", found;
    find("length-value").textContent = grouped(setting.length);
    find("batch-value").textContent = String(setting.batch);
    find("rank-value").textContent = full ? "–" : String(setting.rank);
    ["rank", "targets", "adapters"].forEach(function (name) { find(name).disabled = full; });
    find("outside").disabled = setting.method !== "qlora";
    find("targets").options[1].textContent = attentionOnly(shape);
    try { found = measure(setting, shape); } catch (error) { showRefusal(error.message); return; }
    find("result").hidden = false;
    draw(found.ledger, cardBytes(setting));
    showAnswer(found, setting, shape);
  }

  function showRefusal(reason) {
    find("answer").textContent = reason;
    find("result").hidden = true;
    find("ladder").hidden = true;
  }

  function showAnswer(found, setting, shape) {
    var total = found.ledger.total, card = cardBytes(setting), room = card - total, rungs, first, words;
    words = (setting.cards > 1 ? "On each of the " + setting.cards + " cards: " : "");
    words += (room >= 0 ? "It fits, with " + gigabytes(room) + " GB to spare: "
      : "It does not fit, by " + gigabytes(-room) + " GB: ") + gigabytes(total) + " of " + gigabytes(card) +
      " GB, fullest " + PHASES[found.phase] + ".";
    find("bar").setAttribute("aria-label", words);
    find("ladder").hidden = room >= 0;
    if (room < 0) {
      rungs = ladder(setting, shape);
      first = rungs.filter(function (rung) { return rung.first; })[0];
      words += first ? " It would, with the changes below down to: " + first.words + "."
        : " Nor would it with all the changes below.";
      drawLadder(rungs);
    }
    find("answer").textContent = words;
  }

  function drawLadder(rungs) {
    var rows = find("rungs");
    rows.textContent = "";
    rungs.forEach(function (rung) {
      var line = element("tr", ""), head = element("th", rung.words);
      head.scope = "row";
      line.appendChild(head);
      line.appendChild(element("td", grouped(rung.total)));
      line.appendChild(element("td", gigabytes(rung.total)));
      line.appendChild(element("td", rung.first ? "fits from here on" : rung.fits ? "fits" : "no"));
      if (rung.first) { line.className = "fit-first"; }
      rows.appendChild(line);
    });
  }

  function draw(ledger, card) {
    var bar = find("bar"), rows = find("parts"), left = 0, full = Math.max(ledger.total, card) * 1.04;
    bar.textContent = "";
    rows.textContent = "";
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
    bar.appendChild(cardLine(card, full));
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

  /* The card's mark on the bar. */
  function cardLine(card, full) {
    var line = document.createElement("div"), label = document.createElement("span");
    line.className = "fit-card";
    line.style.left = card / full * 100 + "%";
    label.textContent = "the card, " + gigabytes(card) + " GB";
    if (card / full < 0.3) { label.style.right = "auto"; label.style.left = "0.3rem"; }
    line.appendChild(label);
    return line;
  }

  /* A pasted config.json becomes a model of the list; what is no such file, or not known, is told why. */
  function readConfig() {
    var text = find("config").value, said = find("config-said"), option, shape;
    if (!text.trim()) { said.textContent = ""; return; }
    try { shape = WillItFit.config.read(text); } catch (error) { said.textContent = error.message; return; }
    own = shape;
    option = find("model").querySelector('option[value="' + OWN + '"]');
    if (!option) { fill(find("model"), [[OWN, ""]]); option = find("model").lastChild; }
    option.textContent = "yours: " + WillItFit.config.familyOf(text) + ", " +
      (WillItFit.parameters(own) / 1e9).toFixed(2) + "B parameters";
    find("model").value = OWN;
    said.textContent = "Read: " + option.textContent.slice(7) + ".";
    changedByHand();
  }

  function readFile(file) {
    if (file.size > 1e6) { find("config-said").textContent = "This file is too large for a config.json."; return; }
    file.text().then(function (text) { find("config").value = text; readConfig(); });
  }

  function drop(event) {
    event.preventDefault();
    if (event.dataTransfer.files.length) { readFile(event.dataTransfer.files[0]); return; }
    find("config").value = event.dataTransfer.getData("text/plain");
    readConfig();
  }

  function changedByHand() {
    show();
    history.replaceState(null, "", writeAddress(fromForm()));
  }

  function fromAddress() {
    toForm(readAddress(location.hash, fromForm()));
    show();
  }

  function begin() {
    if (!find("model")) { return; }
    fill(find("model"), Object.keys(DATA.shapes).map(twice));
    fill(find("optimizer"), Object.keys(DATA.optimizers).map(twice));
    fill(find("cards"), COUNTS.map(function (count) {
      return [count, count === 1 ? "one" : count + ", the model divided among them"];
    }));
    fill(find("card"), CARDS.map(function (size) { return [size, size + " GB"]; }));
    toForm(start());
    fromAddress();
    document.querySelector("#fit form").addEventListener("input", changedByHand);
    window.addEventListener("hashchange", fromAddress);
    find("config").addEventListener("input", readConfig);
    find("file").addEventListener("change", function () { if (this.files.length) { readFile(this.files[0]); } });
    find("own").addEventListener("dragover", function (event) { event.preventDefault(); });
    find("own").addEventListener("drop", drop);
  }

  if (typeof document !== "undefined") {
    if (document.readyState === "loading") { document.addEventListener("DOMContentLoaded", begin); } else { begin(); }
  }

  return { start: start, measure: measure, methodOf: methodOf, ladder: ladder, readAddress: readAddress,
           writeAddress: writeAddress, cards: CARDS, counts: COUNTS, own: OWN, cardBytes: cardBytes,
           grouped: grouped, gigabytes: gigabytes, changed: changed, among: among, named: named, powers: powers,
           element: element, fill: fill };
}());

/* The page "Will it fit?" around the ledger of will_it_fit.js. */
"use strict";

(function () {
  var DATA = WILL_IT_FIT_DATA, forecast = WillItFit.forecast;

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

}());

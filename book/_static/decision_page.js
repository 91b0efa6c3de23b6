/* The form and the answers of the page "What should I do?". What a reader gives is only ever set as text. */
"use strict";

Decision.page = (function () {
  var PAGE = WillItFit.page, SHAPES = WILL_IT_FIT_DATA.shapes, element = PAGE.element;
  var own = null;  // the shape of a pasted config.json
  var CHOSEN = ["model", "card", "cards", "chip", "length", "task", "deploy", "aim", "keep"];
  var WHERE = { one: "on one card", divided: "divided", no: "no" };
  var NAMES = Decision.kinds.method;

  function find(name) { return document.getElementById("decision-" + name); }

  function fromForm() {
    var question = { rows: Decision.rowsIn(find("rows").value) };
    CHOSEN.forEach(function (name) { question[name] = find(name).value; });
    ["card", "cards", "length"].forEach(function (name) { question[name] = Number(question[name]); });
    return question;
  }

  function toForm(question) {
    CHOSEN.concat("rows").forEach(function (name) { find(name).value = question[name]; });
  }

  /* --- drawing ---------------------------------------------------------------------------------------------- */

  function child(parent, tag, text, name) {
    var made = element(tag, text);
    if (name) { made.className = name; }
    parent.appendChild(made);
    return made;
  }

  /* One answer: what to do, one line of why with the section behind it, and what is undecided. */
  function drawAnswer(list, answer) {
    var body, why, link, parts = answer.see.split("#");
    child(list, "dt", answer.title);
    body = child(list, "dd", "");
    body.id = "decision-answer-" + answer.output;
    child(body, "p", answer.say, "decision-say");
    why = child(body, "p", answer.why + " ", "decision-why");
    link = child(why, "a", answer.link);
    link.href = parts[0] + ".html#" + parts[1];
    if (answer.open) { child(body, "p", "UNDECIDED: " + answer.open, "decision-open"); }
  }

  function drawRow(rows, head, cells, name) {
    var line = child(rows, "tr", "", name);
    child(line, "th", head).scope = "row";
    cells.forEach(function (text) { child(line, "td", text); });
  }

  function drawFits(found) {
    var rows = find("fits");
    rows.textContent = "";
    Object.keys(found.fits).forEach(function (method) {
      var fit = found.fits[method];
      drawRow(rows, NAMES[method], [PAGE.grouped(fit.alone), fit.each === null ? "–" : PAGE.grouped(fit.each),
        WHERE[fit.place]], method === found.kinds.method ? "decision-chosen" : "");
    });
  }

  function drawLadder(rungs) {
    var rows = find("rungs");
    rows.textContent = "";
    find("ladder").hidden = rungs.length === 0;
    rungs.forEach(function (rung) {
      drawRow(rows, rung.words, [PAGE.grouped(rung.total), rung.first ? "fits from here on" : rung.fits ? "fits" : "no"],
        rung.first ? "decision-chosen" : "");
    });
  }

  function inShort(found) {
    var kinds = found.kinds, words = NAMES[kinds.method];
    words = words.charAt(0).toUpperCase() + words.slice(1);
    if (kinds.place === "no") { return words + ", but not on this hardware as it stands: see Memory."; }
    return words + (kinds.place === "divided" ? ", divided among the cards." : ", on one card.");
  }

  function refuse(reason) {
    find("short").textContent = reason;
    find("result").hidden = true;
  }

  function show() {
    var question = fromForm(), shape = question.model === PAGE.own ? own : SHAPES[question.model], found, list;
    find("rows").setAttribute("aria-invalid", String(question.rows === undefined));
    if (question.rows === undefined) { refuse("The number of rows must be a whole number from 1 to a billion."); return; }
    try { found = Decision.decide(question, shape); } catch (error) { refuse(error.message); return; }
    list = find("answers");
    list.textContent = "";
    found.answers.forEach(function (answer) { drawAnswer(list, answer); });
    drawFits(found);
    drawLadder(found.ladder);
    find("fit-link").href = "will_it_fit.html" + PAGE.writeAddress(PAGE.changed(found.setting, { card: question.card }));
    find("short").textContent = inShort(found);
    find("result").hidden = false;
  }

  /* --- what the reader does --------------------------------------------------------------------------------- */

  function changedByHand() {
    var question = fromForm();
    show();
    if (question.rows !== undefined) { history.replaceState(null, "", Decision.writeAddress(question)); }
  }

  /* A pasted config.json becomes a model of the list; what is no such file, or not known, is told why. */
  function readConfig() {
    var text = find("config").value, said = find("config-said"), option, name;
    if (!text.trim()) { said.textContent = ""; return; }
    try { own = WillItFit.config.read(text); } catch (error) { said.textContent = error.message; return; }
    name = WillItFit.config.familyOf(text) + ", " + (WillItFit.parameters(own) / 1e9).toFixed(2) + "B parameters";
    option = find("model").querySelector('option[value="' + PAGE.own + '"]');
    if (!option) { PAGE.fill(find("model"), [[PAGE.own, ""]]); option = find("model").lastChild; }
    option.textContent = "yours: " + name;
    find("model").value = PAGE.own;
    said.textContent = "Read: " + name + ".";
    changedByHand();
  }

  function fromAddress() {
    var kept = own && find("model").value === PAGE.own ? { model: PAGE.own } : {};
    toForm(Decision.readAddress(location.hash, Object.assign(Decision.start(), kept)));
    show();
  }

  function fillForm() {
    PAGE.fill(find("model"), Object.keys(SHAPES).map(function (name) { return [name, name]; }));
    PAGE.fill(find("card"), PAGE.cards.map(function (size) { return [size, size + " GB"]; }));
    PAGE.fill(find("cards"), PAGE.counts.map(function (count) { return [count, String(count)]; }));
    PAGE.fill(find("length"), PAGE.powers(6, 15).map(function (length) { return [length, PAGE.grouped(length)]; }));
    ["chip", "task", "deploy", "aim", "keep"].forEach(function (kind) {
      PAGE.fill(find(kind), Object.keys(Decision.kinds[kind]).map(function (value) {
        return [value, Decision.kinds[kind][value]];
      }));
    });
  }

  function begin() {
    if (!find("model")) { return; }
    fillForm();
    fromAddress();
    document.querySelector("#decision form").addEventListener("input", changedByHand);
    document.querySelector("#decision form").addEventListener("submit", function (event) { event.preventDefault(); });
    window.addEventListener("hashchange", fromAddress);
    find("config").addEventListener("input", readConfig);
  }

  if (typeof document !== "undefined") {
    if (document.readyState === "loading") { document.addEventListener("DOMContentLoaded", begin); } else { begin(); }
  }

  return {};
}());

/* The page "Interview": shuffles the questions and keeps a score in this browser. Without it, or without storage,
   the page is a plain list. The first part knows nothing of the page. */
"use strict";

var Interview = (function () {
  var KEY = "lora2qlora-interview";

  /* 0 to count - 1 in random order; `random` gives numbers in [0, 1). */
  function shuffled(count, random) {
    var order = [], i, j, kept;
    for (i = 0; i < count; i += 1) { order.push(i); }
    for (i = count - 1; i > 0; i -= 1) {
      j = Math.floor(random() * (i + 1));
      kept = order[i];
      order[i] = order[j];
      order[j] = kept;
    }
    return order;
  }

  /* What was stored, as marks by id: true for known, false for not yet; whatever else it holds is left out. */
  function read(text, ids) {
    var found = {}, stored;
    try { stored = JSON.parse(text); } catch (error) { stored = null; }
    ids.forEach(function (id) {
      if (stored && Object.prototype.hasOwnProperty.call(stored, id) && typeof stored[id] === "boolean") {
        found[id] = stored[id];
      }
    });
    return found;
  }

  function score(marks, ids) {
    var known = ids.filter(function (id) { return marks[id] === true; }).length;
    var missed = ids.filter(function (id) { return marks[id] === false; }).length;
    return "Known: " + known + " of " + ids.length + ". Not yet: " + missed + ". Not tried: " +
      (ids.length - known - missed) + ".";
  }

  return { KEY: KEY, shuffled: shuffled, read: read, score: score };
}());

if (typeof document !== "undefined") {
  document.addEventListener("DOMContentLoaded", function () {
    var panel = document.getElementById("interview-panel"), list = document.getElementById("interview-list");
    var cards = Array.prototype.slice.call(document.querySelectorAll("details.interview-card"));
    if (!panel || !list || !cards.length) { return; }
    var ids = cards.map(function (card, i) { return card.id || "interview-" + (i + 1); });
    var homes = cards.map(function (card) {
      return card.parentNode.insertBefore(document.createComment("question"), card);
    });
    var marks = Interview.read(stored(), ids), marking = [];

    function stored() {
      try { return window.localStorage.getItem(Interview.KEY); } catch (error) { return null; }
    }

    function keep() {
      try { window.localStorage.setItem(Interview.KEY, JSON.stringify(marks)); } catch (error) { /* not kept */ }
      show();
    }

    function show() {
      document.getElementById("interview-score").textContent = Interview.score(marks, ids);
      marking.forEach(function (buttons, i) {
        buttons.forEach(function (button) {
          button.setAttribute("aria-pressed", String(marks[ids[i]] === (button.name === "known")));
        });
      });
    }

    function button(name, words, i) {
      var made = document.createElement("button");
      made.type = "button";
      made.name = name;
      made.textContent = words;
      made.addEventListener("click", function () { marks[ids[i]] = name === "known"; keep(); });
      return made;
    }

    function inOrder() {
      cards.forEach(function (card, i) {
        card.hidden = false;
        homes[i].parentNode.insertBefore(card, homes[i].nextSibling);
      });
    }

    function fold() { cards.forEach(function (card) { card.open = false; }); }

    cards.forEach(function (card, i) {
      var row = document.createElement("p");
      row.className = "train-mark";
      marking.push([button("known", "I knew it", i), button("missed", "Not yet", i)]);
      marking[i].forEach(function (made) { row.appendChild(made); });
      card.appendChild(row);
    });
    document.getElementById("interview-shuffle").addEventListener("click", function () {
      fold();
      Interview.shuffled(cards.length, Math.random).forEach(function (i) { list.appendChild(cards[i]); });
    });
    document.getElementById("interview-order").addEventListener("click", function () { fold(); inOrder(); });
    document.getElementById("interview-open").addEventListener("click", function () {
      fold();
      cards.forEach(function (card, i) { card.hidden = marks[ids[i]] === true; });
    });
    document.getElementById("interview-forget").addEventListener("click", function () { marks = {}; keep(); });
    panel.hidden = false;
    show();
  });
}

/* The page "Quiz": asks the questions of quiz_data.js, explains every answer and keeps them in this browser.
   The first part knows nothing of the page. */
"use strict";

var Quiz = (function () {
  var KEY = "lora2qlora-quiz";

  /* What was stored, as the number of the chosen option by id; whatever else it holds is left out. */
  function read(text, questions) {
    var found = {}, stored;
    try { stored = JSON.parse(text); } catch (error) { stored = null; }
    questions.forEach(function (question) {
      var own = stored && Object.prototype.hasOwnProperty.call(stored, question.id);
      if (own && question.options.hasOwnProperty(String(stored[question.id]))) {
        if (typeof stored[question.id] === "number") { found[question.id] = stored[question.id]; }
      }
    });
    return found;
  }

  function score(chosen, questions) {
    var answered = questions.filter(function (question) { return chosen[question.id] !== undefined; });
    var right = answered.filter(function (question) { return question.options[chosen[question.id]].right; });
    return "Right: " + right.length + " of " + questions.length + ". Not right: " +
      (answered.length - right.length) + ". Not answered: " + (questions.length - answered.length) + ".";
  }

  /* A text in pieces, every second one of which stood in backquotes. */
  function pieces(text) { return text.split("`"); }

  return { KEY: KEY, read: read, score: score, pieces: pieces };
}());

if (typeof document !== "undefined") {
  document.addEventListener("DOMContentLoaded", function () {
    var panel = document.getElementById("quiz-panel");
    if (!panel || typeof QUIZ === "undefined") { return; }
    var all = QUIZ.reduce(function (some, part) { return some.concat(part.questions); }, []);
    var chosen = Quiz.read(stored(), all), shown = [];

    function stored() {
      try { return window.localStorage.getItem(Quiz.KEY); } catch (error) { return null; }
    }

    function keep() {
      try { window.localStorage.setItem(Quiz.KEY, JSON.stringify(chosen)); } catch (error) { /* not kept */ }
      scores();
    }

    function scores() {
      document.getElementById("quiz-score").textContent = Quiz.score(chosen, all);
      QUIZ.forEach(function (part) {
        document.getElementById("quiz-score-" + part.part).textContent = Quiz.score(chosen, part.questions);
      });
    }

    function make(name, parent, text) {
      var made = document.createElement(name);
      Quiz.pieces(text || "").forEach(function (piece, i) {
        made.appendChild(i % 2 ? make("code", null, piece) : document.createTextNode(piece));
      });
      if (parent) { parent.appendChild(made); }
      return made;
    }

    function link(parent, url, words) {
      var made = make("a", parent, words);
      made.href = url;
      return made;
    }

    function explain(parent, before, option) {
      var text = make("p", parent);
      make("strong", text, before);
      make("span", text, " " + option.why);
      if (option.said) {
        make("span", text, " Where it is said: ");
        link(text, option.said.url, option.said.name);
        make("span", text, ".");
      }
    }

    function feedback(question, said) {
      var taken = chosen[question.id], option = question.options[taken], read;
      said.textContent = "";
      if (taken === undefined) { return; }
      explain(said, option.right ? "Right." : "Not right.", option);
      question.options.forEach(function (other, i) {
        if (i !== taken) { explain(said, (other.right ? "Right: " : "Wrong: ") + other.text, other); }
      });
      read = make("p", said, "Read on: ");
      link(read, question.chapter + ".html#" + question.anchor,
        "chapter " + question.chapter.split("_")[0] + ", “" + question.section + "”");
    }

    function ask(question, number, parent) {
      var field = make("fieldset", parent), radios, button, said;
      field.id = "quiz-" + question.id;
      make("legend", field, number + ". " + question.ask);
      radios = question.options.map(function (option, i) {
        var label = make("label", field), radio = document.createElement("input");
        radio.type = "radio";
        radio.name = field.id;
        radio.value = String(i);
        label.appendChild(radio);
        make("span", label, option.text);
        return radio;
      });
      button = make("button", field);
      button.type = "button";
      said = make("div", field);
      said.setAttribute("role", "status");

      function show() {
        var answered = chosen[question.id] !== undefined;
        radios.forEach(function (radio, i) {
          radio.disabled = answered;
          if (answered) { radio.checked = i === chosen[question.id]; }
        });
        button.textContent = answered ? "Try again" : "Check";
        feedback(question, said);
      }

      button.addEventListener("click", function () {
        var taken = radios.findIndex(function (radio) { return radio.checked; });
        if (chosen[question.id] !== undefined) {
          delete chosen[question.id];
          radios.forEach(function (radio) { radio.checked = false; });
        } else if (taken < 0) {
          said.textContent = "Choose an answer first.";
          return;
        } else {
          chosen[question.id] = taken;
        }
        show();
        keep();
      });
      shown.push(function () { radios.forEach(function (radio) { radio.checked = false; }); show(); });
      show();
    }

    QUIZ.forEach(function (part) {
      part.questions.forEach(function (question, i) {
        ask(question, i + 1, document.getElementById("quiz-part-" + part.part));
      });
    });
    document.getElementById("quiz-forget").addEventListener("click", function () {
      chosen = {};
      shown.forEach(function (again) { again(); });
      keep();
      document.getElementById("quiz-said").textContent = "Your answers are forgotten.";
    });
    panel.hidden = false;
    scores();
  });
}

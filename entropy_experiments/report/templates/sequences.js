// The sequences behind the figures: a card with texts, numbers and coloured tokens, used by the kernel explorer, the figure of
// shares and the table of training sequences.
(function () {
  "use strict";
  var report = window.report;
  var make = report.make;
  var stored = report.data("sequences");
  if (!stored) return;
  var TITLES = { evaluation: "Evaluation sequence ", training: "Training sequence " };
  var MOST_NAMED = 5;

  function floats(packed) {
    if (packed === null || packed === undefined) return null;
    var bytes = Uint8Array.from(window.atob(packed), function (character) { return character.charCodeAt(0); });
    return new Float32Array(bytes.buffer);
  }

  // Three digits, a real minus sign: −0.00123, +1.2e−5.
  function signed(value) {
    if (!isFinite(value)) return "not known";
    if (value === 0) return "0";
    var size = Math.abs(value);
    var text = size < 1e-4 ? size.toExponential(2).replace("-", "−") :
      size.toLocaleString("en-US", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
    return (value < 0 ? "−" : "+") + text;
  }

  // Tokens of an unfinished character have no text of their own: they belong to the one that completes it.
  function pieces(tokens) {
    var columns = { shares: floats(tokens.shares), logprobs: floats(tokens.logprobs), entropies: floats(tokens.entropies) };
    var out = [], open = null;
    var foreign = new Set(tokens.foreign || []);
    tokens.texts.forEach(function (text, place) {
      if (open && open.foreign !== foreign.has(place)) {
        out.push(Object.assign(open, { text: "" }));
        open = null;
      }
      if (!open) open = { foreign: foreign.has(place), first: place, count: 0, shares: 0, logprobs: 0, entropies: 0 };
      open.count += 1;
      Object.keys(columns).forEach(function (name) {
        open[name] = columns[name] ? open[name] + columns[name][place] : NaN;
      });
      if (text === "") return;
      open.text = text;
      out.push(open);
      open = null;
    });
    if (open) out.push(Object.assign(open, { text: "" }));
    return out;
  }

  function legible(text) {
    return text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t") || "∅";
  }

  function described(piece) {
    var lines = [(piece.count > 1 ? "tokens " + (piece.first + 1) + "–" + (piece.first + piece.count) : "token " + (piece.first + 1))];
    if (piece.foreign) return lines.concat("not drawn by the policy: conditioned on, not scored").join("\n");
    if (isFinite(piece.shares)) lines.push("share of Δh " + signed(piece.shares) + " nats per token");
    if (isFinite(piece.logprobs)) lines.push("log-probability " + signed(piece.logprobs) + " nats");
    if (isFinite(piece.entropies)) lines.push("entropy before it " + signed(piece.entropies).slice(1) + " nats");
    return lines.join("\n");
  }

  function tokenText(tokens) {
    var all = pieces(tokens);
    var largest = all.reduce(function (most, piece) { return Math.max(most, Math.abs(piece.shares) || 0); }, 0);
    var text = make("div", { class: "tokens", dir: "auto" });
    all.forEach(function (piece) {
      var span = make("span", { title: described(piece) }, legible(piece.text));
      if (piece.foreign) {
        span.className = "foreign";
      } else if (largest > 0) {
        var part = Math.abs(piece.shares) / largest;
        span.className = piece.shares < 0 ? "lowers" : "raises";
        span.style.setProperty("--part", (0.75 * part).toFixed(3));
        if (part < 0.02) span.className = "";
      }
      text.appendChild(span);
    });
    if (!(largest > 0)) return [text];
    var named = all.filter(function (piece) { return !piece.foreign; }).sort(function (a, b) { return Math.abs(b.shares) - Math.abs(a.shares); }).slice(0, MOST_NAMED);
    var list = make("ol", { class: "largest" });
    named.forEach(function (piece) {
      list.appendChild(make("li", {}, make("code", {}, make("bdi", {}, legible(piece.text).replace(/ /g, "␣"))), " " + signed(piece.shares)));
    });
    var legend = make("p", { class: "soft small" }, make("span", { class: "lowers key" }, "lowers entropy"), " ",
      make("span", { class: "raises key" }, "raises it"),
      all.some(function (piece) { return piece.foreign; }) ? make("span", { class: "foreign key" }, "not drawn by the policy") : "", "; depth: the token's share, against the largest here. Hover a token for its numbers.");
    return [text, legend, make("p", { class: "soft small" }, "Largest shares, nats per token:"), list];
  }

  function prompt(sequence) {
    var texts = stored.prompts[sequence.prompt];
    var out = [make("div", { class: "body", dir: "auto" }, texts.own || "(empty)")];
    if (texts.own !== texts.whole) {
      out.push(make("details", {}, make("summary", {}, "whole prompt"), make("div", { class: "body", dir: "auto" }, texts.whole)));
    }
    return out;
  }

  // An <article> on sequence `row` of "evaluation" or "training".
  function card(buffer, row) {
    var sequence = stored[buffer][row];
    var article = make("article", { class: "card" },
      make("h3", {}, TITLES[buffer] + row, make("span", { class: "soft" }, " · prompt " + sequence.prompt_index)));
    var facts = make("dl", { class: "cardfacts", title: "From sequences.parquet, row " + row + " of the " + buffer + " buffer" });
    sequence.facts.forEach(function (fact) { facts.appendChild(make("div", {}, make("dt", {}, fact[0]), make("dd", {}, fact[1]))); });
    article.appendChild(facts);
    article.appendChild(make("h4", {}, "Prompt"));
    prompt(sequence).forEach(function (element) { article.appendChild(element); });
    article.appendChild(make("h4", {}, "Completion"));
    if (sequence.tokens) {
      tokenText(sequence.tokens).forEach(function (element) { article.appendChild(element); });
    } else {
      article.appendChild(make("div", { class: "body", dir: "auto" }, sequence.completion || "(empty)"));
      if (buffer === "training") article.appendChild(make("p", { class: "soft small" }, "Shares of single tokens are not stored for this sequence."));
    }
    return article;
  }

  function searchable(row) {
    var sequence = stored.training[row];
    return stored.prompts[sequence.prompt].own + "\n" + sequence.completion;
  }

  function setUpTable(table) {
    table.searchText = function (element) { return searchable(Number(element.dataset.row)); };
    Array.prototype.forEach.call(table.tBodies[0].rows, function (element) {
      if (element.dataset.row === undefined) return;
      var row = Number(element.dataset.row);
      var first = element.cells[0];
      var button = make("button", { type: "button", class: "more", "aria-expanded": "false", "aria-label": "Sequence " + row + ", show the whole of it" }, "▸ " + row);
      first.textContent = "";
      first.appendChild(button);
      button.addEventListener("click", function () {
        var detail = element.nextElementSibling;
        var open = detail && detail.classList.contains("detail");
        if (open) detail.remove();
        else element.after(make("tr", { class: "detail" }, make("td", { colspan: element.cells.length }, card("training", row))));
        button.setAttribute("aria-expanded", String(!open));
        button.firstChild.nodeValue = (open ? "▸ " : "▾ ") + row;
      });
    });
  }

  // Clicking a bar of the figure of shares shows its sequence below.
  function setUpShares(figure) {
    var holder = make("div", { class: "picked", "aria-live": "polite" });
    figure.insertBefore(holder, figure.querySelector("figcaption"));
    figure.addEventListener("report:point", function (event) {
      holder.textContent = "";
      holder.appendChild(card("training", event.detail[0]));
    });
  }

  report.card = card;
  report.floats = floats;
  report.signed = signed;
  report.sequences = stored;
  document.querySelectorAll("table.training").forEach(setUpTable);
  document.querySelectorAll("#figure-attribution[data-plot]").forEach(setUpShares);
})();

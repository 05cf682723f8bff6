// The kernel explorer: a heat map whose cells lead to the two sequences behind them, by pointer or by keyboard.
(function () {
  "use strict";
  var report = window.report;
  var make = report.make;
  var stored = report.data("kernels");
  var holder = document.getElementById("kernel-explorer");
  if (!stored || !holder || !window.Plotly || !report.card) return;
  var MOST_LINES = 100, MOST_LABELS = { x: 20, y: 16 };
  var HELP = "Hover a cell to read it; click it to see both sequences below. Drag to zoom, double-click to zoom out. By keyboard: " +
    "arrow keys move the selected cell, Shift with an arrow moves ten, Page Up and Page Down go to the next group of rows, Home and End " +
    "to the first and last column, Enter shows the sequences, Escape closes them.";

  var state = { kernel: stored.kernels.length - 1, rows: stored.row_orders[0], columns: stored.column_orders[0], cell: null, pinned: false };
  var values = stored.kernels.map(function (kernel) { return report.floats(kernel.values); });
  var plot = make("div", { class: "plot", id: "kernel-plot", tabindex: "0", role: "application", "aria-describedby": "kernel-help" });
  var status = make("p", { class: "status", role: "status", "aria-live": "polite" }, "No cell is selected.");
  var meaning = make("p", { class: "soft" });
  var panel = make("div", { class: "panel", role: "region", "aria-label": "The two sequences behind the selected cell", hidden: "" });
  var tip = make("div", { class: "tip", hidden: "", "aria-hidden": "true" });

  function choice(label, options, chosen, changed) {
    var select = make("select", { "aria-label": label });
    options.forEach(function (option, place) { select.appendChild(make("option", { value: place }, option)); });
    select.value = String(chosen);
    select.addEventListener("change", function () { changed(Number(select.value)); });
    return make("label", {}, label + " ", select);
  }

  function boundaries(groups) {
    var cuts = [];
    for (var place = 1; groups && place < groups.length; place++) if (groups[place] !== groups[place - 1]) cuts.push(place);
    return cuts;
  }

  function axis(side, order, words) {
    var cuts = boundaries(order.groups);
    var starts = [0].concat(cuts), count = order.order.length;
    var out = { title: { text: words }, range: side === "x" ? [-0.5, count - 0.5] : [count - 0.5, -0.5], showgrid: false, zeroline: false, ticks: "" };
    if (!order.groups) return Object.assign(out, { showticklabels: false });
    var every = Math.ceil(starts.length / (report.isNarrow(plot) ? 8 : MOST_LABELS[side]));
    var shown = starts.filter(function (start, place) { return place % every === 0; });
    out.tickvals = shown.map(function (start) {
      var end = starts[starts.indexOf(start) + 1];
      return (start + (end === undefined ? count : end) - 1) / 2;
    });
    out.ticktext = shown.map(function (start) { return String(order.groups[start]); });
    return out;
  }

  // Lines between groups, unless they would hide the cells; the selected cell with hairlines along its row and column.
  function shapes() {
    var out = [];
    [["x", state.columns], ["y", state.rows]].forEach(function (pair) {
      var cuts = boundaries(pair[1].groups);
      if (!cuts.length || cuts.length > MOST_LINES || pair[1].order.length < 2 * (cuts.length + 1)) return;
      cuts.forEach(function (cut) {
        var line = { type: "line", line: { color: "$ink", width: 0.7 }, opacity: 0.6 };
        if (pair[0] === "x") Object.assign(line, { xref: "x", yref: "y domain", x0: cut - 0.5, x1: cut - 0.5, y0: 0, y1: 1 });
        else Object.assign(line, { xref: "x domain", yref: "y", x0: 0, x1: 1, y0: cut - 0.5, y1: cut - 0.5 });
        out.push(line);
      });
    });
    if (state.cell) {
      var x = state.cell.x, y = state.cell.y, thin = { color: "$focus", width: 1, dash: "dot" };
      [[-0.5, x - 0.5], [x + 0.5, stored.columns - 0.5]].forEach(function (span) {
        out.push({ type: "line", x0: span[0], x1: span[1], y0: y, y1: y, line: thin });
      });
      [[-0.5, y - 0.5], [y + 0.5, stored.rows - 0.5]].forEach(function (span) {
        out.push({ type: "line", x0: x, x1: x, y0: span[0], y1: span[1], line: thin });
      });
      out.push({ type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, line: { color: "$ink", width: 2.5 } });
    }
    return out;
  }

  function matrix() {
    var source = values[state.kernel], width = stored.columns;
    return state.rows.order.map(function (row) {
      return Float32Array.from(state.columns.order, function (column) { return source[row * width + column]; });
    });
  }

  function spec() {
    var kernel = stored.kernels[state.kernel];
    var noun = state.columns.noun ? ", grouped by " + state.columns.noun + " (number)" : ", " + state.columns.label;
    // The title stands above: plotly takes powers of ten for narrower than they are, and a title beside them would cover them.
    var trace = {
      type: "heatmap", z: matrix(), zmin: -kernel.limit, zmax: kernel.limit, colorscale: "$diverging", hoverinfo: "none",
      colorbar: { title: { text: kernel.symbol + "(t, i)<br>nats² × P", side: "top" }, thickness: 14, outlinewidth: 0, exponentformat: "power" },
    };
    var layout = {
      height: 560, uirevision: state.columns.label, shapes: shapes(), plot_bgcolor: "#9a9a9a", margin: { l: 60, r: 10, t: 20, b: 60 },
      xaxis: axis("x", state.columns, "training sequence i" + noun), yaxis: axis("y", state.rows, "evaluation sequence t, by prompt"),
    };
    if (report.isNarrow(plot)) {
      layout.margin.r = 36;
      Object.assign(trace.colorbar, {
        orientation: "h", y: -0.2, yanchor: "top", title: { text: kernel.symbol + "(t, i), nats² × P", side: "bottom" },
        tickvals: [-kernel.limit, 0, kernel.limit], ticktext: [report.signed(-kernel.limit), "0", report.signed(kernel.limit)],
      });
    }
    return { data: [trace], layout: layout };
  }

  var paint = report.painter(plot, spec);
  var shownKernel = null;

  function sequenceAt(cell) {
    return { row: state.rows.order[cell.y], column: state.columns.order[cell.x] };
  }

  function valueAt(at, kernel) {
    return values[kernel][at.row * stored.columns + at.column];
  }

  function words(cell) {
    var at = sequenceAt(cell);
    var sequences = report.sequences;
    return [
      "evaluation sequence " + at.row + ", prompt " + sequences.evaluation[at.row].prompt_index,
      "training sequence " + at.column + ", prompt " + sequences.training[at.column].prompt_index,
    ].concat(stored.kernels.map(function (kernel, place) {
      return kernel.symbol + " = " + report.signed(valueAt(at, place)) + (place === state.kernel ? " (shown)" : "");
    }));
  }

  // #cell/KERNEL/EVALUATION ROW/TRAINING ROW, rows as in kernel.safetensors.
  function addressOf(at) {
    return "#cell/" + stored.kernels[state.kernel].name + "/" + at.row + "/" + at.column;
  }

  // The cell that the page's address names; null where it names none that is here.
  function addressed() {
    var found = /^#cell\/([a-z_]+)\/(\d+)\/(\d+)$/.exec(window.location.hash);
    if (!found) return null;
    var kernel = stored.kernels.findIndex(function (one) { return one.name === found[1]; });
    var cell = { x: state.columns.order.indexOf(Number(found[3])), y: state.rows.order.indexOf(Number(found[2])) };
    return kernel < 0 || cell.x < 0 || cell.y < 0 ? null : { kernel: kernel, cell: cell };
  }

  function goToAddress() {
    var wanted = addressed();
    if (!wanted) return;
    openAddressed();
    state.kernel = wanted.kernel;
    if (shownKernel) shownKernel.value = String(wanted.kernel);
    describe();
    paint().then(function () {
      select(wanted.cell, true);
      plot.focus({ preventScroll: true }); // the keyboard goes on from here, not from the top of the page
    });
  }

  function showPanel() {
    panel.hidden = !state.pinned;
    if (!state.pinned) return;
    var at = sequenceAt(state.cell);
    var close = make("button", { type: "button", "aria-label": "Close the sequences" }, "✕ Close");
    close.addEventListener("click", function () { unpin(); plot.focus(); });
    panel.textContent = "";
    var source = "From kernel.safetensors, row " + at.row + ", column " + at.column;
    var link = make("a", { href: addressOf(at) }, "Link to this cell");
    panel.appendChild(make("div", { class: "panelhead" }, make("strong", { title: source }, "Cell: " + words(state.cell).slice(2).join(", ")), link, close));
    panel.appendChild(make("div", { class: "pair" }, report.card("training", at.column), report.card("evaluation", at.row)));
  }

  // Keeps the selected cell in sight where the map is zoomed.
  function follow(change) {
    [["xaxis", state.cell.x], ["yaxis", state.cell.y]].forEach(function (pair) {
      var range = plot.layout[pair[0]].range.slice(), low = Math.min(range[0], range[1]), high = Math.max(range[0], range[1]);
      if (pair[1] - 0.5 >= low && pair[1] + 0.5 <= high) return;
      var shift = pair[1] - (low + high) / 2;
      change[pair[0] + ".range"] = [range[0] + shift, range[1] + shift];
    });
    return change;
  }

  function select(cell, pinned) {
    state.cell = cell;
    state.pinned = pinned;
    window.Plotly.relayout(plot, follow({ shapes: report.themed(shapes()) }));
    var text = words(cell);
    status.textContent = text[0].charAt(0).toUpperCase() + text[0].slice(1) + "; " + text.slice(1).join("; ") + (pinned ? ". Both texts are below." : ".");
    if (pinned) window.history.replaceState(null, "", addressOf(sequenceAt(cell)));
    showPanel();
  }

  function unpin() {
    state.pinned = false;
    if (addressed()) window.history.replaceState(null, "", window.location.pathname + window.location.search);
    showPanel();
  }

  function pageTo(direction) {
    var groups = state.rows.groups, y = state.cell.y;
    var starts = [0].concat(boundaries(groups));
    var next = starts.filter(function (start) { return direction > 0 ? start > y : start < y; });
    return next.length ? (direction > 0 ? next[0] : next[next.length - 1]) : y;
  }

  function moved(key, far) {
    var cell = { x: state.cell.x, y: state.cell.y }, stride = far ? 10 : 1;
    if (key === "ArrowLeft") cell.x -= stride;
    else if (key === "ArrowRight") cell.x += stride;
    else if (key === "ArrowUp") cell.y -= stride;
    else if (key === "ArrowDown") cell.y += stride;
    else if (key === "Home") cell.x = 0;
    else if (key === "End") cell.x = stored.columns - 1;
    else if (key === "PageUp") cell.y = pageTo(-1);
    else if (key === "PageDown") cell.y = pageTo(1);
    else return null;
    cell.x = Math.min(Math.max(cell.x, 0), stored.columns - 1);
    cell.y = Math.min(Math.max(cell.y, 0), stored.rows - 1);
    return cell;
  }

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !plot.layout) return;
    if (event.key === "Escape") { unpin(); return; }
    var started = state.cell !== null;
    if (!started) state.cell = { x: 0, y: 0 };
    var cell = event.key === "Enter" || event.key === " " ? state.cell : moved(event.key, event.shiftKey);
    if (!cell) { if (!started) state.cell = null; return; }
    event.preventDefault();
    select(started ? cell : state.cell, state.pinned || event.key === "Enter" || event.key === " ");
  }

  function hover(event) {
    var point = event.points[0];
    tip.textContent = "";
    words({ x: point.x, y: point.y }).forEach(function (line) { tip.appendChild(make("div", {}, line)); });
    tip.hidden = false;
    var x = event.event.clientX, y = event.event.clientY;
    tip.style.left = Math.max(4, Math.min(x + 14, window.innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = (y + tip.offsetHeight + 24 > window.innerHeight ? y - tip.offsetHeight - 12 : y + 16) + "px";
  }

  function describe() {
    var kernel = stored.kernels[state.kernel];
    meaning.textContent = kernel.meaning + " Colours end at ±" + report.signed(kernel.limit).slice(1) + " nats² × P, percentile 99 of |" + kernel.symbol + "|.";
    plot.setAttribute("aria-label", kernel.title + ": heat map of " + stored.rows + " evaluation sequences by " + stored.columns + " training sequences");
  }

  // The same sequences stay selected when the order of the axes changes.
  function repaint(change) {
    var at = state.cell && sequenceAt(state.cell);
    change();
    if (at) state.cell = { x: state.columns.order.indexOf(at.column), y: state.rows.order.indexOf(at.row) };
    describe();
    paint().then(function () { if (state.cell) select(state.cell, state.pinned); });
  }

  // What is named but not drawn yet is opened and scrolled to, and so drawn.
  function openAddressed() {
    if (!addressed()) return;
    report.reveal(holder);
    holder.scrollIntoView();
  }

  function setUp() {
    var tools = make("div", { class: "tools" });
    if (stored.kernels.length > 1) {
      var kernels = choice("Kernel shown", stored.kernels.map(function (kernel) { return kernel.title; }), state.kernel, function (place) {
        repaint(function () { state.kernel = place; });
      });
      shownKernel = kernels.querySelector("select");
      tools.appendChild(kernels);
    }
    tools.appendChild(choice("Columns ordered", stored.column_orders.map(function (order) { return order.label; }), 0, function (place) {
      repaint(function () { state.columns = stored.column_orders[place]; });
    }));
    var reset = make("button", { type: "button" }, "Zoom out");
    reset.addEventListener("click", function () {
      window.Plotly.relayout(plot, { "xaxis.range": [-0.5, stored.columns - 0.5], "yaxis.range": [stored.rows - 0.5, -0.5] });
    });
    tools.appendChild(reset);
    [tools, meaning, plot, status, make("p", { id: "kernel-help", class: "soft small" }, HELP), panel, tip].forEach(function (element) {
      holder.appendChild(element);
    });
    plot.style.minHeight = "560px";
    describe();
    holder.parentNode.classList.add("live");
    plot.addEventListener("keydown", pressed);
    window.addEventListener("hashchange", function () { if (holder.dataset.drawn) goToAddress(); else openAddressed(); });
    openAddressed();
    report.whenNear(holder, function () {
      paint().then(function () {
        plot.on("plotly_hover", hover);
        plot.on("plotly_unhover", function () { tip.hidden = true; });
        plot.on("plotly_click", function (event) { select({ x: event.points[0].x, y: event.points[0].y }, true); });
        holder.dataset.drawn = "yes";
        goToAddress();
      });
    });
  }

  setUp();
})();

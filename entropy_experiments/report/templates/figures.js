// Figures: every <figure data-plot> is drawn by plotly when it comes near the window; its picture stays for print.
(function () {
  "use strict";
  var report = window.report;
  // No button that would send a figure, and with it the texts behind it, to anybody.
  var config = { displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  var NARROW = 620; // pixels: below it, the "narrow" part of a plot's JSON is laid over its layout
  var drawn = [];

  function merge(base, own) {
    var out = {};
    [base || {}, own || {}].forEach(function (source) {
      Object.keys(source).forEach(function (key) {
        var both = out[key] && typeof out[key] === "object" && !Array.isArray(out[key]) && typeof source[key] === "object";
        out[key] = both && !Array.isArray(source[key]) ? merge(out[key], source[key]) : source[key];
      });
    });
    return out;
  }

  function axis() {
    return { gridcolor: "$line", zerolinecolor: "$soft", linecolor: "$soft", automargin: true, exponentformat: "power", title: { standoff: 12 } };
  }

  // The house's layout under a figure's own, in the theme's colours.
  function layoutOf(own) {
    var layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, height: 420, hovermode: "closest",
      font: { color: "$ink", size: 13, family: window.getComputedStyle(document.body).fontFamily },
      margin: { l: 70, r: 20, t: 36, b: 60 }, dragmode: "zoom",
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hoverlabel: { bgcolor: "$panel", bordercolor: "$line", font: { color: "$ink" }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: "$soft", activecolor: "$ink" },
    };
    var axes = Object.keys(own || {}).filter(function (key) { return /^[xy]axis\d*$/.test(key); });
    ["xaxis", "yaxis"].concat(axes).forEach(function (key) { layout[key] = axis(); });
    return report.themed(merge(layout, own));
  }

  function isNarrow(element) {
    return element.clientWidth < NARROW;
  }

  // A function that draws into `element` what `spec` returns, {data, layout, narrow}; called again whenever the theme changes.
  function painter(element, spec) {
    function paint() {
      var shown = spec();
      var own = isNarrow(element) ? merge(merge(shown.layout, { font: { size: 11 } }), shown.narrow) : shown.layout;
      return window.Plotly.react(element, report.themed(shown.data), layoutOf(own), config);
    }
    drawn.push(paint);
    return paint;
  }

  report.onTheme(function () { drawn.forEach(function (paint) { paint(); }); });

  // Calls `start` once, as soon as `element` comes within half a window of being seen.
  function whenNear(element, start) {
    if (!("IntersectionObserver" in window)) return start();
    var observer = new IntersectionObserver(function (entries) {
      if (!entries.some(function (entry) { return entry.isIntersecting; })) return;
      observer.disconnect();
      start();
    }, { rootMargin: "50%" });
    observer.observe(element);
  }

  // A slider over the steps of `spec`; calls `show` after each move.
  function slider(spec, show) {
    var step = spec.slider.start || 0;
    var last = spec.steps.length - 1;
    var value = report.make("output", {}, spec.steps[step].label);
    var input = report.make("input", { type: "range", min: 0, max: last, step: 1, value: step });
    function changed() {
      var label = spec.steps[Number(input.value)].label;
      value.textContent = label;
      input.setAttribute("aria-valuetext", label);
    }
    input.addEventListener("input", function () { changed(); show(); });
    changed();
    return { input: input, element: report.make("label", { class: "slider" }, spec.slider.label + " ", input, value) };
  }

  function setUp(figure) {
    var spec = JSON.parse(document.getElementById(figure.dataset.plot).textContent);
    var picture = figure.querySelector(".picture");
    var plot = report.make("div", { class: "plot", role: "group", "aria-label": picture.firstChild.alt });
    plot.style.minHeight = figure.dataset.height + "px";
    var control = null;
    var current = function () { return spec; };
    var paint = null;
    if (spec.steps) {
      control = slider(spec, function () { if (paint) paint(); });
      current = function () {
        var own = spec.steps[Number(control.input.value)];
        return { data: own.data, layout: merge(spec.layout, own.layout), narrow: spec.narrow };
      };
      figure.insertBefore(control.element, picture);
    }
    figure.insertBefore(plot, picture);
    figure.classList.add("live");
    whenNear(figure, function () {
      try {
        paint = painter(plot, current);
        paint().then(function () {
          figure.dataset.drawn = "yes";
          plot.on("plotly_click", function (event) {
            figure.dispatchEvent(new CustomEvent("report:point", { detail: event.points[0].customdata }));
          });
        });
      } catch (error) { // the picture is still there
        figure.classList.remove("live");
        plot.remove();
        if (control) control.element.remove();
        throw error;
      }
    });
  }

  report.isNarrow = isNarrow;
  report.painter = painter;
  report.whenNear = whenNear;
  if (window.Plotly) document.querySelectorAll("figure[data-plot]").forEach(setUp);
})();

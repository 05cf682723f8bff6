// What every script of the page shares, as window.report: elements, data, the theme and its colours.
(function () {
  "use strict";
  var root = document.documentElement;
  var listeners = [];
  var systemDark = window.matchMedia("(prefers-color-scheme: dark)");

  // make("p", {class: "soft", "aria-live": "polite"}, "text or elements", ...): text is always set as text.
  function make(tag, attributes) {
    var element = document.createElement(tag);
    Object.keys(attributes || {}).forEach(function (key) {
      if (attributes[key] !== null && attributes[key] !== undefined) element.setAttribute(key, attributes[key]);
    });
    for (var place = 2; place < arguments.length; place++) {
      var child = arguments[place];
      if (child === null || child === undefined) continue;
      element.appendChild(child instanceof Node ? child : document.createTextNode(String(child)));
    }
    return element;
  }

  function data(name) {
    var element = document.getElementById("data-" + name);
    return element ? JSON.parse(element.textContent) : null;
  }

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches;
  }

  // "ink" -> the theme's colour of that name.
  function colour(name) {
    return window.getComputedStyle(root).getPropertyValue("--" + name).trim();
  }

  function diverging() {
    return isDark()
      ? [[0, "#9ecbff"], [0.25, "#3f83c4"], [0.5, "#1a1f26"], [0.75, "#c4553f"], [1, "#ffb59b"]]
      : [[0, "#053061"], [0.25, "#4393c3"], [0.5, "#f7f7f7"], [0.75, "#d6604d"], [1, "#67001f"]];
  }

  // A copy of a plot's JSON with "$name" replaced by the theme's colour.
  function themed(value) {
    if (typeof value === "string" && value.charAt(0) === "$" && /^\$[a-z-]+$/.test(value)) {
      return value === "$diverging" ? diverging() : colour(value.slice(1));
    }
    if (Array.isArray(value)) return value.map(themed);
    if (value && typeof value === "object" && !ArrayBuffer.isView(value)) {
      var copy = {};
      Object.keys(value).forEach(function (key) { copy[key] = themed(value[key]); });
      return copy;
    }
    return value;
  }

  function announceTheme() {
    var button = document.getElementById("theme");
    button.textContent = isDark() ? "☀ Light" : "☾ Dark";
    button.setAttribute("aria-label", isDark() ? "Switch to the light page" : "Switch to the dark page");
    listeners.forEach(function (listener) { listener(); });
  }

  function setUpTheme() {
    var button = document.getElementById("theme");
    button.hidden = false;
    button.addEventListener("click", function () {
      root.dataset.theme = isDark() ? "light" : "dark";
      try {
        window.sessionStorage.setItem("entropy-report-theme", root.dataset.theme);
      } catch (error) {
        if (!(error instanceof DOMException)) throw error; // no storage: the choice lasts as long as the page
      }
      announceTheme();
    });
    systemDark.addEventListener("change", announceTheme);
    announceTheme();
  }

  // Sections are closed until they are asked for: by hand, by a link to them or into them, or for print.
  var chapters = Array.prototype.slice.call(document.querySelectorAll("main details"));
  var openedForPrint = [];

  // Opens every section around `element`.
  function reveal(element) {
    for (var around = element; around; around = around.parentElement) if (around.tagName === "DETAILS") around.open = true;
  }

  function setAll(open) {
    chapters.forEach(function (chapter) { chapter.open = open; });
  }

  function followHash() {
    var name = window.location.hash.slice(1);
    try {
      name = decodeURIComponent(name);
    } catch (error) {
      if (!(error instanceof URIError)) throw error; // no id of this page has such an escape
    }
    var target = document.getElementById(name);
    if (!target) return;
    reveal(target);
    target.scrollIntoView();
  }

  function openForPrint() {
    chapters.forEach(function (chapter) {
      if (chapter.open) return;
      openedForPrint.push(chapter);
      chapter.open = true;
    });
  }

  function closeAfterPrint() {
    openedForPrint.splice(0).forEach(function (chapter) { chapter.open = false; });
  }

  function setUpChapters() {
    window.addEventListener("hashchange", followHash);
    window.addEventListener("beforeprint", openForPrint);
    window.addEventListener("afterprint", closeAfterPrint);
    var list = document.querySelector("ul.chapters");
    if (list && chapters.length) {
      [["Open all", true], ["Close all", false]].forEach(function (pair) {
        var button = make("button", { type: "button", class: "every" }, pair[0]);
        button.addEventListener("click", function () { setAll(pair[1]); });
        list.appendChild(make("li", {}, button));
      });
    }
    followHash();
  }

  // What is wider or higher than its frame is scrolled by keyboard too; the rest need not be stopped at.
  function setUpScrolling() {
    if (!("ResizeObserver" in window)) return;
    var observer = new ResizeObserver(function (entries) {
      entries.forEach(function (entry) {
        var frame = entry.target.parentElement;
        var scrolls = frame.scrollWidth > frame.clientWidth + 1 || frame.scrollHeight > frame.clientHeight + 1;
        if (scrolls) frame.setAttribute("tabindex", "0");
        else if (frame !== document.activeElement) frame.removeAttribute("tabindex");
      });
    });
    document.querySelectorAll(".scroll, .picture").forEach(function (frame) { observer.observe(frame.firstElementChild); });
  }

  // A cell without a source of its own has that of its column's heading.
  document.addEventListener("mouseover", function (event) {
    var cell = event.target.closest && event.target.closest("td");
    if (!cell || cell.title || cell.closest(".detail")) return;
    var heading = cell.closest("table").tHead && cell.closest("table").tHead.rows[0].cells[cell.cellIndex];
    if (heading && heading.title) cell.title = heading.title;
  });

  window.report = {
    reveal: reveal,
    make: make,
    data: data,
    colour: colour,
    themed: themed,
    isDark: isDark,
    onTheme: function (listener) { listeners.push(listener); },
  };
  setUpTheme();
  setUpChapters();
  setUpScrolling();
})();

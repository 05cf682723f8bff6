// Tables that sort, search and filter. <table data-table data-search="label">, <th data-sort="number|text" data-filter="label">,
// <td data-value="machine-readable value">; a row's detail rows (tr.detail) travel with it.
(function () {
  "use strict";
  var report = window.report;
  var MOST_CHOICES = 200;

  function valueOf(cell) {
    return cell.dataset.value !== undefined ? cell.dataset.value : cell.textContent.trim();
  }

  // Numbers by size, unknown ones last whatever the direction.
  function compare(kind, direction) {
    return function (one, other) {
      if (kind === "text") return direction * one.key.localeCompare(other.key) || one.place - other.place;
      var a = one.key === "" ? NaN : Number(one.key), b = other.key === "" ? NaN : Number(other.key);
      if (isNaN(a) || isNaN(b)) return Number(isNaN(a)) - Number(isNaN(b)) || one.place - other.place;
      return direction * (a - b) || one.place - other.place;
    };
  }

  function setUp(table) {
    var body = table.tBodies[0];
    var headings = Array.prototype.slice.call(table.tHead.rows[0].cells);
    var rows = Array.prototype.slice.call(body.rows).map(function (element, place) {
      return { element: element, place: place, key: "" };
    });
    var noun = table.dataset.noun || "rows";
    var count = report.make("output", { class: "count", "aria-live": "polite" });
    var tools = report.make("div", { class: "tools", role: "search", "aria-label": "Choose the rows of the table" });
    var tests = [];

    function refresh() {
      var shown = 0;
      rows.forEach(function (row) {
        var keep = tests.every(function (test) { return test(row.element); });
        row.element.hidden = !keep;
        var detail = row.element.nextElementSibling;
        if (detail && detail.classList.contains("detail")) detail.hidden = !keep;
        shown += keep;
      });
      count.textContent = shown + " of " + rows.length + " " + noun;
    }

    function sortBy(place, direction) {
      headings.forEach(function (heading, other) {
        if (heading.dataset.sort) heading.setAttribute("aria-sort", other !== place ? "none" : direction > 0 ? "ascending" : "descending");
      });
      rows.forEach(function (row) { row.key = valueOf(row.element.cells[place]); });
      rows.sort(compare(headings[place].dataset.sort, direction));
      rows.forEach(function (row) {
        var detail = row.element.nextElementSibling;
        var travels = detail && detail.classList.contains("detail");
        body.appendChild(row.element);
        if (travels) body.appendChild(detail);
      });
    }

    if (table.dataset.search) {
      var search = report.make("input", { type: "search", placeholder: table.dataset.search, "aria-label": table.dataset.search });
      search.addEventListener("input", refresh);
      tools.appendChild(search);
      tests.push(function (element) {
        var words = search.value.toLowerCase();
        if (!words) return true;
        var text = table.searchText ? table.searchText(element) : element.textContent;
        return text.toLowerCase().indexOf(words) >= 0;
      });
    }
    headings.forEach(function (heading, place) {
      if (heading.dataset.filter) {
        var values = {};
        rows.forEach(function (row) {
          var cell = row.element.cells[place];
          values[cell.dataset.group !== undefined ? cell.dataset.group : valueOf(cell)] = true;
        });
        var choices = Object.keys(values).sort(function (a, b) { return Number(a) - Number(b) || a.localeCompare(b); });
        if (choices.length > 1 && choices.length <= MOST_CHOICES) {
          var select = report.make("select", { "aria-label": "Filter by " + heading.dataset.filter }, report.make("option", { value: "" }, "all"));
          choices.forEach(function (choice) {
            select.appendChild(report.make("option", { value: "=" + choice }, choice === "" ? "not known" : choice));
          });
          select.addEventListener("change", refresh);
          tools.appendChild(report.make("label", {}, heading.dataset.filter + " ", select));
          tests.push(function (element) {
            var cell = element.cells[place];
            return !select.value || "=" + (cell.dataset.group !== undefined ? cell.dataset.group : valueOf(cell)) === select.value;
          });
        }
      }
      if (!heading.dataset.sort) return;
      var button = report.make("button", { type: "button", class: "sort" });
      while (heading.firstChild) button.appendChild(heading.firstChild);
      heading.appendChild(button);
      if (!heading.hasAttribute("aria-sort")) heading.setAttribute("aria-sort", "none");
      button.addEventListener("click", function () {
        sortBy(place, heading.getAttribute("aria-sort") === "ascending" ? -1 : 1);
      });
    });
    if (tests.length) {
      tools.appendChild(count);
      var holder = table.closest(".scroll") || table;
      holder.parentNode.insertBefore(tools, holder);
    }
    refresh();
  }

  document.querySelectorAll("table[data-table]").forEach(setUp);
})();

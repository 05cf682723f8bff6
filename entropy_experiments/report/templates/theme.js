// Light or dark before anything is painted: the reader's choice in this session, else the system's.
(function () {
  "use strict";
  try {
    var chosen = window.sessionStorage.getItem("entropy-report-theme");
    if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
  } catch (error) {
    // A page opened from disk may be refused storage: the system's theme holds.
    if (!(error instanceof DOMException)) throw error;
  }
  document.documentElement.classList.add("scripted");
})();

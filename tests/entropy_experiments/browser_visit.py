"""A report open in a real browser, for tests: what goes wrong in it is collected and must stay empty."""

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Playwright

REQUIRED = "ENTROPY_EXPERIMENTS_BROWSER_TESTS_REQUIRED"
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
FIGURES = ("training_history", "predicted_vs_actual", "entropy_split", "attribution", "weighting_schemes")


def launch(playwright: Playwright) -> Browser:
    """A headless Chromium; skips where there is none, and fails there if the environment requires one, as .ci/run does."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        give_up = pytest.fail if os.environ.get(REQUIRED) == "1" else pytest.skip
        give_up("no Chromium on the PATH: install one (Debian: apt install chromium) to run the browser tests")
    return playwright.chromium.launch(executable_path=found, args=list(ARGUMENTS))


class Visit:
    """One page open in a context of its own; what went wrong in it is collected and must stay empty.

    opened: with all its sections open, as after "Open all".
    """

    def __init__(self, browser: Browser, path: Path, opened: bool = True, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        self.page, self.problems, self.requests = self.context.new_page(), [], []
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in {"error", "warning"} else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append("dialog") or dialog.dismiss())
        self.page.on(
            "request", lambda r: self.requests.append(r.url) if not r.url.startswith(("data:", "blob:")) else None
        )
        self.page.goto(path.as_uri())
        if opened:
            self.page.evaluate("document.querySelectorAll('main details').forEach(section => { section.open = true; })")

    def reveal(self, element):
        """Open the sections around the element of this id."""
        opened = "id => { for (let e = document.getElementById(id); e; e = e.parentElement) if ('open' in e) e.open = true; }"
        self.page.evaluate(opened, element)

    def draw(self, *names):
        """Scroll to the figures until they are drawn."""
        for name in names:
            self.reveal(f"figure-{name}")
            self.page.locator(f"#figure-{name}").scroll_into_view_if_needed()
            self.page.wait_for_selector(f"#figure-{name}[data-drawn]", state="attached")

    def says_where_from(self, folder):
        """Every number names a file of `folder`, or of a folder that is compared, and every figure what it is drawn from."""
        without = """[...document.querySelectorAll('td.number, .headline dd, .verdict li, .finding, .facts td')]
            .filter(e => !e.closest('[title]')).map(e => e.textContent.slice(0, 60))"""
        assert self.page.evaluate(without) == []
        figures = self.page.evaluate("[...document.querySelectorAll('figcaption')].map(caption => caption.textContent)")
        assert figures and all("drawn from" in caption for caption in figures)
        titles = self.page.evaluate("[...document.querySelectorAll('[title^=\"From \"]')].map(e => e.title)")
        named = {title.removeprefix("From ").split(":")[0].split(",")[0] for title in titles}
        own = {name for name in named if not name.startswith("each side's ")}
        assert own <= {path.name for path in folder.iterdir()}, own

    def first_screen(self):
        """The leading sentences; everything below the figure beside them is closed, and the page is no wider than the window."""
        assert self.page.locator("details[open]").count() == 0 and self.page.locator(".first figure").count() == 1
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.page.viewport_size["width"]
        targets = self.page.evaluate("[...document.querySelectorAll('.chapters a')].map(a => a.getAttribute('href'))")
        there = self.page.evaluate("[...document.querySelectorAll('.chapter-body')].map(body => '#' + body.id)")
        assert targets == there
        return self.page.locator(".first .verdict li").all_inner_texts()

    def draw_kernel(self):
        self.reveal("kernel-explorer")
        self.page.evaluate("document.getElementById('kernel-explorer').scrollIntoView()")
        self.page.wait_for_selector("#kernel-explorer[data-drawn]", state="attached")

    def cell(self, x, y):
        """Where the heat map's cell (x, y) lies in the window, in pixels."""
        place = """([x, y]) => { const plot = document.getElementById('kernel-plot'), box = plot.getBoundingClientRect();
            const { xaxis, yaxis } = plot._fullLayout;
            return [box.left + xaxis._offset + xaxis.l2p(x), box.top + yaxis._offset + yaxis.l2p(y)]; }"""
        return self.page.evaluate(place, [x, y])

    def point(self, x, y, column):
        """Move the pointer to cell (x, y), and wait until the page says that training sequence `column` is there."""
        across, down = self.cell(x, y)
        self.page.mouse.move(across + 1, down)
        self.page.mouse.move(across, down)
        says = "words => { const tip = document.querySelector('.tip'); return !tip.hidden && tip.textContent.includes(words); }"
        self.page.wait_for_function(says, arg=f"training sequence {column},")

    def pick(self, x, y, column):
        """Click cell (x, y) of training sequence `column`, and wait until both texts are shown."""
        self.point(x, y, column)
        self.page.wait_for_timeout(400)  # two clicks in a short time would be a double-click
        self.page.mouse.click(*self.cell(x, y))
        shown = "words => (document.querySelector('.panel h3') || {textContent: ''}).textContent.startsWith(words)"
        self.page.wait_for_function(shown, arg=f"Training sequence {column} ")

    def close(self):
        assert not self.problems, self.problems
        assert len(self.requests) == 1, self.requests
        assert self.page.evaluate("window.pwned") is None
        self.context.close()


def by_prompt(rows):
    """Places of rows on an axis that is grouped by prompt."""
    return sorted(range(len(rows)), key=lambda i: (rows[i]["prompt_index"], i))

"""The report as it opens: a first screen, closed sections that links and print open, a cell's address, sources, accessibility."""

from pathlib import Path

import pytest

from entropy_experiments.records.reader import read_results_folder
from tests.entropy_experiments.browser_visit import Visit, by_prompt

pytestmark = pytest.mark.long

AXE = Path(__file__).parents[2] / "resources" / "axe-core" / "axe.min.js"
FIRST_SCREEN, WHOLE_PAGE = 1300, 2200
"""Pixels at a width of 1200: until the first closed section, and in all. Open, the page is ten times as long."""


@pytest.fixture
def closed(browser, whole_report):
    visit = Visit(browser, whole_report / "report.html", opened=False)
    yield visit
    visit.close()


def open_sections(page):
    return page.evaluate("[...document.querySelectorAll('.chapter[open] > .chapter-body')].map(body => body.id)")


def test_the_first_screen_has_verdict_figure_and_way_down(closed):
    page = closed.page
    page.wait_for_selector("#figure-training_history[data-drawn]")
    assert open_sections(page) == []
    first = page.locator(".first")
    sentences = first.locator(".verdict li").all_inner_texts()
    assert len(sentences) == 4 and sentences[0].startswith("In training entropy fell") and "They agree" in sentences[1]
    assert first.locator("figure").count() == 1 and "costs least reward" in first.locator(".next").inner_text()
    top = page.locator(".chapter").first.bounding_box()["y"]
    height = page.evaluate("document.documentElement.scrollHeight")
    assert top < FIRST_SCREEN and height < WHOLE_PAGE, (top, height)
    everything = page.locator(".verdict li").count()
    assert (
        page.locator("#rest-heading + .inside").inner_text() == f"{everything - 4} more sentences, 1 of them a warning"
    )


def test_every_link_opens_what_it_leads_to(closed):
    page = closed.page
    targets = page.evaluate("[...document.querySelectorAll('.first a, header a')].map(a => a.getAttribute('href'))")
    assert len(targets) >= 11 and "#kernels" in targets and "#section-prices" in targets
    for target in targets:
        page.evaluate("document.querySelectorAll('main details').forEach(section => { section.open = false; })")
        page.locator(f".first a[href='{target}'], header a[href='{target}']").first.click()
        page.wait_for_function("id => document.getElementById(id).checkVisibility()", arg=target[1:])
        top = "document.getElementById(id).getBoundingClientRect().top"
        page.wait_for_function(f"id => {top} >= 0 && {top} < innerHeight", arg=target[1:])


def test_all_sections_open_and_close_together(closed):
    page = closed.page
    page.get_by_role("button", name="Open all").click()
    assert page.locator("details:not([open])").count() == 0
    page.get_by_role("button", name="Close all").click()
    assert page.locator("main details[open]").count() == 0


def test_paper_holds_every_section(closed):
    page = closed.page
    page.emulate_media(media="print")
    for name in ("checks", "legend", "sequences", "section-prices"):
        assert page.locator(f"#{name}").is_visible(), name
    page.emulate_media(media="screen")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("main details[open]").count() == 0


def test_a_cell_has_an_address(browser, whole_report, closed):
    sequences = read_results_folder(whole_report)
    rows, columns = by_prompt(sequences.evaluation), by_prompt(sequences.training)
    closed.draw_kernel()
    closed.pick(40, 12, columns[40])
    address = f"#cell/entropy_fisher/{rows[12]}/{columns[40]}"
    assert closed.page.evaluate("location.hash") == address
    assert closed.page.locator(".panel a").get_attribute("href") == address
    status = closed.page.locator(".status").inner_text()
    closed.page.locator(".panelhead button").click()
    assert closed.page.evaluate("location.hash") == "", "no address of what is no longer shown"

    for kernel, shown in (("entropy_fisher", "Entropy–Fisher kernel K_H"), ("fisher", "Fisher kernel K₁")):
        other = Visit(browser, whole_report / "report.html", opened=False)
        other.page.goto("about:blank")
        other.page.goto((whole_report / "report.html").as_uri() + address.replace("entropy_fisher", kernel))
        other.page.wait_for_selector(".panel:not([hidden])")
        assert open_sections(other.page) == ["kernels"]
        assert other.page.locator(".status").inner_text().split(";")[:2] == status.split(";")[:2]
        chosen = "document.querySelector('[aria-label=\"Kernel shown\"]').selectedOptions[0].textContent"
        assert other.page.evaluate(chosen) == shown
        assert other.page.evaluate("document.activeElement.id") == "kernel-plot", "the keyboard goes on from the cell"
        assert not other.problems, other.problems
        other.context.close()


@pytest.mark.parametrize(
    "address", ["#cell/fisher/9999/0", "#cell/other/0/0", "#cell/fisher/-1/0", "#nowhere", "#%E0%A4"]
)
def test_an_address_that_names_nothing_opens_nothing(browser, whole_report, address):
    visit = Visit(browser, whole_report / "report.html", opened=False)
    visit.page.goto("about:blank")
    visit.page.goto((whole_report / "report.html").as_uri() + address)
    visit.page.wait_for_selector("#figure-training_history[data-drawn]")
    assert open_sections(visit.page) == [] and not visit.problems, visit.problems
    visit.context.close()


def test_every_number_says_where_it_comes_from(browser, whole_report):
    visit = Visit(browser, whole_report / "report.html")
    page = visit.page
    visit.says_where_from(whole_report)
    share = page.locator("table.training tbody tr").first.locator("td").nth(6)
    share.hover()
    assert share.get_attribute("title") == "From sequences.parquet: delta_h, delta_h_low, delta_h_high"
    visit.close()


VIEWS = {
    "light": {},
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 800}},
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("opened", [False, True], ids=["closed", "open"])
def test_axe_finds_nothing(browser, whole_report, view, opened):
    visit = Visit(browser, whole_report / "report.html", opened=opened, **VIEWS[view])
    page = visit.page
    if opened:
        visit.draw("attribution")
        visit.draw_kernel()
        page.locator("#kernel-plot").press("Enter")
        page.locator("#kernel-plot").press("Enter")
        page.locator(".more").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    told = [
        f"{one['id']} ({one['impact']}): {one['help']}; {[node['html'][:160] for node in one['nodes'][:3]]}"
        for one in found["violations"]
    ]
    assert not told, "\n".join(told)
    visit.close()

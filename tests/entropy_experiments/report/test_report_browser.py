"""The report in a real browser: drawn, hovered, clicked, filtered, dark, on paper, without JavaScript, under attack."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from entropy_experiments.records.reader import read_results_folder
from entropy_experiments.report import page as report_module
from entropy_experiments.report.page import render_report
from tests.entropy_experiments.browser_visit import FIGURES, Visit, by_prompt

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def visit(browser, whole_report):
    """The whole report, loaded once; tests leave nothing selected, sorted or filtered that matters to others."""
    opened = Visit(browser, whole_report / "report.html")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def kernels(whole_report):
    return load_file(whole_report / "kernel.safetensors")


@pytest.fixture(scope="module")
def sequences(whole_report):
    return read_results_folder(whole_report)


def shown_number(text):
    return float(text.replace("−", "-").replace(",", "").replace("+", ""))


def test_figures_are_drawn(visit):
    visit.draw(*FIGURES)
    visit.draw_kernel()
    page = visit.page
    for name in FIGURES:
        figure = page.locator(f"#figure-{name}")
        assert figure.locator(".main-svg").count() > 0 and not figure.locator("img").is_visible()
        assert len(figure.locator(".plot").get_attribute("aria-label")) > 40
    assert page.locator("#figure-attribution .bars .point").count() == 64
    assert page.locator("#kernel-plot .heatmaplayer image").count() == 1
    assert page.evaluate("Object.keys(window.localStorage).length") == 0


def test_no_figure_offers_to_send_itself_away(visit):
    visit.draw("attribution")
    titles = visit.page.evaluate("[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert titles and not [
        title for title in titles if "cloud" in (title or "").lower() or "share" in (title or "").lower()
    ]


def test_hovering_a_cell_names_sequences_and_values(visit, kernels, sequences):
    visit.draw_kernel()
    page, rows, columns = visit.page, by_prompt(sequences.evaluation), by_prompt(sequences.training)
    visit.point(21, 7, columns[21])
    evaluation, training, fisher, entropy_fisher = page.locator(".tip > div").all_inner_texts()
    row, column = rows[7], columns[21]
    assert evaluation == f"evaluation sequence {row}, prompt {sequences.evaluation[row]['prompt_index']}"
    assert training == f"training sequence {column}, prompt {sequences.training[column]['prompt_index']}"
    for line, name in ((fisher, "fisher"), (entropy_fisher, "entropy_fisher")):
        assert shown_number(line.split(" = ")[1].removesuffix(" (shown)")) == pytest.approx(
            kernels[name][row, column], rel=5e-3
        )


def test_clicking_a_cell_shows_both_sequences(visit, sequences):
    visit.draw_kernel()
    page, rows, columns = visit.page, by_prompt(sequences.evaluation), by_prompt(sequences.training)
    visit.pick(40, 12, columns[40])
    training, evaluation = page.locator(".panel .card").all()
    for card, wanted, title in (
        (training, sequences.training[columns[40]], f"Training sequence {columns[40]}"),
        (evaluation, sequences.evaluation[rows[12]], f"Evaluation sequence {rows[12]}"),
    ):
        assert card.locator("h3").inner_text().startswith(title)
        assert card.locator(".tokens").text_content() == wanted["completion"].replace("\n", "↵\n")
        card.locator("summary").click()
        assert card.locator("details .body").text_content() == wanted["prompt"]
        assert f"{wanted['reward']:g}" in card.locator(".cardfacts").inner_text()
    coloured = training.locator(".tokens .lowers, .tokens .raises")
    assert coloured.count() > 0 and evaluation.locator(".lowers, .raises").count() == 0
    for span in training.locator(".tokens span").all():
        said = next((line for line in span.get_attribute("title").split("\n") if "share" in line), "")
        value = shown_number(said.split(" ")[3])
        kind = span.get_attribute("class") or ""
        assert not kind or kind == ("lowers" if value < 0 else "raises")
    page.locator(".panelhead button").click()
    assert not page.locator(".panel").is_visible()
    assert page.evaluate("document.activeElement.id") == "kernel-plot"


def test_the_selected_cell_moves_by_keyboard(visit, sequences):
    visit.draw_kernel()
    page, rows, columns = visit.page, by_prompt(sequences.evaluation), by_prompt(sequences.training)
    plot, status = page.locator("#kernel-plot"), page.locator(".status")
    assert plot.get_attribute("tabindex") == "0" and status.get_attribute("aria-live") == "polite"
    assert plot.get_attribute("role") == "application" and "heat map" in plot.get_attribute("aria-label")
    plot.focus()

    def expect(x, y):
        prompt = sequences.evaluation[rows[y]]["prompt_index"]
        words = f"Evaluation sequence {rows[y]}, prompt {prompt}; training sequence {columns[x]},"
        page.wait_for_function("words => document.querySelector('.status').textContent.startsWith(words)", arg=words)

    page.keyboard.press("Home")
    for _ in range(40):
        page.keyboard.press("Shift+ArrowUp")
    expect(0, 0)
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    expect(2, 1)
    page.keyboard.press("Shift+ArrowRight")
    expect(12, 1)
    page.keyboard.press("End")
    page.keyboard.press("PageDown")
    expect(63, 2)
    assert not page.locator(".panel").is_visible()
    page.keyboard.press("Enter")
    page.wait_for_selector(".panel:not([hidden])")
    assert "Both texts are below" in status.inner_text()
    page.keyboard.press("ArrowLeft")
    expect(62, 2)
    assert page.locator(".panel h3").first.inner_text().startswith(f"Training sequence {columns[62]}"), (
        "the panel follows"
    )
    page.keyboard.press("Escape")
    assert not page.locator(".panel").is_visible()


def test_other_kernel_other_order_same_sequences(visit, kernels, sequences):
    visit.draw_kernel()
    page, rows = visit.page, by_prompt(sequences.evaluation)
    labels = sequences.summary.analyses.sequence_clustering.labels
    visit.pick(5, 9, by_prompt(sequences.training)[5])
    before = page.locator(".status").inner_text().split(";")[:2]
    page.get_by_label("Kernel shown").select_option(label="Fisher kernel K₁")
    page.get_by_label("Columns ordered").select_option(label="by cluster")
    z = "() => Array.from(document.getElementById('kernel-plot').data[0].z, row => Array.from(row))"
    order = page.evaluate("report.data('kernels').column_orders[1].order")
    assert [labels[i] for i in order] == sorted(labels)
    np.testing.assert_allclose(np.array(page.evaluate(z), np.float32), kernels["fisher"][rows][:, order])
    page.wait_for_function("document.querySelector('.status').textContent.includes('(shown); K_H')")
    assert page.locator(".status").inner_text().split(";")[:2] == before
    page.get_by_label("Columns ordered").select_option(label="by accounting share of Δh, lowest first")
    shares = [row["delta_h"] for row in sequences.training]
    np.testing.assert_allclose(np.array(page.evaluate(z), np.float32), kernels["fisher"][rows][:, np.argsort(shares)])
    page.get_by_label("Kernel shown").select_option(label="Entropy–Fisher kernel K_H")
    page.get_by_label("Columns ordered").select_option(label="by prompt")
    page.locator("#kernel-plot").press("Escape")
    assert not page.locator(".panel").is_visible()


def test_zooming_in_and_out(visit):
    visit.draw_kernel()
    page = visit.page
    (x0, y0), (x1, y1) = visit.cell(10, 4), visit.cell(30, 16)
    page.mouse.move(x0, y0)
    page.mouse.down()
    page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2)
    page.mouse.move(x1, y1)
    page.mouse.up()
    span = (
        "() => { const r = document.getElementById('kernel-plot').layout.xaxis.range; return Math.abs(r[1] - r[0]); }"
    )
    page.wait_for_function(f"({span})() < 30")
    page.locator("#kernel-explorer .tools").get_by_role("button", name="Zoom out").click()
    page.wait_for_function(f"({span})() === 64")


def test_clicking_a_share_shows_its_sequence(visit, sequences):
    visit.draw("attribution")
    page = visit.page
    order = sorted(sequences.training, key=lambda row: row["delta_h"])
    page.locator("#figure-attribution").scroll_into_view_if_needed()
    place = page.evaluate(
        """() => { const plot = document.querySelector('#figure-attribution .plot'), layout = plot._fullLayout,
        box = plot.getBoundingClientRect(); return [box.left + layout.xaxis._offset + layout.xaxis.l2p(1),
        box.top + layout.yaxis._offset + layout.yaxis.l2p(0) + 8]; }"""
    )
    page.mouse.move(place[0] + 3, place[1] + 3)
    page.mouse.click(*place)
    page.wait_for_selector("#figure-attribution .picked .card")
    assert (
        page.locator("#figure-attribution .picked h3").inner_text().startswith(f"Training sequence {order[0]['row']}")
    )


def column(page, place):
    return page.evaluate(
        "place => [...document.querySelectorAll('table.training tbody tr:not([hidden])')].map(r => r.cells[place].dataset.value)",
        place,
    )


def test_the_table_sorts_numerically_by_pointer_and_keyboard(visit, sequences):
    page = visit.page
    heading = page.locator("table.training thead th").nth(6)
    heading.locator("button").click()
    lengths = [int(value) for value in column(page, 6)]
    assert (
        lengths == sorted(row["length"] for row in sequences.training)
        and heading.get_attribute("aria-sort") == "ascending"
    )
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert [int(value) for value in column(page, 6)] == lengths[::-1] and heading.get_attribute(
        "aria-sort"
    ) == "descending"
    share = page.locator("table.training thead th").nth(7)
    assert share.get_attribute("aria-sort") == "none"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    values = [float(value) for value in column(page, 7)]
    assert (
        values == sorted(values)
        and share.get_attribute("aria-sort") == "ascending"
        and values[0] < -1e-4 < 1e-4 < values[-1]
    )


def test_the_table_searches_filters_and_expands(visit, sequences):
    page = visit.page
    search, count = page.get_by_role("searchbox"), page.locator(".tools .count")
    search.fill("THE ANSWER is")
    hits = [row for row in sequences.training if "the answer is" in row["completion"].lower()]
    assert (
        0 < len(hits) < 64
        and len(column(page, 0)) == len(hits)
        and count.inner_text() == f"{len(hits)} of 64 sequences"
    )
    assert count.get_attribute("aria-live") == "polite"
    search.fill("")
    page.get_by_label("Filter by Prompt").select_option("3")
    page.get_by_label("Filter by Entropy").select_option("lowered")
    wanted = {str(row["row"]) for row in sequences.training if row["prompt_index"] == 3 and row["delta_h"] < 0}
    assert wanted and set(column(page, 0)) == wanted
    page.get_by_label("Filter by Prompt").select_option("")
    page.get_by_label("Filter by Entropy").select_option("")
    page.get_by_label("Filter by Reward").select_option("1")
    assert len(column(page, 0)) == sum(row["reward"] == 1 for row in sequences.training)
    page.get_by_label("Filter by Reward").select_option("")
    more = page.locator("table.training .more").first
    more.focus()
    page.keyboard.press("Enter")
    row = int(page.locator("table.training tbody tr").first.get_attribute("data-row"))
    assert more.get_attribute("aria-expanded") == "true"
    assert page.locator(".detail .tokens").inner_text().replace("↵", "") == sequences.training[row]["completion"]
    page.locator("table.training thead th").nth(6).locator("button").click()
    after = page.locator(f"table.training tr[data-row='{row}'] + tr")
    assert after.get_attribute("class") == "detail", "the open text travels with its row"
    more = page.locator(f"table.training tr[data-row='{row}'] .more")
    more.click()
    assert page.locator(".detail").count() == 0 and more.get_attribute("aria-expanded") == "false"


def test_dark_and_light(browser, whole_report):
    dark = Visit(browser, whole_report / "report.html", color_scheme="dark")
    page = dark.page
    dark.draw("entropy_split")
    background = "getComputedStyle(document.body).backgroundColor"
    ink = "document.querySelector('#figure-entropy_split .plot').layout.font.color"
    assert page.evaluate(background) == "rgb(20, 24, 29)" and page.evaluate(ink) == "#e6eaef"
    page.get_by_role("button", name="Switch to the light page").click()
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.wait_for_function(f"{ink} === '#1b1f24'")
    page.reload()
    assert page.evaluate(background) == "rgb(255, 255, 255)", "kept for the session"
    page.get_by_role("button", name="Switch to the dark page").click()
    page.emulate_media(media="print")
    assert page.evaluate(background) == "rgb(255, 255, 255)", "paper is white"
    dark.requests.pop()
    dark.close()


def test_without_javascript_there_are_pictures_and_the_whole_table(browser, whole_report):
    plain = browser.new_context(java_script_enabled=False)
    page = plain.new_page()
    page.goto((whole_report / "report.html").as_uri())
    for summary in page.locator(".chapter > summary, .numbers > summary").all():
        summary.click()
    pictures = page.locator("figure img")
    assert pictures.count() == len(list((whole_report / "figures").iterdir()))
    assert all(picture.is_visible() for picture in pictures.all()) and page.locator(".plot").count() == 0
    assert page.locator("table.training tbody tr").count() == 64 and not page.locator("#theme").is_visible()
    plain.close()


def test_print_shows_the_pictures(visit):
    page = visit.page
    page.emulate_media(media="print")
    assert all(picture.is_visible() for picture in page.locator("figure img").all())
    hidden = (".plot", "#kernel-explorer", ".tools", "#theme")
    assert not any(page.locator(selector).first.is_visible() for selector in hidden)
    displays = page.locator("table.training tbody tr").evaluate_all(
        "rows => rows.map(r => getComputedStyle(r).display)"
    )
    assert len(displays) - displays.count("none") == 30, "of a long table, both ends"
    page.emulate_media(media="screen")


def test_a_slider_steps_through_its_pictures(browser, whole_report, tmp_path, images, monkeypatch):
    steps = [
        {"label": f"step {k}", "data": [{"type": "bar", "x": [1], "y": [k], "marker": {"color": "$reward"}}]}
        for k in (2, 4, 8)
    ]
    spec = {"slider": {"label": "Checkpoint", "start": 1}, "steps": steps, "layout": {"height": 300}}
    monkeypatch.setattr(report_module, "interactive_figures", lambda results: {"attribution": spec})
    path = tmp_path / "report.html"
    path.write_text(render_report(read_results_folder(whole_report), images), encoding="utf-8")
    sliding = Visit(browser, path)
    page = sliding.page
    sliding.draw("attribution")
    slider = page.get_by_role("slider", name="Checkpoint")
    height = "document.querySelector('#figure-attribution .plot').data[0].y[0]"
    assert page.evaluate(height) == 4 and slider.get_attribute("aria-valuetext") == "step 4"
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"{height} === 8")
    assert slider.get_attribute("aria-valuetext") == "step 8" == page.locator(".slider output").inner_text()
    page.keyboard.press("Home")
    page.wait_for_function(f"{height} === 2")
    sliding.close()

"""The report in a real browser, at its limits: text that attacks it, many long sequences, the network."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from entropy_experiments.records.reader import read_results_folder
from entropy_experiments.report.page import render_report
from tests.entropy_experiments.browser_visit import FIGURES, Visit, by_prompt
from tests.entropy_experiments.results_fixture import (
    build_results,
    make_run,
    make_sequences,
    make_summary,
    token_shares,
    write_json,
    write_sequences,
)

pytestmark = pytest.mark.long

HOSTILE = (
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=2>",
    "</script><script>window.pwned=3</script><!--",
    '"><svg onload=window.pwned=4>',
    "<a href='javascript:window.pwned=5'>click</a>",
    "\u202egnihton \u2066 \u2028 \u2029",
    "null\x00byte \x1b[31m",
    "L" * 10_000,
    "👩‍🔬 שלום 日本 é",
    "{{ 7 * 7 }} ${window.pwned=6} %{y}<br>",
)


def test_the_policy_forbids_the_network_and_foreign_scripts(browser, whole_report):
    other = Visit(browser, whole_report / "report.html")
    page = other.page
    assert page.evaluate("fetch('https://example.org').then(() => 'reached', () => 'refused')") == "refused"
    page.evaluate(
        "{ const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s); }"
    )
    assert page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in problem for problem in other.problems)
    other.context.close()


def test_hostile_text_is_shown_and_runs_nothing(browser, tmp_path, images, whole_report):
    folder = build_results(tmp_path / "hostile")
    rows, fisher, entropy_fisher = make_sequences(np.random.default_rng(0))
    for place, row in enumerate(rows):
        text = HOSTILE[place % len(HOSTILE)]
        row["completion"], row["prompt"] = text, f"{text} {row['prompt']} {text}"
        row["token_texts"] = [text, *[""] * (row["length"] - 1)] if place % 2 else [*[""] * (row["length"] - 1), text]
    write_sequences(folder, rows)
    summary, run = make_summary(rows), make_run()
    summary["checkpoint"]["model"] = HOSTILE[0] + HOSTILE[2]
    schemes = json.loads((whole_report / "summary.json").read_text())["analyses"]["weighting_schemes"]
    for place, scheme in enumerate(schemes["rows"]):
        scheme["label"] = HOSTILE[place % len(HOSTILE)]
    summary["analyses"] = {"weighting_schemes": schemes}
    run["command"] = HOSTILE[1]
    write_json(folder, "summary.json", summary)
    write_json(folder, "run.json", run)
    path = folder / "report.html"
    path.write_text(render_report(read_results_folder(folder), images), encoding="utf-8")
    attacked = Visit(browser, path)
    page = attacked.page
    assert HOSTILE[0] in page.locator("h1").inner_text() and page.locator("h1").count() == 1
    attacked.draw(*FIGURES)
    attacked.draw_kernel()
    training = [row for row in rows if row["buffer"] == "training"]
    order = by_prompt(training)
    for x in range(len(HOSTILE)):
        attacked.pick(x, 3, order[x])
        shown = page.locator(".panel .card").first.locator(".tokens").text_content().removesuffix("∅")
        text = training[order[x]]["completion"]
        assert shown and "\x00" not in shown and "\u202e" not in shown and "\u2028" not in shown
        if text.isascii() and text.isprintable() and len(text) < 200:
            assert shown == text
    assert page.locator("svg a").count() == page.locator(".panel .card a").count() == 0
    assert page.locator(".panel a").all_inner_texts() == ["Link to this cell"]
    for button in page.locator("table.training .more").all()[:10]:
        button.click()
    assert page.locator(".detail").count() == 10 and page.locator("img[src='x']").count() == 0
    box = page.locator("#figure-attribution .plot").bounding_box()
    for part in (0.2, 0.5, 0.9):
        page.mouse.move(box["x"] + part * box["width"], box["y"] + 0.5 * box["height"])
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200, "long lines do not widen the page"
    attacked.close()


def seconds_of_work(session):
    """What the page's own thread spent on the processor since its navigation."""
    return {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}["TaskDuration"]


def test_a_large_analysis_stays_small_and_quick(browser, tmp_path, images, whole_report, record_property):
    """128 x 256 sequences of 200 tokens: below 20 MB, and below 3 s of the page's own time until the figures are drawn."""
    folder = build_results(tmp_path / "large")
    rows, fisher, entropy_fisher = make_sequences(np.random.default_rng(1), 128, 32, 8)
    for row in rows:
        row["completion"] = " ".join([row["completion"]] * 200)
        row |= {"length": 200, "token_texts": [f" word{k}" for k in range(200)], "completion_ids": list(range(200))}
        row |= {"logprobs": [-0.5] * 200, "entropies": [0.7] * 200}
        row["token_shares"] = None if row["delta_h"] is None else token_shares(row["delta_h"], 200)
    write_sequences(folder, rows)
    save_file({"fisher": fisher, "entropy_fisher": entropy_fisher}, folder / "kernel.safetensors")
    summary = make_summary(rows)
    analyses = json.loads((whole_report / "summary.json").read_text())["analyses"]
    summary["analyses"] = {name: result for name, result in analyses.items() if name != "attribution"}
    times = fisher.shape[1] // len(
        analyses["sequence_clustering"]["labels"]
    )  # the small folder's, for as many sequences
    for name in ("labels", "spectral_labels"):
        analyses["sequence_clustering"][name] *= times
    for weights in analyses["weighting_schemes"]["weights"].values():
        weights *= times
    write_json(folder, "summary.json", summary)
    path = folder / "report.html"
    path.write_text(render_report(read_results_folder(folder), images), encoding="utf-8")
    assert fisher.shape == (128, 256) and path.stat().st_size < 20e6

    large = Visit(browser, path)
    page = large.page
    ready = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
    large.draw(*FIGURES)
    large.draw_kernel()
    # On a busy machine the clock also counts what others do: the time that counts is what the page's own thread spent.
    session = large.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.reload()
    large.draw("training_history")
    spent = seconds_of_work(session)
    large.draw(*FIGURES)
    large.draw_kernel()
    spent_all = seconds_of_work(session)
    print(f"\n{path.stat().st_size / 1e6:.1f} MB; loaded after {ready:.2f} s by the clock")
    print(f"work of the page: {spent:.2f} s to the first figure, {spent_all:.2f} s to the last")
    record_property("seconds_to_first_figure", spent)
    assert spent < 3 and spent_all < 4.5

    training = [row for row in rows if row["buffer"] == "training"]
    large.pick(200, 100, by_prompt(training)[200])
    assert page.locator(".panel .card").first.locator(".tokens span").count() == 200
    large.requests.pop()
    large.close()

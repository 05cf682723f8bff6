"""The sweep's figures show the planted numbers, its verdict says them, and its page works in a real browser."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from entropy_experiments.records.record import json_of
from entropy_experiments.records.sweep_record import SweepEntry
from entropy_experiments.report.figures.plots import (
    caption_of,
    plot_checkpoint_kernels,
    plot_cluster_flow,
    plot_entropy_changes,
    plot_entropy_law,
    plot_fisher_evolution,
    plot_kernel_evolution,
)
from entropy_experiments.report.interactive import checkpoint_slider as slider_module
from entropy_experiments.report.interactive.checkpoint_slider import checkpoint_slider
from entropy_experiments.report.interactive.evolution import evolution_plot, kernel_plot, law_plot
from entropy_experiments.report.interactive.page import render_page
from entropy_experiments.sweep.config import SweepConfig
from entropy_experiments.sweep.evolution.evolution import describe_evolution
from entropy_experiments.sweep.figures import CHARTS
from entropy_experiments.sweep.page import sweep_figures, sweep_page
from entropy_experiments.sweep.verdict import read_sweep_verdict, run_sentences, write_sweep_verdict
from rl_training.errors import UserError
from tests.entropy_experiments.browser_visit import Visit
from tests.entropy_experiments.planted_run import planted_run
from tests.entropy_experiments.whole_summary import sweep_record

HOSTILE = (
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=2>",
    "</script><script>window.pwned=3</script><!--",
    "\u202egnihton \u2066 \u2028 \u2029",
    "null\x00byte \x1b[31m",
    "L" * 10_000,
    "%{y}<br><b>bold</b>",
)


@pytest.fixture(scope="module")
def run():
    folders, history = planted_run(8)
    return folders, describe_evolution(folders, history, permutations=19)


def entry(results, **changes):
    known = {
        "name": results.path.name,
        "run": "planted",
        "step": results.summary.checkpoint.step,
        "checkpoint": "x",
        "status": "done",
        "error": None,
        "folder": f"checkpoints/{results.path.name}",
        "seconds": 60.0,
    }
    return SweepEntry(**(known | changes))


def sweep_of(entries, runs=("planted",)):
    return sweep_record(entries, {run: f"/runs/{run}" for run in runs}, SweepConfig().model_dump(mode="json"))


def write_page(target, evolutions, entries):
    found = {run: evolution for run, (evolution, _) in evolutions.items()}
    report = target / "report.html"
    report.write_text(render_page(sweep_page(sweep_of(entries, evolutions), found, sweep_figures(evolutions))))
    return report


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    folders, evolution = run
    broken = entry(folders[0], name="planted_checkpoint-99", step=99, status="failed", error=HOSTILE[0])
    entries = [*(entry(folder) for folder in folders), broken]
    target = tmp_path_factory.mktemp("sweep_page")
    for folder in folders:
        (target / "checkpoints" / folder.path.name).mkdir(parents=True)
        (target / "checkpoints" / folder.path.name / "report.html").write_text("<title>its own</title>")
    return write_page(target, {"planted": (evolution, folders)}, entries)


def values(axes, label):
    """The y data of the line or error bar of this label."""
    for container in axes.containers:
        if container.get_label() == label:
            return container.lines[0].get_ydata()
    raise AssertionError(f"no {label!r} among {[c.get_label() for c in axes.containers]}")


def slider_titles(folders, rows):
    plot = checkpoint_slider(folders, rows)
    return "" if plot is None else str([step["layout"]["title"] for step in plot["steps"]])


def test_figures_hold_the_numbers(run):
    _, evolution = run
    rows = evolution.checkpoints
    left, right = plot_entropy_changes(evolution).axes
    expected = [row.predicted.momentum.value for row in rows]
    assert values(left, "momentum (earlier batches)") == pytest.approx(expected)
    assert values(left, "measured") == pytest.approx([row.actual.value for row in rows])
    observed = [number.value for number in evolution.path.observed]
    assert values(right, "what entropy did") == pytest.approx(observed)
    assert "nats per token" in left.get_ylabel() and right.get_xlabel() == "training step"
    kernel = plot_kernel_evolution(evolution)
    aligned = [change.alignment.value for change in evolution.changes]
    assert values(kernel.axes[3], "alignment on evaluation prompts (debiased CKA)") == pytest.approx(aligned)
    assert values(kernel.axes[1], "rank of training gradients") == pytest.approx([r.training_rank.value for r in rows])
    overview = plot_fisher_evolution(evolution)
    assert "Over the 8 steps with both" in caption_of(overview) and "left out" not in caption_of(overview)
    doubted = rows[3].model_copy(
        update={"actual": rows[3].actual.model_copy(update={"value": 9.0, "trustworthy": False})}
    )
    known = evolution.model_copy(update={"checkpoints": (*rows[:3], doubted, *rows[4:])})
    text = caption_of(plot_fisher_evolution(known))
    assert "Over the 7 steps with both, predicted and measured: correlation 1 (exact)" in text, "as in the verdict"
    assert "1 step with too small an effective sample left out" in text
    folders = run[0]
    assert "(untrusted)" not in slider_titles(folders, rows) and "(untrusted)" in slider_titles(
        folders, known.checkpoints
    )
    (shown,) = (s.tables[0] for s in sweep_page(sweep_of(
        [entry(folder) for folder in folders], ["planted"]), {"planted": known}, {"planted": [None]}
    ).sections if s.name == "checkpoints")  # fmt: skip
    assert [row[5].endswith("(untrusted)") for row in shown.texts] == [k == 3 for k in range(8)]
    assert overview.axes[0].lines[0].get_ydata() == pytest.approx([row.entropy.value for row in rows])


def test_law_figure_separates_what_was_known_from_what_came(run):
    law = run[1].law.training
    left, right = plot_entropy_law(law).axes
    first = law.forecast.n
    lines = {line.get_label(): line for line in right.lines}
    assert len(lines[f"first {first} steps"].get_xdata()) == first
    assert lines[f"the {8 - first} steps that came"].get_ydata() == pytest.approx(law.points.reward[first:])
    assert left.get_ylabel() == "mean reward R" and "nats per token" in left.get_xlabel()


def test_cluster_and_kernel_figures(run):
    folders, evolution = run
    panel = plot_cluster_flow(evolution).axes[0]
    np.testing.assert_allclose(panel.images[0].get_array(), np.array(evolution.changes[0].likeness, float))
    kernel = folders[0].kernels["fisher"]
    columns = np.array([row["prompt_index"] for row in folders[0].training])
    figure = plot_checkpoint_kernels([(0, kernel, np.arange(len(kernel))[::-1], columns)])
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert np.corrcoef(shown.ravel(), kernel[::-1].ravel())[0, 1] == pytest.approx(1.0), "rows by prompt"


def test_nothing_to_draw_is_said():
    folders, history = planted_run(1)
    one = describe_evolution(folders, history)
    for figure in (
        plot_cluster_flow(one), plot_checkpoint_kernels([]), plot_entropy_law(describe_evolution(folders, []).law.training)
    ):  # fmt: skip
        assert caption_of(figure).startswith("No data")
    assert "one checkpoint" not in caption_of(plot_entropy_changes(one)) and kernel_plot(one) and evolution_plot(one)
    assert law_plot(one.law.training) is None


def test_plots_hold_the_numbers(run):
    _, evolution = run
    traces = {trace["name"]: trace for trace in evolution_plot(evolution)["data"]}
    rows = evolution.checkpoints
    assert traces["predicted, all parts"]["y"] == pytest.approx([row.predicted.total.value for row in rows], rel=1e-5)
    t23 = float(stats.t.ppf(0.975, 23))
    assert traces["measured"]["error_y"]["array"] == pytest.approx([t23 * 0.02] * 8), "bars are not 95% intervals"
    aligned = {trace["name"]: trace for trace in kernel_plot(evolution)["data"]}[
        "alignment on evaluation prompts (debiased CKA)"
    ]
    assert aligned["x"] == [change.to_step for change in evolution.changes]
    points = {trace["name"]: trace for trace in law_plot(evolution.law.training)["data"] if "name" in trace}
    assert points["steps after them"]["customdata"] == (4, 5, 6, 7)


def test_slider_has_a_step_a_checkpoint(run, monkeypatch):
    folders, evolution = run
    plot = checkpoint_slider(folders, evolution.checkpoints)
    assert [step["label"] for step in plot["steps"]] == [f"step {k}" for k in range(8)]
    heat, bars = plot["steps"][3]["data"]
    rows, columns = map(int, heat["z"]["shape"].split(","))
    shown = np.frombuffer(base64.b64decode(heat["z"]["bdata"]), "<f4").reshape(rows, columns)
    order = np.argsort([row["prompt_index"] for row in folders[3].training], kind="stable")
    np.testing.assert_allclose(shown, folders[3].kernels["fisher"][:, order], rtol=1e-6)
    assert bars["y"] == pytest.approx([1e3 * folders[3].training[i]["delta_h"] for i in order], rel=1e-5)
    monkeypatch.setattr(slider_module, "MOST_CELLS", 3 * shown.size)
    fewer = checkpoint_slider(folders, evolution.checkpoints)
    assert [step["label"] for step in fewer["steps"]] == ["step 0", "step 4", "step 7"]
    without = [replace(folder, kernels={}) for folder in folders]
    assert checkpoint_slider(without, evolution.checkpoints) is None


def test_verdict_tells_the_planted_story(run):
    folders, evolution = run
    entries = [entry(folder) for folder in folders]
    sentences = write_sweep_verdict(sweep_of(entries), {"planted": evolution})
    text = " ".join(sentence.text for sentence in sentences)
    for words in (
        "entropy fell", "at 8 of 8", "they agree", "came from momentum", "R = −a·e^H + b", "8 checkpoints",
    ):  # fmt: skip
        assert words in text, words
    kernel = next(sentence.text for sentence in sentences if "effective rank" in sentence.text)
    ends = [evolution.checkpoints[k].effective_rank.known().text(plus=False) for k in (0, -1)]
    assert f"their effective rank is {ends[0]} at first and {ends[1]} at last" in kernel and "went from" not in kernel
    folders, history = planted_run(12, bias=3.0)
    biased = describe_evolution(folders, history, permutations=19)
    assert "do NOT agree" in " ".join(s.text for s in write_sweep_verdict(sweep_of([]), {"x": biased}))
    rows = list(evolution.checkpoints)
    rows[2] = rows[2].model_copy(update={"failed_checks": ("rows = autograd",)})
    failing = evolution.model_copy(update={"checkpoints": tuple(rows)})
    broken = entry(folders[0], status="failed", error="no optimizer.pt")
    worst = write_sweep_verdict(sweep_of([*entries, broken]), {"planted": failing})
    assert "1 of 9 checkpoints MISSING" in worst[0].text and "no optimizer.pt" in worst[0].text
    assert worst[1].tone == "bad" and "step 2" in worst[1].text, "what failed comes first"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("sweep.json", lambda c: c.pop("format_version"), "older version"),
        ("sweep.json", lambda c: c.update(format_version=99), "upgrade entropy-experiments"),
        ("sweep.json", lambda c: c["checkpoints"][0].update(status="fine"), r"checkpoints\[0\]\.status"),
        ("sweep.json", lambda c: c["checkpoints"][0].pop("folder"), r"checkpoints\[0\]\.folder is missing"),
        ("evolution.json", lambda c: c["planted"]["whole"].update(observed="-1"), r"planted\.whole\.observed"),
        ("evolution.json", lambda c: c["planted"]["path"]["step"].pop(), "one each is needed"),
        ("evolution.json", lambda c: c["planted"].update(sentence="x"), r"planted\.sentence is no field"),
        ("evolution.json", lambda c: c["planted"]["law"]["training"]["fit"].update(a=None), "law.training.fit.a"),
    ],
)
def test_a_malformed_sweep_is_refused_in_one_line(run, tmp_path, file, change, words):
    folders, evolution = run
    contents = {
        "sweep.json": json_of(sweep_of([entry(folder) for folder in folders])),
        "evolution.json": {"planted": json_of(evolution)},
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read_sweep_verdict(tmp_path) == write_sweep_verdict(
        sweep_of([entry(folder) for folder in folders]), {"planted": evolution}
    )
    change(contents[file])
    (tmp_path / file).write_text(json.dumps(contents[file]))
    with pytest.raises(UserError, match=words) as refused:
        read_sweep_verdict(tmp_path)
    assert "\n" not in str(refused.value) and file in str(refused.value) and "--assemble" in str(refused.value)


@pytest.mark.slow
@pytest.mark.long
def test_the_page_in_a_browser(browser, page):
    """Figures are drawn, the slider moves by key, the table sorts and leads on, it is dark on demand."""
    closed = Visit(browser, page, opened=False, viewport={"width": 390, "height": 800})
    sentences = closed.first_screen()
    assert "MISSING" in sentences[0] and "entropy fell" in sentences[1] and len(sentences) <= 6
    closed.close()
    visit = Visit(browser, page)
    tab = visit.page
    for name in ("sweep.json", "evolution.json"):
        (page.parent / name).touch()  # written beside the page, see sweep/assemble.py
    visit.says_where_from(page.parent)
    assert tab.locator(".verdict li").count() >= 8 and tab.locator(".verdict .bad").count() == 1
    visit.draw("evolution-1", "law-1", "kernel-1", "kernels-1")
    slider = tab.locator("#figure-kernels-1 input[type=range]")
    title = (
        "document.querySelector('#figure-kernels-1 .js-plotly-plot, #figure-kernels-1 .plot')._fullLayout.title.text"
    )
    assert tab.locator("#figure-kernels-1 output").inner_text() == "step 7"
    assert tab.evaluate(title).startswith("Step 7:")
    slider.focus()
    tab.keyboard.press("Home")
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#figure-kernels-1 output").inner_text() == "step 1"
    assert slider.get_attribute("aria-valuetext") == "step 1"
    tab.wait_for_function(f"{title}.startsWith('Step 1:')")
    heat = "document.querySelector('#figure-kernels-1 .plot')._fullData[0]"
    assert tab.evaluate(f"[{heat}.z.length, {heat}.z[0].length]") == [24, 24]
    assert tab.locator("#checkpoints tbody tr").count() == 9
    tab.locator("th", has_text="Predicted").locator("button").click()
    steps = tab.locator("#checkpoints tbody tr td:nth-child(2)").all_inner_texts()
    assert steps[:8] != [str(k) for k in range(8)], "sorted by the predicted change"
    assert HOSTILE[0] in tab.locator("#checkpoints tbody").inner_text(), "shown as text"
    ground = "window.getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(ground)
    tab.click("#theme")
    assert tab.evaluate(ground) != light
    link = tab.locator("a", has_text="report").first.get_attribute("href")
    assert (page.parent / link).is_file()
    visit.close()


@pytest.mark.slow
def test_without_javascript_the_pictures_remain(browser, page):
    visit = Visit(browser, page, java_script_enabled=False)
    for chart in CHARTS:
        picture = visit.page.locator(f"#figure-{chart}-1 img")
        assert picture.is_visible() and len(picture.get_attribute("alt")) > 40
    visit.context.close()


@pytest.mark.long
@pytest.mark.slow
def test_hostile_text_runs_nothing(browser, run, tmp_path):
    folders, _ = run
    hostile = []
    for folder in folders[:2]:
        training = [
            r | {"prompt": HOSTILE[i % len(HOSTILE)], "completion": HOSTILE[-i % len(HOSTILE)]}
            for i, r in enumerate(folder.training)
        ]
        hostile.append(replace(folder, training=training))
    evolution = describe_evolution(hostile, [], permutations=19)
    name = "<img src=x onerror=window.pwned=9>"
    entries = [entry(folder, run=name, name=name, folder=f"checkpoints/{name}") for folder in hostile]
    visit = Visit(browser, write_page(tmp_path, {name: (evolution, hostile)}, entries))
    visit.draw("evolution-1", "kernels-1")
    visit.page.wait_for_timeout(300)
    assert name in visit.page.locator("h1").inner_text()
    visit.close()


def test_few_prompts_behind_a_verdict_are_told(run):
    """The sentence of reports and ledgers: a sweep was silent."""
    _, evolution = run
    few = evolution.model_copy(update={"comparable": evolution.comparable.model_copy(update={"prompts": 6, "of": 6})})
    sentences = [one for one in run_sentences(few) if "Intervals rest on 6 evaluation prompts" in one.text]
    assert [one.tone for one in sentences] == ["warning"]
    assert not any("Intervals rest on" in one.text for one in run_sentences(evolution))

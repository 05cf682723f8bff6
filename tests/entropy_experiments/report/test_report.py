"""The report: its numbers are the folder's, hostile text stays text, broken folders give one line."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import load_file

from entropy_experiments.records.reader import read_results_folder
from entropy_experiments.report.findings import FINDINGS
from entropy_experiments.report.page import write_report
from entropy_experiments.report.sections import PRESENTATIONS
from entropy_experiments.text.display import clip, prompt_frame, quoted, visible
from tests.entropy_experiments.results_fixture import (
    build_results,
    make_run,
    make_sequences,
    make_summary,
    write_json,
    write_sequences,
)
from tests.unpainted import painted

FIGURES = {
    "training_history",
    "predicted_vs_actual",
    "entropy_split",
    "attribution",
    "kernel_fisher",
    "kernel_entropy_fisher",
} | {name for presentation in PRESENTATIONS.values() for name in presentation.figures}


class Page(HTMLParser):
    """Tags, images, scripts, and the cells of every table row, as a browser would see them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.images, self.rows, self.text, self.classes = [], [], [], "", []
        self.scripts, self.policy = [], ""
        self._cell = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.classes.append((tag, attrs.get("class")))
        assert not any(name.startswith("on") for name in attrs), f"event handler in <{tag}>"
        if tag == "script":
            self.scripts.append((attrs, ""))
        if attrs.get("http-equiv") == "Content-Security-Policy":
            self.policy = attrs["content"]
        if tag == "img":
            self.images.append(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"} and self.rows:
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in {"td", "th"} and self._cell is not None:
            self.rows[-1].append(self._cell)
            self._cell = None

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
            return
        self.text += data
        if self._cell is not None:
            self._cell += data


@pytest.fixture(scope="module")
def written(whole_report):
    html = (whole_report / "report.html").read_text(encoding="utf-8")
    return whole_report, html, Page(html)


def training_rows(seed=0):
    rows, _, _ = make_sequences(np.random.default_rng(seed))
    return rows, sorted((row for row in rows if row["buffer"] == "training"), key=lambda row: row["delta_h"])


def thousandths(value):
    return f"{value * 1e3:+.3g}".replace("-", "−")


@pytest.mark.long
def test_figures_are_written_and_embedded(written):
    folder, _, page = written
    assert {path.stem for path in (folder / "figures").iterdir()} == FIGURES
    assert len(page.images) == len(FIGURES)
    for image in page.images:
        png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        assert png.startswith(b"\x89PNG") and any(png == path.read_bytes() for path in (folder / "figures").iterdir())
        assert len(image["alt"]) > 40, "an alternative text says what is seen"


def test_page_needs_no_network_and_runs_only_its_own_scripts(written):
    _, html, page = written
    programs = [text for attributes, text in page.scripts if not attributes]
    assert len(programs) == 7 and any("plotly.js" in text[:100] for text in programs)
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in programs}
    directives = dict(part.strip().split(" ", 1) for part in page.policy.split(";"))
    assert directives["default-src"] == "'none'" and set(directives["script-src"].split()) == hashes
    assert directives["img-src"] == "data: blob:" and "connect-src" not in directives
    others = [attributes for attributes, _ in page.scripts if attributes]
    assert all(set(attributes) == {"type", "id"} and attributes["type"] == "application/json" for attributes in others)
    rest = re.sub(r"[A-Za-z0-9+/]{20,}={0,2}", "", html.replace(max(programs, key=len), ""))  # pictures and kernels
    assert not re.search(r"https?://|//[a-z]|@import|url\(", rest)
    assert not {"link", "iframe", "object"} & set(page.tags)


def test_verdict_and_headline_carry_the_summary_numbers(written):
    _, _, page = written
    for words in (
        "In training entropy fell: 1.73 on average over steps 0 to 3, 0.284 over steps 9 to 12, a change of −1.45 [−1.60, −1.29]",
        "−0.074 [−0.111, −0.037]",
        "−0.080 [−0.125, −0.035]",
        "They agree: they differ by",
        "27.5 of 32",
        "7 of 7",
        "0.842 ± 0.071",
        "All 7 self-checks passed",
    ):
        assert words in page.text, words


def test_the_sequence_table_holds_all_of_them_by_share(written):
    _, _, page = written
    _, ordered = training_rows()
    head = next(place for place, row in enumerate(page.rows) if row[:2] == ["Sequence", "Prompt"])
    table = page.rows[head + 1 : head + 65]
    assert [cells[0] for cells in table] == [str(row["row"]) for row in ordered]
    assert page.rows[head + 65][0] == "Prompt", "the next table"
    for cells, row in zip(table, ordered, strict=True):
        assert cells[1] == str(row["prompt_index"]) and cells[3] == row["completion"].replace("\n", " ↵ ")
        assert cells[4] == f"{row['reward']:g}"
        assert float(cells[5].replace("−", "-")) == pytest.approx(row["advantage"], rel=5e-3)
        assert float(cells[7].replace("−", "-")) == pytest.approx(row["delta_h"] * 1e3, rel=5e-3)
        assert float(cells[8].replace("−", "-")) == pytest.approx(row["effect_of_leaving_out"] * 1e3, rel=5e-3)


def test_prompt_sums_add_up_to_the_batch_part(written):
    folder, _, page = written
    sums = [row for row in page.rows if len(row) == 6 and row[2] == "8"]
    assert len(sums) == 8
    total = sum(float(row[4].replace("−", "-")) for row in sums)
    batch = json.loads((folder / "summary.json").read_text())["predicted"]["rao_blackwell"]["batch"]["value"]
    assert total == pytest.approx(batch * 1e3, abs=0.05)
    effects = sum(row["effect_of_leaving_out"] for row in training_rows()[1])
    assert sum(float(row[5].replace("−", "-")) for row in sums) == pytest.approx(effects * 1e3, abs=0.05)


def test_buffer_table_is_computed_from_the_sequences(written):
    _, _, page = written
    rows, _ = training_rows()
    cells = {row[0]: row[1:] for row in page.rows if len(row) == 3}
    assert cells["Sequences"] == ["32", "64"] and cells["Prompts"] == ["32", "8"]
    for column, name in enumerate(("evaluation", "training")):
        members = [row for row in rows if row["buffer"] == name]
        entropy = sum(row["entropy_sum"] for row in members) / sum(row["length"] for row in members)
        assert float(cells["Entropy, nats per token"][column]) == pytest.approx(entropy, rel=5e-3)
    assert cells["Sequences generated"] == ["–", "96"]


def test_provenance_and_legend(written):
    _, _, page = written
    for words in (
        "entropy-experiments analyze runs/collapse",
        "0123456789abcdef",
        "torch 2.13.0",
        "gradients 88.4 s",
        "K₁(t, i)",
        "K_H(t, i)",
        "Below zero: entropy was lost",
    ):
        assert words in page.text, words


@pytest.mark.long
def test_report_is_deterministic(written, tmp_path):
    _, html, _ = written
    with painted():
        assert write_report(build_results(tmp_path / "again", analyses=True)).read_text(encoding="utf-8") == html
    first, second = (write_report(tmp_path / "again").read_text(encoding="utf-8") for _ in range(2))
    assert first == second


def test_failed_check_is_red_and_named_in_the_verdict(tmp_path):
    folder = build_results(tmp_path)
    run = make_run()
    run["self_checks"][3] |= {"passed": False, "value": 0.5}
    write_json(folder, "run.json", run)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert ("tr", "failed") in page.classes and ("li", "bad") in page.classes
    assert "1 of 7 self-checks FAILED: snis_slope (0.5, tolerance 0.02)" in page.text and "6 of 7" in page.text


HOSTILE = [
    "<script>alert(1)</script>",
    "</td></tr></table><h1>owned",
    "<img src=x onerror=alert(1)>",
    "\u202egnihton",
    "null\x00 and \x1b[31m",
    "L" * 10_000,
    "\n" * 400 + "end",
    "{{ 7 * 7 }} {% raw %} $x_1^",
    "&amp; \" '",
    "שלום 1 + 2",
]


def hostile(tree, path=()):
    """Every text of the analyses that a model or a file may have written, replaced."""
    if isinstance(tree, dict):
        return {key: hostile(value, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list):
        return [hostile(value, (*path, place)) for place, value in enumerate(tree)]
    if isinstance(tree, str) and {"prompt", "texts", "first_words", "reason", "label"} & set(path):
        return HOSTILE[len(str(path)) % len(HOSTILE)]
    return tree


def test_hostile_text_is_shown_as_text(tmp_path):
    folder = build_results(tmp_path, analyses=True)
    rows, ordered = training_rows()
    for row, text in zip(ordered, HOSTILE, strict=False):
        row["completion"], row["prompt"] = text, text + row["prompt"]
    write_sequences(folder, rows)
    run, summary = make_run(), make_summary(rows)
    run["command"], run["versions"]["<b>x</b>"] = HOSTILE[5], HOSTILE[0]
    run["self_checks"][0] |= {"passed": False, "name": HOSTILE[0], "explanation": HOSTILE[1]}
    summary["checkpoint"]["model"] = HOSTILE[0] + "\ud800"
    summary["analyses"] = hostile(json.loads((folder / "summary.json").read_text())["analyses"])
    write_json(folder, "run.json", run)
    write_json(folder, "summary.json", summary)
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("h1") == 1 and len(page.images) == len(FIGURES)
    assert sum(not attributes for attributes, _ in page.scripts) == 7, "no script but the page's own"
    own = html.replace(max((text for _, text in page.scripts), key=len), "")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", own)
    cells = [cell for row in page.rows for cell in row]
    assert "<script>alert(1)</script>" in cells and "{{ 7 * 7 }} {% raw %} $x_1^" in cells
    assert "null⟨U+0000⟩ and ⟨U+001B⟩[31m" in cells and "⟨U+202E⟩gnihton" in cells
    assert any(cell.endswith("[… 9,680 characters left out …]") for cell in cells)
    assert len(re.sub(r"base64,[A-Za-z0-9+/=]+", "", own)) < 400_000


def test_every_question_has_its_sentence_figures_and_table(written):
    folder, html, page = written
    stored = json.loads((folder / "summary.json").read_text())["analyses"]
    records = read_results_folder(folder).summary.analyses
    for name, presentation in PRESENTATIONS.items():
        assert presentation.question in page.text and FINDINGS[name](getattr(records, name)) in page.text, name
        assert all(f'id="figure-{figure}"' in html for figure in presentation.figures)
    shown = [cell for row in page.rows for cell in row]
    scores = stored["intervention"]["scores"]["split"]
    assert any(cell.startswith(f"{scores['spearman']:.3g}") for cell in shown)
    drop = next(row for row in stored["weighting_schemes"]["rows"] if row["name"] == "drop_top_5")
    cells = next(row for row in page.rows if row and row[0] == drop["label"])
    value = drop["delta_h"]["raw"]["value"]
    assert float(cells[1].split(" ")[0].replace("−", "-")) == pytest.approx(1e3 * value, rel=0.05)
    length = next(row for row in page.rows if row and row[0] == "Completion length, tokens")
    means = [stored["buffers"]["quantities"]["length"][side]["mean"] for side in ("evaluation", "training")]
    assert [float(cell.split(" ")[0]) for cell in length[1:3]] == pytest.approx(means, rel=0.01)


def edit_json(name, change):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        write_json(folder, name, change(content) or content)

    return apply


@pytest.mark.parametrize(
    "change",
    [
        edit_json("summary.json", lambda s: s | {"predicted": {}, "predicted_per_completion": {}, "agreement": {}}),
        edit_json("summary.json", lambda s: s | {"actual": {}, "agreement": {}, "scaling": []}),
        edit_json("training_history.json", lambda h: h[:1]),
        lambda folder: write_json(folder, "training_history.json", []),
        lambda folder: write_sequences(
            folder, [row | {"delta_h": None, "advantage": None} for row in training_rows()[0]]
        ),
    ],
)
def test_what_was_not_computed_leaves_a_report_that_says_so(tmp_path, change):
    folder = build_results(tmp_path)
    change(folder)
    assert re.search(
        "no data|not known|not recorded|only one recorded|largest part",
        write_report(folder).read_text(encoding="utf-8"),
    )


def test_failed_and_skipped_analyses_are_named(tmp_path):
    folder = build_results(tmp_path)
    odd = {
        "buffers": {"error": "ValueError: x"},
        "baselines": {"skipped": "no step"},
    }
    edit_json("summary.json", lambda s: s | {"analyses": odd})(folder)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "FAILED: ValueError: x" in page.text and "Not analysed: no step." in page.text


def test_analysis_without_a_kernel_has_a_report(tmp_path):
    folder = build_results(tmp_path)
    (folder / "kernel.safetensors").unlink()
    edit_json("summary.json", lambda s: s | {"kernel": None})(folder)
    assert "did not store this kernel" in write_report(folder).read_text(encoding="utf-8")


def test_reading_keeps_the_kernel_axes(tmp_path):
    folder = build_results(tmp_path)
    rows, _ = training_rows()
    write_sequences(folder, rows[::-1])
    results = read_results_folder(folder)
    assert [row["row"] for row in results.training] == list(range(64))
    np.testing.assert_array_equal(results.kernels["fisher"], load_file(folder / "kernel.safetensors")["fisher"])


def test_intervals_of_shares_are_read_where_a_folder_has_them(tmp_path):
    folder = build_results(tmp_path)
    rows, _ = training_rows()
    write_sequences(folder, [row | {"delta_h_low": -2.0, "delta_h_high": -1.0} for row in rows])
    assert read_results_folder(folder).training[0]["delta_h_high"] == -1.0
    write_sequences(folder, rows)
    assert read_results_folder(folder).training[0].get("delta_h_high") is None


def test_text_display():
    assert visible("a\tb\nc") == "a\tb\nc" and visible("\u2066x\ud83d") == "⟨U+2066⟩x⟨U+D83D⟩"
    assert clip("abcdefgh", 4, "end") == "[… 4 characters left out …] efgh"
    assert clip("abcdefgh", 4, "both") == "ab [… 4 characters left out …] gh"
    assert quoted("שלום") == "“\u2068שלום\u2069”" and quoted("a\n b") == "“a b”"


def test_prompt_frame_never_cuts_a_word_or_number():
    frame = prompt_frame(["The sum of these: 12 + 3 = ?\nYour answer:", "The sum of these: 14 + 3 = ?\nYour answer:"])
    assert frame.own_part("The sum of these: 12 + 3 = ?\nYour answer:") == "12"
    assert frame.prefix == "The sum of these: "
    assert prompt_frame(["same prompt here"] * 3).prefix == "" and prompt_frame([]).suffix == ""


def test_a_report_needs_no_tensor_library_and_no_pyplot():
    code = (
        "import sys, entropy_experiments.report.page; "
        "print(sorted({'torch', 'transformers', 'matplotlib.pyplot', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""The notebook: as a script, as an exported page, in a real browser; and the pieces it shows."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import sync_playwright

from entropy_experiments.console import explore
from entropy_experiments.console.explore import NOTEBOOK, notebook_command
from entropy_experiments.notebooks import views as notebook_views
from entropy_experiments.records.reader import read_results_folder
from rl_training.errors import UserError
from tests.entropy_experiments.browser_visit import launch
from tests.entropy_experiments.results_fixture import build_results, write_sequences

HOSTILE = (
    "<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>", "\u202eabc\x00\x1b[31m", "😀 שלום", "x" * 10_000,
    "[a](javascript:window.hacked=1) $\\frac{1}{2}$",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_results(tmp_path_factory.mktemp("notebook") / "results", analyses=True)


@pytest.fixture(scope="module")
def results(folder):
    return read_results_folder(folder)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = build_results(tmp_path_factory.mktemp("hostile") / "results")
    rows = pq.read_table(folder / "sequences.parquet").to_pylist()
    for i, row in enumerate(rows):
        row["completion"], row["prompt"] = HOSTILE[i % 6], HOSTILE[(i + 1) % 6] + row["prompt"]
        row["token_texts"] = [HOSTILE[(i + j) % 6] for j in range(row["length"])]
    write_sequences(folder, rows)
    return folder


def environment():
    return {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "MARIMO_SKIP_UPDATE_CHECK": "1"}


def run(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment(), timeout=300
    )


@pytest.mark.long
def test_it_runs_as_a_script(folder):
    found = run(NOTEBOOK, "--", "--results", folder)
    assert found.returncode == 0, found.stderr
    assert "was predicted to change entropy by −0.074 [−0.111, −0.037]" in found.stdout


def test_as_a_script_bad_input_is_one_line(tmp_path):
    found = run(NOTEBOOK, "--", "--results", tmp_path / "nothing")
    assert found.returncode == 2 and found.stderr.splitlines()[-1].startswith("error: no results folder"), found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.long
def test_it_exports_to_a_page(folder, tmp_path):
    page = tmp_path / "page.html"
    notebook = shutil.copy(NOTEBOOK, tmp_path)  # marimo leaves what it has shown beside it
    found = run("-m", "marimo", "export", "html", notebook, "-o", page, "--", "--results", folder)
    assert found.returncode == 0, found.stderr
    text = page.read_text(encoding="utf-8")
    assert "was predicted to change entropy" in text and "Traceback" not in text


def test_the_command_opens_it_on_a_checked_folder(folder, tmp_path, monkeypatch):
    command = notebook_command(folder, port=1234, headless=True)
    assert command[1:4] == ["-m", "marimo", "run"] and Path(command[4]).is_file()
    assert command[5:] == ["--headless", "--port", "1234", "--", "--results", str(folder.resolve())]
    with pytest.raises(UserError, match="no results folder"):
        notebook_command(tmp_path / "nothing")
    monkeypatch.setattr(explore.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "entropy-experiments\[notebook\]"'):
        notebook_command(folder)


def test_the_notebook_is_packaged():
    from setuptools import find_packages

    assert "entropy_experiments.notebooks" in find_packages(include=["entropy_experiments*"])


@pytest.mark.parametrize("kernel", notebook_views.KERNELS)
@pytest.mark.parametrize("order", ["by prompt", "by part in the change of entropy"])
def test_every_kernel_in_every_order(results, kernel, order):
    png, words = notebook_views.kernel_picture(results, kernel, order)
    assert png.startswith(b"\x89PNG")
    if notebook_views.KERNELS[kernel][0] in results.kernels:
        assert "columns" in words
    else:
        assert "did not store" in words


def test_orders_are_ascending_and_of_the_chosen_prompt(results, monkeypatch):
    seen = {}

    def draw(kernel, rows, columns, **options):
        seen.update(kernel=kernel, rows=rows, columns=columns, **options)
        from matplotlib.figure import Figure

        return Figure()

    monkeypatch.setattr(notebook_views, "plot_kernel_heatmap", draw)
    name = next(iter(notebook_views.KERNELS))
    notebook_views.kernel_picture(results, name, "by length", prompt=3)
    own = [row for row in results.training if row["prompt_index"] == 3]
    np.testing.assert_array_equal(seen["kernel"], results.kernels["fisher"][:, [row["row"] for row in own]])
    assert seen["columns"] == [3] * len(own)
    label, rows, columns = seen["order"]
    lengths = np.array([row["length"] for row in own])[columns]
    assert label == "by length" and (np.diff(lengths) >= 0).all()
    assert (np.diff(np.array([row["length"] for row in results.evaluation])[rows]) >= 0).all()


def test_sequences_of_a_prompt_and_their_parts(results):
    records = notebook_views.sequence_records(results, "training", 2)
    own = [row for row in results.training if row["prompt_index"] == 2]
    most_lowering = sorted(own, key=lambda row: row["delta_h"])
    assert [record["sequence"] for record in records] == [row["row"] for row in most_lowering]
    part = records[0]["part of Δh, 10⁻³ nats per token"]
    assert part == pytest.approx(1e3 * most_lowering[0]["delta_h"], abs=1e-4)
    lost = {
        r["sequence"]: r["part of Δh, 10⁻³ nats per token"]
        for r in notebook_views.sequence_records(results, "evaluation")
    }
    assert lost[5] == pytest.approx(1e3 * results.evaluation[5]["delta_h_lost"], abs=1e-4)


def test_tokens_carry_their_shares(results):
    html = notebook_views.sequence_html(results, "training", 7)
    shown = re.findall(r'title="share of Δh ([^ ]+) nats per token" style="background:([^"]+)"', html)
    shares = results.training[7]["token_shares"]
    assert len(shown) == len(shares)
    for (number, colour), share in zip(shown, shares, strict=True):
        assert float(number.replace("−", "-").replace("+", "")) == pytest.approx(share, rel=0.01)
        assert colour.startswith("rgba(213," if share < 0 else "rgba(0,"), "a loss of entropy in the colour of a gain"
    assert "entropy of each token" in notebook_views.sequence_html(results, "evaluation", 0)


def test_a_folder_of_format_1_says_that_it_has_no_shares(results):
    row = {**results.training[0], "token_texts": None, "token_shares": None}
    old = type(results)(**{**vars(results), "training": [row, *results.training[1:]]})
    assert "No shares of tokens were stored" in notebook_views.sequence_html(old, "training", 0)


def test_summaries_follow_the_prompt(results):
    whole, one = notebook_views.summaries_html(results), notebook_views.summaries_html(results, 3)
    assert ">64<" in whole and ">8<" in one and "training sequences of prompt 3" in one and "Rejected" not in one


@pytest.mark.long
def test_every_picture_is_drawn(results):
    names = notebook_views.picture_names(results)
    assert "Predicted and measured change" in names and len(names) > 8
    for label, name in names.items():
        png, words = notebook_views.picture(results, name)
        assert png.startswith(b"\x89PNG") and words, label


def test_hostile_text_is_escaped_everywhere(hostile):
    results = read_results_folder(hostile)
    pieces = [notebook_views.verdict_html(results), notebook_views.summaries_html(results)]
    pieces += [notebook_views.sequence_html(results, b, i) for b in ("training", "evaluation") for i in range(7)]
    for piece in pieces:
        assert "<script" not in piece and "<img" not in piece and not set(piece) & set("\x00\x1b\u202e")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.long
def test_in_a_browser(hostile):
    """Served by the command, opened in Chromium: everything is drawn, a choice redraws, and no text runs."""
    port = free_port()
    arguments = ["-m", "entropy_experiments", "explore", str(hostile), "--headless", "--port", str(port)]
    log = subprocess.DEVNULL
    server = subprocess.Popen(
        [sys.executable, *arguments], env=environment(), stdout=log, stderr=log, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        with sync_playwright() as playwright:
            browser = launch(playwright)
            page = browser.new_page()
            errors: list[str] = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(f"http://127.0.0.1:{port}")
            page.get_by_text("What it compares", exact=True).first.wait_for(timeout=180_000)
            assert page.locator("img[alt*='evaluation sequences']").count() == 1
            page.get_by_label("evaluation", exact=True).check()
            page.get_by_text(re.compile(r"Sequence \d+ of the evaluation buffer")).wait_for(timeout=120_000)
            assert page.evaluate("window.hacked") is None and errors == []
            browser.close()
    finally:
        os.killpg(server.pid, 2)
        server.wait(timeout=60)
    assert not (NOTEBOOK.parent / "__marimo__").exists(), "texts of prompts and completions stay beside the notebook"

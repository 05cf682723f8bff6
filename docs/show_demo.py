"""Show a demo's results in README: `python docs/show_demo.py runs/demo-1/analysis`, after `make demo`.

Copies the figures that README shows into docs/figures, photographs the page as it opens and with a cell of the kernel chosen
(this needs Chromium), writes docs/demo.json (the verdict, its leading sentences, the examples of docs/analyses and
docs/guides/analysis.md, and digests of the figures), and puts the leading sentences into README between its two markers and the
examples onto their pages (demo_examples.py).
tests/test_readme.py compares README, pages and figures with docs/demo.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from docs.demo_examples import examples, show  # noqa: E402 (the folder of the project comes first)

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FIGURES = ROOT / "docs" / "figures"
RECORD = ROOT / "docs" / "demo.json"
BEGIN, END = "<!-- the demo's verdict, by docs/show_demo.py -->", "<!-- end of the verdict -->"
COPIED = ("training_history.png", "attribution.png", "predicted_vs_actual.png", "kernel_fisher.png")
PHOTOGRAPH = "report_kernel_cell.png"
FIRST_SCREEN = "report_first_screen.png"


def quoted(verdict: Sequence[str]) -> str:
    """The verdict's leading sentences as README quotes them, between the markers."""
    return "\n".join([BEGIN, *(f"> - {sentence}" for sentence in verdict), END])


def shown_in(readme: str) -> str:
    """What README has between the markers, with them."""
    return readme[readme.index(BEGIN) : readme.index(END) + len(END)]


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def photograph(report: Path, first: Path, cell: Path) -> None:
    """The page as it opens; and with the kernel's cell of largest size chosen, both its sequences beside it."""
    from playwright.sync_api import sync_playwright

    place = """() => { const plot = document.getElementById('kernel-plot'), box = plot.getBoundingClientRect();
        const {xaxis, yaxis} = plot._fullLayout, z = plot._fullData.find(d => d.type === 'heatmap').z;
        let best = [0, 0, -1];
        z.forEach((row, y) => row.forEach((v, x) => { if (Math.abs(v) > best[2]) best = [x, y, Math.abs(v)]; }));
        return [box.left + xaxis._offset + xaxis.l2p(best[0]), box.top + yaxis._offset + yaxis.l2p(best[1])]; }"""
    with sync_playwright() as playwright:
        found = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.goto(report.resolve().as_uri())
        page.wait_for_selector(".first figure[data-drawn]", state="attached")
        page.screenshot(path=str(first))
        page.evaluate("document.querySelector('#kernels').closest('details').open = true")
        page.evaluate("document.getElementById('kernel-explorer').scrollIntoView()")
        page.wait_for_selector("#kernel-explorer[data-drawn]", state="attached")
        across, down = page.evaluate(place)
        page.mouse.move(across + 1, down)
        page.mouse.click(across, down)
        page.wait_for_selector(".panel h3")
        page.screenshot(path=str(cell))
        browser.close()


def main(arguments: Sequence[str]) -> int:
    """Copy, photograph, record, and rewrite README."""
    from entropy_experiments.records.reader import read_results_folder
    from entropy_experiments.report.outcome import read_outcome
    from entropy_experiments.report.verdict import write_verdict

    parser = argparse.ArgumentParser(description="Show a demo's results in README.")
    parser.add_argument("results", type=Path, help="results folder of the demo's analysis, e.g. runs/demo-1/analysis")
    results = parser.parse_args(arguments).results
    outcome, folder = read_outcome(results), read_results_folder(results)
    for name in COPIED:
        shutil.copyfile(results / "figures" / name, FIGURES / name)
    photograph(results / "report.html", FIGURES / FIRST_SCREEN, FIGURES / PHOTOGRAPH)
    texts = examples(outcome, folder.summary)
    show(results, texts)
    record = {
        "created": folder.run.created,
        "commit": folder.run.git_sha,
        "verdict": [sentence.text for sentence in outcome.verdict],
        "lead": [sentence.text for sentence in write_verdict(folder) if sentence.lead],
        "examples": texts,
        "figures": {name: digest(FIGURES / name) for name in (*COPIED, FIRST_SCREEN, PHOTOGRAPH)},
    }
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(shown_in(text), quoted(record["lead"])), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

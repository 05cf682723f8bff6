"""The demo's results as the examples of docs/analyses and docs/guides/analysis.md; docs/show_demo.py puts them there.

Each page has a pair of markers around its example: an analysis its sentence, the guide the closing table of the terminal.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entropy_experiments.records.outcome_record import Outcome
    from entropy_experiments.records.summary import Summary

ROOT = Path(__file__).resolve().parents[1]
PAGES, FIGURES = ROOT / "docs" / "analyses", ROOT / "docs" / "figures" / "analyses"
GUIDE = ROOT / "docs" / "guides" / "analysis.md"
TABLE = "table"
EXAMPLES = {
    "attribution": ("attribution.md", "attribution.png"),
    "baselines": ("baselines.md", "baselines.png"),
    "buffers": ("buffers.md", "buffers.png"),
    "entropy_prediction": ("entropy-prediction.md", "predicted_vs_actual.png"),
    "higher_order": ("higher-order.md", "higher_order.png"),
    "prompt_structure": ("prompt-structure.md", "prompt_structure.png"),
    "sequence_clustering": ("clustering.md", "sequence_clustering.png"),
    "weighting_schemes": ("weighting-schemes.md", "weighting_schemes.png"),
}
"""Analysis -> its page and its figure. `intervention` is not in the demo: its example is of a run of SmolLM2-135M."""


def markers(name: str) -> tuple[str, str]:
    """Lines before and after an example."""
    return f"<!-- the demo's {name}, by docs/show_demo.py -->", f"<!-- end of {name} -->"


def page_of(name: str) -> Path:
    """The page that an example stands on."""
    return GUIDE if name == TABLE else PAGES / EXAMPLES[name][0]


def shown_on_page(name: str) -> str:
    """What its page has between the markers."""
    text = page_of(name).read_text(encoding="utf-8")
    begin, end = markers(name)
    return text[text.index(begin) + len(begin) : text.index(end)].strip("\n")


def examples(outcome: Outcome, summary: Summary) -> dict[str, str]:
    """Name -> the text of its example. Raises KeyError for an analysis that the demo lacks."""
    from entropy_experiments.console.tables import outcome_facts
    from entropy_experiments.records.analysis_results import finished
    from entropy_experiments.report.findings import FINDINGS

    results = {name: finished(result) for name, result in summary.analyses.entries()}
    found = {name: f"> {FINDINGS[name](results[name])}" for name in EXAMPLES}
    facts = [(what, value) for what, value, _ in outcome_facts(outcome) if what != "Folder"]
    width = max(len(what) for what, _ in facts) + 3
    lines = [f" {what.ljust(width)}{value}" for what, value in facts]
    return found | {TABLE: "\n".join(["```", *lines, "```"])}


def show(results: Path, texts: Mapping[str, str]) -> None:
    """Put the texts between their markers, and the figures of a results folder beside them."""
    for name, text in texts.items():
        path = page_of(name)
        page = path.read_text(encoding="utf-8")
        begin, end = markers(name)
        before, rest = page.split(begin, 1)
        path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
    for _, figure in EXAMPLES.values():
        shutil.copyfile(results / "figures" / figure, FIGURES / figure)

"""The sections of a report on the analyses of a results folder, and their figures.

What was switched off does not appear; what did not apply says why; what failed is red and named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from entropy_experiments.records.analysis_results import AnalysesRecord, Failed, Skipped
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.report.analysis_tables import TABLES
from entropy_experiments.report.content import PageFigure, Section
from entropy_experiments.report.figures.plots import (
    plot_baselines,
    plot_buffers,
    plot_higher_order,
    plot_intervention,
    plot_prices,
    plot_prompt_structure,
    plot_sequence_clusters,
    plot_token_shares,
    plot_weighting_schemes,
)
from entropy_experiments.report.findings import FINDINGS
from entropy_experiments.statistics.confidence import Sentence
from entropy_experiments.text.display import clip

Draw = Callable[[Any, ResultsFolder], Figure]
_SENTENCE_CHARACTERS = 2000


@dataclass(frozen=True)
class Presentation:
    """question: the heading. figures: file name -> what draws it from the analysis's record and the folder."""

    question: str
    figures: Mapping[str, Draw]


PRESENTATIONS = {
    "buffers": Presentation(
        "How do the sequences that the step learns from differ from those that entropy is measured on?",
        {"buffers": lambda result, folder: plot_buffers(result)},
    ),
    "entropy_prediction": Presentation("Does the first order predict the change, and up to what size of step?", {}),
    "higher_order": Presentation(
        "How large is the second order, and where does it equal the first?",
        {"higher_order": lambda result, folder: plot_higher_order(result)},
    ),
    "attribution": Presentation(
        "Who moved entropy in this step?", {"token_shares": lambda result, folder: plot_token_shares(result)}
    ),
    "intervention": Presentation(
        "Do the accounting shares say what happens when sequences are really left out?",
        {"intervention": lambda result, folder: plot_intervention(result)},
    ),
    "prompt_structure": Presentation(
        "Do sequences of the same prompt move each other more than others?",
        {"prompt_structure": lambda result, folder: plot_prompt_structure(result)},
    ),
    "sequence_clustering": Presentation(
        "Do the gradients fall into groups, and what do these share?",
        {"sequence_clustering": lambda result, folder: plot_sequence_clusters(result, folder.kernels.get("train_fisher"))},
    ),
    "weighting_schemes": Presentation(
        "What would other weightings have cost in entropy?",
        {"weighting_schemes": lambda result, folder: plot_weighting_schemes(result)},
    ),
    "prices": Presentation(
        "What could be done in place of this step, and what would it cost?",
        {"prices": lambda result, folder: plot_prices(result)},
    ),
    "baselines": Presentation(
        "How do other predictors do on the same step?",
        {"baselines": lambda result, folder: plot_baselines(result)},
    ),
}  # fmt: skip
"""In the order of the report."""


def analysis_figure_makers(results: ResultsFolder) -> dict[str, Callable[[], Figure]]:
    """File name -> what draws the figure, for every analysis that has a result."""
    return {
        name: lambda draw=draw, entry=entry: draw(entry, results)
        for key, entry in results.summary.analyses.entries()
        if not isinstance(entry, Skipped | Failed)
        for name, draw in PRESENTATIONS[key].figures.items()
    }


def analysis_sections(analyses: AnalysesRecord, figures: Mapping[str, PageFigure]) -> list[Section]:
    """One section for each analysis that was asked for, in the report's order. figures: by name, those of all analyses."""
    sections = []
    for name, entry in analyses.entries():
        source, tone, shown, tables = f"summary.json: analyses.{name}", "plain", [], []
        if isinstance(entry, Skipped):
            text = f"Not analysed: {entry.skipped}."
        elif isinstance(entry, Failed):
            text, tone = f"FAILED: {entry.error}", "bad"
        else:
            text = FINDINGS[name](entry)
            shown = [figures[figure] for figure in PRESENTATIONS[name].figures]
            tables = [replace(table, source=source) for table in TABLES[name](entry)]
        finding = Sentence(clip(text, _SENTENCE_CHARACTERS), tone, source)
        sections.append(Section(name, PRESENTATIONS[name].question, sentences=[finding], figures=shown, tables=tables))
    return sections

"""The analyses of a results folder as the report shows them: the question, a sentence, figures, a compact table.

What was switched off does not appear; what did not apply says why; what failed is red and named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.report.analysis_tables import TABLES, Table
from entropy_experiments.report.figures.plots import (
    no_data_figure,
    plot_baselines,
    plot_buffers,
    plot_higher_order,
    plot_intervention,
    plot_prompt_structure,
    plot_sequence_clusters,
    plot_token_shares,
    plot_weighting_schemes,
)
from entropy_experiments.text.display import clip
from entropy_experiments.text.numbers import lookup

Draw = Callable[[Mapping[str, Any], ResultsFolder], Figure]
_SENTENCE_CHARACTERS = 2000
# What numbers of another shape than the analyses write lead to; a report shows the rest.
_ODD = (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError)


@dataclass(frozen=True)
class Presentation:
    """question: the heading. figures: file name -> what draws it from the analysis's dict and the folder."""

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
        {
            "sequence_clustering": lambda result, folder: plot_sequence_clusters(
                result, folder.kernels.get("train_fisher")
            )
        },
    ),
    "weighting_schemes": Presentation(
        "What would other weightings have cost in entropy?",
        {"weighting_schemes": lambda result, folder: plot_weighting_schemes(result)},
    ),
    "baselines": Presentation(
        "How do other predictors do on the same step?",
        {"baselines": lambda result, folder: plot_baselines(result)},
    ),
}
"""In the order of the report."""


@dataclass(frozen=True)
class Section:
    """One analysis on the page. tone: "", "soft" for what did not apply, "bad" for what failed."""

    name: str
    question: str
    sentence: str
    tone: str
    figures: tuple[str, ...]
    tables: list[Table]


def attempt(draw: Callable[[], Any]) -> Any:
    """What ``draw`` returns, or None where the folder's numbers have another shape than the analyses write."""
    try:
        return draw()
    except _ODD:
        return None  # the picture in its place says what is wrong


def analysis_figure_makers(results: ResultsFolder) -> dict[str, Callable[[], Figure]]:
    """File name -> what draws the figure, for every analysis that has a result; one that cannot be drawn says so."""
    makers = {}
    for key, presentation in PRESENTATIONS.items():
        result = _result(results.raw, key)
        for name, draw in presentation.figures.items() if result is not None else ():
            makers[name] = partial(_drawn_or_reason, draw, result or {}, results, presentation.question)
    return makers


def _drawn_or_reason(
    draw: Callable[[Mapping[str, Any], ResultsFolder], Figure],
    result: Mapping[str, Any],
    results: ResultsFolder,
    question: str,
) -> Figure:
    try:
        return draw(result, results)
    except _ODD as error:
        reason = f"the folder's numbers cannot be drawn ({type(error).__name__}: {clip(str(error), 200)})."
        return no_data_figure(question, reason)


def analysis_sections(summary: Mapping[str, Any]) -> list[Section]:
    """One section for each analysis that the summary holds, known ones in the report's order."""
    analyses = lookup(summary, "analyses")
    if not isinstance(analyses, Mapping):
        return []
    sections = []
    for name, presentation in PRESENTATIONS.items():
        if name not in analyses:
            continue
        result = _result(summary, name)
        sentence = lookup(analyses, name, "sentence")
        tone = "" if result is not None else "soft" if lookup(analyses, name, "skipped") else "bad"
        sections.append(
            Section(
                name,
                presentation.question,
                clip(sentence, _SENTENCE_CHARACTERS) if isinstance(sentence, str) else "This analysis says nothing.",
                tone,
                tuple(presentation.figures) if result is not None else (),
                _tables(name, result),
            )
        )
    return sections


def _tables(name: str, result: Mapping[str, Any] | None) -> list[Table]:
    if result is None or name not in TABLES:
        return []
    try:
        return TABLES[name](result)
    except _ODD as error:
        return [Table(f"The folder's numbers make no table ({type(error).__name__}: {clip(str(error), 200)}).", (), [])]


def _result(summary: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The analysis's dict, None where it is absent, did not apply, or failed."""
    result = lookup(summary, "analyses", name)
    if not isinstance(result, Mapping) or "skipped" in result or "error" in result:
        return None
    return result

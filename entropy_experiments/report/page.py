"""One page that says what an analysis found: PNG figures, and one ``report.html`` that holds them all.

The page needs no network. Its figures can be hovered and zoomed where there is JavaScript and are pictures where there is none
and on paper (``interactive/page.py``); everything that a model or a file contributed is shown as text. The same folder gives the
same bytes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from entropy_experiments.records.analysis_results import finished
from entropy_experiments.records.reader import ResultsFolder, read_results_folder
from entropy_experiments.records.record import json_of
from entropy_experiments.records.summary import Summary
from entropy_experiments.report import first_screen, tables
from entropy_experiments.report.content import Page, PageFigure, Section
from entropy_experiments.report.figures.kernel import Quantity
from entropy_experiments.report.figures.plots import (
    caption_of,
    no_data_figure,
    plot_attribution,
    plot_entropy_split,
    plot_kernel_heatmap,
    plot_predicted_vs_actual,
    plot_training_history,
    png_bytes,
)
from entropy_experiments.report.interactive.history import training_history
from entropy_experiments.report.interactive.kernels import kernel_explorer
from entropy_experiments.report.interactive.page import render_page
from entropy_experiments.report.interactive.predicted import entropy_split, predicted_vs_actual
from entropy_experiments.report.interactive.sequences import sequence_details
from entropy_experiments.report.interactive.shares import sequence_shares
from entropy_experiments.report.interactive.weightings import weighting_schemes
from entropy_experiments.report.sections import PRESENTATIONS, analysis_figure_makers, analysis_sections
from entropy_experiments.report.verdict import write_verdict
from entropy_experiments.text.display import one_line, prompt_frame
from entropy_experiments.text.numbers import plain, series
from rl_training.files import write_all_whole
from rl_training.run.disk import disk_errors_explained

# file name -> what it draws
_SOURCES = {
    "training_history": "training_history.json",
    "predicted_vs_actual": "summary.json: scaling",
    "entropy_split": "summary.json: predicted, actual",
    "attribution": "sequences.parquet: delta_h",
    "kernel_fisher": "kernel.safetensors: fisher",
    "kernel_entropy_fisher": "kernel.safetensors: entropy_fisher",
    **{name: f"summary.json: analyses.{key}" for key, shown in PRESENTATIONS.items() for name in shown.figures},
}

# file name -> (heading, how to read the figure)
_FIGURES = {
    "training_history": (
        "Entropy and reward in training",
        "The policy's entropy, mean reward, and, where the probe ran, every step's change of entropy: predicted from "
        "the gradient and the optimizer's step, beside the change that was measured.",
    ),
    "predicted_vs_actual": (
        "Was the step's change predicted?",
        "The step that was taken, at s times its length. Measured must follow predicted for small s; on the right, a ratio "
        "of 1 is a perfect prediction. “Reweighted”: measured on the tokens drawn before the step, each sequence weighted by how "
        "much likelier the step makes it. “Same sample on both sides”: the measurement over its own derivative, where chance "
        "cancels. “Given tokens only” leaves out that other prefixes become likelier.",
    ),
    "entropy_split": (
        "Which part of the update moved entropy?",
        "Adam's step mixes this batch with earlier ones (momentum) and weight decay. Each part's bar is the change of "
        "entropy it makes on its own, to first order.",
    ),
    "attribution": (
        "Which training sequences moved entropy?",
        "Every bar is one training sequence's accounting share of the batch part. A rewarded answer that the policy already "
        "prefers lowers entropy when it is reinforced; an unusual one can raise it. Where the verdict says that shares mislead, "
        "read the effects of leaving out, in the table of training sequences.",
    ),
    "kernel_fisher": (
        "Fisher kernel",
        "The inner product of two sequences' score gradients in the optimizer's metric. Blocks along a "
        "prompt's columns "
        "show learning that stays with a prompt; stripes through all rows show learning that carries over.",
    ),
    "kernel_entropy_fisher": (
        "Entropy–Fisher kernel",
        "Column by column, how the entropy on each evaluation sequence answers to a training sequence. "
        "The mean of a column, times the sequence's weight and a factor common to all, is the sequence's share of the "
        "change (exactly so where the kernel was made with the step's own P, preconditioning: step).",
    ),
}


_ABOUT = (
    "Entropy says how undecided the model is about its next token; when it drains away, exploration ends. This page: what "
    "entropy did in training, whether one optimizer step's change of it was predicted, and which training sequences made that "
    "change."
)
# section -> (title, what it holds, its name in the contents where that is another)
_HEADINGS = {
    "figures": ("Figures", "the step at other lengths; its parts; which sequences moved entropy"),
    "kernels": (
        "Which sequences move which: the kernels",
        "every training sequence against every evaluation sequence; a cell shows both texts",
        "Kernels",
    ),
    "sequences": ("Training sequences", "all of them by their share of the change, searchable, with their texts"),
    "analyses": ("Questions", "what else was asked of this step, and the answers"),
    "estimators": (
        "Predicted and measured, estimator by estimator",
        "four ways to predict, beside what was measured of the same quantity",
        "Estimators",
    ),
    "buffers": ("The two buffers", "what the step learns from, and what entropy is measured on", "Buffers"),
    "checks": ("Self-checks", "what the analysis checked about itself"),
    "provenance": ("Provenance", "checkpoint, command, versions, machine, seconds"),
    "legend": ("Symbols and signs", "what every letter stands for", "Symbols"),
    "first-reading": (
        "First reading: questions and answers",
        "what was done, which step is meant, what the intervals cover, what to do when numbers disagree",
        "First reading",
    ),
}
_BODIES = {
    name: f"report_{name.replace('-', '_')}.html.j2" for name in ("kernels", "sequences", "legend", "first-reading")
}
_DRAWN_BUFFERS = (
    "Entropy is measured on the evaluation buffer, drawn without looking at rewards; the update comes from the training "
    "buffer, which prefers prompts that still teach something. The two are independent draws."
)
_GIVEN_BUFFERS = (
    "The evaluation sequences are given texts, not drawn from the policy: entropy here is that of their tokens."
)


def draw_figures(results: ResultsFolder) -> dict[str, Figure]:
    """All figures of an analysis by file name; what is missing in the folder is a figure that says so."""
    return {name: make() for name, make in figure_makers(results).items()}


def figure_makers(results: ResultsFolder) -> dict[str, Callable[[], Figure]]:
    """File name -> what draws the figure: `draw_figures`, one at a time."""
    training, evaluation, step = results.training, results.evaluation, results.summary.checkpoint.step
    scaling, split = _scaling(results.summary), _split(results.summary)
    prompts = [row["prompt_index"] for row in evaluation], [row["prompt_index"] for row in training]

    def kernel(quantity: Quantity) -> Figure:
        values = results.kernels.get(quantity)
        if values is None:
            return no_data_figure(_FIGURES[f"kernel_{quantity}"][0], "this analysis did not store this kernel.")
        return plot_kernel_heatmap(values, *prompts, quantity=quantity)

    return {
        "training_history": lambda: plot_training_history(results.history, analysed_step=step),
        "predicted_vs_actual": lambda: plot_predicted_vs_actual(**scaling),
        "entropy_split": lambda: plot_entropy_split(**split),
        "attribution": lambda: plot_attribution(
            series(training, "delta_h"),
            series(training, "reward"),
            prompts[1],
            advantages=series(training, "advantage"),
            ends=(series(training, "delta_h_low"), series(training, "delta_h_high")),
        ),
        "kernel_fisher": lambda: kernel("fisher"),
        "kernel_entropy_fisher": lambda: kernel("entropy_fisher"),
        **analysis_figure_makers(results),
    }


def interactive_figures(results: ResultsFolder) -> dict[str, dict[str, Any]]:
    """Figure name -> plotly's data and layout, of the figures that have an interactive version and numbers for it."""
    summary = results.summary
    weightings = finished(summary.analyses.weighting_schemes)
    plots = {
        "training_history": training_history(results.history, summary.checkpoint.step),
        "predicted_vs_actual": predicted_vs_actual(**_scaling(summary)),
        "entropy_split": entropy_split(**_split(summary)),
        "attribution": sequence_shares(results.training),
        "weighting_schemes": None if weightings is None else weighting_schemes(weightings),
    }
    return {name: plot for name, plot in plots.items() if plot is not None}


def _scaling(summary: Summary) -> dict[str, Any]:
    """The arguments of `step_scaling`."""
    errors = dict.fromkeys(("predicted_standard_error", "actual_standard_error"))
    if summary.rows_drawn and summary.prediction is not None:
        errors["predicted_standard_error"] = summary.prediction.total.standard_error
    if summary.rows_drawn and summary.measured is not None:
        errors["actual_standard_error"] = summary.measured.standard_error
    freedom = max(1.0, summary.sampling.evaluation.prompts - 1)
    return {"rows": [json_of(row) for row in summary.scaling], **errors, "degrees_of_freedom": freedom}


def _split(summary: Summary) -> dict[str, Any]:
    """The arguments of `split_bars`."""
    return {"predicted": summary.prediction, "actual": summary.measured}


def render_report(results: ResultsFolder, images: Mapping[str, tuple[bytes, str]]) -> str:
    """The page for ``results`` as HTML; ``images`` maps a figure's name to (PNG, alternative text)."""
    summary, plots, lead = results.summary, interactive_figures(results), first_screen.lead_figure(results)
    figures = {
        name: PageFigure(name, *words, alternative, png, plots.get(name), f"figures/{name}.png", _SOURCES[name])
        for name, (png, alternative) in images.items()
        for words in [_FIGURES.get(name, ("", ""))]
    }
    frame = prompt_frame([row["prompt"] for row in results.evaluation + results.training])
    clustering = finished(summary.analyses.sequence_clustering)
    kernels = kernel_explorer(results.kernels, results.evaluation, results.training, clustering)
    details = sequence_details(results.evaluation, results.training, frame)
    model, step = one_line(summary.checkpoint.model, 120), summary.checkpoint.step
    page = Page(
        title=f"Entropy analysis: {model}, step {step}",
        heading=f"What moved entropy: {model}, training step {step}",
        about=_ABOUT,
        verdict=write_verdict(results),
        tiles=tables.headline(summary, results.run.self_checks),
        lead_figure=figures[lead],
        next_steps=first_screen.next_steps(results),
        sections=_sections(results, figures, lead, details["left_out"]),
        new_readers="first-reading",
        data={"sequences": details} | ({} if kernels is None else {"kernels": kernels}),
        scripts=("sequences.js", "kernel.js"),
    )
    return render_page(page)


def _sections(
    results: ResultsFolder, figures: Mapping[str, PageFigure], lead: str, details_left_out: int
) -> list[Section]:
    """Everything below the first screen."""
    summary, run = results.summary, results.run
    kernels = [figure for name, figure in figures.items() if name.startswith("kernel_")]
    frame = prompt_frame([row["prompt"] for row in results.evaluation + results.training])
    sections = {
        "figures": {"figures": [figures[name] for name in _FIGURES if name != lead and figures[name] not in kernels]},
        "kernels": {"figures": kernels},
        "sequences": {
            "values": {
                "prefix": frame.prefix and one_line(frame.prefix, 400, "both"),
                "suffix": frame.suffix and one_line(frame.suffix, 200, "both"),
                "rows": tables.training_rows(results.training, frame),
                "ends": tables.ENDS_SHOWN,
                "details_left_out": details_left_out,
            },
            "tables": [tables.prompt_table(results.training, frame)],
        },
        "analyses": {"parts": analysis_sections(summary.analyses, figures)},
        "estimators": {"tables": [tables.estimator_table(summary), tables.entropy_table(summary)]},
        "buffers": {
            "text": _DRAWN_BUFFERS if summary.rows_drawn else _GIVEN_BUFFERS,
            "tables": [tables.buffer_table(results.evaluation, results.training, summary.sampling)],
        },
        "checks": {"tables": [tables.check_table(run.self_checks)]},
        "provenance": {"tables": [tables.provenance_table(run, summary)]},
        "legend": {"values": {"horizon": plain(summary.attribution.horizon_factor)}},
        "first-reading": {"values": {"scale": first_screen.scale_of_the_change(summary)}},
    }
    made = [
        Section(name, *_HEADINGS[name], body=_BODIES.get(name, ""), **content) for name, content in sections.items()
    ]
    return [section for section in made if section.name != "analyses" or section.parts]


def write_report(results_dir: Path | str, unfinished: bool = False) -> Path:
    """Write ``figures/*.png`` and ``report.html`` into a results folder, in place of existing ones; return the page's path.

    Args:
        unfinished: For the writer of a ``….part`` folder, which is refused otherwise.

    Raises:
        UserError: The folder is not a whole results folder, or cannot be written to.
    """
    results = read_results_folder(results_dir, unfinished)
    images = {name: (png_bytes(figure), caption_of(figure)) for name, figure in draw_figures(results).items()}
    page = render_report(results, images)
    report = results.path / "report.html"
    pictures = {f"figures/{name}.png": png for name, (png, _) in images.items()}
    with disk_errors_explained(results.path, "writing the report"):
        write_all_whole(results.path, {**pictures, report.name: page})
    return report

"""One page that says what an analysis found: PNG figures, and one ``report.html`` that holds them all.

The page needs no network. Its figures can be hovered and zoomed where there is JavaScript and are pictures where there is none
and on paper (``interactive/page.py``); everything that a model or a file contributed is shown as text. The same folder gives the
same bytes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from entropy_experiments.records.reader import ResultsFolder, read_results_folder
from entropy_experiments.report import tables
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
from entropy_experiments.report.interactive.page import PageFigure, render_page
from entropy_experiments.report.interactive.predicted import entropy_split, predicted_vs_actual
from entropy_experiments.report.interactive.sequences import sequence_details
from entropy_experiments.report.interactive.shares import sequence_shares
from entropy_experiments.report.interactive.weightings import weighting_schemes
from entropy_experiments.report.sections import analysis_figure_makers, analysis_sections, attempt
from entropy_experiments.report.verdict import primary_estimator, write_verdict
from entropy_experiments.statistics.confidence import freedom_of_analysis
from entropy_experiments.text.display import one_line, prompt_frame
from entropy_experiments.text.numbers import as_number, lookup, value_and_error
from rl_training.errors import UserError
from rl_training.files import own_folder, write_whole

# file name -> (heading, how to read the figure)
_FIGURES = {
    "training_history": (
        "Entropy and reward in training",
        "The policy's entropy, mean reward, and, where the probe ran, every step's change of entropy: predicted from "
        "the gradient and the optimizer's step, beside the change that was measured.",
    ),
    "predicted_vs_actual": (
        "Was the step's change predicted?",
        "The step that was taken, scaled down to s times its length. Measured must follow predicted for "
        "small s; on the "
        "right, a ratio of 1 is a perfect prediction. “Given tokens only” leaves out that other prefixes "
        "become likelier.",
    ),
    "entropy_split": (
        "Which part of the update moved entropy?",
        "Adam's step mixes this batch with earlier ones (momentum) and weight decay. Each part's bar is "
        "the change of "
        "entropy it makes on its own, to first order.",
    ),
    "attribution": (
        "Which training sequences moved entropy?",
        "Every bar is one training sequence's accounting share of the batch part. A rewarded answer that the policy "
        "already "
        "prefers lowers entropy when it is reinforced; an unusual one can raise it.",
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


def draw_figures(results: ResultsFolder) -> dict[str, Figure]:
    """All figures of an analysis by file name; what is missing in the folder is a figure that says so."""
    return {name: make() for name, make in figure_makers(results).items()}


def figure_makers(results: ResultsFolder) -> dict[str, Callable[[], Figure]]:
    """File name -> what draws the figure: `draw_figures`, one at a time."""
    training, evaluation = results.training, results.evaluation
    numbers = _step_numbers(results.raw)
    prompts = [row["prompt_index"] for row in evaluation], [row["prompt_index"] for row in training]

    def kernel(quantity: Quantity) -> Figure:
        values = results.kernels.get(quantity)
        if values is None:
            return no_data_figure(_FIGURES[f"kernel_{quantity}"][0], "this analysis did not store this kernel.")
        return plot_kernel_heatmap(values, *prompts, quantity=quantity)

    return {
        "training_history": lambda: plot_training_history(results.raw_history, analysed_step=numbers["step"]),
        "predicted_vs_actual": lambda: plot_predicted_vs_actual(numbers["rows"], **numbers["errors"]),
        "entropy_split": lambda: plot_entropy_split(
            numbers["parts"], numbers["measured"], degrees_of_freedom=numbers["freedom"]
        ),
        "attribution": lambda: plot_attribution(
            *(_numbers(training, key) for key in ("delta_h", "reward")),
            prompts[1],
            advantages=_numbers(training, "advantage"),
        ),
        "kernel_fisher": lambda: kernel("fisher"),
        "kernel_entropy_fisher": lambda: kernel("entropy_fisher"),
        **analysis_figure_makers(results),
    }


def interactive_figures(results: ResultsFolder) -> dict[str, dict[str, Any]]:
    """Figure name -> plotly's data and layout, of the figures that have an interactive version and numbers for it."""
    numbers = _step_numbers(results.raw)
    weightings = lookup(results.raw, "analyses", "weighting_schemes")
    plots = {
        "training_history": training_history(results.raw_history, numbers["step"]),
        "predicted_vs_actual": predicted_vs_actual(numbers["rows"], **numbers["errors"]),
        "entropy_split": entropy_split(numbers["parts"], numbers["measured"], numbers["freedom"]),
        "attribution": sequence_shares(results.training),
        "weighting_schemes": attempt(lambda: weighting_schemes(weightings)),
    }
    return {name: plot for name, plot in plots.items() if plot is not None}


def _step_numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What pictures and plots of the step are drawn from: of given texts, what holds on given tokens."""
    given = lookup(summary, "rows_drawn") is False
    estimator = "fixed_prefix" if given else primary_estimator(summary)
    parts = lookup(summary, "predicted", estimator) if estimator else None
    measured = lookup(summary, "actual", "fixed_prefix" if given else "snis")
    scaling = lookup(summary, "scaling")
    return {
        "step": as_number(lookup(summary, "checkpoint", "step")),
        "parts": parts,
        "measured": measured,
        "freedom": freedom_of_analysis(summary),
        "rows": [row for row in scaling if isinstance(row, dict)] if isinstance(scaling, list) else [],
        "errors": {
            "predicted_standard_error": None if given else value_and_error(lookup(parts, "total"))[1],
            "actual_standard_error": None if given else value_and_error(measured)[1],
            "degrees_of_freedom": freedom_of_analysis(summary),
        },
    }


def _numbers(rows: list[dict[str, Any]], key: str) -> list[float]:
    numbers = [as_number(row.get(key)) for row in rows]
    return [float("nan") if number is None else number for number in numbers]


def render_report(results: ResultsFolder, images: dict[str, tuple[bytes, str]]) -> str:
    """The page for ``results`` as HTML; ``images`` maps a figure's name to (PNG, alternative text)."""
    checks = results.raw_run.get("self_checks")
    checks = [check for check in checks if isinstance(check, dict)] if isinstance(checks, list) else []
    prompts = [row["prompt"] for row in results.evaluation + results.training]
    frame = prompt_frame(prompts)
    prompt_table, prompts_left_out = tables.prompt_rows(results.training, frame)
    summary = results.raw
    checkpoint = lookup(summary, "checkpoint")
    verdict = write_verdict(summary, results.raw_history, checks, results.training, prompts)
    plots = interactive_figures(results)
    figures = {
        name: PageFigure(name, *_FIGURES.get(name, ("", "")), alternative, png, plots.get(name), f"figures/{name}.png")
        for name, (png, alternative) in images.items()
    }
    analyses = [
        {"section": section, "figures": [figures[name] for name in section.figures if name in figures]}
        for section in analysis_sections(summary)
    ]
    clustering = lookup(summary, "analyses", "sequence_clustering")
    kernels = kernel_explorer(results.kernels, results.evaluation, results.training, clustering)
    tokens = lookup(summary, "analyses", "attribution", "tokens")
    details = sequence_details(results.evaluation, results.training, frame, tokens)
    rows = tables.training_rows(results.training, frame)
    model, step = (
        one_line(str(lookup(checkpoint, "model") or "unnamed model"), 120),
        as_number(lookup(checkpoint, "step")),
    )
    return render_page(
        "report.html.j2",
        title=f"Entropy analysis: {model}" + ("" if step is None else f", step {step:g}"),
        figures=figures,
        data={"sequences": details} | ({} if kernels is None else {"kernels": kernels}),
        scripts=("sequences.js", "kernel.js"),
        model=model,
        step="" if step is None else f"{step:g}",
        verdict=[{"tone": sentence.tone, "text": sentence.text} for sentence in verdict],
        headline=tables.headline(summary, checks),
        overview=[figure for name, figure in figures.items() if name in _FIGURES and not name.startswith("kernel_")],
        kernels=[figure for name, figure in figures.items() if name.startswith("kernel_")],
        analyses=analyses,
        given_rows=lookup(summary, "rows_drawn") is False,
        estimators=tables.estimator_rows(summary),
        entropy=tables.entropy_rows(summary),
        training=rows,
        long_table=len(rows) > 4 * tables.ENDS_SHOWN,
        ends=tables.ENDS_SHOWN,
        details_left_out=details["left_out"],
        frame={"prefix": one_line(frame.prefix, 400, "both"), "suffix": one_line(frame.suffix, 200, "both")},
        has_frame=bool(frame.prefix or frame.suffix),
        prompts=prompt_table,
        prompts_left_out=prompts_left_out,
        buffers=tables.buffer_rows(results.evaluation, results.training, lookup(summary, "sampling")),
        checks=tables.check_rows(checks),
        provenance=tables.provenance_rows(results.raw_run, summary),
        horizon=tables.plain(lookup(summary, "attribution", "horizon_factor")),
    )


def write_report(results_dir: Path | str, unfinished: bool = False) -> Path:
    """Write ``figures/*.png`` and ``report.html`` into the results folder ``results_dir``; return the
    page's path. ``unfinished`` is for the writer of a ``….part`` folder, which is refused otherwise.

    Existing figures of the same names and an existing page are replaced.

    Raises
    ------
    rl_training.errors.UserError: the folder is not a whole results folder, or cannot be written to.
    """
    results = read_results_folder(results_dir, unfinished)
    images = {name: (png_bytes(figure), caption_of(figure)) for name, figure in draw_figures(results).items()}
    page = render_report(results, images)
    report = results.path / "report.html"
    try:
        figures = own_folder(results.path / "figures")
        for name, (png, _) in images.items():
            write_whole(figures / f"{name}.png", png)
        write_whole(report, page)
    except OSError as error:
        raise UserError(
            f"cannot write the report into {results.path} ({error.strerror}): check its permissions"
        ) from error
    return report

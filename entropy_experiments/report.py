"""One page that says what an analysis found: PNG figures, and one ``report.html`` that holds them all.

The page needs no network and runs no script; everything that a model or a file contributed is shown as
text. The same folder gives the same bytes.
"""

from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from entropy_experiments import report_tables as tables
from entropy_experiments.number_format import as_number, lookup, value_and_error
from entropy_experiments.plots import (
    caption_of,
    no_data_figure,
    plot_attribution,
    plot_entropy_split,
    plot_kernel_heatmap,
    plot_predicted_vs_actual,
    plot_training_history,
    png_bytes,
)
from entropy_experiments.report_analyses import analysis_sections, draw_analysis_figures
from entropy_experiments.results_folder import ResultsFolder, read_results_folder
from entropy_experiments.text_display import clip, one_line, prompt_frame
from entropy_experiments.verdict import primary_estimator, write_verdict
from rl_training.errors import UserError

_TEMPLATES = Path(__file__).parent / "templates"
# file name -> (heading, how to read the figure)
_FIGURES = {
    "training_history": (
        "Entropy and reward in training",
        "Top: the policy's entropy. Middle: mean reward. Bottom: for every step the change of entropy "
        "that the probe "
        "predicted from the gradient and the optimizer's step, beside the change it measured.",
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
        "Every bar is one training sequence's share of the batch part. A rewarded answer that the policy "
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
    summary, training, evaluation = results.summary, results.training, results.evaluation
    given = lookup(summary, "rows_drawn") is False
    estimator = "fixed_prefix" if given else primary_estimator(summary)
    parts = lookup(summary, "predicted", estimator) if estimator else None
    measured = lookup(summary, "actual", "fixed_prefix" if given else "snis")
    scaling = lookup(summary, "scaling")
    rows = [row for row in scaling if isinstance(row, dict)] if isinstance(scaling, list) else []
    figures = {
        "training_history": plot_training_history(
            results.history, analysed_step=as_number(lookup(summary, "checkpoint", "step"))
        ),
        "predicted_vs_actual": plot_predicted_vs_actual(
            rows,
            predicted_standard_error=None if given else value_and_error(lookup(parts, "total"))[1],
            actual_standard_error=None if given else value_and_error(measured)[1],
        ),
        "entropy_split": plot_entropy_split(parts, measured),
        "attribution": plot_attribution(
            *(_numbers(training, key) for key in ("delta_h", "reward")),
            [row["prompt_index"] for row in training],
            advantages=_numbers(training, "advantage"),
        ),
    }
    prompts = [row["prompt_index"] for row in evaluation], [row["prompt_index"] for row in training]
    for quantity in ("fisher", "entropy_fisher"):
        name = f"kernel_{quantity}"
        kernel = results.kernels.get(quantity)
        if kernel is None:
            figures[name] = no_data_figure(_FIGURES[name][0], "this analysis did not store this kernel.")
        else:
            figures[name] = plot_kernel_heatmap(kernel, *prompts, quantity=quantity)
    return figures | draw_analysis_figures(results)


def _numbers(rows: list[dict[str, Any]], key: str) -> list[float]:
    numbers = [as_number(row.get(key)) for row in rows]
    return [float("nan") if number is None else number for number in numbers]


def _visible_value(value: object) -> object:
    """Last line of defence, for every value the template prints: no control characters, no endless text."""
    if isinstance(value, Markup):
        return value
    return clip(value, 4000) if isinstance(value, str) else value


def render_report(results: ResultsFolder, images: dict[str, tuple[bytes, str]]) -> str:
    """The page for ``results`` as HTML; ``images`` maps a figure's name to (PNG, alternative text)."""
    checks = results.run.get("self_checks")
    checks = [check for check in checks if isinstance(check, dict)] if isinstance(checks, list) else []
    prompts = [row["prompt"] for row in results.evaluation + results.training]
    frame = prompt_frame(prompts)
    costly, giving = tables.costliest_and_most_giving(results.training)
    prompt_table, prompts_left_out = tables.prompt_rows(results.training, frame)
    summary = results.summary
    checkpoint = lookup(summary, "checkpoint")
    verdict = write_verdict(summary, results.history, checks, results.training, prompts)
    pictures = {
        name: {
            "name": name,
            "heading": _FIGURES.get(name, ("", ""))[0],
            "reading": _FIGURES.get(name, ("", ""))[1],
            "alt": alternative,
            # base64 needs no escaping and must not be cut
            "uri": Markup("data:image/png;base64," + b64encode(png).decode("ascii")),
        }
        for name, (png, alternative) in images.items()
    }
    analyses = [
        {"section": section, "figures": [pictures[name] for name in section.figures if name in pictures]}
        for section in analysis_sections(summary)
    ]
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible_value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    step = as_number(lookup(checkpoint, "step"))
    return environment.get_template("report.html.j2").render(
        model=one_line(str(lookup(checkpoint, "model") or "unnamed model"), 120),
        step="" if step is None else f"{step:g}",
        verdict=[{"tone": sentence.tone, "text": escape(sentence.text)} for sentence in verdict],
        headline=tables.headline(summary, checks),
        figures=[picture for name, picture in pictures.items() if name in _FIGURES],
        analyses=analyses,
        given_rows=lookup(summary, "rows_drawn") is False,
        estimators=tables.estimator_rows(summary),
        entropy=tables.entropy_rows(summary),
        costly=tables.sequence_rows(costly, frame),
        giving=tables.sequence_rows(giving, frame),
        frame={"prefix": one_line(frame.prefix, 400, "both"), "suffix": one_line(frame.suffix, 200, "both")},
        has_frame=bool(frame.prefix or frame.suffix),
        prompts=prompt_table,
        prompts_left_out=prompts_left_out,
        buffers=tables.buffer_rows(results.evaluation, results.training, lookup(summary, "sampling")),
        checks=tables.check_rows(checks),
        provenance=tables.provenance_rows(results.run, summary),
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
        (results.path / "figures").mkdir(exist_ok=True)
        for name, (png, _) in images.items():
            (results.path / "figures" / f"{name}.png").write_bytes(png)
        part = report.with_suffix(".html.part")
        part.write_text(page, encoding="utf-8", newline="\n")
        part.replace(report)
    except OSError as error:
        raise UserError(
            f"cannot write the report into {results.path} ({error.strerror}): check its permissions"
        ) from error
    return report

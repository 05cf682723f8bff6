"""What the notebook shows of a results folder: pieces of HTML, tables and pictures, made by the report's own functions.

Text of prompts and completions is made visible and escaped here: nothing in it acts. Pictures come from plots.py as PNG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

import numpy as np

from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.report.figures.plots import caption_of, no_data_figure, plot_kernel_heatmap, png_bytes
from entropy_experiments.report.page import figure_makers
from entropy_experiments.report.tables import buffer_table, check_table, entropy_table, estimator_table
from entropy_experiments.report.verdict import write_verdict
from entropy_experiments.statistics.confidence import Sentence
from entropy_experiments.text.display import one_line, prompt_frame, visible
from entropy_experiments.text.numbers import as_number, plain, series, signed

KERNELS = {
    "Fisher kernel K₁, evaluation × training": ("fisher", "fisher", "evaluation"),
    "Entropy–Fisher kernel K_H, evaluation × training": ("entropy_fisher", "entropy_fisher", "evaluation"),
    "Fisher kernel K₁, training × training": ("train_fisher", "fisher", "training"),
    "Entropy–Fisher kernel K_H, training × training": ("train_entropy_fisher", "entropy_fisher", "training"),
}
"""Name -> (key in the folder, quantity of plot_kernel_heatmap, buffer of the rows)."""
ORDERS = {
    "by prompt": None,
    "as drawn": "row",
    "by reward": "reward",
    "by length": "length",
    "by entropy of the completion": "entropy_sum",
    "by part in the change of entropy": "delta_h",
}
"""Name -> column that sequences are ordered by; None: grouped by prompt."""
_PICTURES = {
    "attribution": "Accounting shares of training sequences",
    "predicted_vs_actual": "Predicted and measured change",
}
_TONES = {"good": "#1a7f37", "bad": "#c62828", "warning": "#9a6700", "plain": "#57606a"}
_TEXT_CHARACTERS = 160


def verdict_html(results: ResultsFolder) -> str:
    """The report's sentences, each with a bar in its tone and the tone as a word for those who do not see it."""
    items = []
    for sentence in verdict_of(results):
        word = "" if sentence.tone in ("plain", "good") else f"<strong>{sentence.tone}:</strong> "
        colour = _TONES[sentence.tone]
        items.append(
            f'<li style="border-left:4px solid {colour};padding:.3em .8em;margin:.3em 0">{word}{escape(sentence.text)}</li>'
        )
    return f'<ul style="list-style:none;padding:0">{"".join(items)}</ul>'


def verdict_of(results: ResultsFolder) -> list[Sentence]:
    """The verdict on an analysis."""
    return write_verdict(results)


def table_html(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A small table of text; the first column holds names."""
    head = "".join(f'<th scope="col" style="text-align:left;padding:.2em .8em">{escape(h)}</th>' for h in headings)
    body = "".join(
        "<tr>" + "".join(f'<td style="padding:.2em .8em">{escape(visible(str(cell)))}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div style="overflow-x:auto"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def sequences_of(results: ResultsFolder, buffer: str, prompt: int | None = None) -> list[dict[str, Any]]:
    """The rows of "evaluation" or "training", of one prompt or of all."""
    rows = results.evaluation if buffer == "evaluation" else results.training
    return [row for row in rows if prompt is None or row["prompt_index"] == prompt]


def prompt_choices(results: ResultsFolder, buffer: str) -> dict[str, int | None]:
    """What a person picks from -> prompt number; the first entry stands for all of them."""
    frame = prompt_frame([row["prompt"] for row in [*results.training, *results.evaluation]])
    texts = {row["prompt_index"]: row["prompt"] for row in sequences_of(results, buffer)}
    choices: dict[str, int | None] = {"all prompts": None}
    for index in sorted(texts):
        choices[f"{index}: {one_line(frame.own_part(texts[index]), 60, 'end')}"] = index
    return choices


def sequence_records(results: ResultsFolder, buffer: str, prompt: int | None = None) -> list[dict[str, Any]]:
    """One record a sequence for a table that sorts, the most lowering first: texts on one line and visible."""
    frame = prompt_frame([row["prompt"] for row in [*results.training, *results.evaluation]])
    share = "delta_h" if buffer == "training" else "delta_h_lost"
    records = []
    for row in sequences_of(results, buffer, prompt):
        part = as_number(row.get(share))
        records.append(
            {
                "sequence": row["row"],
                "prompt": row["prompt_index"],
                "part of Δh, 10⁻³ nats per token": None if part is None else round(1e3 * part, 4),
                "reward": as_number(row.get("reward")),
                "tokens": as_number(row.get("length")),
                "question": one_line(frame.own_part(row["prompt"]), _TEXT_CHARACTERS, "end"),
                "completion": one_line(row["completion"], _TEXT_CHARACTERS),
            }
        )
    column = "part of Δh, 10⁻³ nats per token"
    return sorted(records, key=lambda record: (record[column] is None, record[column] or 0.0))


def sequence_html(results: ResultsFolder, buffer: str, number: int) -> str:
    """One sequence: its prompt, its numbers, and its completion with tokens coloured by their share of Δh."""
    rows = results.evaluation if buffer == "evaluation" else results.training
    if not 0 <= number < len(rows):
        return f"<p>There is no sequence {number} in the {escape(buffer)} buffer.</p>"
    row = rows[number]
    facts = [f"reward {plain(row.get('reward'))}", f"{plain(row.get('length'))} tokens"]
    if as_number(row.get("delta_h")) is not None:
        facts.append(f"accounting share of this step's change {signed(1e3 * row['delta_h'])} ×10⁻³ nats per token")
        if as_number(row.get("effect_of_leaving_out")) is not None:
            facts.append(f"effect of leaving it out {signed(1e3 * row['effect_of_leaving_out'])} ×10⁻³")
    elif as_number(row.get("delta_h_lost")) is not None:
        facts.append(f"part of the predicted change {signed(1e3 * row['delta_h_lost'])} ×10⁻³ nats per token")
    box = "white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #8884;border-radius:6px;padding:.6em"
    box += ";max-height:24em;overflow:auto"
    return (
        f"<p><strong>Sequence {number} of the {escape(buffer)} buffer, prompt {row['prompt_index']}</strong>: "
        f'{escape(", ".join(facts))}</p><div dir="auto" style="{box}">{escape(visible(row["prompt"]))}</div>'
        f'<div dir="auto" style="{box};margin-top:.5em">{_tokens_html(row)}</div>'
    )


def _tokens_html(row: Mapping[str, Any]) -> str:
    """The completion in coloured tokens where their texts and shares (or entropies) are stored, else as it is."""
    texts = row.get("token_texts")
    for column, meaning, unit in (
        ("token_shares", "share of Δh", "nats per token"),
        ("entropies", "entropy", "nats"),
    ):
        values = row.get(column)
        if not isinstance(texts, list) or not isinstance(values, list) or len(texts) != len(values) or not texts:
            continue
        numbers = np.array([np.nan if as_number(v) is None else float(v) for v in values])
        largest = float(np.nanmax(np.abs(numbers))) if np.isfinite(numbers).any() else 0.0
        spans = [
            f'<span title="{escape(f"{meaning} {signed(v)} {unit}")}" style="background:{_background(v, largest)}">'
            f"{escape(visible(str(text)))}</span>"
            for text, v in zip(texts, numbers.tolist(), strict=True)
        ]
        colours = (
            "orange lowers entropy, blue raises it"
            if column == "token_shares"
            else "blue: the more entropy, the darker"
        )
        scale = f"({colours}; the darkest is ±{plain(largest)} {unit})"
        note = f"<small>Colour: {meaning} of each token {scale}. Hover for numbers.</small>"
        return f"{''.join(spans)}<br>{note}"
    return f"{escape(visible(row['completion'])) or '(empty)'}<br><small>No shares of tokens were stored in this folder.</small>"


def _background(value: float, largest: float) -> str:
    """Orange below zero, blue above, stronger the larger; the text stays legible on both."""
    if not np.isfinite(value) or not largest:
        return "transparent"
    red, green, blue = (213, 94, 0) if value < 0 else (0, 114, 178)
    return f"rgba({red},{green},{blue},{0.55 * abs(value) / largest:.3f})"


def kernel_picture(results: ResultsFolder, kernel: str, order: str, prompt: int | None = None) -> tuple[bytes, str]:
    """(PNG, what it says in words) of one of KERNELS, its sequences in one of ORDERS; of one training prompt or all."""
    key, quantity, buffer = KERNELS[kernel]
    values = results.kernels.get(key)
    if values is None:
        return _picture(no_data_figure(kernel, "this analysis did not store this kernel."))
    columns = [row["row"] for row in sequences_of(results, "training", prompt)]
    rows = sequences_of(results, buffer)
    trained = [results.training[i] for i in columns]
    orders = None
    if ORDERS[order] is not None:
        orders = (order, _order(rows, ORDERS[order]), _order(trained, ORDERS[order]))
    prompts = [[row["prompt_index"] for row in side] for side in (rows, trained)]
    figure = plot_kernel_heatmap(values[:, columns], *prompts, quantity=quantity, order=orders, row_buffer=buffer)
    return _picture(figure)


def _order(rows: Sequence[Mapping[str, Any]], column: str | None) -> np.ndarray:
    """Rows in ascending order of a column, unknown ones last; evaluation sequences' part is what they lost."""
    values = series(rows, str(column))
    if column == "delta_h" and not np.isfinite(values).any():
        values = series(rows, "delta_h_lost")
    return np.argsort(values, kind="stable")


def picture_names(results: ResultsFolder) -> dict[str, str]:
    """What a person picks from -> name for `picture`: the figures of the step, of the run, and of each question answered."""
    made = [name for name in figure_makers(results) if not name.startswith("kernel_")]
    return {_PICTURES.get(name, name.replace("_", " ").capitalize()): name for name in made}


def picture(results: ResultsFolder, name: str) -> tuple[bytes, str]:
    """(PNG, what it says in words) of one of `picture_names`."""
    return _picture(figure_makers(results)[name]())


def _picture(figure: Any) -> tuple[bytes, str]:
    return png_bytes(figure), caption_of(figure)


def summaries_html(results: ResultsFolder, prompt: int | None = None) -> str:
    """What does not depend on the preconditioner P: the buffers (of one training prompt where given), entropies, checks."""
    own = sequences_of(results, "training", prompt)
    which = "training buffer" if prompt is None else f"training sequences of prompt {prompt}"
    sampling = results.summary.sampling if prompt is None else None
    buffers = buffer_table(results.evaluation, own, sampling)
    named = replace(buffers, columns=[(heading, True) for heading in ("", "evaluation buffer", which)])
    tables = (
        named,
        entropy_table(results.summary),
        estimator_table(results.summary),
        check_table(results.run.self_checks),
    )
    return "".join(
        f"<p>{escape(table.caption)}</p>" + table_html([heading for heading, _ in table.columns], table.texts)
        for table in tables
    )

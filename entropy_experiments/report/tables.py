"""The tables of a report, as rows of finished text: what the template prints needs no further arithmetic.

Shares of the change of entropy are in 10⁻³ nats per token, changes in nats per token; text of prompts and
completions is cut and made visible here (``text_display``) and escaped by the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.records.estimates import Estimate, Measurement
from entropy_experiments.records.preconditioner_labels import WORDS
from entropy_experiments.records.run_record import CheckRecord, RunRecord
from entropy_experiments.records.step_results import Estimator
from entropy_experiments.records.summary import SamplingRecord, Summary
from entropy_experiments.report.cells import estimate_cell, explained, is_trusted
from entropy_experiments.report.check_words import check_value
from entropy_experiments.report.content import Cell, Table, Tile
from entropy_experiments.report.verdict import PARTS
from entropy_experiments.statistics.estimand import measure_of
from entropy_experiments.text.display import PromptFrame, clip, one_line
from entropy_experiments.text.numbers import as_number, plain, plus_minus, series, signed, with_interval

_PROMPT_CHARACTERS, _COMPLETION_CHARACTERS, _FACT_CHARACTERS = 240, 320, 2000
_MOST_PROMPTS_EACH_END = 10
ENDS_SHOWN = 15
"""Training sequences at each end of the table that are printed where it is long."""
_UNIT = "nats per token"
_TILE_UNIT = f"{_UNIT}, ± standard error"
_ESTIMATORS: dict[Estimator, str] = {
    "rao_blackwell": "Rao–Blackwell (the default)",
    "split": "Split (derivative of the reweighted measurement, same sample)",
    "score_function": "Score function (noisiest)",
    "fixed_prefix": "Fixed prefix: on given tokens only, another quantity",
}


def headline(summary: Summary, checks: Sequence[CheckRecord]) -> list[Tile]:
    """The few numbers at the head of the page; of a step only where one was analysed."""
    passed = sum(check.passed for check in checks)
    level = "Entropy before the step" if summary.rows_drawn else "Entropy on the given tokens"
    tone = "" if checks and passed == len(checks) else "bad"
    return [
        Tile(level, _estimate(summary.entropy.per_token, plus=False), _TILE_UNIT, "summary.json: entropy.per_token"),
        *(_step_tiles(summary) if summary.step_analysed else []),
        Tile("Self-checks passed", f"{passed} of {len(checks)}", "", "run.json: self_checks", tone),
    ]


def _step_tiles(summary: Summary) -> list[Tile]:
    total, measured = None if summary.prediction is None else summary.prediction.total, summary.measured
    actual = f"summary.json: actual.{summary.estimand.measure}"
    tiles = [
        Tile("Predicted change", _estimate(total), _TILE_UNIT, f"summary.json: predicted.{summary.estimator}.total"),
        _measured_tile(measured, actual),
    ]
    if not summary.rows_drawn:  # nothing is reweighted
        return tiles
    effective, n = (None, None) if measured is None else (measured.effective_sample_size, measured.n)
    source, tone = f"{actual}.effective_sample_size", "warning" if is_trusted(measured) is False else ""
    return [
        *tiles,
        Tile("Effective sample", f"{plain(effective)} of {plain(n)}", "sequences, for the measurement", source, tone),
    ]


def _measured_tile(measured: Measurement | None, source: str) -> Tile:
    """Without an error where few sequences carry the measurement."""
    if is_trusted(measured) is False:
        return Tile("Measured change", estimate_cell(measured), f"{_UNIT}; see the effective sample", source, "warning")
    return Tile("Measured change", _estimate(measured), _TILE_UNIT, source)


def estimator_table(summary: Summary) -> Table:
    """One row an estimator: its total and parts, the measurement of the same quantity, and their distance z."""
    rows = []
    for name, label in _ESTIMATORS.items():
        parts = summary.predicted.get(name)
        if parts is None:
            continue
        stored = summary.agreement_of(name)
        compared = None if stored is None else stored.known()
        z = Cell("not known")
        if compared is not None:
            z = Cell(f"{compared.z:.1f}", look="" if compared.agrees else "bad")
        predicted = [_estimate(getattr(parts, part)) for part in ("total", *PARTS)]
        measured = getattr(summary.actual, measure_of(name))
        rows.append([label, *predicted, plain(None) if measured is None else estimate_cell(measured), z])
    numbers = ("Total predicted", "of it batch", "momentum", "weight decay", "Measured", "z")
    caption = (
        "Change of entropy over the full step, nats per token. z: distance of total and measured in standard errors of their "
        "difference; red where its 95% interval does not hold 0."
    )
    return Table(
        explained(caption, rows),
        [("Estimator", False), *((heading, True) for heading in numbers)],
        rows,
        "summary.json: predicted, actual, agreement",
    )


def entropy_table(summary: Summary) -> Table:
    """The policy's entropy before the step in its three readings."""
    entropy = summary.entropy
    if summary.rows_drawn:
        readings = {
            "Entropy per token h, nats per token": entropy.per_token,
            "Entropy per completion H, nats per completion": entropy.per_completion,
            "Mean surprisal −S per completion, nats (estimates the same H)": entropy.surprisal_per_completion,
        }
    else:
        readings = {"Entropy on the tokens of the given texts, nats per token": entropy.per_token}
    rows = [[label, _estimate(value, plus=False)] for label, value in readings.items()]
    return Table("The policy's entropy before the step, on the evaluation buffer.", (), rows, "summary.json: entropy")


def training_rows(rows: Sequence[Mapping[str, Any]], frame: PromptFrame) -> list[dict[str, Any]]:
    """All training sequences by their share, the most lowering first, unknown shares last.

    Finished text, and in "sort_by" the numbers that a page sorts by, "" for what is not known. "moved": in words, what the
    sequence did. "middle": not among the ENDS_SHOWN at either end.
    """
    order = np.argsort(series(rows, "delta_h"), kind="stable")
    return [
        _training_row(rows[i], frame) | {"middle": ENDS_SHOWN <= place < len(rows) - ENDS_SHOWN}
        for place, i in enumerate(order.tolist())
    ]


def _training_row(row: Mapping[str, Any], frame: PromptFrame) -> dict[str, Any]:
    share = as_number(row.get("delta_h"))
    columns = ("reward", "advantage", "length", "delta_h", "effect_of_leaving_out")
    numbers = {key: as_number(row.get(key)) for key in columns}
    return {
        "row": str(row["row"]),
        "prompt_index": str(row["prompt_index"]),
        "prompt": one_line(frame.own_part(row["prompt"]), _PROMPT_CHARACTERS, "both"),
        "completion": one_line(row["completion"], _COMPLETION_CHARACTERS),
        "reward": plain(row.get("reward")),
        "advantage": signed(row.get("advantage")),
        "length": plain(row.get("length")),
        "share": _thousandths(share, row.get("delta_h_low"), row.get("delta_h_high")),
        "effect": _thousandths(row.get("effect_of_leaving_out"), row.get("effect_low"), row.get("effect_high")),
        "sort_by": {key: "" if number is None else f"{number:.9g}" for key, number in numbers.items()},
        "moved": "not known" if share is None else "lowered" if share < 0 else "raised" if share > 0 else "unmoved",
    }


def prompt_table(training: Sequence[Mapping[str, Any]], frame: PromptFrame) -> Table:
    """Prompts with the sums of their sequences' shares, the most lowering first; those in the middle are left out."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in training:
        groups.setdefault(row["prompt_index"], []).append(row)
    sums = {prompt: float(np.nansum(series(rows, "delta_h"))) for prompt, rows in groups.items()}
    order = sorted(groups, key=lambda prompt: (sums[prompt], prompt))
    caption = "Sums over the sequences of each prompt, the most lowering first."
    if (left_out := len(order) - 2 * _MOST_PROMPTS_EACH_END) > 0:
        order = order[:_MOST_PROMPTS_EACH_END] + order[-_MOST_PROMPTS_EACH_END:]
        caption += f" The {left_out} prompts in the middle are left out."
    rows = [
        [
            str(prompt),
            Cell(one_line(frame.own_part(groups[prompt][0]["prompt"]), _PROMPT_CHARACTERS, "both"), look="text"),
            str(len(groups[prompt])),
            plain(_mean(series(groups[prompt], "reward"))),
            _thousandths(sums[prompt]),
            _thousandths(float(series(groups[prompt], "effect_of_leaving_out").sum())),
        ]
        for prompt in order
    ]
    sums_of = ("Sum of accounting shares (×10⁻³ nats/token)", "Effect of leaving out, sum (×10⁻³ nats/token)")
    numbers = ("Sequences", "Mean reward", *sums_of)
    columns = [("Prompt", False), ("Prompt text", False), *((heading, True) for heading in numbers)]
    return Table(caption, columns, rows, "sequences.parquet: sums over the training rows of one prompt")


def buffer_table(
    evaluation: Sequence[Mapping[str, Any]], training: Sequence[Mapping[str, Any]], sampling: SamplingRecord | None
) -> Table:
    """The two buffers side by side, computed from the sequences; then what the sampler counted."""

    def both(label: str, measure) -> list[str]:
        return [label, measure(evaluation), measure(training)]

    def per_token(key: str, sign: float):
        return lambda rows: plain(sign * _ratio(series(rows, key), series(rows, "length")))

    rows = [
        both("Sequences", lambda rows: str(len(rows))),
        both("Prompts", lambda rows: str(len({row["prompt_index"] for row in rows}))),
        both("Mean reward", lambda rows: plain(_mean(series(rows, "reward")))),
        both("Mean length, tokens", lambda rows: plain(_mean(series(rows, "length")))),
        both("Cut at the maximum length", _cut_share),
        both("Entropy, nats per token", per_token("entropy_sum", 1.0)),
        both("Surprisal, nats per token", per_token("score", -1.0)),
    ]
    words = {
        "rounds": "Sampling rounds",
        "generated": "Sequences generated",
        "rejected": "Rejected (whole group rewarded alike)",
        "kept": "Kept",
        "filler": "Filler (kept although without advantage)",
    }
    if sampling is not None:
        rows += [[label, "–", plain(getattr(sampling.training, key))] for key, label in words.items()]
    columns = (("Quantity", False), ("Evaluation", True), ("Training", True))
    source = "sequences.parquet, both buffers; what the sampler counted from summary.json: sampling"
    return Table("The two buffers side by side.", columns, rows, source)


def check_table(checks: Sequence[CheckRecord]) -> Table:
    """Self-checks, the failed ones first."""
    ordered = sorted(checks, key=lambda check: check.passed)
    rows = [
        [
            clip(check.name, 80),
            "passed" if check.passed else "FAILED",
            check_value(check),
            plain(check.tolerance),
            clip(check.explanation, _FACT_CHARACTERS),
        ]
        for check in ordered
    ]
    columns = (("Check", False), ("Result", False), ("Value", True), ("Tolerance", True), ("What it compares", False))
    return Table(
        "What the analysis checked about itself while it ran; failed checks come first.",
        columns,
        rows,
        "run.json: self_checks",
        failed=frozenset(place for place, check in enumerate(ordered) if not check.passed),
    )


def provenance_table(run: RunRecord, summary: Summary) -> Table:
    """Where the numbers come from: checkpoint, command, code, versions, machine, timings."""
    rows = summary.gradient_rows
    facts = [
        ("Analysed", run.created),
        ("Command", run.command),
        ("Checkpoint", run.checkpoint.path),
        ("Training step", plain(run.checkpoint.step)),
        ("Model", run.checkpoint.model),
        ("Training run", run.checkpoint.run_dir),
        ("Git commit", run.git_sha),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
        ("Hardware", ", ".join(f"{name} {value}" for name, value in run.hardware.model_dump().items())),
        (
            "Gradients per sequence",
            "batched passes (hooks), checked against autograd"
            if rows.method == "hooks"
            else f"one pass per sequence (loop): {rows.reason}",
        ),
        ("P of shares and step", WORDS[summary.attribution.preconditioner]),
        ("P of the kernel", WORDS[summary.attribution.kernel_preconditioner]),
        ("Stages", ", ".join(f"{stage.name} {plain(stage.seconds)} s" for stage in run.stages)),
        ("Seconds in all", plain(run.seconds)),
    ]
    return Table("", (), [[label, clip(fact or "not recorded", _FACT_CHARACTERS)] for label, fact in facts], "run.json")


def _estimate(estimate: Estimate | None, plus: bool = True) -> str:
    """Value and standard error."""
    return plain(None) if estimate is None else plus_minus(estimate.value, estimate.standard_error, plus)


def _thousandths(share: object, low: object = None, high: object = None) -> str:
    """In 10^-3 nats per token, with its interval where that is known."""
    number, *ends = (None if x is None else 1e3 * x for x in map(as_number, (share, low, high)))
    return signed(number) if None in ends else with_interval(number, *ends)


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _ratio(sums: np.ndarray, lengths: np.ndarray) -> float:
    known = np.isfinite(sums) & np.isfinite(lengths)
    tokens = lengths[known].sum()
    return float(sums[known].sum() / tokens) if tokens > 0 else float("nan")


def _cut_share(rows: Sequence[Mapping[str, Any]]) -> str:
    known = [row["truncated"] for row in rows if isinstance(row.get("truncated"), bool)]
    return f"{sum(known) / len(known):.0%}" if known else "not known"

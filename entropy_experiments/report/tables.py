"""The tables of a report, as rows of finished text: what the template prints needs no further arithmetic.

Shares of the change of entropy are in 10⁻³ nats per token, changes in nats per token; text of prompts and
completions is cut and made visible here (``text_display``) and escaped by the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.preconditioner_labels import WORDS
from entropy_experiments.records.run_record import CheckRecord, RunRecord
from entropy_experiments.records.step_results import Estimator
from entropy_experiments.records.summary import SamplingRecord, Summary
from entropy_experiments.report.check_words import check_value
from entropy_experiments.report.verdict import PARTS
from entropy_experiments.statistics.estimand import measure_of
from entropy_experiments.text.display import PromptFrame, clip, one_line
from entropy_experiments.text.numbers import as_number, plain, plus_minus, series, signed, with_interval

_PROMPT_CHARACTERS, _COMPLETION_CHARACTERS, _FACT_CHARACTERS = 240, 320, 400
_MOST_PROMPTS_EACH_END = 10
ENDS_SHOWN = 15
"""Training sequences at each end of the table that are printed where it is long."""
_ESTIMATORS: dict[Estimator, str] = {
    "rao_blackwell": "Rao–Blackwell (the default)",
    "split": "Split (derivative of the reweighted measurement, same sample)",
    "score_function": "Score function (noisiest)",
    "fixed_prefix": "Fixed prefix: on given tokens only, another quantity",
}


def headline(summary: Summary, checks: Sequence[CheckRecord]) -> list[dict[str, str]]:
    """The few numbers at the head of the page: label, value, unit, tone; of a step only where one was analysed."""
    passed = sum(check.passed for check in checks)
    tiles = [
        {
            "label": "Entropy before the step" if summary.rows_drawn else "Entropy on the given tokens",
            "value": _estimate(summary.entropy.per_token, plus=False),
            "unit": "nats per token",
            "source": "summary.json: entropy.per_token",
        }
    ]
    if summary.step_analysed:
        tiles += _step_tiles(summary)
    tiles.append(
        {
            "label": "Self-checks passed",
            "value": f"{passed} of {len(checks)}",
            "unit": "",
            "source": "run.json: self_checks",
            "tone": "" if checks and passed == len(checks) else "bad",
        }
    )
    return tiles


def _step_tiles(summary: Summary) -> list[dict[str, str]]:
    total, measured = None if summary.prediction is None else summary.prediction.total, summary.measured
    estimator = summary.estimator
    tiles = [
        {
            "label": "Predicted change",
            "value": _estimate(total),
            "unit": "nats per token",
            "source": f"summary.json: predicted.{estimator}.total",
        },
        {
            "label": "Measured change",
            "value": _estimate(measured),
            "unit": "nats per token",
            "source": f"summary.json: actual.{summary.estimand.measure}",
        },
    ]
    if not summary.rows_drawn:  # nothing is reweighted
        return tiles
    effective, n = (None, None) if measured is None else (measured.effective_sample_size, measured.n)
    weak = effective is not None and n is not None and effective < 0.5 * n
    return [
        *tiles,
        {
            "label": "Effective sample",
            "value": f"{plain(effective)} of {plain(n)}",
            "unit": "sequences",
            "source": f"summary.json: actual.{summary.estimand.measure}.effective_sample_size",
            "tone": "warning" if weak else "",
        },
    ]


def estimator_rows(summary: Summary) -> list[dict[str, str]]:
    """One row an estimator: its total and parts, the measurement of the same quantity, and their distance z."""
    rows = []
    for name, label in _ESTIMATORS.items():
        parts = summary.predicted.get(name)
        if parts is None:
            continue
        measured = getattr(summary.actual, measure_of(name))
        stored = summary.agreement.get(name)
        compared = None if stored is None else stored.known()
        row = {part: _estimate(getattr(parts, part)) for part in ("total", *PARTS)}
        row |= {
            "label": label,
            "measured": _estimate(measured),
            "z": "not known" if compared is None else f"{compared.z:.1f}",
            "tone": "bad" if compared is not None and not compared.agrees else "",
        }
        rows.append(row)
    return rows


def entropy_rows(summary: Summary) -> list[tuple[str, str]]:
    """The policy's entropy before the step in its three readings."""
    entropy = summary.entropy
    if not summary.rows_drawn:
        return [
            ("Entropy on the tokens of the given texts, nats per token", _estimate(entropy.per_token, plus=False)),
        ]
    return [
        ("Entropy per token h, nats per token", _estimate(entropy.per_token, plus=False)),
        ("Entropy per completion H, nats per completion", _estimate(entropy.per_completion, plus=False)),
        (
            "Mean surprisal −S per completion, nats (estimates the same H)",
            _estimate(entropy.surprisal_per_completion, plus=False),
        ),
    ]


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


def prompt_rows(training: Sequence[Mapping[str, Any]], frame: PromptFrame) -> tuple[list[dict[str, str]], int]:
    """Prompts with the sums of their sequences' shares, the most lowering first, and how many in the middle were
    left out.
    """
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in training:
        groups.setdefault(row["prompt_index"], []).append(row)
    sums = {prompt: float(np.nansum(series(rows, "delta_h"))) for prompt, rows in groups.items()}
    order = sorted(groups, key=lambda prompt: (sums[prompt], prompt))
    left_out = max(0, len(order) - 2 * _MOST_PROMPTS_EACH_END)
    if left_out:
        order = order[:_MOST_PROMPTS_EACH_END] + order[-_MOST_PROMPTS_EACH_END:]
    rows = [
        {
            "prompt_index": str(prompt),
            "prompt": one_line(frame.own_part(groups[prompt][0]["prompt"]), _PROMPT_CHARACTERS, "both"),
            "sequences": str(len(groups[prompt])),
            "reward": plain(_mean(series(groups[prompt], "reward"))),
            "share": _thousandths(sums[prompt]),
            "effect": _thousandths(float(series(groups[prompt], "effect_of_leaving_out").sum())),
        }
        for prompt in order
    ]
    return rows, left_out


def buffer_rows(
    evaluation: Sequence[Mapping[str, Any]], training: Sequence[Mapping[str, Any]], sampling: SamplingRecord | None
) -> list[tuple[str, str, str]]:
    """(what, evaluation buffer, training buffer), computed from the sequences; then what the sampler
    counted.
    """

    def both(label: str, measure) -> tuple[str, str, str]:
        return label, measure(evaluation), measure(training)

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
    counts = {} if sampling is None else {key: plain(getattr(sampling.training, key)) for key in words}
    return rows + [(words[key], "–", count) for key, count in counts.items()]


def check_rows(checks: Sequence[CheckRecord]) -> list[dict[str, Any]]:
    """Self-checks, the failed ones first."""
    rows = [
        {
            "passed": check.passed,
            "name": clip(check.name, 80),
            "value": check_value(check),
            "tolerance": plain(check.tolerance),
            "explanation": clip(check.explanation, _FACT_CHARACTERS),
        }
        for check in checks
    ]
    return sorted(rows, key=lambda row: row["passed"])


def provenance_rows(run: RunRecord, summary: Summary) -> list[tuple[str, str]]:
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
    return [(label, clip(fact or "not recorded", _FACT_CHARACTERS)) for label, fact in facts]


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

"""The tables of a report, as rows of finished text: what the template prints needs no further arithmetic.

Shares of the change of entropy are in 10⁻³ nats per token, changes in nats per token; text of prompts and
completions is cut and made visible here (``text_display``) and escaped by the template.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.records.preconditioner_labels import WORDS, preconditioner_labels
from entropy_experiments.report.check_words import check_value
from entropy_experiments.report.verdict import PARTS, primary_estimator
from entropy_experiments.statistics.agreement import stored_agreement
from entropy_experiments.text.display import PromptFrame, clip, one_line
from entropy_experiments.text.numbers import (
    as_number,
    lookup,
    plain,
    plus_minus,
    series,
    signed,
    value_and_error,
)

_PROMPT_CHARACTERS, _COMPLETION_CHARACTERS, _FACT_CHARACTERS = 240, 320, 400
_MOST_PROMPTS_EACH_END = 10
ENDS_SHOWN = 15
"""Training sequences at each end of the table that are printed where it is long."""
_ESTIMATORS = {
    "rao_blackwell": "Rao–Blackwell (the default)",
    "split": "Split (derivative of the reweighted measurement, same sample)",
    "score_function": "Score function (noisiest)",
    "fixed_prefix": "Fixed prefix: on given tokens only, another quantity",
}


def headline(summary: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The few numbers at the head of the page: label, value, unit, tone; of a step only where one was analysed."""
    given = lookup(summary, "rows_drawn") is False
    entropy = value_and_error(lookup(summary, "entropy", "per_token"))
    passed = sum(check.get("passed") is True for check in checks)
    tiles = [
        {
            "label": "Entropy on the given tokens" if given else "Entropy before the step",
            "value": plus_minus(*entropy, plus=False),
            "unit": "nats per token",
        }
    ]
    if lookup(summary, "step_analysed") is not False:
        tiles += _step_tiles(summary, given)
    tiles.append(
        {
            "label": "Self-checks passed",
            "value": f"{passed} of {len(checks)}",
            "unit": "",
            "tone": "" if checks and passed == len(checks) else "bad",
        }
    )
    return tiles


def _step_tiles(summary: Mapping[str, Any], given: bool) -> list[dict[str, str]]:
    name = "fixed_prefix" if given else primary_estimator(summary) or "rao_blackwell"
    measured = lookup(summary, "actual", "fixed_prefix" if given else "snis")
    tiles = [
        {
            "label": "Predicted change",
            "value": plus_minus(*value_and_error(lookup(summary, "predicted", name, "total"))),
            "unit": "nats per token",
        },
        {"label": "Measured change", "value": plus_minus(*value_and_error(measured)), "unit": "nats per token"},
    ]
    if given:  # nothing is reweighted
        return tiles
    effective, n = (as_number(lookup(measured, key)) for key in ("effective_sample_size", "n"))
    weak = effective is not None and n is not None and effective < 0.5 * n
    return [
        *tiles,
        {
            "label": "Effective sample",
            "value": f"{plain(effective)} of {plain(n)}",
            "unit": "sequences",
            "tone": "warning" if weak else "",
        },
    ]


def estimator_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row an estimator: its total and parts, the measurement of the same quantity, and their distance
    z.
    """
    rows = []
    for name, label in _ESTIMATORS.items():
        parts = lookup(summary, "predicted", name)
        if parts is None:
            continue
        measured = lookup(summary, "actual", "fixed_prefix" if name == "fixed_prefix" else "snis")
        compared = stored_agreement(summary, name)
        row = {part: plus_minus(*value_and_error(lookup(parts, part))) for part in ("total", *PARTS)}
        row |= {
            "label": label,
            "measured": plus_minus(*value_and_error(measured)),
            "z": "not known" if compared is None else f"{compared.z:.1f}",
            "tone": "bad" if compared is not None and not compared.agrees else "",
        }
        rows.append(row)
    return rows


def entropy_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The policy's entropy before the step in its three readings."""
    if lookup(summary, "rows_drawn") is False:
        given = value_and_error(lookup(summary, "entropy", "per_token"))
        return [("Entropy on the tokens of the given texts, nats per token", plus_minus(*given, plus=False))]
    readings = (
        ("Entropy per token h, nats per token", "per_token"),
        ("Entropy per completion H, nats per completion", "per_completion"),
        ("Mean surprisal −S per completion, nats (estimates the same H)", "surprisal_per_completion"),
    )
    return [
        (label, plus_minus(*value_and_error(lookup(summary, "entropy", key)), plus=False)) for label, key in readings
    ]


def training_rows(rows: Sequence[Mapping[str, Any]], frame: PromptFrame) -> list[dict[str, Any]]:
    """All training sequences by their share, the most costing first, unknown shares last.

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
        "share": _thousandths(share),
        "effect": _thousandths(row.get("effect_of_leaving_out")),
        "sort_by": {key: "" if number is None else f"{number:.9g}" for key, number in numbers.items()},
        "moved": "not known" if share is None else "lowered" if share < 0 else "raised" if share > 0 else "unmoved",
    }


def prompt_rows(training: Sequence[Mapping[str, Any]], frame: PromptFrame) -> tuple[list[dict[str, str]], int]:
    """Prompts with the sums of their sequences' shares, costliest first, and how many in the middle were
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
    evaluation: Sequence[Mapping[str, Any]], training: Sequence[Mapping[str, Any]], sampling: object
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
    for key, label in words.items():
        counts = [lookup(sampling, name, key) for name in ("evaluation", "training")]
        if any(count is not None for count in counts):
            rows.append((label, *("–" if count is None else plain(count) for count in counts)))
    return rows


def check_rows(checks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Self-checks, the failed ones first."""
    rows = [
        {
            "passed": check.get("passed") is True,
            "name": clip(str(check.get("name", "unnamed")), 80),
            "value": check_value(check),
            "tolerance": plain(check.get("tolerance")),
            "explanation": clip(str(check.get("explanation", "")), _FACT_CHARACTERS),
        }
        for check in checks
    ]
    return sorted(rows, key=lambda row: row["passed"])


def provenance_rows(run: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where the numbers come from: checkpoint, command, code, versions, machine, timings."""
    checkpoint = lookup(run, "checkpoint") or lookup(summary, "checkpoint")
    facts = [
        ("Analysed", run.get("created")),
        ("Command", run.get("command")),
        ("Checkpoint", lookup(checkpoint, "path")),
        ("Training step", lookup(checkpoint, "step")),
        ("Model", lookup(checkpoint, "model")),
        ("Training run", lookup(checkpoint, "run_dir")),
        ("Git commit", run.get("git_sha")),
        ("Versions", _listed(run.get("versions"))),
        ("Hardware", _listed(run.get("hardware"))),
        ("Gradients per sequence", _rows_formed(lookup(summary, "gradient_rows"))),
        *_preconditioners(summary),
        ("Stages", _stages(run.get("stages"))),
        ("Seconds in all", run.get("seconds")),
    ]
    return [(label, clip(_text(fact), _FACT_CHARACTERS)) for label, fact in facts]


def _preconditioners(summary: Mapping[str, Any]) -> list[tuple[str, object]]:
    shares, kernel = preconditioner_labels(summary)
    rows = [("P of shares and step", shares), ("P of the kernel", kernel)]
    return [(name, None if label is None else WORDS.get(label, label)) for name, label in rows]


def _rows_formed(found: object) -> str | None:
    """By hooks or by a loop, and why."""
    if not isinstance(found, Mapping):
        return None
    if found.get("method") == "hooks":
        return "batched passes (hooks), held against autograd"
    return f"one pass per sequence (loop): {found.get('reason')}"


def _text(fact: object) -> str:
    if fact is None or fact == "":
        return "not recorded"
    return plain(fact) if as_number(fact) is not None else str(fact)


def _listed(facts: object) -> str | None:
    if not isinstance(facts, Mapping) or not facts:
        return None
    return ", ".join(f"{name} {_text(fact)}" for name, fact in facts.items())


def _stages(stages: object) -> str | None:
    if not isinstance(stages, list):
        return None
    known = [stage for stage in stages if isinstance(stage, Mapping)]
    return ", ".join(f"{stage.get('name')} {plain(stage.get('seconds'))} s" for stage in known) or None


def _thousandths(share: object) -> str:
    number = as_number(share)
    return signed(None if number is None else number * 1e3)


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

"""The outcome of one analysis in a few numbers: what the closing table shows and what ``--json`` prints.

An outcome is a plain dict that JSON can hold. A number that is not known is None, never NaN; entropies and
their changes are in nats per token.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_experiments.records.reader import ResultsFolder, read_results_folder
from entropy_experiments.report.verdict import PARTS, analysis_errors, primary_estimator, write_verdict
from entropy_experiments.statistics.agreement import stored_agreement
from entropy_experiments.statistics.confidence import freedom_of_analysis, number_entry
from entropy_experiments.text.numbers import as_number, lookup

_UNIT = "nats per token"


def read_outcome(folder: Path | str) -> dict[str, Any]:
    """`analysis_outcome` of the results folder at `folder`. Raises UserError where it is not a whole one."""
    return analysis_outcome(read_results_folder(folder))


def analysis_outcome(results: ResultsFolder) -> dict[str, Any]:
    """The numbers of one analysis as a person would tell them.

    Keys: "folder", "report"; "checkpoint" ("path", "step", "model"); "unit"; "entropy", "predicted", "measured", each
    {"value", "standard_error", "low", "high", "degrees_of_freedom"}, "measured" also with "effective_sample_size" and
    "sequences"; "estimator"; "parts" by part of the step; "agreement" (entropy_experiments.statistics.agreement) or None;
    "training_noise" ("standard_error", "low", "high": what another draw of the training buffer would make of the predicted
    change) or None;
    "same_prompt" ("cosine", "cosine_other_prompts", "p_value", "signs_agree": whether raw K1 differs in the same direction);
    "checks" ("passed", "failed": their names); "failed_analyses": name -> what went wrong; "verdict": the report's sentences,
    each {"tone", "text"}.
    """
    summary = results.raw
    given = lookup(summary, "rows_drawn") is False
    estimator = "fixed_prefix" if given else primary_estimator(summary)
    predicted = lookup(summary, "predicted", estimator) if estimator else None
    measured = lookup(summary, "actual", "fixed_prefix" if given else "snis")
    checks = lookup(results.raw_run, "self_checks")
    checks = [check for check in checks if isinstance(check, Mapping)] if isinstance(checks, list) else []
    compared, freedom = stored_agreement(summary, estimator), freedom_of_analysis(summary)
    prompts = [row["prompt"] for row in [*results.training, *results.evaluation]]
    verdict = write_verdict(summary, results.raw_history, checks, results.training, prompts)
    return {
        "folder": str(results.path),
        "report": str(results.path / "report.html"),
        "checkpoint": {key: lookup(summary, "checkpoint", key) for key in ("path", "step", "model")},
        "unit": _UNIT,
        "entropy": number_entry(lookup(summary, "entropy", "per_token"), freedom),
        "estimator": estimator,
        "predicted": number_entry(lookup(predicted, "total"), freedom),
        "parts": {part: number_entry(lookup(predicted, part), freedom) for part in PARTS},
        "measured": {
            **number_entry(measured, freedom),
            "effective_sample_size": as_number(lookup(measured, "effective_sample_size")),
            "sequences": as_number(lookup(measured, "n")),
        },
        "agreement": None if compared is None else compared.as_dict(),
        "training_noise": _training_noise(summary),
        "same_prompt": same_prompt_effect(summary),
        "checks": {
            "passed": sum(check.get("passed") is True for check in checks),
            "failed": [str(check.get("name", "unnamed")) for check in checks if check.get("passed") is not True],
        },
        "failed_analyses": analysis_errors(summary),
        "verdict": [{"tone": sentence.tone, "text": sentence.text} for sentence in verdict],
    }


def same_prompt_effect(summary: Mapping[str, Any]) -> dict[str, float | bool | None]:
    """Mean cosine of two training sequences' gradients with one prompt and with two, the p-value of the difference, and whether
    raw K1 differs in the same direction (None where that is not known).
    """
    agree = lookup(summary, "analyses", "prompt_structure", "train", "signs_agree")
    cosine = lookup(summary, "analyses", "prompt_structure", "train", "cosine")
    return {
        "cosine": as_number(lookup(cosine, "same_prompt", "mean")),
        "cosine_other_prompts": as_number(lookup(cosine, "cross_prompt", "mean")),
        "p_value": as_number(lookup(cosine, "test", "p_value")),
        "signs_agree": agree if isinstance(agree, bool) else None,
    }


def _training_noise(summary: Mapping[str, Any]) -> dict[str, float | None] | None:
    noise = lookup(summary, "training_noise")
    found = {name: as_number(lookup(noise, name)) for name in ("standard_error", "low", "high")}
    return None if None in found.values() else found

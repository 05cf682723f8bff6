"""The outcome of one analysis in a few numbers: what the closing table shows and what ``--json`` prints.

An outcome is a plain dict that JSON can hold. A number that is not known is None, never NaN; entropies and
their changes are in nats per token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entropy_experiments.records.analysis_results import finished
from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.reader import ResultsFolder, read_results_folder
from entropy_experiments.records.summary import Summary
from entropy_experiments.report.verdict import PARTS, write_verdict

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
    summary, checks = results.summary, results.run.self_checks
    predicted, measured = summary.prediction, summary.measured
    compared, noise = summary.compared, summary.training_noise
    return {
        "folder": str(results.path),
        "report": str(results.path / "report.html"),
        "checkpoint": {key: getattr(summary.checkpoint, key) for key in ("path", "step", "model")},
        "unit": _UNIT,
        "entropy": _entry(summary.entropy.per_token),
        "estimator": summary.estimator,
        "predicted": _entry(None if predicted is None else predicted.total),
        "parts": {part: _entry(None if predicted is None else getattr(predicted, part)) for part in PARTS},
        "measured": {
            **_entry(measured),
            "effective_sample_size": None if measured is None else measured.effective_sample_size,
            "sequences": None if measured is None else measured.n,
        },
        "agreement": None if compared is None else compared.as_dict(),
        "training_noise": None
        if noise is None
        else {name: getattr(noise, name) for name in ("standard_error", "low", "high")},
        "same_prompt": same_prompt_effect(summary),
        "checks": {
            "passed": sum(check.passed for check in checks),
            "failed": [check.name for check in checks if not check.passed],
        },
        "failed_analyses": summary.analyses.failed(),
        "verdict": [{"tone": sentence.tone, "text": sentence.text} for sentence in write_verdict(results)],
    }


def same_prompt_effect(summary: Summary) -> dict[str, float | bool | None]:
    """Mean cosine of two training sequences' gradients with one prompt and with two, the p-value of the difference, and whether
    raw K1 differs in the same direction (None where that is not known).
    """
    structure = finished(summary.analyses.prompt_structure)
    if structure is None:
        return dict.fromkeys(("cosine", "cosine_other_prompts", "p_value", "signs_agree"))
    cosine = structure.train.cosine
    return {
        "cosine": cosine.same_prompt.mean,
        "cosine_other_prompts": cosine.cross_prompt.mean,
        "p_value": cosine.test.p_value,
        "signs_agree": structure.train.signs_agree,
    }


def _entry(estimate: Estimate | None) -> dict[str, float | None]:
    names = ("value", "low", "high", "standard_error", "degrees_of_freedom")
    return {name: None if estimate is None else getattr(estimate, name) for name in names}

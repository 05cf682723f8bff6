"""The outcome of one analysis in a few numbers: what the closing table shows and what ``--json`` prints."""

from __future__ import annotations

from pathlib import Path

from entropy_experiments.records.analysis_results import finished
from entropy_experiments.records.estimates import NO_ESTIMATE, Estimate
from entropy_experiments.records.outcome_record import (
    ChecksOutcome,
    MeasuredOutcome,
    NoiseOutcome,
    Outcome,
    SamePrompt,
    SentenceRecord,
)
from entropy_experiments.records.reader import ResultsFolder, read_results_folder
from entropy_experiments.records.summary import AgreementRecord, Parts, Summary
from entropy_experiments.report.verdict import write_verdict


def read_outcome(folder: Path | str) -> Outcome:
    """`analysis_outcome` of the results folder at `folder`. Raises UserError where it is not a whole one."""
    return analysis_outcome(read_results_folder(folder))


def analysis_outcome(results: ResultsFolder) -> Outcome:
    """The numbers of one analysis as a person would tell them."""
    summary, checks = results.summary, results.run.self_checks
    predicted, measured, noise = summary.prediction, summary.measured, summary.training_noise
    return Outcome(
        folder=str(results.path),
        report=str(results.path / "report.html"),
        checkpoint=summary.checkpoint,
        unit="nats per token",
        entropy=_whole(summary.entropy.per_token),
        estimator=summary.estimator,
        predicted=_whole(None if predicted is None else predicted.total),
        parts=Parts(
            **{part: _whole(None if predicted is None else getattr(predicted, part)) for part in Parts.model_fields}
        ),
        measured=MeasuredOutcome(
            **_whole(measured).model_dump(),
            effective_sample_size=None if measured is None else measured.effective_sample_size,
            sequences=None if measured is None else measured.n,
        ),
        agreement=None if summary.compared is None else AgreementRecord(**summary.compared.as_dict()),
        training_noise=None
        if noise is None
        else NoiseOutcome(standard_error=noise.standard_error, low=noise.low, high=noise.high),
        same_prompt=same_prompt_effect(summary),
        checks=ChecksOutcome(
            passed=sum(check.passed for check in checks), failed=[check.name for check in checks if not check.passed]
        ),
        failed_analyses=summary.analyses.failed(),
        verdict=[SentenceRecord.of(sentence) for sentence in write_verdict(results)],
    )


def same_prompt_effect(summary: Summary) -> SamePrompt:
    """How alike the gradients of training sequences of one prompt are, beside those of two."""
    structure = finished(summary.analyses.prompt_structure)
    if structure is None:
        return SamePrompt(cosine=None, cosine_other_prompts=None, p_value=None, signs_agree=None)
    cosine = structure.train.cosine
    return SamePrompt(
        cosine=cosine.same_prompt.mean,
        cosine_other_prompts=cosine.cross_prompt.mean,
        p_value=cosine.test.p_value,
        signs_agree=structure.train.signs_agree,
    )


def _whole(estimate: Estimate | None) -> Estimate:
    """With every field of `Estimate`, so that JSON has them all."""
    estimate = estimate or NO_ESTIMATE
    return Estimate(**{name: getattr(estimate, name) for name in Estimate.model_fields})

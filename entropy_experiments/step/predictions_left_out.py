"""Predictions with each evaluation prompt left out of everything that they rest on, from the products of an analysis.

A prediction is a mean of contributions, but these are centred by the batch's own entropy, divided by its mean length, or hold a
baseline made of other sequences: without a prompt all of it is another. Held at the whole batch's values, the standard error
misses that, and the error of predicted minus measured, whose measured side is recomputed, is several times too large.
Source: docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import Estimator, entropy_coefficients
from entropy_core.scores import TokenStatistics
from entropy_core.uncertainty import contributions_without_each_prompt, jackknife_standard_error
from entropy_experiments.step.numbers import Estimate


def products_without_each_prompt(
    rows: list[Tensor],
    statistics: TokenStatistics,
    batch: SequenceBatch,
    estimator: Estimator,
    per_token: bool,
    first: int,
) -> Tensor:
    """(B, columns from `first`) of an estimator's means with each prompt left out of everything: h, lengths, baselines.

    rows: of fisher_analyzer._contract, the products of score and of entropy rows, of Rao-Blackwell ones per token and per
    completion. Rao-Blackwell per token is (A_i - h B_i) n / sum T with A_i its terms per completion.
    """
    score, plain, per_completion = rows[0][:, first:], rows[1][:, first:], rows[-1][:, first:]
    sums = statistics.entropy_sums().to(score).unsqueeze(1)
    lengths = batch.completion_lengths.to(score).unsqueeze(1)
    if estimator == "rao_blackwell" and per_token:
        centred = (per_completion - rows[2][:, first:] * lengths.mean()) / (sums.sum() / lengths.sum()).clamp(
            min=1e-300
        )

    def of_rows(kept: Tensor) -> Tensor:
        if estimator == "rao_blackwell":
            if not per_token:
                return per_completion[kept]
            h = sums[kept].sum() / lengths[kept].sum()
            return (per_completion[kept] - h * centred[kept]) / lengths[kept].mean()
        c = entropy_coefficients(statistics.select(kept), batch.select(kept.tolist()), estimator, per_token)
        alpha, gamma = c.entropy.amax(1, keepdim=True), (c.logprob.amax(1) + c.logprob.amin(1))[:, None]
        return alpha.to(score) * plain[kept] + gamma.to(score) * score[kept]

    return contributions_without_each_prompt(batch.prompt_index, of_rows)


def estimate_with_error(value: Tensor, left_out: Tensor) -> Estimate:
    """A value with the jackknife standard error of its (B,) values without each prompt."""
    return Estimate(float(value), jackknife_standard_error(left_out), left_out)

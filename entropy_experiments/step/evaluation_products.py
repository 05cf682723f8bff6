"""Products of every estimator's rows E_t with the same columns, out of those of the few kinds of rows that passes are made of.

    coefficients equal over a sequence's tokens     E_t^T c = alpha_t own_tokens_t^T c + gamma_t score_t^T c
    Rao-Blackwell                                   rows of their own

A mean over sequences is a prediction. Without a prompt it is another: contributions are centred by the batch's own entropy,
divided by its mean length, or hold a baseline made of other sequences. Held at the whole batch's values, the standard error
would miss that, and the error of predicted minus measured, whose measured side is recomputed, be several times too large.
Source: docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import Estimator, TokenCoefficients, entropy_coefficients, score_coefficients
from entropy_core.scores import TokenStatistics
from entropy_core.uncertainty import contributions_without_each_prompt, jackknife_standard_error
from entropy_experiments.kernel.contraction import ROW_KINDS, RowKind
from entropy_experiments.statistics.estimand import Estimand
from entropy_experiments.step.numbers import Estimate


@dataclass(frozen=True)
class EvaluationSide:
    """The evaluation sequences under the policy that is analysed, and what they are asked about."""

    batch: SequenceBatch
    statistics: TokenStatistics
    estimand: Estimand

    def coefficients(self) -> dict[RowKind, TokenCoefficients]:
        """Of the kinds of rows that serve all of the estimand's estimators, in the order of ROW_KINDS."""
        mask = self.batch.completion_mask.double()
        found: dict[RowKind, TokenCoefficients] = {
            "score": score_coefficients(self.batch),
            "own_tokens": TokenCoefficients(mask, torch.zeros_like(mask)),
        }
        if "rao_blackwell" in self.estimand.estimators:
            for kind, per_token in (("per_token", True), ("per_completion", False)):
                found[kind] = entropy_coefficients(self.statistics, self.batch, "rao_blackwell", per_token)
        return {kind: found[kind] for kind in self.kinds_of(self.estimand)}

    @staticmethod
    def kinds_of(estimand: Estimand) -> tuple[RowKind, ...]:
        """Of the rows that `coefficients` gives."""
        given = ("score", "own_tokens")
        return ROW_KINDS if "rao_blackwell" in estimand.estimators else given

    @property
    def kernel_kinds(self) -> tuple[RowKind, ...]:
        """Whose products with the training rows the kernels are made of."""
        return ("score", "per_token" if self.estimand.gradient == "rao_blackwell" else "own_tokens")

    @property
    def headline_kinds(self) -> tuple[RowKind, ...]:
        """Those of the gradient of entropy: per token and per completion, or on given tokens."""
        return ("per_token", "per_completion") if self.estimand.gradient == "rao_blackwell" else ("own_tokens",)


@dataclass(frozen=True)
class EvaluationProducts:
    """products: kind -> (N, columns) float64."""

    side: EvaluationSide
    products: Mapping[RowKind, Tensor]

    def of(self, estimator: Estimator, per_token: bool) -> Tensor:
        """(N, columns) E_t^T column, whose mean over t is the prediction."""
        if estimator == "rao_blackwell":
            return self.products["per_token" if per_token else "per_completion"]
        return self._combined(torch.arange(len(self.side.batch)), estimator, per_token)

    def without_each_prompt(self, estimator: Estimator, per_token: bool) -> Tensor:
        """(B, columns) means with each prompt left out of everything: h, lengths, baselines."""
        return contributions_without_each_prompt(
            self.side.batch.prompt_index, lambda kept: self.contributions(kept, estimator, per_token)
        )

    def contributions(self, kept: Tensor, estimator: Estimator, per_token: bool) -> Tensor:
        """(m, columns) E_t^T column of the (m,) sequences `kept`, as a batch of their own: its h, lengths and baselines."""
        if estimator != "rao_blackwell":
            return self._combined(kept, estimator, per_token)
        if not per_token:
            return self.products["per_completion"][kept]
        # Rao-Blackwell per token is (A_i - h B_i) n / sum T, with A_i its terms per completion.
        sums, lengths, centred = self._rao_blackwell
        h = sums[kept].sum() / lengths[kept].sum()
        return (self.products["per_completion"][kept] - h * centred[kept]) / lengths[kept].mean()

    @cached_property
    def _rao_blackwell(self) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 1) entropy sums and lengths, and (N, columns) the terms B_i of its centre."""
        whole, terms = self.products["per_token"], self.products["per_completion"]
        sums = self.side.statistics.entropy_sums().to(whole).unsqueeze(1)
        lengths = self.side.batch.completion_lengths.to(whole).unsqueeze(1)
        return sums, lengths, (terms - whole * lengths.mean()) / (sums.sum() / lengths.sum()).clamp(min=1e-300)

    def estimate(self, estimator: Estimator, per_token: bool) -> list[Estimate]:
        """One for each column."""
        values = self.of(estimator, per_token).mean(0)
        if not error_is_known(estimator, self.side.batch):
            return [Estimate(float(value), math.nan, None) for value in values]
        left_out = self.without_each_prompt(estimator, per_token)
        return [estimate_with_error(values[k], left_out[:, k]) for k in range(len(values))]

    def _combined(self, kept: Tensor, estimator: Estimator, per_token: bool) -> Tensor:
        batch = self.side.batch.select(kept.tolist())
        c = entropy_coefficients(self.side.statistics.select(kept), batch, estimator, per_token)
        # equal over a sequence's tokens: the first one's
        first = batch.completion_mask.long().argmax(1, keepdim=True)
        own, score = self.products["own_tokens"], self.products["score"]
        alpha, gamma = (part.gather(1, first).to(score) for part in (c.entropy, c.logprob))
        return alpha * own[kept] + gamma * score[kept]


def error_is_known(estimator: Estimator, batch: SequenceBatch) -> bool:
    """Whether an error can be made of the prompts: not of the score function where most of them have a single completion.

    Its baseline is that of other prompts then, and it rests on completions so rare that most buffers hold none of them: in exact
    worlds its 95% intervals cover 82 to 91% of 4 to 64 such prompts, and 93 to 96% from two completions a prompt on.
    """
    return (
        estimator != "score_function"
        or float((batch.prompt_index.unique(return_counts=True)[1] == 1).double().mean()) <= 0.5
    )


def estimate_with_error(value: Tensor, left_out: Tensor) -> Estimate:
    """A value with the jackknife standard error of its (B,) values without each prompt."""
    return Estimate(float(value), jackknife_standard_error(left_out), left_out)

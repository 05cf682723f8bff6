"""Tokens that the probe watches across one step, and what they say of the policy before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import effective_sample_size, normalized_weights
from entropy_core.scores import TokenStatistics
from entropy_core.uncertainty import Estimate, jackknife_standard_error, leave_one_prompt_out


@dataclass(frozen=True)
class Observation:
    """log_weights: (N,) today's policy against the distribution the sequences were drawn from, None where today's drew them."""

    batch: SequenceBatch
    statistics: TokenStatistics
    log_weights: Tensor | None

    def effective_size(self) -> float:
        """How many sequences count after weighting."""
        return effective_sample_size(self._weights())

    def entropy(self) -> Estimate:
        """h in nats per token, with its jackknife over the prompts of the sequences; no error for a single prompt."""
        weights = self._weights()
        sums, lengths = weights * self.statistics.entropy_sums().cpu(), weights * self.batch.completion_lengths.cpu()
        left_out = leave_one_prompt_out(sums, self.batch.prompt_index.cpu(), lengths)
        error = jackknife_standard_error(left_out)
        return Estimate(float(sums.sum() / lengths.sum()), error, max(1, len(left_out) - 1))

    def _weights(self) -> Tensor:
        if self.log_weights is None:
            return torch.ones(len(self.batch), dtype=torch.float64)
        return normalized_weights(self.log_weights).cpu()


def joint_log_weights(
    statistics: TokenStatistics, drawn_scores: Tensor | None, prior_log_weights: Tensor | None
) -> Tensor | None:
    """Log-weights of sequences that another policy or an uneven draw of prompts gave.

    Args:
        statistics: under today's policy.
        drawn_scores: (N,) log-probabilities under the policy that drew them, in nats; None where that is today's.
        prior_log_weights: (N,) further ones; None where there are none.

    Returns:
        (N,) float64; None where all weigh the same.
    """
    parts = [] if prior_log_weights is None else [prior_log_weights.double()]
    if drawn_scores is not None:
        parts.append(statistics.scores() - drawn_scores.double())
    return torch.stack(parts).sum(0) if parts else None

"""Tokens that the probe watches across one step, and what they say of the policy before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import effective_sample_size, normalized_weights
from entropy_core.scores import TokenStatistics


@dataclass(frozen=True)
class Observation:
    """log_weights: (N,) today's policy against the law that drew the sequences, None where today's drew them."""

    batch: SequenceBatch
    statistics: TokenStatistics
    log_weights: Tensor | None

    def size_and_entropy(self) -> tuple[int, float, float]:
        """Sequences, their effective number after weighting, and h in nats per token."""
        weights = torch.ones(len(self.batch), dtype=torch.float64)
        if self.log_weights is not None:
            weights = normalized_weights(self.log_weights).cpu()
        sums, lengths = self.statistics.entropy_sums().cpu(), self.batch.completion_lengths.cpu()
        entropy = float((weights * sums).sum() / (weights * lengths).sum())
        return len(self.batch), effective_sample_size(weights), entropy

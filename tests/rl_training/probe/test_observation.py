"""The probe's entropy comes with the error of its own sequences, over prompts."""

import math

import pytest
import torch

from entropy_core.batch import SequenceBatch
from entropy_core.scores import TokenStatistics
from rl_training.probe.observation import Observation


@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_of_entropy_leaves_out_prompts(weighted):
    generator = torch.Generator().manual_seed(0)
    lengths, prompts = [2, 3, 1, 4, 2], [0, 0, 1, 2, 3]
    batch = SequenceBatch.from_sequences(
        [[1, 2]] * 5, [[3] * n for n in lengths], torch.tensor(prompts), pad_token_id=0
    )
    entropies = torch.rand(batch.input_ids.shape, generator=generator, dtype=torch.float64) * batch.completion_mask
    statistics = TokenStatistics(torch.zeros_like(entropies), entropies)
    log_weights = torch.randn(5, generator=generator, dtype=torch.float64) if weighted else None
    found = Observation(batch, statistics, log_weights).entropy()
    weights = torch.ones(5, dtype=torch.float64) if log_weights is None else log_weights.exp()
    sums = entropies.sum(1)

    def h(kept):
        return float(sum(weights[k] * sums[k] for k in kept) / sum(weights[k] * lengths[k] for k in kept))

    left_out = torch.tensor([h([k for k in range(5) if prompts[k] != gone]) for gone in range(4)], dtype=torch.float64)
    error = math.sqrt(3 / 4 * float((left_out - left_out.mean()).square().sum()))
    assert found.value == pytest.approx(h(range(5)))
    assert found.standard_error == pytest.approx(error) and found.degrees_of_freedom == 3

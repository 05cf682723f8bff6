"""The change of entropy along a step on completions drawn anew there: unbiased at any size of step, and noisy.

    h(theta + s dtheta) - h(theta),   each side on completions of its own policy, of the same prompts

Standard error: a jackknife that leaves a prompt out of both sides at once. Source: docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.directional import weights_moved
from entropy_core.measurement import EntropyMeasurement
from entropy_core.passes.forward import input_device
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_core.uncertainty import jackknife_standard_error, sums_over_prompts
from rl_training.sampling import Rollouts, SamplingConfig, generate_completions


def fresh_entropy_change(
    before: TokenStatistics, before_batch: SequenceBatch, after: TokenStatistics, after_batch: SequenceBatch
) -> EntropyMeasurement:
    """Change of h, nats per token, between two batches of the same prompts, each drawn under its own statistics' policy.

    Raises ValueError where the prompts differ.
    """
    if not torch.equal(before_batch.prompt_index.unique(), after_batch.prompt_index.unique()):
        raise ValueError("the fresh completions are of other prompts than the evaluation buffer")
    (left, left_out), (right, right_out) = (
        _ratio(statistics, batch) for statistics, batch in ((before, before_batch), (after, after_batch))
    )
    count = len(after_batch)
    changes = right_out - left_out
    return EntropyMeasurement(
        left, right, right - left, jackknife_standard_error(changes), float(count), count, changes
    )


def _ratio(statistics: TokenStatistics, batch: SequenceBatch) -> tuple[float, Tensor]:
    """h and its (B,) values with each prompt left out."""
    columns = torch.stack([statistics.entropy_sums(), batch.completion_lengths.double()], 1)
    by_prompt = sums_over_prompts(columns, batch.prompt_index)
    total = by_prompt.sum(0)
    left_out = total - by_prompt
    return float(total[0] / total[1]), left_out[:, 0] / left_out[:, 1]


def draw_after_step(
    model: nn.Module, direction: dict[str, Tensor], scale: float, evaluation: Rollouts,
    sampling_config: SamplingConfig, seed: int, passes: PassSettings,
) -> tuple[TokenStatistics, SequenceBatch]:  # fmt: skip
    """One completion for each evaluation sequence's prompt, drawn and scored at theta + scale * direction.

    The model is restored bit by bit.
    """
    with weights_moved(model, direction, scale):
        drawn = generate_completions(model, evaluation.prompt_ids, sampling_config, seed)
        fresh = evaluation.with_values(completion_ids=map(tuple, drawn), drawn=[None] * len(drawn))
        batch = fresh.to_batch(sampling_config).to(input_device(model))
        return token_statistics(model, batch, passes), batch

"""Entropy on completions drawn anew along the step: by hand, and where the moved policy is known exactly."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from entropy_core.batch import SequenceBatch
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_experiments.step.fresh_samples import draw_after_step, fresh_entropy_change
from rl_training.sampling import draw, make_sampling_config
from tests.tiny_policy import character_tokenizer, save_tiny_policy


def batch_of(lengths, prompts):
    return SequenceBatch.from_sequences([[5]] * len(lengths), [[6] * n for n in lengths], prompts, 0)


def statistics_of(batch, entropies):
    values = torch.zeros(batch.input_ids.shape, dtype=torch.float64)
    for row, (sequence, value) in enumerate(zip(batch.completion_mask, entropies, strict=True)):
        values[row, sequence] = value
    return TokenStatistics(torch.zeros_like(values), values)


def test_change_and_its_error_by_hand():
    """h is a ratio of sums; a prompt is left out of both sides at once."""
    prompts = [3, 1, 1, 2]
    before, after = batch_of([1, 2, 3, 4], prompts), batch_of([4, 3, 2, 2], prompts)
    low, high = [0.5, 1.0, 1.5, 2.0], [1.0, 1.25, 1.5, 3.0]

    def ratio(lengths, entropies, kept):
        return sum(n * h for n, h, k in zip(lengths, entropies, kept, strict=True) if k) / sum(
            n for n, k in zip(lengths, kept, strict=True) if k
        )

    def change(kept):
        return ratio([4, 3, 2, 2], high, kept) - ratio([1, 2, 3, 4], low, kept)

    left_out = np.array([change([p != out for p in prompts]) for out in (1, 2, 3)])
    found = fresh_entropy_change(statistics_of(before, low), before, statistics_of(after, high), after)
    assert found.change == pytest.approx(change([True] * 4))
    assert found.before == pytest.approx(1.5) and found.after > found.before
    assert found.standard_error == pytest.approx(math.sqrt(2 / 3 * np.square(left_out - left_out.mean()).sum()))
    with pytest.raises(ValueError, match="other prompts"):
        fresh_entropy_change(
            statistics_of(before, low), before, statistics_of(after, high), batch_of([4, 3, 2, 2], [1, 2, 3, 4])
        )


def test_fresh_completions_come_from_the_moved_policy(tmp_path):
    """One whole step takes every weight to zero: the policy is then uniform, whatever it was."""
    tokenizer = character_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(save_tiny_policy(tmp_path / "policy"))
    sampling_config = make_sampling_config(model, tokenizer, 1.0, 6)
    rows = [{"prompt": [{"role": "user", "content": f"{k} + 1 ="}], "prompt_index": k} for k in range(8)]
    evaluation = draw(model, tokenizer, rows, 1, sampling_config, 0, "evaluation")
    batch = evaluation.to_batch(sampling_config)
    before = token_statistics(model, batch)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    direction = {name: -p for name, p in weights.items()}

    def measured(scale, seed):
        drawn = draw_after_step(model, direction, scale, evaluation, sampling_config, seed, PassSettings(512))
        return fresh_entropy_change(before, batch, *drawn)

    found = measured(1.0, seed=1)
    assert found.after == pytest.approx(math.log(model.config.vocab_size), rel=1e-5)
    assert found.change == pytest.approx(found.after - found.before) and found.before < found.after
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    same = measured(0.0, seed=2)
    assert abs(same.change) < 4 * same.standard_error and same.change != 0.0, "the same policy, other completions"

"""The arithmetic of a forecast: what is added up of what a pilot measured."""

from __future__ import annotations

import pytest
import torch

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.passes.token_plan import TokenPlan
from entropy_experiments.forecast.pilot import DrawingRates, PassRates, _drawing_rates, more_of_the_kind
from rl_training.sampling import Rollouts
from rl_training.sequences import RolloutSequence

LENGTHS = [1, 2, 2, 3, 5, 8, 8, 20]


def test_drawing_takes_as_many_steps_as_the_longest_completion() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 4, 64):
        drawn = torch.tensor(LENGTHS)[torch.randint(0, len(LENGTHS), (20_000, n), generator=generator)]
        expected = n * 0.5 + float(drawn.amax(1).double().mean()) * (0.2 + n * 0.01)
        assert DrawingRates(0.5, 0.2, 0.01, LENGTHS).seconds(n) == pytest.approx(expected, rel=0.02)


def test_more_than_a_batch_is_drawn_in_batches() -> None:
    rates = DrawingRates(0.5, 0.2, 0.01, LENGTHS)
    assert rates.seconds(0) == 0.0
    assert rates.seconds(150) == pytest.approx(2 * rates.seconds(64) + rates.seconds(22))


def drawing(n: int, prompt: int, longest: int, seconds: float) -> tuple[float, Rollouts]:
    lengths = [1] * (n - 1) + [longest]
    return seconds, Rollouts(tuple(RolloutSequence((0,) * prompt, (0,) * k) for k in lengths))


def test_two_drawings_tell_what_a_step_and_what_a_sequence_costs() -> None:
    passes = PassRates(forward=0.02, with_graph=0.0, backward=0.0, derivatives=0.0, tokens=10.0)  # 2 ms a token

    def seconds(n: int, prompt: int, longest: int) -> float:
        return 0.002 * n * prompt + longest * (0.3 + 0.04 * n)

    shapes = [(4, 9, 7), (16, 12, 20), (16, 6, 11)]
    found = _drawing_rates([drawing(*shape, seconds(*shape)) for shape in shapes], passes, LENGTHS)
    assert found.fixed == pytest.approx(0.3) and found.each == pytest.approx(0.04)
    mean_prompt = (4 * 9 + 16 * 12 + 16 * 6) / 36
    assert found.prefill == pytest.approx(0.002 * mean_prompt)


def test_passes_of_longer_sequences_take_longer() -> None:
    rates = PassRates(forward=1.0, with_graph=2.0, backward=3.0, derivatives=4.0, tokens=10.0)
    assert rates.seconds(4, 0) == 4.0 and rates.seconds(4, 2) == 4 * (2.0 + 6.0)
    longer = rates.scaled(15.0)
    assert (
        longer.seconds(4, 2) == pytest.approx(1.5 * rates.seconds(4, 2))
        and longer.derivatives == 6.0
        and longer.tokens == 15.0
    )


def test_more_sequences_share_what_so_many_would() -> None:
    """Two prompts behind a template of four tokens, two completions of each: six times as many are twelve prompts."""
    template, own = [5, 6, 7, 8], ([9, 10], [11, 12])
    prompts = [template + own[k] for k in (0, 0, 1, 1)]
    batch = SequenceBatch.from_sequences(prompts, [[20, 21, 3], [22, 23], [24], [25, 26, 27]], [4, 4, 9, 9], 0)
    more = more_of_the_kind(batch, 21)
    assert len(more) == 24 and len(more.prompt_index.unique()) == 12
    assert torch.equal(more.input_ids[:4], batch.input_ids), "the batch's own sequences come first"
    assert torch.equal(more.completion_lengths, batch.completion_lengths.repeat(6))
    assert torch.equal(more.input_ids[:, :4], torch.tensor([template]).expand(24, 4))
    for group in more.prompt_index.unique():
        tokens = more.input_ids[more.prompt_index == group, :6]
        assert torch.equal(tokens[0], tokens[1]), "a prompt differs among its completions"
    assert len(more.input_ids[:, 4:6].unique(dim=0)) > 6, "copies have the same prompts: they would share more"
    distinct = [len(TokenPlan(length_buckets(b)[0]).distinct) for b in (batch, more)]
    # 4 of the template once, 2 a prompt, and what stands before the last token of each completion (2, 1, 0, 2); of the copies
    # at least as much as if no two random tokens agreed, less what agrees by chance
    assert distinct[0] == 4 + 2 * 2 + 5 and 4 + 12 * 2 + 6 * 5 - 24 < distinct[1] <= 4 + 12 * 2 + 6 * 5
    assert torch.equal(more_of_the_kind(batch, 2).input_ids, batch.input_ids), "fewer than there are"

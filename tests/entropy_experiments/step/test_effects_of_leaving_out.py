"""The effect of leaving sequences out, and the training side's noise, against real AdamW steps without them, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from entropy_core.entropy import Estimator
from entropy_core.gradients import entropy_gradient, trainable_parameters
from entropy_core.scores import token_statistics
from entropy_experiments.analyses.who_was_first import bootstrap_counts, numbers_of_draws, who_was_first
from entropy_experiments.fisher_analyzer import analyze_batches
from entropy_experiments.statistics.estimand import Estimand
from entropy_experiments.statistics.jackknife_interval import jackknife_interval
from entropy_experiments.step.effects_of_leaving_out import (
    decided_by_effect,
    effects_of_leaving_out,
    own_part_of_second_moment,
)
from entropy_experiments.step.gradient_rows import KeptRows, RecomputedRows
from entropy_experiments.step.settings import AnalysisSettings
from entropy_experiments.step.shares import attribute
from entropy_experiments.step.training_noise import MOST_GROUPS, step_change, training_noise
from rl_training.intervals import interval
from tests.entropy_experiments.analyses.tiny_step import TinyStep, make_step, sample_batch

CLIPPED = [pytest.param(None, id="not clipped"), pytest.param(1e-3, id="clipped")]


def effects_of(tiny: TinyStep, gradient: dict[str, Tensor]) -> Tensor:
    loss = KeptRows(tiny.columns).weighted_gradient(tiny.weights)
    return effects_of_leaving_out(gradient, loss, KeptRows(tiny.columns), tiny.weights, tiny.step)


@pytest.mark.parametrize("max_norm", CLIPPED)
def test_effects_are_how_the_real_step_answers_to_a_sequences_weight(max_norm: float | None) -> None:
    """By torch's own optimizer from the checkpoint's moments, through clipping; a prompt's effect is its sequences' sum."""
    tiny = make_step(max_norm=max_norm, settled=False)
    assert (tiny.step.clip < 1) == (max_norm is not None) and own_part_of_second_moment(tiny.step) > 0.1
    gradient, steps = tiny.gradient_of_h(), tiny.measurement()
    effects = effects_of(tiny, gradient)
    for rows in ([0], [7], [6, 7]):
        sides = []
        for sign in (1, -1):
            moved = tiny.weights.clone()
            moved[rows] *= 1 + sign * 1e-3
            sides.append(steps.first_order(gradient, moved))
        slope = (sides[0] - sides[1]) / 2e-3
        assert float(effects[rows].sum()) == pytest.approx(slope, rel=1e-3, abs=1e-4 * float(effects.abs().max()))


def test_rows_that_are_not_kept_give_the_same_effects_and_the_same_parts_of_the_gradient() -> None:
    tiny = make_step(max_norm=1e-3, settled=False)
    kept, other = KeptRows(tiny.columns), RecomputedRows(tiny.model, tiny.train)
    gradient, loss = tiny.gradient_of_h(), kept.weighted_gradient(tiny.weights)
    found = effects_of_leaving_out(gradient, loss, other, tiny.weights, tiny.step)
    assert torch.allclose(found, effects_of(tiny, gradient), rtol=1e-6, atol=1e-14)
    rows = torch.tensor([3, 9, 10])
    only = torch.zeros_like(tiny.weights)
    only[rows] = tiny.weights[rows]
    for source in (kept, other):
        for name, part in source.gradient_of(rows, tiny.weights).items():
            assert torch.allclose(part, kept.weighted_gradient(only)[name], rtol=1e-9, atol=1e-14), name


@pytest.mark.parametrize("max_norm", CLIPPED)
def test_without_each_prompt_the_step_is_the_real_one_with_its_own_p_momentum_and_clip(max_norm: float | None) -> None:
    tiny = make_step(max_norm=max_norm, settled=False)
    gradient, steps, rows = tiny.gradient_of_h(), tiny.measurement(), KeptRows(tiny.columns)
    change = step_change(gradient, tiny.step.state, trainable_parameters(tiny.model), max_norm)
    prompts = tiny.train.prompt_index
    noise = training_noise(
        change, rows.weighted_gradient(tiny.weights), lambda some: rows.gradient_of(some, tiny.weights), prompts
    )
    assert noise is not None and noise.prompt_effects is not None and noise.groups == noise.prompts == 8
    whole = steps.first_order(gradient, tiny.weights)
    assert noise.value == pytest.approx(whole, rel=1e-9)
    for place in range(8):
        kept = tiny.weights * (prompts != place)
        assert float(noise.left_out[place]) == pytest.approx(steps.first_order(gradient, kept * 16 / 14), rel=1e-9)
        assert float(noise.prompt_effects[place]) == pytest.approx(
            whole - steps.first_order(gradient, kept), rel=1e-7, abs=1e-9 * abs(whole)
        )
    spread = noise.left_out - noise.left_out.mean()
    assert noise.standard_error == pytest.approx(float((7 / 8 * spread.square().sum()).sqrt()), rel=1e-12)
    told = noise.to_json()
    ends = jackknife_interval(noise.value, noise.left_out.numpy())
    student = interval(noise.value, float(ends.standard_error), float(ends.degrees_of_freedom))
    assert told["low"] == min(float(ends.low), student[0]) and told["high"] == max(float(ends.high), student[1])
    assert told["high"] - told["low"] >= 2 * 2.364 * noise.standard_error, "Student's t of 7 degrees, at least"


def test_equal_prompts_are_one_unit_and_many_are_left_out_in_groups() -> None:
    rows = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def noise(prompts: Tensor):
        def part(some: Tensor) -> dict[str, Tensor]:
            return {"p": rows[some].sum(0) / 100}

        return training_noise(lambda g: float(g["p"].sum()), {"p": rows.sum(0) / 100}, part, prompts)

    found = noise(torch.arange(100))
    assert found is not None and (found.groups, found.prompts, found.prompt_effects) == (33, 100, None)
    halved = noise(torch.arange(64).repeat(2)[:100])
    assert halved is not None and halved.groups == 32 <= MOST_GROUPS, "two prompts a group, not one here and two there"
    spread = float(rows.sum(1).std()) / 10
    assert found.standard_error == pytest.approx(spread, rel=0.35), "of a mean of 100 independent rows"
    pairs = noise(torch.arange(100) % 5)
    assert pairs is not None and pairs.groups == 5 and pairs.prompt_effects is not None
    assert noise(torch.zeros(100)) is None, "one prompt tells nothing of another draw"


@pytest.mark.parametrize("settled", [False, True], ids=["early: by effect", "late: by share"])
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "given"])
def test_a_bootstrap_is_the_analysis_of_the_evaluation_sequences_drawn(settled: bool, drawn: bool) -> None:
    """Brute force: the evaluation sequences of a draw, repeated as it says, as a buffer of their own."""
    tiny = make_step(max_norm=1e-3, settled=settled)
    evaluation = sample_batch(tiny.model, 6, 3, torch.Generator().manual_seed(5))
    found = analyze_batches(
        tiny.model, tiny.optimizer, evaluation, tiny.train, tiny.weights,
        AnalysisSettings(Estimand.of(drawn), max_grad_norm=1e-3, measure=False),
    )  # fmt: skip
    numbers, parts = found.numbers.step.attribution, found.numbers.step.by_evaluation
    assert parts is not None
    by_effect = decided_by_effect(numbers.own_part_of_second_moment)
    assert by_effect == (not settled)
    values = numbers.effects if by_effect else numbers.products
    decisive = parts.effects if by_effect else parts.products
    assert (decisive.per_token is None) == (not drawn)
    statistics = token_statistics(tiny.model, evaluation)
    arrays = (
        decisive, evaluation.prompt_index.numpy(),
        statistics.entropy_sums().numpy(), evaluation.completion_lengths.double().numpy(),
    )  # fmt: skip
    size = float(values.abs().max())
    assert numbers_of_draws(np.ones((1, 6)), *arrays)[0] == pytest.approx(values.numpy(), rel=1e-4, abs=1e-4 * size)
    counts = bootstrap_counts(6, 2, seed=3)
    estimator: Estimator = "rao_blackwell" if drawn else "fixed_prefix"
    for row, count in zip(numbers_of_draws(counts, *arrays), counts, strict=True):
        again = [t for t in range(18) for _ in range(int(count[int(evaluation.prompt_index[t])]))]
        gradient = entropy_gradient(tiny.model, evaluation.select(again), estimator)
        if by_effect:
            expected = effects_of(tiny, gradient)
        else:
            expected = attribute(gradient, KeptRows(tiny.columns), tiny.weights, tiny.step).products
        assert row == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-3 * size)
    assert np.ptp(numbers_of_draws(counts, *arrays), axis=0).max() > 0.01 * size, "draws differ"


def test_who_was_first_counts_units_and_names_a_set_where_there_is_none() -> None:
    values = np.array([-3.0, -1.0, -1.0, -2.5, 4.0])
    draw = np.array(
        [[-3, -1, -1, -2, 4], [-1, -1, -1, -4, 4], [-1, -3, -3, -2, 4], [-3, -1, -1, -9, 4], [1, 1, 1, 1, 4.0]]
    )
    left_out = values + 0.1 * np.random.default_rng(0).normal(size=(9, 5))
    found = who_was_first(values, draw, {"sequences": np.array([0, 1, 1, 3, 4])}, left_out)
    lowering, raising = found["sequences"]["lowering"], found["sequences"]["raising"]
    assert (lowering["rows"], lowering["value"], lowering["first_in"]) == ([0], -3.0, 0.2)
    assert lowering["set"]["rows"] == [[3], [0], [1, 2]], "equal ones together, the most frequent first"
    assert lowering["set"]["value"] == -7.5 and lowering["set"]["first_in"] == pytest.approx(0.8)
    for one, chosen in ((lowering, [0]), (lowering["set"], [3, 0, 1, 2]), (raising, [4]), (raising["set"], [4])):
        ends = jackknife_interval(values[chosen].sum(), left_out[:, chosen].sum(1))
        assert (one["low"], one["high"]) == pytest.approx((float(ends.low), float(ends.high))), "copies, set and sign"
    known = {"value": 4.0, "first_in": 1.0, "low": raising["low"], "high": raising["high"]}
    assert raising == {"rows": [4], **known, "set": {"rows": [[4]], **known}} and found["evaluation_prompts"] == 9
    alone = who_was_first(values[4:], draw[:, 4:], {"prompts": np.zeros(1)}, left_out[:, 4:])
    assert alone["prompts"]["lowering"] is None


@pytest.mark.parametrize(("each", "known"), [(1, False), (2, True)])
def test_the_score_function_has_an_error_where_prompts_have_completions_to_compare(each: int, known: bool) -> None:
    """With single completions its baseline is that of other prompts, and intervals would cover 82 to 91%."""
    tiny = make_step()
    batch = sample_batch(tiny.model, 6, each, torch.Generator().manual_seed(2))
    numbers = analyze_batches(tiny.model, tiny.optimizer, batch, tiny.train, tiny.weights).numbers
    assert numbers.step is not None
    for predicted in (numbers.step.predictions.per_token, numbers.step.predictions.per_completion):
        for estimator, parts in predicted.items():
            found = parts["total"]
            assert np.isfinite(found.value)
            has = known or estimator != "score_function"
            assert np.isfinite(found.standard_error) == has and (found.left_out is not None) == has

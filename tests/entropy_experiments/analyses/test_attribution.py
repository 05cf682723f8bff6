"""Shares by sequence, prompt and token, their concentration, and the evaluation side."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from entropy_core.directional import entropy_derivatives, token_derivatives
from entropy_core.gradients import dot
from entropy_core.scores import token_statistics
from entropy_experiments.analyses.arrays import SequenceLabels
from entropy_experiments.analyses.attribution import (
    EvaluationTerms,
    TokenDetail,
    TrainingShares,
    attribute_step,
    concentration,
    extreme_sequences,
)
from entropy_experiments.records.attribution_results import AttributionResult, TokenAttribution
from entropy_experiments.records.record import json_of
from entropy_experiments.report.figures.style import caption_of, png_bytes
from entropy_experiments.report.figures.token_shares import plot_token_shares
from entropy_experiments.report.findings import attribution_finding
from entropy_experiments.step.optimizer_step import plain_step
from entropy_experiments.step.real_steps import token_shares
from rl_training.errors import UserError
from tests.entropy_experiments.analyses.tiny_step import labels, make_step


def some_labels(prompts: list[int]) -> SequenceLabels:
    count = len(prompts)
    return SequenceLabels(
        prompt_index=np.array(prompts),
        reward=np.array([np.nan, *range(count - 1)], dtype=float),
        length=np.full(count, 3),
        entropy_sum=np.ones(count),
        score=-np.ones(count),
        prompt=[f"prompt {p}" for p in prompts],
        completion=[f"completion {n}" for n in range(count)],
    )


# ---- concentration


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_concentration_of_equal_and_of_single_values(count):
    equal = concentration(np.where(np.arange(count) % 2, 0.3, -0.3), top=3)
    assert equal.gini == pytest.approx(0.0, abs=1e-12)
    assert equal.effective_number == pytest.approx(count)
    assert equal.top_mass == pytest.approx(min(3, count) / count)
    assert equal.half_mass_count == -(-count // 2)
    single = concentration(np.eye(count)[0] * -2.0, top=3)
    assert single.gini == pytest.approx((count - 1) / count)
    assert (single.effective_number, single.top_mass, single.half_mass_count) == (1.0, 1.0, 1)


def test_gini_equals_half_the_mean_difference():
    """Gini = mean |x_i - x_j| over all pairs / (2 mean x)."""
    values = np.random.default_rng(0).normal(size=30)
    x = np.abs(values)
    expected = np.abs(x[:, None] - x[None, :]).mean() / (2 * x.mean())
    assert concentration(values).gini == pytest.approx(expected)


@pytest.mark.parametrize("values", [np.zeros(4), np.zeros(0)])
def test_no_mass_is_said(values):
    found = concentration(values)
    assert found.gini is None and found.reason
    json.dumps(json_of(found), allow_nan=False)


def test_extremes():
    assert extreme_sequences(np.array([0.0, -2.0, 3.0, -5.0, 1.0]), 10) == ([3, 1], [2, 4])
    assert extreme_sequences(np.array([0.0, -2.0, 3.0, -5.0, 1.0]), 1) == ([3], [2])
    assert extreme_sequences(np.ones(2), 5) == ([], [0, 1])


# ---- the whole analysis on arrays


def test_shares_by_prompt_add_up_and_are_sorted():
    shares = np.array([-3.0, 1.0, -1.0, 4.0, -0.5])
    found = attribute_step(TrainingShares(labels=some_labels([8, 2, 8, 2, 5]), shares=shares, horizon_factor=2.5))
    assert [(row.prompt_index, row.share, row.horizon, row.sequences) for row in found.prompts] == [
        (8, -4.0, -10.0, 2),
        (5, -0.5, -1.25, 1),
        (2, 5.0, 12.5, 2),
    ]
    assert [row.prompt for row in found.prompts] == ["prompt 8", "prompt 5", "prompt 2"]
    assert found.total == pytest.approx(0.5) and found.horizon_total == pytest.approx(1.25)
    assert found.sequences.horizon == pytest.approx((2.5 * shares).tolist())
    assert found.concentration.lowering.sum == pytest.approx(-4.5)
    assert found.concentration.raising.count == 2
    assert found.top_sequences == (0, 2, 4, 3, 1)
    assert found.tokens is None and found.evaluation is None
    sums = "3 training sequences lowered entropy (together \N{MINUS SIGN}4.50) and 2 raised it (+5.00)"
    assert sums in attribution_finding(found)
    json.dumps(json_of(found), allow_nan=False)


def test_tokens_of_the_top_sequences():
    mask = np.array([[0, 1, 1, 0], [0, 1, 1, 1], [1, 1, 0, 0]], dtype=bool)
    tokens = np.where(mask, [[0, 1.0, -3, 0], [0, 2, 2, 1], [-0.5, 0.5, 0, 0]], 0.0)
    texts = [["a", "b"], ["c", "d", "e"], ["f", "g"]]
    found = attribute_step(
        TrainingShares(labels=some_labels([0, 0, 1]), shares=tokens.sum(1)),
        TokenDetail(shares=tokens, mask=mask, texts=texts),
        top=1,
    ).tokens
    assert found.closure == 0.0
    first, second = found.sequences
    assert (first.sequence, first.tokens, first.texts, first.reward) == (0, (1.0, -3.0), ("a", "b"), None)
    assert (second.sequence, second.tokens, second.texts, second.reward) == (
        1,
        (2.0, 2.0, 1.0),
        tuple(texts[1]),
        0.0,
    )


def test_tokens_that_do_not_add_up_are_refused():
    mask = np.ones((2, 2), dtype=bool)
    tokens = np.array([[1.0, 2.0], [3.0, 4.0]])
    shares, where = tokens.sum(1), some_labels([0, 1])

    def attribute(shares, **detail):
        return attribute_step(
            TrainingShares(labels=where, shares=shares), TokenDetail(**({"shares": tokens, "mask": mask} | detail))
        )

    attribute(shares * (1 + 5e-5))
    with pytest.raises(ValueError, match="sequence 1 is off by"):
        attribute(shares + [0, 0.1])
    with pytest.raises(ValueError, match="do not add up"):
        mask[0, 0] = False
        attribute(shares)
    with pytest.raises(ValueError, match="mask of the same shape"):
        attribute(shares, mask=mask[:, :1])
    with pytest.raises(ValueError, match="2 completion tokens, but 3 texts"):
        attribute(shares, mask=np.ones((2, 2)), texts=[["a"] * 3] * 2)


def test_bad_shares():
    with pytest.raises(ValueError, match="shares is \\(2,\\), but there are 3 sequences"):
        attribute_step(TrainingShares(labels=some_labels([0, 0, 1]), shares=np.ones(2)))
    with pytest.raises(ValueError, match="shares of sequence 1 is not finite"):
        attribute_step(TrainingShares(labels=some_labels([0, 0, 1]), shares=np.array([0, np.nan, 1])))


def test_nothing_happened_is_said():
    found = attribute_step(
        TrainingShares(labels=some_labels([0, 0, 1]), shares=np.zeros(3)),
        evaluation=EvaluationTerms(labels=some_labels([4]), contributions=np.zeros(1)),
    )
    assert attribution_finding(found).startswith("No training sequence has a share")
    assert found.top_sequences == () and found.evaluation.lowering == 0
    json.dumps(json_of(found), allow_nan=False)


def test_the_reverse_view():
    contributions = np.array([-1.0, 0.25, -0.5, 0.0])
    found = attribute_step(
        TrainingShares(labels=some_labels([0, 1]), shares=np.array([-1.0, 1.0])),
        evaluation=EvaluationTerms(
            labels=some_labels([3, 3, 1, 2]), contributions=contributions, own_changes=np.arange(4.0)
        ),
    ).evaluation
    assert (found.lowering, found.raising, found.total) == (2, 1, -1.25)
    assert [(row.prompt_index, row.contribution) for row in found.prompts] == [(3, -0.75), (1, -0.5), (2, 0.0)]
    assert found.own_change == (0.0, 1.0, 2.0, 3.0)
    assert found.concentration.effective_number == pytest.approx(1.75**2 / 1.3125)


# ---- on a real policy


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("estimator", ["split", "rao_blackwell"])
def test_token_shares_of_a_real_step_add_up_to_the_shares(estimator, max_norm):
    """And to the batch part of the step; a poisoned sequence is the first of the list, its tokens carry its loss."""
    plain = make_step(max_norm=max_norm)
    victim = extreme_sequences(plain.shares(estimator).numpy(), 1)[0][0]
    world = make_step(max_norm=max_norm, poison=(victim, 400.0))
    gradient, shares = world.gradient_of_h(estimator), world.shares(estimator).numpy()
    direction = world.step.share_direction(gradient)
    tokens = token_shares(world.model, world.train, direction, world.weights, world.step.clip).numpy()
    assert np.abs(tokens.sum(1) - shares).max() < 1e-9 * np.abs(shares).max()
    assert shares.sum() == pytest.approx(dot(gradient, world.step.update.batch), rel=1e-9)
    derivatives = token_derivatives(world.model, world.evaluation, world.step.parameter_delta)
    contributions = entropy_derivatives(world.statistics, derivatives, world.evaluation, estimator).numpy() / 24
    found = attribute_step(
        TrainingShares(
            labels=labels(world.train, token_statistics(world.model, world.train)), shares=shares, horizon_factor=3.0
        ),
        TokenDetail(shares=tokens, mask=world.train.completion_mask.numpy()),
        EvaluationTerms(
            labels=labels(world.evaluation, world.statistics),
            contributions=contributions,
            own_changes=derivatives.entropy_sums().numpy(),
        ),
    )
    assert found.tokens.closure < 1e-9
    assert found.top_sequences[0] == victim
    assert found.prompts[0].prompt_index == victim // 2
    assert found.concentration.all.half_mass_count == 1 and found.concentration.all.gini > 0.8
    assert found.evaluation.total == pytest.approx(dot(gradient, world.step.parameter_delta), rel=1e-9)
    json.dumps(json_of(found), allow_nan=False)


def test_direction_of_a_plain_step():
    gradient = {"w": torch.ones(2)}
    assert torch.equal(plain_step(gradient, None, 0.5).share_direction(gradient)["w"], torch.full((2,), 0.5))
    with pytest.raises(UserError, match="give checkpoint.learning_rate="):
        plain_step(gradient, None, None)


# ---- the figure


def attribution_of_tokens(lengths: list[int], texts: bool = True) -> AttributionResult:
    rng = np.random.default_rng(0)
    mask = np.arange(100)[None, :] < np.array(lengths)[:, None]
    tokens = np.where(mask, rng.normal(size=mask.shape), 0.0)
    words = [[f"$t{k}" for k in range(length)] for length in lengths] if texts else None
    where = some_labels(list(range(len(lengths))))
    return attribute_step(
        TrainingShares(labels=where, shares=tokens.sum(1)), TokenDetail(shares=tokens, mask=mask, texts=words)
    )


def test_the_figure_has_a_panel_a_sequence_and_a_bar_a_token():
    found = attribution_of_tokens([5, 30, 12])
    figure = plot_token_shares(found, sequences=2)
    largest = sorted(found.tokens.sequences, key=lambda row: -abs(row.share))[:2]
    for axes, row in zip(figure.axes, largest, strict=True):
        heights = np.array([bar.get_height() for bar in axes.patches])
        assert heights / heights[0] == pytest.approx(np.array(row.tokens) / row.tokens[0])
        assert [t.get_text() for t in axes.get_xticklabels()] == [rf"\$t{k}" for k in range(len(row.tokens))]
    assert "2 training sequences with the largest shares" in caption_of(figure) and png_bytes(figure)


def test_long_completions_show_the_stretch_that_matters():
    found = attribution_of_tokens([100], texts=False)
    values = np.array(found.tokens.sequences[0].tokens)
    values[70:] *= 50
    row = found.tokens.sequences[0].model_copy(update={"tokens": tuple(values.tolist())})
    figure = plot_token_shares(found.model_copy(update={"tokens": TokenAttribution(closure=0.0, sequences=[row])}))
    assert "tokens 41–100 of 100" in figure.axes[0].get_title(loc="left")
    assert len(figure.axes[0].patches) == 60 and "the stretch with the largest shares" in caption_of(figure)


def test_figures_without_tokens():
    assert "No data" in caption_of(
        plot_token_shares(attribute_step(TrainingShares(labels=some_labels([0]), shares=np.ones(1))))
    )
    assert png_bytes(plot_token_shares(attribution_of_tokens([1], texts=False)))

"""The table of predictors against one measured step, by hand; and the charts of this table and of the weighting schemes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from entropy_experiments.analyses.baselines import LABELS, baseline_table
from entropy_experiments.analyses.weighting_schemes import weighting_schemes, with_measurements
from entropy_experiments.records.record import json_of
from entropy_experiments.records.step_results import BaselinesResult
from entropy_experiments.report.analysis_tables import TABLES
from entropy_experiments.report.figures.baselines import plot_baselines
from entropy_experiments.report.figures.style import caption_of, png_bytes
from entropy_experiments.report.figures.weighting import plot_weighting_schemes
from entropy_experiments.report.findings import baselines_finding
from entropy_experiments.statistics.confidence import UNTRUSTED
from entropy_experiments.statistics.jackknife_interval import jackknife_interval
from entropy_experiments.step.numbers import Estimate
from tests.entropy_experiments.analyses.weighting_world import LONGEST, make_world, row_of

PROMPTS = 20
COMMON = torch.linspace(-1, 1, PROMPTS, dtype=torch.float64)  # what every estimate shares with the measurement


def known(value: float, error: float, own: float, seed: int) -> Estimate:
    """An estimate of this error whose values without each prompt differ from the common ones by `own` times a series."""
    alone = torch.randn(PROMPTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Estimate(value, error, value + 0.01 * COMMON + own * (alone - alone.mean()))


PREDICTED = {
    "rao_blackwell": {"total": known(-0.30, 0.03, 0.006, 1), "batch": known(-0.04, 0.01, 0.01, 2)},
    "split": {"total": known(-0.20, 0.04, 0.006, 3), "batch": known(-0.03, 0.02, 0.01, 4)},
    "score_function": {"total": known(0.10, 0.30, 0.06, 5), "batch": known(0.02, 0.10, 0.01, 6)},
    "fixed_prefix": {"total": known(-0.05, 0.01, 0.01, 7), "batch": known(-0.01, 0.01, 0.01, 8)},
}
MEASURED = known(-0.25, 0.04, 0.006, 9)
GIVEN = known(-0.06, 0.02, 0.006, 10)


def by_hand(predicted: Estimate, measured: Estimate) -> float:
    """|difference| over the jackknife of the difference."""
    series = predicted.left_out - measured.left_out
    error = math.sqrt((PROMPTS - 1) / PROMPTS * float((series - series.mean()).square().sum()))
    return abs(predicted.value - measured.value) / error


def full_table() -> BaselinesResult:
    return baseline_table(
        PREDICTED,
        MEASURED,
        measured_fixed_prefix=GIVEN,
        without_preconditioner=Estimate(-3e-6, 1e-6),
        covariance=-2e-5,
        natural_covariance=4e-5,
        steer=-1e-6,
    )


def test_every_predictor_has_its_row_by_hand() -> None:
    table = full_table()
    assert [row.name for row in table.rows] == list(LABELS)
    json.dumps(json_of(table), allow_nan=False)
    totals = {name: parts["total"] for name, parts in PREDICTED.items()}
    expected = {
        "rao_blackwell": (-0.30, 0.03, -0.25, 0.25 / 0.30, by_hand(totals["rao_blackwell"], MEASURED)),
        "split": (-0.20, 0.04, -0.25, 1.25, by_hand(totals["split"], MEASURED)),
        "score_function": (0.10, 0.30, -0.25, -2.5, by_hand(totals["score_function"], MEASURED)),
        "fixed_prefix": (-0.05, 0.01, -0.25, 5.0, by_hand(totals["fixed_prefix"], MEASURED)),
        "fixed_prefix_on_given_tokens": (-0.05, 0.01, -0.06, 1.2, by_hand(totals["fixed_prefix"], GIVEN)),
        "without_momentum": (-0.04, 0.01, -0.25, 6.25, by_hand(PREDICTED["rao_blackwell"]["batch"], MEASURED)),
    }
    for name, (value, error, actual, ratio, z) in expected.items():
        row = row_of(table, name)
        assert (row.predicted, row.standard_error, row.actual) == (value, error, actual), name
        assert row.ratio == pytest.approx(ratio), "measured over predicted, sign kept"
        assert row.z == pytest.approx(z)
        assert row.comparable_in_scale
        assert row.reason == ""
        holds_zero = row.actual_low <= 0 <= row.actual_high  # the interval that is shown, not two standard errors
        assert holds_zero is (name == "fixed_prefix_on_given_tokens")
        assert row.sign_agrees is (None if holds_zero else value < 0)


def test_predictors_on_another_scale_are_compared_by_sign_alone() -> None:
    table = full_table()
    signs = {"without_preconditioner": True, "covariance": True, "natural_covariance": False, "steer": True}
    for name, agrees in signs.items():
        row = row_of(table, name)
        assert not row.comparable_in_scale
        assert row.sign_agrees is agrees
        assert row.ratio is None
        assert row.z is None
        assert "only its sign" in row.reason


def test_sentence_says_who_is_near() -> None:
    table = full_table()
    near = {name: row_of(table, name).agrees for name in ("rao_blackwell", "split", "score_function")}
    assert near == {"rao_blackwell": True, "split": True, "score_function": True}, "change the numbers of this test"
    assert baselines_finding(table) == (
        "The measured change was −0.250 [−0.325, −0.151] nats per token (brackets: 95% intervals); it and these "
        "predictions cannot be distinguished: Rao–Blackwell, split, score function; it and these do NOT agree: fixed prefix, "
        "without momentum. Of those on another scale, these have its sign: without P (plain gradient), covariance (Cui et al.), "
        "STEER; these the opposite sign: “covariance, natural gradient”."
    )


def test_estimates_as_stored_in_a_summary_give_the_same_table() -> None:
    stored = {
        name: {
            part: {"value": e.value, "standard_error": e.standard_error, "left_out": e.left_out.tolist()}
            for part, e in parts.items()
        }
        for name, parts in PREDICTED.items()
    }
    from_summary = baseline_table(
        stored, {"value": -0.25, "standard_error": 0.04, "left_out": MEASURED.left_out.tolist()}
    )
    assert from_summary == baseline_table(PREDICTED, MEASURED)


def test_what_is_missing_is_said() -> None:
    table = baseline_table({"rao_blackwell": {"total": Estimate(-0.3, math.nan)}}, MEASURED)
    json.dumps(json_of(table), allow_nan=False)
    row = row_of(table, "rao_blackwell")
    assert (row.predicted, row.standard_error, row.z) == (-0.3, None, None)
    assert "not known prompt by prompt" in row.reason
    assert row.ratio == pytest.approx(0.25 / 0.3)
    assert row_of(table, "steer").reason == "not computed"
    unmeasured = baseline_table(PREDICTED, None)
    json.dumps(json_of(unmeasured), allow_nan=False)
    assert row_of(unmeasured, "split").reason == "not measured"
    assert "No change of entropy was measured" in baselines_finding(unmeasured)


def test_a_prediction_of_zero_has_no_ratio_and_no_sign() -> None:
    table = baseline_table({"split": {"total": Estimate(0.0, 0.0)}}, Estimate(-0.25, 0.0), covariance=0.0)
    row = row_of(table, "split")
    assert (row.ratio, row.z, row.sign_agrees) == (None, None, None)
    assert row_of(table, "covariance").sign_agrees is None
    json.dumps(json_of(table), allow_nan=False)


@pytest.mark.parametrize("measured", [Estimate(-0.05, 0.04), 0.0])
def test_the_sign_of_a_change_near_zero_is_not_compared(measured: Any) -> None:
    table = baseline_table(PREDICTED, measured, covariance=-1.0)
    assert all(row.sign_agrees is None for row in table.rows)
    assert "too near to 0" in baselines_finding(table)


def test_nothing_is_held_against_a_measurement_that_is_not_to_be_trusted() -> None:
    """Weights that a few sequences carry have no known error: predictors were called near or far from it all the same."""
    measured = vars(MEASURED) | {"effective_sample_size": 9.0, "sequences": 20}
    table = baseline_table(PREDICTED, measured, covariance=-1.0)
    rows = [row for row in table.rows if row.predicted is not None and row.name != "fixed_prefix_on_given_tokens"]
    assert all((row.z, row.agrees, row.sign_agrees, row.reason) == (None, None, None, UNTRUSTED) for row in rows)
    assert baselines_finding(table) == (
        "The measured change was −0.250 (no interval) nats per token (brackets: 95% intervals); how near a predictor comes "
        f"to it cannot be said: {UNTRUSTED}."
    )
    shown = {row.label: cells[2] for row, cells in zip(table.rows, TABLES["baselines"](table)[0].texts, strict=True)}
    without = next(row for row in table.rows if row.predicted is None and row.actual is not None)
    assert {shown[row.label] for row in [*rows, without]} == {"−0.250 (untrusted)"}, "without an error, in all rows"


# ---- charts


def points(axes: Any) -> list[tuple[float, float, float]]:
    """(x, y, half width of the bar) of everything drawn with an error bar, None for no bar."""
    found = []
    for container in axes.containers:
        x, y = container[0].get_data()
        bars = [segment for collection in container[2] for segment in collection.get_segments() if len(segment)]
        width = (bars[0][1, 0] - bars[0][0, 0]) / 2 if bars else 0.0
        found.append((float(x[0]), float(y[0]), float(width)))
    return found


def test_chart_of_baselines_draws_the_table() -> None:
    figure = plot_baselines(full_table())
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == list(LABELS.values())
    drawn = {labels[int(y)]: (x, width) for x, y, width in points(axes) if y == int(y)}
    for label, estimate in (("Rao–Blackwell", "total"), ("without momentum", "batch")):
        found = PREDICTED["rao_blackwell"][estimate]
        ends = jackknife_interval(found.value, found.left_out.numpy())
        assert drawn[label] == pytest.approx((found.value, float(ends.high - ends.low) / 2))
    assert "STEER" not in drawn, "a number on another scale was drawn on this one"
    words = [text.get_text() for text in axes.texts]
    assert words[0] == f"z = {row_of(full_table(), 'rao_blackwell').z:.1f}"
    assert words[labels.index("covariance, natural gradient")].endswith("other sign than measured")
    assert "−0.250 [−0.325, −0.151]" in caption_of(figure)


def test_chart_of_weightings_draws_the_table() -> None:
    table = weighting_schemes(make_world().arrays, LONGEST, drop_top=(1,))
    measured = {"grpo": {"equal_length": (-1e-4, 2e-5)}}
    figure = plot_weighting_schemes(with_measurements(table, measured))
    length, gain = figure.axes
    labels = [label.get_text() for label in length.get_yticklabels()]
    assert labels == [row.label for row in table.rows]
    for axes, key in ((gain, "equal_gain"), (length, "equal_length")):
        drawn = {labels[int(y)]: (x, width) for x, y, width in points(axes) if y == int(y)}
        for row in table.rows:
            entry = getattr(row.delta_h, key)
            half_width = (entry.high - entry.low) / 2  # `points` gives that of a bar whose ends are not symmetric
            assert drawn[row.label] == pytest.approx((entry.value, half_width)), (key, row.name)
    offset = [(x, width) for x, y, width in points(length) if y != int(y)]
    assert offset == [pytest.approx((-1e-4, 1.959964 * 2e-5))]
    assert not [y for _, y, _ in points(gain) if y != int(y)], "a measurement at equal length stands at equal gain"


def test_chart_of_weightings_without_a_gain_says_why() -> None:
    table = weighting_schemes(make_world(1, signal=0.0).arrays, LONGEST)
    figure = plot_weighting_schemes(table)
    assert len(figure.axes) == 1
    assert "is not significantly different from 0" in caption_of(figure)
    without_steps = sum(row.delta_h is None for row in table.rows)
    assert f"{without_steps} row" in caption_of(figure)


def test_degenerate_tables_are_drawn() -> None:
    worlds = [
        make_world(eval_prompts=[5] * 8),
        make_world(train_reward=np.ones(10)),
        make_world(eval_prompts=[1], eval_reward=np.ones(1)),
    ]
    worlds.append(make_world(train_prompts=list(range(10))))
    tiny = make_world(train_prompts=[1, 1], train_reward=np.array([1.0, 0.0])).arrays
    for arrays in [*(world.arrays for world in worlds), tiny, replace(tiny, weights=np.zeros(2), shares=np.zeros(2))]:
        assert png_bytes(plot_weighting_schemes(weighting_schemes(arrays, LONGEST)))
    for table in (
        baseline_table({}, None),
        baseline_table({}, None, steer=1e-7),
        baseline_table(PREDICTED, None),
        baseline_table({"split": {"total": 0.0}}, 0.0, covariance=0.0),
    ):
        figure = plot_baselines(table)
        assert caption_of(figure)
        assert png_bytes(figure)

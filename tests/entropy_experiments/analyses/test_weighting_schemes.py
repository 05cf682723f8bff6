"""Every number of the table against explicit gradient vectors (weighting_world)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from entropy_experiments.analyses.candidate_weights import MOST_ROWS, mean_token_covariances
from entropy_experiments.analyses.weighting_schemes import (
    weighting_schemes,
    why_not_a_gain,
    with_measurements,
)
from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.weighting_results import (
    ChangesBesideRun,
    EntropyChanges,
    WeightingResult,
    WeightingRow,
)
from entropy_experiments.report.figures.style import caption_of
from entropy_experiments.report.figures.weighting import plot_weighting_schemes
from entropy_experiments.report.weighting_finding import weighting_finding
from entropy_experiments.statistics.confidence import ALIKE, NOT_FROM_ZERO, UNTRUSTED
from tests.entropy_experiments.analyses.weighting_world import (
    FACTOR,
    LONGEST,
    World,
    assert_sound,
    close,
    make_world,
    row_of,
    spread,
)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def table(world: World) -> WeightingResult:
    return weighting_schemes(world.arrays, LONGEST, drop_top=(1, 3))


NAMES = ["run", "dr_grpo", "dr_grpo_longest", "grpo", "dapo", "rloo", "reinforce"]
FILTERS = ["positives_only", "negatives_only", "drop_top_1", "drop_top_3", "clip_cov", "kl_cov"]


def test_every_scheme_and_filter_has_a_row_and_weights(table: WeightingResult) -> None:
    assert [row.name for row in table.rows] == NAMES + FILTERS
    assert set(table.weights) == set(NAMES + FILTERS)
    assert [row.kind for row in table.rows] == ["run"] + ["scheme"] * 6 + ["filter"] * 6
    assert_sound(table)


def test_the_forecast_counts_the_rows_of_the_table(world: World) -> None:
    assert len(weighting_schemes(world.arrays, LONGEST).rows) == MOST_ROWS == 14


def test_weights_of_the_schemes_by_hand(world: World, table: WeightingResult) -> None:
    """Sequence 0: reward 1 in a group of rewards 1, 0, 0.5, 1; ten sequences."""
    training, weights = world.arrays.training, table.weights
    group = [1.0, 0.0, 0.5, 1.0]
    centred, lengths = 1 - 0.625, training.length
    deviation = math.sqrt(sum((r - 0.625) ** 2 for r in group) / 3) + 1e-4
    longest = max(lengths[i] for i in (0, 2, 6, 9))
    by_hand = {
        "run": 1.25 * centred / (10 * LONGEST),
        "dr_grpo": centred / (10 * LONGEST),
        "dr_grpo_longest": centred / (10 * longest),
        "grpo": centred / deviation / (10 * lengths[0]),
        "dapo": centred / deviation / lengths.sum(),
        "rloo": (1 - 1.5 / 3) / 10,
        "reinforce": (1 - training.reward.mean()) / 10,
    }
    for name, expected in by_hand.items():
        assert weights[name][0] == pytest.approx(expected, rel=1e-12), name


@pytest.mark.parametrize("name", NAMES + FILTERS)
def test_numbers_against_updates_in_parameter_space(world: World, table: WeightingResult, name: str) -> None:
    row, weights, own = row_of(table, name), np.array(table.weights[name]), world.arrays.weights
    update, run_update = world.update(weights), world.update(own)
    length, run_length = (math.sqrt(float(u**2 @ (1 / world.kernel_p))) for u in (update, run_update))
    assert row.update_length == close(length)
    cosine = float(update / world.kernel_p @ run_update) / (length * run_length)
    assert row.cosine_with_run == close(cosine)
    change, run_change = world.change(weights), world.change(own)
    gain, run_gain = world.gain(weights), world.gain(own)
    assert row.reward_gain.value == close(gain), "the baseline must leave the sequence out"
    expected = {
        ("delta_h", "raw"): change,
        ("delta_h", "equal_length"): change * run_length / length,
        ("delta_h", "equal_gain"): change * run_gain / gain,
        ("minus_run", "equal_length"): change * run_length / length - run_change,
        ("minus_run", "equal_gain"): change * run_gain / gain - run_change,
    }
    for (key, normalisation), value in expected.items():
        assert getattr(getattr(row, key), normalisation).value == close(value), (key, normalisation)
    assert row.entropy_cost_per_reward.value == close(-change / gain)
    # the factors really make the update as long, and the gain as large, as the run's own
    scaled = world.update(row.scale.equal_length * weights)
    assert float(scaled**2 @ (1 / world.kernel_p)) == close(run_length**2)
    assert world.gain(row.scale.equal_gain * weights) == close(run_gain)


@pytest.mark.parametrize("name", ["run", "rloo", "negatives_only"])
def test_standard_errors_are_jackknives_over_evaluation_prompts(
    world: World, table: WeightingResult, name: str
) -> None:
    row, weights, own = row_of(table, name), np.array(table.weights[name]), world.arrays.weights
    prompts = np.unique(world.arrays.evaluation.prompt_index)
    changes = [world.change_without(weights, p) for p in prompts]
    gains = [world.gain(weights, without=p) for p in prompts]
    run_changes = [world.change_without(own, p) for p in prompts]
    run_gains = [world.gain(own, without=p) for p in prompts]
    scale = row.scale.equal_length
    matched = [h * b / g for h, g, b in zip(changes, gains, run_gains, strict=True)]
    expected = [
        (row.delta_h.raw, changes),
        (row.reward_gain, gains),
        (row.entropy_cost_per_reward, [h / g for h, g in zip(changes, gains, strict=True)]),
        (row.delta_h.equal_length, [scale * h for h in changes]),
        (row.delta_h.equal_gain, matched),
        (row.minus_run.equal_gain, [m - b for m, b in zip(matched, run_changes, strict=True)]),
        (row.minus_run.equal_length, [scale * h - b for h, b in zip(changes, run_changes, strict=True)]),
    ]
    for entry, left_out in expected:
        assert entry.standard_error == pytest.approx(spread(left_out), rel=1e-9, abs=1e-16)


def test_the_runs_own_row(world: World, table: WeightingResult) -> None:
    row = row_of(table, "run")
    assert row.delta_h.raw.value == pytest.approx(world.arrays.shares.sum(), rel=1e-12)
    for difference in (row.minus_run.equal_length, row.minus_run.equal_gain):
        assert (difference.value, difference.standard_error, difference.low, difference.high) == (0.0, 0.0, 0.0, 0.0)
    assert (row.scale.equal_length, row.scale.equal_gain) == (1.0, 1.0)


def test_scaling_the_weights_changes_nothing_once_normalised(world: World, table: WeightingResult) -> None:
    """rloo is dr_grpo but for constants of each group; where all groups are equal it is dr_grpo, rescaled."""
    even = make_world(train_prompts=[1, 1, 2, 2, 3, 3])
    found = weighting_schemes(even.arrays, LONGEST)
    rloo, dr_grpo = row_of(found, "rloo"), row_of(found, "dr_grpo")
    assert rloo.delta_h.raw.value == close(2 * LONGEST * dr_grpo.delta_h.raw.value)
    assert rloo.delta_h.equal_length.value == close(dr_grpo.delta_h.equal_length.value)
    assert rloo.cosine_with_run == close(dr_grpo.cosine_with_run)


def test_sentence_names_the_ends_and_counts_real_differences() -> None:
    table = weighting_schemes(make_world(6).arrays, LONGEST)
    schemes = [row for row in table.rows if row.kind == "scheme"]
    schemes.sort(key=lambda row: row.entropy_cost_per_reward.value)
    text = weighting_finding(table)
    assert text.startswith("Of 6 weighting schemes on 10 training sequences, 6 have a predicted gain of reward")
    assert text.index(f"({schemes[0].label})") < text.index(f"({schemes[-1].label})")
    differences = [row.minus_run.equal_gain for row in schemes]
    alike = sum(entry.low <= 0.0 <= entry.high for entry in differences)
    assert 0 < alike < 6, "a table of which the count says nothing"
    assert f"at equal gain {alike} of 6 {ALIKE} from the step as trained" in text
    ends = [row.entropy_cost_per_reward for row in (schemes[0], schemes[-1])]
    least, most = ([entry.low, entry.high] for entry in ends)
    assert ("which of them is the least cannot be said" in text) == (least[1] >= most[0])


def estimate(value: float | None, error: float | None, freedom: float = 7, why: str | None = None) -> StudentEstimate:
    return StudentEstimate(value=value, standard_error=error, degrees_of_freedom=freedom, reason=why)


def priced(label: str, cost: float, error: float, against_run: StudentEstimate) -> WeightingRow:
    number = estimate(cost, error)
    return WeightingRow(
        name=label,
        label=label,
        kind="scheme",
        cosine_with_run=0.5,
        entropy_cost_per_reward=number,
        minus_run=ChangesBesideRun(equal_length=number, equal_gain=against_run),
        delta_h=EntropyChanges(raw=number, equal_length=number, equal_gain=number),
    )


def test_no_sentence_is_empty() -> None:
    """ "the least … REINFORCE and the most … REINFORCE; at equal gain 0 of 0 differ" said nothing at length."""
    why = f"as trained: its gain of reward, +0.010 [-0.020, +0.040], {NOT_FROM_ZERO}"
    nothing = estimate(None, None, why=why)
    changes = EntropyChanges(raw=nothing, equal_length=nothing, equal_gain=nothing)
    run = WeightingRow(name="run", kind="run", label="as trained", delta_h=changes)

    def said(*rows: WeightingRow) -> str:
        counts = {"n_eval": 48, "n_train": 48, "eval_prompts": 8}
        return weighting_finding(
            WeightingResult(rows=[run, *rows], weights={}, gain_side="evaluation", gain_note="", **counts)
        )

    one = said(priced("REINFORCE", 0.4, 0.1, nothing))
    assert one.count("REINFORCE") == 1 and "0 of 0" not in one and " of 0" not in one
    assert "1 has a predicted gain" in one and "cannot be said: as trained" in one
    two = said(*(priced(name, cost, 0.1, nothing) for name, cost in (("REINFORCE", 0.4), ("RLOO", 0.5))))
    assert "from 0.40 [0.16, 0.64] (REINFORCE) to 0.50 [0.26, 0.74] (RLOO) nats per token" in two
    assert "which of them is the least cannot be said" in two
    apart = said(*(priced(name, cost, 0.01, nothing) for name, cost in (("REINFORCE", 0.4), ("RLOO", 0.5))))
    assert "which of them is the least" not in apart and "(REINFORCE) to 0.500" in apart


def test_few_prompts_need_a_larger_gain() -> None:
    """2.2 standard errors of four prompts are no denominator; they were."""
    assert NOT_FROM_ZERO in why_not_a_gain(estimate(0.22, 0.1, 3)) and not why_not_a_gain(estimate(0.22, 0.1, 30))


# ---- filters


def test_sign_filters_split_the_run(world: World, table: WeightingResult) -> None:
    own, weights = world.arrays.weights, table.weights
    np.testing.assert_array_equal(weights["positives_only"], np.maximum(own, 0))
    np.testing.assert_array_equal(weights["negatives_only"], np.minimum(own, 0))
    parts = [row_of(table, name).delta_h.raw.value for name in ("positives_only", "negatives_only")]
    assert sum(parts) == pytest.approx(world.arrays.shares.sum(), rel=1e-12)


def test_drop_top_leaves_out_what_lowers_entropy_most(world: World, table: WeightingResult) -> None:
    shares, own = world.arrays.shares, world.arrays.weights
    lowest = sorted(range(len(shares)), key=lambda i: shares[i])[:3]
    dropped = np.array(table.weights["drop_top_3"])
    assert [i for i in range(len(shares)) if dropped[i] != own[i]] == sorted(lowest)
    change = row_of(table, "drop_top_3").delta_h.raw.value
    assert change == pytest.approx(shares.sum() - shares[lowest].sum(), rel=1e-12)


def test_spared_is_judged_on_the_other_half(world: World, table: WeightingResult) -> None:
    arrays, found = world.arrays, row_of(table, "drop_top_3").spared
    per_row = FACTOR * arrays.entropy_fisher * arrays.weights
    even = np.isin(arrays.evaluation.prompt_index, np.unique(arrays.evaluation.prompt_index)[::2])
    values, errors = [], []
    for chooses, judges in ((even, ~even), (~even, even)):
        shares = per_row[chooses].mean(0)
        lowest = sorted(range(len(shares)), key=lambda i: shares[i])[:3]
        judged = -per_row[judges][:, lowest].sum(1)
        values.append(judged.mean())
        prompts = arrays.evaluation.prompt_index[judges]
        errors.append(spread([judged[prompts != p].mean() for p in np.unique(prompts)]))
    assert found.value == pytest.approx(sum(values) / 2, rel=1e-12)
    assert found.standard_error == pytest.approx(math.hypot(*errors) / 2, rel=1e-9)


def test_choosing_and_judging_on_the_same_noise_is_seen_through() -> None:
    """Entropy does not respond to anything here: what dropping seems to spare is noise, and the other half says so."""
    flattered, honest, errors = [], [], []
    for seed in range(30):
        world = make_world(seed, eval_prompts=list(range(24)))
        noise = np.random.default_rng(seed + 1000).normal(size=world.arrays.entropy_fisher.shape)
        products = noise.mean(0)
        shares = FACTOR * world.arrays.weights * products
        arrays = replace(world.arrays, entropy_fisher=noise, products=products, shares=shares)
        row = row_of(weighting_schemes(arrays, LONGEST, drop_top=(2,)), "drop_top_2")
        flattered.append(row.delta_h.raw.value - shares.sum())
        honest.append(row.spared.value)
        errors.append(row.spared.standard_error)
    assert min(flattered) > 0
    standard_error = np.std(honest, ddof=1) / math.sqrt(len(honest))
    assert abs(np.mean(honest)) < 3 * standard_error
    assert np.mean(flattered) > 3 * abs(np.mean(honest))
    assert np.mean(errors) == pytest.approx(np.std(honest, ddof=1), rel=0.4), "not a standard error of a mean"


def test_covariance_masks(world: World, table: WeightingResult) -> None:
    arrays, training = world.arrays, world.arrays.training
    # token by token: every token of a sequence has, in the mean, the sequence's mean log-probability
    tokens = [(s / n, a) for s, n, a in zip(training.score, training.length, arrays.advantages) for _ in range(n)]  # noqa: B905
    mean_logprob, mean_advantage = (sum(column) / len(tokens) for column in zip(*tokens, strict=True))
    by_hand = [
        (s / n - mean_logprob) * (a - mean_advantage)
        for s, n, a in zip(training.score, training.length, arrays.advantages, strict=True)
    ]
    np.testing.assert_allclose(mean_token_covariances(training, arrays.advantages), by_hand, rtol=1e-12)
    order = sorted(range(10), key=lambda i: -by_hand[i])
    kl_cov, clip_cov = (np.array(table.weights[name]) for name in ("kl_cov", "clip_cov"))
    expected = arrays.weights.copy()
    expected[order[0]] = 0
    np.testing.assert_array_equal(kl_cov, expected)
    expected = arrays.weights.copy()
    expected[order[:2]] *= 1 / 2  # one of the two highest, drawn at random
    np.testing.assert_allclose(clip_cov, expected, rtol=1e-12)


# ---- measurements


def test_measurements_stand_beside_predictions(world: World, table: WeightingResult) -> None:
    predicted = row_of(table, "grpo").delta_h.equal_length
    measured = {"grpo": {"equal_length": (2 * predicted.value, 1e-4)}}
    merged = with_measurements(table, measured)
    actual = row_of(merged, "grpo").actual["equal_length"]
    assert actual.value == 2 * predicted.value
    assert actual.ratio == pytest.approx(2.0)
    assert actual.z is None, "without prompts left out of both, the error of the difference is not known"
    assert "actual" not in row_of(merged, "run")
    assert "actual" not in row_of(table, "grpo"), "the table given was changed"
    assert_sound(merged)


def test_a_measurement_says_whether_it_is_to_be_trusted(table: WeightingResult) -> None:
    half = table.n_eval / 2
    for size, trusted in ((half, True), (half - 0.1, False)):
        merged = with_measurements(table, {"grpo": {"equal_length": (-1e-4, 2e-5, size)}})
        actual = row_of(merged, "grpo").actual["equal_length"]
        assert (actual.effective_sample_size, actual.trustworthy) == (size, trusted)
        assert (UNTRUSTED in caption_of(plot_weighting_schemes(merged))) is not trusted


def test_a_measurement_without_a_prediction_or_an_error() -> None:
    world = make_world(train_reward=np.ones(10))
    table = weighting_schemes(world.arrays, LONGEST)
    measured = {
        "run": {"raw": (0.01, None), "equal_gain": (0.01, 0.1)},
        "kl_cov": {"raw": (0.01, 0.001)},
    }
    merged = with_measurements(table, measured)
    actual = row_of(merged, "run").actual
    assert actual["raw"].ratio is None
    assert actual["raw"].z is None
    assert actual["equal_gain"].ratio is None
    assert row_of(merged, "kl_cov").actual["raw"].z is None
    assert_sound(merged)


def test_unknown_measurements_are_refused(table: WeightingResult) -> None:
    with pytest.raises(ValueError, match="'ppo', which is no row"):
        with_measurements(table, {"ppo": {}})
    with pytest.raises(ValueError, match="'equal_price'"):
        with_measurements(table, {"grpo": {"equal_price": (0.0, 0.0)}})

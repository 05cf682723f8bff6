"""What is said of a run's log follows from it: unfiltered sequences, errors, more than two points."""

import math

import numpy as np
import pytest
from scipy import stats

from entropy_experiments.records.history import probed_sums, training_history
from entropy_experiments.records.training_course import course, entropy_column, reward_column
from entropy_experiments.report.training_verdict import probe_sentence, training_sentences
from entropy_experiments.statistics.jackknife_interval import effective_degrees_of_freedom
from tests.entropy_experiments.whole_summary import history_of

FREEDOM = 7.0


def probed(entropies, error=0.05, **columns):
    """A history whose steps have the probe's entropy with its error, beside what the trainer logged of a filtered buffer."""
    rows = [
        {
            "step": k + 1,
            "probe/entropy": float(h),
            "probe/entropy_se": error,
            "probe/measured_df": FREEDOM,
            "entropy": 2.0 - 0.3 * k,
        }
        for k, h in enumerate(entropies)
    ]
    return history_of([row | {name: values[k] for name, values in columns.items()} for k, row in enumerate(rows)])


def words(history):
    return [sentence.text for sentence in training_sentences(history)]


def test_entropy_is_that_of_unfiltered_sequences_and_a_noisy_pair_of_ends_is_no_fall():
    """The log of the filtered buffer falls from 2.0 to 0.5, by 75%; what the probe watched does not move beyond its error."""
    (text,) = words(probed([1.9, 1.6, 1.8, 1.7, 1.9, 1.6], error=0.2))
    assert "showed no clear change" in text
    assert "fell" not in text and "75%" not in text and "2 " not in text.split("nats")[0]
    assert "on the probe's sequences, none left out for its reward" in text


def test_a_fall_is_the_last_third_against_the_first_with_its_interval():
    values = [1.9, 1.7, 1.5, 1.3, 1.1, 0.9]
    (text,) = words(probed(values))
    error = math.sqrt(4 * 0.05**2) / 2
    freedom = error**4 / (4 * (0.05 / 2) ** 4 / FREEDOM)
    reach = float(stats.t.ppf(0.975, freedom)) * error
    change = 1.0 - 1.8
    assert (
        f"entropy fell: 1.8 on average over steps 1 to 2, 1 over steps 5 to 6, a change of {change:.2f} ["
        in text.replace("−", "-")
    )
    found = course(entropy_column(probed(values)))
    assert found.source == "sequences"
    assert (found.change.low, found.change.high) == pytest.approx((change - reach, change + reach))


@pytest.mark.parametrize(("steps", "recorded"), [(12, None), (30, None), (60, None), (60, 48), (60, 1)])
def test_sequences_that_are_watched_for_many_steps_are_no_new_ones_in_each(steps, recorded):
    """A pool of 16, of which a half is drawn anew every eighth step. Taken for new at each step its errors are up to 3 times
    too small: the intervals held the change, of nothing at all, in 82, 52 and 42% of runs of these lengths, in place of 95%.
    Of a pool that is kept for longer, or drawn anew at each step, the run says so.
    """
    anew, part = (1, 16) if recorded == 1 else ((recorded or 16) // 2, 8)
    rng, held, runs = np.random.default_rng(steps), 0, 400
    for _ in range(runs):
        pool, entropies, errors = rng.normal(size=16), [], []
        for k in range(steps):
            if k and k % anew == 0:
                pool = np.r_[pool[part:], rng.normal(size=part)]
            entropies.append(float(pool.mean()))
            errors.append(float(pool.std(ddof=1) / 4))
        rows = [
            {
                "step": k,
                "probe/entropy": h,
                "probe/entropy_se": e,
                "probe/measured_df": 15.0,
                "probe/measured_over": 1.0,
                "probe/watched_for": recorded,
            }
            for k, (h, e) in enumerate(zip(entropies, errors, strict=True))
        ]
        change = course(entropy_column(history_of(rows))).change
        held += change.low <= 0 <= change.high
    assert 0.93 < held / runs < (0.97 if recorded == 1 else 1.01)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_nothing_is_said_of_fewer_than_six_steps(count):
    (text,) = words(probed(np.linspace(1.9, 0.2, count)))
    assert "too few to say what it did" in text and "fell" not in text
    assert "1.90 [1.78, 2.02]" in text, "an end stands with its interval"


def test_logs_without_errors_take_the_scatter_of_the_steps():
    entropies = [2.0, 1.0, 1.5, 1.4, 1.6, 1.2, 1.0, 1.9, 1.1]
    history = history_of([{"step": k, "entropy": h} for k, h in enumerate(entropies)])
    (text,) = words(history)
    assert (
        "showed no clear change" in text
        and "from the scatter of the steps" in text
        and "as the trainer logged it" in text
    )
    first, last = [2.0, 1.0, 1.5], [1.0, 1.9, 1.1]
    expected = stats.ttest_ind(last, first, equal_var=False).confidence_interval()
    found = course(entropy_column(history)).change
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_reward_has_an_error_and_the_name_of_all_prompts_before_that_of_the_first_round():
    log = [
        {"step": k, "loss": 0.0, "buffer/reward_all_prompts": r, "buffer/reward_all_prompts_se": 0.13,
         "buffer/reward_all_prompts_df": 7.0, "buffer/reward_first_round": 0.5}
        for k, r in enumerate([0.2, 0.2, 0.3, 0.2, 0.3, 0.33])
    ]  # fmt: skip
    history = training_history(log)
    column = reward_column(history)
    assert column.values.tolist() == [0.2, 0.2, 0.3, 0.2, 0.3, 0.33] and column.errors.tolist() == [0.13] * 6
    history = [row.model_copy(update={"entropy": 1.0}) for row in history]
    text = words(history)[1]
    assert "mean reward" in text and "showed no clear change" in text and "a change of +0.11 [−0.1" in text


def changes(predicted, measured, deviations=None, low_ess=(), error=0.1):
    rows = []
    for k, (p, m) in enumerate(zip(predicted, measured, strict=True)):
        row = {"step": k + 1, "probe/predicted": p, "probe/predicted_se": error, "probe/predicted_df": 3.0}
        row |= {
            "probe/measured": m,
            "probe/measured_se": error,
            "probe/measured_df": 15.0,
            "probe/low_ess": float(k in low_ess),
        }
        rows.append(row | ({} if deviations is None else {"probe/predicted_deviations": deviations[k]}))
    return history_of(rows)


def test_a_correlation_of_six_steps_is_undetermined():
    predicted = [-0.1, -0.2, -0.1, -0.2, -0.15, -0.12]
    measured = [-0.2, -0.21, -0.1, -0.16, -0.2, -0.12]
    text = probe_sentence(changes(predicted, measured)).text
    r = np.corrcoef(predicted, measured)[0, 1]
    assert 0.3 < r < 0.7
    assert f"correlation undetermined, {r:.2f} [−0." in text, text
    assert "no correlation of 3 steps" in probe_sentence(changes(predicted[:3], measured[:3])).text


def test_sums_have_errors_and_untrusted_measurements_are_in_neither():
    text = probe_sentence(changes([-0.1] * 5, [-0.2, -0.2, -0.2, -0.2, -9.0], low_ess={4})).text
    assert "its lag is in none of these errors" in text, "of mode: simple"
    assert "predicted 4 steps" in text and "1 further step measured on too small an effective sample left out" in text
    sums = probed_sums(changes([-0.1] * 5, [-0.2, -0.2, -0.2, -0.2, -9.0], low_ess={4}))
    assert sums.measured.value == pytest.approx(-0.8)
    reach = (
        float(stats.t.ppf(0.975, 60)) * 0.2
    )  # four errors of 0.1 of other sequences each, 15 degrees of freedom each
    assert sums.measured.high - sums.measured.value == pytest.approx(reach)


def test_predictions_that_share_a_running_average_err_together():
    """Four steps with the same deviations by fold: the error of the sum is four times one's, not twice."""
    fold = (0.1 * np.array([1, -1, 1, -1]) / 2).tolist()
    assert np.linalg.norm(fold) == pytest.approx(0.1)
    alike, opposed = (
        changes([-0.1] * 4, [-0.1] * 4, deviations=d) for d in ([fold] * 4, [fold, [-x for x in fold]] * 2)
    )
    t = float(stats.t.ppf(0.975, 3))
    for rows, error in ((alike, 0.4), (opposed, 0.0), (changes([-0.1] * 4, [-0.1] * 4), 0.4)):
        found = probed_sums(rows).predicted
        assert found.high - found.value == pytest.approx(t * error, abs=1e-12)


def test_the_difference_of_both_sums_has_the_error_of_the_same_prompts():
    """Two steps; what the prompts add to predicted and measured alike is in neither's difference."""
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=16), 0.01 * rng.normal(size=16)
    shared, own = shared - shared.mean(), own - own.mean()
    row = {"probe/predicted_df": 9.0, "probe/measured_df": 9.0, "probe/measured_over": 1.0}
    deviations = {"probe/predicted_deviations": (shared + own).tolist(), "probe/measured_deviations": shared.tolist()}
    errors = {
        "probe/predicted_se": float(np.linalg.norm(shared + own)),
        "probe/measured_se": float(np.linalg.norm(shared)),
    }
    numbers = {"probe/predicted": -0.11, "probe/measured": -0.1}
    rows = [{"step": s, **row, **numbers, **errors, **deviations} for s in (1, 2)]
    found = probed_sums(history_of(rows)).difference
    error, freedom = 2 * np.linalg.norm(own), effective_degrees_of_freedom(2 * own)
    assert found.value == pytest.approx(-0.02)
    assert found.high - found.value == pytest.approx(float(stats.t.ppf(0.975, freedom)) * error, rel=1e-6)
    assert (
        "on the same prompts they cannot be distinguished, differing by −0.02" in probe_sentence(history_of(rows)).text
    )
    assert "lag" not in probe_sentence(history_of([*rows, {"step": 3, "probe/predicted": -0.1}])).text, "of mode: watch"
    close = {"probe/predicted_deviations": (shared + 0.1 * own).tolist()}  # a tenth of the error: ±0.012
    for predicted, said, tone in (
        (-0.101, "agree, differing by −0.002", "plain"),
        (-0.11, "do NOT agree, differing by −0.020", "warning"),
        (-0.2, "do NOT agree, differing by −0.200", "bad"),
    ):
        apart = probe_sentence(history_of([row | close | {"probe/predicted": predicted} for row in rows]))
        assert f"on the same prompts they {said}" in apart.text and apart.tone == tone
    assert "100% of the measured sum (predictions are to first order)" in apart.text
    for other in ({"probe/measured_over": 4.0}, {"probe/measured_deviations": [0.1, -0.1]}):
        assert probed_sums(history_of([rows[0], rows[1] | other])).difference is None


def test_rows_of_an_older_version_have_no_interval():
    history = history_of([{"step": s, "probe/predicted": -0.1, "probe/measured": -0.2} for s in range(3)])
    text = probe_sentence([*history, *history_of([{"step": 9, "probe/predicted": 5.0}])]).text
    assert (
        "predicted 3 steps" in text and "sum to −0.300 (no interval), the measured ones to −0.600 (no interval)" in text
    )
    assert probe_sentence(history[:1]) is None


def test_no_history_is_a_warning():
    assert (
        training_sentences([])[0].tone == "warning"
        and "not known" in training_sentences(history_of([{"step": 1}]))[0].text
    )

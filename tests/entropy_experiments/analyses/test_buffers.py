"""How the two buffers differ: numbers by brute force, the level of the test under no difference, degenerate buffers."""

import json
from itertools import combinations

import numpy as np
import pytest

from entropy_experiments.analyses.arrays import SequenceLabels
from entropy_experiments.analyses.buffers import compare_buffers
from entropy_experiments.analyses.permuted_prompts import superiority
from entropy_experiments.records.record import json_of
from entropy_experiments.report.figures.buffers import plot_buffers
from entropy_experiments.report.figures.style import caption_of, png_bytes
from entropy_experiments.report.findings import buffers_finding


def labels(prompts, length, entropy=None, reward=None):
    length = np.asarray(length, dtype=np.float64)
    n = len(length)
    entropy = np.ones(n) if entropy is None else np.asarray(entropy, dtype=np.float64)
    reward = np.full(n, np.nan) if reward is None else np.asarray(reward, dtype=np.float64)
    return SequenceLabels(np.asarray(prompts), reward, length, entropy * length, -length, [""] * n, [""] * n)


def random_pair(rng, shift=0.0, evaluation=64, groups=8, each=8):
    """Evaluation prompts of one completion, training prompts of several that share an effect of their prompt."""
    prompts = np.repeat(np.arange(groups), each)
    left = rng.normal(size=evaluation) + rng.normal(size=evaluation)
    right = rng.normal(size=groups)[prompts] + rng.normal(size=groups * each) + shift
    return labels(1000 + np.arange(evaluation), np.exp(0.3 * left)), labels(prompts, np.exp(0.3 * right))


def test_probability_and_its_error_by_brute_force():
    """Every pair counted, every prompt left out, in plain loops."""
    rng = np.random.default_rng(0)
    left, right = random_pair(rng, 0.5, evaluation=9, groups=4, each=3)

    def probability(x, y):
        return sum((b > a) + 0.5 * (b == a) for a in x for b in y) / (len(x) * len(y))

    x, y = left.length, np.round(right.length, 1)
    x = np.round(x, 1)  # ties
    left, right = labels(left.prompt_index, x), labels(right.prompt_index, y)
    found = compare_buffers(left, right).quantities["length"]
    assert found.probability_larger.value == pytest.approx(probability(x, y), rel=1e-12)
    variance = 0.0
    for own, prompts, side in ((x, left.prompt_index, 0), (y, right.prompt_index, 1)):
        left_out = []
        for prompt in set(prompts.tolist()):
            rest = own[prompts != prompt]
            left_out.append(probability(rest, y) if side == 0 else probability(x, rest))
        count = len(left_out)
        variance += (count - 1) / count * sum((value - sum(left_out) / count) ** 2 for value in left_out)
    assert found.probability_larger.standard_error == pytest.approx(variance**0.5, rel=1e-9)
    pooled = ((x.var(ddof=1) + y.var(ddof=1)) / 2) ** 0.5
    assert found.standardised_difference == pytest.approx((y.mean() - x.mean()) / pooled)


def test_shared_prompts_are_left_out_of_both_sides_at_once():
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(5), 4)
    effect = rng.normal(size=5)[prompts]
    x, y = np.exp(effect + rng.normal(size=20)), np.exp(effect + rng.normal(size=20))
    found = compare_buffers(labels(prompts, x), labels(prompts, y))
    assert found.shared_prompts == 5
    left_out = []
    for prompt in range(5):
        a, b = x[prompts != prompt], y[prompts != prompt]
        left_out.append(np.mean([bb > aa for aa in a for bb in b]))
    error = (4 / 5 * np.square(np.array(left_out) - np.mean(left_out)).sum()) ** 0.5
    assert found.quantities["length"].probability_larger.standard_error == pytest.approx(error)


def test_the_level_holds_although_completions_of_a_prompt_are_alike():
    """A test that took sequences for independent would reject one time in five here."""
    rng = np.random.default_rng(2)
    rejected = [compare_buffers(*random_pair(rng)).quantities["length"].p_value < 0.05 for _ in range(120)]
    assert 0.005 <= np.mean(rejected) <= 0.10, f"{np.mean(rejected):.3f}: are sequences taken for independent units?"


def test_a_planted_difference_is_found_and_named():
    rng = np.random.default_rng(3)
    evaluation, training = random_pair(rng, 3.0)
    result = compare_buffers(evaluation, training)
    assert result.quantities["length"].differs and result.quantities["length"].p_value < 1e-3
    assert "longer" in buffers_finding(result) and "differ" not in buffers_finding(result)
    back = compare_buffers(training, evaluation)
    assert "shorter" in buffers_finding(back)
    assert back.quantities["length"].p_value == pytest.approx(result.quantities["length"].p_value, rel=1e-9)


def test_four_looks_are_allowed_for():
    """p = 0.03 for one of three tested quantities is no finding."""
    rng = np.random.default_rng(4)
    for _ in range(200):
        evaluation, training = random_pair(rng, 1.0)
        n = (len(evaluation), len(training))
        noisy = [
            labels(side.prompt_index, side.length, rng.gamma(2, 1, k), rng.random(k))
            for side, k in zip((evaluation, training), n, strict=True)
        ]
        quantities = compare_buffers(*noisy).quantities
        p = [quantities[name].p_value for name in ("length", "entropy", "reward")]
        if 0.02 < p[0] < 0.04 and min(p[1:]) > 0.05:
            assert not quantities["length"].differs
            return
    pytest.fail("no such draw: choose another seed")


def degenerate():
    two = labels([0, 1], [3, 4])
    return {
        "all equal": (
            labels([0, 1], [3, 3], reward=[1, 1]),
            labels([2, 3], [3, 3], reward=[1, 1]),
            "all values are equal",
        ),
        "one prompt": (two, labels([5, 5], [3, 9]), "a single prompt has no spread over prompts"),
        "one sequence each": (labels([0], [3]), labels([5], [4]), "a single prompt has no spread over prompts"),
        "the same only prompt": (labels([5, 5], [3, 4]), labels([5, 5], [3, 9]), "a single prompt"),
        "apart": (labels([0, 1, 2], [1, 2, 3]), labels([5, 6, 7], [8, 9, 9]), "the buffers do not overlap"),
    }


@pytest.mark.parametrize("case", list(degenerate()))
def test_degenerate_buffers_give_reasons_and_never_nan(case):
    evaluation, training, reason = degenerate()[case]
    cut = np.zeros(len(evaluation), bool), np.zeros(len(training), bool)
    result = compare_buffers(evaluation, training, cut)
    json.dumps(json_of(result), allow_nan=False)
    assert reason in result.quantities["length"].reason
    assert buffers_finding(result).endswith(".") and "nan" not in buffers_finding(result)
    assert png_bytes(plot_buffers(result)).startswith(b"\x89PNG")


def test_buffers_apart_have_the_p_value_of_their_arrangement():
    """One of the twenty ways to choose three prompts of six for training, or its mirror image."""
    evaluation, training, _ = degenerate()["apart"]
    assert compare_buffers(evaluation, training).quantities["length"].p_value == pytest.approx(2 / 20)


def test_unscored_sequences_have_no_say_in_rewards():
    evaluation = labels([0, 1, 2], [3, 4, 5], reward=[0.0, np.nan, 1.0])
    training = labels([5, 6, 7], [3, 4, 5], reward=[1.0, 0.5, 0.5])
    reward = compare_buffers(evaluation, training).quantities["reward"]
    assert reward.evaluation.sequences == 2 and reward.evaluation.mean == 0.5
    none = compare_buffers(labels([0, 1], [3, 4]), training).quantities["reward"]
    assert none.p_value is None and none.reason == "only one buffer has this number"


def test_the_figure_says_what_it_shows():
    rng = np.random.default_rng(5)
    figure = plot_buffers(compare_buffers(*random_pair(rng, 3.0)))
    assert "64 sequences of 64 prompts" in caption_of(figure) and "64 sequences of 8 prompts" in caption_of(figure)
    assert any("they differ" in axes.get_title(loc="left") for axes in figure.axes)


def test_the_smallest_of_four_p_values_keeps_its_level_at_few_prompts():
    """Rejections at 5%/4 by six prompts a side, half of the sequences duplicates: Student's t rejects about twice as often."""
    rng = np.random.default_rng(5)
    p = []
    for _ in range(250):
        sides = []
        for start in (0, 6):
            own = np.repeat(np.arange(start, start + 6), 4)
            values = np.exp(rng.normal(size=6)[own - start] + rng.normal(size=24))
            sides.append((values.repeat(2), own.repeat(2)))
        (x, xp), (y, yp) = sides
        found = superiority(x, y, xp, yp)
        assert found is not None and found.p_value is not None
        p.append(found.p_value)
    assert np.mean(np.array(p) <= 0.0125) <= 0.03 and 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.08


def test_permutations_by_brute_force():
    """Three prompts a side, one of them on both: every allocation by loops."""
    rng = np.random.default_rng(6)
    left = {0: rng.normal(size=2), 1: rng.normal(size=3), 9: rng.normal(size=2)}
    right = {2: rng.normal(size=1), 3: rng.normal(size=2), 9: rng.normal(size=4)}

    def statistic(sides):
        def probability(without):
            x, y = (np.concatenate([v for p, v in side if p != without]) for side in sides)
            return (y[None] > x[:, None]).mean()

        prompts = {p for side in sides for p, _ in side}
        rest = np.array([probability(p) for p in prompts])
        count = len(rest)
        return abs(probability(None) - 0.5) / ((count - 1) / count * np.square(rest - rest.mean()).sum()) ** 0.5

    alone = [(p, v) for side in (left, right) for p, v in side.items() if p != 9]
    sizes = []
    for chosen in combinations(range(4), 2):
        for one, other in ((left[9], right[9]), (right[9], left[9])):
            to_right = [alone[k] for k in chosen] + [(9, other)]
            to_left = [alone[k] for k in range(4) if k not in chosen] + [(9, one)]
            sizes.append(statistic((to_left, to_right)))
    observed = statistic((list(left.items()), list(right.items())))
    columns = [np.concatenate(list(side.values())) for side in (left, right)]
    prompts = [np.repeat(list(side), [len(v) for v in side.values()]) for side in (left, right)]
    found = superiority(*columns, *prompts)
    assert found is not None and found.p_value == pytest.approx(np.mean(np.array(sizes) >= observed * (1 - 1e-9)))

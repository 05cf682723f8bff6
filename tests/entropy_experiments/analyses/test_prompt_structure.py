"""Prompt structure: planted structure is found, absent structure at the nominal rate only, and every number has a brute force."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from entropy_core.uncertainty import sums_over_prompts, u_statistic
from entropy_experiments.analyses.prompt_structure import (
    correctness,
    kernel_structure,
    permutation_test,
    prompt_structure,
    single_batch_estimate,
    u_statistic_of_products,
)
from entropy_experiments.records.record import json_of
from entropy_experiments.report.figures.structure import plot_prompt_structure
from entropy_experiments.report.figures.style import caption_of, png_bytes
from entropy_experiments.report.kernel_findings import structure_finding
from tests.entropy_experiments.analyses.planted_kernels import two_families, unstructured


def rng(seed=0):
    return np.random.default_rng(seed)


def plausible_counts(trials, rate):
    """Counts that a test of this rate gives in all but 2 of 1000 repetitions."""
    return binom.ppf(0.001, trials, rate), binom.ppf(0.999, trials, rate)


def finite(result):
    """The result, which JSON can hold; raises on NaN and infinities."""
    json.dumps(json_of(result), allow_nan=False)
    return result


# ---- numbers


def test_blocks_are_the_means_over_their_pairs():
    prompts = np.array([3, 1, 3, 1, 1, 7])
    kernels, _ = unstructured(rng(), prompts, rewards=[1, 0, 0, 1, 1, 1], eval_prompts=[7, 3, 8])
    result = prompt_structure(kernels, permutations=9)
    raw = kernels.train_fisher
    cosine = raw / np.sqrt(np.outer(np.diag(raw), np.diag(raw)))
    for name, kernel in (("raw", raw), ("cosine", cosine)):
        same = [kernel[i, j] for i in range(6) for j in range(i) if prompts[i] == prompts[j]]
        cross = [kernel[i, j] for i in range(6) for j in range(i) if prompts[i] != prompts[j]]
        blocks = getattr(result.train, name)
        assert blocks.self.mean == pytest.approx(np.trace(kernel) / 6)
        assert (blocks.same_prompt.pairs, blocks.cross_prompt.pairs) == (len(same), len(cross)) == (4, 11)
        assert blocks.same_prompt.mean == pytest.approx(np.mean(same)), "is the diagonal among the same-prompt pairs?"
        assert blocks.cross_prompt.mean == pytest.approx(np.mean(cross))
        assert blocks.test.difference == pytest.approx(np.mean(same) - np.mean(cross))
    evaluation = result.evaluation.raw
    together = [kernels.fisher[0, 5], kernels.fisher[1, 0], kernels.fisher[1, 2]]
    assert evaluation.same_prompt.mean == pytest.approx(np.mean(together))
    assert evaluation.same_prompt.pairs == 3 and evaluation.cross_prompt.pairs == 15
    old = kernel_structure(kernels.fisher, kernels.evaluation.prompt_index, prompts)
    assert old["same_prompt_mean"] == pytest.approx(evaluation.same_prompt.mean)
    groups = result.within_group.raw  # prompt 3: rewards 1, 0; prompt 1: 0, 1, 1; prompt 7 has no mean to exceed
    assert groups.correct_correct.mean == pytest.approx(raw[3, 4])
    assert groups.correct_wrong.mean == pytest.approx(np.mean([raw[0, 2], raw[1, 3], raw[1, 4]]))
    assert json_of(groups.wrong_wrong) == {"pairs": 0, "mean": None, "quantiles": None}
    assert [getattr(result.within_group, key) for key in ("correct", "wrong", "neither")] == [3, 2, 1]


def test_correctness_contrast_is_the_fixed_effects_regression():
    """c is the coefficient of "alike" in a least-squares fit of K on it and an intercept for each prompt."""
    prompts, rewards = np.repeat([0, 1, 2], [4, 5, 3]), np.array([1, 0, 0, 1, 1, 1, 0, 1, 0.5, 0, 0, 1.0])
    kernels, _ = unstructured(rng(1), prompts, rewards=rewards)
    signs = correctness(rewards, prompts)
    pairs = [(i, j) for i in range(12) for j in range(i) if prompts[i] == prompts[j] and signs[i] * signs[j]]
    design = np.array([[signs[i] == signs[j], *(prompts[i] == p for p in range(3))] for i, j in pairs], dtype=float)
    fit = np.linalg.lstsq(design, np.array([kernels.train_fisher[i, j] for i, j in pairs]), rcond=None)[0]
    test = prompt_structure(kernels, permutations=9).within_group.raw.test
    assert test.difference == pytest.approx(fit[0]), "pairs of different prompts are being compared"


def test_correctness_is_relative_to_the_prompt_and_ignores_rounding():
    rewards = [0.1, 0.1, 0.1, 1, 0, np.nan, 5, 7]
    assert correctness(rewards, np.array([0, 0, 0, 1, 1, 1, 2, 2])).tolist() == [0, 0, 0, 1, -1, 0, -1, 1]


def test_p_value_agrees_with_all_permutations():
    prompts = np.repeat(np.arange(3), 2)
    kernels, _ = unstructured(rng(3), prompts, dimension=4)
    kernel = kernels.train_fisher

    def difference(order):
        pairs = [(kernel[i, j], order[i] == order[j]) for i in range(6) for j in range(i)]
        return np.mean([k for k, same in pairs if same]) - np.mean([k for k, same in pairs if not same])

    null = np.array([difference(order) for order in itertools.permutations(prompts)])
    observed = difference(prompts)
    exact = min(1, 2 * min((null >= observed - 1e-12).mean(), (null <= observed + 1e-12).mean()))
    test = prompt_structure(kernels, permutations=20000).train.raw.test
    assert test.p_value == pytest.approx(exact, abs=0.02)
    assert test.null_mean == pytest.approx(null.mean(), abs=0.05 * null.std())
    assert test.null_deviation == pytest.approx(null.std(), rel=0.05)


def test_p_value_between_buffers_agrees_with_all_permutations_of_whole_prompts():
    prompts, eval_prompts = np.repeat([2, 4, 6, 8], [1, 2, 3, 2]), np.array([8, 8, 2, 4, 9])
    kernels, _ = unstructured(rng(6), prompts, dimension=3, eval_prompts=eval_prompts)

    def difference(order):
        renamed = dict(zip([2, 4, 6, 8], order, strict=True))
        same = np.array([[renamed[p] == q for p in prompts] for q in eval_prompts])
        return kernels.fisher[same].mean() - kernels.fisher[~same].mean()

    null = np.array([difference(order) for order in itertools.permutations([2, 4, 6, 8])])
    observed = difference([2, 4, 6, 8])
    exact = min(1, 2 * min((null >= observed - 1e-12).mean(), (null <= observed + 1e-12).mean()))
    test = prompt_structure(kernels, permutations=5000).evaluation.raw.test
    assert test.difference == pytest.approx(observed)
    assert test.p_value == pytest.approx(exact, abs=0.03)
    assert test.null_mean == pytest.approx(null.mean(), abs=0.06 * null.std())
    assert test.null_deviation == pytest.approx(null.std(), rel=0.05)


def test_p_value_adds_one_counts_ties_and_looks_both_ways():
    null = np.array([0.0, 1.0, 2.0, 3.0])
    assert permutation_test(3.0, null, 1.0).p_value == pytest.approx(2 * 2 / 5)
    assert permutation_test(9.0, null, 1.0).p_value == pytest.approx(2 * 1 / 5)
    assert permutation_test(-9.0, null, 1.0).p_value == pytest.approx(2 * 1 / 5)
    assert permutation_test(1.0, np.full(9, 1.0 + 1e-12), 1.0).p_value == 1.0, "rounding decides about a tie"


# ---- planted and absent structure


def test_planted_prompt_structure_is_found_and_correctness_is_not():
    prompts, rows = two_families(rng(0))
    rewards = np.tile([1.0, 0, 0, 1], 8)
    kernels, _ = unstructured(rng(1), prompts, rewards=rewards, gradients=rows)
    result = prompt_structure(kernels, permutations=999)
    for name in ("raw", "cosine"):
        assert getattr(result.train, name).test.p_value <= 0.002
        assert getattr(result.within_group, name).test.p_value > 0.05
    assert result.train.cosine.same_prompt.mean > 0.7
    assert "more than" in structure_finding(result) and "does not show" in structure_finding(result)


def test_planted_correctness_is_found_within_prompts():
    prompts, rewards = np.repeat(np.arange(6), 6), np.tile([1.0, 1, 0, 0, 0, 1], 6)
    rows = rng(2).normal(size=(36, 40))
    rows[rewards > 0, 0] += 3.0
    rows[rewards == 0, 1] += 3.0
    kernels, _ = unstructured(rng(1), prompts, rewards=rewards, gradients=rows)
    result = prompt_structure(kernels, permutations=999)
    assert result.within_group.cosine.test.p_value <= 0.002
    assert result.within_group.cosine.test.difference > 0
    assert "correctness matters" in structure_finding(result)


def test_opposed_sequences_of_one_prompt_are_found_too():
    prompts = np.repeat(np.arange(8), 2)
    rows = rng(2).normal(size=(16, 40))
    rows[1::2] -= rows[::2]
    kernels, _ = unstructured(rng(1), prompts, gradients=rows)
    result = prompt_structure(kernels, permutations=999)
    assert result.train.cosine.test.p_value <= 0.002 and "less than" in structure_finding(result)


@pytest.mark.long
def test_absent_structure_is_found_at_the_nominal_rate_only():
    """The three null hypotheses, all five tests. Training sequences of one prompt are alike in the second half of the data
    sets: a test that permuted single training sequences against the evaluation buffer would then cry wolf.
    """
    sets, generator = 300, rng(7)
    prompts, eval_prompts = np.repeat(np.arange(6), 6), np.repeat(np.arange(6), 2)
    found = {"train raw": [], "train cosine": [], "groups raw": [], "groups cosine": [], "buffers": []}
    for k in range(sets):
        rows = generator.normal(size=(36, 30)) * generator.uniform(0.5, 2.0, size=(36, 1)) + 0.3
        alike = k % 2 == 1
        if alike:
            rows += 2 * generator.normal(size=(6, 30))[prompts]
        rewards = generator.permuted(np.tile([1.0, 1, 1, 0, 0, 0.0], (6, 1)), axis=1).ravel()
        kernels, _ = unstructured(generator, prompts, rewards=rewards, eval_prompts=eval_prompts, gradients=rows)
        result = prompt_structure(kernels, permutations=119, seed=k)
        if not alike:
            found["train raw"].append(result.train.raw.test.p_value)
            found["train cosine"].append(result.train.cosine.test.p_value)
        found["groups raw"].append(result.within_group.raw.test.p_value)
        found["groups cosine"].append(result.within_group.cosine.test.p_value)
        found["buffers"].append(result.evaluation.raw.test.p_value)
    for name, p_values in found.items():
        for level in (0.05, 0.2):
            count, (low, high) = (np.array(p_values) <= level).sum(), plausible_counts(len(p_values), level)
            assert low <= count <= high, f"{name}: {count} of {len(p_values)} below {level}, expected {low} to {high}"


# ---- one batch in both roles


def explicit(kernels, vectors):
    """Per-prompt vectors X (entropy side) and Y (update side) with V = Xbar . Ybar, by torch's sums."""
    n, prompts = len(kernels.training), torch.tensor(kernels.training.prompt_index)
    pushes = kernels.step_factor * kernels.weights[:, None] * vectors.gradients * vectors.preconditioner
    count = len(prompts.unique())
    x = sums_over_prompts(torch.tensor(vectors.entropy_rows), prompts) * count / n
    return x, sums_over_prompts(torch.tensor(pushes), prompts) * count


def test_terms_of_a_single_batch_add_up_and_u_is_the_one_of_explicit_vectors():
    kernels, vectors = unstructured(rng(4), np.array([0, 0, 5, 5, 5, 2, 9, 9]), rewards=np.ones(8))
    single = single_batch_estimate(kernels)
    x, y = explicit(kernels, vectors)
    assert single.value == pytest.approx(float(x.mean(0) @ y.mean(0)))
    terms = [getattr(single, name) for name in ("self", "same_prompt", "cross_prompt")]
    assert sum(term.value for term in terms) == pytest.approx(single.value)
    assert [term.pairs for term in terms] == [8, 10, 46]
    diagonal = kernels.step_factor * kernels.weights @ np.diag(kernels.train_entropy_fisher) / 8
    assert single.self.value == pytest.approx(diagonal)
    assert single.u_statistic.value == pytest.approx(u_statistic(x, y))
    assert single.bias.value == pytest.approx(single.value - u_statistic(x, y))
    assert single.evaluation_value == pytest.approx(kernels.shares.sum())
    assert u_statistic_of_products((x @ y.T).numpy()) == pytest.approx(u_statistic(x, y))


def test_standard_errors_are_jackknives_over_prompts_of_both_sides():
    kernels, vectors = unstructured(rng(5), np.array([0, 0, 5, 5, 5, 2, 9, 9]))
    x, y = explicit(kernels, vectors)
    keep = [[q for q in range(4) if q != p] for p in range(4)]
    u = np.array([u_statistic(x[rest], y[rest]) for rest in keep])
    bias = np.array([float(x[rest].mean(0) @ y[rest].mean(0)) for rest in keep]) - u
    single = single_batch_estimate(kernels)
    for name, values in (("u_statistic", u), ("bias", bias)):
        error = np.sqrt(3 / 4 * np.square(values - values.mean()).sum())
        assert getattr(single, name).standard_error == pytest.approx(error)


def test_u_is_unbiased_where_the_single_batch_is_not():
    """E_j = -dS_j, weights 1, independent prompts of mean zero: the truth is 0, the single batch always sees entropy fall."""
    prompts, u, v = np.repeat(np.arange(4), 2), [], []
    for seed in range(300):
        _, vectors = unstructured(rng(seed), prompts, dimension=10)
        kernels, _ = unstructured(rng(seed), prompts, gradients=vectors.gradients)
        kernels = replace(kernels, train_entropy_fisher=-kernels.train_fisher, weights=np.ones(8))
        single = single_batch_estimate(kernels)
        u.append(single.u_statistic.value)
        v.append(single.value)
    assert abs(np.mean(u)) < 3.5 * np.std(u) / np.sqrt(300)
    assert np.max(v) < 0


# ---- degenerate input

ONE = np.zeros(6, dtype=int)
PAIRS = np.repeat(np.arange(3), 2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("prompts", "rewards", "rows", "expected"),
    [
        (ONE, [1, 0, 1, 0, 1, 0], None, {"train": "one prompt only", "within": None, "single": "two prompts"}),
        (np.arange(6), np.ones(6), None, {"train": "no prompt has two", "within": "no prompt has", "single": None}),
        (np.repeat([0, 1], 3), [1, 0, 1, 0, 1, 1], None, {"train": None, "within": None, "single": "three prompts"}),
        (PAIRS, np.ones(6), None, {"train": None, "within": "no prompt has a correct", "single": None}),
        (PAIRS, None, None, {"train": None, "within": "no prompt has a correct", "single": None}),
        (PAIRS, [1, 0] * 3, np.ones((6, 4)), {"train": None, "within": "no prompt has a correct", "single": None}),
        (PAIRS, [1, 0] * 3, np.zeros((6, 4)), {"train": "fewer than two", "within": "no prompt has", "single": None}),
        ([4], [1], None, {"train": "fewer than two", "within": "no prompt has", "single": "two prompts"}),
    ],
    ids=[
        "one prompt",
        "one completion",
        "two prompts",
        "equal rewards",
        "no rewards",
        "identical",
        "zero",
        "one sequence",
    ],
)
def test_degenerate_input_gives_stated_results(prompts, rewards, rows, expected):
    kernels, _ = unstructured(rng(), np.asarray(prompts), rewards=rewards, gradients=rows)
    result = finite(prompt_structure(kernels, permutations=49))
    tests = {"train": result.train.cosine.test, "within": result.within_group.cosine.test}
    for name, test in tests.items():
        assert (test.p_value is None) == (expected[name] is not None) == (test.reason is not None)
        assert expected[name] is None or expected[name] in test.reason
    assert (result.single_batch.reason is None) == (expected["single"] is None)
    assert expected["single"] is None or expected["single"] in result.single_batch.reason
    assert (
        structure_finding(result).endswith(".")
        and "None" not in structure_finding(result)
        and "nan" not in structure_finding(result).lower()
    )
    assert png_bytes(plot_prompt_structure(result)).startswith(b"\x89PNG")


def test_identical_rows_have_no_difference_and_a_p_value_of_one():
    kernels, _ = unstructured(rng(), PAIRS, gradients=np.full((6, 4), 0.3))
    test = prompt_structure(kernels, permutations=49).train.raw.test
    assert test.difference == pytest.approx(0, abs=1e-12) and test.p_value == 1.0 and test.null_deviation == 0.0


def test_sequences_without_gradient_leave_the_cosines_only():
    rows = rng().normal(size=(6, 4))
    rows[2] = 0
    kernels, _ = unstructured(rng(), PAIRS, gradients=rows)
    result = finite(prompt_structure(kernels, permutations=49))
    assert result.without_gradient == 1
    assert (result.train.raw.same_prompt.pairs, result.train.cosine.same_prompt.pairs) == (3, 2)


def test_kernels_that_cannot_be_right_are_refused():
    kernels, _ = unstructured(rng(), PAIRS)
    broken = kernels.train_fisher.copy()
    broken[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"train_fisher has 1 entries that are not finite, the first at \[1, 2\]"):
        prompt_structure(replace(kernels, train_fisher=broken))
    with pytest.raises(ValueError, match="not symmetric"):
        prompt_structure(replace(kernels, train_fisher=kernels.train_entropy_fisher))
    with pytest.raises(ValueError, match="train_entropy_fisher has 36 entries"):
        prompt_structure(replace(kernels, train_entropy_fisher=np.full((6, 6), np.inf)))


# ---- figure


def test_figure_draws_means_differences_and_terms():
    kernels, _ = unstructured(rng(1), np.repeat(np.arange(4), 4), rewards=[1, 0, 0, 1] * 4, eval_prompts=[0, 1, 2, 3])
    result = finite(prompt_structure(kernels, permutations=99))
    figure = plot_prompt_structure(result)
    blocks, tests, terms = figure.axes
    diamonds = [line.get_xdata()[0] for line in blocks.lines if line.get_marker() == "D"]
    cosine, groups = result.train.cosine, result.within_group.cosine
    names = ("correct_correct", "correct_wrong", "wrong_wrong")
    means = [cosine.same_prompt.mean, cosine.cross_prompt.mean, *(getattr(groups, name).mean for name in names)]
    assert diamonds == pytest.approx(means)
    dots = [line.get_xdata()[0] for line in tests.lines if line.get_marker() == "o"]
    test = cosine.test
    assert dots[0] == pytest.approx((test.difference - test.null_mean) / test.null_deviation) and len(dots) == 5
    single = result.single_batch
    widths = [patch.get_width() for patch in terms.patches[:6]]
    values = [getattr(single, name).value for name in ("self", "same_prompt", "cross_prompt")]
    values += [single.value, single.u_statistic.value, single.evaluation_value]
    assert widths == pytest.approx([1e3 * value for value in values])
    assert "16 training sequences of 4 prompts" in caption_of(figure)

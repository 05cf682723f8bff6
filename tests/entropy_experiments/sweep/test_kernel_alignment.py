"""Alignment of kernels over prompts: planted likeness, none by chance, and a brute-force HSIC that shares no code."""

import itertools

import numpy as np
import pytest

from entropy_experiments.sweep.evolution.kernel_alignment import (
    align_kernels,
    block_cosine,
    debiased_alignment,
    prompt_gram,
    rows_of_prompts,
    unbiased_hsic,
)


def symmetric(count, rng):
    values = rng.normal(size=(count, count))
    return values + values.T


def test_hsic_is_the_u_statistic_over_quadruples():
    """Song et al.: the mean over ordered quadruples of distinct prompts of K12 (L12 + L34 - 2 L13)."""
    rng = np.random.default_rng(0)
    k, m = symmetric(6, rng), symmetric(6, rng)
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in itertools.permutations(range(6), 4)]
    assert unbiased_hsic(k, m) == pytest.approx(np.mean(terms), rel=1e-10)


def test_unrelated_kernels_have_no_alignment_on_average():
    rng = np.random.default_rng(1)
    values, plain = [], []
    for _ in range(200):
        grams = [prompt_gram(rng.normal(size=(24, 24))) for _ in range(2)]
        value = debiased_alignment(*grams)
        values.append(0.0 if value is None else unbiased_hsic(*grams))
        centred = [g - g.mean(0) - g.mean(1)[:, None] + g.mean() for g in grams]
        plain.append((centred[0] * centred[1]).sum() / np.prod([np.linalg.norm(c) for c in centred]))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert np.mean(plain) > 0.3, "the plain alignment would have claimed likeness; this test would not see a bias"


def test_planted_likeness_grows_with_what_is_shared():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(40, 8))
    found = []
    for shared in (1.0, 0.8, 0.4, 0.0):
        other = shared * features + np.sqrt(1 - shared**2) * rng.normal(size=features.shape)
        grams = [prompt_gram(f @ rng.normal(size=(8, 60))) for f in (features, other)]
        found.append(align_kernels(*grams, permutations=199))
    values = [f.value for f in found]
    assert values == sorted(values, reverse=True) and values[0] > 0.8 and abs(values[-1]) < 0.2
    assert found[0].p_value == 1 / 200 and found[-1].p_value > 0.05
    assert all(f.standard_error > 0 for f in found)


def test_other_columns_of_the_same_features_change_nothing_but_noise():
    """Training sequences may differ: rotating and rescaling columns leaves the gram as it is."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(12, 9))
    rotation, _ = np.linalg.qr(rng.normal(size=(9, 9)))
    np.testing.assert_allclose(prompt_gram(rows), prompt_gram(7.0 * rows @ rotation), atol=1e-12)
    lengths = rng.uniform(0.5, 3, 9)
    np.testing.assert_allclose(prompt_gram(rows * lengths, lengths**2), prompt_gram(rows), atol=1e-12)


def test_rows_are_means_over_a_prompts_completions():
    kernel = np.arange(12.0).reshape(4, 3)
    found = rows_of_prompts(kernel, np.array([5, 3, 5, 9]), np.array([3, 5]))
    np.testing.assert_allclose(found, [kernel[1], (kernel[0] + kernel[2]) / 2])


def test_block_cosine_on_shared_training_prompts():
    rng = np.random.default_rng(4)
    kernel, columns = rng.normal(size=(8, 6)), np.array([1, 1, 2, 2, 3, 3])
    order = rng.permutation(6)
    assert block_cosine(kernel, columns, 3 * kernel[:, order], columns[order]).value == pytest.approx(1.0)
    assert block_cosine(kernel, columns, -kernel, columns).value == pytest.approx(-1.0)
    apart = block_cosine(kernel, columns, kernel, columns + 10)
    assert apart.value is None and "share no prompt" in apart.reason


def test_too_few_prompts_and_empty_kernels_say_why():
    assert "6 evaluation prompts" in align_kernels(np.eye(4), np.eye(4)).reason
    zero = align_kernels(prompt_gram(np.zeros((8, 5))), prompt_gram(np.random.default_rng(5).normal(size=(8, 5))))
    assert zero.value is None and "no more than chance" in zero.reason

"""Clusters: planted ones are found whatever the lengths, one cloud is not split, and what members share is not made up."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import binom
from sklearn.metrics import adjusted_rand_score, mutual_info_score, silhouette_score

from entropy_experiments.analyses.cluster_contents import (
    first_word,
    mutual_information,
    shared_by_clusters,
    variance_between,
)
from entropy_experiments.analyses.clustering import (
    choose_number,
    rotated_cloud,
    sequence_clusters,
    silhouettes_along_tree,
    spectral_clusters,
)
from entropy_experiments.analyses.kernel_geometry import cosine_kernel, spectrum
from entropy_experiments.records.record import json_of
from entropy_experiments.report.figures.clustering import plot_sequence_clusters
from entropy_experiments.report.figures.style import caption_of, png_bytes
from entropy_experiments.report.kernel_findings import clustering_finding
from tests.entropy_experiments.analyses.planted_kernels import labels, two_families, unstructured


def rng(seed=0):
    return np.random.default_rng(seed)


def plausible_counts(trials, rate):
    """Counts that a test of this rate gives in all but 2 of 1000 repetitions."""
    return binom.ppf(0.001, trials, rate), binom.ppf(0.999, trials, rate)


def finite(result):
    """The result, which JSON can hold; raises on NaN and infinities."""
    json.dumps(json_of(result), allow_nan=False)
    return result


def gram(rows):
    return rows @ rows.T


# ---- geometry


def test_cosines_are_those_of_the_rows_under_p_and_rows_without_length_are_left_out():
    rows, p = rng().normal(size=(5, 7)), rng(1).uniform(0.1, 2, size=7)
    rows[3] = 0
    cosine, kept = cosine_kernel((rows * p) @ rows.T)
    assert kept.tolist() == [0, 1, 2, 4]
    scaled = rows * np.sqrt(p)
    expected = [
        [scaled[i] @ scaled[j] / np.linalg.norm(scaled[i]) / np.linalg.norm(scaled[j]) for j in kept] for i in kept
    ]
    np.testing.assert_allclose(cosine, expected, atol=1e-12)


def test_effective_rank_of_known_spectra():
    for kernel, rank, ratio in (
        (np.eye(6), 6, 6),
        (np.outer([1, 2, 3], [1, 2, 3]).astype(float), 1, 1),
        (np.diag([3.0, 1.0]), np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))), 16 / 10),
    ):
        found = spectrum(kernel)
        assert found.effective_rank == pytest.approx(rank) and found.participation_ratio == pytest.approx(ratio)
    found = spectrum(np.diag([5.0, 4.0, 1.0]))
    assert found.eigenvalues == pytest.approx([5, 4, 1]) and found.rank_90 == 2 and found.most_negative == 0
    assert spectrum(np.zeros((3, 3))).reason == "no sequence has a gradient"


# ---- the number of clusters


def test_silhouettes_are_those_of_the_trees_cuts():
    cosine, _ = cosine_kernel(gram(rng(2).normal(size=(30, 6))))
    tree = linkage(squareform(1 - cosine, checks=False), "average")
    expected = [silhouette_score(1 - cosine, fcluster(tree, k, "maxclust"), metric="precomputed") for k in range(2, 13)]
    np.testing.assert_allclose(silhouettes_along_tree(cosine, list(range(2, 13))), expected, atol=1e-12)


def test_rotated_cloud_keeps_spectrum_and_mean_and_forgets_who_is_who():
    kernel = gram(rng(3).normal(size=(7, 4)) + 1.0)
    generator, total = rng(4), np.zeros((7, 7))
    for _ in range(4000):
        turned = rotated_cloud(kernel, generator)
        total += turned / 4000
    np.testing.assert_allclose(np.linalg.eigvalsh(turned), np.linalg.eigvalsh(kernel), atol=1e-9)
    assert turned.sum() == pytest.approx(kernel.sum()), "the squared length of the mean gradient has changed"
    # Uniform rotations average to a matrix that treats all sequences alike; its two values follow from trace and sum.
    off = (kernel.sum() - np.trace(kernel)) / 42
    expected = np.where(np.eye(7) > 0, np.trace(kernel) / 7, off)
    np.testing.assert_allclose(total, expected, atol=0.25)


def test_planted_families_are_found_by_both_methods():
    prompts, rows = two_families(rng(0))
    kernels, _ = unstructured(rng(1), prompts, rewards=np.tile([1.0, 0, 0, 1], 8), gradients=rows)
    result = finite(sequence_clusters(kernels, rotations=39, resamples=20))
    assert result.n_clusters == 2 and result.silhouette.p_value == 1 / 40
    for key in ("labels", "spectral_labels"):
        assert adjusted_rand_score(prompts % 2, getattr(result, key)) == 1.0
    assert result.agreement == 1.0
    assert min(getattr(result.stability, method).low for method in ("hierarchical", "spectral")) == 1.0
    shared = result.shared
    assert shared["prompt"].p_value < 0.01 and shared["correctness"].p_within_prompt > 0.05
    assert [row.size for row in result.clusters] == [16, 16] and result.clusters[0].prompts == 4
    assert "2 clusters" in clustering_finding(result) and "the prompt" in clustering_finding(result)


def test_every_prompt_may_be_a_cluster_of_its_own():
    prompts = np.repeat(np.arange(12), 4)
    rows = rng(5).normal(size=(48, 80)) + 2 * rng(6).normal(size=(12, 80))[prompts]
    kernels, _ = unstructured(rng(1), prompts, gradients=rows)
    result = sequence_clusters(kernels, rotations=19, resamples=5, permutations=99)
    assert result.n_clusters == 12 and adjusted_rand_score(prompts, result.labels) == 1.0
    assert result.shared["prompt"].value == pytest.approx(1.0)


@pytest.mark.long
def test_one_cloud_is_called_clusters_at_the_nominal_rate_only():
    """Isotropic, with a strong mean, with a steep spectrum: all have directions that cosines can be cut along."""
    sets, generator, p_values = 210, rng(8), []
    steep = np.arange(1, 31) ** -1.0
    for k in range(sets):
        rows = generator.normal(size=(16, 30))
        rows = (rows, rows + 1.0, rows * steep + 0.2)[k % 3]
        p_values.append(choose_number(gram(rows), [2, 3, 4, 5], 19, generator).p_value)
    for level in (0.05, 0.2):
        count, (low, high) = (np.array(p_values) <= level).sum(), plausible_counts(sets, level)
        assert low <= count <= high, f"{count} of {sets} below {level}, expected {low} to {high}"


@pytest.mark.parametrize("cloud", ["unequal lengths", "steep spectrum"])
def test_one_cloud_is_not_split_by_the_whole_analysis(cloud):
    found = 0
    for seed in range(20):
        rows = rng(seed).normal(size=(24, 40))
        rows *= np.exp(rng(seed + 100).normal(size=(24, 1))) if cloud == "unequal lengths" else np.arange(1, 41) ** -1.0
        kernels, _ = unstructured(rng(1), np.repeat(np.arange(6), 4), gradients=rows)
        kernels = replace(kernels, train_fisher=gram(rows))
        found += sequence_clusters(kernels, k_max=5, rotations=19, resamples=2, permutations=9).n_clusters > 1
    assert found <= 4, f"{found} of 20, expected about 1 at most: are cosines rotated instead of the kernel?"


def test_leaf_order_keeps_neighbours_closer_than_the_tree_as_it_comes():
    cosine, _ = cosine_kernel(gram(rng(9).normal(size=(20, 5))))
    kernels, _ = unstructured(rng(1), np.arange(20) // 2)
    result = sequence_clusters(replace(kernels, train_fisher=cosine), rotations=9)
    order = result.leaf_order
    assert sorted(order) == list(range(20)) and len(result.linkage) == 19
    plain = leaves_list(linkage(squareform(1 - cosine, checks=False), "average"))
    distance = 1 - cosine
    assert distance[order[:-1], order[1:]].sum() < distance[plain[:-1], plain[1:]].sum()


def test_opposed_and_unrelated_gradients_are_told_apart_by_the_spectral_clusters():
    rows = np.repeat([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0]], 5, axis=0) + 0.05 * rng().normal(size=(15, 3))
    found = spectral_clusters(cosine_kernel(gram(rows))[0], 3)
    assert adjusted_rand_score(np.repeat([0, 1, 2], 5), found) == 1.0


# ---- what clusters share


def test_measures_of_association_have_brute_forces():
    clusters, values = rng().integers(0, 3, 40), rng(1).integers(0, 5, 40)
    assert mutual_information(clusters, values) == pytest.approx(mutual_info_score(clusters, values))
    within = sum(np.square(values[clusters == c] - values[clusters == c].mean()).sum() for c in range(3))
    assert variance_between(clusters, values) == pytest.approx(1 - within / np.square(values - values.mean()).sum())
    assert first_word("  12 apples") == "12" and first_word("\n ") == ""


def test_what_only_the_prompt_explains_is_not_called_shared_beyond_it():
    """Clusters are prompts; length differs between prompts, the first word between the halves of each cluster."""
    prompts, clusters = np.repeat(np.arange(6), 6), np.repeat(np.arange(6), 6)
    lengths = np.array([3, 9, 4, 12, 20, 7])[prompts] + rng(3).integers(0, 2, 36)
    training = labels(prompts, lengths=lengths, completions=["yes it", "no it"] * 18)
    shared = shared_by_clusters(clusters, np.arange(36), training, np.zeros(36, int), 199, rng())
    assert shared["prompt"].value == pytest.approx(1.0) and shared["prompt"].p_value == 1 / 200
    assert shared["length"].p_value == 1 / 200 and shared["length"].p_within_prompt == 1.0
    assert shared["first_word"].p_value > 0.05
    assert shared["correctness"].p_value is None and shared["correctness"].reason == "no sequence has it"


def test_what_is_shared_within_prompts_is_found_and_corrected_for_many_tests():
    prompts, clusters = np.repeat(np.arange(6), 6), np.tile([0, 0, 0, 1, 1, 1], 6)
    correct = np.where(clusters == 0, 1, -1)
    training = labels(prompts, lengths=rng(3).integers(3, 9, 36), completions=[f"w{k % 5}" for k in range(36)])
    shared = shared_by_clusters(clusters, np.arange(36), training, correct, 199, rng())
    assert shared["correctness"].p_within_prompt == 1 / 200 and shared["correctness"].value == pytest.approx(1.0)
    deciding = [
        shared["prompt"].p_value,
        *(shared[n].p_within_prompt for n in ("length", "correctness", "first_word")),
    ]
    assert shared["correctness"].p_holm == pytest.approx(4 * min(deciding))
    ranked = sorted(deciding)
    holm = [max(min(1, (4 - m) * ranked[m]) for m in range(k + 1)) for k in range(4)]
    assert sorted(entry.p_holm for entry in shared.values()) == pytest.approx(holm)


@pytest.mark.long
def test_unrelated_labels_are_called_shared_at_the_nominal_rate_only():
    sets, generator, found = 200, rng(11), {"prompt": [], "length": [], "correctness": [], "first_word": []}
    prompts = np.repeat(np.arange(5), 4)
    for _ in range(sets):
        clusters = generator.integers(0, 3, 20)
        words = [f"w{k}" for k in generator.integers(0, 4, 20)]
        training = labels(prompts, lengths=generator.integers(2, 30, 20), completions=words)
        correct = generator.choice([-1, 1], 20)
        shared = shared_by_clusters(clusters, np.arange(20), training, correct, 39, generator)
        for name, entry in shared.items():
            found[name] += [entry.p_value, entry.p_within_prompt]
    for name, values in found.items():
        for kind, p_values in (("all", values[::2]), ("within", values[1::2])):
            if p_values[0] is not None:
                count, high = (np.array(p_values) <= 0.05).sum(), plausible_counts(sets, 0.05)[1]
                assert count <= high, f"{name}, permuted {kind}: {count} of {sets}, expected at most {high}"
    assert (np.array(found["length"][::2]) <= 0.2).sum() >= plausible_counts(sets, 0.2)[0], "p-values are too large"


def test_the_largest_number_tried_and_two_methods_that_disagree_are_said():
    prompts = np.repeat(np.arange(12), 4)
    rows = rng(5).normal(size=(48, 80)) + 2 * rng(6).normal(size=(12, 80))[prompts]
    kernels, _ = unstructured(rng(1), prompts, gradients=rows)
    at_most = sequence_clusters(kernels, k_max=6, rotations=19, resamples=2, permutations=9)
    assert at_most.n_clusters == 6 and "6 is the largest number that was tried" in clustering_finding(at_most)
    free = sequence_clusters(kernels, rotations=19, resamples=2, permutations=9)
    assert "largest number" not in clustering_finding(free) and "otherwise" not in clustering_finding(free)
    disagreeing = clustering_finding(free.model_copy(update={"agreement": 0.2}))
    assert disagreeing.endswith("groups them otherwise (adjusted Rand index 0.2).")


# ---- degenerate input

FOUR = np.repeat(np.arange(4), 3)


@pytest.mark.parametrize(
    ("prompts", "rewards", "rows", "reason"),
    [
        (np.zeros(12, int), [1.0, 0, 0] * 4, None, "one cloud"),
        (np.arange(12), [1.0] * 12, None, "one cloud"),
        (FOUR, [1.0] * 12, np.ones((12, 5)), "one cloud"),
        (FOUR, None, np.zeros((12, 5)), "at least 4 sequences"),
        ([0, 1, 2], None, None, "at least 4 sequences"),
        ([0], None, None, "at least 4 sequences"),
    ],
    ids=["one prompt", "one completion each", "identical rows", "zero rows", "three sequences", "one sequence"],
)
def test_degenerate_input_gives_one_cluster_and_says_why(prompts, rewards, rows, reason):
    kernels, _ = unstructured(rng(2), np.asarray(prompts), rewards=rewards, gradients=rows)
    result = finite(sequence_clusters(kernels, rotations=19, resamples=5))
    assert result.n_clusters == (0 if rows is not None and not rows.any() else 1)
    assert reason in result.reason and result.shared is None and result.stability is None
    assert clustering_finding(result).endswith(".") and "None" not in clustering_finding(result)
    assert png_bytes(plot_sequence_clusters(result, kernels.train_fisher)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("prompts", "rewards", "completions", "missing"),
    [
        (np.zeros(16, int), [1.0, 0] * 8, ["a"] * 16, {"prompt", "first_word", "length"}),
        (np.arange(16), [1.0, 0] * 8, [str(k) for k in range(16)], {"prompt", "correctness", "first_word", "length"}),
        (np.repeat(np.arange(8), 2), [1.0] * 16, [""] * 16, {"correctness", "first_word", "length"}),
    ],
    ids=["one prompt", "one completion each", "equal rewards"],
)
def test_clusters_of_degenerate_labels_state_what_cannot_be_asked(prompts, rewards, completions, missing):
    rows = 0.1 * rng().normal(size=(16, 30))
    rows[np.arange(16), np.arange(16) % 2] += 1
    kernels, _ = unstructured(rng(1), prompts, rewards=rewards, gradients=rows, completions=completions)
    result = finite(sequence_clusters(kernels, rotations=19, resamples=5, permutations=19))
    assert result.n_clusters == 2
    assert {name for name, entry in result.shared.items() if entry.value is None} == missing
    assert all(result.shared[name].reason for name in missing)


def test_a_sequence_without_gradient_is_in_no_cluster():
    prompts, rows = two_families(rng(0), n_prompts=4)
    rows[5] = 0
    kernels, _ = unstructured(rng(1), prompts, gradients=rows)
    result = finite(sequence_clusters(kernels, rotations=19, resamples=5, permutations=19))
    assert result.without_gradient == (5,) and result.labels[5] is None and 5 not in result.leaf_order
    assert adjusted_rand_score(np.delete(prompts % 2, 5), [label for label in result.labels if label]) == 1.0
    assert "left out: 1 sequence" in caption_of(plot_sequence_clusters(result, kernels.train_fisher))


def test_the_same_seed_gives_the_same_result():
    prompts, rows = two_families(rng(0), n_prompts=4)
    kernels, _ = unstructured(rng(1), prompts, gradients=rows)
    first, second = (sequence_clusters(kernels, rotations=9, resamples=3, permutations=9) for _ in range(2))
    assert first == second


# ---- figure


def test_figure_shows_the_kernel_in_leaf_order_with_a_frame_for_each_cluster():
    prompts, rows = two_families(rng(0))
    kernels, _ = unstructured(rng(1), prompts, gradients=rows)
    result = finite(sequence_clusters(kernels, rotations=19, resamples=3, permutations=9))
    figure = plot_sequence_clusters(result, kernels.train_fisher)
    heat = next(axes for axes in figure.axes if axes.images and axes.patches)
    order, cosine = result.leaf_order, cosine_kernel(kernels.train_fisher)[0]
    np.testing.assert_allclose(heat.images[0].get_array(), cosine[np.ix_(order, order)], atol=1e-12)
    frames = [(patch.get_x() + 0.5, patch.get_width()) for patch in heat.patches]
    assert frames == [(0, 16), (16, 16)]
    brackets = figure.axes[0].collections[0].get_paths()
    assert sorted(path.vertices[1, 1] for path in brackets) == pytest.approx([row[2] for row in result.linkage])
    with pytest.raises(ValueError, match="32 sequences were clustered"):
        plot_sequence_clusters(result, np.eye(3))
    assert "2 clusters" in caption_of(plot_sequence_clusters(result)), "the heat map alone needs the kernel"

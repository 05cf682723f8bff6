"""Copies of one sequence are one unit: what they would make of chance is not found, and every other pair still is."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from entropy_experiments.analyses.cluster_contents import (
    mutual_information,
    shared_by_clusters,
    variance_between,
)
from entropy_experiments.analyses.clustering import choose_number, sequence_clusters, silhouettes_along_tree
from entropy_experiments.analyses.distinct_sequences import distinct_sequences
from entropy_experiments.analyses.kernel_geometry import cosine_kernel, spectrum
from entropy_experiments.analyses.prompt_structure import correctness, prompt_structure
from entropy_experiments.records.record import json_of
from entropy_experiments.report.kernel_findings import clustering_finding, structure_finding
from tests.entropy_experiments.analyses.planted_kernels import labels, unstructured
from tests.entropy_experiments.analyses.test_clustering import finite, gram, plausible_counts, rng

# ---- prompt structure


def duplicated(generator, prompts, texts, rewards=None, dimension=30, mean=0.3):
    """Gaussian gradients, one for every (prompt, text): equal texts of a prompt have equal rows."""
    known = {}
    rows = np.array(
        [
            known.setdefault((p, t), generator.normal(size=dimension) * generator.uniform(0.5, 2) + mean)
            for p, t in zip(prompts, texts, strict=True)
        ]
    )
    return unstructured(generator, prompts, rewards=rewards, gradients=rows, completions=texts)[0]


def half_duplicated(generator, prompts):
    """Half of every prompt's sequences are copies of another; how often one is copied differs from prompt to prompt."""
    texts = []
    for prompt in np.unique(prompts):
        size = int((prompts == prompt).sum())
        own = [f"{prompt}-{k}" for k in range(size // 2)] * 2
        if prompt % 3 == 0:  # one text many times, the others once
            own = [f"{prompt}-0"] * (size // 2 + 1) + [f"{prompt}-{k}" for k in range(1, size // 2)]
        texts += [own[k] for k in generator.permutation(size)]
    return texts


def test_pairs_of_equal_sequences_are_in_no_block_and_every_other_pair_is():
    prompts, texts = np.repeat([4, 9], [5, 4]), ["a", "b", "a", "c", "a", "x", "x", "y", "a"]
    kernels = duplicated(rng(3), prompts, texts, rewards=[1, 0, 1, 0, 1, 1, 1, 0, 0])
    result = prompt_structure(kernels, permutations=9)
    assert json_of(result.duplicates) == {"sequences": 9, "distinct": 6, "equal_pairs": 4}
    kernel, signs = kernels.train_fisher, correctness(kernels.training.reward, prompts)
    pairs = [(i, j) for i in range(9) for j in range(i)]
    same = [kernel[i, j] for i, j in pairs if prompts[i] == prompts[j] and texts[i] != texts[j]]
    cross = [kernel[i, j] for i, j in pairs if prompts[i] != prompts[j]]
    raw = result.train.raw
    assert (raw.same_prompt.pairs, raw.cross_prompt.pairs) == (len(same), len(cross)) == (12, 20)
    assert raw.same_prompt.mean == pytest.approx(np.mean(same)), "copies of a sequence are paired with each other"
    assert raw.test.difference == pytest.approx(np.mean(same) - np.mean(cross))
    groups = result.within_group.raw
    chosen = [(i, j) for i, j in pairs if prompts[i] == prompts[j] and texts[i] != texts[j]]
    mixed = [kernel[i, j] for i, j in chosen if signs[i] != signs[j]]
    assert groups.correct_wrong.mean == pytest.approx(np.mean(mixed))
    assert groups.correct_correct.pairs == 0 and groups.wrong_wrong.pairs == 2
    design = np.array([[signs[i] == signs[j], prompts[i] == 4, prompts[i] == 9] for i, j in chosen], dtype=float)
    fit = np.linalg.lstsq(design, np.array([kernel[i, j] for i, j in chosen]), rcond=None)[0]
    assert groups.test.difference == pytest.approx(fit[0])
    assert "9 sequences, 6 of them distinct" in structure_finding(result)


def test_sequences_are_equal_only_with_equal_prompt_text_length_and_gradient():
    kernels, vectors = unstructured(rng(), np.arange(6), completions=["a"] * 6)
    rows = vectors.gradients.copy()
    rows[1:5] = rows[0]
    training = replace(kernels.training, prompt=["p", "p", "q", "p", "p", "p"], length=np.array([5, 5, 5, 4, 5, 5.0]))
    found = distinct_sequences(training, rows @ rows.T)
    assert found.of.tolist() == [0, 0, 1, 2, 0, 3], (
        "another prompt, another length and another gradient are other sequences"
    )
    assert found.prompts.tolist() == [0, 0, 2, 0, 0, 0] and found.copies.tolist() == [3, 1, 1, 1]
    part = found.among(np.array([2, 4, 1]))
    assert part.first.tolist() == [0, 1] and part.of.tolist() == [0, 1, 1]


@pytest.mark.long
def test_copies_do_not_make_structure():
    """The null hypotheses with half of the sequences duplicated: all five tests reject at their level, where the tests over
    single sequences reject nearly always."""
    sets, generator = 400, rng(17)
    prompts = np.repeat(np.arange(6), 6)
    found = {"train raw": [], "train cosine": [], "groups raw": [], "groups cosine": [], "buffers": []}
    for k in range(sets):
        texts = half_duplicated(generator, prompts)
        by_text = {t: float(generator.random() < 0.5) for t in sorted(set(texts))}
        kernels = duplicated(generator, prompts, texts, rewards=[by_text[t] for t in texts])
        # Of two evaluation sequences a prompt, one is a training sequence too.
        own = [text for p in range(6) for text in (f"fresh {p}", texts[6 * p])]
        drawn = generator.normal(size=(6, 1)) * 0.5 + generator.normal(size=(6, 36))
        fisher = np.stack([drawn, kernels.train_fisher[::6]], 1).reshape(12, 36)
        kernels = replace(
            kernels, evaluation=replace(labels(np.repeat(np.arange(6), 2)), completion=own), fisher=fisher
        )
        result = prompt_structure(kernels, permutations=119, seed=k)
        for name, section in (("train", "train"), ("groups", "within_group")):
            for kind in ("raw", "cosine"):
                found[f"{name} {kind}"].append(getattr(getattr(result, section), kind).test.p_value)
        assert result.evaluation.raw.equal_to_training == 6
        found["buffers"].append(result.evaluation.raw.test.p_value)
    for name, p_values in found.items():
        known = np.array([p for p in p_values if p is not None])
        assert len(known) > 0.9 * sets, name
        for level in (0.05, 0.2):
            count, (low, high) = (known <= level).sum(), plausible_counts(len(known), level)
            assert low <= count <= high, f"{name}: {count} of {len(known)} below {level}, expected {low} to {high}"


def test_nothing_is_claimed_where_directions_and_raw_kernel_differ_in_sign():
    """Four short gradients of a prompt point the same way, one of ten times their length the other way."""
    prompts, rows = np.repeat(np.arange(8), 5), np.zeros((40, 40))
    rows[np.arange(40), prompts] = np.tile([1.0, 1, 1, 1, -10], 8)
    rows += 0.02 * rng(1).normal(size=rows.shape)
    kernels, _ = unstructured(rng(2), prompts, gradients=rows)
    result = finite(prompt_structure(kernels, permutations=199))
    cosine, raw = (getattr(result.train, kind).test for kind in ("cosine", "raw"))
    assert cosine.p_value <= 0.05 and cosine.difference > 0 > raw.difference
    assert result.train.signs_agree is False
    assert "cannot be said: directions and raw K₁ differ in sign" in structure_finding(result)
    assert "move each other more than" not in structure_finding(result)


# ---- clusters


def with_copies(rows, generator, extra):
    """Rows, texts and prompts (4 distinct sequences each) of `rows` and `extra` copies of some of them, in random order."""
    of = np.concatenate([np.arange(len(rows)), generator.integers(0, len(rows), extra)])[
        generator.permutation(len(rows) + extra)
    ]
    return rows[of], [f"text {k}" for k in of], of // 4, of


@pytest.mark.long
def test_copies_of_one_cloud_are_called_clusters_at_the_nominal_rate_only():
    """16 distinct sequences and 16 copies: counted as 32 sequences, they are called clusters nearly always."""
    sets, generator, p_values, as_single = 200, rng(21), [], []
    for k in range(sets):
        rows, _, _, of = with_copies(generator.normal(size=(16, 30)) + 0.5 * (k % 2), generator, 16)
        once = np.unique(of, return_index=True)[1]
        p_values.append(choose_number(gram(rows[once]), [2, 3, 4, 5], 19, generator, of).p_value)
        if k < 20:
            as_single.append(choose_number(gram(rows), [2, 3, 4, 5, 12], 19, generator).p_value)
    for level in (0.05, 0.2):
        count, (low, high) = (np.array(p_values) <= level).sum(), plausible_counts(sets, level)
        assert low <= count <= high, f"{count} of {sets} below {level}, expected {low} to {high}"
    assert np.mean(np.array(as_single) <= 0.05) > 0.5, "the copies of this test would not have misled anybody"


def test_silhouettes_with_copies_leave_a_sequence_and_its_copies_out_of_their_own_cluster():
    generator = rng(5)
    rows, *_, of = with_copies(generator.normal(size=(10, 5)), generator, 8)
    cosine, _ = cosine_kernel(gram(rows))
    distance, ks = 1 - np.where(of[:, None] == of[None, :], 1.0, cosine), [2, 3, 4]
    tree = linkage(squareform(distance, checks=False), "average")
    for k, found in zip(ks, silhouettes_along_tree(1 - distance, ks, of), strict=True):
        clusters, values = fcluster(tree, k, "maxclust"), []
        for i in range(18):
            others = [j for j in range(18) if clusters[j] == clusters[i] and of[j] != of[i]]
            means = [distance[i, clusters == c].mean() for c in np.unique(clusters) if c != clusters[i]]
            a, b = (np.mean(distance[i, others]), min(means)) if others else (0.0, 0.0)
            values.append((b - a) / max(a, b) if others else 0.0)
        assert found == pytest.approx(np.mean(values))


def test_the_whole_analysis_counts_copies_once():
    generator = rng(9)
    rows, texts, prompts, of = with_copies(generator.normal(size=(24, 60)), generator, 24)
    kernels, _ = unstructured(rng(1), prompts, gradients=rows, completions=texts, rewards=(of % 3 == 0).astype(float))
    result = finite(sequence_clusters(kernels, rotations=39, resamples=2, permutations=9))
    assert result.duplicates.distinct == 24 and result.duplicates.sequences == 48
    assert result.n_clusters == 1 and "48 sequences, 24 of them distinct" in clustering_finding(result)
    assert len(result.leaf_order) == 48, "the picture shows every sequence"
    alone = sequence_clusters(
        replace(kernels, training=replace(kernels.training, completion=[str(i) for i in range(48)])),
        rotations=39, resamples=2, permutations=9,
    )  # fmt: skip
    assert alone.n_clusters > 1, "counted singly, the copies are clusters: this test shows nothing otherwise"
    # The spectrum of all sequences is that of the distinct ones weighted by their copies.
    cosine, _ = cosine_kernel(kernels.train_fisher)
    once, weights = np.unique(of, return_index=True)[1], np.sqrt(np.bincount(of))
    weighted = spectrum(cosine[np.ix_(once, once)] * np.outer(weights, weights))
    assert result.spectrum["cosine"].effective_rank == pytest.approx(weighted.effective_rank, rel=1e-6)
    assert result.spectrum["distinct"].effective_rank > result.spectrum["cosine"].effective_rank


def test_what_copies_share_is_found_at_the_nominal_rate_only():
    """Labels of distinct sequences that depend on nothing, each with its copies."""
    sets, generator, p_values, singly = 300, rng(12), [], []
    for _ in range(sets):
        clusters, lengths = generator.integers(0, 3, 20), generator.integers(2, 30, 20)
        copies = generator.integers(1, 5, 20)
        every = np.repeat(np.arange(20), copies)
        for rows, weights, found in ((np.arange(20), copies, p_values), (every, None, singly)):
            training = labels(np.arange(len(rows)), lengths=lengths[rows])
            shared = shared_by_clusters(
                clusters[rows], np.arange(len(rows)), training, np.zeros(len(rows), int), 39, generator, weights
            )
            found.append(shared["length"].p_value)
    for level in (0.05, 0.2):
        count, (low, high) = (np.array(p_values) <= level).sum(), plausible_counts(sets, level)
        assert low <= count <= high, f"{count} of {sets} below {level}, expected {low} to {high}"
    assert (np.array(singly) <= 0.05).sum() > plausible_counts(sets, 0.05)[1], (
        "copies must mislead the test without weights"
    )


def test_weights_are_copies_in_both_measures_of_association():
    clusters, values, copies = rng().integers(0, 3, 20), rng(1).integers(0, 5, 20), rng(2).integers(1, 4, 20)
    of = np.repeat(np.arange(20), copies)
    assert mutual_information(clusters, values, copies) == pytest.approx(mutual_information(clusters[of], values[of]))
    assert variance_between(clusters, values, copies) == pytest.approx(variance_between(clusters[of], values[of]))

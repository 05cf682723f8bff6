"""Checks of p-values and of errors that are not made from sums over prompts: each function returns name -> {shape: rate}.

Gradients are drawn from laws under which the null hypothesis holds exactly, copies included where half of the sequences are
duplicates; every p-value is the product's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from entropy_experiments.analyses.arrays import KernelArrays, SequenceLabels
from entropy_experiments.analyses.buffers import compare_buffers
from entropy_experiments.analyses.cluster_contents import shared_by_clusters
from entropy_experiments.analyses.clustering import choose_number
from entropy_experiments.analyses.intervention import linear_datamodelling_score
from entropy_experiments.analyses.prompt_structure import prompt_structure, u_statistic_of_products
from entropy_experiments.records.record import json_of
from entropy_experiments.statistics.correlation import correlation
from entropy_experiments.statistics.jackknife_interval import jackknife_interval
from entropy_experiments.sweep.evolution.kernel_alignment import align_kernels
from rl_training.algs.buffer_reward import NAME, reward_of_all_prompts
from rl_training.intervals import interval
from rl_training.tasks.difficulty import PassRates

Rates = dict[str, dict[str, float]]

BUFFERS = {
    "8 prompts x 4": (8, 4, 1),
    "16 prompts x 2": (16, 2, 1),
    "8 prompts x 4, half duplicates": (8, 2, 2),
    "16 prompts x 4, half duplicates": (16, 2, 2),
    "4 prompts x 8": (4, 8, 1),
    "6 prompts x 8, half duplicates": (6, 4, 2),
}
"""Name -> prompts, distinct completions of each, copies of each completion."""

LEVEL = 0.05
PERMUTATIONS = 199


def _rows(rng: np.random.Generator, count: int) -> np.ndarray:
    """(n, 6) gradients with a common direction, unequal axes and heavy tails, exchangeable among sequences."""
    scales = np.array([3.0, 2.0, 1.0, 1.0, 0.5, 0.5])
    return np.array([2.0, 0, 0, 0, 0, 0]) + scales * rng.standard_t(5, size=(count, 6))


def _labels(rng: np.random.Generator, prompts: np.ndarray, copies: int, tag: str) -> SequenceLabels:
    """Sequences of these prompts, `copies` of each in a row, with rewards that know nothing of the gradients."""
    distinct = len(prompts)
    reward = (rng.random(distinct) < 0.5).astype(float)
    of = np.repeat(np.arange(distinct), copies)
    length = rng.integers(3, 30, distinct)[of]
    return SequenceLabels(
        prompts[of], reward[of], length, rng.gamma(2.0, length), -rng.gamma(2.0, length),
        [f"prompt {p}" for p in prompts[of]], [f"{tag} {n}" for n in of],
    )  # fmt: skip


def _kernels(rng: np.random.Generator, prompts: int, each: int, copies: int) -> KernelArrays:
    own = np.repeat(np.arange(prompts), each)
    sides = {}
    for tag in ("evaluation", "training"):
        labels = _labels(rng, own, copies, tag)
        sides[tag] = labels, _rows(rng, len(own)).repeat(copies, 0)
    (evaluation, left), (training, right) = sides["evaluation"], sides["training"]
    n = len(training)
    ones = np.ones(n)
    return KernelArrays(
        evaluation=evaluation,
        training=training,
        fisher=left @ right.T,
        entropy_fisher=left @ right.T,
        train_fisher=right @ right.T,
        train_entropy_fisher=right @ right.T,
        weights=ones / n,
        advantages=ones,
        shares=ones,
        products=ones,
        step_factor=1.0,
    )


def _rate(rejected: list[bool | None]) -> float:
    known = [r for r in rejected if r is not None]
    return float(np.mean(known)) if known else math.nan


def structure_tests(repeats: int) -> Rates:
    """Same prompt against other prompts, alike correctness against unlike, both buffers: permutation tests."""
    found: Rates = {}
    paths = {
        "same prompt, raw": ("train", "raw"),
        "same prompt, cosine": ("train", "cosine"),
        "same prompt, evaluation and training": ("evaluation", "raw"),
        "correctness, raw": ("within_group", "raw"),
        "correctness, cosine": ("within_group", "cosine"),
    }
    for name, (prompts, each, copies) in BUFFERS.items():
        rng = np.random.default_rng((1, prompts, each, copies))
        rejected: dict[str, list[bool | None]] = {label: [] for label in paths}
        for _ in range(repeats):
            kernels = _kernels(rng, prompts, each, copies)
            result = json_of(prompt_structure(kernels, permutations=PERMUTATIONS, seed=int(rng.integers(2**31))))
            for label, (section, kind) in paths.items():
                p = result[section][kind]["test"]["p_value"]
                rejected[label].append(None if p is None else p <= LEVEL)
        for label, hits in rejected.items():
            found.setdefault(f"level of {label}", {})[name] = _rate(hits)
    return found


def cluster_tests(repeats: int) -> Rates:
    """One cloud taken for several clusters, and clusters said to share what they do not."""
    found: Rates = {}
    for name, (prompts, each, copies) in BUFFERS.items():
        rng = np.random.default_rng((2, prompts, each, copies))
        clouds, shared = [], []
        own = np.repeat(np.arange(prompts), each)
        of = np.repeat(np.arange(len(own)), copies)
        for _ in range(repeats):
            rows = rng.normal(size=(len(own), 6)) * np.array([3.0, 2.0, 1.0, 1.0, 0.5, 0.5])
            choice = choose_number(rows @ rows.T, list(range(2, 9)), 59, rng, of)
            clouds.append(choice.p_value <= LEVEL)
            labels = _labels(rng, own, 1, "training")
            entry = shared_by_clusters(
                rng.integers(0, 3, len(own)), np.arange(len(own)), labels, np.where(labels.reward > 0.5, 1, -1), 99, rng,
                np.full(len(own), copies),
            )["length"]  # fmt: skip
            p = entry.p_value if entry.p_within_prompt is None else entry.p_within_prompt
            shared.append(None if p is None else p <= LEVEL)
        found.setdefault("level of clusters, one cloud", {})[name] = _rate(clouds)
        found.setdefault("level of what clusters share, lengths", {})[name] = _rate(shared)
    return found


def buffer_tests(repeats: int) -> Rates:
    """Do training and evaluation buffer differ: both of one law, where completions of a prompt are alike."""
    found: Rates = {}
    for name, (prompts, each, copies) in BUFFERS.items():
        rng = np.random.default_rng((3, prompts, each, copies))
        rejected, differs = [], []
        for _ in range(repeats):
            sides = []
            for start in (0, prompts):
                own = np.repeat(np.arange(start, start + prompts), each)
                labels = _labels(rng, own, copies, "a")
                alike = np.repeat(rng.normal(size=prompts), each * copies)
                values = np.exp(alike + rng.normal(size=len(own)).repeat(copies))
                sides.append(
                    SequenceLabels(
                        labels.prompt_index,
                        labels.reward,
                        labels.length,
                        values * labels.length,
                        labels.score,
                        labels.prompt,
                        labels.completion,
                    )  # fmt: skip
                )
            result = json_of(compare_buffers(*sides))["quantities"]
            p = result["entropy"]["p_value"]
            rejected.append(None if p is None else p <= LEVEL)
            differs.append(any(q["differs"] for q in result.values()))
        found.setdefault("level of buffers, entropy", {})[name] = _rate(rejected)
        found.setdefault("level of buffers, any of the quantities (Holm)", {})[name] = _rate(differs)
    return found


def alignment_tests(repeats: int) -> Rates:
    """Kernels of two checkpoints that have nothing to do with each other."""
    found: Rates = {"level of kernel alignment": {}}
    for prompts in (6, 8, 12, 16, 32):
        rng = np.random.default_rng((4, prompts))
        hits = []
        for _ in range(repeats):
            rows = [_rows(rng, prompts) for _ in range(2)]
            kernels = (r @ r.T for r in rows)
            p = align_kernels(*kernels, permutations=PERMUTATIONS, seed=int(rng.integers(2**31))).p_value
            hits.append(None if p is None else p <= LEVEL)
        found["level of kernel alignment"][f"{prompts} prompts"] = _rate(hits)
    return found


def correlation_intervals(repeats: int) -> Rates:
    """Fisher's intervals of pairs, normal and heavy-tailed, and the bootstrap interval of the score over half-subsets."""
    found: Rates = {}
    for pairs in (6, 12, 30, 100):
        rng = np.random.default_rng((5, pairs))
        held: dict[str, list[bool]] = {}
        for _ in range(4 * repeats):
            laws = {"normal": rng.normal(size=(2, pairs)), "of t with 5 degrees": rng.standard_t(5, size=(2, pairs))}
            for law, z in laws.items():
                r = correlation(z[0], 0.6 * z[0] + 0.8 * z[1])
                assert r is not None
                held.setdefault(f"coverage of a correlation, {law} pairs", []).append(r.low <= 0.6 <= r.high)
        for label, hits in held.items():
            found.setdefault(label, {})[f"{pairs} pairs"] = float(np.mean(hits))
    members = 20
    for subsets in (20, 40, 80):
        rng = np.random.default_rng((6, subsets))
        hits = []
        for _ in range(repeats):
            halves = np.array([rng.permutation(members) < members // 2 for _ in range(subsets)])
            shares = rng.normal(size=members)
            predicted = halves @ shares
            noise = (
                rng.normal(size=subsets) * 0.5 * math.sqrt(members / 4) * shares.std(ddof=1)
            )  # half of its spread over halves
            score = linear_datamodelling_score(halves, shares, predicted + noise, seed=int(rng.integers(2**31)))
            truth = 6 / math.pi * math.asin(1 / math.sqrt(1.25) / 2)  # Spearman's of a normal pair
            hits.append(score.interval[0] <= truth <= score.interval[1])
        found.setdefault("coverage of the score over halves (LDS)", {})[f"{subsets} subsets"] = float(np.mean(hits))
    return found


def other_errors(repeats: int) -> Rates:
    """The U-statistic of a single batch, and the mean reward of all prompts from prompts drawn by difficulty."""
    found: Rates = {}
    for prompts in (4, 8, 16, 64):
        rng = np.random.default_rng((7, prompts))
        values, series = [], []
        for _ in range(2 * repeats):
            x = rng.normal(size=(prompts, 4)) + 0.5
            y = 0.5 * x + rng.normal(size=(prompts, 4)) + 0.2
            products = x @ y.T
            values.append(u_statistic_of_products(products))
            rest = [np.delete(np.delete(products, p, 0), p, 1) for p in range(prompts)]
            series.append([u_statistic_of_products(r) for r in rest])
        truth = 4 * 0.5 * (0.25 + 0.2)
        held = jackknife_interval(np.array(values), np.array(series)).holds(truth)
        found.setdefault("coverage of the U-statistic of a single batch", {})[f"{prompts} prompts"] = float(held.mean())
    for count, of in ((8, 12), (8, 24), (16, 64)):
        rng = np.random.default_rng((8, count, of))
        rates = PassRates(of)
        for prompt in range(of):
            for _ in range(3):
                rates.update(prompt, (rng.random(8) < prompt / of).astype(float).tolist())
        truths, hits, off = np.linspace(0.0, 1.0, of), [], []
        for _ in range(2 * repeats):
            drawn, chances = rates.draw(count, rng)
            rewards = rng.binomial(8, truths[drawn]) / 8
            entry = reward_of_all_prompts(rewards.tolist(), chances)
            low, high = interval(entry[NAME], entry[f"{NAME}_se"], entry[f"{NAME}_df"])
            hits.append(low <= 0.5 <= high)
            off.append(entry[NAME])
        found.setdefault("coverage of the mean reward of all prompts", {})[f"{count} of {of} prompts"] = float(
            np.mean(hits)
        )
    return found


TESTS: tuple[Callable[[int], Rates], ...] = (
    structure_tests,
    cluster_tests,
    buffer_tests,
    alignment_tests,
    correlation_intervals,
    other_errors,
)

"""Do the training sequences' gradients fall into groups, and what do the members of a group share?

    distance   d(i, j) = 1 - cos(i, j)           cosine of two score gradients in the metric of P
    tree       average linkage of d, its leaves in the order that keeps neighbours close
    spectral   normalised Laplacian of the affinity 1 - d/2 = (1 + cos)/2, rows assigned by pivoted QR
    silhouette s(i) = (b - a) / max(a, b)        a: mean distance to the own cluster but i and its copies, b: to the nearest
                                                 other; 0 where there is nothing but copies

The affinity is an increasing function of the tree's distance, positive everywhere (the graph is connected), and, unlike a
cosine clipped at 0, tells opposed gradients from unrelated ones. The number of clusters is that of the highest mean silhouette
along the tree, k = 2 ... k_max. It counts only if one elliptical cloud with the same spectrum rarely reaches it; otherwise there
is one cluster. That null is a rotation test: Q K1 Q^T, with Q uniform among the rotations of the n sequences that keep
(1, ..., 1), leaves the mean gradient and the whole covariance as they are and dissolves groups. It is exact for Gaussian rows.
K1 is rotated, not its cosine: rows cut to unit length are no longer Gaussian, and clouds without structure were then called
clusters far too often (docs/analyses/clustering.md has the figures).

Copies of one sequence are no group: they are one unit with its number of copies as its weight, in the silhouette, the rotated
clouds (which rotate distinct sequences), the resamples and what clusters share (analyses/distinct_sequences.py). The tree and
the picture hold every sequence; average linkage weighs a sequence by its copies of itself.

Source: Langsrud, Statistics and Computing 15 (2005); Rousseeuw 1987; Damle, Minden & Ying 2019 (cluster_qr); Ben-Hur,
Elisseeff & Guyon 2002 (stability); docs/analyses/clustering.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from entropy_experiments.analyses.arrays import KernelArrays
from entropy_experiments.analyses.cluster_contents import describe_clusters, shared_by_clusters
from entropy_experiments.analyses.distinct_sequences import DistinctSequences, distinct_sequences
from entropy_experiments.analyses.kernel_geometry import checked_gram, cosine_kernel, spectrum
from entropy_experiments.analyses.prompt_structure import agreeing, correctness
from entropy_experiments.records.clustering_results import ClusteringResult, RandIndex, Silhouette, Stability
from entropy_experiments.text.numbers import plain

_FEWEST_SEQUENCES = 4
_FEWEST_IN_COMMON = 4
_TIE = 1e-9


def sequence_clusters(
    kernels: KernelArrays,
    *,
    k_max: int | None = None,
    rotations: int = 99,
    resamples: int = 40,
    permutations: int = 499,
    level: float = 0.05,
    seed: int = 0,
) -> ClusteringResult:
    """What summary.json holds; clusters are numbered from 1 along the order of the leaves. What is not known has a reason.

    Args:
        kernels: with the training sequences' own K1.
        k_max: largest number of clusters, at most half the distinct sequences; default: the number of prompts + 2, at least 8.
        rotations, level: how many clouds the best silhouette is compared with, at which level.
        resamples, permutations: pairs of them for the stability, and those of what clusters share, all by `seed`.
    Raises:
        ValueError: a train_fisher that is not finite or not symmetric.
    """
    points = _points(kernels)
    whole, rows, distinct, n = points.whole, points.rows, points.distinct, len(points.gram)
    chance = _Chance(np.random.default_rng(seed), rotations, resamples, level, seed)
    limit = max(8, len(np.unique(whole.prompts)) + 2) if k_max is None else k_max
    found = _too_few(points) if len(distinct.first) < _FEWEST_SEQUENCES else _clusters(points, limit, chance)
    correct = agreeing(correctness(kernels.training.reward, kernels.training.prompt_index), whole)
    training, once = replace(kernels.training, prompt_index=whole.prompts), distinct.first
    own = found.labels[once], rows[once], training, correct
    shared = found.count > 1 and shared_by_clusters(*own, permutations, chance.rng, distinct.copies)
    return ClusteringResult(
        n_train=n,
        duplicates=distinct.counts(),
        without_gradient=np.setdiff1d(np.arange(n), rows).tolist(),
        sequences=rows.tolist(),
        linkage=found.tree.tolist(),
        leaf_order=rows[found.leaves].tolist(),
        n_clusters=found.count,
        silhouette=found.silhouette,
        agreement=found.agreement,
        stability=found.stability,
        shared=shared or None,
        spectrum={name: spectrum(matrix) for name, matrix in points.matrices().items()},
        level=level,
        seed=seed,
        reason=found.reason,
        clusters=describe_clusters(found.labels, rows, found.cosine, training, correct, distinct.of),
        labels=_on_all(found.labels, rows, n),
        spectral_labels=_on_all(found.spectral, rows, n),
    )


@dataclass(frozen=True)
class _Points:
    """Training gradients as they are clustered.

    Attributes:
        gram: (n, n) K1 of all sequences.
        cosine: (m, m) of those with a gradient.
        rows: (m,) which these are.
        whole, distinct: Which sequences are equal, of all n and of these m.
    """

    gram: np.ndarray
    cosine: np.ndarray
    rows: np.ndarray
    whole: DistinctSequences
    distinct: DistinctSequences

    def matrices(self) -> dict[str, np.ndarray]:
        """By name: all cosines, all of K1, and the cosines of distinct sequences."""
        first = self.distinct.first
        return {"cosine": self.cosine, "fisher": self.gram, "distinct": self.cosine[np.ix_(first, first)]}


def _points(kernels: KernelArrays) -> _Points:
    gram = checked_gram(kernels.train_fisher)
    cosine, rows = cosine_kernel(gram)
    whole = distinct_sequences(kernels.training, gram)
    return _Points(gram, cosine, rows, whole, whole.among(rows))


@dataclass(frozen=True)
class _Chance:
    """What clusters are held against."""

    rng: np.random.Generator
    rotations: int
    resamples: int
    level: float
    seed: int


@dataclass(frozen=True)
class _Clusters:
    """Clusters of m sequences with a gradient.

    Attributes:
        cosine: (m, m) that they were found in.
        tree: scipy linkage, (m - 1, 4); empty where there are too few.
        leaves: (m,) in the order of the tree's leaves.
        labels, spectral: (m,) from 0 along the leaves, of the tree and of spectral clustering; all 0 where there is one cloud.
        count: How many.
        reason: Why there are no more.
    """

    cosine: np.ndarray
    tree: np.ndarray
    leaves: np.ndarray
    labels: np.ndarray
    spectral: np.ndarray
    count: int
    reason: str | None = None
    silhouette: Silhouette | None = None
    agreement: float | None = None
    stability: Stability | None = None


def _too_few(points: _Points) -> _Clusters:
    m = len(points.rows)
    other = "distinct " if len(points.distinct.first) < m else ""
    none, tree = np.zeros(m, dtype=np.int64), np.empty((0, 4))
    reason = f"clusters need at least {_FEWEST_SEQUENCES} {other}sequences with a gradient"
    return _Clusters(points.cosine, tree, np.arange(m), none, none, 1 if m else 0, reason)


def _clusters(points: _Points, limit: int, chance: _Chance) -> _Clusters:
    """limit: the largest number of clusters that is tried."""
    first, of, seed = points.distinct.first, points.distinct.of, chance.seed
    cosine = points.cosine[np.ix_(first[of], first[of])]  # copies are at a distance of exactly 0
    linked = average_linkage(cosine)
    tree = optimal_leaf_ordering(linked, squareform(1 - cosine, checks=False))
    leaves = leaves_list(tree)
    ks = list(range(2, min(limit, len(first) // 2) + 1))
    kernel = points.gram[np.ix_(points.rows[first], points.rows[first])]
    choice = choose_number(kernel, ks, chance.rotations, chance.rng, of)
    labels = spectral = np.zeros(len(cosine), dtype=np.int64)
    agreement = stability = reason = None
    count = 1
    if choice.p_value <= chance.level:
        count = choice.best_k
        labels = _numbered(cut(linked, count), leaves)
        spectral = _numbered(spectral_clusters(cosine, count, seed), leaves)
        agreement = float(adjusted_rand_score(labels[first], spectral[first]))
        stability = _stability(cosine, of, count, chance.resamples, chance.rng, seed)
    else:
        reason = f"one cloud of the same spectrum reaches the same silhouette (p = {plain(choice.p_value, 2)})"
    by_spectral = [_mean_silhouette(1 - cosine, spectral_clusters(cosine, k, seed), of) for k in ks]
    silhouette = Silhouette(**asdict(choice), spectral=by_spectral, k_max=max(ks))
    return _Clusters(cosine, tree, leaves, labels, spectral, count, reason, silhouette, agreement, stability)


def average_linkage(cosine: np.ndarray) -> np.ndarray:
    """scipy linkage (m - 1, 4) of 1 - cosine, average linkage."""
    return linkage(squareform(1 - cosine, checks=False), "average")


def cut(tree: np.ndarray, k: int) -> np.ndarray:
    """(m,) labels 0 ... k - 1 of the tree before its last k - 1 merges; among merges at one height the order is the tree's."""
    m = len(tree) + 1
    node = np.arange(m)
    for merge in range(m - k):
        node[(node == tree[merge, 0]) | (node == tree[merge, 1])] = m + merge
    return np.unique(node, return_inverse=True)[1]


def spectral_clusters(cosine: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """(m,) labels of k spectral clusters of the affinity (1 + cosine)/2; all 0 where every affinity is the same."""
    affinity = (1 + cosine) / 2
    if affinity.max() - affinity.min() <= _TIE:
        return np.zeros(len(cosine), dtype=np.int64)
    method = SpectralClustering(k, affinity="precomputed", assign_labels="cluster_qr", random_state=seed)
    return np.asarray(method.fit_predict(affinity), dtype=np.int64)


@dataclass(frozen=True)
class Choice:
    """Mean silhouettes `hierarchical` along the tree for every number k of clusters; the best of them, and how often one rotated
    cloud is as well separated (p_value: add-one, one-sided; null_mean, null_95: of the clouds' best).
    """

    k: list[int]
    hierarchical: list[float]
    best_k: int
    best: float
    p_value: float
    null_mean: float
    null_95: float
    rotations: int


def choose_number(
    kernel: np.ndarray, ks: list[int], rotations: int, rng: np.random.Generator, of: np.ndarray | None = None
) -> Choice:
    """The number of clusters of the highest silhouette, and its rotation test.

    Args:
        kernel: (m, m) symmetric, of distinct sequences, every row with a direction.
        ks: numbers of clusters to try.
        rotations: how many clouds.
        rng: where rotations are drawn from.
        of: (n,) the row of every sequence, copies included; default: each row once.

    The best silhouette is at least 0, that of one cluster.
    """
    of = np.arange(len(kernel)) if of is None else of
    along_tree = silhouettes_along_tree(cosine_kernel(kernel)[0][np.ix_(of, of)], ks, of)
    best = float(along_tree.max(initial=0.0))
    null = np.array([_rotated_best(kernel, ks, rng, of) for _ in range(rotations)])
    return Choice(
        k=ks,
        hierarchical=along_tree.tolist(),
        best_k=ks[int(along_tree.argmax())],
        best=best,
        p_value=(1 + int((null >= best - _TIE).sum())) / (1 + rotations),
        null_mean=float(null.mean()),
        null_95=float(np.quantile(null, 0.95)),
        rotations=rotations,
    )


def rotated_cloud(kernel: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Q kernel Q^T, Q Haar-distributed among rotations and reflections of the sequences that keep (1, ..., 1)."""
    m = len(kernel)
    gaussian = rng.normal(size=(m, m - 1))
    basis, triangle = np.linalg.qr(gaussian - gaussian.mean(0))
    basis = basis * np.where(np.diag(triangle) < 0, -1.0, 1.0)  # without the sign the QR factor is not uniform
    first = np.full((m, 1), m**-0.5)
    rotation = np.hstack([first, basis])
    fixed = np.hstack([first, _complement(m)])
    turned = rotation @ (fixed.T @ kernel @ fixed) @ rotation.T
    return (turned + turned.T) / 2


def silhouettes_along_tree(cosine: np.ndarray, ks: list[int], of: np.ndarray | None = None) -> np.ndarray:
    """(len(ks),) mean silhouettes of the tree's cuts into k clusters; ks within 2 ... m.

    of: (m,) equal for copies of one sequence, at most max(ks) fewer of them than there are distinct ones; default: no copies.
    """
    if not ks:
        return np.zeros(0)
    copies = np.ones(len(cosine), dtype=np.int64) if of is None else np.bincount(of)[of]
    tree, m, found = average_linkage(cosine), len(cosine), {}
    labels = cut(tree, max(ks))
    sums = (1 - cosine) @ np.eye(max(ks))[labels]  # (m, k): each row's distances to the members of each cluster
    # `cut` numbers clusters by their node in the tree: the leaves first, then merges as they happen.
    nodes = _nodes(tree, max(ks))
    for k in range(max(ks), min(ks) - 1, -1):
        found[k] = _silhouette(sums, labels, copies)
        into, gone = (nodes.index(int(node)) for node in tree[m - k, :2])
        sums[:, into] += sums[:, gone]
        sums = np.delete(sums, gone, axis=1)
        labels = np.where(labels == gone, into, labels)
        labels = labels - (labels > gone)
        nodes[into] = 2 * m - k
        del nodes[gone]
    return np.array([found[k] for k in ks])


def _nodes(tree: np.ndarray, k: int) -> list[int]:
    """The k nodes of the tree that are its clusters before the last k - 1 merges, ascending."""
    m = len(tree) + 1
    made = np.arange(2 * m - k)
    return np.setdiff1d(made, tree[: m - k, :2].astype(np.int64)).tolist()


def _complement(m: int) -> np.ndarray:
    """Orthonormal (m, m - 1) basis of what is orthogonal to (1, ..., 1): Helmert's."""
    k = np.arange(1, m)
    basis = np.where(np.arange(m)[:, None] < k, 1.0, 0.0)
    basis[k, k - 1] = -k
    return basis / np.sqrt(k * (k + 1.0))


def _rotated_best(kernel: np.ndarray, ks: list[int], rng: np.random.Generator, of: np.ndarray) -> float:
    turned, kept = cosine_kernel(rotated_cloud(kernel, rng))
    place = np.full(len(kernel), -1)
    place[kept] = np.arange(len(kept))
    of = place[of][place[of] >= 0]
    usable = [k for k in ks if k < len(turned)]
    return float(silhouettes_along_tree(turned[np.ix_(of, of)], usable, of).max(initial=0.0))


def _mean_silhouette(distance: np.ndarray, labels: np.ndarray, of: np.ndarray) -> float:
    return _silhouette(distance @ np.eye(labels.max() + 1)[labels], labels, np.bincount(of)[of])


def _silhouette(sums: np.ndarray, labels: np.ndarray, copies: np.ndarray) -> float:
    """Mean silhouette from sums (m, clusters) of each row's distances to the members of each cluster; 0 for one cluster.

    copies: (m,) how often each row's sequence is there, itself included; copies share their cluster.
    """
    sizes = np.bincount(labels, minlength=sums.shape[1])
    if len(sizes) < 2:
        return 0.0
    rows = np.arange(len(labels))
    own = sums[rows, labels] / np.maximum(sizes[labels] - copies, 1)
    others = sums / sizes
    others[rows, labels] = np.inf
    nearest = others.min(1)
    larger = np.maximum(own, nearest)
    separated = (sizes[labels] > copies) & (larger > _TIE)
    return float(np.where(separated, (nearest - own) / np.where(separated, larger, 1.0), 0.0).mean())


def _stability(
    cosine: np.ndarray, of: np.ndarray, k: int, resamples: int, rng: np.random.Generator, seed: int
) -> Stability:
    """Adjusted Rand index between clusterings of two bootstrap samples of the distinct sequences (each once, with all of its
    copies), on the distinct sequences in both.
    """
    m = int(of.max()) + 1
    methods: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "hierarchical": lambda part: cut(average_linkage(part), k),
        "spectral": lambda part: spectral_clusters(part, k, seed),
    }
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(resamples):
        samples = [np.unique(rng.integers(0, m, m)) for _ in range(2)]
        _, left, right = np.intersect1d(*samples, return_indices=True)
        if len(left) < _FEWEST_IN_COMMON or min(map(len, samples)) <= k:
            continue
        members = [np.flatnonzero(np.isin(of, sample)) for sample in samples]
        once = [np.unique(of[rows], return_index=True)[1] for rows in members]
        for name, method in methods.items():
            labels = [method(cosine[np.ix_(rows, rows)])[place] for rows, place in zip(members, once, strict=True)]
            found[name].append(float(adjusted_rand_score(labels[0][left], labels[1][right])))

    def index(values: list[float]) -> RandIndex:
        median, low, high = np.quantile(values, (0.5, 0.05, 0.95)).tolist() if values else (None, None, None)
        return RandIndex(median=median, low=low, high=high)

    return Stability(pairs=len(found["spectral"]), **{name: index(values) for name, values in found.items()})


def _numbered(labels: np.ndarray, leaves: np.ndarray) -> np.ndarray:
    """The same clusters, numbered from 0 as they appear along the leaf order."""
    _, first = np.unique(labels[leaves], return_index=True)
    return np.argsort(np.argsort(first))[np.unique(labels, return_inverse=True)[1]]


def _on_all(clusters: np.ndarray, rows: np.ndarray, n: int) -> list[int | None]:
    labels: list[int | None] = [None] * n
    for row, cluster in zip(rows.tolist(), clusters.tolist(), strict=True):
        labels[row] = cluster + 1
    return labels

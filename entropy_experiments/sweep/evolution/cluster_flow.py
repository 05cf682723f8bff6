"""Where do the clusters of training gradients go from one checkpoint to the next?

    flow(c, c') = (1/|Q|) sum_{p in Q} f_p(c) f'_p(c'),       f_p(c) = share of prompt p's sequences in cluster c

Training sequences are drawn anew at every checkpoint, so that no sequence can be followed. Prompts can, as far as both buffers
hold them (Q): flow is the chance that a sequence of a common prompt lies in cluster c now and another one of the same prompt in
c' then. Where Q is empty there is no flow. What can always be compared is what clusters *do*:

    likeness(c, c') = correlation over the evaluation prompts of the mean columns of c and c' in K1

which asks whether two clusters move the same evaluation prompts, whichever prompts they come from.
Numbers of clusters are each checkpoint's own. docs/analyses/evolution.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from entropy_experiments.records.evolution import ClusterFlow

Clusters = Sequence[int | None]
"""(n,) cluster of each training sequence, None without one."""


def cluster_flow(left: Clusters, left_prompts: np.ndarray, right: Clusters, right_prompts: np.ndarray) -> ClusterFlow:
    """The flow from the clusters of one checkpoint to those of the next.

    Args:
        left: Clusters at the earlier checkpoint.
        left_prompts: (n,) prompts of its training sequences.
        right: Clusters at the later one.
        right_prompts: (n',) prompts of its training sequences.
    """
    names = [sorted({c for c in clusters if c is not None}) for clusters in (left, right)]
    shares = [_shares(left, left_prompts, names[0]), _shares(right, right_prompts, names[1])]
    common = sorted(shares[0].keys() & shares[1].keys())
    flow, reason = None, "the two training buffers share no prompt"
    if common:
        flow = np.mean([np.outer(shares[0][p], shares[1][p]) for p in common], axis=0).tolist()
        reason = None
    return ClusterFlow(prompts=len(common), earlier=names[0], later=names[1], flow=flow, reason=reason)


def _shares(clusters: Clusters, prompts: np.ndarray, names: list[int]) -> dict[int, np.ndarray]:
    counts: dict[int, np.ndarray] = {}
    for cluster, prompt in zip(clusters, np.asarray(prompts).tolist(), strict=True):
        if cluster is not None:
            counts.setdefault(prompt, np.zeros(len(names)))[names.index(cluster)] += 1
    return {prompt: count / count.sum() for prompt, count in counts.items()}


def cluster_likeness(
    left: np.ndarray, left_clusters: Clusters, right: np.ndarray, right_clusters: Clusters
) -> list[list[float | None]]:
    """(clusters, clusters') correlations of the clusters' mean columns; None where a mean column is constant.

    left, right: (B, n) kernels over the same evaluation prompts.
    """
    means = []
    for kernel, clusters in ((left, left_clusters), (right, right_clusters)):
        labels = np.array([0 if c is None else c for c in clusters])
        columns = [kernel[:, labels == c].mean(1) for c in sorted({int(c) for c in labels} - {0})]
        means.append([column - column.mean() for column in columns])
    return [[_correlation(a, b) for b in means[1]] for a in means[0]]


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip(a @ b / size, -1.0, 1.0)) if size > 0 else None

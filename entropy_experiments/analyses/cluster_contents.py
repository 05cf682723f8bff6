"""What do the sequences of one cluster have in common?

    prompt, correctness, first word     adjusted mutual information (AMI) of cluster and label: 0 by chance, 1 if they coincide
    length                              share of its variance that lies between clusters
    p        = (1 + #{permuted >= observed}) / (1 + permutations),       labels permuted over all sequences
    p_within = the same, labels permuted within each prompt: what is shared *beyond* the prompt

Sequences of one prompt resemble each other in all of these, so that p alone would call a cluster that is a prompt a cluster of
lengths as well; where prompts have several sequences, p_within decides. The four deciding p-values are also given after
Holm's correction. With the margins of a permuted table fixed, AMI rises and falls with plain mutual information, which is
what the permutations compare. Source: Vinh, Epps & Bailey, JMLR 11 (2010); docs/analyses/clustering.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_mutual_info_score

from entropy_experiments.analyses.arrays import SequenceLabels
from entropy_experiments.analyses.prompt_structure import shuffling_within
from entropy_experiments.records.clustering_results import Association, Cluster

Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray], float]
"""(clusters, labels, weights), (m,) each -> how much one says about the other."""
_TIE = 1e-9
_WORDS_SHOWN = 3


def first_word(completion: str) -> str:
    """The first whitespace-delimited word of a completion, "" where there is none."""
    return next(iter(completion.split()), "")


def shared_by_clusters(
    clusters: np.ndarray,
    rows: np.ndarray,
    training: SequenceLabels,
    correct: np.ndarray,
    permutations: int,
    rng: np.random.Generator,
    copies: np.ndarray | None = None,
) -> dict[str, Association]:
    """What clusters of distinct training sequences share: "prompt", "length", "correctness" and "first_word".

    Args:
        clusters: (m,) of the sequences.
        rows: (m,) their places in the training buffer.
        training: labels of the whole buffer.
        correct: (n_train,) +1, -1 or 0; sequences with 0 are left out of "correctness".
        permutations: how many; rng: where they are drawn from.
        copies: (m,) how often each was drawn, its weight in what permutations compare, which stays with its cluster when labels
            are permuted; default 1. The adjusted mutual information counts each distinct sequence once.
    """
    weights = np.ones(len(rows)) if copies is None else np.asarray(copies, np.float64)
    prompts = np.asarray(training.prompt_index)[rows]
    words = np.array([first_word(training.completion[row]) for row in rows])
    labelled = np.flatnonzero(np.asarray(correct)[rows])
    everything = np.arange(len(rows))
    plan: dict[str, tuple[np.ndarray, np.ndarray, Statistic, str]] = {
        "prompt": (everything, prompts, mutual_information, "adjusted mutual information"),
        "length": (
            everything,
            np.asarray(training.length, np.float64)[rows],
            variance_between,
            "variance between clusters",
        ),
        "correctness": (labelled, np.asarray(correct)[rows], mutual_information, "adjusted mutual information"),
        "first_word": (everything, words, mutual_information, "adjusted mutual information"),
    }
    shared: dict[str, Any] = {}
    for name, (members, labels, statistic, measure) in plan.items():
        blocks = None if name == "prompt" else prompts[members]
        if name != "length":
            labels = np.unique(labels, return_inverse=True)[1]
        found = _association(clusters[members], labels[members], weights[members], statistic, blocks, permutations, rng)
        shared[name] = {"measure": measure} | found
    corrected = _holm(shared)
    return {name: Association(**entry, p_holm=corrected.get(name)) for name, entry in shared.items()}


def mutual_information(clusters: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mutual information of two integer labellings from 0, nats; weights (m,) default to 1."""
    shape = (int(clusters.max()) + 1, int(labels.max()) + 1)
    places = clusters * shape[1] + labels
    table = np.bincount(places, weights, minlength=shape[0] * shape[1]).reshape(shape)
    table = table / table.sum()
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True)
    filled = table > 0
    return float((table[filled] * np.log(table[filled] / expected[filled])).sum())


def variance_between(clusters: np.ndarray, values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Share of the variance of `values` that lies between clusters, 0 to 1; `values` must not all be equal. weights (m,)
    default to 1.
    """
    weights = np.ones(len(values)) if weights is None else weights
    centred = values - np.average(values, weights=weights)
    sizes = np.bincount(clusters, weights)
    sums = np.bincount(clusters, weights * centred)[sizes > 0]
    return float(np.square(sums) @ (1.0 / sizes[sizes > 0]) / (weights @ np.square(centred)))


def describe_clusters(
    clusters: np.ndarray,
    rows: np.ndarray,
    cosine: np.ndarray,
    training: SequenceLabels,
    correct: np.ndarray,
    of: np.ndarray | None = None,
) -> list[Cluster]:
    """Each cluster, in ascending order of its number. of: (m,) equal for copies of one sequence."""
    of = np.arange(len(clusters)) if of is None else of
    table = []
    for cluster in np.unique(clusters):
        places = np.flatnonzero(clusters == cluster)
        members, size = rows[places], len(places)
        inside, other = cosine[np.ix_(places, places)], of[places][:, None] != of[places][None, :]
        prompt, most = Counter(np.asarray(training.prompt_index)[members].tolist()).most_common(1)[0]
        rewards = np.asarray(training.reward, np.float64)[members]
        rewards, signs = rewards[np.isfinite(rewards)], correct[members][correct[members] != 0]
        table.append(
            Cluster(
                cluster=int(cluster) + 1,
                size=size,
                prompts=len(np.unique(np.asarray(training.prompt_index)[members])),
                main_prompt=int(prompt),
                main_prompt_share=most / size,
                mean_length=float(np.asarray(training.length, np.float64)[members].mean()),
                mean_reward=float(rewards.mean()) if len(rewards) else None,
                correct_share=float((signs > 0).mean()) if len(signs) else None,
                mean_cosine=float(inside[other].mean()) if other.any() else None,
                medoid=int(members[inside.sum(1).argmax()]),
                first_words=Counter(first_word(training.completion[i]) for i in members).most_common(_WORDS_SHOWN),
            )
        )
    return table


def _association(
    clusters: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    statistic: Statistic,
    blocks: np.ndarray | None,
    permutations: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The fields of an Association but for `measure` and `p_holm`."""
    nothing = {"value": None, "p_value": None, "p_within_prompt": None}
    distinct = len(np.unique(labels))
    if distinct < 2:
        return nothing | {"reason": "it is the same for all sequences" if distinct else "no sequence has it"}
    if distinct == len(labels) and statistic is mutual_information:
        return nothing | {"reason": "it is different for every sequence"}
    _, clusters = np.unique(clusters, return_inverse=True)
    observed = statistic(clusters, labels, weights)

    def p_value(shuffle: Callable[[], np.ndarray]) -> float:
        null = np.array([statistic(clusters, shuffle(), weights) for _ in range(permutations)])
        return (1 + int((null >= observed - _TIE).sum())) / (1 + permutations)

    value = observed
    if statistic is mutual_information:
        value = float(adjusted_mutual_info_score(labels, clusters))
    result = nothing | {"value": value, "p_value": p_value(lambda: rng.permutation(labels)), "reason": None}
    if blocks is None:
        return result
    if len(np.unique(blocks)) == len(blocks):
        return result | {"reason": "no prompt has two sequences: nothing to permute within a prompt"}
    shuffle = shuffling_within(blocks, rng)
    return result | {"p_within_prompt": p_value(lambda: shuffle(labels))}


def _holm(shared: dict[str, Any]) -> dict[str, float]:
    """Name -> the deciding p-value, corrected for being several (Holm 1979): the one within prompts where there is one."""
    deciding = {
        name: entry["p_value"] if entry["p_within_prompt"] is None else entry["p_within_prompt"]
        for name, entry in shared.items()
    }
    tested = sorted((p, name) for name, p in deciding.items() if p is not None)
    running, corrected = 0.0, {}
    for place, (p, name) in enumerate(tested):
        running = max(running, min(1.0, (len(tested) - place) * p))
        corrected[name] = running
    return corrected

"""Stored result of the analysis sequence_clustering: do the training sequences' gradients fall into groups?"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from entropy_experiments.records.kernel_results import Duplicates
from entropy_experiments.records.record import (
    Count,
    Finite,
    Index,
    Nonnegative,
    Number,
    Probability,
    Record,
    Result,
    Rows,
    same_length,
)


class Silhouette(Record):
    """Mean silhouettes at every number of clusters that was tried, and the rotation test of the best."""

    k: Rows[Count]
    """Numbers of clusters."""
    hierarchical: Rows[Finite]
    """Mean silhouette of the tree's cut into as many."""
    spectral: Rows[Finite]
    """Mean silhouette of as many spectral clusters."""
    best_k: Count
    """The number of the highest silhouette along the tree."""
    best: Number
    """That silhouette."""
    p_value: Probability
    """How often a cloud of the same spectrum without groups reaches it."""
    null_mean: Number
    """Mean of the best silhouettes of such clouds."""
    null_95: Number
    """Their 95% quantile."""
    rotations: Count
    """How many clouds."""
    k_max: Count
    """The largest number tried."""

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        same_length(k=self.k, hierarchical=self.hierarchical, spectral=self.spectral)
        return self


class RandIndex(Record):
    """Adjusted Rand index between two resamples."""

    median: Number
    """Its median."""
    low: Number
    """Its 5% quantile."""
    high: Number
    """Its 95% quantile."""


class Stability(Record):
    """How far clusterings of two resamples agree."""

    pairs: Count
    """Pairs of resamples."""
    hierarchical: RandIndex
    """Of the tree."""
    spectral: RandIndex
    """Of the spectral clusters."""


class Association(Record):
    """How much the clusters say about one property."""

    measure: str
    """What is measured."""
    value: Number
    """The measure, 0 to 1."""
    p_value: Probability
    """Of the property permuted over all sequences."""
    p_within_prompt: Probability
    """Of the property permuted within each prompt."""
    p_holm: Probability
    """The deciding one of both, corrected for several properties."""
    reason: str | None
    """Why a number is null."""

    @property
    def deciding_p_value(self) -> float | None:
        """p_within_prompt where there is one, else p_value."""
        return self.p_value if self.p_within_prompt is None else self.p_within_prompt


class Spectrum(Record):
    """Eigenvalues of a kernel and how many of them matter."""

    eigenvalues: Rows[Finite]
    """Descending."""
    effective_rank: Nonnegative
    """exp of the entropy of their shares."""
    participation_ratio: Nonnegative
    """(sum)^2 over the sum of squares."""
    rank_90: Count | None
    """How many make 90% of the trace."""
    most_negative: Number
    """The smallest over the largest, 0 up to rounding."""
    reason: str | None
    """Why the ranks are null."""


class Cluster(Record):
    """One cluster of training sequences."""

    cluster: Count
    """Its number, from 1."""
    size: Count
    """Sequences in it."""
    prompts: Count
    """Their prompts."""
    main_prompt: Index
    """The commonest prompt's number."""
    main_prompt_share: Probability
    """Its share of the sequences."""
    mean_length: Nonnegative
    """Tokens."""
    mean_reward: Number
    """Of those with a reward."""
    correct_share: Probability
    """Of those that are correct or wrong."""
    mean_cosine: Number
    """Between members that are not equal."""
    medoid: Count
    """The training sequence nearest to all of them."""
    first_words: Rows[Annotated[tuple[str, Count], Field(strict=False)]]
    """[word, count] of the commonest first words."""


class ClusteringResult(Result):
    """analyses.sequence_clustering: do the training sequences' gradients fall into groups?"""

    n_train: Count
    """Training sequences."""
    duplicates: Duplicates
    """Equal ones of those with a gradient."""
    without_gradient: Rows[Count]
    """Indices of the sequences without a gradient, which are in no cluster."""
    sequences: Rows[Count]
    """Indices of the others; linkage speaks of their places here."""
    linkage: Rows[Annotated[Rows[Finite], Field(min_length=4, max_length=4)]]
    """scipy's linkage of them, average linkage of 1 - cosine."""
    leaf_order: Rows[Count]
    """Training indices as the tree's leaves from the left."""
    n_clusters: Count
    """1 where there is no structure."""
    silhouette: Silhouette | None
    """null with too few sequences."""
    agreement: Number
    """Adjusted Rand index of the tree's and the spectral clusters; null for one cluster."""
    stability: Stability | None
    """null for one cluster."""
    shared: dict[Literal["prompt", "length", "correctness", "first_word"], Association] | None
    """What the members of a cluster share; null for one cluster."""
    spectrum: dict[Literal["cosine", "fisher", "distinct"], Spectrum]
    """Of the cosines, of K1, and of the cosines of distinct sequences."""
    level: Probability
    """Of the rotation test."""
    seed: Count
    """Of rotations, resamples and permutations."""
    reason: str | None
    """Why there is one cluster only."""
    clusters: Rows[Cluster]
    """One entry a cluster."""
    labels: Rows[Count | None]
    """Cluster of each training sequence by the tree; null without a gradient."""
    spectral_labels: Rows[Count | None]
    """The same by the spectral clusters."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        same_length(labels=self.labels, spectral_labels=self.spectral_labels)
        same_length(sequences=self.sequences, leaf_order=self.leaf_order)
        return self

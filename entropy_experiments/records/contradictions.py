"""Do the numbers of summary.json belong to the sequences beside them? Lists by sequence must be as long, indices in range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import chain

from entropy_experiments.records.analysis_results import finished
from entropy_experiments.records.leaving_out import WhoWasFirst
from entropy_experiments.records.summary import Summary


def contradiction(summary: Summary, n_eval: int, n_train: int) -> str | None:
    """The first field that cannot be of these buffers, in words; None where all can.

    Args:
        summary: The whole summary.
        n_eval: Evaluation sequences in sequences.parquet.
        n_train: Training sequences there.
    """
    counts = {"evaluation": n_eval, "training": n_train}
    for side, name, values in _by_sequence(summary):
        if values is not None and len(values) != counts[side]:
            return f"{name} has {len(values)} entries, but sequences.parquet has {counts[side]} {side} sequences"
    for name, indices in _training_indices(summary):
        worst = max(indices, default=-1)
        if worst >= n_train:
            return f"{name} names training sequence {worst}, but sequences.parquet has {n_train}"
    return None


def _by_sequence(summary: Summary) -> Iterator[tuple[str, str, Sized | None]]:
    """(side, field, list with one entry a sequence)."""
    analyses = summary.analyses
    if (found := finished(analyses.attribution)) is not None:
        yield "training", "analyses.attribution.sequences.share", found.sequences.share
        if found.evaluation is not None:
            yield "evaluation", "analyses.attribution.evaluation.contribution", found.evaluation.contribution
    if (clusters := finished(analyses.sequence_clustering)) is not None:
        yield "training", "analyses.sequence_clustering.labels", clusters.labels
    if (weightings := finished(analyses.weighting_schemes)) is not None:
        for name, weights in weightings.weights.items():
            yield "training", f"analyses.weighting_schemes.weights.{name[:40]}", weights


def _training_indices(summary: Summary) -> Iterator[tuple[str, Iterable[int]]]:
    """(field, indices of training sequences in it)."""
    analyses = summary.analyses
    if (found := finished(analyses.attribution)) is not None:
        yield "analyses.attribution.top_sequences", found.top_sequences
        if found.tokens is not None:
            yield "analyses.attribution.tokens.sequences", [row.sequence for row in found.tokens.sequences]
    if (clusters := finished(analyses.sequence_clustering)) is not None:
        yield "analyses.sequence_clustering.sequences", clusters.sequences
        yield "analyses.sequence_clustering.leaf_order", clusters.leaf_order
        yield "analyses.sequence_clustering.without_gradient", clusters.without_gradient
        yield "analyses.sequence_clustering.clusters", [cluster.medoid for cluster in clusters.clusters]
    if (proof := finished(analyses.intervention)) is not None:
        yield "analyses.intervention.subsets", chain.from_iterable(proof.subsets)
        for kind, removal in (("lowering", proof.removals.lowering), ("raising", proof.removals.raising)):
            yield f"analyses.intervention.removals.{kind}", () if removal is None else removal.sequences
    if summary.leaving_out is not None and isinstance(first := summary.leaving_out.first, WhoWasFirst):
        units = (first.sequences.lowering, first.sequences.raising, first.prompts.lowering, first.prompts.raising)
        named = [unit for unit in units if unit is not None]
        yield "leaving_out.first", chain.from_iterable(chain(unit.rows, *unit.set.rows) for unit in named)

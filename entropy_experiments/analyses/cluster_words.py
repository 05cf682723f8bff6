"""What the analysis "sequence_clustering" says, from its numbers: the clusters, and every reason to doubt them."""

from __future__ import annotations

from typing import Any

from entropy_experiments.analyses.cluster_contents import deciding_p_value
from entropy_experiments.analyses.distinct_sequences import duplicates_in_words
from entropy_experiments.text.numbers import plain

_SIZES_SHOWN = 8
_WEAK_AGREEMENT = 0.5
_SHARED_WORDS = {
    "prompt": "the prompt",
    "length": "length",
    "correctness": "correctness",
    "first_word": "the first word",
}


def clustering_sentence(result: dict[str, Any]) -> str:
    """The analysis in one sentence, or two where the number of clusters is the largest tried or the methods disagree."""
    rank = result["spectrum"]["cosine"]["effective_rank"]
    opening = f"The gradients of {duplicates_in_words(result['duplicates'])}"
    opening += "" if rank is None else f" (effective rank {plain(rank, 2)})"
    if result["shared"] is None:
        return f"{opening} show no clusters: {result['reason']}."
    silhouette, stable = result["silhouette"], result["stability"]["hierarchical"]["median"]
    sizes = ", ".join(str(cluster["size"]) for cluster in result["clusters"][:_SIZES_SHOWN])
    sizes += ", …" if result["n_clusters"] > _SIZES_SHOWN else ""
    found = [
        f"{_SHARED_WORDS[name]} ({entry['measure']} {plain(entry['value'], 2)}, p = {plain(deciding_p_value(entry), 2)})"
        for name, entry in result["shared"].items()
        if entry["p_holm"] is not None and entry["p_holm"] <= result["level"]
    ]
    common = (
        " and ".join(found) if found else "neither prompt nor length, correctness or first word to any clear degree"
    )
    text = (
        f"{opening} form {result['n_clusters']} clusters of {sizes} (silhouette {plain(silhouette['best'], 2)}, "
        f"p = {plain(silhouette['p_value'], 2)}; adjusted Rand index between resamples {plain(stable, 2)}), whose members "
        f"share {common}."
    )
    return " ".join([text, *_doubts(result)])


def _doubts(result: dict[str, Any]) -> list[str]:
    doubts, silhouette = [], result["silhouette"]
    if result["n_clusters"] == silhouette["k_max"] and len(silhouette["k"]) > 1:
        doubts.append(
            f"{result['n_clusters']} is the largest number that was tried: there may be more, or no clear number."
        )
    if result["agreement"] < _WEAK_AGREEMENT:
        doubts.append(
            f"Spectral clustering into as many groups them otherwise (adjusted Rand index {plain(result['agreement'], 2)})."
        )
    return doubts

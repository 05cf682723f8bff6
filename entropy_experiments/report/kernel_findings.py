"""What the analyses of the kernel found, in a sentence: prompt_structure and sequence_clustering, with every reason to doubt.

A difference between prompts counts where its permutation test of the cosine rejects at 5% and raw K1 differs in the same
direction: the cosine weighs all directions alike, K1 the long gradients most, and where the two contradict each other neither
is "the" answer.
"""

from __future__ import annotations

from entropy_experiments.records.clustering_results import ClusteringResult
from entropy_experiments.records.kernel_results import Duplicates, GroupStructure, PromptStructureResult
from entropy_experiments.statistics.confidence import UNTOLD
from entropy_experiments.text.numbers import counted, plain, plus_minus, signed

_LEVEL = 0.05
_SIZES_SHOWN = 8
_WEAK_AGREEMENT = 0.5
_SHARED_WORDS = {
    "prompt": "the prompt",
    "length": "length",
    "correctness": "correctness",
    "first_word": "the first word",
}


def duplicates_in_words(counts: Duplicates) -> str:
    """ "48 sequences, 37 of them distinct"; without duplicates the number alone."""
    text = counted(counts.sequences, "sequence")
    return text if counts.distinct == counts.sequences else f"{text}, {counts.distinct} of them distinct"


def structure_finding(result: PromptStructureResult) -> str:
    """Nothing is claimed where cosine and raw K1 differ in sign."""
    single = result.single_batch
    same, contrast = _same_prompt_words(result), _correctness_words(result.within_group)
    value = f"the training batch in both roles would put the step's batch part at {signed(single.value)} nats per token"
    if single.bias.value is None:
        return f"{same}; {contrast}; {value} ({single.reason})."
    bias = plus_minus(single.bias.value, single.bias.standard_error)
    return (
        f"{same}; {contrast}; {value}, the U-statistic over its prompts at {signed(single.u_statistic.value)}: "
        f"a bias of {bias} from pairing prompts with themselves."
    )


def _same_prompt_words(result: PromptStructureResult) -> str:
    train, test = result.train, result.train.cosine.test
    units = f"{duplicates_in_words(result.duplicates)}, of {counted(result.n_prompts, 'prompt')}"
    if test.p_value is None or test.difference is None or test.null_mean is None:
        return f"Same-prompt and cross-prompt pairs cannot be compared ({test.reason})"
    numbers = ", ".join(
        f"{name} {plain(side.same_prompt.mean, 2)} against {plain(side.cross_prompt.mean, 2)}, "
        f"p = {plain(side.test.p_value, 2)}"
        for name, side in (("mean cosine", train.cosine), ("mean raw K₁", train.raw))
    )
    numbers = f"({numbers}; {units})"
    if test.p_value > _LEVEL:
        verdict = "not measurably more or less than"
    elif not train.signs_agree:
        return (
            f"Whether sequences of one prompt move each other more or less than sequences of different prompts {UNTOLD}: "
            f"directions and raw K₁ differ in sign {numbers}"
        )
    else:
        verdict = "more than" if test.difference > test.null_mean else "less than"
    return f"Sequences of one prompt move each other {verdict} sequences of different prompts {numbers}"


def _correctness_words(groups: GroupStructure) -> str:
    test, raw = groups.cosine.test, groups.raw.test
    if test.p_value is None:
        return f"correct and wrong ones cannot be compared ({test.reason})"
    found = test.p_value <= _LEVEL
    numbers = (
        f"(equally correct pairs have a cosine {signed(test.difference, 2)} above mixed ones, "
        f"p = {plain(test.p_value, 2)}, and a raw K₁ {signed(raw.difference, 2)}, p = {plain(raw.p_value, 2)})"
    )
    if found and not groups.signs_agree:
        return f"whether correctness matters within a prompt {UNTOLD}: directions and raw K₁ differ in sign {numbers}"
    return f"within a prompt correctness {'matters' if found else 'does not show'} {numbers}"


def clustering_finding(result: ClusteringResult) -> str:
    """One sentence, or two where the number of clusters is the largest tried or the methods disagree."""
    rank = result.spectrum["cosine"].effective_rank
    opening = f"The gradients of {duplicates_in_words(result.duplicates)}"
    opening += "" if rank is None else f" (effective rank {plain(rank, 2)})"
    silhouette = result.silhouette
    if result.shared is None or silhouette is None or result.stability is None:
        return f"{opening} show no clusters: {result.reason}."
    sizes = ", ".join(str(cluster.size) for cluster in result.clusters[:_SIZES_SHOWN])
    sizes += ", …" if result.n_clusters > _SIZES_SHOWN else ""
    found = [
        f"{_SHARED_WORDS[name]} ({entry.measure} {plain(entry.value, 2)}, p = {plain(entry.deciding_p_value, 2)})"
        for name, entry in result.shared.items()
        if entry.p_holm is not None and entry.p_holm <= (result.level or 0.0)
    ]
    common = " and ".join(found) or "neither prompt nor length, correctness or first word to any clear degree"
    text = (
        f"{opening} form {result.n_clusters} clusters of {sizes} (silhouette {plain(silhouette.best, 2)}, "
        f"p = {plain(silhouette.p_value, 2)}; adjusted Rand index between resamples "
        f"{plain(result.stability.hierarchical.median, 2)}), whose members share {common}."
    )
    if result.n_clusters == silhouette.k_max and len(silhouette.k) > 1:
        text += f" {result.n_clusters} is the largest number that was tried: there may be more, or no clear number."
    if result.agreement is not None and result.agreement < _WEAK_AGREEMENT:
        index = plain(result.agreement, 2)
        text += f" Spectral clustering into as many groups them otherwise (adjusted Rand index {index})."
    return text

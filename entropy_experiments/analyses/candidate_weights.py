"""Which weights might the same training sequences have had: the run's own, every weighting scheme's, every filter's.

Each is a vector of n_train sequence weights with a name and a label, or the reason why there are none. Filters change the
run's own weights: `positives_only`, `negatives_only`, `drop_top_k` (without the k sequences of lowest dH_i), `clip_cov`
and `kl_cov` (Cui et al. 2025) by a sequence's mean token covariance (S_i/T_i - mean log pi)(A_i - mean A), means over
tokens; the paper masks single tokens. Source: docs/analyses/weighting-schemes.md; entropy_core/weighting.py.
"""

from __future__ import annotations

import numpy as np
import torch

from entropy_core.interventions import SCHEMES
from entropy_core.weighting import sequence_weights
from entropy_experiments.analyses.arrays import SequenceLabels, StepArrays
from entropy_experiments.text.numbers import counted

MASKED_FRACTION, BAND_FRACTION = 0.1, 0.25
"""Of all sequences, how many KL-Cov masks (those of highest covariance), and from how many of the highest Clip-Cov draws as
many at random; its weights here are the mean over those draws."""

_FILTERS = ("positives_only", "negatives_only", "clip_cov", "kl_cov")  # and a drop_top_k for each k
DROP_TOP = (1, 5, 10)
MOST_ROWS = 1 + len(SCHEMES) + len(_FILTERS) + len(DROP_TOP)
"""Rows of the table, the run's own among them: as many steps are taken and measured, where all of them have weights."""

LabelledWeights = dict[str, tuple[str, np.ndarray | str]]  # name -> label, and (n_train,) weights or why there are none


def labelled_weights(
    arrays: StepArrays, max_completion_length: int | None, drop_top: tuple[int, ...] = DROP_TOP
) -> LabelledWeights:
    """`run` first, then the schemes in the order of SCHEMES, then the filters.

    max_completion_length: tokens that dr_grpo's constant normaliser divides by. drop_top: numbers of sequences to leave out.
    """
    table: LabelledWeights = {"run": ("as trained", arrays.weights)}
    return table | _schemes(arrays.training, max_completion_length) | _filters(arrays, drop_top)


def _schemes(labels: SequenceLabels, max_completion_length: int | None) -> LabelledWeights:
    inputs = [torch.tensor(a) for a in (labels.reward, labels.prompt_index, labels.length)]
    table: LabelledWeights = {}
    for name, (label, scheme, normalizer) in SCHEMES.items():
        try:
            table[name] = (label, sequence_weights(*inputs, scheme, max_completion_length, normalizer).numpy())
        except ValueError as error:  # rewards missing, groups of one, no length to divide by: said in the row
            table[name] = (label, str(error))
    return table


def _filters(arrays: StepArrays, drop_top: tuple[int, ...]) -> LabelledWeights:
    own, count = arrays.weights, len(arrays.weights)

    def without(indices: np.ndarray) -> np.ndarray:
        return np.where(np.isin(np.arange(count), indices), 0.0, own)

    table: LabelledWeights = {
        "positives_only": ("positive weights only", np.where(own > 0, own, 0.0)),
        "negatives_only": ("negative weights only", np.where(own < 0, own, 0.0)),
    }
    for k in drop_top:
        costly = most_lowering(arrays.shares, k)
        few = f"only {counted(len(costly), 'sequence')} lowered entropy" if len(costly) < k else ""
        table[f"drop_top_{k}"] = (f"without the {k} of highest entropy cost", few or without(costly))
    covariance = mean_token_covariances(arrays.training, arrays.advantages)
    highest = np.argsort(-covariance, kind="stable")
    masked, band = (max(1, round(fraction * count)) for fraction in (MASKED_FRACTION, BAND_FRACTION))
    equal = "" if np.ptp(covariance) > 0 else "all sequences have the same token covariance"
    thinned = own - masked / band * (own - without(highest[:band]))
    table["clip_cov"] = (f"Clip-Cov: {masked} of the {band} highest", equal or thinned)
    table["kl_cov"] = (f"KL-Cov: without the {masked} highest", equal or without(highest[:masked]))
    return table


def mean_token_covariances(labels: SequenceLabels, advantages: np.ndarray) -> np.ndarray:
    """(n,) mean over sequence i's tokens of (log pi - mean log pi)(A - mean A), means over all tokens: nats x advantage."""
    total = labels.length.sum()
    mean_logprob, mean_advantage = labels.score.sum() / total, (labels.length * advantages).sum() / total
    return (labels.score / labels.length - mean_logprob) * (advantages - mean_advantage)


def most_lowering(shares: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k lowest shares, as far as they are below 0."""
    order = np.argsort(shares, kind="stable")[:k]
    return order[shares[order] < 0]

"""How large is a checkpoint's kernel, into how many directions does it point, and how much of it stays within prompts?

    norm                 sqrt(mean of K1(t, i)^2) over evaluation rows and training columns, nats^2 x P: an entry's size
    effective rank       exp(entropy of the eigenvalue shares) of K K^T (evaluation rows), and of the training cosines
    same-prompt share    sum of cos(i, j)^2 over pairs of distinct training sequences of one prompt / over all such pairs

The same-prompt share stands beside the share of *pairs* that are of one prompt: equal numbers mean that gradients of one prompt
are no more alike, or opposed, than others. Copies of one sequence have a cosine of 1 whatever their prompt is: they are no pair
(analyses/distinct_sequences.py). Squares do not cancel: pairs that pull against each other count as well. Standard
errors: jackknife over evaluation prompts (norm and rank of the evaluation rows) or training prompts (the others).
docs/analyses/evolution.md. P is the checkpoint's own, so that norms at two checkpoints differ by its change too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from entropy_core.uncertainty import jackknife_standard_error
from entropy_experiments.analyses.kernel_geometry import checked_gram, cosine_kernel, spectrum
from entropy_experiments.records.evolution import ReasonedMean


@dataclass(frozen=True)
class TrainingStructure:
    """Of the training gradients: their effective rank, the share of squared cosines that is of pairs of one prompt, and the
    share of pairs that are of one prompt.
    """

    effective_rank: ReasonedMean
    same_prompt_share: ReasonedMean
    same_prompt_pairs: float | None


def kernel_size(kernel: np.ndarray, eval_prompts: np.ndarray) -> tuple[ReasonedMean, ReasonedMean]:
    """Norm and effective rank of an (n_eval, n_train) kernel; eval_prompts: (n_eval,)."""
    values = np.asarray(kernel, np.float64)
    gram = values @ values.T

    def norm(kept: np.ndarray) -> float | None:
        return math.sqrt(float(np.square(values[kept]).mean()))

    def rank(kept: np.ndarray) -> float | None:
        return spectrum(gram[np.ix_(kept, kept)]).effective_rank

    prompts = np.asarray(eval_prompts)
    return _without_each(norm, prompts), _without_each(rank, prompts)


def training_structure(
    train_fisher: np.ndarray, prompts: np.ndarray, equal: np.ndarray | None = None
) -> TrainingStructure:
    """Of a symmetric (n_train, n_train) kernel; sequences without a gradient are left out.

    equal: (n_train,) one number for sequences that are the same, of which pairs count nowhere; None: no two are.

    Raises:
        ValueError: The kernel is not symmetric, or not finite.
    """
    cosine, kept = cosine_kernel(checked_gram(train_fisher))
    prompts = np.asarray(prompts)[kept]
    of = kept if equal is None else np.asarray(equal)[kept]
    same = prompts[:, None] == prompts[None, :]
    apart = of[:, None] != of[None, :]
    squares = np.square(cosine)

    def rank(members: np.ndarray) -> float | None:
        return spectrum(cosine[np.ix_(members, members)]).effective_rank

    def share(members: np.ndarray) -> float | None:
        block, pairs = squares[np.ix_(members, members)], apart[np.ix_(members, members)]
        total = float(block[pairs].sum())
        return float(block[pairs & same[np.ix_(members, members)]].sum()) / total if total > 0 else None

    pairs_of_one = float(same[apart].mean()) if apart.any() else None
    return TrainingStructure(_without_each(rank, prompts), _without_each(share, prompts), pairs_of_one)


def _without_each(statistic: Callable[[np.ndarray], float | None], prompts: np.ndarray) -> ReasonedMean:
    everyone = np.arange(len(prompts))
    value = statistic(everyone) if len(everyone) else None
    if value is None:
        return ReasonedMean(value=None, standard_error=None, reason="no pair of sequences has a gradient")
    groups = np.unique(prompts)
    left_out = [statistic(everyone[prompts != p]) for p in groups] if len(groups) > 1 else []
    known = [v for v in left_out if v is not None]
    if len(known) < 2 or len(known) < len(groups):
        return ReasonedMean(value=value, standard_error=None, reason="too few prompts for a standard error")
    error = jackknife_standard_error(torch.tensor(known, dtype=torch.float64))
    return ReasonedMean(value=value, standard_error=error, reason=None)

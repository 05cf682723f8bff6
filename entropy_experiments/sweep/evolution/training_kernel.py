"""How large is a checkpoint's kernel, into how many directions does it point, and how much of it stays within prompts?

    norm                 sqrt(mean of K1(t, i)^2) over evaluation rows and training columns, nats^2 x P: an entry's size
    effective rank       exp(entropy of the eigenvalue shares) of K K^T (evaluation rows), and of the training cosines
    same-prompt share    sum of cos(i, j)^2 over training pairs i != j of one prompt / over all pairs i != j

The same-prompt share stands beside the share of *pairs* that are of one prompt: equal numbers mean that gradients of one prompt
are no more alike, or opposed, than others. Squares do not cancel: pairs that pull against each other count as well. Standard
errors: jackknife over evaluation prompts (norm and rank of the evaluation rows) or training prompts (the others).
docs/analyses/evolution.md. P is the checkpoint's own, so that norms at two checkpoints differ by its change too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from entropy_core.uncertainty import jackknife_standard_error
from entropy_experiments.analyses.kernel_geometry import checked_gram, cosine_kernel, spectrum


def kernel_size(kernel: np.ndarray, eval_prompts: np.ndarray) -> dict[str, Any]:
    """ "norm" and "effective_rank" of an (n_eval, n_train) kernel, each {"value", "standard_error", "reason"}."""
    values = np.asarray(kernel, np.float64)
    gram = values @ values.T

    def norm(kept: np.ndarray) -> float | None:
        return math.sqrt(float(np.square(values[kept]).mean()))

    def rank(kept: np.ndarray) -> float | None:
        return spectrum(gram[np.ix_(kept, kept)]).effective_rank

    prompts = np.asarray(eval_prompts)
    return {"norm": _without_each(norm, prompts), "effective_rank": _without_each(rank, prompts)}


def training_structure(train_fisher: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Of a symmetric (n_train, n_train) kernel: "effective_rank", "same_prompt_share", each {"value", "standard_error",
    "reason"}, and "same_prompt_pairs", the share of pairs that are of one prompt.

    Sequences without a gradient are left out. Raises ValueError for a kernel that is not symmetric or not finite.
    """
    cosine, kept = cosine_kernel(checked_gram(train_fisher))
    prompts = np.asarray(prompts)[kept]
    same = prompts[:, None] == prompts[None, :]
    apart = ~np.eye(len(kept), dtype=bool)
    squares = np.square(cosine)

    def rank(members: np.ndarray) -> float | None:
        return spectrum(cosine[np.ix_(members, members)]).effective_rank

    def share(members: np.ndarray) -> float | None:
        block, pairs = squares[np.ix_(members, members)], apart[np.ix_(members, members)]
        total = float(block[pairs].sum())
        return float(block[pairs & same[np.ix_(members, members)]].sum()) / total if total > 0 else None

    return {
        "effective_rank": _without_each(rank, prompts),
        "same_prompt_share": _without_each(share, prompts),
        "same_prompt_pairs": float(same[apart].mean()) if apart.any() else None,
    }


def _without_each(statistic: Callable[[np.ndarray], float | None], prompts: np.ndarray) -> dict[str, Any]:
    everyone = np.arange(len(prompts))
    value = statistic(everyone) if len(everyone) else None
    if value is None:
        return {"value": None, "standard_error": None, "reason": "no pair of sequences has a gradient"}
    groups = np.unique(prompts)
    left_out = [statistic(everyone[prompts != p]) for p in groups] if len(groups) > 1 else []
    known = [v for v in left_out if v is not None]
    if len(known) < 2 or len(known) < len(groups):
        return {"value": value, "standard_error": None, "reason": "too few prompts for a standard error"}
    error = jackknife_standard_error(torch.tensor(known, dtype=torch.float64))
    return {"value": value, "standard_error": error, "reason": None}

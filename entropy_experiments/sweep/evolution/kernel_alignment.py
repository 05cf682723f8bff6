"""Do two checkpoints' kernels couple the same evaluation prompts?

    R(p, i) = mean over prompt p's completions of K1(t, i) / |dS_i|_P,      rows scaled to unit length
    G = R R^T                                                              (B, B): which prompts are moved by the same sequences
    A = HSIC1(G, G') / sqrt(HSIC1(G, G) HSIC1(G', G'))                      debiased centred kernel alignment
    HSIC1(G, G') = [tr(G G') + 1'G1 1'G'1/((B-1)(B-2)) - 2/(B-2) 1'G G'1] / (B (B-3)),     diagonals set to 0

Between two checkpoints completions and training sequences are drawn anew; what stays is the evaluation *prompts*. G compares
these alone: its columns may be other sequences at each checkpoint. HSIC1 is unbiased, so that unrelated kernels have A = 0 on
average, however few prompts there are (the plain alignment of two 64 x 64 kernels of noise is about one half). A may fall
below 0, or rise a little above 1. p: the prompts of one kernel permuted, add-one, one-sided. Standard error: jackknife over
prompts.

    cosine = <M, M'>_F / |M| |M'|,       M(p, q) = mean of K1 over evaluation prompt p and training prompt q, q in both buffers

Source: Kornblith et al. 2019; Song et al., JMLR 13 (2012); Nguyen, Raghu & Kornblith 2021; docs/analyses/evolution.md.
"""

from __future__ import annotations

import numpy as np
import torch

from entropy_core.uncertainty import jackknife_standard_error
from entropy_experiments.records.evolution import KernelAlignment, KernelCosine

_FEWEST_PROMPTS = 6  # five are left when one is left out, and HSIC1 needs four


def rows_of_prompts(kernel: np.ndarray, rows: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """(len(prompts), n_train) means of the (n_eval, n_train) kernel over each prompt's rows; rows: (n_eval,) their prompts."""
    belongs = np.asarray(rows)[None, :] == np.asarray(prompts)[:, None]
    return belongs @ np.asarray(kernel, np.float64) / belongs.sum(1, keepdims=True)


def prompt_gram(by_prompt: np.ndarray, squared_lengths: np.ndarray | None = None) -> np.ndarray:
    """(B, B) G of (B, n_train) rows; squared_lengths: (n_train,) K1(i, i), None leaves the columns as they are.

    Columns without length are left out; a row of zeros stays one.
    """
    values = by_prompt
    if squared_lengths is not None:
        used = squared_lengths > 1e-12 * squared_lengths.max(initial=0.0)
        values = by_prompt[:, used] / np.sqrt(squared_lengths[used])
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    values = np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0)
    return values @ values.T


def unbiased_hsic(left: np.ndarray, right: np.ndarray) -> float:
    """HSIC1 of two symmetric (B, B) matrices, B >= 4; their diagonals do not count."""
    count = len(left)
    left, right = left - np.diag(np.diag(left)), right - np.diag(np.diag(right))
    sums = left.sum(0), right.sum(0)
    value = (left * right).sum() + sums[0].sum() * sums[1].sum() / ((count - 1) * (count - 2))
    return float((value - 2 / (count - 2) * (sums[0] @ sums[1])) / (count * (count - 3)))


def debiased_alignment(left: np.ndarray, right: np.ndarray) -> float | None:
    """A of two symmetric (B, B) matrices, B >= 4; None where one of them has no structure left after debiasing."""
    alone = unbiased_hsic(left, left), unbiased_hsic(right, right)
    if min(alone) <= 0:
        return None
    return unbiased_hsic(left, right) / float(np.sqrt(alone[0] * alone[1]))


def not_aligned(reason: str, prompts: int = 0) -> KernelAlignment:
    """Why there is no alignment."""
    return KernelAlignment(value=None, standard_error=None, p_value=None, prompts=prompts, reason=reason)


def align_kernels(left: np.ndarray, right: np.ndarray, *, permutations: int = 999, seed: int = 0) -> KernelAlignment:
    """The alignment of two (B, B) grams over the same prompts, or why there is none."""
    count = len(left)
    if count < _FEWEST_PROMPTS:
        return not_aligned(f"alignment needs {_FEWEST_PROMPTS} evaluation prompts in common, there are {count}", count)
    value = debiased_alignment(left, right)
    if value is None:
        return not_aligned("one of the kernels couples its prompts no more than chance", count)
    rng = np.random.default_rng(seed)
    observed, at_least = unbiased_hsic(left, right), 1
    for _ in range(permutations):
        order = rng.permutation(count)
        at_least += unbiased_hsic(left, right[np.ix_(order, order)]) >= observed
    others = [np.delete(np.arange(count), p) for p in range(count)]
    left_out = [debiased_alignment(left[np.ix_(o, o)], right[np.ix_(o, o)]) for o in others]
    known = [v for v in left_out if v is not None]
    error = jackknife_standard_error(torch.tensor(known)) if len(known) == count else None
    reason = None if error is not None else "without one of its prompts a kernel has no structure"
    p_value = at_least / (1 + permutations)
    return KernelAlignment(value=value, standard_error=error, p_value=p_value, prompts=count, reason=reason)


def block_cosine(
    left: np.ndarray, left_columns: np.ndarray, right: np.ndarray, right_columns: np.ndarray
) -> KernelCosine:
    """The cosine of two kernels as means over (evaluation prompt, training prompt), or why there is none.

    Args:
        left: (B, n) rows of the evaluation prompts.
        left_columns: (n,) the training prompt of each column.
        right: (B, n') rows of the same evaluation prompts.
        right_columns: (n',) the training prompt of each column.
    """
    shared = np.intersect1d(left_columns, right_columns)
    if not len(shared):
        return KernelCosine(value=None, prompts=0, reason="the two training buffers share no prompt")
    blocks = [
        np.stack([kernel[:, columns == prompt].mean(1) for prompt in shared], 1)
        for kernel, columns in ((left, np.asarray(left_columns)), (right, np.asarray(right_columns)))
    ]
    lengths = [float(np.linalg.norm(block)) for block in blocks]
    if min(lengths) == 0:
        return KernelCosine(value=None, prompts=len(shared), reason="a kernel is zero on the shared prompts")
    value = float((blocks[0] * blocks[1]).sum()) / (lengths[0] * lengths[1])
    return KernelCosine(value=value, prompts=len(shared), reason=None)

"""Into how many directions do the gradients of a batch point?

    cos(i, j) = K1(i, j) / sqrt(K1(i, i) K1(j, j))          angle between two rows in the metric of P
    q_k       = lambda_k / sum lambda                        share of the k-th eigenvalue, largest first
    effective rank       exp(-sum q_k ln q_k)
    participation ratio  (sum lambda)^2 / sum lambda^2

Both ranks are n for n orthogonal rows of equal length and 1 for rows along one line; the participation ratio listens more
to the large eigenvalues and is the smaller of the two. Of cos they count directions alone, of K1 lengths as well.
Source: Roy & Vetterli, The effective rank, EUSIPCO 2007; docs/analyses/clustering.md.
"""

from __future__ import annotations

import numpy as np

from entropy_experiments.records.clustering_results import Spectrum

# A row shorter than 1e-6 of the longest is float32 rounding and has no direction.
_SMALLEST_SQUARED_LENGTH = 1e-12
_ASYMMETRY_ALLOWED = 1e-3


def checked_gram(kernel: np.ndarray, name: str = "train_fisher") -> np.ndarray:
    """`kernel` as a finite symmetric float64 (n, n); its rounding asymmetry is averaged away.

    Raises ValueError for another shape, entries that are not finite, a negative diagonal, or an asymmetry of more than
    1e-3 of the largest entry.
    """
    values = np.asarray(kernel, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"{name} has shape {values.shape}: both axes must be the same sequences")
    check_finite(values, name)
    scale = np.abs(values).max(initial=0.0)
    asymmetry = np.abs(values - values.T).max(initial=0.0)
    if asymmetry > _ASYMMETRY_ALLOWED * scale:
        raise ValueError(f"{name} is not symmetric (it differs from its transpose by {asymmetry:.3g} of {scale:.3g})")
    if np.diag(values).min(initial=0.0) < -_ASYMMETRY_ALLOWED * scale:
        raise ValueError(f"{name} has the diagonal entry {np.diag(values).min():.3g}: a squared length below zero")
    return (values + values.T) / 2


def check_finite(values: np.ndarray, name: str) -> None:
    """Raises ValueError that counts the entries of `values` that are not finite and says where the first is."""
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        where = ", ".join(str(int(index)) for index in bad[0])
        raise ValueError(f"{name} has {len(bad)} entries that are not finite, the first at [{where}]")


def cosine_kernel(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (m, m) in [-1, 1] of a symmetric (n, n) kernel, and the (m,) ascending indices of the rows they belong to.

    Left out are rows without a direction: K(i, i) at most 1e-12 of the largest.
    """
    squared = np.diag(kernel)
    kept = np.flatnonzero(squared > _SMALLEST_SQUARED_LENGTH * squared.max(initial=0.0))
    lengths = np.sqrt(squared[kept])
    cosine = np.clip(kernel[np.ix_(kept, kept)] / lengths[:, None] / lengths[None, :], -1.0, 1.0)
    np.fill_diagonal(cosine, 1.0)
    return cosine, kept


def spectrum(kernel: np.ndarray) -> Spectrum:
    """Eigenvalues of a symmetric positive semi-definite (n, n) kernel and how many of them matter.

    Rounding below zero is cut off the eigenvalues; most_negative says how large it was. The ranks are None, with a reason, where
    no row has any length.
    """
    raw = np.linalg.eigvalsh(kernel)[::-1] if kernel.size else np.zeros(0)
    eigenvalues = np.maximum(raw, 0.0)
    total = float(eigenvalues.sum())
    if total <= 0:
        nothing = dict.fromkeys(("effective_rank", "participation_ratio", "rank_90", "most_negative"))
        return Spectrum(eigenvalues=eigenvalues.tolist(), **nothing, reason="no sequence has a gradient")
    shares = eigenvalues / total
    positive = shares[shares > 0]
    return Spectrum(
        eigenvalues=eigenvalues.tolist(),
        effective_rank=float(np.exp(-(positive * np.log(positive)).sum())),
        participation_ratio=float(1.0 / np.square(shares).sum()),
        rank_90=int(np.searchsorted(np.cumsum(shares), 0.9 - 1e-12) + 1),
        most_negative=float(min(raw[-1], 0.0) / raw[0]),
        reason=None,
    )

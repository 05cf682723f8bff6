"""A critic for the entropy to go: ridge regression on what the policy knows at a token, fitted on
*other* prompts.

    V(c_k) = phi(c_k) . (w_H - h w_T)                      estimates E[G_k | c_k],  G_k = sum_{k' >= k} (H_k' - h)
    phi(c_k) = [R y_k, k, H_k, 1]                          y_k the hidden state that predicts a_k, R a fixed random projection
    w minimises  sum_tokens (target - phi . w)^2 + ridge n |w|^2

w_H is fitted to the entropies to go, w_T to the tokens to go, so that one critic serves every
centre h. n counts tokens; features are standardised inside (ridge has no unit) and the constant is
not penalised. Only sums of products are kept, the normal equations; each step they are multiplied
by `keep` before a new batch enters.

No leakage: prompts are dealt into folds by a hash of their tokens, sums are kept fold by fold, and
a sequence's V comes from the sums of the *other* folds, of this step and earlier ones. So no
completion of its prompt, of any step, is in the V of a sequence, itself least of all: V is fixed
given c_k, which `entropy_core.temporal_differences` rests on, also where a sequence is trained on
in several steps.

Source: docs/theory/entropy-critic.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch

PROJECTED = 64
_SEED = 20160602


def hidden_projection(width: int, size: int = PROJECTED, seed: int = _SEED) -> Tensor:
    """(width, size) float32: R transposed, the same in every process and every run of one width."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, size, generator=generator) / width**0.5


def token_features(entropies: Tensor, mask: Tensor, projected: Tensor | None = None, size: int = PROJECTED) -> Tensor:
    """What the critic knows of each prefix c_k, without the constant.

    Args:
        entropies: (N, L) H_k in nats.
        mask: (N, L) bool, true on drawn tokens.
        projected: (N, L, size) R y_k; None where the policy shows no hidden state (zeros then).
        size: how many numbers stand in for the hidden state where `projected` is None.

    Returns:
        (N, L, size + 2) float64: R y_k, the number of drawn tokens before this one, H_k.
    """
    before = mask.double().cumsum(1) - mask.double()
    if projected is None:
        projected = torch.zeros((*mask.shape, size), dtype=torch.float64, device=mask.device)
    return torch.cat([projected.double(), before[..., None], entropies.double()[..., None]], 2)


def prompt_folds(batch: SequenceBatch, folds: int) -> Tensor:
    """(N,) int64 fold of each sequence, by its prompt's tokens: the same in every step, process and
    run.
    """
    ids, masks = batch.input_ids.cpu(), batch.prompt_mask.cpu()
    found = [zlib.crc32(row[kept].numpy().tobytes()) % folds for row, kept in zip(ids, masks, strict=True)]
    return torch.tensor(found, dtype=torch.long, device=batch.device)


class EntropyCritic:
    """Normal equations by fold of prompts; a few hundred kilobytes.

    Args:
        features: how many numbers `token_features` gives for a token.
        folds: parts of the prompts; a sequence's V is fitted on all but its own.
        keep: weight of everything so far when a step later is added; 1 forgets nothing.
        ridge: strength of the penalty, relative to the spread of the features.
    """

    def __init__(self, features: int = PROJECTED + 2, folds: int = 4, keep: float = 0.9, ridge: float = 0.3) -> None:
        if folds < 2:
            raise ValueError(f"a critic needs at least two folds of prompts to leave a sequence's own out, not {folds}")
        self.folds, self._keep, self._ridge = folds, keep, ridge
        # One table: products of [phi, 1, entropy to go, tokens to go] with each other.
        self._sums = torch.zeros(folds, features + 3, features + 3, dtype=torch.float64)

    @property
    def tokens(self) -> float:
        """How many tokens count, after forgetting."""
        return float(self._sums[:, -3, -3].sum())

    def observe(self, features: Tensor, entropies: Tensor, mask: Tensor, fold: Tensor, steps: int = 1) -> None:
        """Take in a batch of today's policy.

        Args:
            features: (N, L, F) of `token_features`.
            entropies: (N, L) H_k in nats.
            mask: (N, L) bool, true on drawn tokens.
            fold: (N,) of `prompt_folds`.
            steps: optimizer steps since the last call; what was taken in then counts keep^steps.
        """
        self._sums *= self._keep**steps
        ones = mask.double()
        to_go = [(x * ones).flip(1).cumsum(1).flip(1) for x in (entropies.double(), ones)]
        rows = torch.cat([features.double(), ones[..., None], *(x[..., None] for x in to_go)], 2)
        for f in fold.unique().tolist():
            own = rows[fold == f][mask[fold == f]]
            products = (own.T @ own).cpu()
            self._sums[f] += products.triu() + products.triu(1).T  # to the last bit symmetric, as `state` is kept

    def values(self, features: Tensor, mask: Tensor, fold: Tensor) -> Tensor:
        """V of every prefix in two parts, from the prompts of other folds.

        Args:
            features: (N, L, F) of `token_features`.
            mask: (N, L) bool, true on drawn tokens.
            fold: (N,) of `prompt_folds`.

        Returns:
            (N, L, 2) float64: entropy to go in nats and tokens to go. V of the centred entropy is
            the first minus h times the
            second (`centred`). 0 where `mask` is false, and everywhere in a fold whose others have
            no tokens yet.
        """
        out = torch.zeros((*mask.shape, 2), dtype=torch.float64, device=mask.device)
        for f in fold.unique().tolist():
            weights = self._fit(f).to(mask.device)
            rows = (fold == f).nonzero()[:, 0]
            out[rows] = (features[rows].double() @ weights[:-1] + weights[-1]) * mask[rows][..., None]
        return out

    def _fit(self, fold: int) -> Tensor:
        """(F + 1, 2) weights of the features and the constant, from all folds but this one."""
        others = torch.arange(self.folds) != fold
        sums = self._sums[others].sum(0)
        size, count = sums.shape[0] - 3, float(sums[-3, -3])
        if count <= 1.0:
            return torch.zeros(size + 1, 2, dtype=torch.float64)
        means = sums[-3] / count
        covariances = sums / count - means[:, None] * means
        spread = covariances.diagonal()[:size].clamp(min=0).sqrt()
        # A feature that is constant but for rounding says nothing.
        known = spread > 1e-7 * (covariances.diagonal() + means.square())[:size].clamp(min=0).sqrt()
        scale = torch.where(known, 1 / spread.clamp(min=1e-300), 0.0)
        gram = covariances[:size, :size] * scale[:, None] * scale
        target = covariances[:size, -2:] * scale[:, None]
        slopes = torch.linalg.solve(gram + self._ridge * torch.eye(size, dtype=torch.float64), target)
        slopes = slopes * scale[:, None]
        return torch.cat([slopes, (means[-2:] - means[:size] @ slopes)[None]])

    # ------------------------------------------------------------------ for a trainer's state
    def state(self) -> dict[str, Any]:
        """Small tensors and numbers, for `load`."""
        return {"sums": self._sums.clone()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: sums that are not those of a critic of this shape, or not finite.
        """
        sums = state.get("sums")
        if not isinstance(sums, Tensor) or sums.shape != self._sums.shape or sums.dtype != torch.float64:
            raise ValueError(f"a critic's sums must be float64 of shape {tuple(self._sums.shape)}")
        if not bool(torch.isfinite(sums).all()) or bool((sums.diagonal(dim1=1, dim2=2) < 0).any()):
            raise ValueError("a critic's sums of squares must be finite and not negative")
        self._sums = sums.clone()


def centred(values: Tensor, centre: float) -> Tensor:
    """(N, L) V of the entropy to go around `centre` (nats per token), from the (N, L, 2) of
    `EntropyCritic.values`.
    """
    return values[..., 0] - centre * values[..., 1]


def explained_variance(values: Tensor, entropies: Tensor, mask: Tensor, centre: float) -> float:
    """R^2 of (N, L) V over the drawn tokens: 1 - sum (G_k - V)^2 / sum (G_k - mean G)^2.

    NaN where G does not vary.
    """
    to_go = ((entropies.double() - centre) * mask).flip(1).cumsum(1).flip(1)[mask]
    spread = (to_go - to_go.mean()).square().sum()
    return float(1 - (to_go - values[mask]).square().sum() / spread) if float(spread) > 0 else float("nan")

"""Losses that weigh the tokens of a sequence apart: the rules of the literature, each with its formula, as gamma of log pi.

    loss' = -sum_i sum_k gamma_ik log pi_ik          gamma_ik = w_i: as trained;  L = log pi + H, s = -log pi

    top entropy   gamma = w on the fifth of tokens of highest H                        Wang et al. 2025, top_entropy_quantile
    Clip-Cov      gamma = 0 on the tokens of highest (log pi - mean)(A - mean)         Cui et al. 2025, their clipped tokens
    STEER         gamma = w 2^(-d / max d),  d = |A pi (1 - pi) L|                     Hao et al. 2025: their estimate
    STARE         gamma = 1.1 w on the tenth of highest s among tokens of A > 0        Luo et al. 2026, arXiv 2606.19236, O1
                      and 0.9 w on the tenth of highest s among tokens of A < 0        their C2, two-sided
    REPO-R        gamma = w max(0, 1 - zeta sign(A) L)                                 Petrenko et al. 2026, arXiv 2603.11682
    decorrelated  gamma = w - beta L, beta so that gamma and L do not covary           after REPO, who tune beta
    KL            gamma = w - (b / tokens)(1 - pi_ref / pi)                            k3 (Schulman 2020), as GRPO's beta

All coefficients are frozen: they stand where a trainer's loss has a detached factor. STARE acts while entropy is below a target;
here it acts. The shape of STEER's weight is ours. Clip-Cov draws some of the tokens of highest covariance, here all of them are
taken. Implementations of REPO put log pi in place of L. Symbols: w weight, A advantage of the sequence, pi probability of the
token, H entropy of its context.
Source: docs/analyses/prices.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_core.predictors import steer_token_changes

TOP_ENTROPY = 0.2
COVARIANT_TOKENS = 0.02
STARE_TOKENS = 0.1
STARE_POSITIVE, STARE_NEGATIVE = 1.1, 0.9
REPO_ZETA = 0.1


@dataclass(frozen=True)
class RuleTokens:
    """mask: (N, L) bool, completion tokens. logprob, entropy: (N, L) float64, nats. weights, advantages: (N, L) float64, those of
    each token's sequence.
    """

    mask: Tensor
    logprob: Tensor
    entropy: Tensor
    weights: Tensor
    advantages: Tensor

    def highest(self, values: Tensor, among: Tensor, fraction: float) -> Tensor:
        """(N, L) bool: `fraction` of the tokens `among`, rounded, at least one: those of highest value; ties all count."""
        if not bool(among.any()):
            return among
        count = max(1, round(fraction * int(among.sum())))
        return among & (values >= values[among].topk(count).values[-1])


Rule = Callable[[RuleTokens], Tensor | str]
"""(N, L) coefficients of log pi, or why there are none."""


def top_entropy(tokens: RuleTokens) -> Tensor | str:
    """w on the tokens of highest entropy, 0 elsewhere."""
    return tokens.weights * tokens.highest(tokens.entropy, tokens.mask, TOP_ENTROPY)


def clip_cov(tokens: RuleTokens) -> Tensor | str:
    """0 on the tokens of highest covariance."""
    mask, logprob, advantage = tokens.mask, tokens.logprob, tokens.advantages
    covariance = (logprob - logprob[mask].mean()) * (advantage - advantage[mask].mean())
    if not bool(covariance[mask].any()):
        return "all tokens have the same advantage, or the same log-probability"
    return tokens.weights * ~tokens.highest(covariance, mask, COVARIANT_TOKENS)


def steer(tokens: RuleTokens) -> Tensor | str:
    """w, halved where the estimated change of entropy is largest."""
    change = steer_token_changes(tokens.logprob, tokens.entropy, tokens.mask, tokens.advantages[:, 0], 1.0).abs()
    largest = change[tokens.mask].max()
    if not largest > 0:
        return "no token is estimated to change entropy"
    return tokens.weights * torch.exp2(-change / largest)


def stare(tokens: RuleTokens) -> Tensor | str:
    """w, raised on rare tokens of rewarded sequences."""
    rewarded = tokens.mask & (tokens.advantages > 0)
    if not bool(rewarded.any()):
        return "no sequence has a positive advantage"
    rare = tokens.highest(-tokens.logprob, rewarded, STARE_TOKENS)
    return torch.where(rare, STARE_POSITIVE * tokens.weights, tokens.weights)


def stare_two_sided(tokens: RuleTokens) -> Tensor | str:
    """`stare`, and lowered on rare tokens of punished sequences."""
    raised, punished = stare(tokens), tokens.mask & (tokens.advantages < 0)
    if isinstance(raised, str) or not bool(punished.any()):
        return raised if isinstance(raised, str) else "no sequence has a negative advantage"
    rare = tokens.highest(-tokens.logprob, punished, STARE_TOKENS)
    return torch.where(rare, STARE_NEGATIVE * tokens.weights, raised)


def repo_r(tokens: RuleTokens) -> Tensor | str:
    """w, raised on rare tokens of rewarded sequences and lowered on rare tokens of punished ones."""
    own = tokens.logprob + tokens.entropy
    return tokens.weights * (1 - REPO_ZETA * tokens.advantages.sign() * own).clamp(min=0)


def decorrelated(tokens: RuleTokens) -> Tensor | str:
    """w less its covariance with log pi + H."""
    own, mask = tokens.logprob + tokens.entropy, tokens.mask
    centred = own - own[mask].mean()
    beta = float((centred[mask] * tokens.weights[mask]).sum() / centred[mask].square().sum())
    if not math.isfinite(beta):
        return "all tokens have the same surprisal beside their entropy"
    return tokens.weights - beta * own


def kl_pull(logprob: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """(N, L) coefficients of log pi whose sum is the gradient of minus the mean k3 estimate over completion tokens.

    Args:
        logprob, reference: (N, L) of the policy and of the reference, nats.
        mask: (N, L) bool.
    """
    return mask * ((reference.double() - logprob.double()).exp() - 1) / mask.sum()


RULES: dict[str, tuple[str, Rule]] = {
    "top_entropy": (f"the {TOP_ENTROPY:.0%} of tokens of highest entropy alone", top_entropy),
    "clip_cov": (f"without the {COVARIANT_TOKENS:.0%} of tokens of highest covariance", clip_cov),
    "steer": ("tokens down-weighted by STEER's estimate", steer),
    "stare": ("STARE, one-sided", stare),
    "stare_two_sided": ("STARE, two-sided", stare_two_sided),
    "repo_r": (f"REPO-R, ζ = {REPO_ZETA:g}", repo_r),
    "decorrelated": ("weights decorrelated from log π (after REPO)", decorrelated),
}
"""name -> (label, rule), in the order of the list."""

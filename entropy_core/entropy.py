"""Entropy of a policy, and four estimators of its gradient.

    H   = E[sum_k H_k] = -E[S]                 nats per completion ("sequence entropy")
    h   = E[sum_k H_k] / E[T]                  nats per token      (what trainers plot)

Every estimator of a gradient here is the derivative of one sum over completion tokens with frozen
coefficients,

    grad = d/dtheta  (1/Z) sum_t sum_k [ alpha_k H_k + gamma_k log pi_k ],        Z = n (for H) or sum_t T_t (for h):

    rao_blackwell    alpha = 1,  gamma_k = sum_{k' >= k} H_k'           (h: H_k' - h in place of H_k')
    split            alpha = 1,  gamma_k = sum_k' H_k' - H              (h: sum_k' H_k' - h T)
    score_function   alpha = 0,  gamma_k = -(S - b)                     (h: S + h T in place of S)
    fixed_prefix     alpha = 1,  gamma_k = 0

The first three estimate the gradient of H (or h). The last is *another estimand*: how entropy moves
on given tokens, blind to which prefixes become likelier. For h, centring by h is the gradient of
the denominator E[T].

Sequences may carry weights omega_t (importance weights, of mean 1): sums over sequences are then
weighted sums, h and H are weighted means, and Z is n or sum_t omega_t T_t.

Symbols: t a completion of T tokens, S = sum_k log pi_k its score, H_k its token entropies, b a
baseline: the mean over the other completions of the same prompt, or over the other sequences where
a prompt has one completion.
Source: docs/theory/entropy-gradient.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.scores import TokenStatistics

Estimator = Literal["rao_blackwell", "split", "score_function", "fixed_prefix"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)


@dataclass(frozen=True)
class EntropyEstimate:
    """Entropy on a batch: `per_token` h (nats per token), `per_completion` H, and `surprisal` =
    mean of -S (estimates H too).
    """

    per_token: float
    per_completion: float
    surprisal: float


@dataclass(frozen=True)
class TokenCoefficients:
    """Frozen weights of one differentiable sum: `entropy` on H_k and `logprob` on log pi_k, both
    (N, L), 0 off completions.
    """

    entropy: Tensor
    logprob: Tensor

    def scaled(self, factor: float) -> TokenCoefficients:
        return TokenCoefficients(self.entropy * factor, self.logprob * factor)


def entropy_estimate(statistics: TokenStatistics, batch: SequenceBatch) -> EntropyEstimate:
    """h, H and the surprisal of a batch drawn from the policy that `statistics` belong to.

    Examples:
        >>> estimate = entropy_estimate(token_statistics(model, batch), batch)
        >>> 0 < estimate.per_token <= math.log(8)
        True
    """
    sums = statistics.entropy_sums()
    return EntropyEstimate(
        per_token=float(sums.sum() / batch.completion_lengths.sum()),
        per_completion=float(sums.mean()),
        surprisal=float(-statistics.scores().mean()),
    )


def score_coefficients(batch: SequenceBatch, weights: Tensor | None = None) -> TokenCoefficients:
    """Coefficients whose sum is sum_t weights_t S_t (weights (N,), default 1): its gradient is
    sum_t weights_t dS_t.
    """
    logprob = batch.completion_mask.double()
    if weights is not None:
        logprob = logprob * weights.double()[:, None]
    return TokenCoefficients(torch.zeros_like(logprob), logprob)


def normalized_weights(log_weights: Tensor) -> Tensor:
    """(N,) float64 weights of mean 1 from log-weights, e.g. log-ratios of today's policy to the one
    that drew the sequences.
    """
    return torch.softmax(log_weights.double(), 0) * len(log_weights)  # no exp that could overflow


def effective_sample_size(weights: Tensor) -> float:
    """(sum omega)^2 / sum omega^2: how many equally weighted sequences carry as much; N for equal
    weights.
    """
    return float(weights.double().sum().square() / weights.double().square().sum())


def entropy_coefficients(
    statistics: TokenStatistics,
    batch: SequenceBatch,
    estimator: Estimator = "rao_blackwell",
    per_token: bool = True,
    weights: Tensor | None = None,
) -> TokenCoefficients:
    """Coefficients of an estimator, normalised so that the *mean over sequences* of their gradients
    estimates the gradient.

    Args:
        per_token: the gradient of h (nats per token) if true, of H (nats per completion) if false.
        weights: (N,) of mean 1, for sequences drawn from another distribution.

    Raises:
        ValueError: an unknown estimator, or for a score-function baseline with a single sequence.
    """
    mask = batch.completion_mask
    omega = torch.ones(len(batch), dtype=torch.float64, device=batch.device) if weights is None else weights.double()
    lengths = batch.completion_lengths.double()
    entropies = statistics.entropies.double()
    sums = entropies.sum(1)
    h = (omega * sums).sum() / (omega * lengths).sum()
    ones = mask.double()
    if estimator == "rao_blackwell":
        centred = (entropies - h) * mask if per_token else entropies
        alpha, gamma = ones, centred.flip(1).cumsum(1).flip(1) * mask
    elif estimator == "split":
        centre = h * lengths if per_token else (omega * sums).mean()
        alpha, gamma = ones, (sums - centre)[:, None] * mask
    elif estimator == "score_function":
        value = statistics.scores() + (h * lengths if per_token else 0.0)
        alpha, gamma = torch.zeros_like(ones), -(value - leave_one_out_mean(value, batch.prompt_index))[:, None] * mask
    elif estimator == "fixed_prefix":
        alpha, gamma = ones, torch.zeros_like(ones)
    else:
        raise ValueError(f"unknown estimator {estimator!r}: choose one of {', '.join(ESTIMATORS)}")
    factor = omega * (len(batch) / (omega * lengths).sum()) if per_token else omega
    return TokenCoefficients(alpha * factor[:, None], gamma * factor[:, None])


def leave_one_out_mean(values: Tensor, prompt_index: Tensor) -> Tensor:
    """(N,) mean of `values` over the other completions of the same prompt; over all others where
    there are none.

    Leaving the sequence itself out keeps a score-function estimate unbiased.
    """
    if len(values) < 2:
        raise ValueError(
            "a leave-one-out baseline needs at least two sequences; use the rao_blackwell estimator for one"
        )
    _, group = prompt_index.unique(return_inverse=True)
    counts = torch.bincount(group).to(values.dtype)
    totals = torch.zeros_like(counts).index_add_(0, group, values)
    same_prompt = (totals[group] - values) / (counts[group] - 1).clamp(min=1)
    others = (values.sum() - values) / (len(values) - 1)
    return torch.where(counts[group] > 1, same_prompt, others)

"""The change of entropy that an update made, from log-probabilities and entropies before and after
it: forward passes alone.

    rho_k  = pi'(a_k | c_k) / pi(a_k | c_k)
    dh     = [ sum_t sum_k (H'_k - H_k) + sum_t sum_k (rho_k - 1) A_k ] / [ sum_t T_t + sum_t sum_k (rho_k - 1) B_k ]

A_k are advantages of the entropy to go (entropy_core.temporal_differences) with the entropy *after*
the update as the reward, centred by h before it; B_k those of the number of tokens to go, so that
the denominator is the mean length after the update. The first sum is the entropy's change on given
tokens, the second what comes of tokens that became likelier. Unlike weights of whole sequences,
ratios of tokens stay near 1: there is no effective sample size to lose.

With decay 1 the first order in the update is exact for any V of c_k; what is left out is of second
order: the prefixes c_k are drawn from pi and not pi'. (By the identity E_pi'[sum r'] - E_pi[sum r']
= E_pi'[sum_k A_k], Kakade & Langford 2002.)

Symbols: pi, H_k, h before, pi', H'_k after the update; t a completion of T_t drawn tokens a_k at
prefixes c_k. Units: nats.
Source: docs/theory/entropy-critic.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients
from entropy_core.scores import TokenStatistics
from entropy_core.temporal_differences import entropy_advantages, temporal_difference_advantages
from entropy_core.uncertainty import effective_degrees_of_freedom, jackknife_standard_error, sums_over_prompts

# A single token's ratio beyond this is no small step's: it is held there, and the step counts as
# too long.
_LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class TokenRatioChange:
    """dh of the module's docstring.

    Attributes:
        change: nats per token.
        standard_error: over prompts, by a jackknife of the whole statistic (centre and lengths
            included).
        degrees_of_freedom: behind it.
        fixed_prefix: the change on given tokens alone, nats per token: another estimand.
        left_out: (B,) `change` with each prompt left out, prompts in ascending order of index.
    """

    change: float
    standard_error: float
    degrees_of_freedom: float
    fixed_prefix: float
    left_out: Tensor = field(compare=False, repr=False)


def token_ratio_change(
    before: TokenStatistics,
    after: TokenStatistics,
    batch: SequenceBatch,
    values: Tensor | None = None,
    decay: float = 1.0,
    log_weights: Tensor | None = None,
) -> TokenRatioChange:
    """Change of h (nats per token) from one pass before and one after an update.

    Args:
        before, after: statistics of `batch` under both policies.
        batch: sequences drawn by the policy before, or weighted to it.
        values: (N, L, 2) of `EntropyCritic.values`, fitted without these sequences; None for V = 0.
        decay: lambda in [0, 1] of the advantages.
        log_weights: (N,) log-ratio of the policy before to the one that drew the batch; None where
            it drew it.

    Returns:
        The change with its error.

    Raises:
        ValueError: log-probabilities that are not finite before or after, naming the sequence.
    """
    return _with_error(_change, sequence_sums(before, after, batch, values, decay), batch, log_weights)


def token_ratio_derivative(
    statistics: TokenStatistics,
    derivatives: TokenStatistics,
    batch: SequenceBatch,
    values: Tensor | None = None,
    decay: float = 1.0,
    log_weights: Tensor | None = None,
) -> TokenRatioChange:
    """Derivative of `token_ratio_change` in the update, at none, with its error over prompts.

        D dh = [ sum_t sum_k D H_k + sum_t sum_k A_k D log pi(a_k) - h sum_t sum_k B_k D log pi(a_k) ] / sum_t T_t

    Args:
        statistics: of `batch` under the policy before the update.
        derivatives: along the update (entropy_core.directional.token_derivatives).
        batch, values, decay, log_weights: as in `token_ratio_change`.

    Returns:
        The change to first order; that of each prompt's part has its own h and lengths left out
        with it.
    """
    mask = batch.completion_mask
    of_entropy, of_length = _advantages(statistics.entropies, mask, values, decay)
    along, change = derivatives.logprobs.double() * mask, derivatives.entropies.double() * mask
    columns = (statistics.entropies.double() * mask, mask.double(), change, along * of_entropy, along * of_length)
    return _with_error(_derivative, torch.stack([column.sum(1) for column in columns], 1), batch, log_weights)


def _with_error(
    statistic: Callable[[Tensor], Tensor], numbers: Tensor, batch: SequenceBatch, log_weights: Tensor | None
) -> TokenRatioChange:
    """A statistic (...,) of (..., 5) sums over sequences, with its jackknife over prompts; numbers: (N, 5)."""
    weights = torch.ones(len(batch), dtype=torch.float64, device=batch.device)
    if log_weights is not None:
        weights = torch.softmax(log_weights.double(), 0) * len(batch)
    by_prompt = sums_over_prompts(numbers * weights[:, None], batch.prompt_index)
    total = by_prompt.sum(0)
    left_out = statistic(total - by_prompt)
    pseudo = left_out - left_out.mean()
    return TokenRatioChange(
        change=float(statistic(total)),
        standard_error=jackknife_standard_error(left_out),
        degrees_of_freedom=effective_degrees_of_freedom(pseudo.cpu()),
        fixed_prefix=float(total[2] / total[1]),
        left_out=left_out,
    )


def change_coefficients(
    statistics: TokenStatistics,
    batch: SequenceBatch,
    values: Tensor | None = None,
    decay: float = 1.0,
    weights: Tensor | None = None,
) -> TokenCoefficients:
    """Coefficients of the gradient that `token_ratio_change` is the finite form of: its derivative in the update, at none.

    Args:
        statistics: of `batch` under the policy whose gradient of h is wanted.
        batch, values, decay: as in `token_ratio_change`.
        weights: (N,) of mean 1, for sequences that another policy drew.

    Returns:
        1 on H_k and A_k - h B_k on log pi_k, normalised so that the *mean over sequences* of their gradients is that of h.
    """
    mask = batch.completion_mask
    omega = torch.ones(len(batch), dtype=torch.float64, device=batch.device) if weights is None else weights.double()
    tokens = (omega * batch.completion_lengths.double()).sum()
    h = (omega * statistics.entropies.double().sum(1)).sum() / tokens
    of_entropy, of_length = _advantages(statistics.entropies, mask, values, decay)
    factor = (omega * (len(batch) / tokens))[:, None]
    return TokenCoefficients(mask.double() * factor, (of_entropy - h * of_length) * factor)


def sequence_sums(
    before: TokenStatistics, after: TokenStatistics, batch: SequenceBatch, values: Tensor | None, decay: float
) -> Tensor:
    """What each sequence adds to the sums that `token_ratio_change` is made of.

    Args:
        before, after, batch, values, decay: as there.

    Returns:
        (N, 5) float64: sum_k H_k, T, sum_k (H'_k - H_k), sum_k (rho_k - 1) A_k with uncentred
        rewards, sum_k (rho_k - 1) B_k.

    Raises:
        ValueError: log-probabilities that are not finite.
    """
    mask = batch.completion_mask
    log_ratio = (after.logprobs.double() - before.logprobs.double()) * mask
    if not bool(torch.isfinite(log_ratio).all()):
        bad = int((~torch.isfinite(log_ratio)).any(1).nonzero()[0, 0])
        raise ValueError(f"sequence {bad}: its log-probability is not finite before or after the update")
    moved = torch.expm1(log_ratio.clamp(max=_LARGEST_LOG_RATIO))
    of_entropy, of_length = _advantages(after.entropies, mask, values, decay)
    change = (after.entropies.double() - before.entropies.double()) * mask
    columns = (before.entropies.double() * mask, mask.double(), change, moved * of_entropy, moved * of_length)
    return torch.stack([column.sum(1) for column in columns], 1)


def _advantages(entropies: Tensor, mask: Tensor, values: Tensor | None, decay: float) -> tuple[Tensor, Tensor]:
    """(N, L) A_k with uncentred rewards, and B_k."""
    to_go, tokens_to_go = (None, None) if values is None else (values[..., 0], values[..., 1])
    # Without values the own entropy is noise that nothing takes off; its term has mean zero.
    own = values is not None
    of_entropy = entropy_advantages(entropies, mask, 0.0, to_go, decay, own)
    of_length = temporal_difference_advantages(mask.double(), mask, tokens_to_go, decay)
    return of_entropy, of_length - (0.0 if own else mask.double())


def _change(sums: Tensor) -> Tensor:
    """(...,) dh of (..., 5) sums over sequences: advantages are linear in their centre, so h is put
    in at the end.
    """
    entropy, tokens, fixed, ratio, length = sums.unbind(-1)
    h = entropy / tokens
    return (fixed + ratio - h * length) / (tokens + length)


def _derivative(sums: Tensor) -> Tensor:
    """(...,) D dh of (..., 5) sums of derivatives: `_change` to first order, where its numerator is 0."""
    entropy, tokens, fixed, ratio, length = sums.unbind(-1)
    return (fixed + ratio - entropy / tokens * length) / tokens

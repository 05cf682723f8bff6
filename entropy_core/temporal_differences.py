"""Advantages of the entropy to go: what one token did to the entropy that comes after it.

    r_k       = H_k - h                                       the entropy as the reward, centred (theory: gradient of h)
    delta_k   = r_k + V(c_{k+1}) - V(c_k)                     V(c_{T+1}) = 0
    A_k       = sum_{j >= 0} decay^j delta_{k+j}              decay in [0, 1] is GAE's lambda; no discount

    E[T] grad h = E[sum_k grad H_k] + E[sum_k A_k grad log pi(a_k | c_k)]

exact at decay = 1 for every V that is a function of c_k alone (A_k is then G_k - V(c_k), G_k the
centred entropy to go), and at every decay where V is the true value V*(c_k) = E[G_k | c_k].
Otherwise the bias of the second term is

    E[sum_k (1 - decay) sum_{j >= 1} decay^(j-1) (V - V*)(c_{k+j}) grad log pi(a_k | c_k)].

Symbols: a_k token k of a completion, c_k all that stands before it, H_k the policy's entropy at
c_k, T drawn tokens in all. k + 1 is the next *drawn* token: what an environment inserts in between
belongs to c_{k+1}. Units: nats.
Source: Schulman et al. 2016 (generalised advantage estimation), with the entropy as the reward;
docs/theory/entropy-critic.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def temporal_difference_advantages(rewards: Tensor, mask: Tensor, values: Tensor | None, decay: float) -> Tensor:
    """Exponentially weighted temporal differences, over drawn tokens alone.

    Args:
        rewards: (N, L) r_k; read where `mask` is true.
        mask: (N, L) bool, true on drawn tokens, in one run or several.
        values: (N, L) V(c_k); None for V = 0.
        decay: lambda in [0, 1]. 1 sums all rewards from k on and takes V(c_k) off; 0 looks one
            token ahead.

    Returns:
        (N, L) float64, 0 where `mask` is false. Linear in (rewards, values) jointly.

    Raises:
        ValueError: `decay` outside [0, 1].
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay (lambda) must lie in [0, 1], not {decay}")
    out = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    rewards = rewards.double()
    values = torch.zeros_like(out) if values is None else values.double()
    advantage = next_value = torch.zeros(len(mask), dtype=torch.float64, device=mask.device)
    for column in range(mask.shape[1] - 1, -1, -1):
        drawn, value = mask[:, column], values[:, column]
        here = rewards[:, column] + next_value - value + decay * advantage
        out[:, column] = torch.where(drawn, here, 0.0)
        # A foreign token in between is passed over: the next drawn one stays the next.
        advantage = torch.where(drawn, here, advantage)
        next_value = torch.where(drawn, value, next_value)
    return out


def entropy_advantages(
    entropies: Tensor,
    mask: Tensor,
    centre: float,
    values: Tensor | None = None,
    decay: float = 1.0,
    own_entropy: bool = True,
) -> Tensor:
    """A_k of the module's docstring.

    Args:
        entropies: (N, L) H_k in nats, read where `mask` is true.
        mask: (N, L) bool, true on drawn tokens.
        centre: h in nats per token; 0 for the gradient of H (nats per completion).
        values: (N, L) V(c_k), e.g. `EntropyCritic.values`; it must not depend on a_k or what comes
            after. None for V = 0.
        decay: lambda in [0, 1].
        own_entropy: whether r_k stays in A_k. It is a function of c_k, so that its term has mean
            zero either way: without values leave it out (Rao-Blackwell without its own H_k, the
            quieter form), with values that know H_k keep it, for they take it off again.

    Returns:
        (N, L) float64, 0 where `mask` is false.
    """
    rewards = (entropies.double() - centre) * mask
    advantages = temporal_difference_advantages(rewards, mask, values, decay)
    return advantages if own_entropy else advantages - rewards

"""Two predictors of entropy change from the literature, computed from token statistics alone: no
gradients, no optimizer.

    covariance    dH = -lr Cov(log pi(a|c), pi(a|c) A)              a ~ pi; one step of policy gradient on a table of logits
                  dH = -lr Cov(log pi(a|c), A)                      the same for a step of natural policy gradient
    STEER         dH = mean_k  lr [ -A pi_k (1 - pi_k) (log pi_k + H_k) ]

Derivation. With z the logits of one context, dH/dz_a = -pi_a (log pi_a + H). Policy gradient moves
every logit by lr pi_a (A(a) - E A), the natural gradient by lr A(a); the covariances are the
resulting first-order changes, exact for that one context when E_pi[A] = 0. STEER follows one
sampled token: its own gradient moves the logits by lr A (e_a - pi), and of this move only the
sampled token's, lr A (1 - pi_a), is kept.

**Units.** lr is here a step in *logits*, each context having logits of its own. A model's step is
one in shared parameters, scaled by an optimizer: the numbers are nats per token on another scale
than that of a measured change, and only their sign and their correlation with it over many steps
can be compared.

Over a batch, both pool the tokens of all contexts, as the papers' implementations do. The pooled
covariance is then the mean of the contexts' own covariances plus the covariance of their means;
only the former stands in the derivation.

Symbols: pi_k = exp(log pi_k) the probability of completion token k, H_k the entropy of its
context's distribution, A the advantage of its sequence, as the loss uses it. Sources: Cui et al.
2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models" (the
covariances; Clip-Cov, KL-Cov); Hao et al. 2025, "Rethinking Entropy Interventions in RLVR: An
Entropy Change Perspective" (STEER). docs/analyses/baselines.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def covariance_predictor(
    logprobs: Tensor, mask: Tensor, advantages: Tensor, learning_rate: float, natural_gradient: bool = False
) -> float:
    """-lr Cov(log pi, pi A) over all completion tokens: nats per token for a step in logits, of
    which only the sign, and the correlation over steps, compare with a measured change.

    Args:
        logprobs: (N, L) log pi(a_k|c_k), nats.
        mask: (N, L) bool, true on completion tokens.
        advantages: (N,) A_i as the loss uses them, of mean zero under the policy (a constant added
            to A moves no policy in expectation, but it moves this number).
        natural_gradient: Cov(log pi, A) instead, the form behind Clip-Cov and KL-Cov. The
            covariance of M tokens is the mean of M products.

    Raises:
        ValueError: shapes that disagree, no completion token, or values on completion tokens that
            are not finite.
    """
    chosen, advantage = _tokens(mask, advantages, logprobs=logprobs)
    (logprob,) = chosen
    moved = advantage if natural_gradient else logprob.exp() * advantage
    covariance = ((logprob - logprob.mean()) * (moved - moved.mean())).mean()
    return float(-learning_rate * covariance)


def steer_predictor(
    logprobs: Tensor, entropies: Tensor, mask: Tensor, advantages: Tensor, learning_rate: float
) -> float:
    """Mean of `steer_token_changes` over completion tokens: nats per token for a step in logits, of
    which only the sign, and the correlation over steps, compare with a measured change.

    Arguments and errors as there.
    """
    changes = steer_token_changes(logprobs, entropies, mask, advantages, learning_rate)
    return float(changes.sum() / mask.sum())


def steer_token_changes(
    logprobs: Tensor, entropies: Tensor, mask: Tensor, advantages: Tensor, learning_rate: float
) -> Tensor:
    """(N, L) float64 lr [-A pi (1 - pi)(log pi + H)], nats, 0 off completions.

    The first-order change of a context's entropy when the logit of its sampled token a alone moves by lr A (1 - pi_a). The
    token's full gradient lr A (e_a - pi) moves the other logits too, which would add  lr A sum_{b != a} pi_b^2 (log pi_b
    + H): the rest of the vocabulary, which log pi_a and H alone cannot give.

    Args:
        logprobs, entropies: (N, L) log pi(a_k|c_k) and H_k, nats.
        mask: (N, L) bool.
        advantages: (N,) A_i as the loss uses them.

    Raises:
        ValueError: as `covariance_predictor` does.
    """
    (logprob, entropy), advantage = _tokens(mask, advantages, logprobs=logprobs, entropies=entropies)
    probability = logprob.exp()
    # 1 - pi as -expm1(log pi): exact where the policy is nearly certain, which late in training is
    # everywhere.
    return _scatter(mask, -learning_rate * advantage * probability * -torch.expm1(logprob) * (logprob + entropy))


def _tokens(mask: Tensor, advantages: Tensor, **values: Tensor) -> tuple[list[Tensor], Tensor]:
    """The (M,) float64 values of all completion tokens, and the advantage of each one's sequence."""
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"mask must be (N, L) bool, not {tuple(mask.shape)} {mask.dtype}")
    for name, tensor in values.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, mask {tuple(mask.shape)}: they must agree")
    if advantages.shape != mask.shape[:1]:
        raise ValueError(
            f"advantages is {tuple(advantages.shape)}, but there are {mask.shape[0]} sequences: give one each"
        )
    if not bool(mask.any()):
        raise ValueError("mask marks no completion token: there is nothing to predict from")
    chosen = {name: tensor.double()[mask] for name, tensor in values.items()}
    chosen["advantages"] = advantages.double()[:, None].expand(mask.shape)[mask]
    for name, tensor in chosen.items():
        if not bool(torch.isfinite(tensor).all()):
            bad = int((mask.nonzero()[:, 0])[~torch.isfinite(tensor)][0])
            raise ValueError(f"{name} of sequence {bad} holds a value that is not finite")
    advantage = chosen.pop("advantages")
    return list(chosen.values()), advantage


def _scatter(mask: Tensor, values: Tensor) -> Tensor:
    out = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    out[mask] = values
    return out

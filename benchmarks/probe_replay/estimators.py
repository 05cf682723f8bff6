"""Estimators of a step's change of h (nats per token), each as arithmetic on the same recorded tokens.

    dh = sum_i omega_i sum_k [ u_ik + v_ik A_ik ] / sum_i omega_i T_i

    tokens       u_k, v_k                                  what it takes
    along        D H_k, D log pi_k along the step          a gradient of entropy before the step (first order)
    crossed      the same, the batch's part of a sequence  gradients of the loss by prompt: no sequence meets its own gradient
                 from the other prompts alone, x B/(B-1)
    moved        H'_k - H_k, pi'_k/pi_k - 1                forward passes before and after the step, of any optimizer
    along_momentum, moved_momentum   the momentum's part alone (moved: from the batch's part to the whole step), times
                 (1 - b1^t)/(b1 (1 - b1^(t-1))): no sequence of the step is in it; AdamW's batch part is taken to be what the
                 earlier ones were on average

    A_k (what the token does to the entropy that follows it)
    split          sum_k' (H_k' - h)
    rao_blackwell  sum_{k' >= k} (H_k' - h);  `without_own` leaves H_k out, whose term has mean zero
    td             temporal differences with the critic's V (entropy_core.temporal_differences, entropy_core.critic)
    fixed_prefix   0: another estimand
    score          u = 0, A = -(S + h T - its mean over the prompt's other completions)

`moved` with `td` is entropy_core.token_ratios. h is that of the other prompts, so that no sequence is centred by
itself. Errors are jackknives over prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.probe_replay.tape import Estimated, Sequences, behind_prompt, ratio
from entropy_core.entropy import leave_one_out_mean
from entropy_core.scores import TokenStatistics
from entropy_core.temporal_differences import entropy_advantages
from entropy_core.token_ratios import token_ratio_change
from entropy_core.uncertainty import leave_one_prompt_out, sums_over_prompts
from rl_training.intervals import t_quantile

Tokens = Literal["along", "crossed", "along_momentum", "moved", "moved_momentum"]
Advantages = Literal["split", "rao_blackwell", "without_own", "td", "fixed_prefix", "score"]


@dataclass(frozen=True)
class Estimator:
    """decay: lambda of `td`; critic: False takes V = 0."""

    tokens: Tokens
    advantages: Advantages
    decay: float = 1.0
    critic: bool = True


def contributions(
    estimator: Estimator, s: Sequences, values: Tensor | None = None, changes: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """(N,) sum_k [u_k + v_k A_k] of every sequence.

    values: (N, T, 2) of the critic, for `td`. changes: (u, v) where they are of another step than the sequences' own.
    """
    u, v = token_changes(estimator.tokens, s) if changes is None else changes
    reward = s.entropy_after if estimator.tokens.startswith("moved") else s.entropy
    found = (v * _advantages(estimator, s, reward, values)).sum(1)
    return found if estimator.advantages == "score" else found + u.sum(1)


def statistic(estimator: Estimator, s: Sequences, values: Tensor | None = None) -> tuple[Estimated, Tensor]:
    """dh of the step with its jackknife over prompts, and its (B,) values with each prompt left out."""
    if estimator.tokens.startswith("moved") and estimator.advantages == "td":
        known = None if values is None or not estimator.critic else behind_prompt(values)
        before, after = s.statistics(), s.statistics(after=True)
        if estimator.tokens == "moved_momentum":
            before = TokenStatistics(*(behind_prompt(s.extra[f"{name}_batch"]) for name in ("logprob", "entropy")))
        found = token_ratio_change(before, after, s.batch, known, estimator.decay, s.log_weights)
        return Estimated(found.change, found.standard_error, t_quantile(found.degrees_of_freedom)), found.left_out
    x = contributions(estimator, s, values)
    left_out = leave_one_prompt_out(s.omega * x, s.prompt, s.omega * s.length)
    return ratio(s.omega * x, s.omega * s.length, s.prompt), left_out


def token_changes(tokens: Tokens, s: Sequences) -> tuple[Tensor, Tensor]:
    """(u, v), each (N, T)."""
    if tokens.startswith("moved"):
        logprob, entropy = s.logprob, s.entropy
        if tokens == "moved_momentum":
            logprob, entropy = s.extra["logprob_batch"], s.extra["entropy_batch"]
        return (s.entropy_after - entropy) * s.mask, torch.expm1(s.logprob_after - logprob) * s.mask
    assert s.entropy_along is not None and s.logprob_along is not None
    parts = slice(1, 3) if tokens == "along_momentum" else slice(0, 3)
    u, v = s.entropy_along[..., parts].sum(-1), s.logprob_along[..., parts].sum(-1)
    if tokens != "crossed":
        return u, v
    prompts = len(s.prompt.unique())
    others = prompts / (prompts - 1)
    # batch -> (batch - own prompt's) B/(B-1)
    crossed = [
        x + (others - 1) * along[..., 0] - others * along[..., 3]
        for x, along in ((u, s.entropy_along), (v, s.logprob_along))
    ]
    return crossed[0], crossed[1]


def _other_mean(s: Sequences) -> Tensor:
    """(N,) h of the sequences of other prompts; of all where there is one prompt."""
    columns = torch.stack([s.omega * s.entropy.sum(1), s.omega * s.length], 1)
    of_prompt = sums_over_prompts(columns, s.prompt)
    _, group = s.prompt.unique(return_inverse=True)
    others = columns.sum(0) - of_prompt if len(of_prompt) > 1 else of_prompt
    return (others[:, 0] / others[:, 1])[group]


def _advantages(estimator: Estimator, s: Sequences, reward: Tensor, values: Tensor | None) -> Tensor:
    """(N, T) A_k; linear in h, which differs by prompt: once for the entropy, once for the tokens it is centred by."""
    kind, h, ones = estimator.advantages, _other_mean(s)[:, None], s.mask.double()
    if kind == "fixed_prefix":
        return torch.zeros_like(reward)
    if kind == "score":
        value = s.logprob.sum(1) + h[:, 0] * s.length
        return -(value - leave_one_out_mean(value, s.prompt))[:, None] * ones
    if kind == "split":
        return (reward * ones - h * ones).sum(1, keepdim=True) * ones
    known = values if kind == "td" and estimator.critic else None
    decay = estimator.decay if kind == "td" else 1.0
    own = known is not None if kind == "td" else kind == "rao_blackwell"
    of_entropy, of_tokens = (
        entropy_advantages(x, s.mask, 0.0, None if known is None else known[..., i], decay, own)
        for i, x in enumerate((reward, ones))
    )
    return of_entropy - h * of_tokens


def momentum_scale(step: int, beta1: float = 0.9) -> float:
    """What turns the momentum's part of AdamW's step (from 1) into the whole of it, were this gradient the mean of earlier ones.

    The step is -lr P [b1 m + (1 - b1) g]/(1 - b1^t) with m = (1 - b1^(t-1)) times their weighted mean.
    """
    return (1 - beta1**step) / (beta1 * (1 - beta1 ** (step - 1)))

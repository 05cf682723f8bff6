"""What could have been done in place of the step as trained: each intervention as a change of the loss or of the optimizer.

    loss' = -sum_i sum_k [ gamma_ik log pi_ik + alpha_ik H_ik ]          gamma = w_i, alpha = 0: as trained

Token coefficients are frozen, as in a trainer's loss on sequences of its own policy, where every ratio is 1:

    positives / negatives   gamma = w_i (w_i > 0), w_i (w_i < 0), lambda w_i + ...            NSR, PSR, W-REINFORCE
    top entropy             gamma = w_i on the fifth of tokens of highest H                   TRL's top_entropy_quantile
    highest covariance      gamma = 0 on the tokens of highest (log pi - mean)(A - mean)      Clip-Cov, its clipped tokens
    STEER's estimate        gamma = w_i exp(-d_k ln 2 / max d), d = |A pi (1 - pi)(log pi + H)|
    decorrelated            gamma = w_i - beta (log pi + H), beta so that it does not covary with log pi + H     after REPO
    entropy bonus           alpha = c / tokens                                                TRL's entropy_coef
    KL to the reference     gamma = w_i - (b / tokens)(1 - pi_ref / pi)                       k3, an adapter's base model
    schemes                 gamma = the weights of GRPO, RLOO, ...                            entropy_core.weighting

Bounds on the ratio (clip-higher, clip-lower) and KL-Cov's penalty have no gradient at ratio 1: they are in the list with that
reason. Sources: Zhu et al. 2025 (negative reinforcement), Wang et al. 2025 (high-entropy tokens), Cui et al. 2025, Hao et al.
2025, docs/analyses/prices.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients
from entropy_core.passes.settings import PassSettings
from entropy_core.predictors import steer_token_changes
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_core.weighting import sequence_weights
from entropy_experiments.analyses.candidate_weights import SCHEMES

BONUSES = (0.001, 0.01)
KL_COEFFICIENTS = (0.001, 0.04)
POSITIVE_WEIGHT = 0.1
TOP_ENTROPY = 0.2
COVARIANT_TOKENS = 0.02
LEFT_OUT = (1, 4)
MOST_INTERVENTIONS = 17 + len(SCHEMES)
"""Rows that are priced at most, the step as trained and the solved bonus among them."""
TOKEN_GRADIENTS = 6 + len(BONUSES) + len(KL_COEFFICIENTS)
"""Backward passes over the training sequences: interventions that are no weights of sequences."""
BONUS_THAT_HOLDS = "entropy_bonus_that_holds"
ON_POLICY = "changes nothing here: every step trains on sequences of its own policy, where all ratios are 1"


@dataclass(frozen=True)
class Intervention:
    """One row of the price list.

    objective: what the step ascends, as (n_train,) weights of sequences or as token coefficients; None where `reason` says why
    it is not priced. learning_rate_factor, keeps_momentum: changes of the optimizer.
    """

    name: str
    label: str
    objective: Tensor | TokenCoefficients | None = None
    learning_rate_factor: float = 1.0
    keeps_momentum: bool = True
    reason: str | None = None


@dataclass(frozen=True)
class TrainingTokens:
    """What interventions are made of.

    weights, advantages: (n_train,) of the loss. rewards: (n_train,), NaN where unknown. truncated: (n_train,) bool. costliest:
    sequences from the one that lowers entropy most on, chosen on prompts that take no part in the prices; None: not known.
    """

    batch: SequenceBatch
    statistics: TokenStatistics
    weights: Tensor
    advantages: Tensor
    rewards: Tensor
    truncated: Tensor
    max_completion_length: int | None
    costliest: Tensor | None = None


def interventions(tokens: TrainingTokens, reference: Callable[[], TokenStatistics] | str) -> Iterator[Intervention]:
    """All of them, `as trained` first.

    Args:
        tokens: the training side.
        reference: token statistics of the training batch under the reference policy, or why there are none.
    """
    run = tokens.weights
    yield Intervention("run", "as trained", run)
    yield Intervention("lower_rate", "half the learning rate", run, learning_rate_factor=0.5)
    yield Intervention("momentum_reset", "momentum reset", run, keeps_momentum=False)
    yield from _signs(tokens)
    yield from _without(tokens)
    yield from _by_token(tokens)
    for coefficient in BONUSES:
        label = f"entropy bonus {coefficient:g}"
        yield Intervention(f"entropy_bonus_{coefficient:g}", label, bonus(tokens, coefficient))
    yield from _kl(tokens, reference)
    yield from _schemes(tokens)
    for name, label in (("clip_higher", "clip-higher"), ("clip_lower", "clip-lower"), ("kl_cov", "KL-Cov")):
        yield Intervention(name, label, reason=ON_POLICY)


def bonus(tokens: TrainingTokens, coefficient: float) -> TokenCoefficients:
    """The run's objective plus `coefficient` times mean token entropy."""
    mask = tokens.batch.completion_mask.double()
    return TokenCoefficients(mask * (coefficient / mask.sum()), mask * tokens.weights.to(mask)[:, None])


def reference_statistics(model: nn.Module, batch: SequenceBatch, passes: PassSettings) -> TokenStatistics | str:
    """Token statistics under the model without its adapter; a reason where it has none."""
    disabled: Any = getattr(model, "disable_adapter", None)
    if disabled is None:
        return "the reference policy is not known: the checkpoint has no adapter whose base model it would be"
    context: AbstractContextManager[None] = disabled()
    with context, torch.no_grad():
        return token_statistics(model, batch, passes)


def _of_tokens(tokens: TrainingTokens, logprob: Tensor) -> TokenCoefficients:
    logprob = logprob.to(tokens.batch.device) * tokens.batch.completion_mask
    return TokenCoefficients(torch.zeros_like(logprob), logprob)


def _signs(tokens: TrainingTokens) -> Iterator[Intervention]:
    w = tokens.weights
    positive, negative = w.clamp(min=0), w.clamp(max=0)
    for name, label, weights in (
        ("positives_only", "positive weights only", positive),
        ("negatives_only", "negative weights only", negative),
        ("weak_positives", f"positive weights × {POSITIVE_WEIGHT:g}", POSITIVE_WEIGHT * positive + negative),
    ):
        yield _weighted(tokens, name, label, weights)


def _weighted(tokens: TrainingTokens, name: str, label: str, weights: Tensor) -> Intervention:
    if not bool(weights.any()):
        return Intervention(name, label, reason="no sequence has such a weight")
    return Intervention(name, label, weights)


def _without(tokens: TrainingTokens) -> Iterator[Intervention]:
    for count in LEFT_OUT:
        name, label = f"without_{count}", f"without the {count} of highest cost"
        if tokens.costliest is None or len(tokens.costliest) < count:
            yield Intervention(name, label, reason="too few prompts, or too few sequences that lower entropy")
            continue
        weights = tokens.weights.clone()
        weights[tokens.costliest[:count].to(weights.device)] = 0
        yield _weighted(tokens, name, label, weights)
    name, label = "without_truncated", "without truncated completions"
    if not bool(tokens.truncated.any()):
        yield Intervention(name, label, reason="no completion was truncated")
    else:
        yield _weighted(tokens, name, label, torch.where(tokens.truncated, 0.0, tokens.weights))


def _by_token(tokens: TrainingTokens) -> Iterator[Intervention]:
    mask = tokens.batch.completion_mask
    logprob, entropy = tokens.statistics.logprobs.double(), tokens.statistics.entropies.double()
    weights = tokens.weights.to(mask.device)[:, None].expand(mask.shape).double()
    count = int(mask.sum())
    threshold = entropy[mask].topk(max(1, round(TOP_ENTROPY * count))).values[-1]
    yield Intervention(
        "top_entropy",
        f"the {TOP_ENTROPY:.0%} of tokens of highest entropy alone",
        _of_tokens(tokens, weights * (entropy >= threshold)),
    )
    advantage = tokens.advantages.to(mask.device)[:, None].expand(mask.shape).double()
    covariance = (logprob - logprob[mask].mean()) * (advantage - advantage[mask].mean())
    least = covariance[mask].topk(max(1, round(COVARIANT_TOKENS * count))).values[-1]
    name, label = "clip_cov", f"without the {COVARIANT_TOKENS:.0%} of tokens of highest covariance"
    if not bool(covariance[mask].any()):
        yield Intervention(name, label, reason="all tokens have the same advantage, or the same log-probability")
    else:
        yield Intervention(name, label, _of_tokens(tokens, weights * (covariance < least)))
    change = steer_token_changes(logprob, entropy, mask, tokens.advantages.to(mask.device).double(), 1.0).abs()
    largest = change[mask].max()
    name, label = "steer", "tokens down-weighted by STEER's estimate"
    if not largest > 0:
        yield Intervention(name, label, reason="no token is estimated to change entropy")
    else:
        yield Intervention(name, label, _of_tokens(tokens, weights * torch.exp2(-change / largest)))
    own = logprob + entropy
    centred = own - own[mask].mean()
    beta = float((centred[mask] * weights[mask]).sum() / centred[mask].square().sum())
    name, label = "decorrelated", "weights decorrelated from log π (after REPO)"
    if not np.isfinite(beta):
        yield Intervention(name, label, reason="all tokens have the same surprisal beside their entropy")
    else:
        yield Intervention(name, label, _of_tokens(tokens, weights - beta * own))


def _kl(tokens: TrainingTokens, reference: Callable[[], TokenStatistics] | str) -> Iterator[Intervention]:
    known = reference if isinstance(reference, str) else reference()
    mask = tokens.batch.completion_mask
    for coefficient in KL_COEFFICIENTS:
        name, label = f"kl_{coefficient:g}", f"KL to the reference {coefficient:g}"
        if isinstance(known, str):
            yield Intervention(name, label, reason=known)
            continue
        ratio = (known.logprobs.double() - tokens.statistics.logprobs.double()).exp()
        pull = (coefficient / mask.sum()) * (1 - ratio)
        yield Intervention(name, label, _of_tokens(tokens, tokens.weights.to(mask.device)[:, None] - pull))


def _schemes(tokens: TrainingTokens) -> Iterator[Intervention]:
    """Other advantage schemes, scaled to the run's sum of |w|, so that the clip coefficient does not decide between them."""
    size = tokens.weights.abs().sum()
    for name, (label, scheme, normalizer) in SCHEMES.items():
        try:
            if not bool(torch.isfinite(tokens.rewards).all()):
                raise ValueError("not all training sequences have rewards")
            weights = sequence_weights(
                tokens.rewards.cpu(),
                tokens.batch.prompt_index.cpu(),
                tokens.batch.completion_lengths.cpu(),
                scheme,
                tokens.max_completion_length,
                normalizer,
            )
        except ValueError as error:
            yield Intervention(name, label, reason=str(error))
            continue
        weights = weights.to(tokens.weights)
        if not bool(weights.any()):
            yield Intervention(name, label, reason="it gives no sequence a weight")
            continue
        yield _weighted(tokens, name, label, weights * (size / weights.abs().sum()))

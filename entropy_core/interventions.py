"""What could have been done in place of the step as trained: each intervention as a change of the loss or of the optimizer.

    loss' = -sum_i sum_k [ gamma_ik log pi_ik + alpha_ik H_ik ]          gamma = w_i, alpha = 0: as trained

Token coefficients are frozen, as in a trainer's loss on sequences of its own policy, where every ratio is 1:

    positives / negatives   gamma = lambda w_i where w_i > 0 (or < 0), else w_i       W-REINFORCE (Zhu et al. 2025)
    truncated               gamma = lambda w_i where the completion was cut
    rules by token          token_rules.py
    entropy bonus           alpha = c / tokens                                                TRL's entropy_coef
    KL to the reference     token_rules.py, an adapter's base model being the reference
    schemes                 gamma = the weights of GRPO, RLOO, ...                            entropy_core.weighting

Bounds on the ratio (clip-higher, clip-lower) and KL-Cov's penalty have no gradient at ratio 1: they are in the list with that
reason. Source: docs/analyses/prices.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients, score_coefficients
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_core.token_rules import RULES, RuleTokens, kl_pull
from entropy_core.weighting import LengthNormalizer, WeightingScheme, sequence_weights

SCHEMES: dict[str, tuple[str, WeightingScheme, LengthNormalizer]] = {
    "dr_grpo": ("Dr. GRPO, constant length", "dr_grpo", "constant"),
    "dr_grpo_longest": ("Dr. GRPO, longest of the prompt", "dr_grpo", "prompt_longest"),
    "grpo": ("GRPO", "grpo", "constant"),
    "dapo": ("DAPO", "dapo", "constant"),
    "rloo": ("RLOO", "rloo", "constant"),
    "reinforce": ("REINFORCE", "reinforce", "constant"),
}
BONUSES = (0.001, 0.01)
KL_COEFFICIENTS = (0.001, 0.04)
FACTORS = (0.1, 0.5)
"""On weights of one sign; 0 has a row of its own."""
TRUNCATED_FACTOR = 0.5
LEFT_OUT = (1, 4)
MOST_INTERVENTIONS = 10 + 2 * len(FACTORS) + len(RULES) + len(BONUSES) + len(KL_COEFFICIENTS) + len(SCHEMES)
"""Rows that are priced at most, the step as trained and the solved bonus among them."""
TOKEN_GRADIENTS = len(RULES) + 2
"""Backward passes over the training sequences: of the rules by token, of entropy and of the KL term."""
ON_POLICY = "changes nothing here: every step trains on sequences of its own policy, where all ratios are 1"


@dataclass(frozen=True)
class Added:
    """The run's own objective plus `coefficient` times a term; terms that are one object are differentiated once.

    coefficient: None where it is to be solved for, so that entropy is predicted to stay.
    """

    term: TokenCoefficients
    coefficient: float | None


Objective = Tensor | TokenCoefficients | Added
"""What a step ascends: (n_train,) weights of sequences, token coefficients, or the run's own weights and a term."""


def loss_coefficients(objective: Objective, batch: SequenceBatch, run: Tensor) -> TokenCoefficients:
    """What a step ascends, by token. run: (n_train,) the step's own weights, to which a term is added.

    Raises:
        ValueError: a term whose coefficient is still to be solved for.
    """
    if isinstance(objective, Tensor):
        return score_coefficients(batch, objective)
    if isinstance(objective, TokenCoefficients):
        return objective
    if objective.coefficient is None:
        raise ValueError("the coefficient of this term is not known: solve for it first")
    own, added = score_coefficients(batch, run), objective.term.scaled(objective.coefficient)
    return TokenCoefficients(own.entropy + added.entropy, own.logprob + added.logprob)


@dataclass(frozen=True)
class Intervention:
    """One row of the price list.

    objective: None where `reason` says why it is not priced. learning_rate_factor, keeps_momentum: changes of the optimizer.
    """

    name: str
    label: str
    objective: Objective | None = None
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
    unit = mean_entropy(tokens)
    for coefficient in BONUSES:
        yield Intervention(f"entropy_bonus_{coefficient:g}", f"entropy bonus {coefficient:g}", Added(unit, coefficient))
    yield Intervention("entropy_bonus_that_holds", "entropy bonus that holds entropy", Added(unit, None))
    yield from _kl(tokens, reference)
    yield from _schemes(tokens)
    for name, label in (("clip_higher", "clip-higher"), ("clip_lower", "clip-lower"), ("kl_cov", "KL-Cov")):
        yield Intervention(name, label, reason=ON_POLICY)


def mean_entropy(tokens: TrainingTokens) -> TokenCoefficients:
    """Of mean token entropy over the training sequences."""
    mask = tokens.batch.completion_mask.double()
    return TokenCoefficients(mask / mask.sum(), torch.zeros_like(mask))


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
    yield _weighted(tokens, "positives_only", "positive weights only", positive)
    yield _weighted(tokens, "negatives_only", "negative weights only", negative)
    for factor in FACTORS:
        label = f"positive weights × {factor:g}"
        yield _weighted(tokens, f"positives_{factor:g}", label, factor * positive + negative)
    for factor in FACTORS:
        label = f"negative weights × {factor:g}"
        yield _weighted(tokens, f"negatives_{factor:g}", label, positive + factor * negative)


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
    for name, label, factor in (
        ("without_truncated", "without truncated completions", 0.0),
        ("truncated", f"truncated completions × {TRUNCATED_FACTOR:g}", TRUNCATED_FACTOR),
    ):
        if not bool(tokens.truncated.any()):
            yield Intervention(name, label, reason="no completion was truncated")
        else:
            weights = torch.where(tokens.truncated, factor * tokens.weights, tokens.weights)
            yield _weighted(tokens, name, label, weights)


def _by_token(tokens: TrainingTokens) -> Iterator[Intervention]:
    mask = tokens.batch.completion_mask
    weights, advantages = (
        values.to(mask.device).double()[:, None].expand(mask.shape) for values in (tokens.weights, tokens.advantages)
    )
    logprob, entropy = tokens.statistics.logprobs.double(), tokens.statistics.entropies.double()
    seen = RuleTokens(mask, logprob, entropy, weights, advantages)
    for name, (label, rule) in RULES.items():
        found = rule(seen)
        if isinstance(found, str):
            yield Intervention(name, label, reason=found)
        else:
            yield Intervention(name, label, _of_tokens(tokens, found))


def _kl(tokens: TrainingTokens, reference: Callable[[], TokenStatistics] | str) -> Iterator[Intervention]:
    known = reference if isinstance(reference, str) else reference()
    term = None
    if not isinstance(known, str):
        mask = tokens.batch.completion_mask
        term = _of_tokens(tokens, kl_pull(tokens.statistics.logprobs, known.logprobs, mask))
    for coefficient in KL_COEFFICIENTS:
        name, label = f"kl_{coefficient:g}", f"KL to the reference {coefficient:g}"
        if isinstance(known, str) or term is None:
            yield Intervention(name, label, reason=str(known))
        else:
            yield Intervention(name, label, Added(term, coefficient))


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

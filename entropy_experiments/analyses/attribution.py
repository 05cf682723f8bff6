"""Who moved entropy in this step: which training sequences, prompts and tokens, and which evaluation sequences lost it?

    dh_i = sum_k dh_ik             accounting share of sequence i, and of its tokens k      sum_i dh_i = the step's batch part
    r_i                            effect of leaving i out of the step, with P and clip re-derived; does not add up
    horizon_i = f dh_i             over the life of the momentum buffer, f the horizon factor
    mass of the top k              sum of the k largest |dh_i| over sum of all |dh_i|
    Gini coefficient               sum_i (2 rank_i - n - 1) |dh_i| / (n sum_i |dh_i|): 0 for equal ones, 1 - 1/n where one has all
    effective number               (sum |dh_i|)^2 / sum dh_i^2

The reverse view: contribution_t, evaluation sequence t's term of the predicted change, adding up to it; and, where given,
how far the entropy of t's own tokens moves. Units: nats per token. Source: docs/analyses/attribution.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from entropy_experiments.analyses.arrays import SequenceLabels
from entropy_experiments.records.attribution_results import (
    AttributionResult,
    Concentration,
    Concentrations,
    EvaluationSide,
    GroupShares,
    PromptContribution,
    PromptShare,
    SequenceShares,
    TokenAttribution,
    TokenShares,
)

CLOSURE_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class TrainingShares:
    """Training sequences and what each did.

    Attributes:
        labels: Of the n_train sequences.
        shares: (n_train,) dh_i, nats per token.
        horizon_factor: f.
        effects: (n_train,) r_i (entropy_experiments.step.effects_of_leaving_out).
        advantages: (n_train,) A_i.
        endings: How the completions came to their ends (rl_training.prompts.endings).
    """

    labels: SequenceLabels
    shares: np.ndarray
    horizon_factor: float = 1.0
    effects: np.ndarray | None = None
    advantages: np.ndarray | None = None
    endings: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class TokenDetail:
    """Shares of completion tokens.

    Attributes:
        shares: (n_train, L) from entropy_experiments.step.real_steps.token_shares.
        mask: (n_train, L) bool, the tokens that the policy drew.
        texts: The completion tokens of each sequence as text, others' tokens included.
        drawn: Which of these the policy drew; None (of one, or of all): every one.
    """

    shares: np.ndarray
    mask: np.ndarray
    texts: Sequence[Sequence[str]] | None = None
    drawn: Sequence[Sequence[bool] | None] | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationTerms:
    """Evaluation sequences and their part of the predicted change.

    Attributes:
        labels: Of the n_eval sequences.
        contributions: (n_eval,) terms of the whole predicted change, nats per token.
        own_changes: (n_eval,) predicted change of sum_k H_k on sequence t's own tokens, nats per completion.
        endings: As of the training sequences.
    """

    labels: SequenceLabels
    contributions: np.ndarray
    own_changes: np.ndarray | None = None
    endings: Sequence[str] | None = None


def attribute_step(
    training: TrainingShares,
    tokens: TokenDetail | None = None,
    evaluation: EvaluationTerms | None = None,
    top: int = 10,
) -> AttributionResult:
    """Shares of the step's batch part by sequence, prompt and token, and the evaluation side's losses.

    Args:
        training: What the result is of.
        tokens: Down to the tokens of the sequences that moved entropy most, where given.
        evaluation: The reverse view, where given.
        top: How many sequences of either sign are shown by token.

    Returns:
        The record that summary.json holds.

    Raises:
        ValueError: Shapes that disagree, numbers that are not finite, or token shares that do not add up to the sequences'
            within CLOSURE_TOLERANCE.
    """
    labels, factor = training.labels, float(training.horizon_factor)
    values = _checked("shares", training.shares, len(labels))
    lowering, raising = extreme_sequences(values, top)
    total, effects = float(values.sum()), training.effects
    known = {} if effects is None else {"effect": _checked("effects", effects, len(labels)).tolist()}
    return AttributionResult(
        unit="nats per token",
        total=total,
        horizon_factor=factor,
        horizon_total=factor * total,
        sequences=SequenceShares(
            share=values.tolist(),
            horizon=(factor * values).tolist(),
            prompt_index=[int(p) for p in labels.prompt_index],
            **known,
        ),
        prompts=_prompts(labels, values, factor),
        sum_of_effects=None if effects is None else float(np.sum(effects)),
        concentration=Concentrations(
            all=concentration(values, top),
            lowering=concentration(values[values < 0], top),
            raising=concentration(values[values > 0], top),
        ),
        top_sequences=lowering + raising,
        tokens=None if tokens is None else _tokens(labels, values, tokens, lowering + raising),
        evaluation=None if evaluation is None else _evaluation_side(evaluation, top),
        groups=_groups(training, values, evaluation),
    )


def _prompts(labels: SequenceLabels, shares: np.ndarray, factor: float) -> list[PromptShare]:
    return [
        PromptShare(prompt_index=index, prompt=text, sequences=count, share=share, horizon=factor * share)
        for index, text, count, share in _by_prompt(labels, shares)
    ]


def _groups(training: TrainingShares, shares: np.ndarray, evaluation: EvaluationTerms | None) -> list[GroupShares]:
    """Sequences by how they ended, and by the sign of their advantage."""
    groups: list[GroupShares] = []
    if training.endings is not None:
        groups += group_rows("training", "ending", training.endings, shares, training.labels)
    if training.advantages is not None:
        signs = ["positive" if a > 0 else "negative" if a < 0 else "zero" for a in training.advantages]
        groups += group_rows("training", "advantage", signs, shares, training.labels)
    if evaluation is not None and evaluation.endings is not None:
        contributions = np.asarray(evaluation.contributions)
        groups += group_rows("evaluation", "ending", evaluation.endings, contributions, evaluation.labels)
    return groups


def extreme_sequences(shares: np.ndarray, top: int = 10) -> tuple[list[int], list[int]]:
    """(lowering, raising): up to `top` sequences of the most negative, and of the most positive shares, largest first."""
    values = np.asarray(shares, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    lowering = [int(i) for i in order[:top] if values[i] < 0]
    raising = [int(i) for i in np.argsort(-values, kind="stable")[:top] if values[i] > 0]
    return lowering, raising


def group_rows(
    side: Literal["training", "evaluation"],
    by: Literal["ending", "advantage"],
    names: Sequence[str],
    values: np.ndarray,
    labels: SequenceLabels,
) -> list[GroupShares]:
    """One row a group that has sequences: how many, the sum of their values, and h over their tokens."""
    rows = []
    for name in dict.fromkeys(sorted(names)):
        members = np.array([n == name for n in names])
        entropy = float(labels.entropy_sum[members].sum() / labels.length[members].sum())
        value, count = float(values[members].sum()), int(members.sum())
        rows.append(GroupShares(side=side, by=by, group=name, sequences=count, value=value, entropy=entropy))
    return rows


def concentration(values: np.ndarray, top: int = 10) -> Concentration:
    """How far a few of (n,) signed values make up the mass sum |value|; without a mass only their number is known."""
    magnitudes = np.sort(np.abs(np.asarray(values, dtype=np.float64)))[::-1]
    mass, count = float(magnitudes.sum()), len(magnitudes)
    known = {"count": count, "sum": float(np.sum(values)), "top": min(top, count)}
    if mass == 0.0:
        reason = "no sequence here" if not count else "all of them are 0"
        nothing = dict.fromkeys(("top_mass", "half_mass_count", "gini", "effective_number"))
        return Concentration(**known, **nothing, reason=reason)
    # ranks ascending, magnitudes descending: the signs of the formula turn around
    gini = float((magnitudes * (count + 1 - 2 * np.arange(1, count + 1))).sum()) / (count * mass)
    return Concentration(
        **known,
        top_mass=min(1.0, float(magnitudes[:top].sum()) / mass),
        half_mass_count=int(np.searchsorted(np.cumsum(magnitudes), 0.5 * mass * (1 - 1e-12)) + 1),
        gini=gini,
        effective_number=mass**2 / float(np.square(magnitudes).sum()),
        reason="",
    )


def _checked(name: str, values: np.ndarray, count: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (count,):
        raise ValueError(f"{name} is {array.shape}, but there are {count} sequences: give one each")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} of sequence {int(np.flatnonzero(~np.isfinite(array))[0])} is not finite")
    return array


def _by_prompt(labels: SequenceLabels, values: np.ndarray) -> list[tuple[int, str, int, float]]:
    """(prompt's number, text, how many sequences, sum of their values), the lowest sum first."""
    prompts, first, group = np.unique(labels.prompt_index, return_index=True, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    return [
        (int(prompts[p]), labels.prompt[first[p]], int(counts[p]), float(sums[p]))
        for p in np.argsort(sums, kind="stable")
    ]


def _tokens(training: SequenceLabels, shares: np.ndarray, tokens: TokenDetail, chosen: list[int]) -> TokenAttribution:
    values, mask = np.asarray(tokens.shares, dtype=np.float64), np.asarray(tokens.mask, dtype=bool)
    if values.ndim != 2 or mask.shape != values.shape:
        raise ValueError(f"token shares are {values.shape}: give a mask of the same shape, not {mask.shape}")
    gaps = np.abs(_checked("the sum of token shares", values.sum(1), len(shares)) - shares)
    largest = float(np.abs(shares).max(initial=0.0))
    closure = float(gaps.max(initial=0.0)) / largest if largest > 0 else 0.0
    if closure > CLOSURE_TOLERANCE or bool(values[~mask].any()):
        raise ValueError(
            f"token shares do not add up to their sequences' shares (sequence {int(gaps.argmax())} is off by {closure:.1e} of "
            "the largest): they belong to another gradient of entropy, other weights, or another P"
        )
    rows = [
        TokenShares(
            sequence=i,
            prompt_index=int(training.prompt_index[i]),
            share=float(shares[i]),
            reward=float(training.reward[i]) if np.isfinite(training.reward[i]) else None,
            **_tokens_of(tokens, i, values[i][mask[i]].tolist()),
        )
        for i in chosen
    ]
    return TokenAttribution(closure=closure, sequences=rows)


def _tokens_of(tokens: TokenDetail, i: int, shares: list[float]) -> dict[str, Any]:
    """ "tokens", "texts", "drawn" of sequence i. shares: of the tokens that the policy drew; others get 0."""
    texts = None if tokens.texts is None else [str(text) for text in tokens.texts[i]]
    drawn = None if tokens.drawn is None or tokens.drawn[i] is None else [bool(d) for d in tokens.drawn[i] or ()]
    if drawn is not None:
        if sum(drawn) != len(shares):
            raise ValueError(f"sequence {i} has {len(shares)} drawn tokens, but a mask of {sum(drawn)}")
        scored = iter(shares)
        shares = [next(scored) if d else 0.0 for d in drawn]
    if texts is not None and len(texts) != len(shares):
        raise ValueError(f"sequence {i} has {len(shares)} completion tokens, but {len(texts)} texts")
    return {"tokens": shares, "texts": texts, "drawn": drawn}


def _evaluation_side(evaluation: EvaluationTerms, top: int) -> EvaluationSide:
    count = len(evaluation.labels)
    values = _checked("contributions", evaluation.contributions, count)
    own = None if evaluation.own_changes is None else _checked("own_changes", evaluation.own_changes, count)
    return EvaluationSide(
        total=float(values.sum()),
        contribution=values.tolist(),
        own_change=None if own is None else own.tolist(),
        lowering=int((values < 0).sum()),
        raising=int((values > 0).sum()),
        concentration=concentration(values, top),
        prompts=[
            PromptContribution(prompt_index=index, prompt=text, sequences=count, contribution=value)
            for index, text, count, value in _by_prompt(evaluation.labels, values)
        ],
    )

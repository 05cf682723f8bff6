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
from typing import Literal

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


def attribute_step(
    training: SequenceLabels,
    shares: np.ndarray,
    horizon_factor: float = 1.0,
    *,
    effects: np.ndarray | None = None,
    token_shares: np.ndarray | None = None,
    completion_mask: np.ndarray | None = None,
    token_texts: Sequence[Sequence[str]] | None = None,
    drawn: Sequence[Sequence[bool] | None] | None = None,
    endings: tuple[Sequence[str], Sequence[str]] | None = None,
    advantages: np.ndarray | None = None,
    evaluation: SequenceLabels | None = None,
    contributions: np.ndarray | None = None,
    own_changes: np.ndarray | None = None,
    top: int = 10,
) -> AttributionResult:
    """Shares of the step's batch part by sequence, prompt and token, and the evaluation side's losses.

    Args:
        training: labels of the n_train training sequences.
        shares: (n_train,) dh_i, nats per token.
        horizon_factor: f.
        effects: (n_train,) r_i (entropy_experiments.step.effects_of_leaving_out).
        token_shares: (n_train, L) from entropy_experiments.step.real_steps.token_shares, with completion_mask.
        completion_mask: (n_train, L).
        token_texts: the completion tokens of each sequence as text, foreign ones included.
        drawn: which of these the policy drew, None (of one, or of all) where every one.
        endings: how the completions of the training and of the evaluation side came to their ends
            (rl_training.prompts.endings).
        advantages: (n_train,) A_i.
        evaluation: labels of the n_eval evaluation sequences.
        contributions: (n_eval,) terms of the whole predicted change, nats per token.
        own_changes: (n_eval,) predicted change of sum_k H_k on sequence t's own tokens, nats per completion.
        top: how many sequences of either sign are shown by token.

    Returns:
        The record that summary.json holds.

    Raises:
        ValueError: shapes that disagree, numbers that are not finite, or token shares that do not add up to the sequences'
            within CLOSURE_TOLERANCE.
    """
    values = _checked("shares", shares, len(training))
    lowering, raising = extreme_sequences(values, top)
    total, factor = float(values.sum()), float(horizon_factor)
    known = {} if effects is None else {"effect": _checked("effects", effects, len(training)).tolist()}
    groups: list[GroupShares] = []
    if endings is not None:
        groups += group_rows("training", "ending", endings[0], values, training)
    if advantages is not None:
        signs = ["positive" if a > 0 else "negative" if a < 0 else "zero" for a in np.asarray(advantages)]
        groups += group_rows("training", "advantage", signs, values, training)
    tokens = side = None
    if evaluation is not None and contributions is not None:
        side = _evaluation_side(evaluation, contributions, own_changes, top)
        if endings is not None:
            groups += group_rows("evaluation", "ending", endings[1], np.asarray(contributions), evaluation)
    if token_shares is not None:
        tokens = _tokens(training, values, token_shares, completion_mask, token_texts, drawn, lowering + raising)
    return AttributionResult(
        unit="nats per token",
        total=total,
        horizon_factor=factor,
        horizon_total=factor * total,
        sequences=SequenceShares(
            share=values.tolist(),
            horizon=(factor * values).tolist(),
            prompt_index=[int(p) for p in training.prompt_index],
            **known,
        ),
        prompts=[
            PromptShare(prompt_index=index, prompt=text, sequences=count, share=share, horizon=factor * share)
            for index, text, count, share in _by_prompt(training, values)
        ],
        sum_of_effects=None if effects is None else float(np.sum(effects)),
        concentration=Concentrations(
            all=concentration(values, top),
            lowering=concentration(values[values < 0], top),
            raising=concentration(values[values > 0], top),
        ),
        top_sequences=lowering + raising,
        tokens=tokens,
        evaluation=side,
        groups=groups,
    )


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


def _tokens(
    training: SequenceLabels,
    shares: np.ndarray,
    token_shares: np.ndarray,
    completion_mask: np.ndarray | None,
    token_texts: Sequence[Sequence[str]] | None,
    drawn: Sequence[Sequence[bool] | None] | None,
    chosen: list[int],
) -> TokenAttribution:
    values = np.asarray(token_shares, dtype=np.float64)
    if completion_mask is None or values.ndim != 2 or np.shape(completion_mask) != values.shape:
        raise ValueError(
            f"token_shares is {values.shape}: give a completion_mask of the same shape, not {np.shape(completion_mask)}"
        )
    mask = np.asarray(completion_mask, dtype=bool)
    gaps = np.abs(_checked("the sum of token_shares", values.sum(1), len(shares)) - shares)
    largest = float(np.abs(shares).max(initial=0.0))
    closure = float(gaps.max(initial=0.0)) / largest if largest > 0 else 0.0
    if closure > CLOSURE_TOLERANCE or bool(values[~mask].any()):
        raise ValueError(
            f"token shares do not add up to their sequences' shares (sequence {int(gaps.argmax())} is off by {closure:.1e} of "
            "the largest): they belong to another gradient of entropy, other weights, or another P"
        )
    rows = []
    for i in chosen:
        texts = None if token_texts is None else [str(text) for text in token_texts[i]]
        own = None if drawn is None or drawn[i] is None else [bool(d) for d in drawn[i] or ()]
        tokens = values[i][mask[i]].tolist()
        if own is not None:
            if sum(own) != len(tokens):
                raise ValueError(f"sequence {i} has {len(tokens)} drawn tokens, but a mask of {sum(own)}")
            scored = iter(tokens)
            tokens = [next(scored) if d else 0.0 for d in own]
        if texts is not None and len(texts) != len(tokens):
            raise ValueError(f"sequence {i} has {len(tokens)} completion tokens, but {len(texts)} texts")
        rows.append(
            TokenShares(
                sequence=i,
                prompt_index=int(training.prompt_index[i]),
                share=float(shares[i]),
                reward=float(training.reward[i]) if np.isfinite(training.reward[i]) else None,
                tokens=tokens,
                texts=texts,
                drawn=own,
            )
        )
    return TokenAttribution(closure=closure, sequences=rows)


def _evaluation_side(
    evaluation: SequenceLabels, contributions: np.ndarray, own_changes: np.ndarray | None, top: int
) -> EvaluationSide:
    values = _checked("contributions", contributions, len(evaluation))
    own = None if own_changes is None else _checked("own_changes", own_changes, len(evaluation))
    return EvaluationSide(
        total=float(values.sum()),
        contribution=values.tolist(),
        own_change=None if own is None else own.tolist(),
        lowering=int((values < 0).sum()),
        raising=int((values > 0).sum()),
        concentration=concentration(values, top),
        prompts=[
            PromptContribution(prompt_index=index, prompt=text, sequences=count, contribution=value)
            for index, text, count, value in _by_prompt(evaluation, values)
        ],
    )

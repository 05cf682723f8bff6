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
from typing import Any

import numpy as np

from entropy_experiments.analyses.arrays import SequenceLabels
from entropy_experiments.text.numbers import counted, signed

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
) -> dict[str, Any]:
    """Shares of the step's batch part by sequence, prompt and token, and the evaluation side's losses.

    shares: (n_train,) dh_i. effects: (n_train,) r_i (entropy_experiments.step.effects_of_leaving_out). token_shares: (n_train, L)
    from entropy_experiments.step.real_steps.token_shares, with completion_mask (n_train, L) and, for the figure, token_texts: the
    completion tokens of each sequence as text, foreign ones included; drawn: which of these the policy drew, None (of one, or of
    all) where every one.
    endings: how the completions of the training and of the evaluation side came to their ends (rl_training.prompts.endings).
    advantages: (n_train,) A_i. contributions: (n_eval,) terms of the whole predicted change. own_changes: (n_eval,) predicted
    change of sum_k H_k on
    sequence t's own tokens, nats per completion.

    Returns
        unit, total             "nats per token"; sum of the shares
        horizon_factor, horizon_total
        sequences               {"share", "horizon", "prompt_index"}, and "effect" where it is given, lists in the buffer's order
        prompts                 a list, most costing first: {"prompt_index", "prompt", "sequences", "share", "horizon"}
        concentration           {"all", "lowering", "raising"}, see `concentration`
        top_sequences           up to 2 x top indices: the most costing first, then the most giving from the largest down
        tokens                  {"closure", "sequences"}, None without token_shares. sequences: for top_sequences {"sequence",
                                "prompt_index", "share", "reward", "tokens", "texts", "drawn"}, tokens dh_ik and their texts
                                (None without), 0 on foreign ones, which drawn tells (None where there are none). closure:
                                largest |sum_k dh_ik - dh_i| over the largest |dh_i|
        evaluation              {"total", "contribution", "own_change", "lowering", "raising", "concentration", "prompts"}, the
                                last a list, most lowering first: {"prompt_index", "prompt", "sequences", "contribution"};
                                None without contributions
        groups                  rows {"side", "by", "group", "sequences", "value", "entropy"}: shares by ending and by the sign of
                                the advantage, contributions by ending; entropy: nats per token of the group's tokens
        sentence

    Raises ValueError for shapes that disagree, numbers that are not finite, or token shares that do not add up to the
    sequences' within CLOSURE_TOLERANCE.
    """
    values = _checked("shares", shares, len(training))
    costing, giving = extreme_sequences(values, top)
    total = float(values.sum())
    result: dict[str, Any] = {
        "unit": "nats per token",
        "total": total,
        "horizon_factor": float(horizon_factor),
        "horizon_total": float(horizon_factor) * total,
        "sequences": {
            "share": values.tolist(),
            "horizon": (float(horizon_factor) * values).tolist(),
            "prompt_index": [int(p) for p in training.prompt_index],
        },
        "prompts": [
            {**row, "horizon": float(horizon_factor) * row["share"]} for row in _by_prompt(training, values, "share")
        ],
        "sum_of_effects": None if effects is None else float(_checked("effects", effects, len(training)).sum()),
        "concentration": {
            "all": concentration(values, top),
            "lowering": concentration(values[values < 0], top),
            "raising": concentration(values[values > 0], top),
        },
        "top_sequences": costing + giving,
        "tokens": None,
        "evaluation": None,
        "groups": [],
    }
    if effects is not None:
        result["sequences"]["effect"] = np.asarray(effects, dtype=np.float64).tolist()
    if endings is not None:
        result["groups"] += group_rows("training", "ending", endings[0], values, training)
    if advantages is not None:
        signs = ["positive" if a > 0 else "negative" if a < 0 else "zero" for a in np.asarray(advantages)]
        result["groups"] += group_rows("training", "advantage", signs, values, training)
    if endings is not None and evaluation is not None and contributions is not None:
        result["groups"] += group_rows("evaluation", "ending", endings[1], np.asarray(contributions), evaluation)
    if token_shares is not None:
        result["tokens"] = _tokens(
            training, values, token_shares, completion_mask, token_texts, drawn, costing + giving
        )
    if evaluation is not None and contributions is not None:
        result["evaluation"] = _evaluation_side(evaluation, contributions, own_changes, top)
    return result | {"sentence": _sentence(result)}


def extreme_sequences(shares: np.ndarray, top: int = 10) -> tuple[list[int], list[int]]:
    """(costing, giving): up to `top` sequences of the most negative, and of the most positive shares, largest first."""
    values = np.asarray(shares, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    costing = [int(i) for i in order[:top] if values[i] < 0]
    giving = [int(i) for i in np.argsort(-values, kind="stable")[:top] if values[i] > 0]
    return costing, giving


def group_rows(
    side: str, by: str, names: Sequence[str], values: np.ndarray, labels: SequenceLabels
) -> list[dict[str, Any]]:
    """One row a group that has sequences: how many, the sum of their values, and h over their tokens."""
    rows = []
    for name in dict.fromkeys(sorted(names)):
        members = np.array([n == name for n in names])
        entropy = float(labels.entropy_sum[members].sum() / labels.length[members].sum())
        row = {"side": side, "by": by, "group": name, "sequences": int(members.sum())}
        rows.append(row | {"value": float(values[members].sum()), "entropy": entropy})
    return rows


def concentration(values: np.ndarray, top: int = 10) -> dict[str, Any]:
    """How far a few of (n,) signed values make up the mass sum |value|.

    Returns "count", "sum", "top" (how many the next is of), "top_mass" (their part of the mass), "half_mass_count" (how many
    make half of it), "gini", "effective_number"; the last four None, with a "reason", where the mass is 0.
    """
    magnitudes = np.sort(np.abs(np.asarray(values, dtype=np.float64)))[::-1]
    mass, count = float(magnitudes.sum()), len(magnitudes)
    out: dict[str, Any] = {"count": count, "sum": float(np.sum(values)), "top": min(top, count)}
    if mass == 0.0:
        nothing = dict.fromkeys(("top_mass", "half_mass_count", "gini", "effective_number"))
        return out | nothing | {"reason": "no sequence here" if not count else "all of them are 0"}
    # ranks ascending, magnitudes descending: the signs of the formula turn around
    gini = float((magnitudes * (count + 1 - 2 * np.arange(1, count + 1))).sum()) / (count * mass)
    return out | {
        "top_mass": float(magnitudes[:top].sum()) / mass,
        "half_mass_count": int(np.searchsorted(np.cumsum(magnitudes), 0.5 * mass * (1 - 1e-12)) + 1),
        "gini": gini,
        "effective_number": mass**2 / float(np.square(magnitudes).sum()),
        "reason": "",
    }


def _checked(name: str, values: np.ndarray, count: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (count,):
        raise ValueError(f"{name} is {array.shape}, but there are {count} sequences: give one each")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} of sequence {int(np.flatnonzero(~np.isfinite(array))[0])} is not finite")
    return array


def _by_prompt(labels: SequenceLabels, values: np.ndarray, name: str) -> list[dict[str, Any]]:
    prompts, first, group = np.unique(labels.prompt_index, return_index=True, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    return [
        {
            "prompt_index": int(prompts[p]),
            "prompt": labels.prompt[first[p]],
            "sequences": int(counts[p]),
            name: float(sums[p]),
        }
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
) -> dict[str, Any]:
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
            {
                "sequence": i,
                "prompt_index": int(training.prompt_index[i]),
                "share": float(shares[i]),
                "reward": float(training.reward[i]) if np.isfinite(training.reward[i]) else None,
                "tokens": tokens,
                "texts": texts,
                "drawn": own,
            }
        )
    return {"closure": closure, "sequences": rows}


def _evaluation_side(
    evaluation: SequenceLabels, contributions: np.ndarray, own_changes: np.ndarray | None, top: int
) -> dict[str, Any]:
    values = _checked("contributions", contributions, len(evaluation))
    own = None if own_changes is None else _checked("own_changes", own_changes, len(evaluation))
    return {
        "total": float(values.sum()),
        "contribution": values.tolist(),
        "own_change": None if own is None else own.tolist(),
        "lowering": int((values < 0).sum()),
        "raising": int((values > 0).sum()),
        "concentration": concentration(values, top),
        "prompts": _by_prompt(evaluation, values, "contribution"),
    }


def _sentence(result: dict[str, Any]) -> str:
    found = result["concentration"]
    lowering, raising = found["lowering"], found["raising"]
    if found["all"]["top_mass"] is None:
        return "No training sequence has a share of the step's change: every weight or every product is 0."
    text = (
        f"{counted(lowering['count'], 'training sequence')} lowered entropy by {signed(lowering['sum'])} and "
        f"{raising['count']} raised it by {signed(raising['sum'])} (accounting shares, which add up), "
        f"together {signed(result['total'])} nats per token in this "
        f"step ({signed(result['horizon_total'])} over the life of the momentum buffer); the top {found['all']['top']} of "
        f"{found['all']['count']} hold {found['all']['top_mass']:.0%} of the mass"
    )
    if result["sum_of_effects"] is not None:
        text += f"; the effects of leaving each out, which do not add up, come to {signed(result['sum_of_effects'])}"
    side = result["evaluation"]
    if side is not None:
        text += f"; {side['lowering']} of {counted(len(side['contribution']), 'evaluation sequence')} contribute a loss"
    return text + "."

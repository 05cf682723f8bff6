"""What would other weightings of the same sequences cost in entropy, for an equal step or an equal gain of reward?

Every weighting scheme, and every filter of the run's own weights, is a vector w of sequence weights. On policy the step
is linear in it, so that the kernels of one analysis answer for all:

    dh(w)     = f sum_i w_i <grad h, P_t dS_i>               batch part of the step, nats per token
    length(w) = f sqrt(w^T K w),  K = train_fisher           of the update f P sum_i w_i dS_i in the metric 1/P
    gain(w)   = f Cov_t( r_t, sum_i K1(t, i) w_i )           change of mean reward, over evaluation sequences t
    cost(w)   = -dh(w) / gain(w)                             nats per token lost for a unit of mean reward

    at equal length: dh(w) length(run) / length(w)           at equal gain: dh(w) gain(run) / gain(w)

f = step_factor; the clip coefficient in it, and P_t, stay those of the run's own step. Cov divides by n - 1: it is the mean of
(r_t - mean of the other rewards) sum_i K1(t, i) w_i, a policy gradient of reward on sequences that took no part in
training. Where evaluation sequences have no rewards, or equal ones, training rewards stand in: for each column i the mean
of (r_j - mean of the others of its group) K(j, i) over the sequences j of *other* prompts.

Standard errors: jackknife over evaluation prompts (of a gain from the training side, over the prompts of its rows), ratios
recomputed whole, the step held as it is. The spread of dh comes from KH, hence is under the kernel's P. A gain whose 95% interval
holds 0 is no denominator: what would divide by it is None and says why.
Source: docs/analyses/weighting-schemes.md; the weights themselves: candidate_weights.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from entropy_core.uncertainty import jackknife_over_prompts, jackknife_standard_error
from entropy_experiments.analyses.arrays import KernelArrays, SequenceLabels
from entropy_experiments.analyses.candidate_weights import DROP_TOP, SCHEMES, costliest, labelled_weights
from entropy_experiments.statistics.agreement import compare
from entropy_experiments.statistics.confidence import ALIKE, BRACKETS, NOT_FROM_ZERO, UNTOLD, known, shown
from entropy_experiments.statistics.jackknife_interval import ends_of
from entropy_experiments.text.numbers import counted
from rl_training.intervals import welch_freedom

NORMALISATIONS = ("raw", "equal_length", "equal_gain")


@dataclass(frozen=True)
class _Statistic:
    """(m,) values of m weightings, and (B, m) values with each of B prompts left out."""

    value: np.ndarray
    left_out: np.ndarray
    same_prompts: bool = True  # whether those B prompts are the evaluation prompts


def weighting_schemes(
    arrays: KernelArrays, max_completion_length: int | None = None, drop_top: tuple[int, ...] = DROP_TOP
) -> dict[str, Any]:
    """The table of all schemes and filters.

    max_completion_length: what dr_grpo's constant normaliser divides by. drop_top: numbers of sequences to leave out.

    Keys: `rows`, a list of {name, label, kind ("run" | "scheme" | "filter"), sequences (of weight other than 0), delta_h:
    {raw, equal_length, equal_gain}, minus_run: {equal_length, equal_gain} (difference to the run's own row), reward_gain,
    entropy_cost_per_reward, update_length, cosine_with_run (of the two updates, metric 1/P), scale: {equal_length,
    equal_gain} (factors on the weights), spared (drop_top_k only: see `_spared`)}. Estimates are {value, standard_error,
    degrees_of_freedom}, low and high where one set of prompts is behind them, and, where one is None, `reason`; a row without
    weights has `reason` in place of all numbers. `weights`: name -> list of n_train floats. `gain_side`: "evaluation", "training"
    or None, `gain_note` the same in words. `n_eval`, `n_train`, `eval_prompts`, `sentence`.

    Raises ValueError for arrays of other shapes than the labels', or entries that are not finite.
    """
    _check(arrays)
    table = labelled_weights(arrays, max_completion_length, drop_top)
    known = {name: weights for name, (_, weights) in table.items() if not isinstance(weights, str)}
    columns = np.stack(list(known.values()), axis=1)
    gain, side, note = _reward_gain(arrays, columns)
    numbers = dict(zip(known, _numbers(arrays, columns, gain, note), strict=True))
    rows = []
    for name, (label, weights) in table.items():
        kind = "run" if name == "run" else "scheme" if name in SCHEMES else "filter"
        row = {"name": name, "label": label, "kind": kind} | numbers.get(name, {"reason": weights})
        if name in known and name.startswith("drop_top_"):
            row["spared"] = _spared(arrays, int(name.removeprefix("drop_top_")))
        rows.append(row)
    result = {
        "rows": rows,
        "weights": {name: weights.tolist() for name, weights in known.items()},
        "gain_side": side,
        "gain_note": note,
        "n_eval": len(arrays.evaluation),
        "n_train": len(arrays.training),
        "eval_prompts": len(np.unique(arrays.evaluation.prompt_index)),
    }
    return result | {"sentence": cost_sentence(result)}


def with_measurements(table: Mapping[str, Any], measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`table` with measured changes beside the predicted ones; the table given stays as it is.

    measured: name -> normalisation ("raw", "equal_length", "equal_gain") -> {value, standard_error} in nats per token, of the
    step that these weights (times the row's `scale`) really make less the step that zero weights make: momentum and decay
    are in both, and no prediction here holds them. Each row gains `actual`: normalisation -> {value, standard_error, ratio
    (measured over predicted; None where the prediction is 0 or None), z (|difference| over its own standard
    error; None where either side is not known with each prompt left out)}.

    Raises ValueError for a name that the table lacks, or an unknown normalisation.
    """
    names = [row["name"] for row in table["rows"]]
    for name, entries in measured.items():
        if name not in names:
            raise ValueError(f"measured holds {name!r}, which is no row of the table: {', '.join(names)}")
        unknown = sorted(set(entries) - set(NORMALISATIONS))
        if unknown:
            raise ValueError(f"measured[{name!r}] holds {unknown[0]!r}: choose from {', '.join(NORMALISATIONS)}")
    rows = []
    for row in table["rows"]:
        predicted = row.get("delta_h", {})
        actual = {key: _against(predicted.get(key), entry) for key, entry in measured.get(row["name"], {}).items()}
        rows.append(row | ({"actual": actual} if actual else {}))
    return {**table, "rows": rows}


def _against(predicted: Mapping[str, Any] | None, entry: Mapping[str, Any]) -> dict[str, Any]:
    value, compared = predicted and predicted["value"], compare(predicted, entry)
    return {
        "value": entry["value"],
        "standard_error": entry.get("standard_error"),
        "ratio": entry["value"] / value if value else None,
        "z": None if compared is None else compared.z,
    }


def _check(arrays: KernelArrays) -> None:
    rows, columns = len(arrays.evaluation), len(arrays.training)
    shapes = {"fisher": (rows, columns), "entropy_fisher": (rows, columns), "train_fisher": (columns, columns)}
    shapes |= dict.fromkeys(("weights", "advantages", "shares", "products"), (columns,))
    for name, shape in shapes.items():
        values = np.asarray(getattr(arrays, name))
        if values.shape != shape:
            raise ValueError(f"{name} is {values.shape}, but the labels make it {shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds {int((~np.isfinite(values)).sum())} entries that are not finite")


def _entropy_changes(arrays: KernelArrays, columns: np.ndarray) -> _Statistic:
    """dh under P_t; with a prompt left out it moves by what the mean over KH's rows moves."""
    rows = arrays.entropy_fisher @ columns
    value = arrays.products @ columns
    left_out = [value + rows[kept].mean(0) - rows.mean(0) for kept in _leave_one_out(arrays.evaluation) if kept.any()]
    return _Statistic(arrays.step_factor * value, arrays.step_factor * np.array(left_out).reshape(-1, columns.shape[1]))


def _leave_one_out(labels: SequenceLabels) -> list[np.ndarray]:
    return [labels.prompt_index != prompt for prompt in np.unique(labels.prompt_index)]


def _reward_gain(arrays: KernelArrays, columns: np.ndarray) -> tuple[_Statistic | None, str | None, str]:
    """The statistic, its side, and in words where it comes from."""
    reward, known = arrays.evaluation.reward, np.isfinite(arrays.evaluation.reward)
    if np.unique(reward[known]).size > 1:
        responses = arrays.step_factor * (arrays.fisher @ columns)
        left_out = [_covariance(reward, responses, known & kept) for kept in _leave_one_out(arrays.evaluation)]
        note = f"predicted gain of mean reward on {counted(int(known.sum()), 'evaluation sequence')}"
        return _Statistic(_covariance(reward, responses, known), np.array(left_out)), "evaluation", note
    why = "are all equal" if known.any() else "are missing"
    reward, several = arrays.training.reward, len(np.unique(arrays.training.prompt_index)) > 1
    if np.isfinite(reward).all() and np.ptp(reward) > 0 and several:
        note = (
            f"predicted gain of mean reward on the training sequences of other prompts (evaluation rewards {why}); "
            "where training prompts were chosen by reward, this is not the population of the data"
        )
        return _gain_on_training(arrays, columns), "training", note
    return None, None, f"evaluation rewards {why}, and training rewards are missing, all equal or of a single prompt"


def _covariance(reward: np.ndarray, responses: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(m,) sample covariance of rewards with (n, m) responses over the kept rows; NaN for fewer than two."""
    if kept.sum() < 2:
        return np.full(responses.shape[1], np.nan)
    return (reward[kept] - reward[kept].mean()) @ responses[kept] / (kept.sum() - 1)


def _gain_on_training(arrays: KernelArrays, columns: np.ndarray) -> _Statistic:
    labels, groups = arrays.training, _leave_one_out(arrays.training)
    centred = np.empty(len(labels))
    for group in (~kept for kept in groups):
        others = group if group.sum() > 1 else np.ones_like(group)
        centred[group] = (labels.reward[group] - labels.reward[others].mean()) * others.sum() / (others.sum() - 1)
    terms = centred[:, None] * arrays.train_fisher
    other_prompt = labels.prompt_index[:, None] != labels.prompt_index[None, :]

    def gain(kept: np.ndarray) -> np.ndarray:
        allowed = other_prompt & kept[:, None]
        with np.errstate(invalid="ignore"):  # with no row left for a column: NaN, hence no standard error
            means = (terms * allowed).sum(0) / allowed.sum(0)
        return arrays.step_factor * (means @ columns)

    left_out = np.array([gain(kept) for kept in groups])
    return _Statistic(gain(np.ones(len(labels), dtype=bool)), left_out, same_prompts=False)


def _numbers(arrays: KernelArrays, columns: np.ndarray, gain: _Statistic | None, note: str) -> list[dict[str, Any]]:
    """One dict a column; column 0 is the run's own."""
    entropy = _entropy_changes(arrays, columns)
    inner = columns.T @ arrays.train_fisher @ columns
    length = arrays.step_factor * np.sqrt(np.clip(np.diag(inner), 0.0, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        to_length = length[0] / length
        cosine = inner[0] / np.sqrt(inner[0, 0] * np.diag(inner))
        to_gain = None if gain is None else gain.value[0] / gain.value
    everywhere = [""] * len(length)
    no_length = ["" if min(length[0], one) > 0 else "the update, or that of the run, has no length" for one in length]
    gains = [_nothing(note)] * len(length) if gain is None else _estimates(lambda h, g: h, everywhere, gain)
    no_gain = [why_not_a_gain(entry) for entry in gains]
    no_match = [why or (f"as trained: {no_gain[0]}" if no_gain[0] else "") for why in no_gain]
    raw = _estimates(lambda h, g: h, everywhere, entropy)
    equal_length = _estimates(lambda h, g: h * to_length, no_length, entropy)
    over_length = _estimates(lambda h, g: h * to_length - h[..., :1], no_length, entropy)
    cost = _estimates(lambda h, g: -h / g, no_gain, entropy, gain)
    equal_gain = _estimates(lambda h, g: h * (g[..., :1] / g), no_match, entropy, gain)
    over_gain = _estimates(lambda h, g: h * (g[..., :1] / g) - h[..., :1], no_match, entropy, gain)
    return [
        {
            "sequences": int(np.count_nonzero(columns[:, i])),
            "delta_h": {"raw": raw[i], "equal_length": equal_length[i], "equal_gain": equal_gain[i]},
            "minus_run": {"equal_length": over_length[i], "equal_gain": over_gain[i]},
            "reward_gain": gains[i],
            "entropy_cost_per_reward": cost[i],
            "update_length": float(length[i]),
            "cosine_with_run": None if no_length[i] else float(cosine[i]),
            "scale": {
                "equal_length": None if no_length[i] else float(to_length[i]),
                "equal_gain": None if no_match[i] or to_gain is None else float(to_gain[i]),
            },
        }
        for i in range(len(length))
    ]


def _estimates(
    formula: Callable[[np.ndarray, np.ndarray], np.ndarray],
    closed: list[str],
    left: _Statistic,
    right: _Statistic | None = None,
) -> list[dict[str, Any]]:
    """formula(left, right) of every column with its jackknife error and interval; two sets of prompts count in quadrature, with
    Student's interval on Welch's degrees of freedom.

    closed: for every column the reason why there is no such number, or "".
    """
    right = right or left
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value = formula(left.value, right.value)
        if left.same_prompts == right.same_prompts:
            terms = [_jackknife(formula(left.left_out, right.left_out))]
        else:
            of_left = formula(left.left_out, np.broadcast_to(right.value, left.left_out.shape))
            of_right = formula(np.broadcast_to(left.value, right.left_out.shape), right.left_out)
            terms = [_jackknife(of_left), _jackknife(of_right)]
    counts = [len(left.left_out) - 1, len(right.left_out) - 1]
    found = zip(value, zip(*terms, strict=True), closed, strict=True)
    entries = [
        _nothing(why)
        if why
        else _estimate(float(v), math.hypot(*errors), welch_freedom(zip(map(float, errors), counts, strict=False)))
        for v, errors, why in found
    ]
    if left.same_prompts == right.same_prompts:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            series = formula(left.left_out, right.left_out).T
        entries = [
            entry | ends_of(entry["value"], of_column) if entry["standard_error"] is not None else entry
            for entry, of_column in zip(entries, series, strict=True)
        ]
    return entries


def _jackknife(left_out: np.ndarray) -> np.ndarray:
    return np.array([jackknife_standard_error(torch.from_numpy(column.copy())) for column in left_out.T])


def _estimate(value: float, error: float, freedom: float) -> dict[str, Any]:
    if not np.isfinite(value):
        return _nothing("not defined: it divides by 0")
    entry = {"value": value, "standard_error": None, "degrees_of_freedom": None}
    if not np.isfinite(error):
        return entry | {"reason": "no standard error: too few prompts to leave one out"}
    return entry | {"standard_error": error, "degrees_of_freedom": freedom if math.isfinite(freedom) else None}


def _nothing(reason: str) -> dict[str, Any]:
    return {"value": None, "standard_error": None, "degrees_of_freedom": None, "reason": reason}


def why_not_a_gain(entry: Mapping[str, Any]) -> str:
    """Why a predicted gain of reward cannot stand below a fraction bar; empty where it can."""
    gain = known(entry)
    if gain is None or gain.holds_zero is None:
        return f"no gain of reward to divide by: {entry['reason']}"
    if gain.holds_zero:
        return f"its gain of reward, {gain.text()}, {NOT_FROM_ZERO}"
    return "" if gain.value > 0 else f"it is predicted to lower reward ({gain.text()})"


def _spared(arrays: KernelArrays, k: int) -> dict[str, Any]:
    """-sum dH_i of the k costliest sequences, chosen on one half of the evaluation prompts and judged on the other.

    Judged where it was chosen, a choice is flattered: part of what made a share the lowest was noise. Mean of both ways
    round, under the kernel's P; standard error with the choice held.
    """
    labels = arrays.evaluation
    prompts, place = np.unique(labels.prompt_index, return_inverse=True)
    if len(prompts) < 4:
        return _nothing("too few evaluation prompts for two halves of two")
    shares = arrays.step_factor * arrays.entropy_fisher * arrays.weights  # (n_eval, n_train)
    values, errors = [], []
    for half in (0, 1):
        chosen = costliest(shares[place % 2 == half].mean(0), k)
        judged = place % 2 != half
        spared = -shares[np.ix_(judged, chosen)].sum(1)
        values.append(spared.mean())
        errors.append(jackknife_over_prompts(torch.from_numpy(spared), torch.from_numpy(place[judged])))
    halves = (np.unique(place[place % 2 == half]).size for half in (1, 0))
    freedom = welch_freedom((float(e), n - 1) for e, n in zip(errors, halves, strict=True))
    return _estimate(float(np.mean(values)), float(np.hypot(*errors) / 2), freedom)


def cost_sentence(table: Mapping[str, Any]) -> str:
    """What entropy the schemes cost, and which differ from the step as trained; no more than their intervals show."""
    rows = [row for row in table["rows"] if row["kind"] == "scheme" and row.get("cosine_with_run") is not None]
    if not rows:
        return (
            "No weighting scheme can be compared with the run's own: with these rewards and weights none makes a step."
        )
    named = f"Of {counted(len(rows), 'weighting scheme')} on {counted(table['n_train'], 'training sequence')}, "
    priced = [row for row in rows if row["entropy_cost_per_reward"]["value"] is not None]
    if not priced:
        span, order = _extremes(rows, lambda row: row["delta_h"]["equal_length"])
        return (
            f"{named}none has a predicted gain of reward whose 95% interval excludes 0, so entropy has no price in reward; in a "
            f"step of the run's length entropy changes {span} nats per token ({BRACKETS}){order}."
        )
    gains = f"{len(priced)} {'has' if len(priced) == 1 else 'have'} a predicted gain of reward whose 95% interval excludes 0"
    span, order = _extremes(priced, lambda row: row["entropy_cost_per_reward"], plus=False)
    text = f"{named}{gains}; a unit of mean reward costs entropy {span} nats per token ({BRACKETS}){order}"
    differences = [known(row["minus_run"]["equal_gain"]) for row in priced]
    judged = [d for d in differences if d is not None and d.holds_zero is not None]
    if not judged:
        why = (
            table["rows"][0].get("delta_h", {}).get("equal_gain", {}).get("reason")
            or "no error of the difference is known"
        )
        return f"{text}; whether any differs from the step as trained {UNTOLD}: {why}."
    alike = sum(d.holds_zero is True for d in judged)
    return f"{text}; at equal gain {alike} of {len(judged)} {ALIKE} from the step as trained, by the paired difference."


def _extremes(rows: list[dict[str, Any]], entry: Callable[[dict[str, Any]], Any], plus: bool = True) -> tuple[str, str]:
    """The smallest and the largest, each with its interval; one where there is one, and a word where the intervals overlap."""
    low, high = (pick(rows, key=lambda row: entry(row)["value"]) for pick in (min, max))
    ends = [f"{shown(entry(row), plus)} ({row['label']})" for row in (low, high)]
    least, most = known(entry(low)), known(entry(high))
    if low is high or least is None or most is None or least.value == most.value:
        return f"by {ends[0]}", ""
    overlap = least.high is None or most.low is None or least.high >= most.low
    order = (
        f"; which of them is the least {UNTOLD}, their intervals overlap" if overlap and least.low != least.high else ""
    )
    return f"from {ends[0]} to {ends[1]}", order

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
recomputed whole, the step held as it is: the run's own change has the interval of the step's batch part. (Where training rows are
not in memory, the spread of dh comes from KH, under the kernel's P.) A gain whose 95% interval
holds 0 is no denominator: what would divide by it is None and says why.

Without kernels their products with w come from derivatives along P sum_i w_i dS_i, a gradient and a pass in forward mode for
each w; what needs entries of their own (gain from the training side, choices judged on other prompts) is missing.
Source: docs/analyses/weighting-schemes.md; the weights themselves: candidate_weights.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from entropy_core.interventions import SCHEMES
from entropy_core.uncertainty import jackknife_over_prompts, jackknife_standard_error
from entropy_experiments.analyses.arrays import KernelArrays, SequenceLabels, StepArrays
from entropy_experiments.analyses.candidate_weights import DROP_TOP, labelled_weights, most_lowering
from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.weighting_results import (
    ChangesBesideRun,
    EntropyChanges,
    MeasuredChange,
    Normalisation,
    WeightingResult,
    WeightingRow,
    WeightScales,
)
from entropy_experiments.statistics.confidence import NOT_FROM_ZERO
from entropy_experiments.statistics.jackknife_interval import ends_of
from entropy_experiments.text.numbers import counted
from rl_training.intervals import welch_freedom


@dataclass(frozen=True)
class _Statistic:
    """(m,) values of m weightings, and (B, m) values with each of B prompts left out."""

    value: np.ndarray
    left_out: np.ndarray
    same_prompts: bool = True  # whether those B prompts are the evaluation prompts


@dataclass(frozen=True)
class Responses:
    """What the kernels make of m weightings. entropy, score: (n_eval, m) sum_i KH(t, i) w_i, and of K1. squares: (m,) w^T K w.
    with_run: (m,) the same with the run's own weights, the first column, on the left.
    """

    entropy: np.ndarray
    score: np.ndarray
    squares: np.ndarray
    with_run: np.ndarray


def kernel_responses(arrays: KernelArrays, columns: np.ndarray) -> Responses:
    """Of (n_train, m) columns, from the matrices."""
    inner = columns.T @ arrays.train_fisher @ columns
    return Responses(arrays.entropy_fisher @ columns, arrays.fisher @ columns, np.diag(inner), inner[0])


def weighting_schemes(
    arrays: StepArrays,
    max_completion_length: int | None = None,
    drop_top: tuple[int, ...] = DROP_TOP,
    respond: Callable[[np.ndarray], Responses] | None = None,
) -> WeightingResult:
    """The table of all schemes and filters.

    Args:
        arrays: labels and the step's own weights, with kernels.
        max_completion_length: what dr_grpo's constant normaliser divides by.
        drop_top: numbers of sequences to leave out.
        respond: where there are no kernels, in their place.

    Returns:
        The record that summary.json holds, the run's own weights first. A row without weights has a reason in place of numbers.

    Raises:
        ValueError: arrays of other shapes than the labels', or entries that are not finite.
    """
    _check(arrays)
    table = labelled_weights(arrays, max_completion_length, drop_top)
    known = {name: weights for name, (_, weights) in table.items() if not isinstance(weights, str)}
    columns = np.stack(list(known.values()), axis=1)
    if respond is not None:
        found = respond(columns)
    elif isinstance(arrays, KernelArrays):
        found = kernel_responses(arrays, columns)
    else:
        raise ValueError("without kernels somebody must respond to weightings in their place")
    gain, side, note = _reward_gain(arrays, columns, found)
    numbers = dict(zip(known, _numbers(arrays, columns, found, gain, note), strict=True))
    rows = []
    for name, (label, weights) in table.items():
        kind = "run" if name == "run" else "scheme" if name in SCHEMES else "filter"
        entry = numbers.get(name, {"reason": weights})
        if name in known and name.startswith("drop_top_"):
            entry["spared"] = _spared(arrays, int(name.removeprefix("drop_top_")))
        rows.append(WeightingRow(name=name, label=label, kind=kind, **entry))
    return WeightingResult(
        rows=rows,
        weights={name: weights.tolist() for name, weights in known.items()},
        gain_side=side,
        gain_note=note,
        n_eval=len(arrays.evaluation),
        n_train=len(arrays.training),
        eval_prompts=len(np.unique(arrays.evaluation.prompt_index)),
    )


MeasuredWeighting = tuple[float, float | None] | tuple[float, float | None, float]


def with_measurements(
    table: WeightingResult, measured: Mapping[str, Mapping[Normalisation, MeasuredWeighting]]
) -> WeightingResult:
    """`table` with measured changes beside the predicted ones.

    Args:
        table: as `weighting_schemes` returns it.
        measured: name -> normalisation -> (value, standard error) in nats per token, of the step that these weights (times the
            row's `scale`) really make less the step that zero weights make: momentum and decay are in both, and no prediction
            here holds them. Where a third number is given it is the effective sample, of `table.n_eval` sequences.

    Raises:
        ValueError: a name that the table lacks, or an unknown normalisation.
    """
    names = [row.name for row in table.rows]
    for name in measured:
        if name not in names:
            raise ValueError(f"measured holds {name!r}, which is no row of the table: {', '.join(names)}")
        if unknown := sorted(set(measured[name]) - set(get_args(Normalisation))):
            known = ", ".join(get_args(Normalisation))
            raise ValueError(f"measured[{name!r}] holds {unknown[0]!r}: choose from {known}")
    rows = []
    for row in table.rows:
        own = measured.get(row.name, {})
        actual = {key: _against(row.delta_h, key, table.n_eval, *entry) for key, entry in own.items()}
        rows.append(row.model_copy(update={"actual": actual}) if actual else row)
    return table.model_copy(update={"rows": tuple(rows)})


def _against(
    predicted: EntropyChanges | None,
    key: Normalisation,
    sequences: int,
    value: float,
    error: float | None,
    effective: float | None = None,
) -> MeasuredChange:
    expected = None if predicted is None else getattr(predicted, key).value
    return MeasuredChange(
        value=value,
        standard_error=error,
        ratio=value / expected if expected else None,
        z=None,
        effective_sample_size=effective,
        trustworthy=None if effective is None else effective >= sequences / 2,
    )


def _check(arrays: StepArrays) -> None:
    rows, columns = len(arrays.evaluation), len(arrays.training)
    kernels = {"fisher": (rows, columns), "entropy_fisher": (rows, columns), "train_fisher": (columns, columns)}
    shapes = kernels if isinstance(arrays, KernelArrays) else {}
    shapes |= dict.fromkeys(("weights", "advantages", "shares", "products"), (columns,))
    for name, shape in shapes.items():
        values = np.asarray(getattr(arrays, name))
        if values.shape != shape:
            raise ValueError(f"{name} is {values.shape}, but the labels make it {shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds {int((~np.isfinite(values)).sum())} entries that are not finite")


def _entropy_changes(arrays: StepArrays, columns: np.ndarray, found: Responses) -> _Statistic:
    """dh under P_t, recomputed whole without each prompt; where products without it are not known, it moves by what the mean over
    KH's rows moves, the entropy that these are centred with held.
    """
    value = arrays.products @ columns
    if arrays.left_out_products is not None:
        return _Statistic(arrays.step_factor * value, arrays.step_factor * (arrays.left_out_products @ columns))
    rows = found.entropy
    left_out = [value + rows[kept].mean(0) - rows.mean(0) for kept in _leave_one_out(arrays.evaluation) if kept.any()]
    return _Statistic(arrays.step_factor * value, arrays.step_factor * np.array(left_out).reshape(-1, columns.shape[1]))


def _leave_one_out(labels: SequenceLabels) -> list[np.ndarray]:
    return [labels.prompt_index != prompt for prompt in np.unique(labels.prompt_index)]


def _reward_gain(
    arrays: StepArrays, columns: np.ndarray, found: Responses
) -> tuple[_Statistic | None, str | None, str]:
    """The statistic, its side, and in words where it comes from."""
    reward, known = arrays.evaluation.reward, np.isfinite(arrays.evaluation.reward)
    if np.unique(reward[known]).size > 1:
        responses = arrays.step_factor * found.score
        left_out = [_covariance(reward, responses, known & kept) for kept in _leave_one_out(arrays.evaluation)]
        note = f"predicted gain of mean reward on {counted(int(known.sum()), 'evaluation sequence')}"
        return _Statistic(_covariance(reward, responses, known), np.array(left_out)), "evaluation", note
    why = "are all equal" if known.any() else "are missing"
    if not isinstance(arrays, KernelArrays):
        return None, None, f"evaluation rewards {why}, and without kernels training rewards cannot stand in"
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


def _numbers(
    arrays: StepArrays, columns: np.ndarray, found: Responses, gain: _Statistic | None, note: str
) -> list[dict[str, Any]]:
    """The numbers of a row for each column; column 0 is the run's own."""
    entropy = _entropy_changes(arrays, columns, found)
    length = arrays.step_factor * np.sqrt(np.clip(found.squares, 0.0, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        to_length = length[0] / length
        cosine = found.with_run / np.sqrt(found.squares[0] * found.squares)
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
            "delta_h": EntropyChanges(raw=raw[i], equal_length=equal_length[i], equal_gain=equal_gain[i]),
            "minus_run": ChangesBesideRun(equal_length=over_length[i], equal_gain=over_gain[i]),
            "reward_gain": gains[i],
            "entropy_cost_per_reward": cost[i],
            "update_length": float(length[i]),
            "cosine_with_run": None if no_length[i] else float(cosine[i]),
            "scale": WeightScales(
                equal_length=None if no_length[i] else float(to_length[i]),
                equal_gain=None if no_match[i] or to_gain is None else float(to_gain[i]),
            ),
        }
        for i in range(len(length))
    ]


def _estimates(
    formula: Callable[[np.ndarray, np.ndarray], np.ndarray],
    closed: list[str],
    left: _Statistic,
    right: _Statistic | None = None,
) -> list[StudentEstimate]:
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
            entry.model_copy(update=ends_of(entry.value, of_column)) if entry.standard_error is not None else entry
            for entry, of_column in zip(entries, series, strict=True)
        ]
    return entries


def _jackknife(left_out: np.ndarray) -> np.ndarray:
    return np.array([jackknife_standard_error(torch.from_numpy(column.copy())) for column in left_out.T])


def _estimate(value: float, error: float, freedom: float) -> StudentEstimate:
    if not np.isfinite(value):
        return _nothing("not defined: it divides by 0")
    if not np.isfinite(error):
        reason = "no standard error: too few prompts to leave one out"
        return StudentEstimate(value=value, standard_error=None, degrees_of_freedom=None, reason=reason)
    known = freedom if math.isfinite(freedom) else None
    return StudentEstimate(value=value, standard_error=error, degrees_of_freedom=known)


def _nothing(reason: str) -> StudentEstimate:
    return StudentEstimate(value=None, standard_error=None, degrees_of_freedom=None, reason=reason)


def why_not_a_gain(entry: StudentEstimate) -> str:
    """Why a predicted gain of reward cannot stand below a fraction bar; empty where it can."""
    gain = entry.known()
    if gain is None or gain.holds_zero is None:
        return f"no gain of reward to divide by: {entry.reason}"
    if gain.holds_zero:
        return f"its gain of reward, {gain.text()}, {NOT_FROM_ZERO}"
    return "" if gain.value > 0 else f"it is predicted to lower reward ({gain.text()})"


def _spared(arrays: StepArrays, k: int) -> StudentEstimate:
    """-sum dH_i of the k sequences that lower entropy most, chosen on one half of the evaluation prompts and judged on the other.

    Judged where it was chosen, a choice is flattered: part of what made a share the lowest was noise. Mean of both ways
    round, under the kernel's P; standard error with the choice held.
    """
    if not isinstance(arrays, KernelArrays):
        return _nothing("it needs the kernel, which was not computed")
    labels = arrays.evaluation
    prompts, place = np.unique(labels.prompt_index, return_inverse=True)
    if len(prompts) < 4:
        return _nothing("too few evaluation prompts for two halves of two")
    shares = arrays.step_factor * arrays.entropy_fisher * arrays.weights  # (n_eval, n_train)
    values, errors = [], []
    for half in (0, 1):
        chosen = most_lowering(shares[place % 2 == half].mean(0), k)
        judged = place % 2 != half
        spared = -shares[np.ix_(judged, chosen)].sum(1)
        values.append(spared.mean())
        errors.append(jackknife_over_prompts(torch.from_numpy(spared), torch.from_numpy(place[judged])))
    halves = (np.unique(place[place % 2 == half]).size for half in (1, 0))
    freedom = welch_freedom((float(e), n - 1) for e, n in zip(errors, halves, strict=True))
    return _estimate(float(np.mean(values)), float(np.hypot(*errors) / 2), freedom)

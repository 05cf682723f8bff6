"""Checks of one shape in one world: name -> (R,) whether an interval held the truth, or a rule rejected, in each of R buffers."""

from __future__ import annotations

import math

import numpy as np
import torch

from benchmarks.calibration_buffers import Columns, columns, draw, sums, truths, with_each_left_out
from benchmarks.calibration_world import Shape, World
from entropy_core.fold_gradients import fold_estimate
from entropy_experiments.statistics.agreement import paired_agreement
from entropy_experiments.statistics.jackknife_interval import (
    FEWEST_FOR_LEVEL,
    carried_by_few,
    effective_degrees_of_freedom,
    jackknife_interval,
)
from rl_training.intervals import interval, t_quantile, welch_freedom
from rl_training.probe.history import error_of_sum

Hits = dict[str, np.ndarray]

GAP = 0.15
FOLDS = 4
STEPS = 12
KEEP = 0.8
CHECKPOINTS = (0.0, 0.4, 0.8, 1.2)
NAMES = {
    "entropy": "entropy",
    "entropy per completion": "entropy per completion",
    "rao_blackwell": "predicted",
    "per completion": "predicted per completion",
    "split": "predicted by split",
    "score_function": "predicted by score function",
    "fixed_prefix": "predicted on given tokens",
    "measured": "measured",
    "measured on given tokens": "measured on given tokens",
}
"""Of `calibration_buffers.numbers` -> what tables call it."""


def student(value: np.ndarray, left_out: np.ndarray, truth: float) -> np.ndarray:
    """(R,) whether Student's interval on one degree less than there are units holds the truth: the rule before."""
    count = left_out.shape[-1]
    error = np.sqrt((count - 1) / count * np.square(left_out - left_out.mean(-1, keepdims=True)).sum(-1))
    return np.abs(value - truth) <= t_quantile(count - 1) * error


def interval_checks(world: World, shape: Shape, buffers: int, rng: np.random.Generator) -> Hits:
    """Of every number of an analysis; measurements that are not to be trusted have no interval, and are counted."""
    drawn, truth = draw(world, shape, buffers, rng), truths(world, shape.step)
    whole, left_out, effective = with_each_left_out(sums(columns(world, shape.step), drawn))
    trusted = effective >= 0.5
    hits: Hits = {}
    for name, label in NAMES.items():
        here = trusted if name == "measured" else np.ones(buffers, dtype=bool)
        part = effective if name == "measured" else np.ones(buffers)
        if name == "score_function" and (shape.completions[1] == 1 or shape.copies > 1):
            continue  # no interval is made where prompts have one completion; copies are no draws, on which its baseline rests
        found = jackknife_interval(whole[name], left_out[name], part)
        held = found.holds(truth[name])
        hits[f"coverage of {label}"] = held[here]
        if label in ("predicted", "measured"):
            few = [
                shape.prompts < FEWEST_FOR_LEVEL or carried_by_few(f, shape.prompts) for f in found.degrees_of_freedom
            ]
            told = np.array(few)[here]
            hits[f"few prompts said to carry the error of {label}"] = told
            hits[f"interval of {label} holds, where that is not said"] = held[here][~told]
        if label in ("entropy", "predicted", "measured"):
            hits[f"coverage of {label}, by Student's t alone, as before"] = student(
                whole[name], left_out[name], truth[name]
            )
    return hits | {"measurements not to be trusted": ~trusted}


def tail_checks(world: World, shape: Shape, buffers: int, rng: np.random.Generator) -> Hits:
    """How often a buffer holds none of what carries half of the variance of a prediction, and what an interval is worth then.

    Carriers: of one completion a prompt, the completions whose influence psi (of the ratio) is largest, as few as have half of
    E[psi^2]; of several, prompts by the mean influence of theirs.
    """
    values, truth = columns(world, shape.step), truths(world, shape.step)
    drawn = draw(world, shape, buffers, rng)
    whole, left_out, _ = with_each_left_out(sums(values, drawn))
    held = jackknife_interval(whole["rao_blackwell"], left_out["rao_blackwell"]).holds(truth["rao_blackwell"])
    chance = world.by_prompt.numpy() / len(world.by_prompt)
    mean = {name: float((chance.ravel() * values[name]).sum()) for name in ("T", "R")}
    h, of_entropy = truth["entropy"], values["A"] - truth["entropy"] * values["T"]
    psi = values["C"] - h * values["R"] - truth["rao_blackwell"] * values["T"] - mean["R"] / mean["T"] * of_entropy
    psi = psi.reshape(chance.shape)
    if shape.completions[1] == 1:
        variance, of_each, place = chance.ravel() * psi.ravel() ** 2, psi.ravel() ** 2, drawn.index
    else:
        of_each = ((chance * psi).sum(1) / chance.sum(1)) ** 2
        variance, place = chance.sum(1) * of_each, drawn.prompts[..., None]
    order = np.argsort(-of_each)
    few = order[: int(np.searchsorted(np.cumsum(variance[order]), variance.sum() / 2)) + 1]
    holds = np.isin(place, few).reshape(buffers, -1).any(1)
    return {
        "buffers without what carries half of the variance": ~holds,
        "interval of predicted holds, of buffers with it": held[holds],
        "interval of predicted holds, of buffers without it": held[~holds],
    }


def agreement_checks(world: World, shape: Shape, buffers: int, rng: np.random.Generator) -> Hits:
    """Of a prediction that is right (its expectation is the true change, whatever the second order does), and 15% too large."""
    drawn, truth = draw(world, shape, buffers, rng), truths(world, shape.step)
    whole, left_out, _ = with_each_left_out(sums(columns(world, shape.step), drawn))
    right = truth["measured"] / truth["rao_blackwell"]
    hits: Hits = {}
    for name, factor in (("level", right), (f"power at a gap of {GAP:.0%}", right * (1 + GAP))):
        difference = factor * whole["rao_blackwell"] - whole["measured"]
        series = factor * left_out["rao_blackwell"] - left_out["measured"]
        verdicts = [paired_agreement(float(d), s) for d, s in zip(difference, series, strict=True)]
        hits[f"{name} of the agreement rule"] = np.array([v is not None and not v.agrees for v in verdicts])
        errors = [
            jackknife_interval(k * whole[n], k * left_out[n]).standard_error
            for k, n in ((factor, "rao_blackwell"), (1.0, "measured"))
        ]
        hits[f"{name} in quadrature, as before"] = np.abs(difference) > 2 * np.hypot(*errors)
    return hits


def fold_checks(world: World, shape: Shape, buffers: int, rng: np.random.Generator) -> Hits:
    """Of the probe's error over folds of prompts, of unequal size where prompts are."""
    summed, truth = sums(columns(world, shape.step), draw(world, shape, buffers, rng)), truths(world, shape.step)
    parts, shares = folds_of(summed)
    held, before = [], []
    for contributions, own in zip(torch.from_numpy(parts), torch.from_numpy(shares), strict=True):
        found = fold_estimate(contributions, own)
        ends = interval(found.value, found.standard_error, found.degrees_of_freedom)
        held.append(ends[0] <= truth["rao_blackwell"] <= ends[1])
        before.append(abs(found.value - truth["rao_blackwell"]) <= t_quantile(FOLDS - 1) * found.standard_error)
    return {
        f"coverage of {FOLDS} folds": np.array(held),
        f"coverage of {FOLDS} folds, by Student's t alone, as before": np.array(before),
    }


def folds_of(summed: Columns) -> tuple[np.ndarray, np.ndarray]:
    """(R, F) contributions of folds to the prediction, and the part of the sequences that each has."""
    total = {name: values.sum(-1, keepdims=True) for name, values in summed.items()}
    terms = (summed["C"] - total["A"] / total["T"] * summed["R"]) / total["T"]
    fold_of = np.arange(terms.shape[1]) % FOLDS
    parts, shares = (
        np.stack([values[:, fold_of == fold].sum(1) for fold in range(FOLDS)], 1) for values in (terms, summed["n"])
    )
    return parts, shares / total["n"]


def checkpoint_checks(world: World, shape: Shape, buffers: int, rng: np.random.Generator) -> Hits:
    """Of sums over checkpoints and of differences between two, with the same prompts at each and with prompts of their own."""
    worlds = [world if where == 0 else world.at(where) for where in CHECKPOINTS]
    hits: Hits = {}
    true = [truths(w, shape.step) for w in worlds]
    for label, shared in (("the same prompts", True), ("prompts of their own", False)):
        first = draw(worlds[0], shape, buffers, rng)
        draws = [first, *(draw(w, shape, buffers, rng, first.prompts if shared else None) for w in worlds[1:])]
        found = [with_each_left_out(sums(columns(w, shape.step), d)) for w, d in zip(worlds, draws, strict=True)]
        trusted = np.all([effective >= 0.5 for *_, effective in found], axis=0)
        for name in ("rao_blackwell", "measured"):
            here = trusted if name == "measured" else np.ones(buffers, dtype=bool)
            values, series = ([f[k][name] for f in found] for k in (0, 1))
            held = _holds(values, series, np.ones(len(worlds)), sum(t[name] for t in true), shared)
            hits[f"coverage of a sum over {len(worlds)} checkpoints, {NAMES[name]}, {label}"] = held[here]
        ends = [0, len(worlds) - 1]
        for name in ("entropy", "rao_blackwell"):
            values, series = ([found[k][part][name] for k in ends] for part in (0, 1))
            gap = true[ends[1]][name] - true[ends[0]][name]
            held = _holds(values, series, np.array([-1.0, 1.0]), gap, shared)
            hits[f"coverage of a difference of two results, {NAMES[name]}, {label}"] = held
        again = with_each_left_out(
            sums(columns(world, shape.step), draw(world, shape, buffers, rng, first.prompts if shared else None))
        )
        values, series = ([found[0][k]["entropy"], again[k]["entropy"]] for k in (0, 1))
        held = _holds(values, series, np.array([-1.0, 1.0]), 0.0, shared)
        hits[f"level of a difference of two results, entropy, {label}"] = ~held
    return hits


def _holds(
    values: list[np.ndarray], series: list[np.ndarray], signs: np.ndarray, truth: float, shared: bool
) -> np.ndarray:
    """(R,) whether the interval of a signed sum holds the truth: jointly where prompts are shared, else by Welch's."""
    value = sum(sign * v for sign, v in zip(signs, values, strict=True))
    if shared:
        return jackknife_interval(value, sum(sign * s for sign, s in zip(signs, series, strict=True))).holds(truth)
    errors = [jackknife_interval(v, s).standard_error for v, s in zip(values, series, strict=True)]
    freedoms = [effective_degrees_of_freedom(s) for s in series]
    held = []
    for row, estimate in enumerate(value):
        terms = [(float(e[row]), float(f[row])) for e, f in zip(errors, freedoms, strict=True)]
        low, high = interval(estimate, math.hypot(*(e for e, _ in terms)), welch_freedom(terms))
        held.append(low <= truth <= high)
    return np.array(held)


def running_average_checks(world: World, shape: Shape, buffers: int, rng: np.random.Generator) -> Hits:
    """Of the probe's cumulative prediction: steps of fresh buffers whose gradients are averaged, so that steps share noise."""
    values, truth = columns(world, shape.step), STEPS * shape.step * world.slope
    made = [folds_of(sums(values, draw(world, shape, buffers, rng))) for _ in range(STEPS)]
    held = []
    for row in range(buffers):
        average, shares, estimates = made[0][0][row], made[0][1][row], []
        for parts, own in made:
            average = KEEP * average + (1 - KEEP) * parts[row] if estimates else parts[row]
            shares = KEEP * shares + (1 - KEEP) * own[row] if estimates else own[row]
            estimates.append(fold_estimate(torch.from_numpy(average), torch.from_numpy(shares)))
        error = error_of_sum(np.array([e.standard_error for e in estimates]), [list(e.deviations) for e in estimates])
        assert error is not None
        freedom = float(effective_degrees_of_freedom(np.sum([e.deviations for e in estimates], axis=0)))
        low, high = interval(sum(e.value for e in estimates), error, freedom)
        held.append(low <= truth <= high)
        if row + 1 >= min(buffers, 400):
            break
    return {f"coverage of a sum of {STEPS} probed steps with a running average": np.array(held)}

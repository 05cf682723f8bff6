"""Do the shares say what happens when sequences are really left out of the step?

    predicted(A) = rest + (c_A / c) sum_{i in A} dh_i        measured(A): by a real AdamW step with the sequences in A alone

A is a random half of the training sequences (or of their prompts); rest is what momentum and decay are predicted to do; c
and c_A are the clip coefficients with all sequences and with those in A. The linear datamodelling score is Spearman's rank
correlation of predicted and measured over many A; its interval is a percentile bootstrap over the A. Prediction and
measurement must share estimand and tokens: shares by the split estimator are the derivative of the reweighted (SNIS)
measurement on the same tokens. Shares by another estimator estimate the same change from the same tokens with other noise,
and their score is bounded by it.

Sources: Ilyas et al. 2022 (datamodels), Park et al. 2023 (linear datamodelling score); docs/analyses/intervention.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from entropy_experiments.analyses.attribution import extreme_sequences
from entropy_experiments.records.step_results import (
    FullStep,
    InterventionResult,
    RandomRemoval,
    Removal,
    Removals,
    ShareScore,
)
from entropy_experiments.text.numbers import counted
from rl_training.errors import UserError

Measure = Callable[[Tensor], float]
"""(n_train,) float64 loss weights -> measured change of entropy, nats per token, of a real step with them."""

_BOOTSTRAP = 2000
_RANDOM_REMOVALS = 5


@dataclass(frozen=True)
class SharePrediction:
    """A prediction that is linear in which sequences take part: rest + (c_A / c) sum over A of shares, nats per token.

    shares: (n_train,). rest: what the step does besides, by the same estimator. with_clipping: whether to scale by c_A / c;
    false for shares that follow clipping by themselves (response shares).
    """

    shares: np.ndarray
    rest: float = 0.0
    with_clipping: bool = True

    def change(self, members: np.ndarray, clip_ratio: float) -> float:
        """Of a step with these (n_train,) bool members alone."""
        return self.rest + (clip_ratio if self.with_clipping else 1.0) * float(np.asarray(self.shares)[members].sum())


def half_subsets(units: int | np.ndarray, count: int = 40, seed: int = 0) -> np.ndarray:
    """(count, n) bool: random halves, no two alike; the same for the same seed.

    units: n for halves of n sequences (rounded down), or the (n,) prompt index for halves of the prompts with all their
    sequences.

    Raises UserError where there are fewer different halves than asked for.
    """
    of_prompts = not isinstance(units, int | np.integer)
    labels = np.asarray(units) if of_prompts else np.arange(int(units))
    members, group = np.unique(labels, return_inverse=True)
    size = len(members) // 2
    possible = math.comb(len(members), size) if size else 0
    if possible < count:
        what = "prompt" if of_prompts else "sequence"
        raise UserError(
            f"{counted(len(members), what)} can be halved in {possible} ways, and {count} subsets are asked for: take a larger "
            "training batch, or fewer subsets"
        )
    rng, seen, rows = np.random.default_rng(seed), set(), []
    while len(rows) < count:
        chosen = np.zeros(len(members), dtype=bool)
        chosen[rng.permutation(len(members))[:size]] = True
        if chosen.tobytes() not in seen:
            seen.add(chosen.tobytes())
            rows.append(chosen[group])
    return np.stack(rows)


def linear_datamodelling_score(
    subsets: np.ndarray,
    shares: np.ndarray,
    measured_changes: Sequence[float] | np.ndarray,
    clip_ratios: Sequence[float] | np.ndarray | None = None,
    rest: float = 0.0,
    seed: int = 0,
) -> ShareScore:
    """How well sums of shares predict measured changes over subsets.

    Args:
        subsets: (count, n) bool.
        shares: (n,) nats per token.
        measured_changes: (count,) nats per token.
        clip_ratios: (count,) c_A / c, where the clip coefficient differs.
        rest: what the step does besides, nats per token.
        seed: of the bootstrap.

    Returns:
        The score with its interval, and the least-squares line of measured on predicted.

    Raises:
        ValueError: shapes that disagree or numbers that are not finite.
    """
    members, values = np.asarray(subsets, dtype=bool), np.asarray(shares, dtype=np.float64)
    measured = np.asarray(measured_changes, dtype=np.float64)
    ratios = np.ones(len(members)) if clip_ratios is None else np.asarray(clip_ratios, dtype=np.float64)
    if members.ndim != 2 or members.shape[1:] != values.shape or not len(members) == len(measured) == len(ratios):
        raise ValueError(
            f"{members.shape} subsets with {values.shape} shares, {measured.shape} measurements and {ratios.shape} clip ratios"
        )
    if not all(np.isfinite(array).all() for array in (values, measured, ratios)):
        raise ValueError("a share, a measured change or a clip ratio is not finite")
    return _score(rest + ratios * (members @ values), measured, seed)


def _score(predicted: np.ndarray, measured: np.ndarray, seed: int) -> ShareScore:
    spreads = {"predicted": _spread(predicted), "measured": _spread(measured)}
    known = {
        "predicted": predicted.tolist(),
        "predicted_spread": spreads["predicted"],
        "measured_spread": spreads["measured"],
        "root_mean_square_error": float(np.sqrt(np.mean((measured - predicted) ** 2))),
    }
    reason = ""
    if len(measured) < 3:
        reason = f"a rank correlation of {counted(len(measured), 'subset')} says nothing"
    elif equal := [what for what, spread in spreads.items() if spread == 0.0]:
        reason = f"all {equal[0]} changes are equal"
    if reason:
        names = ("spearman", "interval", "pearson", "slope", "slope_interval", "intercept", "intercept_interval")
        return ShareScore(**known, **dict.fromkeys(names), reason=reason)
    return ShareScore(
        **known,
        spearman=float(_spearman(predicted, measured)),
        interval=_bootstrap_interval(predicted, measured, seed),
        pearson=float(np.corrcoef(predicted, measured)[0, 1]),
        **_line(predicted, measured),
        reason="",
    )


def _spread(values: np.ndarray) -> float:
    """Standard deviation; exactly 0 for values that are equal but for rounding."""
    if len(values) < 2 or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return 0.0
    return float(values.std(ddof=1))


def _spearman(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Rank correlations along the last axis; NaN where all of a side's values are equal."""
    ranks = [stats.rankdata(values, axis=-1) for values in (left, right)]
    x, y = (r - r.mean(-1, keepdims=True) for r in ranks)
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.divide((x * y).sum(-1), scale, out=np.full(np.shape(scale), np.nan), where=scale > 0)


def _line(predicted: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """Slope and intercept of measured on predicted, each with the 95% interval of a jackknife over subsets, which takes no error
    for equally large everywhere, on n - 2 degrees of freedom; None where a line cannot be had without one of them.
    """
    found = np.polyfit(predicted, measured, 1)
    count = len(measured)
    left_out = [np.delete(np.stack([predicted, measured]), k, axis=1) for k in range(count)]
    out: dict[str, Any] = {"slope": float(found[0]), "intercept": float(found[1])}
    if any(_spread(x) == 0.0 for x, _ in left_out):
        return out | {"slope_interval": None, "intercept_interval": None}
    lines = np.array([np.polyfit(x, y, 1) for x, y in left_out])
    errors = np.sqrt((count - 1) / count * np.square(lines - lines.mean(0)).sum(0))
    reach = float(stats.t.ppf(0.975, count - 2)) * errors
    for name, value, ends in zip(("slope", "intercept"), found, reach, strict=True):
        out[f"{name}_interval"] = [float(value - ends), float(value + ends)]
    return out


def _bootstrap_interval(predicted: np.ndarray, measured: np.ndarray, seed: int) -> list[float]:
    rows = np.random.default_rng(seed).integers(0, len(measured), (_BOOTSTRAP, len(measured)))
    found = _spearman(predicted[rows], measured[rows])
    return [float(q) for q in np.nanquantile(found, [0.025, 0.975])]


@dataclass(frozen=True)
class Halves:
    """How random halves of the training batch are chosen.

    Attributes:
        count: How many.
        prompt_index: (n_train,), halve prompts in place of sequences.
        seed: Of the halves, and of random removals.
    """

    count: int = 40
    prompt_index: np.ndarray | None = None
    seed: int = 0

    def of(self, weights: np.ndarray) -> np.ndarray:
        """(count, n_train) bool; sequences of weight 0 are in none. Raises UserError where there are not as many halves."""
        active = np.flatnonzero(weights)
        subsets = np.zeros((self.count, len(weights)), dtype=bool)
        halved = len(active) if self.prompt_index is None else np.asarray(self.prompt_index)[active]
        subsets[:, active] = half_subsets(halved, self.count, self.seed)
        return subsets


@dataclass(frozen=True)
class _Steps:
    """Real steps without some of the sequences: their change of entropy and clip coefficient."""

    measure: Measure
    clip: Callable[[Tensor], float] | None
    weights: np.ndarray

    def take(self, members: np.ndarray) -> tuple[float, float]:
        """(change, clip coefficient) of the step with (n_train,) bool members alone."""
        kept = torch.from_numpy(self.weights * members)
        return float(self.measure(kept)), 1.0 if self.clip is None else float(self.clip(kept))

    def without(self, sequences: Sequence[int] | np.ndarray) -> tuple[np.ndarray, float, float]:
        """(members, change, clip coefficient) of the step without these."""
        members = np.ones(len(self.weights), dtype=bool)
        members[sequences] = False
        return members, *self.take(members)


def prove_by_intervention(
    measure: Measure,
    weights: np.ndarray,
    predictions: Mapping[str, SharePrediction],
    *,
    clip: Callable[[Tensor], float] | None = None,
    halves: Halves = Halves(),
    top: int = 10,
) -> InterventionResult:
    """Take real steps with half of the sequences and without the extreme ones, and hold them against the shares.

    Args:
        measure, clip: `change` and `clip` of entropy_experiments.step.real_steps.StepMeasurement, or their like.
        weights: (n_train,) of the loss. Sequences of weight 0 are in no subset.
        predictions: name -> prediction, the first of them the headline, whose shares choose what is removed.
        halves, top: how subsets are chosen, and how many extreme sequences are removed.

    Returns:
        The record that summary.json holds.

    Raises:
        UserError: there are fewer different halves than wanted.
    """
    steps = _Steps(measure, clip, np.asarray(weights, dtype=np.float64))
    everyone, subsets = np.ones(len(steps.weights), dtype=bool), halves.of(steps.weights)
    full_change, full_clip = steps.take(everyone)
    taken = [steps.take(members) for members in subsets]
    measured, ratios = [change for change, _ in taken], [c / full_clip for _, c in taken]
    lowering, raising = _extreme_removals(steps, predictions, (full_change, full_clip), top)
    scores = {
        name: linear_datamodelling_score(
            subsets, p.shares, measured, ratios if p.with_clipping else None, p.rest, halves.seed
        )
        for name, p in predictions.items()
    }
    predicted = {name: p.change(everyone, 1.0) for name, p in predictions.items()}
    random = _random_removals(steps, full_change, top, halves.seed)
    return InterventionResult(
        unit="nats per token",
        by="sequence" if halves.prompt_index is None else "prompt",
        count=halves.count,
        size=float(subsets.sum(1).mean()),
        subsets=[np.flatnonzero(members).tolist() for members in subsets],
        measured=measured,
        clip_ratios=None if clip is None else ratios,
        scores=scores,
        headline=next(iter(predictions)),
        full_step=FullStep(measured=full_change, predicted=predicted),
        removals=Removals(lowering=lowering, raising=raising, random=random),
    )


def _extreme_removals(
    steps: _Steps, predictions: Mapping[str, SharePrediction], full: tuple[float, float], top: int
) -> list[Removal | None]:
    """Without the sequences of the lowest shares, and without those of the highest. full: change and clip of the whole step."""
    headline = next(iter(predictions.values()))
    out: list[Removal | None] = []
    for sequences in extreme_sequences(headline.shares, top):
        if not sequences:
            out.append(None)
            continue
        members, change, clip = steps.without(sequences)
        everyone, ratio = np.ones(len(members), dtype=bool), clip / full[1]
        out.append(
            Removal(
                sequences=sequences,
                measured=change,
                difference=change - full[0],
                predicted_difference={
                    name: p.change(members, ratio) - p.change(everyone, 1.0) for name, p in predictions.items()
                },
            )
        )
    return out


def _random_removals(steps: _Steps, full_change: float, top: int, seed: int) -> RandomRemoval | None:
    active = np.flatnonzero(steps.weights)
    size = min(top, len(active) // 2)
    if not size:
        return None
    rng = np.random.default_rng([seed, 1])
    differences = [steps.without(rng.permutation(active)[:size])[1] - full_change for _ in range(_RANDOM_REMOVALS)]
    return RandomRemoval(sequences=size, differences=differences, spread=_spread(np.asarray(differences)))

"""Does reward follow entropy by R = -a e^H + b over training, and would the first third have told the rest?

    R_t = b - a x_t + noise,  x_t = e^{H_t}          least squares over steps whose noise goes on from step to step
                                                     (entropy_experiments.statistics.series_regression)

H in nats per token, R mean reward. b - a is the reward at H = 0: what is left to gain once entropy is spent. Intervals and bands
(pointwise) allow for a correlation of neighbouring steps, of whatever size the residuals leave possible; its mean is reported.
Entropy is taken as known; noise in it pulls a towards 0.

Source of the law: Cui et al., The entropy mechanism of reinforcement learning for reasoning language models, 2025.
docs/analyses/evolution.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entropy_experiments.statistics.confidence import NOT_FROM_ZERO, known, shown
from entropy_experiments.statistics.series_regression import LEVEL, SeriesFit, Told, fit_series
from entropy_experiments.text.numbers import counted, plain

_FEWEST = 4
_GRID = 60
_ALIKE = 0.3


def _design(entropy: np.ndarray) -> np.ndarray:
    values = np.asarray(entropy, np.float64)
    return np.stack([-np.exp(values), np.ones_like(values)], 1)


def fit_law(entropy: np.ndarray, reward: np.ndarray) -> SeriesFit | str:
    """The fit of (n,) entropies in nats per token and (n,) rewards, in the order of training, or why there is none."""
    count = len(entropy)
    if count < _FEWEST:
        return (
            f"a curve with two constants and its errors need {_FEWEST} steps with entropy and reward, there are {count}"
        )
    rows = _design(entropy)
    if np.ptp(rows[:, 0]) <= 1e-9 * np.abs(rows[:, 0]).max():
        return "entropy is the same at all steps"
    return fit_series(rows, np.asarray(reward, np.float64))


def law_over_training(
    steps: Sequence[float], entropy: Sequence[float], reward: Sequence[float], *, fraction: float = 1 / 3
) -> dict[str, Any]:
    """Fit the law to all steps, and hold the forecast of the first `fraction` of them against the rest.

    steps, entropy (nats per token), reward: (n,) each, finite, in the order of training.

    Returns "level", "band" (how the bands were made), "points" {"step", "entropy", "reward"}, "sentence" and
        fit        {"n", "a", "b", "at_zero_entropy" (each {"value", "standard_error", "low", "high"}),
                   "residual_deviation", "r_squared", "autocorrelation" (of neighbouring steps' noise, its mean),
                   "curve" {"entropy", "reward", "low", "high"}, "reason"}
        forecast   the same of the first part, with "held_out" {"n", "predicted", "low", "high" (bands of single points),
                   "inside" (share of points), "mean_error_inside",
                   "mean_error" {"value" (came - forecast), "standard_error", "low", "high"},
                   "root_mean_square_error", "constant_root_mean_square_error" (of the first part's mean reward)}
    Nothing is NaN; where there is no fit its numbers are absent and "reason" says why.
    """
    order = np.argsort(np.asarray(steps, np.float64), kind="stable")
    columns = [np.asarray(column, np.float64)[order] for column in (steps, entropy, reward)]
    _, h, r = columns
    first = max(_FEWEST, int(np.ceil(fraction * len(h))))
    result: dict[str, Any] = {
        "level": LEVEL,
        "band": "pointwise, allowing for noise that goes on from step to step",
        "points": dict(zip(("step", "entropy", "reward"), (c.tolist() for c in columns), strict=True)),
        "fit": _described(fit_law(h, r), h, r, h),
    }
    if len(h) - first < 2:
        result["forecast"] = {
            "reason": f"{counted(len(h), 'step')} leave nothing to hold the first third's forecast against"
        }
        return result | {"sentence": _sentence(result)}
    early = fit_law(h[:first], r[:first])
    forecast = _described(early, h[:first], r[:first], h)
    if isinstance(early, SeriesFit):
        forecast["held_out"] = _held_out(early, h[first:], r[first:], float(r[:first].mean()))
    return result | {"forecast": forecast, "sentence": _sentence(result | {"forecast": forecast})}


def _described(fit: SeriesFit | str, entropy: np.ndarray, reward: np.ndarray, span: np.ndarray) -> dict[str, Any]:
    if isinstance(fit, str):
        return {"reason": fit}
    residuals = reward - fit.curve(_design(entropy)).value
    total = float(np.square(reward - reward.mean()).sum())
    grid = np.linspace(min(0.0, float(span.min())), float(span.max()), _GRID)
    curve, constants = fit.curve(_design(grid)), fit.curve(np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]))
    return {
        "n": fit.n,
        **{name: _number(constants, k) for k, name in enumerate(("a", "b", "at_zero_entropy"))},
        "residual_deviation": float(np.sqrt(residuals @ residuals / (fit.n - 2))),
        "r_squared": 1 - float(residuals @ residuals) / total if total > 0 else None,
        "autocorrelation": fit.correlation,
        "curve": {
            "entropy": grid.tolist(),
            "reward": curve.value.tolist(),
            "low": curve.low.tolist(),
            "high": curve.high.tolist(),
        },
        "reason": None,
    }


def _number(told: Told, place: int = 0) -> dict[str, float]:
    names = ("value", "standard_error", "low", "high")
    return {name: float(getattr(told, name)[place]) for name in names}


def _held_out(fit: SeriesFit, entropy: np.ndarray, reward: np.ndarray, constant: float) -> dict[str, Any]:
    rows = _design(entropy)
    single, mean = fit.coming(rows), fit.mean_coming(rows)
    misses, came = reward - single.value, float(reward.mean())
    off = Told(came - mean.value, mean.standard_error, came - mean.high, came - mean.low)
    return {
        "n": len(reward),
        "predicted": single.value.tolist(),
        "low": single.low.tolist(),
        "high": single.high.tolist(),
        "inside": float(((single.low <= reward) & (reward <= single.high)).mean()),
        "mean_error": _number(off),
        "mean_error_inside": bool(off.low[0] <= 0 <= off.high[0]),
        "root_mean_square_error": float(np.sqrt(np.square(misses).mean())),
        "constant_root_mean_square_error": float(np.sqrt(np.square(reward - constant).mean())),
    }


def _sentence(result: dict[str, Any]) -> str:
    fit, forecast = result["fit"], result["forecast"]
    if fit["reason"] is not None:
        return f"The law R = −a·e^H + b was not fitted: {fit['reason']}."
    a, b, zero = (shown(fit[key], plus=False) for key in ("a", "b", "at_zero_entropy"))
    steps = counted(fit["n"], "step")
    text = (
        f"Over {steps} R = −a·e^H + b fits with a = {a}, b = {b} (R² {plain(fit['r_squared'], 2)}), "
        f"so that spending all entropy would end at a reward of {zero}"
    )
    slope = known(fit["a"])
    if slope is None or slope.holds_zero is not False:
        text = f"Over {steps} R = −a·e^H + b has a = {a}, which {NOT_FROM_ZERO}: no trade of entropy for reward is seen"
    if fit["autocorrelation"] > _ALIKE:
        alike = plain(fit["autocorrelation"], 2)
        text += f"; noise goes on from step to step (correlation {alike}), which the intervals allow for"
    held = forecast.get("held_out")
    if held is None:
        return f"{text}. No forecast: {forecast['reason']}."
    better = held["root_mean_square_error"] < held["constant_root_mean_square_error"]
    verdict = "inside" if held["mean_error_inside"] else "OUTSIDE"
    return (
        f"{text}. Its forecast from the first {forecast['n']} steps: {held['inside']:.0%} of the {held['n']} later steps lie in "
        f"the {result['level']:.0%} band, and their mean reward came {shown(held['mean_error'])} from it, "
        f"{verdict} the band of the mean; by root mean square it is {plain(held['root_mean_square_error'], 2)} off, "
        f"{'better' if better else 'no better'} than expecting no change ({plain(held['constant_root_mean_square_error'], 2)})."
    )

"""Does reward follow entropy by R = -a e^H + b over training, and would the first third have told the rest?

    R_t = b - a x_t + noise,  x_t = e^{H_t}          ordinary least squares; covariance  s^2 (X'X)^-1,  s^2 = RSS/(n - 2)
    confidence band of the curve      R(x) +- t_{n-2} s sqrt(z'(X'X)^-1 z),          z = (-x, 1)
    band of a single new point        R(x) +- t_{n-2} s sqrt(1 + z'(X'X)^-1 z)
    mean over m new points            zbar in place of z, 1/m in place of 1

H in nats per token, R mean reward. b - a is the reward at H = 0: what is left to gain once entropy is spent. Bands are
pointwise, from this covariance, and exact where the noise is independent, normal and of one size. Steps of one run are none of
these to perfection: the lag-1 autocorrelation of the residuals is reported, and where it is beyond +-2/sqrt(n) the bands are
too narrow. Entropy is taken as known; noise in it pulls a towards 0.

Source of the law: Cui et al., The entropy mechanism of reinforcement learning for reasoning language models, 2025.
docs/analyses/evolution.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from entropy_experiments.statistics.confidence import NOT_FROM_ZERO, known, shown
from entropy_experiments.text.numbers import counted, plain

LEVEL = 0.95
_FEWEST = 4
_GRID = 60


@dataclass(frozen=True)
class LawFit:
    """Least squares of n points: coefficients (a, b), their (2, 2) covariance, the residuals' deviation s."""

    coefficients: np.ndarray
    covariance: np.ndarray
    deviation: float
    n: int

    def predict(self, entropy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(reward, standard error of the curve), both (m,), at (m,) entropies in nats per token."""
        rows = _design(entropy)
        return rows @ self.coefficients, np.sqrt(np.einsum("ij,jk,ik->i", rows, self.covariance, rows))

    def reach(self) -> float:
        """How many standard errors the two-sided band of LEVEL reaches to each side."""
        return float(stats.t.ppf((1 + LEVEL) / 2, self.n - 2))


def _design(entropy: np.ndarray) -> np.ndarray:
    values = np.asarray(entropy, np.float64)
    return np.stack([-np.exp(values), np.ones_like(values)], 1)


def fit_law(entropy: np.ndarray, reward: np.ndarray) -> LawFit | str:
    """The fit of (n,) entropies in nats per token and (n,) rewards, or why there is none."""
    count = len(entropy)
    if count < _FEWEST:
        return (
            f"a curve with two constants and its errors need {_FEWEST} steps with entropy and reward, there are {count}"
        )
    rows = _design(entropy)
    if np.ptp(rows[:, 0]) <= 1e-9 * np.abs(rows[:, 0]).max():
        return "entropy is the same at all steps"
    inverse = np.linalg.inv(rows.T @ rows)
    coefficients = inverse @ (rows.T @ reward)
    residuals = reward - rows @ coefficients
    variance = float(residuals @ residuals) / (count - 2)
    return LawFit(coefficients, variance * inverse, float(np.sqrt(variance)), count)


def law_over_training(
    steps: Sequence[float], entropy: Sequence[float], reward: Sequence[float], *, fraction: float = 1 / 3
) -> dict[str, Any]:
    """Fit the law to all steps, and hold the forecast of the first `fraction` of them against the rest.

    steps, entropy (nats per token), reward: (n,) each, finite, in the order of training.

    Returns "level", "band" (how the bands were made), "points" {"step", "entropy", "reward"}, "sentence" and
        fit        {"n", "a", "b", "at_zero_entropy" (each {"value", "standard_error",
                   "degrees_of_freedom"}), "residual_deviation", "r_squared",
                   "autocorrelation", "bands_too_narrow", "curve" {"entropy", "reward", "low", "high"}, "reason"}
        forecast   the same of the first part, with "held_out" {"n", "predicted", "low", "high" (bands of single points),
                   "inside" (share of points), "mean_error" {"value" (came - forecast), "standard_error"}, "mean_error_inside",
                   "root_mean_square_error", "constant_root_mean_square_error" (of the first part's mean reward)}
    Nothing is NaN; where there is no fit its numbers are absent and "reason" says why.
    """
    order = np.argsort(np.asarray(steps, np.float64), kind="stable")
    columns = [np.asarray(column, np.float64)[order] for column in (steps, entropy, reward)]
    _, h, r = columns
    first = max(_FEWEST, int(np.ceil(fraction * len(h))))
    result: dict[str, Any] = {
        "level": LEVEL,
        "band": "pointwise, from the covariance of least squares with Student's t",
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
    if isinstance(early, LawFit):
        forecast["held_out"] = _held_out(early, h[first:], r[first:], float(r[:first].mean()))
    return result | {"forecast": forecast, "sentence": _sentence(result | {"forecast": forecast})}


def _described(fit: LawFit | str, entropy: np.ndarray, reward: np.ndarray, span: np.ndarray) -> dict[str, Any]:
    if isinstance(fit, str):
        return {"reason": fit}
    errors = np.sqrt(np.diag(fit.covariance))
    at_zero = fit.predict(np.zeros(1))
    residuals = reward - fit.predict(entropy)[0]
    total = float(np.square(reward - reward.mean()).sum())
    squares = float(residuals @ residuals)
    lag = float(residuals[1:] @ residuals[:-1]) / squares if squares > 1e-24 else 0.0
    grid = np.linspace(min(0.0, float(span.min())), float(span.max()), _GRID)
    curve, error = fit.predict(grid)
    return {
        "n": fit.n,
        "a": _number(fit.coefficients[0], errors[0], fit.n),
        "b": _number(fit.coefficients[1], errors[1], fit.n),
        "at_zero_entropy": _number(at_zero[0][0], at_zero[1][0], fit.n),
        "residual_deviation": fit.deviation,
        "r_squared": 1 - squares / total if total > 0 else None,
        "autocorrelation": lag,
        "bands_too_narrow": bool(lag > 2 / np.sqrt(fit.n)),
        "curve": {
            "entropy": grid.tolist(),
            "reward": curve.tolist(),
            "low": (curve - fit.reach() * error).tolist(),
            "high": (curve + fit.reach() * error).tolist(),
        },
        "reason": None,
    }


def _number(value: float, error: float, points: int) -> dict[str, float]:
    return {"value": float(value), "standard_error": float(error), "degrees_of_freedom": points - 2}


def _held_out(fit: LawFit, entropy: np.ndarray, reward: np.ndarray, constant: float) -> dict[str, Any]:
    predicted, error = fit.predict(entropy)
    single = fit.reach() * np.sqrt(fit.deviation**2 + error**2)
    misses = reward - predicted
    mean_row = _design(entropy).mean(0)
    mean_error = float(np.sqrt(mean_row @ fit.covariance @ mean_row + fit.deviation**2 / len(reward)))
    return {
        "n": len(reward),
        "predicted": predicted.tolist(),
        "low": (predicted - single).tolist(),
        "high": (predicted + single).tolist(),
        "inside": float((np.abs(misses) <= single).mean()),
        "mean_error": _number(misses.mean(), mean_error, fit.n),
        "mean_error_inside": bool(abs(misses.mean()) <= fit.reach() * mean_error),
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
    if fit["bands_too_narrow"]:
        text += f"; residuals go together (lag-1 autocorrelation {plain(fit['autocorrelation'], 2)}), so the errors are too small"
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

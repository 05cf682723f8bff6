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

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.law_results import FittedLaw, Forecast, HeldOut, LawCurve, LawPoints, LawResult
from entropy_experiments.records.record import NotKnown
from entropy_experiments.statistics.series_regression import LEVEL, SeriesFit, Told, fit_series
from entropy_experiments.text.numbers import counted

T = TypeVar("T")

_FEWEST = 4
_GRID = 60


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
    steps: Sequence[float] | np.ndarray,
    entropy: Sequence[float] | np.ndarray,
    reward: Sequence[float] | np.ndarray,
    *,
    fraction: float = 1 / 3,
) -> LawResult:
    """Fit the law to all steps, and hold the forecast of the first `fraction` of them against the rest.

    Args:
        steps: (n,) training steps.
        entropy: (n,) nats per token, finite.
        reward: (n,) mean rewards, finite.
        fraction: Part of the steps that the forecast is fitted to; at least four of them.

    Returns:
        Fit and forecast, each a reason where there is none.
    """
    order = np.argsort(np.asarray(steps, np.float64), kind="stable")
    columns = [np.asarray(column, np.float64)[order] for column in (steps, entropy, reward)]
    _, h, r = columns
    return LawResult(
        level=LEVEL,
        band="pointwise, allowing for noise that goes on from step to step",
        points=LawPoints(**dict(zip(LawPoints.model_fields, (c.tolist() for c in columns), strict=True))),
        fit=_or_reason(fit_law(h, r), lambda fit: FittedLaw(**_described(fit, h, r, h))),
        forecast=_forecast(h, r, max(_FEWEST, int(np.ceil(fraction * len(h))))),
    )


def _forecast(h: np.ndarray, r: np.ndarray, first: int) -> Forecast | NotKnown:
    """Fitted to the first so many of (n,) entropies and rewards, held against the others."""
    if len(h) - first < 2:
        return NotKnown(reason=f"{counted(len(h), 'step')} leave nothing to hold the first third's forecast against")
    return _or_reason(
        fit_law(h[:first], r[:first]),
        lambda early: Forecast(
            **_described(early, h[:first], r[:first], h),
            held_out=_held_out(early, h[first:], r[first:], float(r[:first].mean())),
        ),
    )


def _or_reason(fit: SeriesFit | str, described: Callable[[SeriesFit], T]) -> T | NotKnown:
    return NotKnown(reason=fit) if isinstance(fit, str) else described(fit)


def _described(fit: SeriesFit, entropy: np.ndarray, reward: np.ndarray, span: np.ndarray) -> dict[str, Any]:
    """The fields of `FittedLaw`; the curve reaches over `span`."""
    residuals = reward - fit.curve(_design(entropy)).value
    squares, total = float(residuals @ residuals), float(np.square(reward - reward.mean()).sum())
    grid = np.linspace(min(0.0, float(span.min())), float(span.max()), _GRID)
    curve, constants = fit.curve(_design(grid)), fit.curve(np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]))
    return {
        "n": fit.n,
        **{name: _number(constants, k) for k, name in enumerate(("a", "b", "at_zero_entropy"))},
        "residual_deviation": float(np.sqrt(squares / (fit.n - 2))),
        "r_squared": 1 - squares / total if total > 0 else None,
        "autocorrelation": fit.correlation,
        "curve": LawCurve(
            entropy=grid.tolist(), reward=curve.value.tolist(), low=curve.low.tolist(), high=curve.high.tolist()
        ),
    }


def _number(told: Told, place: int = 0) -> Estimate:
    names = ("value", "standard_error", "low", "high")
    return Estimate(**{name: float(getattr(told, name)[place]) for name in names})


def _held_out(fit: SeriesFit, entropy: np.ndarray, reward: np.ndarray, constant: float) -> HeldOut:
    """The later steps' (m,) entropies and rewards against their forecast; constant: the first part's mean reward."""
    rows = _design(entropy)
    single, mean = fit.coming(rows), fit.mean_coming(rows)
    misses, came = reward - single.value, float(reward.mean())
    off = Told(came - mean.value, mean.standard_error, came - mean.high, came - mean.low)
    return HeldOut(
        n=len(reward),
        predicted=single.value.tolist(),
        low=single.low.tolist(),
        high=single.high.tolist(),
        inside=float(((single.low <= reward) & (reward <= single.high)).mean()),
        mean_error=_number(off),
        mean_error_inside=bool(off.low[0] <= 0 <= off.high[0]),
        root_mean_square_error=float(np.sqrt(np.square(misses).mean())),
        constant_root_mean_square_error=float(np.sqrt(np.square(reward - constant).mean())),
    )

"""How large is the second order of the step's effect on entropy, and at what size of step does it equal the first?

    h(theta + s d) - h(theta) = D s + Q s^2 + C s^3 + R s^4 + ...        D = <grad h, d>,   Q = 1/2 d^T Hess(h) d

    odd part   [ h(s) - h(-s) ] / 2 = D s + C s^3                     even part   [ h(s) + h(-s) ] / 2 = Q s^2 + R s^4
    s*         = |D / Q|                                              where |Q| s^2 = |D| s

Both parts are fitted by least squares over the pairs +-s with s up to 1: rounding leaves errors of one size at every s, so
no pair is weighted. Standard errors: jackknife over prompts of the whole fit. fit_error: how far Q moves when
only the nearer half of the pairs is used, which is what still higher orders would move. The change is measured on the same
tokens (SNIS) along d, forwards and backwards; d is the step that was taken. Units: nats per token.
Source: docs/analyses/higher-order.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from entropy_experiments.records.step_results import CurvePoint, EqualAt, FirstOrder, HigherOrderResult, SecondOrder
from entropy_experiments.statistics.jackknife_interval import ends_of
from entropy_experiments.text.numbers import value_and_error
from rl_training.intervals import t_quantile

DEFAULT_SCALES = tuple(sign * 2.0**-k for k in (0, 1, 2, 3, 4) for sign in (1, -1))
"""What to measure at where nothing else is wanted: +-1 to +-1/16 of the step."""


def measure_orders(
    scales: np.ndarray,
    changes: np.ndarray,
    left_out: np.ndarray | None = None,
    *,
    effective_sample_sizes: np.ndarray | None = None,
    sequences: int | None = None,
    slope: Mapping[str, Any] | float | None = None,
    furthest: float = 1.0,
) -> HigherOrderResult:
    """First and second order of the measured curve, and where they are equal.

    Args:
        scales: (S,), with -s for every s that is to be used; others are only reported.
        changes: (S,) nats per token.
        left_out: (G, S), the changes with each group of prompts left out.
        effective_sample_sizes: (S,); pairs with less than half of `sequences` are not used.
        sequences: how many were measured on.
        slope: the split estimator's derivative along d, {"value", "standard_error"}: D is then it, and the fitted slope is
            reported beside it.
        furthest: largest s that is used.

    Returns:
        The record that summary.json holds, points ascending in s.

    Raises:
        ValueError: shapes that disagree, numbers that are not finite, or a scale given twice.
    """
    s, h, others = _checked_curve(scales, changes, left_out)
    sizes = None if effective_sample_sizes is None else np.asarray(effective_sample_sizes, dtype=np.float64)
    trusted = np.ones(len(s), dtype=bool)
    if sizes is not None and sequences is not None:
        trusted = sizes >= sequences / 2
    pairs = _pairs(s, trusted, furthest)
    used = {column for pair in pairs for column in pair}
    orders = _orders(s, h, others, pairs, slope)
    first, second = orders["first_order"].value, orders["second_order"].value
    points = [
        CurvePoint(
            scale=float(s[k]),
            change=float(h[k]),
            standard_error=_jackknife(others[:, k]) if others is not None else None,
            first_order=None if first is None else float(first * s[k]),
            second_order=None if first is None or second is None else float(first * s[k] + second * s[k] ** 2),
            effective_sample_size=None if sizes is None else float(sizes[k]),
            used=bool(k in used),
        )
        for k in np.argsort(s)
    ]
    return HigherOrderResult(unit="nats per token", **orders, pairs=len(pairs), points=points)


def _checked_curve(
    scales: np.ndarray, changes: np.ndarray, left_out: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """All three in double precision."""
    s, h = np.asarray(scales, dtype=np.float64), np.asarray(changes, dtype=np.float64)
    others = None if left_out is None else np.asarray(left_out, dtype=np.float64)
    if s.ndim != 1 or s.shape != h.shape or (others is not None and others.shape[1:] != s.shape):
        raise ValueError(
            f"{s.shape} scales, {h.shape} changes and {np.shape(others)} changes left out do not fit together"
        )
    if not (np.isfinite(s).all() and np.isfinite(h).all() and (others is None or np.isfinite(others).all())):
        raise ValueError("a scale or a measured change is not finite")
    if len(np.unique(s)) != len(s) or (s == 0).any():
        raise ValueError(f"scales must be different from each other and from 0, not {s.tolist()}")
    return s, h, others


def _pairs(scales: np.ndarray, trusted: np.ndarray, furthest: float) -> list[tuple[int, int]]:
    """(column of s, column of -s), nearest first."""
    column = {float(value): place for place, value in enumerate(scales)}
    found = [
        (place, column[-value])
        for value, place in column.items()
        if 0 < value <= furthest and -value in column and trusted[place] and trusted[column[-value]]
    ]
    return sorted(found, key=lambda pair: scales[pair[0]])


def _fit(scales: np.ndarray, changes: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """(4,) D, Q, C, R from (S,) changes, or (4, G) from (S, G); C and R are 0 where a single pair is given."""
    forward, backward = ([pair[side] for pair in pairs] for side in (0, 1))
    s = scales[forward]
    parts = (0.5 * (changes[forward] - changes[backward]), 0.5 * (changes[forward] + changes[backward]))
    out = np.zeros((4, *changes.shape[1:]))
    for order, part in zip((1, 2), parts, strict=True):
        powers = np.stack([s**order, s ** (order + 2)][: min(2, len(s))], axis=1)
        solution = np.linalg.lstsq(powers, part, rcond=None)[0]
        out[order - 1] = solution[0]
        if len(solution) > 1:
            out[order + 1] = solution[1]
    return out


def _jackknife(left_out: np.ndarray) -> float | None:
    count = len(left_out)
    if count < 2:
        return None
    return math.sqrt((count - 1) / count * float(np.square(left_out - left_out.mean()).sum()))


def _orders(
    scales: np.ndarray,
    changes: np.ndarray,
    left_out: np.ndarray | None,
    pairs: list[tuple[int, int]],
    slope: Mapping[str, Any] | float | None,
) -> dict[str, Any]:
    """The fields of the result but for its points."""
    value, error = value_and_error(slope)
    freedom = None if left_out is None else max(1, len(left_out) - 1)
    ends = {end: slope.get(end) for end in ("low", "high")} if isinstance(slope, Mapping) else {}
    known = {"value": value, "standard_error": error, "degrees_of_freedom": freedom, **ends}
    if not pairs:
        nothing = dict.fromkeys(("value", "standard_error", "fit_error", "total_error"))
        return {
            "first_order": FirstOrder(**known, fitted=None, source="split estimator"),
            "second_order": SecondOrder(**nothing, degrees_of_freedom=freedom),
            **dict.fromkeys(("third", "fourth", "residual", "ratio")),
            "equal_at": EqualAt(value=None, low=None, high=None),
            "reason": "no scale was measured in both directions with a trustworthy sample size",
        }
    fitted = _fit(scales, changes, pairs)
    replicates = None if left_out is None else _fit(scales, left_out.T, pairs)
    source = "fit" if value is None else "split estimator"
    if value is None:
        value, error = float(fitted[0]), None if replicates is None else _jackknife(replicates[0])
        known |= {"value": value, "standard_error": error, **_ends(value, replicates, 0, None)}
    second = _second_order(scales, changes, pairs, fitted, replicates)
    columns = [column for pair in pairs for column in pair]
    powers = np.stack([scales[columns] ** k for k in (1, 2, 3, 4)], axis=1)
    t = t_quantile(freedom or math.inf)
    return {
        "first_order": FirstOrder(**known, fitted=float(fitted[0]), source=source),
        "second_order": second,
        "third": float(fitted[2]) if len(pairs) > 1 else None,
        "fourth": float(fitted[3]) if len(pairs) > 1 else None,
        "residual": float(np.sqrt(np.mean((powers @ fitted - changes[columns]) ** 2))),
        "ratio": float(fitted[1]) / value if value != 0 else None,
        "equal_at": _equality(value, float(fitted[1]), t * (error or 0.0), t * (second.total_error or 0.0)),
        "reason": "the second order is exactly 0" if fitted[1] == 0 else "",
    }


def _second_order(
    scales: np.ndarray,
    changes: np.ndarray,
    pairs: list[tuple[int, int]],
    fitted: np.ndarray,
    replicates: np.ndarray | None,
) -> SecondOrder:
    """Q with its error over prompts, and that of the fit: how far it moves where only the nearer half of the scales is used."""
    value, error = float(fitted[1]), None if replicates is None else _jackknife(replicates[1])
    fit_error = None
    if len(pairs) > 2:
        fit_error = abs(float(fitted[1] - _fit(scales, changes, pairs[: math.ceil(len(pairs) / 2)])[1]))
    both = [e for e in (error, fit_error) if e is not None]
    return SecondOrder(
        value=value,
        standard_error=error,
        fit_error=fit_error,
        total_error=math.hypot(*both) if both else None,
        degrees_of_freedom=None if replicates is None else max(1, replicates.shape[1] - 1),
        **_ends(value, replicates, 1, fit_error),
    )


def _ends(value: float, replicates: np.ndarray | None, order: int, fit_error: float | None) -> dict[str, float | None]:
    """low and high: each end of the interval over prompts and the fit's error in quadrature; {} without an error over prompts.

    replicates: (4, G) the fitted orders with each group of prompts left out; order: which of them is meant.
    """
    if replicates is None:
        return {}
    ends = ends_of(value, replicates[order])
    found = {end: ends.get(end) for end in ("low", "high")}
    if not fit_error:
        return found
    more = t_quantile(ends.get("degrees_of_freedom") or math.inf) * fit_error
    return {
        end: None if at is None else value + math.copysign(math.hypot(value - at, more), at - value)
        for end, at in found.items()
    }


def _equality(d: float, q: float, spread_d: float, spread_q: float) -> EqualAt:
    """s* and where it lies, from the halves of both 95% intervals."""
    if q == 0:
        return EqualAt(value=None, low=None, high=None)
    low, high = max(abs(d) - spread_d, 0.0) / (abs(q) + spread_q), None
    if abs(q) > spread_q:
        high = (abs(d) + spread_d) / (abs(q) - spread_q)
    return EqualAt(value=abs(d / q), low=low, high=high)

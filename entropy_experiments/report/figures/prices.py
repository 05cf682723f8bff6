"""Price list: change of reward against change of entropy for every intervention, with the 95% ellipse of both.

See docs/analyses/prices.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from scipy.stats import f as f_distribution

from entropy_experiments.records.price_results import PricesResult
from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.labels import number_points
from entropy_experiments.statistics.confidence import ALIKE

_TITLE = "What each intervention would do to entropy and to reward in this step"


@dataclass(frozen=True)
class PricePoint:
    """Differences to the step as trained. ellipse: (width, height, angle in degrees) of 95%, None without errors."""

    label: str
    entropy: float
    reward: float
    best: bool
    ellipse: tuple[float, float, float] | None


def price_points(result: PricesResult) -> list[PricePoint]:
    """The interventions that have both numbers."""
    points = []
    for row in result.rows:
        kept, paid = row.entropy_minus_run, row.reward_minus_run
        if kept is None or paid is None or kept.value is None or paid.value is None:
            continue
        ellipse = None
        if kept.standard_error is not None and paid.standard_error is not None and row.covariance is not None:
            ellipse = _ellipse(
                kept.standard_error, paid.standard_error, row.covariance, kept.degrees_of_freedom or np.inf
            )
        points.append(PricePoint(row.label, kept.value, paid.value, row.name in result.alike, ellipse))
    return points


def _ellipse(left: float, right: float, covariance: float, freedom: float) -> tuple[float, float, float]:
    """Of two jackknife errors and their covariance, by Hotelling's T-squared on `freedom` degrees of freedom."""
    values, vectors = np.linalg.eigh(np.array([[left**2, covariance], [covariance, right**2]]))
    if np.isfinite(freedom) and freedom > 2:
        reach = 2 * freedom / (freedom - 1) * f_distribution.ppf(0.95, 2, freedom - 1)
    else:
        reach = 5.991
    minor, major = 2 * np.sqrt(np.clip(values, 0.0, None) * reach)
    return float(major), float(minor), float(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])))


@style.in_house_style
def plot_prices(result: PricesResult) -> Figure:
    """`price_points` as a picture; the step as trained is the origin."""
    points = price_points(result)
    if not points:
        return style.no_data_figure(_TITLE, result.reward_note or "no intervention was priced.")
    figure = style.new_figure(9.2, 6.0)
    axes = figure.subplots()
    axes.axvline(0.0, color="#444444", linewidth=0.9)
    axes.axhline(0.0, color="#444444", linewidth=0.9)
    for point in points:
        color = style.PREDICTED if point.best else style.FIXED_PREFIX
        if point.ellipse is not None:
            width, height, angle = point.ellipse
            centre = (point.entropy, point.reward)
            axes.add_patch(
                Ellipse(
                    centre, width, height, angle=angle, fill=False, alpha=0.9 if point.best else 0.35, edgecolor=color
                )
            )
        axes.plot(point.entropy, point.reward, marker="o", markersize=5, color=color, linestyle="")
    spans = [np.ptp([0.0, *(getattr(p, name) for p in points)]) or 1.0 for name in ("entropy", "reward")]
    for limit, name, span in zip((axes.set_xlim, axes.set_ylim), ("entropy", "reward"), spans, strict=True):
        values = [0.0, *(getattr(p, name) for p in points)]
        limit(min(values) - 0.35 * span, max(values) + 0.35 * span)
    axes.set_xlabel("change of h beside the step as trained (nats per token)")
    axes.set_ylabel("change of mean reward beside the step as trained")
    names = "\n".join(f"{number:>2}  {point.label}" for number, point in enumerate(points, 1))
    axes.text(1.02, 1.0, names, transform=axes.transAxes, va="top", fontsize=8)
    caption = (
        "Origin: the step as trained. To the right entropy is kept, upwards reward is gained. Dark: those that keep at least "
        f"{result.keeps:.0%} of the entropy lost and whose price {ALIKE} from the best. Ellipses: about 95%, paired over "
        "evaluation prompts; cut where they reach beyond the points."
    )
    figure = style.finish(figure, _TITLE, caption)
    texts = [str(number) for number in range(1, len(points) + 1)]
    number_points(axes, [point.entropy for point in points], [point.reward for point in points], texts)
    return figure

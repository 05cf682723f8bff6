"""Numbers beside points that lie close together: each is moved until it covers neither a point nor another number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 5.2, 8.0
"""Of a digit, in points of the type size that is used here."""
_RADII = (7, 13, 20, 28, 36, 45, 55, 66)
_ANGLES = np.arange(16) * np.pi / 8 + np.pi / 4
_FAR = 13
_AROUND = 3.5
"""Half the side of the square that a point takes."""


def offsets(points: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """(n, 2) from each of (n, 2) points to the middle of its text, both in typographic points: the nearest place that is free,
    or the farthest tried where none is.
    """
    taken = [(*(point - _AROUND), *(point + _AROUND)) for point in points]
    found = np.zeros_like(points, dtype=float)
    for place, (point, text) in enumerate(zip(points, texts, strict=True)):
        half = np.array([_WIDTH * len(text), _HEIGHT]) / 2
        for shift in (radius * np.array([np.cos(angle), np.sin(angle)]) for radius in _RADII for angle in _ANGLES):
            low, high = point + shift - half, point + shift + half
            found[place] = shift
            if not any(low[0] < x1 and x0 < high[0] and low[1] < y1 and y0 < high[1] for x0, y0, x1, y1 in taken):
                break
        taken.append((*low, *high))
    return found


def number_points(axes: Axes, x: Sequence[float], y: Sequence[float], texts: Sequence[str]) -> None:
    """Writes texts beside points, with a line where they had to be moved away; the last thing to be done to a figure."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # settles where the axes lie
    pixels = axes.transData.transform(np.column_stack([x, y]))
    shifts = offsets(pixels * 72 / figure.dpi, texts)
    for place, text in enumerate(texts):
        far = np.hypot(*shifts[place]) > _FAR
        line = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2} if far else None
        note = axes.annotate(
            text, (x[place], y[place]), xytext=tuple(shifts[place]), textcoords="offset points", ha="center", va="center",
            fontsize=8, arrowprops=line, annotation_clip=False,
        )  # fmt: skip
        note.set_in_layout(False)

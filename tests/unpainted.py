"""Analyses whose reports hold no figures, and reports whose figures are drawn and not painted: drawing is a fifth of an analysis
of the tiny policy, and painting would be twice as much as the whole of it.

`paint_nothing` is how tests run. `drawn` draws the figures of analyses too, `painted` paints them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from matplotlib.figure import Figure

from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.report import page as report_page
from entropy_experiments.report.figures import style

_PAINT, _DRAW = style.png_bytes, report_page.draw_figures


def _empty_figures_while_analysed(results: ResultsFolder) -> dict[str, Figure]:
    """Empty ones for the report that an analysis ends with; its folder is not yet under its name."""
    if results.path.suffix != ".part":
        return _DRAW(results)
    return {name: Figure(figsize=(0.1, 0.1)) for name in report_page.figure_makers(results)}


def paint_nothing() -> None:
    """From now on the pages of this process hold the same small picture everywhere."""
    picture = _PAINT(Figure(figsize=(0.1, 0.1)))
    style.png_bytes = report_page.png_bytes = lambda figure: picture
    report_page.draw_figures = _empty_figures_while_analysed


def paint() -> None:
    """From now on pages hold their figures."""
    style.png_bytes = report_page.png_bytes = _PAINT
    report_page.draw_figures = _DRAW


@contextmanager
def drawn() -> Iterator[None]:
    """Inside, the figures of analyses are drawn, whatever holds outside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "draw_figures", _DRAW)
        yield


@contextmanager
def painted() -> Iterator[None]:
    """Inside, pages hold their figures, whatever holds outside."""
    with drawn(), pytest.MonkeyPatch.context() as patch:
        for module in (style, report_page):
            patch.setattr(module, "png_bytes", _PAINT)
        yield

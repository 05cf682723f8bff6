"""Reports that draw their figures and do not paint them: painting is two thirds of an analysis of the tiny policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from matplotlib.figure import Figure

from entropy_experiments.compare import page as comparison_page
from entropy_experiments.report import page as report_page
from entropy_experiments.report.figures import style
from entropy_experiments.sweep import assemble as sweep_page

PAGES = (report_page, comparison_page, sweep_page)


def paint_nothing() -> None:
    """From now on the pages of this process hold the same small picture everywhere."""
    picture = style.png_bytes(Figure(figsize=(0.1, 0.1)))
    for page in PAGES:
        page.png_bytes = lambda figure: picture


def paint() -> None:
    """From now on pages hold their figures."""
    for page in PAGES:
        page.png_bytes = style.png_bytes


@contextmanager
def painted() -> Iterator[None]:
    """Inside, pages hold their figures, whatever holds outside."""
    with pytest.MonkeyPatch.context() as patch:
        for page in PAGES:
            patch.setattr(page, "png_bytes", style.png_bytes)
        yield

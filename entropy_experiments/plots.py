"""Every chart of an analysis by its public path; the charts live in report/figures."""

from entropy_experiments.report.figures.plots import *  # noqa: F403
from entropy_experiments.report.figures.plots import __all__ as __all__

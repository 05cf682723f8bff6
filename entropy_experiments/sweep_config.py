"""A sweep"s configuration by its public path; it lives in sweep/."""

from entropy_experiments.sweep.config import SweepConfig

__all__ = ["SweepConfig"]

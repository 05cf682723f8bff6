"""Configurations of an analysis that takes seconds on the tiny policy."""

from entropy_experiments.config import FisherAnalysisConfig
from rl_training.configuration import load_config

SMALL = ("entropy_analysis.eval_batch_size=16", "entropy_analysis.train_batch_size=16", "checkpoint.device=cpu")
# Their own tests, and those of the whole, run them; others need not wait.
OFF = (
    "sequence_clustering", "higher_order", "attribution", "intervention", "weighting_schemes", "prices",
    "baselines",
)  # fmt: skip


def config(*overrides: str) -> FisherAnalysisConfig:
    """Kernels, predictions, measurements and what costs nothing beside them."""
    off = [f"entropy_analysis.analysis.{name}=false" for name in OFF]
    less = [*off, "entropy_analysis.analysis.fresh_scales=[]", "entropy_analysis.analysis.step_scales=[0.25, 1.0, 2.0]"]
    return load_config(FisherAnalysisConfig, None, [*SMALL, *less, *overrides])


def whole_config(*overrides: str) -> FisherAnalysisConfig:
    """Every analysis."""
    return load_config(FisherAnalysisConfig, None, [*SMALL, *overrides])

"""A configuration of an analysis that takes a second on the tiny policy."""

from entropy_experiments.config import FisherAnalysisConfig
from rl_training.configuration import load_config


def config(*overrides: str) -> FisherAnalysisConfig:
    small = ["entropy_analysis.eval_batch_size=16", "entropy_analysis.train_batch_size=16", "checkpoint.device=cpu"]
    return load_config(FisherAnalysisConfig, None, [*small, *overrides])

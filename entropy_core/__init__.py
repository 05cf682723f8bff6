"""The mathematics of entropy change in reinforcement learning of language models. Needs torch
alone.
"""

from entropy_core.adamw import (
    AdamWParameterState,
    AdamWUpdate,
    adam_preconditioner,
    read_adamw_state,
    split_adamw_update,
)
from entropy_core.batch import SequenceBatch
from entropy_core.entropy import ESTIMATORS, entropy_estimate
from entropy_core.gradients import entropy_gradient, entropy_rows, per_sequence_gradients
from entropy_core.kernel import CrossKernels, compute_cross_fisher_kernel, compute_kernels
from entropy_core.measurement import EntropyMeasurement, fixed_prefix_entropy_change, snis_entropy_change
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_core.uncertainty import jackknife_over_prompts, u_statistic
from entropy_core.weighting import WEIGHTING_SCHEMES, advantages, sequence_weights

__all__ = [
    "ESTIMATORS",
    "WEIGHTING_SCHEMES",
    "AdamWParameterState",
    "AdamWUpdate",
    "CrossKernels",
    "EntropyMeasurement",
    "PassSettings",
    "SequenceBatch",
    "TokenStatistics",
    "adam_preconditioner",
    "advantages",
    "compute_cross_fisher_kernel",
    "compute_kernels",
    "entropy_estimate",
    "entropy_gradient",
    "entropy_rows",
    "fixed_prefix_entropy_change",
    "jackknife_over_prompts",
    "per_sequence_gradients",
    "read_adamw_state",
    "sequence_weights",
    "snis_entropy_change",
    "split_adamw_update",
    "token_statistics",
    "u_statistic",
]

"""What the shares and effects of training sequences would have been without each evaluation prompt: what their errors rest on.

    x_i      = X_i(grad h)                                X_i linear in the gradient of entropy: accounting share, or effect of
                                                          leaving out (entropy_experiments.step)
    grad h   = (A - h C) / T                              A, C, T: sums over evaluation prompts
    x_i,-p   = (X_i(A - A_p) - h_-p X_i(C - C_p)) / (T - T_p),      h_-p = (H - H_p) / (T - T_p)

A prompt left out is a draw of all the others (analyses/who_was_first.py has the sums); X_i of every evaluation sequence is known
from the pass that makes the kernel. The step, its P and its clip coefficient are held: the error is the evaluation side's.
Source: docs/analyses/attribution.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_experiments.analyses.who_was_first import numbers_of_draws
from entropy_experiments.statistics.jackknife_interval import jackknife_interval
from entropy_experiments.step.effects_of_leaving_out import NumbersByEvaluation


@dataclass(frozen=True)
class LeftOutNumbers:
    """Numbers of N training sequences with each of B evaluation prompts left out; prompts (B,) in ascending order of their index.

    products: (B, N) <grad h, P_t dS_i>, so that shares are step_factor * weights * products; effects: (B, N) of leaving each
    sequence out, nats per token.
    """

    prompts: np.ndarray
    products: np.ndarray
    effects: np.ndarray


def without_each_prompt(
    numbers: NumbersByEvaluation, batch: SequenceBatch, entropy_sums: Tensor
) -> LeftOutNumbers | None:
    """On the evaluation `batch`, of which `entropy_sums` (n_eval,) are known; None with a single prompt."""
    prompts = batch.prompt_index.unique()
    if len(prompts) < 2:
        return None
    without = np.ones((len(prompts), len(prompts))) - np.eye(len(prompts))
    side = (
        batch.prompt_index.cpu().numpy(),
        entropy_sums.double().cpu().numpy(),
        batch.completion_lengths.cpu().numpy(),
    )
    products, effects = (numbers_of_draws(without, parts, *side) for parts in (numbers.products, numbers.effects))
    return LeftOutNumbers(prompts.cpu().numpy(), products, effects)


def interval_columns(values: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), (N,) each, of the 95% intervals of (N,) values from (B, N) values with each prompt left out."""
    found = jackknife_interval(values, left_out.T)
    return found.low, found.high

"""What the shares and effects of training sequences would have been without each evaluation prompt: what their errors rest on.

    x_i      = X_i(grad h)                                X_i linear in the gradient of entropy: accounting share, or effect of
                                                          leaving out (entropy_experiments.step)
    grad h   = (A - h C) / T                              A, C, T: sums over evaluation prompts
    x_i,-p   = (X_i(A - A_p) - h_-p X_i(C - C_p)) / (T - T_p),      h_-p = (H - H_p) / (T - T_p)

One forward and backward pass over the evaluation buffer, prompt by prompt. The step, its P and its clip coefficient are held: the
error is the evaluation side's. Source: docs/analyses/attribution.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import Estimator, TokenCoefficients, entropy_coefficients
from entropy_core.gradients import batch_gradients
from entropy_core.passes.settings import DEFAULT_PASSES, PassSettings
from entropy_core.scores import TokenStatistics
from entropy_experiments.statistics.jackknife_interval import jackknife_interval

Gradient = Mapping[str, Tensor]


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
    model: nn.Module,
    batch: SequenceBatch,
    statistics: TokenStatistics,
    estimator: Estimator,
    numbers_of: Callable[[Gradient], tuple[Tensor, Tensor]],
    passes: PassSettings = DEFAULT_PASSES,
) -> LeftOutNumbers | None:
    """Of the estimand's gradient `estimator`, on the evaluation `batch`; None with a single prompt.

    numbers_of: gradient of entropy -> (N,) products and (N,) effects, linear in it.
    """
    prompts = batch.prompt_index.unique()
    if len(prompts) < 2:
        return None
    units = ("per completion", "per token") if estimator == "rao_blackwell" else ("per token",)
    terms = {unit: entropy_coefficients(statistics, batch, estimator, unit == "per token") for unit in units}
    found: dict[str, list[Tensor]] = {f"{unit} {kind}": [] for unit in units for kind in ("product", "effect")}
    for prompt in prompts:
        rows = (batch.prompt_index == prompt).nonzero().flatten()
        objectives = [TokenCoefficients(c.entropy[rows], c.logprob[rows]) for c in terms.values()]
        gradients = batch_gradients(model, batch.select(rows.tolist()), objectives, passes)
        for unit, gradient in zip(units, gradients, strict=True):
            for kind, numbers in zip(("product", "effect"), numbers_of(gradient), strict=True):
                found[f"{unit} {kind}"].append(numbers)
    member = (batch.prompt_index[None] == prompts[:, None]).double().cpu().numpy()
    entropy, length = (
        member @ values.double().cpu().numpy() for values in (statistics.entropy_sums(), batch.completion_lengths)
    )
    mean_length = float(length.sum()) / len(batch)
    sums = {name: torch.stack(parts).cpu().numpy() for name, parts in found.items()}
    products, effects = (
        _without(sums.get(f"per completion {kind}"), mean_length * sums[f"per token {kind}"], entropy, length)
        for kind in ("product", "effect")
    )
    return LeftOutNumbers(prompts.cpu().numpy(), products, effects)


def _without(terms: np.ndarray | None, centred: np.ndarray, entropy: np.ndarray, length: np.ndarray) -> np.ndarray:
    """(B, N) from sums over each prompt, terms X(A_p) and centred X(A_p - h C_p); terms: None where h is not taken off."""
    tokens = (length.sum() - length)[:, None]
    if terms is None:
        return (centred.sum(0) - centred) / tokens
    h = entropy.sum() / length.sum()
    lengths = (terms - centred) / max(h, 1e-300)
    h_left_out = (entropy.sum() - entropy)[:, None] / tokens
    return (terms.sum(0) - terms - h_left_out * (lengths.sum(0) - lengths)) / tokens


def interval_columns(values: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), (N,) each, of the 95% intervals of (N,) values from (B, N) values with each prompt left out."""
    found = jackknife_interval(values, left_out.T)
    return found.low, found.high

"""What another draw of the training buffer would have changed: the training side's own noise, by a jackknife over its prompts.

    F(w)     = <dh, dtheta(g(w))>                 change of entropy by the whole step: P_t, m_t and the clip are those of g(w)
    F_{-p}   = F of the loss over the buffer without prompt p: its weights N/(N - n_p) w_i, since the loss is a mean over N
    se^2     = (B - 1)/B sum_p (F_{-p} - mean F_{-p})^2,    interval: entropy_experiments.statistics.jackknife_interval

with the moments from before the step as they are, which no redraw of this buffer would change. se is the standard deviation of
the predicted change over buffers of this size from this checkpoint, dh held: it covers which prompts and completions the step was
taken on. The error of a prediction (entropy_core.uncertainty) covers on which evaluation sequences dh was estimated, and nothing
of this. Beyond 40 prompts, groups of 2, 3, ... are left out.

Beside it, F(w) - F(w without p) with N held: what leaving a whole prompt out really does at first order in the step, against
which the sum of its sequences' effects (entropy_core.leaving_out) is held.
Source: Efron & Stein 1981; docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_core.adamw import AdamWParameterState
from entropy_core.formed import Formed, dot
from entropy_core.uncertainty import jackknife_standard_error
from entropy_experiments.statistics.jackknife_interval import jackknife_interval
from entropy_experiments.step.optimizer_step import NextStep, clip_coefficient, plain_step
from rl_training.intervals import interval

MOST_GROUPS = 40

Change = Callable[[Mapping[str, Tensor]], float]
"""Loss gradient before clipping -> change of entropy to first order, nats per token."""


@dataclass(frozen=True)
class TrainingNoise:
    """value: the predicted total; standard_error: its spread over training buffers; left_out: (G,) values without each of
    `groups` groups of `prompts` training prompts. prompt_effects: (B,) what leaving each whole prompt out does, in the order of
    their first sequences; None where prompts were left out in groups.
    """

    value: float
    standard_error: float
    left_out: Tensor
    prompts: int
    prompt_effects: Tensor | None

    @property
    def groups(self) -> int:
        return len(self.left_out)

    def to_json(self) -> dict[str, Any]:
        """With the 95% interval: that of entropy_experiments.statistics.jackknife_interval, and at least Student's on the degrees
        of freedom behind the error: a step that saturates (clip, P of this very gradient) is less linear in its prompts than a
        mean.
        """
        found = jackknife_interval(self.value, self.left_out.numpy())
        ends = found.as_dict()
        if ends["low"] is not None and ends["high"] is not None:
            low, high = interval(self.value, float(found.standard_error), float(found.degrees_of_freedom))
            ends |= {"low": min(ends["low"], low), "high": max(ends["high"], high)}
        known = {"value": self.value, "standard_error": self.standard_error, **ends}
        return known | {"prompts": self.prompts, "groups": self.groups}


def step_change(
    entropy_gradient: Mapping[str, Tensor],
    state: Mapping[str, AdamWParameterState] | None,
    parameters: Mapping[str, Tensor],
    max_norm: float | None,
    learning_rate: float | None = None,
) -> Change:
    """<dh, dtheta(g)> of the AdamW step from these moments, or of the plain step of `learning_rate`, with g's own clipping."""

    def change(gradient: Mapping[str, Tensor]) -> float:
        if state is None:
            return dot(entropy_gradient, plain_step(gradient, max_norm, learning_rate).parameter_delta)
        clip, norm = clip_coefficient(gradient, max_norm)
        return dot(entropy_gradient, NextStep(parameters, gradient, clip, norm, state, frozenset()).sum_of_parts)

    return change


def training_noise(
    change: Change,
    gradient: Mapping[str, Tensor],
    gradient_of: Callable[[Tensor], Mapping[str, Tensor]],
    prompts: Tensor,
) -> TrainingNoise | None:
    """change: of `step_change`. gradient: g of the whole buffer. gradient_of: (m,) sequences -> their part -sum w_i dS_i of it.
    prompts: (n_train,) which prompt each sequence answers, equal numbers for equal texts. None with one prompt alone.
    """
    numbers = {number: place for place, number in enumerate(dict.fromkeys(prompts.tolist()))}
    index = torch.tensor([numbers[number] for number in prompts.tolist()])
    count, sequences = len(numbers), len(prompts)
    if count < 2:
        return None
    # Groups of as many prompts each, but for a few of one more: the jackknife of groups of one and of two would be wrong.
    groups = count // math.ceil(count / MOST_GROUPS)
    whole, left_out, effects = change(gradient), [], []
    for group in range(groups):
        rows = (index % groups == group).nonzero().flatten()
        part = gradient_of(rows)
        rest = Formed(gradient, lambda name, part=part: gradient[name] - part[name])
        if groups == count:
            effects.append(whole - change(rest))
        factor = sequences / (sequences - len(rows))
        left_out.append(change(Formed(rest, lambda name, rest=rest, factor=factor: factor * rest[name])))
        del part, rest  # the next part is formed where this one was
    values = torch.tensor(left_out, dtype=torch.float64)
    if not math.isfinite(whole) or not bool(values.isfinite().all()):
        return None
    return TrainingNoise(
        whole,
        jackknife_standard_error(values),
        values,
        count,
        torch.tensor(effects, dtype=torch.float64) if effects else None,
    )

"""How far the precision that a run was trained in is from that of its analysis, on the run's own sequences and step.

A run that was trained below float32 is analysed in float32: with its weights as they are, and passes and steps without the
rounding that training had. What that leaves out:

    policy      log pi and H of the same tokens, and grad h on the same sequences, by passes as they were in training
    step        what torch's AdamW makes of weights and moments in the types they are stored in, against the analysed step;
                changes of entropy by <grad h, step> with the analysis' own grad h of the whole evaluation buffer

Source: docs/theory/measurement-and-uncertainty.md, "Precision".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from entropy_core.adamw import Moments, after_gradient, preconditioner, second_moments
from entropy_core.batch import SequenceBatch
from entropy_core.cut_weights import open_cut
from entropy_core.entropy import Estimator, entropy_coefficients, entropy_estimate
from entropy_core.formed import PIECE, dot, elementwise
from entropy_core.gradients import batch_gradients
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_experiments.checkpoints.half_precision import HALF, holds_exactly
from entropy_experiments.checkpoints.stored_moments import StoredMoments
from entropy_experiments.run.self_checks import relative_error_of_dicts
from entropy_experiments.step.optimizer_step import NextStep, taken_step

SEQUENCES = 16
"""Compared at most: a forward and a backward pass over them in either precision."""


@dataclass(frozen=True)
class TrainedIn:
    """weights: the type they were loaded in, "float32", "bfloat16", ...; autocast: of passes, "no", "bf16" or "fp16"."""

    weights: str
    autocast: str

    @property
    def below(self) -> bool:
        """Whether passes were in half precision."""
        return self.weights in HALF or self.autocast in HALF

    @staticmethod
    def moments_below(optimizer: Moments | None) -> bool:
        """Whether an optimizer's file holds moments in half precision."""
        return isinstance(optimizer, StoredMoments) and bool(_half_types(optimizer.stored_types()))


@dataclass(frozen=True)
class PolicyRounding:
    """Passes as in training against the analysis' own, over the same sequences.

    logprob: root mean square of the difference of a token's log pi, nats. entropy, entropy_in_training: h, nats per token.
    gradient: |difference of grad h| / |grad h|. predicted, predicted_in_training: <grad h, step> of these sequences, nats per
    token; None without a step.
    """

    sequences: int
    tokens: int
    logprob: float
    entropy: float
    entropy_in_training: float
    gradient: float
    predicted: float | None
    predicted_in_training: float | None


@dataclass(frozen=True)
class StepRounding:
    """The step in the types that weights and moments are stored in, against the analysed one.

    weights, moments: these types. moved: share of the trained weights that it changes, of those that the
    analysed step changes. length: its norm over the analysed step's. predicted, predicted_in_training: <grad h, step> of both.
    """

    weights: str
    moments: str
    moved: float
    length: float
    predicted: float
    predicted_in_training: float


@dataclass(frozen=True)
class TrainingPrecision:
    """policy: None where passes were as they are here, or cannot be made as they were. step: None where it is rounded as here."""

    trained_in: TrainedIn
    policy: PolicyRounding | None
    step: StepRounding | None

    def to_json(self) -> dict[str, Any]:
        """summary.json's "training_precision"."""
        found = {
            key: None if part is None else asdict(part) for key, part in (("policy", self.policy), ("step", self.step))
        }
        return {**asdict(self.trained_in), **found}


def training_precision(
    model: nn.Module,
    optimizer: Moments | None,
    batch: SequenceBatch,
    estimator: Estimator,
    gradient: Mapping[str, Tensor],
    step: NextStep | None,
    trained_in: TrainedIn,
    passes: PassSettings,
) -> TrainingPrecision | None:
    """The model's weights are as before when it returns; None where nothing was trained below the analysis' own precision.

    Args:
        batch: the evaluation buffer.
        gradient: grad h of it.
        step: the analysed one.
    """
    stored = optimizer.stored_types() if isinstance(optimizer, StoredMoments) else {}
    of_step = None if step is None else step_rounding(step, gradient, stored)
    policy = policy_rounding(model, batch, estimator, step, trained_in, passes) if trained_in.below else None
    return None if policy is None and of_step is None else TrainingPrecision(trained_in, policy, of_step)


def policy_rounding(
    model: nn.Module,
    batch: SequenceBatch,
    estimator: Estimator,
    step: NextStep | None,
    trained_in: TrainedIn,
    passes: PassSettings,
) -> PolicyRounding | None:
    """None for models that are cut over processes or offloaded, whose weights cannot be turned into another type here."""
    if open_cut(model) is not None or any(p.device.type == "meta" for p in model.parameters()):
        return None
    few = batch.select(range(min(SEQUENCES, len(batch))))
    if len(few) < 2:
        return None
    own, towards = _entropy_and_gradient(model, few, estimator, passes)
    with passes_as_in_training(model, trained_in):
        trained, of_training = _entropy_and_gradient(model, few, estimator, passes)
    mask = few.completion_mask
    difference = (trained.logprobs.double() - own.logprobs.double())[mask]
    delta = None if step is None else step.parameter_delta
    return PolicyRounding(
        sequences=len(few),
        tokens=int(mask.sum()),
        logprob=float(difference.square().mean().sqrt()),
        entropy=entropy_estimate(own, few).per_token,
        entropy_in_training=entropy_estimate(trained, few).per_token,
        gradient=relative_error_of_dicts(of_training, towards),
        predicted=None if delta is None else dot(towards, delta),
        predicted_in_training=None if delta is None else dot(of_training, delta),
    )


@contextmanager
def passes_as_in_training(model: nn.Module, trained_in: TrainedIn) -> Iterator[None]:
    """Inside, weights are in the half precision that the run's passes had them in, and passes run under its autocast.

    Of a model with an adapter these are the weights that are values of that type: peft keeps adapters in float32. Of a model
    that is trained whole they are all: where its optimizer keeps finer ones, passes had them rounded.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    half, autocast = HALF.get(trained_in.weights), HALF.get(trained_in.autocast)
    device, trained_whole = next(model.parameters()).device.type, not hasattr(model, "peft_config")
    try:
        if half is not None:
            for parameter in model.parameters():
                wanted = parameter.is_floating_point() and parameter.dtype != half
                if wanted and (trained_whole or holds_exactly(parameter.data, half)):
                    kept.append((parameter, parameter.data))
                    parameter.data = parameter.data.to(half)
        with nullcontext() if autocast is None else torch.autocast(device, autocast):
            yield
    finally:
        for parameter, values in kept:
            parameter.data = values


def step_rounding(
    step: NextStep, gradient: Mapping[str, Tensor], stored: Mapping[str, tuple[torch.dtype, torch.dtype]]
) -> StepRounding | None:
    """None where moments are stored as finely as they are analysed: the weights they belong to are then, or are the rounded
    copies of finer ones that the optimizer keeps.

    Args:
        gradient: grad h.
        stored: name -> types of the first and second moments.
    """
    half = _half_types(stored)
    if not half:
        return None
    onto = {name: same for name, types in half.items() if (same := _of_weights(step.parameters[name], types))}
    length = squared = predicted = of_analysed = 0.0
    moved = moving = 0
    for name, exact in step.parameter_delta.items():
        rounded = _rounded(step, name, half[name], onto.get(name)) if name in half else exact
        length, squared = length + _square(rounded), squared + _square(exact)
        moved, moving = moved + int(rounded.count_nonzero()), moving + int(exact.count_nonzero())
        predicted += dot({name: gradient[name]}, {name: rounded})
        of_analysed += dot({name: gradient[name]}, {name: exact})
    return StepRounding(
        weights=_named(dict.fromkeys(onto.values())) if len(onto) == len(step.parameters) else "float32",
        moments=_named(dict.fromkeys(t for types in half.values() for t in types if t in HALF.values())),
        moved=moved / moving if moving else math.nan,
        length=math.sqrt(length / squared) if squared else math.nan,
        predicted=of_analysed,
        predicted_in_training=predicted,
    )


def _half_types(stored: Mapping[str, tuple[torch.dtype, torch.dtype]]) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    return {name: types for name, types in stored.items() if any(t in HALF.values() for t in types)}


def _of_weights(weights: Tensor, types: tuple[torch.dtype, torch.dtype]) -> torch.dtype | None:
    """The type that a parameter has had in training, where its moments have it and it holds the weights' values."""
    return types[0] if types[0] == types[1] and holds_exactly(weights, types[0]) else None


def _rounded(step: NextStep, name: str, types: tuple[torch.dtype, torch.dtype], weights: torch.dtype | None) -> Tensor:
    """The change of one parameter, in float32: of an optimizer of `weights`' type, or of one that keeps moments of `types`
    beside float32 weights.
    """
    state, gradient, parameter = step.state[name], step.clipped(name), step.parameters[name].detach()
    if weights is not None or gradient is None:
        return taken_step(state, gradient, parameter, weights).float()

    def form(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, largest: Tensor | None = None) -> Tensor:
        new = after_gradient(replace(state, exp_avg=m, exp_avg_sq=v, max_exp_avg_sq=largest), g)
        first, second = (
            t.to(kept).to(theta.dtype) for t, kept in zip((new.exp_avg, new.exp_avg_sq), types, strict=True)
        )
        largest = None if new.max_exp_avg_sq is None else new.max_exp_avg_sq.to(types[1]).to(theta.dtype)
        kept = replace(new, exp_avg=first, exp_avg_sq=second, max_exp_avg_sq=largest)
        moved = preconditioner(kept) * first / (1 - state.beta1**kept.step)
        return -state.lr * (moved + state.weight_decay * theta)

    return elementwise(form, parameter, gradient, state.exp_avg, *second_moments(state)).float()


def _entropy_and_gradient(
    model: nn.Module, batch: SequenceBatch, estimator: Estimator, passes: PassSettings
) -> tuple[TokenStatistics, dict[str, Tensor]]:
    statistics = token_statistics(model, batch, passes)
    objective = entropy_coefficients(statistics, batch, estimator).scaled(1.0 / len(batch))
    return statistics, batch_gradients(model, batch, [objective], passes)[0]


def _square(values: Tensor) -> float:
    return sum(float(piece.double().square().sum()) for piece in values.reshape(-1).split(PIECE))


def _named(types: Iterable[torch.dtype]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in types)

"""How far the precision that a run was trained in is from that of its analysis, on the run's own sequences and step.

A run that was trained below float32 is analysed in float32: with its weights as they are, and passes and steps without the
rounding that training had. What that leaves out:

    policy      log pi and H of the same tokens, and grad h on the same sequences, by passes as they were in training
    step        what torch's AdamW makes of weights and moments in the types they are stored in, against the analysed step;
                changes of entropy by <grad h, step> with the analysis' own grad h of the whole evaluation buffer

torch's AdamW keeps moments in the type of its weights. Moments that are finer than the checkpoint's weights, or than those that
passes had, are those of finer weights: the checkpoint's own, or weights that it holds rounded copies of.

Source: docs/theory/measurement-and-uncertainty.md, "Precision".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from entropy_core.adamw import Moments, after_gradient, preconditioner, second_moments
from entropy_core.batch import SequenceBatch
from entropy_core.cut_weights import open_cut
from entropy_core.entropy import Estimator, entropy_coefficients, entropy_estimate
from entropy_core.formed import PIECE, dot, elementwise
from entropy_core.gradients import batch_gradients, trainable_parameters
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_experiments.checkpoints.half_precision import HALF, held_in, holds_exactly
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
    """policy: None where passes were as they are here, or cannot be made as they were. step: None where it is rounded as here.

    finer_weights: of an optimizer whose weights were finer than those of passes, or than the checkpoint's: "stored" where the
    checkpoint holds them, "rounded" where it holds copies in half precision. not_compared: why there is no `policy`, though
    passes were, or may have been, in half precision.
    """

    trained_in: TrainedIn
    policy: PolicyRounding | None
    step: StepRounding | None
    finer_weights: Literal["stored", "rounded"] | None = None
    not_compared: Literal["cut", "offloaded", "few_sequences", "not_recorded"] | None = None

    def to_json(self) -> dict[str, Any]:
        """summary.json's "training_precision"."""
        found = {
            key: None if part is None else asdict(part) for key, part in (("policy", self.policy), ("step", self.step))
        }
        said = {"finer_weights": self.finer_weights, "not_compared": self.not_compared}
        return {**asdict(self.trained_in), **found, **said}


def training_precision(
    model: nn.Module,
    optimizer: Moments | None,
    batch: SequenceBatch,
    estimator: Estimator,
    gradient: Mapping[str, Tensor],
    step: NextStep | None,
    trained_in: TrainedIn,
    passes: PassSettings,
    recorded: bool = True,
) -> TrainingPrecision | None:
    """The model's weights are as before when it returns; None where all was trained in the analysis' own precision.

    Args:
        batch: the evaluation buffer.
        gradient: grad h of it.
        step: the analysed one.
        recorded: whether a record of the run says `trained_in`; else it is what the checkpoint's weights show.
    """
    stored = optimizer.stored_types() if isinstance(optimizer, StoredMoments) else {}
    if open_cut(model) is not None:  # its weights and gradients lie in parts
        below = trained_in.below or bool(_half_types(stored)) or not recorded
        return TrainingPrecision(trained_in, None, None, not_compared="cut") if below else None
    parameters = trainable_parameters(model)
    of_step = None if step is None else step_rounding(step, gradient, stored)
    kept = {name: same for name, types in _half_types(stored).items() if (same := _of_weights(parameters[name], types))}
    below = trained_in.below or bool(kept)
    why = _why_not_compared(model, batch, below, recorded)
    policy = policy_rounding(model, batch, estimator, step, trained_in, passes, kept) if below and why is None else None
    found = TrainingPrecision(trained_in, policy, of_step, finer_weights(model, stored, trained_in), why)
    return None if found == TrainingPrecision(trained_in, None, None) else found


def finer_weights(
    model: nn.Module, stored: Mapping[str, tuple[torch.dtype, torch.dtype]], trained_in: TrainedIn
) -> Literal["stored", "rounded"] | None:
    """As in TrainingPrecision; None without moments, and where weights have been in the moments' type all along.

    Adapters in float32 on a base model in half precision are what peft makes of them, and have been in passes.
    """
    if not stored or _half_types(stored):
        return None
    if held_in(trainable_parameters(model).values()) is not None:
        return "rounded"
    return "stored" if trained_in.weights in HALF and not hasattr(model, "peft_config") else None


def _why_not_compared(
    model: nn.Module, batch: SequenceBatch, below: bool, recorded: bool
) -> Literal["offloaded", "few_sequences", "not_recorded"] | None:
    if not below:
        return None if recorded else "not_recorded"
    if any(p.device.type == "meta" for p in model.parameters()):
        return "offloaded"
    return "few_sequences" if min(SEQUENCES, len(batch)) < 2 else None


def policy_rounding(
    model: nn.Module,
    batch: SequenceBatch,
    estimator: Estimator,
    step: NextStep | None,
    trained_in: TrainedIn,
    passes: PassSettings,
    kept: Mapping[str, torch.dtype] | None = None,
) -> PolicyRounding:
    """Of a model that lies whole on its devices, and two sequences or more. kept: as in `passes_as_in_training`."""
    few = batch.select(range(min(SEQUENCES, len(batch))))
    own, towards = _entropy_and_gradient(model, few, estimator, passes)
    with passes_as_in_training(model, trained_in, kept):
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
def passes_as_in_training(
    model: nn.Module, trained_in: TrainedIn, kept: Mapping[str, torch.dtype] | None = None
) -> Iterator[None]:
    """Inside, weights are in the half precision that the run's passes had them in, and passes run under its autocast.

    Of a model with an adapter these are the weights that are values of that type: peft keeps adapters in float32. Of a model
    that is trained whole they are all: where its optimizer keeps finer ones, passes had them rounded.

    Args:
        kept: name -> type below float32 that a trained parameter has in the optimizer, whatever `trained_in` says of the others.
    """
    before: list[tuple[nn.Parameter, Tensor]] = []
    half, autocast = HALF.get(trained_in.weights), HALF.get(trained_in.autocast)
    device, trained_whole = next(model.parameters()).device.type, not hasattr(model, "peft_config")
    try:
        for name, parameter in model.named_parameters():
            own = (kept or {}).get(name)
            if own is None and half is not None and (trained_whole or holds_exactly(parameter.data, half)):
                own = half
            if own is not None and parameter.is_floating_point() and parameter.dtype != own:
                before.append((parameter, parameter.data))
                parameter.data = parameter.data.to(own)
        with nullcontext() if autocast is None else torch.autocast(device, autocast):
            yield
    finally:
        for parameter, values in before:
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

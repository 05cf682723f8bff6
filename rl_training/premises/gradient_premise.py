"""Whether a trainer's gradient is the one that its sequences' weights say, checked once a run on
one micro-batch.

    g = -sum_ik [ w_ik grad log pi_ik + u_ik grad H_ik ]

g is what the trainer's backward pass left in `p.grad`; w and u are what its loss sent to the
log-probabilities and entropies of its own forward pass (rl_training.premises.loss_reading); the
right side is computed anew, in evaluation mode and without padding. Where the two sides differ, the
loss holds something that is no function of the policy's log-probabilities and entropies, or the
trainer's forward pass is another function than the policy that is analysed. The log-probabilities
of both passes tell which.

Cost: one forward and one backward pass over one micro-batch, once. Nothing that training uses is
written or drawn.
Source: docs/theory/fisher-kernel.md; docs/guides/self-checks.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients
from entropy_core.gradients import batch_gradients, trainable_parameters
from entropy_core.passes.forward import without_gradient_hooks
from entropy_core.processes import ALONE, Processes
from entropy_core.scores import TokenStatistics
from rl_training.errors import first_line
from rl_training.premises.full_precision import agreement, coarsest_dtype, without_autocast
from rl_training.premises.loss_reading import LossReader, LossReading
from rl_training.premises.loss_terms import ENTROPY, KL, ROUTER, further_terms, remedy, train_mode_noise

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")

_PADDED = (
    "; or the gradient, if not the logits, depends on positions that the trainer counts through the padding before short prompts "
    "(norms behind rotary positions): use prompts of one length, or pass positions "
    "(rl_training.prompts.left_padding.pass_positions(trainer.model) before training)"
)

NOISE, PADDING = "noise", "padding"
"""Causes that are looked for when training begins as well (rl_training.premises.sampling_check)."""


@dataclass(frozen=True)
class GradientCheck:
    """The finding. NaN numbers where the check could not be made; `trouble` then says why.

    Attributes:
        step: the optimizer step, counted from 1.
        relative_error: |g - rebuilt| / |g| over all trainable parameters.
        logprob_difference: |difference| of a token's log-probability between the trainer's forward
            pass and ours, nats, the mean over a sequence's tokens, the largest of all sequences.
        trouble: what is wrong, None where the premise holds.
        made: whether the check could be made.
        cause: NOISE or PADDING where that is it.
    """

    step: int
    relative_error: float
    tolerance: float
    logprob_difference: float
    logprob_tolerance: float
    trouble: str | None = None
    made: bool = True
    cause: str | None = None

    @property
    def held(self) -> bool:
        return self.made and self.trouble is None


class GradientPremise:
    """The check of one trainer's run.

    Call `settle` in every process between the backward passes and the optimizer's step.

    One for each trainer: `GradientPremise.of(trainer)`.
    """

    def __init__(self, trainer: Any) -> None:
        self.check: GradientCheck | None = None
        self.told: set[str] = set()
        """Causes that somebody has warned of already."""
        self._trainer = trainer
        self._model = trainer.accelerator.unwrap_model(trainer.model)
        self._found: GradientCheck | None = None
        self._fresh = False
        self.reader = LossReader.of(trainer)
        if self.reader is None:
            self.check = self._not_made("the trainer has no forward pass that gives log-probabilities")
        elif is_sharded(trainer):
            self.check = self._not_made("the model is sharded: no process holds the whole gradient")
        else:
            self.reader.watch_random = True
            self.reader.before_micro_batch.append(self._begin)
            self.reader.after_micro_batch.append(self._examine)

    @classmethod
    def of(cls, trainer: Any) -> GradientPremise:
        found = getattr(trainer, "_gradient_premise", None)
        if found is None:
            found = trainer._gradient_premise = cls(trainer)
        return found

    def settle(self) -> GradientCheck | None:
        """The finding, once some process has one; None before the first gradient that is not zero."""
        if self.check is None:
            assert self.reader is not None
            if self._found is None and not any(self.reader.micro_batches):
                self._found = self._not_made("its loss is not computed from the trainer's own log-probabilities")
            found = [check for check in gather_object([self._found]) if check is not None]
            if found:
                self.check = max(found, key=lambda c: (not c.held, _number(c.relative_error)))
                self.reader.watch_random = False
                self.reader.before_micro_batch.remove(self._begin)
                self.reader.after_micro_batch.remove(self._examine)
        return self.check

    def fail(self, trouble: str) -> None:
        """Take in what was found elsewhere of this step's gradient, so that the finding says so
        from here on.
        """
        known = self.check or self._not_made("")
        if known.trouble is None or not known.made:
            self.check = replace(known, step=self._trainer.state.global_step + 1, trouble=trouble, made=True)

    def further_terms(self) -> list[str]:
        """What else than weighted log-probabilities this step's loss holds, by name and with its
        remedy; a KL term by the trainer's settings (it is a function of log-probabilities
        itself), the others as measured in this process.
        """
        named = further_terms(self._trainer)
        readings = [] if self.reader is None else [r for micro in self.reader.micro_batches for r in micro]
        seen = {
            KL: any(term.startswith(KL) for term in named),
            ENTROPY: any(r.to_entropies is not None and bool(r.to_entropies.any()) for r in readings),
            ROUTER: any(r.to_auxiliary for r in readings),
        }
        found = [next((t for t in named if t.startswith(name)), name) for name, there in seen.items() if there]
        return [f"{term}; {remedy(term)}" for term in found]

    def trouble_of_weights(self) -> str | None:
        """Why the gradient of the step is not  -sum_ik w_ik grad log pi_ik , or None; after `settle`."""
        failed = self.check is not None and self.check.made and self.check.trouble
        if failed:
            return self.check.trouble
        terms = self.further_terms()
        return f"the loss holds {terms[0]}" if terms else None

    def _not_made(self, why: str) -> GradientCheck:
        return GradientCheck(
            self._trainer.state.global_step + 1, math.nan, math.nan, math.nan, math.nan, why, made=False
        )

    def _begin(self) -> None:
        gradients = (p.grad for p in self._model.parameters() if p.grad is not None)
        self._fresh = self._found is None and not any(bool(g.any()) for g in gradients)

    def _examine(self, readings: list[LossReading]) -> None:
        """Only a micro-batch that starts a step: afterwards `p.grad` holds its gradient alone.

        Where the backward pass has averaged over processes, all of them must have started: a process whose earlier
        micro-batches had no gradient is at its first when the others are at their last.
        """
        accelerator = self._trainer.accelerator
        parameters = trainable_parameters(self._model)
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        starts = self._fresh and bool(readings)
        size = _norm(gradients.values()) if starts else 0.0
        starts = starts and 0.0 < size < math.inf  # else nothing to see yet, or for others to complain of
        averaged = Processes.world() if accelerator.sync_gradients else ALONE
        if averaged.any(not starts, accelerator.device):
            return
        rebuilt, difference, by_padding, failure = {}, math.nan, (0.0, 0.0), None
        try:
            with without_autocast(self._model), without_gradient_hooks(parameters.values()):
                rebuilt, difference, by_padding = _rebuild(self._model, readings, float(self._trainer.temperature))
        except torch.OutOfMemoryError:
            failure = "there is no memory left for a second backward pass"
        except Exception as error:  # a check that cannot be made says so, and stops no training
            failure = f"a second pass over the same sequences fails ({type(error).__name__}: {first_line(error)})"
        if averaged.any(
            failure is not None, accelerator.device
        ):  # all leave together: sums are taken over processes next
            self._found = self._not_made(failure or "a second pass over the same sequences fails in another process")
            return
        left = {
            name: _minus(gradients.get(name), averaged.sum(rebuilt[name]) / averaged.size, p)
            for name, p in parameters.items()
        }
        allowed = agreement(coarsest_dtype(self._model), str(accelerator.mixed_precision))
        step, error = self._trainer.state.global_step + 1, _norm(left.values()) / size
        found = GradientCheck(step, error, allowed.gradient, difference, allowed.logprob)
        if not difference <= allowed.logprob:
            trouble, cause = self._forward_trouble(readings, difference, by_padding, allowed.precision)
            found = replace(found, trouble=trouble, cause=cause)
        elif not found.relative_error <= allowed.gradient:
            trouble, cause = self._loss_trouble(readings, left, found.relative_error)
            found = replace(found, trouble=trouble, cause=cause)
        self._found = found

    # ------------------------------------------------------------------ what it may be
    def _forward_trouble(
        self, readings: Sequence[LossReading], difference: float, by_padding: tuple[float, float], precision: str
    ) -> tuple[str, str | None]:
        padded, unpadded = by_padding
        cause = None
        extra = sorted({name for r in readings for name in r.inputs})
        noise = train_mode_noise(self._model)
        if extra:
            why = f"the model is given more than tokens ({', '.join(extra)}), which is not passed on here"
        elif noise or any(r.drew_random for r in readings):
            why, cause = (
                f"its forward pass draws random numbers in training mode ({', '.join(noise) or 'noise'})",
                NOISE,
            )
        elif padded > 10 * unpadded:
            cause = PADDING
            why = (
                "only prompts with padding before them differ: the model counts positions through the padding, for the trainer "
                "passes it no position_ids; use prompts of one length, per_device_train_batch_size=1, or a model with rotary "
                "positions"
            )
        else:
            kinds = "temperature, positions, adapters, hooks on the output layer"
            why = f"{kinds}, or a precision below {precision} may be the cause"
        return (
            f"the trainer's forward pass is not the policy's: log-probabilities of its own sequences differ by "
            f"{difference:.2g} nats a token; {why}"
        ), cause

    def _loss_trouble(
        self, readings: Sequence[LossReading], left: Mapping[str, Tensor], error: float
    ) -> tuple[str, str | None]:
        if any(r.to_auxiliary for r in readings):
            term = next((t for t in further_terms(self._trainer) if t.startswith(ROUTER)), ROUTER)
            return f"the loss holds {term}, which makes {error:.1%} of its gradient; {remedy(ROUTER)}", None
        if any(r.drew_random for r in readings):
            # An adapter that starts at zero leaves log-probabilities alone whatever is dropped of
            # its input.
            noise = ", ".join(train_mode_noise(self._model)) or "noise"
            return (
                f"{error:.1%} of the gradient is not the policy's: the trainer's forward pass draws random numbers in training "
                f"mode ({noise})"
            ), NOISE
        worst = max(left, key=lambda name: _norm([left[name]]))
        if _has_hooks(trainable_parameters(self._model)[worst]):
            return f"a gradient hook changes the gradient of {worst!r} ({error:.1%} of all); remove it", None
        return (
            f"{error:.1%} of the gradient comes from no log-probability of the step's sequences (most of it in {worst!r}): "
            "compute_loss adds a term of its own, or gradients are changed after the backward pass"
            f"{_PADDED if any(not bool(r.attention_mask[:, 0].all()) for r in readings) else ''}"
        ), None


def is_sharded(trainer: Any) -> bool:
    """Whether the trainer's processes each hold a part of the model alone."""
    return getattr(trainer.accelerator.distributed_type, "value", "") in _SHARDED


def _rebuild(
    model: nn.Module, readings: Sequence[LossReading], temperature: float
) -> tuple[dict[str, Tensor], float, tuple[float, float]]:
    """The gradient that the readings stand for; the largest difference of log-probabilities; the
    same of the sequences with the most padding before their prompts and of those with the least.
    """
    total: dict[str, Tensor] = {}
    gaps, paddings = [], []
    for reading in readings:
        # Sequences whose completion the trainer masks out are not in its forward pass.
        kept = reading.completion_mask.any(1)
        if not bool(kept.any()):
            continue
        batch, width = _batch(reading, kept, temperature), reading.logprobs.shape[1]
        seen: list[TokenStatistics] = []

        def coefficients(
            found: TokenStatistics,
            reading: LossReading = reading,
            kept: Tensor = kept,
            batch: SequenceBatch = batch,
            seen: list[TokenStatistics] = seen,
        ) -> list[TokenCoefficients]:
            seen.append(found)
            parts = [_in_place(t, kept, batch) for t in (reading.to_entropies, reading.to_logprobs)]
            return [TokenCoefficients(*parts)]

        for name, gradient in batch_gradients(model, batch, coefficients, as_trained=True)[0].items():
            total[name] = gradient if name not in total else total[name] + gradient
        gap = (seen[0].logprobs[:, -width:].double() - reading.logprobs[kept].double()).abs()
        mask = batch.completion_mask[:, -width:]
        gaps.append((gap * mask).sum(1) / mask.sum(1))
        paddings.append(batch.attention_mask.long().argmax(1))
    if not total:
        nothing = {name: torch.zeros_like(p) for name, p in trainable_parameters(model).items()}
        return nothing, 0.0, (0.0, 0.0)
    gap, padding = torch.cat(gaps), torch.cat(paddings)
    ends = (float(gap[padding == padding.max()].max()), float(gap[padding == padding.min()].max()))
    return total, float(gap.max()), ends if int(padding.max()) > int(padding.min()) else (0.0, 0.0)


def _batch(reading: LossReading, kept: Tensor, temperature: float) -> SequenceBatch:
    ids, attended = reading.input_ids[kept], reading.attention_mask[kept].bool()
    width = reading.logprobs.shape[1]
    completion = attended.clone()
    completion[:, :-width] = False
    prompts = (ids * attended)[:, :-width]
    return SequenceBatch(ids, attended, completion, prompts.unique(dim=0, return_inverse=True)[1], temperature)


def _in_place(values: Tensor | None, kept: Tensor, batch: SequenceBatch) -> Tensor:
    """(n, L) values of completion columns in the batch's layout."""
    out = torch.zeros(batch.input_ids.shape, dtype=torch.float64, device=batch.device)
    if values is not None:
        out[:, -values.shape[1] :] = values[kept].double()
    return out * batch.completion_mask


def _minus(gradient: Tensor | None, rebuilt: Tensor, p: nn.Parameter) -> Tensor:
    return -rebuilt if gradient is None else gradient - rebuilt.to(p.device)


def _norm(tensors: Any) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tensors), 0.0)


def _has_hooks(p: nn.Parameter) -> bool:
    return bool(p._backward_hooks) or bool(getattr(p, "_post_accumulate_grad_hooks", None))


def _number(value: float) -> float:
    return value if value == value else -1.0

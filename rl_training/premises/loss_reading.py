"""What a trainer's loss does with the policy's log-probabilities and entropies, read off its own
backward pass.

    w_ik = -dL/d log pi(a_ik | c_ik) ,    u_ik = -dL/d H_ik

Whatever the loss is made of (advantages, ratios and their clipping, importance corrections, masks, lengths), its gradient
through the policy is  -sum_ik [ w_ik grad log pi_ik + u_ik grad H_ik ] . The numbers w and u are what reaches the outputs of the
trainer's forward pass, so reading them costs nothing and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# GRPOTrainer's one forward pass for a loss: (log-probabilities, entropies, auxiliary loss) of (n,
# L) completions, in every release that pyproject.toml allows.
_FORWARD = "_get_per_token_logps_and_entropies"
_TOKENS = ("input_ids", "attention_mask", "logits_to_keep")
# Arguments of that pass that say how to run it, and nothing about the sequences.
_NO_INPUTS = {"batch_size", "compute_entropy", "compute_aux_loss", "num_images", "num_tiles"}


@dataclass
class LossReading:
    """One forward pass with gradients and what the loss sends back to it.

    Attributes:
        input_ids, attention_mask: (n, P + L) prompts, padded on the left, and completions, padded
            on the right.
        logprobs: (n, L).
        to_logprobs, to_entropies: dL/dlog pi and dL/dH, (n, L); None where nothing came back.
        to_auxiliary: dL/d(the model's auxiliary loss).
        inputs: names of what the model was given beside tokens.
        drew_random: whether random numbers were drawn (None where that was not watched).
    """

    input_ids: Tensor
    attention_mask: Tensor
    logprobs: Tensor
    inputs: tuple[str, ...]
    drew_random: bool | None = None
    to_logprobs: Tensor | None = None
    to_entropies: Tensor | None = None
    to_auxiliary: float = 0.0

    @property
    def completion_mask(self) -> Tensor:
        """(n, L) bool, the completion tokens that the forward pass saw."""
        return self.attention_mask[:, -self.logprobs.shape[1] :].bool()


class LossReader:
    """Reads the loss of every micro-batch of a GRPOTrainer.

    One for each trainer: `LossReader.of(trainer)`.

    micro_batches: readings of the step so far, a list for each micro-batch (of one entry, unless a
    trainer of one's own runs the policy several times, or not at all where it computes its loss in
    another way). watch_random: whether to notice that forward passes draw random numbers.
    """

    def __init__(self, trainer: Any) -> None:
        self.micro_batches: list[list[LossReading]] = []
        self.after_micro_batch: list[Callable[[list[LossReading]], None]] = []
        """Called after every micro-batch's backward pass, with its readings."""
        self.before_micro_batch: list[Callable[[], None]] = []
        self.after_forward: list[Callable[[LossReading, Tensor | None], None]] = []
        """Called after every forward pass of a loss with its reading and (n, L) entropies, before the loss is made of them."""
        self.after_addition: list[Callable[[], None]] = []
        """Called by what adds to the step's gradient on purpose (the entropy controller), once it has."""
        self.watch_random = False
        self._trainer = trainer
        self._inside = self._step_is_whole = False
        forward, training_step = getattr(trainer, _FORWARD), trainer.training_step

        def read(*args: Any, **kwargs: Any) -> Any:
            return self._read(forward, args, kwargs)

        def step(*args: Any, **kwargs: Any) -> Any:
            return self._step(training_step, args, kwargs)

        setattr(trainer, _FORWARD, read)
        trainer.training_step = step

    @classmethod
    def of(cls, trainer: Any) -> LossReader | None:
        """The trainer's reader; None for a trainer that has no such forward pass."""
        found = getattr(trainer, "_loss_reader", None)
        if found is None and hasattr(trainer, _FORWARD):
            found = trainer._loss_reader = cls(trainer)
        return found

    def token_weights(self) -> list[Tensor | None]:
        """For each micro-batch of the step its (n, L) w_ik, as they stand in the step's gradient
        over all processes; None where the loss ran the policy otherwise than once.
        """
        out: list[Tensor | None] = []
        for readings in self.micro_batches:
            if len(readings) != 1:
                out.append(None)
                continue
            to = readings[0].to_logprobs
            weights = torch.zeros_like(readings[0].logprobs) if to is None else -to / self._scale()
            out.append(weights.double())
        return out

    def pads_prompts(self) -> bool:
        """Whether a prompt of the step so far has padding before it; True for a step whose loss was
        not read.
        """
        readings = [reading for micro in self.micro_batches for reading in micro]
        return not readings or any(bool((r.attention_mask[:, 0] == 0).any()) for r in readings)

    def longest(self) -> int:
        """Tokens of the step's longest sequence so far, padding included; 0 where no loss was read."""
        return max((r.input_ids.shape[1] for micro in self.micro_batches for r in micro), default=0)

    def _scale(self) -> float:
        """What the gradients of this process are multiplied by, against the mean over processes
        that the optimizer takes.
        """
        accelerator = self._trainer.accelerator
        scaler = getattr(accelerator, "scaler", None)
        return accelerator.num_processes * (1.0 if scaler is None else float(scaler.get_scale()))

    def _step(self, training_step: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._step_is_whole:
            self.micro_batches = []
        for call in self.before_micro_batch:
            call()
        self.micro_batches.append([])
        self._inside = True
        try:
            out = training_step(*args, **kwargs)
        finally:
            self._inside = False
        self._step_is_whole = bool(self._trainer.accelerator.sync_gradients)
        for call_with in self.after_micro_batch:
            call_with(self.micro_batches[-1])
        return out

    def _read(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if not (self._inside and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        before = _random_states(self._trainer.accelerator.device) if self.watch_random else None
        out = forward(*args, **kwargs)
        drew = None if before is None else before != _random_states(self._trainer.accelerator.device)
        logprobs, entropies, *more = out
        if not logprobs.requires_grad:
            return out
        given = {**dict(zip(_TOKENS, args[1:4], strict=False)), **kwargs}
        inputs = sorted(k for k, v in given.items() if v is not None and k not in {*_TOKENS, *_NO_INPUTS, "model"})
        reading = LossReading(given["input_ids"], given["attention_mask"], logprobs.detach(), tuple(inputs), drew)
        self.micro_batches[-1].append(reading)
        for call in self.after_forward:  # before the hooks below, which would take such a gradient for the loss's
            call(reading, entropies)

        def note(name: str) -> Callable[[Tensor], None]:
            return lambda gradient: setattr(reading, name, gradient.detach())

        logprobs.register_hook(note("to_logprobs"))
        if entropies is not None and entropies.requires_grad:
            entropies.register_hook(note("to_entropies"))
        if more and more[0] is not None and more[0].requires_grad:
            more[0].register_hook(lambda gradient: setattr(reading, "to_auxiliary", float(gradient)))
        return out


def _random_states(device: torch.device) -> list[bytes]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return [state.numpy().tobytes() for state in states]

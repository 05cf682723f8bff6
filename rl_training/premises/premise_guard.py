"""Stops a run of Dr. GRPO whose gradient is not the one that its recorded weights say, before the
optimizer steps.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from rl_training.errors import UserError
from rl_training.premises.gradient_changes import GradientChanges
from rl_training.premises.gradient_premise import GradientPremise, is_sharded
from rl_training.premises.loss_terms import unequal_weights

# Difference of the loss's own weights from the recorded ones, relative to the largest, that
# rounding explains.
_SAME_WEIGHT = 1e-3


class PremiseGuard(TrainerCallback):
    """Once a run the gradient premise (rl_training.premises.gradient_premise), in every step, for
    nothing, that the loss gave every token the weight that is recorded of its sequence, and that
    the optimizer steps with that gradient.

    Args:
        on_failure: "raise" stops the run with a UserError in every process, "warn" says so once.
    """

    def __init__(self, trainer: Any, on_failure: str) -> None:
        self.premise = GradientPremise.of(trainer)
        self._trainer, self._on_failure = trainer, on_failure
        self._recorded: list[Tensor] = []
        self._said = False
        reader = self.premise.reader
        watchable = reader is not None and not is_sharded(trainer)
        self._changes = GradientChanges(trainer, reader, self._stop) if watchable else None

    def on_train_begin(self, *_args: Any, optimizer: Any = None, **_kwargs: Any) -> None:
        if self._changes is not None and optimizer is not None:
            self._changes.watch(optimizer)

    def expect(self, weights: Tensor) -> None:
        """(n, L) the recorded weight of each token of the micro-batch whose loss is about to be
        computed.
        """
        self._recorded.append(weights.double())

    def on_pre_optimizer_step(self, *_args: Any, **_kwargs: Any) -> None:
        check = self.premise.settle()
        trouble = self.premise.trouble_of_weights() or self._other_weights()
        self._recorded = []
        trouble = next(filter(None, gather_object([trouble])), None)
        if trouble is not None:
            self.premise.fail(trouble)
            self._fail(f"the gradient is not the one that the recorded weights say: {trouble}")
        elif check is not None and not check.made and not self._said:
            self._said = True
            warnings.warn(
                f"it was not checked that the gradient is the one that the recorded weights say: {check.trouble}; analyses of "
                "this run's checkpoints will say so",
                RuntimeWarning,
                stacklevel=2,
            )

    def _other_weights(self) -> str | None:
        reader = self.premise.reader
        found = [] if reader is None else reader.token_weights()
        if len(found) != len(self._recorded):
            return None  # a loss of another kind: `settle` says that it cannot be checked
        largest = max((float(w.abs().max()) for w in self._recorded), default=0.0)
        for weights, recorded in zip(found, self._recorded, strict=True):
            if weights is None:
                continue
            off = float((weights - recorded).abs().max()) if torch.isfinite(weights).all() else 0.0
            if off > _SAME_WEIGHT * largest:
                named = unequal_weights(self._trainer)
                why = named[0] if named else "compute_loss weights sequences otherwise, or masks tokens"
                return (
                    f"the loss gives a token a weight that differs by {off:.2g} from the {largest:.2g} recorded; {why}"
                )
        return None

    def _stop(self, trouble: str) -> None:
        self.premise.fail(trouble)
        self._fail(trouble)

    def _fail(self, trouble: str) -> None:
        if self._on_failure == "raise":
            raise UserError(
                f"{trouble}. Checkpoints of such a run cannot be analysed; on_failed_premise='warn' trains on"
            )
        if not self._said:
            self._said = True
            warnings.warn(trouble, RuntimeWarning, stacklevel=2)

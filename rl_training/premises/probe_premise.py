"""What the entropy probe makes of a loss that holds more than weighted log-probabilities.

The predicted change needs only the step that was taken, so it stays right whatever the loss; it is
said once what the loss holds. The shares of single sequences (`mode: attribution`) and the score
term out of the training backward (`fused`) rest on the weights of the log-probabilities, and are
refused by the term's name.
"""

from __future__ import annotations

import warnings
from typing import Any

from entropy_core.processes import Processes
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.premises.gradient_premise import GradientPremise
from rl_training.premises.loss_terms import further_terms, remedy, unequal_weights


class ProbePremise:
    """Call `hold` in every process and step, when gradients are final and the optimizer has not
    stepped.

    Raises:
        UserError: the trainer's settings rule out what the configuration asks for.
    """

    def __init__(self, trainer: Any, config: EntropyProbeConfig, sharing: Processes) -> None:
        shares = "mode=attribution" if config.mode == "attribution" else "shares=true" if config.shares else None
        self._asked = "fused=true" if config.fused else shares
        self._instead = (
            "set fused=false" if config.fused else "set shares=false" if config.shares else "use mode=simple"
        )
        self._said, self._sharing = False, sharing
        if self._asked is not None and (terms := further_terms(trainer)):
            raise UserError(f"{self._asked}: the loss holds {terms[0]}; {remedy(terms[0])}, or {self._instead}")
        if config.fused and (unequal := unequal_weights(trainer)):
            raise UserError(
                f"fused=true: the tokens of a sequence have unequal weights in the loss, by {unequal[0]}; {self._instead}"
            )
        self._trainer, self._preconditioning = trainer, config.preconditioning
        self._premise = GradientPremise.of(trainer)

    def hold(self) -> None:
        """Raises ValueError where the step is not what `fused` or `mode: attribution` need."""
        self._refuse_scaled()
        check = self._premise.settle()
        trouble = self._premise.trouble_of_weights()
        if self._asked is not None:
            everywhere = next(filter(None, self._sharing.gather([trouble])), None)
            if everywhere is not None:
                raise ValueError(f"{self._asked} cannot be had from this loss: {everywhere}; {self._instead}")
        if self._said or check is None or (check.made and trouble is None):
            return
        self._said = True
        if check.cause in self._premise.told:
            return
        if not check.made:
            said = f"it was not checked that the step's gradient is what the sequences' weights say: {check.trouble}"
        elif check.trouble is not None and check.logprob_difference > check.logprob_tolerance:
            said = (
                f"{check.trouble}. Entropies here are those of the policy as it is analysed, not of that forward pass"
            )
        else:
            # What is predicted needs no remedy: that of a term of the loss is for who wants shares.
            what, _, remedy = trouble.partition("; set ") if trouble.startswith("the loss holds") else (trouble, "", "")
            said = (
                f"{what}. Predicted and measured changes stay right, for they need the step alone; mode=attribution and "
                f"fused=true are refused for such a loss{f' (for them set {remedy})' if remedy else ''}"
            )
        warnings.warn(f"entropy probe: {said}", RuntimeWarning, stacklevel=2)

    def _refuse_scaled(self) -> None:
        """Without clipping a gradient scaler divides by its scale in the optimizer's step alone. What AdamW makes of that
        is held against the step; what a plain step would make of it is not.
        """
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        scale = 1.0 if scaler is None or not scaler.is_enabled() else float(scaler.get_scale())
        divided = (
            self._trainer.accelerator.mixed_precision == "fp16" and self._trainer.args.max_grad_norm
        )  # clipping does
        if self._preconditioning != "actual" and scale != 1.0 and not divided:
            raise ValueError(
                f"preconditioning={self._preconditioning}: gradients are still {scale:g} times too large, since the gradient "
                "scaler of mixed precision divides them in the optimizer's step: set max_grad_norm (a large number clips "
                "nothing), train in bf16 or float32, or use preconditioning=actual"
            )

"""The entropy probe inside a TRL GRPOTrainer: fresh unfiltered rollouts, one prediction a step, the trainer's own logging."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from rl_training.algs.entropy_probe import EntropyChange, SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.sampling import SamplingLaw, draw


class EntropyProbeCallback(TrainerCallback):
    """Before each step draws rollouts and their entropy gradient, after it logs `entropy_probe/...`.

    Rollouts are unfiltered: prompts uniform from `rows` (no reward is looked at), generated beside training with random
    streams of their own. Training is bit-identical with and without it.

    on_error "warn": the first failure is one warning, and the probe stays off from then on; "raise": it stops the run.
    """

    def __init__(
        self, trainer: GRPOTrainer, rows: Sequence[dict[str, Any]], law: SamplingLaw, config: EntropyProbeConfig
    ) -> None:
        if not rows:
            raise UserError("the entropy probe has no prompts to draw from: give it held-out rows")
        self._trainer, self._rows, self._law, self._config = trainer, rows, law, config
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._model = model
        self._probe = SimpleEntropyProbe(model, config.estimator, config.preconditioning)
        self._failed = False
        self._seconds = 0.0
        self.last: EntropyChange | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seconds = 0.0
        if (state.global_step + 1) % self._config.log_every == 0:
            self._guard(self._observe, args.seed, state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._guard(self._probe.before_step, kwargs["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._guard(self._report)

    def _observe(self, seed: int, step: int) -> None:
        rng = np.random.default_rng((seed, step, 0, 0, 1))  # a stream that no round of training has
        count = self._config.eval_sequences
        # Distinct prompts first: more prompts say more about the data than more completions of one.
        order = np.concatenate([rng.permutation(len(self._rows)) for _ in range(-(-count // len(self._rows)))])
        rows = [self._rows[i] for i in order[:count]]
        rollouts = draw(
            self._model, self._trainer.processing_class, rows, 1, self._law, int(rng.integers(2**31)), "evaluation"
        )
        self._probe.observe(rollouts.to_batch(self._law).to(self._trainer.accelerator.device))

    def _report(self) -> None:
        started = time.perf_counter()
        self.last = self._probe.after_step()
        if self.last is None:
            return
        change, measured = self.last, self.last.measured
        values = {
            "entropy": change.entropy,
            "predicted": change.total,
            "predicted_se": change.standard_error,
            "batch": change.batch,
            "momentum": change.momentum,
            "decay": change.weight_decay,
            "measured": measured.change,
            "measured_se": measured.standard_error,
            "ess": measured.effective_sample_size,
            "seconds": self._seconds + time.perf_counter() - started,
        }
        for name, value in values.items():
            self._trainer._metrics["train"][f"entropy_probe/{name}"].append(value)

    def _guard(self, action: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        started = time.perf_counter()
        try:
            action(*arguments)
        except Exception as error:
            if self._config.on_error == "raise":
                raise
            self._failed = True
            warnings.warn(
                f"the entropy probe failed and is off from here on; training goes on without it: {type(error).__name__}: "
                f"{error}",
                RuntimeWarning,
                stacklevel=2,
            )
        self._seconds += time.perf_counter() - started

"""The entropy probe inside a TRL GRPOTrainer: fresh unfiltered rollouts, one prediction a step, the trainer's own logging."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from rl_training.algs.entropy_probe import EntropyChange, SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.sampling import SamplingLaw, draw, sampling_law

# Of an endless stream of prompts the probe keeps so many to draw from.
_PROMPTS_TAKEN = 1024


def attach_entropy_probe(
    trainer: GRPOTrainer, config: EntropyProbeConfig | None = None, rows: Sequence[dict[str, Any]] | None = None
) -> EntropyProbeCallback:
    """Watch the entropy of any GRPOTrainer: logs `entropy_probe/...` with every step. Call it before `trainer.train()`.

    The loss does not matter (nor clipping, KL, accumulation or reuse of completions): what is predicted is the step that
    AdamW takes, on fresh rollouts of the policy before it. Training stays bit-identical.

    rows: prompts to draw from, dicts with `prompt` (text or chat messages); by default those of the trainer's evaluation
    set, or else of its training set.

    Raises UserError where the trainer has no prompts. An optimizer whose step cannot be split shows at the first step, and is
    dealt with by `config.on_error`.
    """
    config = config or EntropyProbeConfig()
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    if rows is None:
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        rows = list(islice(iter(dataset), _PROMPTS_TAKEN))
    numbered = [{"prompt_index": i, **row} for i, row in enumerate(rows)]
    law = sampling_law(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        float(trainer.args.temperature),
        int(trainer.args.max_completion_length),
    )
    callback = EntropyProbeCallback(trainer, numbered, law, config)
    trainer.add_callback(callback)
    return callback


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
        self.history: list[EntropyChange] = []

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
        change = self._probe.after_step()
        if change is None:
            return
        self.history.append(change)
        measured = change.measured
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
            **running_totals(self.history),
            "seconds": self._seconds + time.perf_counter() - started,
        }
        for name, value in values.items():
            self._trainer._metrics["train"][f"entropy_probe/{name}"].append(value)

    def _guard(self, action: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        started = time.perf_counter()
        try:
            with _without_autocast(self._model):
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


def running_totals(history: Sequence[EntropyChange]) -> dict[str, float]:
    """Sums of predicted and measured changes so far, nats per token, and from the third on their correlation.

    Steps that were not probed (log_every) are not in them, nor those before a run was resumed.
    """
    predicted = np.array([change.total for change in history])
    measured = np.array([change.measured.change for change in history])
    totals = {"cumulative_predicted": float(predicted.sum()), "cumulative_measured": float(measured.sum())}
    if len(history) > 2 and predicted.std() > 0 and measured.std() > 0:
        totals["correlation"] = float(np.corrcoef(predicted, measured)[0, 1])
    return totals


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """The model's own forward inside: mixed precision would quantise log-ratios until small changes go flat."""
    wrapped = model.__dict__.get("forward")
    original = model.__dict__.get("_original_forward")
    if wrapped is None or original is None:  # accelerate wraps the forward only under mixed precision
        yield
        return
    model.__dict__["forward"] = original
    try:
        yield
    finally:
        model.__dict__["forward"] = wrapped

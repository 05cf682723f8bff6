"""The entropy probe inside a TRL GRPOTrainer: one prediction a step, in the trainer's own logging."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from entropy_core.processes import Processes
from rl_training.algs.entropy_probe import SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.generation.description import SamplingDescription, describe_sampling
from rl_training.generation.drawn_tokens import loss_mask
from rl_training.generation.rollout_sequences import (
    RolloutSequence,
    drawn_scores,
    prior_log_weights,
    to_batch,
    to_training_sequences,
)
from rl_training.integrations.fresh_prompts import FreshCompletions, refuse_prompts
from rl_training.integrations.generated_sequences import GeneratedSequences
from rl_training.integrations.sequence_pool import SequencePool
from rl_training.integrations.step_watch import StepWatch
from rl_training.integrations.trl_rollouts import StepRollouts, prompts_of
from rl_training.integrations.watched_sequences import Watched, WatchedSequences
from rl_training.premises.full_precision import agreement, coarsest_dtype, without_autocast
from rl_training.premises.probe_premise import ProbePremise
from rl_training.premises.sampling_check import FirstPrompts, SamplingWatcher
from rl_training.premises.surprisal_check import SamplerWatch
from rl_training.probe.change import EntropyChange
from rl_training.probe.forecast import FORECAST, EntropyForecast
from rl_training.probe.history import RUNNING, ProbeHistory
from rl_training.probe.metrics import metrics_of, running_of
from rl_training.probe.observation import Observation
from rl_training.probe.rounding import RoundingNoise
from rl_training.probe.schedule import NOTHING, plan_of
from rl_training.probe.score_term import FusedScoreTerm
from rl_training.probe.splits import entropy_by_ending, shares_by_group
from rl_training.prompts.endings import ending
from rl_training.run.console import ProbeConsole

# Sources of sequences that are drawn for the probe.
OF_PROMPTS = ("fresh", "pool")

# Of an endless stream of prompts the probe keeps so many to draw from.
_PROMPTS_TAKEN = 1024


def attach_entropy_probe(
    trainer: GRPOTrainer,
    config: EntropyProbeConfig | None = None,
    rows: Sequence[dict[str, Any]] | None = None,
    console: bool = True,
) -> EntropyProbeCallback:
    """Watch the entropy of any GRPOTrainer: logs `entropy_probe/...` with every step. Call it before `trainer.train()`.

    The loss does not matter (nor clipping, KL, accumulation or reuse of completions): what is predicted is the step that the
    optimizer takes, AdamW's in its parts, any other's as a whole. Training stays bit-identical.

    rows: prompts to draw from under `rollouts: fresh`, dicts with `prompt` (text or chat messages); by default those of the
    trainer's evaluation set, or else of its training set. console: print a line a logged step to standard error.

    Raises UserError where fresh rollouts or a pool are asked for and the trainer has no prompts, prompts of more than text,
    or tools or an environment, which cannot be run for them; or for settings that the optimizer does not suit. An optimizer that
    is made by `train()` is looked at in the first step, and there `config.on_error` decides.
    """
    config = config or EntropyProbeConfig()
    prompts = _prompts(trainer, rows, config.rollouts) if config.rollouts in OF_PROMPTS else []
    description = describe_sampling(trainer)
    callback = EntropyProbeCallback(trainer, prompts, description, config)
    trainer.add_callback(SamplingWatcher(trainer, description))
    if trainer.optimizer is not None:
        callback.examine(trainer.optimizer)
    trainer.add_callback(callback)
    if console:
        trainer.add_callback(ProbeConsole(callback.describe()))
    return callback


def _prompts(trainer: GRPOTrainer, rows: Sequence[dict[str, Any]] | None, source: str) -> list[dict[str, Any]]:
    if rows is None:
        dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        rows = list(islice(iter(dataset), _PROMPTS_TAKEN))
    if not rows:
        raise UserError("the entropy probe has no prompts to draw from: give it held-out rows")
    refuse_prompts(trainer, rows, source)
    return [{"prompt_index": i, **row} for i, row in enumerate(rows)]


class EntropyProbeCallback(TrainerCallback):
    """Before each step takes a gradient of entropy and predicts the step, after it measures and logs `entropy_probe/...`.

    The sequences watched are unfiltered: this step's or the last step's rollouts before any was rejected, or fresh ones of
    held-out prompts, generated beside training with random streams of their own. Training is bit-identical with and
    without it. Several processes share the work; each logs the same numbers.

    on_error "warn": the first failure is one warning, and the probe stays off from then on; "raise": it stops the run.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        prompts: Sequence[dict[str, Any]],
        description: SamplingDescription,
        config: EntropyProbeConfig,
    ) -> None:
        self._trainer, self._prompts, self._sampling_config, self._config = (
            trainer,
            prompts,
            description.sampling_config(),
            config,
        )
        self._model = trainer.accelerator.unwrap_model(trainer.model)
        self._sharing = Processes.world()
        allowed = agreement(coarsest_dtype(self._model), str(trainer.accelerator.mixed_precision))
        self._probe = SimpleEntropyProbe(config, self._model, self._sharing, allowed.gradient)
        self._fused = FusedScoreTerm(self._model, self._probe.folds, self._sharing) if config.fused else None
        self._fresh = FreshCompletions(trainer, self._model, self._sampling_config, self._sharing)
        self._watch: StepWatch | None = None
        if config.mode == "watch":
            pool = None
            if config.rollouts == "pool":
                pool = SequencePool(prompts, config.eval_sequences, config.pool_age, self._fresh.draw)
            self._watch = StepWatch(trainer, self._model, config, self._sharing, pool)
        self._premise = ProbePremise(trainer, config)
        self._rollouts = StepRollouts(trainer, self._begin_micro_batch if config.fused else None)
        self._first_prompts = FirstPrompts(trainer, description) if config.rollouts in OF_PROMPTS else None
        self._sampler = SamplerWatch(trainer)
        self._sequences = WatchedSequences(trainer, config, self._sampling_config, self._probe)
        self._generated = GeneratedSequences(trainer)
        self._carried: list[RolloutSequence] = []
        self._splits: dict[str, float] = {}
        self._trained: list[RolloutSequence] = []
        self._rounding = RoundingNoise(self._model)
        self._failed = self._probing = False
        self._plan = NOTHING
        self._seen: Observation | None = None
        self._seconds = self._cpu_seconds = 0.0
        self._steps, self._forecast = ProbeHistory(), EntropyForecast.of(config)
        self.history: list[EntropyChange] = []
        self.costs: list[tuple[float, float]] = []
        """Wall and CPU seconds of each entry of `history`."""

    def describe(self) -> str:
        """One line: what is watched, how, and the memory it takes at most beside activations."""
        c, megabytes = self._config, self._probe.memory_bytes() / 1e6
        if c.mode == "watch":
            gradients = f", up to {megabytes:,.0f} MB for a prediction every {c.predict_every} steps"
            return (
                f"entropy probe (watch): {c.eval_sequences} sequences of {c.rollouts.replace('_', ' ')} rollouts, forward "
                f"passes alone{gradients if c.predict_every else ''}"
            )
        every = "" if c.refresh_every == 1 else f", every {c.refresh_every} steps"
        return (
            f"entropy probe ({c.preset}): {c.eval_sequences} sequences of {c.rollouts.replace('_', ' ')} rollouts{every}, "
            f"{c.estimator.replace('_', ' ')} estimator, up to {megabytes:,.0f} MB beside activations{self._overlap()}"
        )

    def _overlap(self) -> str:
        """A line more where what is watched is known to overstate the policy's change (benchmarks/probe_replay)."""
        parameters = list(self._model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        if self._config.rollouts != "current" or 2 * trained < sum(p.numel() for p in parameters):
            return ""
        return (
            "\nentropy probe: all weights are trained, and a step may move entropy two to three times as far on its own "
            "sequences, which `predicted` and `measured` are of, as on others: preset=watch with held-out prompts has no such "
            "overlap"
        )

    def examine(self, optimizer: torch.optim.Optimizer) -> None:
        """Say what cannot be told of this optimizer's steps. Raises UserError for settings that it does not suit."""
        self._probe.examine(optimizer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._steps.begin(state.stateful_callbacks, state.global_step)
        if self._forecast is not None:
            self._forecast.replay(self._steps.steps())
        if self._watch is not None:
            self._watch.begin(state.stateful_callbacks, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seconds = self._cpu_seconds = 0.0
        self._rollouts.clear()
        self._sampler.step_begins()
        self._plan = NOTHING if self._failed else plan_of(self._config, state.global_step)
        self._probing = self._plan is not NOTHING
        if self._watch is not None:
            self._watch.arm(self._probing)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._watch is None or self._config.predict_every is not None:
            self._guard(self._premise.hold)
        self._guard(self._before_step, args.seed, state.global_step, kwargs["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._guard(self._after_step, state.global_step + 1)

    def _begin_micro_batch(self, inputs: dict[str, Any]) -> None:
        if self._fused is not None and self._probing:
            self._fused.begin(prompts_of(inputs), loss_mask(inputs))

    # ------------------------------------------------------------------ the two halves
    def _before_step(self, seed: int, step: int, optimizer: torch.optim.Optimizer) -> None:
        config, fresh = self._config, self._config.rollouts in OF_PROMPTS
        if not self._probing and fresh:
            return
        # First of all: the hooks must not see the probe's own passes.
        score = self._fused.take() if self._fused is not None and self._probing else None
        generated, trained = self._rollouts.take()
        # What the probe watches says nothing of how this step's were drawn, or its pass does not take variances.
        if config.rollouts != "current" or self._watch is not None:
            self._sampler.look(generated, self._sampling_config, self._probe.statistics)
        rng = np.random.default_rng((seed, step, 0, 0, 1))  # a stream that no round of training has
        plan = self._plan
        self._trained, self._splits, self._seen = trained, {}, None
        nothing = Watched([], None)
        if not fresh:  # unprobed steps as well: a later step may train on their sequences again
            self._sequences.begin(step, self._rollouts.new_generation(self._sequences.reused))
        watched, scores = self._watched(generated, rng) if plan.watches else nothing, None
        if watched.sequences:
            batch = to_batch(watched.sequences, self._sampling_config).to(self._trainer.accelerator.device)
            drawn, prior = _on(batch.device, watched.drawn), _on(batch.device, prior_log_weights(watched.sequences))
            if self._watch is not None:
                seen, drawn = self._watch.before(step, batch, watched.sequences, drawn, prior)
                self._seen = seen
            if self._watch is None or plan.predicts:
                drawn_now = (
                    self._watch is None and config.rollouts == "current" and drawn is None and self._sampler.wanted
                )
                seen = self._probe.observe(batch, drawn, prior, drawn_now, gradient=plan.refreshes)
                if drawn_now:
                    self._sampler.take(seen.statistics, seen.batch)
            scores, self._splits = (
                seen.statistics.scores(),
                entropy_by_ending(seen, self._sampling_config.eos_token_ids),
            )
        if config.rollouts == "previous_step":
            self._carry(generated, rng, step)
        if not fresh:
            mine = watched if config.rollouts == "current" else nothing
            drawn = self._generated.take()
            self._sequences.end(generated, mine, scores if mine is watched else None, drawn)
        if self._watch is not None and plan.splits:
            self._watch.parts(optimizer)
        if plan.predicts:
            asked = config.predictors or config.wants_shares
            training = (
                to_training_sequences(trained, self._sampling_config, self._trainer.accelerator.device)
                if asked
                else None
            )
            self._probe.before_step(optimizer, training, score)

    def _watched(self, generated: list[RolloutSequence], rng: np.random.Generator) -> Watched:
        if self._first_prompts is not None:
            self._first_prompts.require_ours()
            pooled = None if self._watch is None else self._watch.pooled(rng)
            return Watched(self._draw(rng) if pooled is None else pooled, None)
        if self._config.rollouts == "previous_step":
            return Watched(self._carried, drawn_scores(self._carried))
        return self._sequences.choose(generated, rng)

    def _carry(self, generated: list[RolloutSequence], rng: np.random.Generator, step: int) -> None:
        """Choose the sequences of the next step's gradient, and note how likely they were for the policy that drew them."""
        self._carried = []
        if plan_of(self._config, step + 1).watches and (chosen := self._sequences.choose(generated, rng)).sequences:
            drawn = self._sequences.scores_at_drawing(chosen)
            self._carried = [replace(s, drawn_score=d) for s, d in zip(chosen.sequences, drawn, strict=True)]

    def _draw(self, rng: np.random.Generator) -> list[RolloutSequence]:
        """Fresh completions of prompts taken evenly."""
        each = self._config.completions_per_prompt
        count = -(-self._config.eval_sequences // each)
        # Distinct prompts first: more prompts say more about the data than more completions of one.
        order = np.concatenate([rng.permutation(len(self._prompts)) for _ in range(-(-count // len(self._prompts)))])
        return self._fresh.draw([self._prompts[i] for i in order[:count]], rng, each)

    def _after_step(self, step: int) -> None:
        if not self._probing:
            return
        started, cpu = time.perf_counter(), time.process_time()
        change = self._probe.after_step(measure=self._plan.measures)
        watched = None if self._watch is None else self._watch.after(step)
        if watched is not None:
            if change is None and self._seen is not None:
                change = EntropyChange.only_watched(self._seen, watched)
            elif change is not None:
                change = change.with_watched(watched)
        if change is None:
            return
        if (word := self._rounding.word(change)) is not None:
            warnings.warn(f"the entropy probe: {word}", RuntimeWarning, stacklevel=2)
        if change.shares is not None:
            kinds = [ending(s.completion_ids, s.drawn, self._sampling_config.eos_token_ids) for s in self._trained]
            self._splits |= shares_by_group(change.shares, kinds, [s.advantage for s in self._trained])
        self.history.append(change)
        self.costs.append(
            (self._seconds + time.perf_counter() - started, self._cpu_seconds + time.process_time() - cpu)
        )
        metrics, logged = metrics_of(change), self._trainer._metrics["train"]
        self._steps.add(step, metrics, change.total.deviations)
        for name, value in {**metrics, **self._splits, "seconds": self.costs[-1][0]}.items():
            logged[f"entropy_probe/{name}"].append(value)
        totals = self._steps.totals() | ({} if watched is None else running_of(watched))
        if self._forecast is not None:
            totals |= self._forecast.add(metrics)
        # TRL logs the mean of a list over the steps since its last log: of these, the last value alone.
        for name in (*RUNNING, *FORECAST):
            logged.pop(f"entropy_probe/{name}", None)
            if name in totals:
                logged[f"entropy_probe/{name}"] = [totals[name]]

    def _guard(self, action: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        started, cpu = time.perf_counter(), time.process_time()
        try:
            with without_autocast(self._model):
                action(*arguments)
        except Exception as error:
            self._probe.reset()
            self._rollouts.clear()
            if self._watch is not None:
                self._watch.drop()
            if self._fused is not None:
                self._fused.detach()
                self._fused.abandon()
            if self._config.on_error == "raise":
                raise
            self._failed, self._probing = True, False
            warnings.warn(
                f"the entropy probe failed and is off from here on; training goes on without it: {type(error).__name__}: "
                f"{error}",
                RuntimeWarning,
                stacklevel=2,
            )
        self._seconds += time.perf_counter() - started
        self._cpu_seconds += time.process_time() - cpu


def _on(device: torch.device, values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.to(device)

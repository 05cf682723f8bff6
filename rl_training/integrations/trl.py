"""The entropy probe inside a TRL GRPOTrainer: one prediction a step, in the trainer's own logging."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from rl_training.algs.entropy_probe import SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.generation.description import SamplingDescription, SettledSampling, describe_sampling
from rl_training.generation.drawn_tokens import loss_mask
from rl_training.generation.rollout_sequences import (
    RolloutSequence,
    drawn_scores,
    prior_log_weights,
    to_batch,
    to_training_sequences,
)
from rl_training.integrations.dashboards import TensorBoardLayout
from rl_training.integrations.failing_together import FailingTogether
from rl_training.integrations.fresh_prompts import FreshCompletions
from rl_training.integrations.generated_sequences import GeneratedSequences
from rl_training.integrations.probe_checkpoint import ProbeCheckpoint, Probed
from rl_training.integrations.sequence_pool import SequencePool
from rl_training.integrations.step_watch import StepWatch
from rl_training.integrations.trl_rollouts import StepRollouts, prompts_of
from rl_training.integrations.watched_sequences import Watched, WatchedSequences
from rl_training.integrations.watched_source import OF_PROMPTS, watched_source
from rl_training.integrations.whole_saves import remove_unfinished, save_whole
from rl_training.premises.full_precision import agreement, coarsest_dtype, without_autocast
from rl_training.premises.probe_premise import ProbePremise
from rl_training.premises.sampling_check import FirstPrompts, SamplingWatcher
from rl_training.premises.step_alone import StepAlone
from rl_training.premises.surprisal_check import SamplerWatch
from rl_training.probe.change import EntropyChange
from rl_training.probe.forecast import FORECAST, EntropyForecast
from rl_training.probe.history import RUNNING, ProbeHistory
from rl_training.probe.metrics import metrics_of, running_of
from rl_training.probe.observation import Observation
from rl_training.probe.rounding import RoundingNoise
from rl_training.probe.schedule import NOTHING, plan_of
from rl_training.probe.score_term import FusedScoreTerm
from rl_training.probe.sharded_weights import refuse_gradients
from rl_training.probe.splits import entropy_by_ending, shares_by_group
from rl_training.probe.watch import WatchedChange
from rl_training.prompts.endings import ending
from rl_training.run.console import ProbeConsole


def attach_entropy_probe(
    trainer: GRPOTrainer,
    config: EntropyProbeConfig | None = None,
    rows: Sequence[dict[str, Any]] | None = None,
    console: bool = True,
) -> EntropyProbeCallback:
    """Watch the entropy of any GRPOTrainer: logs `entropy_probe/...`. Call it before `trainer.train()`.

    The loss does not matter (nor clipping, KL, accumulation or reuse of completions): what is measured and predicted is the step
    that the optimizer takes, AdamW's in its parts, any other's as a whole. Training stays bit-identical.

    Args:
        rows: prompts whose completions are watched, dicts with `prompt` (text or chat messages), best ones that are not trained
            on; by default those of the trainer's evaluation set, or else of its training set. Where none can be drawn of, the
            step's own sequences are watched, and that is said.
        console: print a line a logged step to standard error.

    Raises:
        UserError: where fresh rollouts or a pool are asked for by name and the trainer has no prompts, prompts of more than text,
            or tools or an environment, which cannot be run for them; or for settings that the optimizer does not suit. An
            optimizer that is made by `train()` is looked at in the first step, and there `config.on_error` decides.
    """
    config, prompts, word = watched_source(trainer, rows, config or EntropyProbeConfig())
    if word is not None:
        warnings.warn(f"the entropy probe: {word}", RuntimeWarning, stacklevel=2)
    description = describe_sampling(trainer)
    save_whole(trainer, GRPOTrainer._save_checkpoint)
    callback = EntropyProbeCallback(trainer, prompts, description, config)
    SamplingWatcher.attach(trainer, description, "entropy probe")
    if trainer.optimizer is not None:
        callback.examine(trainer.optimizer)
    last = [ProbeConsole(callback.describe())] if console else []
    for each in (callback, StepAlone(trainer, callback._model, callback), TensorBoardLayout(trainer), *last):
        trainer.add_callback(each)
    return callback


class EntropyProbeCallback(TrainerCallback):
    """Before each step takes a gradient of entropy and predicts the step, after it measures and logs `entropy_probe/...`.

    The sequences watched are unfiltered: this step's or the last step's rollouts before any was rejected, or fresh ones of
    held-out prompts, generated beside training with random streams of their own. Training is bit-identical with it and without.
    Several processes share the work; each logs the same numbers.

    on_error "warn": the first failure in any process is one warning in each, and turns the probe off; "raise": it stops the run.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        prompts: Sequence[dict[str, Any]],
        description: SamplingDescription,
        config: EntropyProbeConfig,
    ) -> None:
        self._trainer, self._prompts, self._config = trainer, prompts, config
        self._sampling_config = description.sampling_config()
        self._model = trainer.accelerator.unwrap_model(trainer.model)
        self._failing = FailingTogether(trainer.accelerator.device)
        self._sharing = self._failing.processes
        allowed = agreement(coarsest_dtype(self._model), str(trainer.accelerator.mixed_precision))
        self._tolerance = allowed.gradient
        self._probe = SimpleEntropyProbe(config, self._model, self._sharing, self._tolerance, check_sampler=False)
        self._fused = FusedScoreTerm(self._model, self._probe.folds, self._sharing) if config.fused else None
        self._fresh = FreshCompletions(trainer, self._model, self._sampling_config, self._sharing)
        self._watch: StepWatch | None = None
        if config.mode == "watch":
            pool = None
            if config.rollouts == "pool":
                pool = SequencePool(prompts, config.eval_sequences, config.pool_age, self._fresh.draw)
            self._watch = StepWatch(trainer, self._model, config, self._sharing, pool)
        self._premise = ProbePremise(trainer, config, self._sharing)
        self._rollouts = StepRollouts(trainer, self._begin_micro_batch if config.fused else None, self._sharing)
        self._first_prompts = FirstPrompts(trainer, description) if config.rollouts in OF_PROMPTS else None
        self._sampler, self._settled = SamplerWatch(trainer), SettledSampling(trainer)
        self._rounding = RoundingNoise(self._model)
        self._sequences = WatchedSequences(trainer, config, self._sampling_config, self._probe)
        self._generated = GeneratedSequences(trainer, self._sharing)
        layouts = (self._probe.prefixes, *([] if self._watch is None else [self._watch.layout]))
        probed = Probed(self._model, self._probe, self._sequences, self._sampler, layouts)
        self._kept = ProbeCheckpoint(trainer, config, probed, self._sharing)
        self._splits: dict[str, float] = {}
        self._trained: list[RolloutSequence] = []
        self._failed = self._probing = False
        self._plan = NOTHING
        self._seen: Observation | None = None
        self._spent, self._since = (0.0, 0.0), (0.0, 0.0)
        self._steps, self._forecast = ProbeHistory(), EntropyForecast.of(config)
        self.history: list[EntropyChange] = []
        self.costs: list[tuple[float, float]] = []
        """Wall and CPU seconds of each entry of `history`."""

    def describe(self) -> str:
        """One line: what is watched, how, and the memory it takes at most beside activations."""
        c, megabytes = self._config, self._probe.memory_bytes() / 1e6
        whose = "held-out prompts" if c.rollouts == "pool" else f"{str(c.rollouts).replace('_', ' ')} rollouts"
        if self._watch is not None:
            every = "" if (n := c.measure_every or 1) == 1 else f" {n}"
            predicted = f"; predicted every {c.predict_every} step(s), up to {megabytes:,.0f} MB beside activations"
            return (
                f"entropy probe ({c.preset}): {c.eval_sequences} sequences of {whose}, measured every{every} step{'s' * (n > 1)} "
                f"by forward passes{predicted if c.predict_every else ''}"
            )
        every = "" if c.refresh_every == 1 else f", every {c.refresh_every} steps"
        return (
            f"entropy probe ({c.mode}, {c.preset}): {c.eval_sequences} sequences of {whose}{every}, "
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
            "sequences, which `predicted` and `measured` are of, as on others: mode=watch with held-out prompts has no such "
            "overlap"
        )

    def examine(self, optimizer: torch.optim.Optimizer) -> None:
        """Say what cannot be told of this optimizer's steps. Raises UserError for settings that it does not suit."""
        self._probe.examine(optimizer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        remove_unfinished(self._trainer)
        self._kept.begin(state.global_step)
        self._settled.begin()
        self._steps.begin(state.stateful_callbacks, state.global_step)
        if self._forecast is not None:
            self._forecast.replay(self._steps.steps())
        if self._watch is not None:
            self._watch.begin(state.stateful_callbacks, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._rollouts.clear()
        self._sampler.step_begins()
        self._plan = NOTHING if self._failed else plan_of(self._config, state.global_step)
        self._probing = self._plan is not NOTHING
        if self._watch is not None:
            self._watch.arm(self._plan.watches and not self._watch.spans.open)

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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What is saved, or is the last, holds all that was measured up to it."""
        if self._watch is not None and self._watch.spans.open and (control.should_save or control.should_training_stop):
            self._guard(self._end_span, state.global_step, True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A run that goes on from here has no passes of earlier steps at hand: nor has this one."""
        if self._watch is not None:
            self._watch.forget_passes()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control, **kwargs)

    def _begin_micro_batch(self, inputs: dict[str, Any]) -> None:
        if self._fused is not None and self._probing:
            self._fused.begin(prompts_of(inputs), loss_mask(inputs))

    # ------------------------------------------------------------------ the two halves
    def _before_step(self, seed: int, step: int, optimizer: torch.optim.Optimizer) -> None:
        self._settled.hold(step + 1)
        config, fresh = self._config, self._config.rollouts in OF_PROMPTS
        if self._watch is not None:
            self._watch.still(step)
        if fresh and (not self._probing or (self._watch is not None and self._watch.spans.open)):
            return
        # First of all: the hooks must not see the probe's own passes.
        score = self._fused.take() if self._fused is not None and self._probing else None
        generated, trained = self._rollouts.take()
        # What the probe watches says nothing of how this step's were drawn, or its pass does not take variances.
        if config.rollouts != "current" or self._watch is not None:
            self._sampler.look(generated, self._sampling_config, self._probe.statistics)
        rng = np.random.default_rng((seed, step, 0, 0, 1))  # a stream that no round of training has
        plan, nothing = self._plan, Watched([], None)
        self._trained, self._splits, self._seen = trained, {}, None
        if not fresh:  # unprobed steps as well: a later step may train on their sequences again
            self._sequences.begin(step, self._rollouts.new_generation(self._sequences.reused))
        if plan.refreshes:
            refuse_gradients(self._model, config.gradients_and_remedy[0])
        watched, scores = self._watched(step, generated, rng) if plan.watches else nothing, None
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
                critic = {} if self._watch is None else {"critic": self._watch.objective}
                seen = self._probe.observe(batch, drawn, prior, drawn_now, gradient=plan.refreshes, **critic)
                if drawn_now:
                    self._sampler.take(seen.statistics, seen.batch)
            scores = seen.statistics.scores()
            self._splits = entropy_by_ending(seen, self._sampling_config.eos_token_ids)
        if config.rollouts == "previous_step":
            self._carry(generated, rng, step)
        if not fresh:
            mine = watched if config.rollouts == "current" else nothing
            drawn = self._generated.take()
            self._sequences.end(generated, mine, scores if mine is watched else None, drawn)
        if self._watch is not None and plan.splits:
            self._watch.parts(optimizer)
        if plan.predicts:
            training = None
            if config.predictors or config.wants_shares or plan.prices:
                device, limit = self._trainer.accelerator.device, self._trainer.args.max_grad_norm or 0.0
                training = to_training_sequences(trained, self._sampling_config, device, limit)
            self._probe.before_step(optimizer, training, score, self._watch and self._watch.derivative)
            if plan.prices and self._watch is not None and training is not None:
                self._splits |= self._watch.prices(optimizer, training, self._tolerance)

    def _watched(self, step: int, generated: list[RolloutSequence], rng: np.random.Generator) -> Watched:
        if self._first_prompts is not None:
            self._first_prompts.require_ours()
            pooled = None if self._watch is None else self._watch.pooled(step, rng)
            return Watched(self._draw(rng) if pooled is None else pooled, None)
        if self._config.rollouts == "previous_step":
            return Watched(self._kept.carried, drawn_scores(self._kept.carried))
        return self._sequences.choose(generated, rng)

    def _carry(self, generated: list[RolloutSequence], rng: np.random.Generator, step: int) -> None:
        """Choose the sequences of the next step's gradient, and note how likely they were for the policy that drew them."""
        self._kept.carried = []
        if plan_of(self._config, step + 1).watches and (chosen := self._sequences.choose(generated, rng)).sequences:
            drawn = self._sequences.scores_at_drawing(chosen)
            self._kept.carried = [replace(s, drawn_score=d) for s, d in zip(chosen.sequences, drawn, strict=True)]

    def _draw(self, rng: np.random.Generator) -> list[RolloutSequence]:
        """Fresh completions of prompts taken evenly."""
        each = self._config.completions_per_prompt
        count = -(-self._config.eval_sequences // each)
        # Distinct prompts first: more prompts say more about the data than more completions of one.
        order = np.concatenate([rng.permutation(len(self._prompts)) for _ in range(-(-count // len(self._prompts)))])
        return self._fresh.draw([self._prompts[i] for i in order[:count]], rng, each)

    def _after_step(self, step: int) -> None:
        if self._watch is not None:
            alone = self._plan.predicts or self._plan.splits
            coming = plan_of(self._config, step)
            if self._watch.took() or (self._watch.spans.open and (alone or coming.predicts or coming.splits)):
                self._end_span(step)
        elif self._probing:
            self._log(step, self._probe.after_step(measure=self._plan.measures), None)

    def _end_span(self, step: int, later: bool = False) -> None:
        """Measure what the steps since `_before_step` did, up to `step` (counted from 1). later: other callbacks came first."""
        assert self._watch is not None
        if later and not self._watch.still(step):
            return
        steps = max(self._watch.spans.taken, self._config.log_every)
        change, watched = self._probe.after_step(measure=False, steps=steps), self._watch.after(step)
        if watched is not None and self._seen is not None:
            change = EntropyChange.only_watched(self._seen, watched) if change is None else change.with_watched(watched)
        self._log(step, change, watched)

    def _log(self, step: int, change: EntropyChange | None, watched: WatchedChange | None) -> None:
        if change is None:
            return
        if (word := self._rounding.word(change)) is not None:
            warnings.warn(f"the entropy probe: {word}", RuntimeWarning, stacklevel=2)
        if change.shares is not None:
            kinds = [ending(s.completion_ids, s.drawn, self._sampling_config.eos_token_ids) for s in self._trained]
            self._splits |= shares_by_group(change.shares, kinds, [s.advantage for s in self._trained])
        self.history.append(change)
        self.costs.append(self._spent_so_far())
        self._spent, self._since = (0.0, 0.0), _clocks()
        metrics, logged = metrics_of(change, self._config.watched_for), self._trainer._metrics["train"]
        self._steps.add(step, metrics, change.total.deviations, [] if watched is None else watched.deviations)
        for name, value in {**metrics, **self._splits, "seconds": self.costs[-1][0]}.items():
            logged[f"entropy_probe/{name}"].append(value)
        totals = self._steps.totals()
        if watched is not None:  # of all steps, which predictions of some have no sum to stand beside
            if self._config.predict_every != 1:
                totals = {name: value for name, value in totals.items() if not name.startswith("cumulative_predicted")}
            totals |= running_of(watched)
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
        self._since = _clocks()
        try:
            with without_autocast(self._model), self._failing.together():
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
            self._failed, self._probing, self._kept.off = True, False, True
            warnings.warn(
                f"the entropy probe failed and is off from here on; training goes on without it: {type(error).__name__}: "
                f"{error}",
                RuntimeWarning,
                stacklevel=2,
            )
        self._spent = self._spent_so_far()

    def _spent_so_far(self) -> tuple[float, float]:
        """Wall and CPU seconds since the last row that was logged."""
        wall, cpu = (spent + now - since for spent, now, since in zip(self._spent, _clocks(), self._since, strict=True))
        return wall, cpu


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _on(device: torch.device, values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.to(device)

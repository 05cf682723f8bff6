"""`mode: watch` inside a trainer: the watch of every step, fed with the trainer's own pass, and its state in the trainer's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import normalized_weights
from entropy_core.gradients import trainable_parameters
from entropy_core.passes.forward import input_device
from entropy_core.passes.prefix_sharing import PrefixSharing
from entropy_core.processes import Processes
from entropy_core.token_ratios import TokenRatioChange
from entropy_core.watched_pass import WatchedPass
from rl_training.config import EntropyProbeConfig
from rl_training.integrations.known_pass import LastPass
from rl_training.integrations.pool_rewards import rewards_of
from rl_training.integrations.sequence_pool import SequencePool
from rl_training.integrations.trainer_pass import TrainerPass
from rl_training.probe.memory_limit import refuse_beyond
from rl_training.probe.observation import Observation, joint_log_weights
from rl_training.probe.sharded_weights import is_spread, refuse_unwatchable
from rl_training.probe.shares import TrainingSequences
from rl_training.probe.spans import CALM, Spans
from rl_training.probe.step_errors import Along
from rl_training.probe.step_parts import why_not_split
from rl_training.probe.step_prediction import Objective
from rl_training.probe.step_prices import HeldOut, metrics_of_prices, price_step
from rl_training.probe.still_weights import StillWeights
from rl_training.probe.watch import EntropyWatch, WatchedChange
from rl_training.probe.watch_state import WatchHistory
from rl_training.sequences import RolloutSequence


class StepWatch:
    """Call `begin` when training begins, `arm` when a step does, `still` before and `took` after each step of the optimizer,
    `before` and `parts` where a span begins, and `after` where one ends.

    Args:
        trainer: a GRPOTrainer. model: its policy without wrappers.
        config: with the sequences that are to be watched in `rollouts`.
        pool: where these are a pool's.
    """

    def __init__(
        self,
        trainer: Any,
        model: nn.Module,
        config: EntropyProbeConfig,
        sharing: Processes,
        pool: SequencePool | None = None,
    ) -> None:
        self._config, self._model, self._sharing, self._pool = config, model, sharing, pool
        self._trainer, self._sequences = trainer, list[RolloutSequence]()
        self._said: set[str] = set()
        self._watch = EntropyWatch(config, model, sharing)
        self._trainer_pass, self._last_pass = TrainerPass(trainer, model, sharing), LastPass()
        # The step's own sequences, and the last one's, are of one step.
        self.spans = Spans((config.measure_every or 1) if config.rollouts in ("pool", "fresh") else 1)
        self._history, self._still = WatchHistory(), StillWeights(model)

    def begin(self, callbacks: dict[str, Any], last_step: int) -> None:
        """A run begins after `last_step`. callbacks: `TrainerState.stateful_callbacks`, of the checkpoint where it is resumed."""
        self.drop()
        self._still.forget()
        self._last_pass.forget()
        if self._pool is not None:
            self._pool.clear()
        trouble = self._history.begin(callbacks, last_step, self._watch)
        if trouble is not None:
            self._say(f"{trouble}: the critic and the running sum of `measured` begin anew")
        elif self._history.source is not None:
            try:
                self._load_source(self._history.source)
            except ValueError as error:
                self._say(f"the checkpoint's record of the watched sequences is damaged ({error}): they are drawn anew")

    def _load_source(self, source: Any) -> None:
        if not isinstance(source, Mapping) or not isinstance(source.get("spans"), Mapping):
            raise ValueError("it is no record")
        self.spans.load(source["spans"])
        if self._pool is not None and source.get("pool") is not None:
            self._pool.load(source["pool"])

    def arm(self, wanted: bool) -> None:
        """A step begins, before which is to be looked if `wanted`."""
        self._trainer_pass.clear()
        self._trainer_pass.listening = wanted and self._pool is None

    def took(self) -> bool:
        """The optimizer has stepped: whether the span is as long as it is to be."""
        if not is_spread(self._model):
            self._still.note()
        return self.spans.took()

    def still(self, step: int) -> bool:
        """After `step` steps: whether the policy is as the last one left it; where it is not, what was begun is dropped."""
        if not self._sharing.any(self._still.moved(), input_device(self._model)):
            return True
        lost = f"; of the last {self.spans.taken} steps `measured` is not known" if self.spans.open else ""
        self._say_once(
            "moved",
            f"something other than the optimizer changed the policy between steps {step} and {step + 1} (a callback that clips, "
            "averages or merges weights?): `measured` and its sums are of the optimizer's steps alone, each by itself from here "
            f"on{lost}",
        )
        self._last_pass.forget()
        self._watch.forget_step()
        self.spans.drop()
        self.spans.shorten()
        return False

    def pooled(self, step: int, rng: np.random.Generator) -> list[RolloutSequence] | None:
        """The sequences of the pool for what begins with `step` (counted from 0); None where there is no pool."""
        refuse_unwatchable(self._model)
        return None if self._pool is None else self._pool.turn(step, rng)

    def before(
        self,
        step: int,
        batch: SequenceBatch,
        sequences: list[RolloutSequence],
        drawn_scores: Tensor | None,
        prior_log_weights: Tensor | None,
    ) -> tuple[Observation, Tensor | None]:
        """Look at the policy before the step (counted from 0).

        Args:
            batch, sequences: the same sequences in one order.
            drawn_scores: (N,) log-probabilities when they were drawn; None where today's policy drew them.
            prior_log_weights: (N,) further log-weights, of how prompts were drawn.

        Returns:
            What is watched, and `drawn_scores` (those of the pool, where there is one).
        """
        refuse_unwatchable(self._model)
        self._sequences = sequences

        def ours(some: SequenceBatch) -> WatchedPass:
            return self._watch.look(some, with_hidden=True)

        if self._pool is not None:
            found = self._last_pass.before(step, self._pool.names, batch, ours)
            drawn_scores, trouble = self._pool.scored(found.statistics.scores()), self._last_pass.trouble
        else:
            found = self._trainer_pass.before(batch, sequences, ours)
            trouble = self._trainer_pass.known.trouble
        if trouble is not None:
            self._say(f"{trouble}; the pass before each step is one of the probe's own")
        weights = joint_log_weights(found.statistics, drawn_scores, prior_log_weights)
        seen = self._watch.before_step(batch, weights, found)
        self.spans.begin()
        return seen, drawn_scores

    @property
    def layout(self) -> PrefixSharing:
        """How rows are laid out, found out so far."""
        return self._watch.prefixes

    @property
    def objective(self) -> Objective:
        """What the measurement of the span that has begun is the finite form of."""
        return self._watch.objective

    @property
    def derivative(self) -> Along | None:
        """Its derivative along a direction, with an error over prompts, where predictions are to have that error."""
        return self._watch.derivative if self._config.errors_over_prompts else None

    def parts(self, optimizer: torch.optim.Optimizer) -> None:
        """Trial moves of the coming step's parts, where this optimizer has them."""
        why = self._watch.why_no_parts(optimizer)
        if why is not None:
            self._say(f"{why}: `measured` has no parts (batch, momentum, decay)")
            return
        refuse_beyond(self._config.memory_limit, self._watch.parts_bytes(), "parts_every", "set parts_every=0")
        self._watch.try_parts(optimizer)

    def prices(
        self, optimizer: torch.optim.Optimizer, training: TrainingSequences, tolerance: float
    ) -> dict[str, float]:
        """Metrics of the price list of the coming step (rl_training.probe.step_prices); none where it cannot be made, said once.

        Args:
            training: the step's sequences with their weights. tolerance: as in `price_step`.
        """
        seen = self._watch.seen
        why = why_not_split(trainable_parameters(self._model), optimizer)
        if why is None and self._pool is None:
            why = "the sequences watched are the step's own"
        if why is not None or seen is None or self._pool is None:
            self._say(f"{why or 'nothing was watched'}: there is no price list")
            return {}
        rewards = rewards_of(self._trainer, self._sequences, self._pool.prompt_rows)
        weights = torch.ones(len(seen.batch), dtype=torch.float64)
        weights = weights if seen.log_weights is None else normalized_weights(seen.log_weights).cpu()

        def along(direction: Mapping[str, Tensor]) -> tuple[TokenRatioChange, Tensor]:
            change, scores = self._watch.derivatives(direction)
            return change, scores.cpu()

        held_out = HeldOut(along, rewards, weights, seen.batch.prompt_index.cpu())
        statistics = self._watch.look(training.batch).statistics
        limit = self._trainer.args.max_grad_norm
        try:
            found = price_step(self._model, optimizer, training, statistics, held_out, limit, self._sharing, tolerance)
        except ValueError as error:
            self._say(f"{error}: there is no price list of such a step")
            return {}
        return metrics_of_prices(found)

    def after(self, step: int) -> WatchedChange | None:
        """Look at the policy after the step (counted from 1), which ends the span, and note it for the trainer's state."""
        seen, steps = self._watch.seen, self.spans.taken
        found = self._watch.after_step(with_hidden=self._pool is not None, steps=steps)
        if found is None or seen is None:
            self.spans.drop()
            return None
        counting = found.effective_size / len(seen.batch)
        self.spans.end(counting)
        if self._pool is not None and self._watch.after is not None:
            self._last_pass.note(step - 1, self._pool.names, seen.batch, self._watch.after)
            self._pool.scored(self._watch.after.statistics.scores())
            if counting < CALM and steps == 1:
                self._say(
                    "the policy moves so fast that a third of the held-out sequences no longer counts after a single step: "
                    "`measured` may be nearer to 0 than the truth, and they are drawn anew early"
                )
        pool = None if self._pool is None else self._pool.state()
        self._history.add(step, found, self._watch, {"spans": self.spans.state(), "pool": pool})
        return found

    def forget_passes(self) -> None:
        """Of the trainer's and of the last step's, so that the next is one of our own."""
        self._last_pass = LastPass()
        self._trainer_pass.forget()

    def drop(self) -> None:
        """Forget the span, and listen no more until the next `arm`."""
        self._watch.forget_step()
        self.spans.drop()
        self.arm(False)

    def _say(self, text: str) -> None:
        self._say_once(text, text)

    def _say_once(self, subject: str, text: str) -> None:
        if subject not in self._said:
            self._said.add(subject)
            warnings.warn(f"the entropy probe: {text}", RuntimeWarning, stacklevel=4)

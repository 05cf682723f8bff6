"""The change of entropy over one step or several, by forward passes alone: before, after, and on request at trial moves between.

    change = quiet + bias         quiet: token ratios with advantages of decay lambda            (entropy_core.token_ratios)
                                  bias: on request the running mean of (decay 1) - (decay lambda)
                                                                                             (entropy_core.bias_correction)
    parts   change to theta + batch, from there to theta + batch + momentum, and from there to the weights after the step: they
            add up to `quiet`

Advantages rest on a critic that is fitted to the entropies of other prompts as training goes on (entropy_core.critic). Needs no
gradient of its own, nothing of the optimizer (but for parts: AdamW), of the adapter or the architecture; memory is that of a
forward pass, and during a trial move that of the update and a copy of the trained weights.

    watch = EntropyWatch(config, model)
    watch.before_step(batch)          # sequences drawn from the policy as it is now
    watch.try_parts(optimizer)        # optional; gradients are final
    optimizer.step()
    seen = watch.after_step()         # or, after several steps of the optimizer: after_step(steps=4)

Source: docs/theory/entropy-critic.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.bias_correction import BiasCorrection, PairedEstimates
from entropy_core.critic import EntropyCritic, centred, explained_variance, prompt_folds, token_features
from entropy_core.directional import token_derivatives
from entropy_core.entropy import TokenCoefficients, effective_sample_size, normalized_weights
from entropy_core.gradients import trainable_parameters
from entropy_core.passes.prefix_sharing import PrefixSharing
from entropy_core.passes.state import PassState
from entropy_core.processes import Processes
from entropy_core.running_sum import RunningSum
from entropy_core.scores import TokenStatistics
from entropy_core.token_ratios import (
    TokenRatioChange,
    change_coefficients,
    token_ratio_change,
    token_ratio_derivative,
)
from entropy_core.uncertainty import Estimate, jackknife_standard_error
from entropy_core.watched_pass import WatchedPass, watched_pass
from rl_training.config import EntropyProbeConfig
from rl_training.probe.foretold_step import ForetoldStep
from rl_training.probe.local_level import LocalLevel
from rl_training.probe.observation import Observation
from rl_training.probe.sharded_weights import give_back, is_spread
from rl_training.probe.step_errors import by_fold, prompt_names
from rl_training.probe.step_parts import upcoming_step, why_not_split
from rl_training.probe.surprisal import DrawnSequences
from rl_training.probe.trial_moves import TrialMoves

PARTS = ("batch", "momentum", "decay")


@dataclass(frozen=True)
class WatchedChange:
    """What steps of the optimizer did to h, nats per token.

    Attributes:
        change: of all `steps` together, corrected; its error holds that of the correction.
        steps: how many it is over.
        cumulative: sum of the corrected changes of all that was watched so far.
        entropy: h before the first of them.
        quiet: with decay lambda, not corrected; its `fixed_prefix` is the change on given tokens.
        pair: the same with the reference, for a record of steps.
        bias: what was added to `quiet`.
        explained: R^2 of the critic on these sequences, which it has not seen.
        effective_size: how many of the sequences would count, drawn before the steps and weighted to the policy after them.
        deviations: the same parts of the prompts each time (rl_training.probe.step_errors.by_fold): of a sum over steps they
            add up part by part, and their norm is its error, sequences that are in several steps counted as what they are.
        filtered: of one step, with what earlier ones say of it (rl_training.probe.local_level).
        parts: batch, momentum, decay of `quiet`; empty where no trial moves were made.
    """

    change: Estimate
    steps: int
    cumulative: Estimate
    entropy: float
    quiet: TokenRatioChange
    pair: PairedEstimates
    bias: float
    explained: float
    effective_size: float
    deviations: list[float]
    filtered: Estimate
    parts: dict[str, Estimate] = field(default_factory=dict)

    @property
    def each(self) -> Estimate:
        """The mean of the steps' changes."""
        return self.change.scaled(1 / self.steps)


class EntropyWatch:
    """See the module's docstring for its use.

    Args:
        config: its `advantage_decay`, `critic_keep` and `bias_keep`.
        model: the policy. It is only ever moved inside `try_parts`, and put back bit for bit.
        sharing: for several processes that are given the same batches.
        lockstep: whether all processes must call the model equally often; so they do where its weights are spread over them.
    """

    def __init__(
        self,
        config: EntropyProbeConfig,
        model: nn.Module,
        sharing: Processes | None = None,
        lockstep: bool = False,
    ) -> None:
        self._config, self._model, self.lockstep = config, model, lockstep
        self._sharing = sharing or Processes()
        self.prefixes = PrefixSharing(model, self._sharing)
        self._critic = EntropyCritic(keep=config.critic_keep)
        self._correction = None if config.bias_keep is None else BiasCorrection(config.bias_keep)
        self._sum, self._level, self._drawn = RunningSum(), LocalLevel(), DrawnSequences()
        self._steps_since, self._said_other = 1, False
        self.forget_step()

    def forget_step(self) -> None:
        """Drop what was seen of a step that is not going to be taken; what was learned stays."""
        self._seen: Observation | None = None
        self.after: WatchedPass | None = None
        """The pass after the last step, where it was asked for; until the next step's is forgotten."""
        self._values: Tensor | None = None
        self._explained = math.nan
        self._trials: list[TokenStatistics] = []
        self._foretold: ForetoldStep | None = None

    # ------------------------------------------------------------------ passes
    def look(self, batch: SequenceBatch, with_hidden: bool = False, with_variances: bool = False) -> WatchedPass:
        """One pass over `batch` under the model as it is now."""
        wanted = (with_hidden, with_variances)
        if not is_spread(self._model):
            buckets = self.prefixes.buckets(batch)
            return watched_pass(self._model, batch, buckets, self._sharing, self.lockstep, *wanted)
        try:
            return watched_pass(self._model, batch, length_buckets, self._sharing, True, *wanted)
        finally:
            give_back(self._model)

    def before_step(
        self, batch: SequenceBatch, log_weights: Tensor | None = None, before: WatchedPass | None = None
    ) -> Observation:
        """Look at the policy before a step, and teach the critic.

        Args:
            batch: sequences drawn by the policy as it is now, or weighted to it.
            log_weights: (N,) log-ratio of today's policy to the one that drew them; None where today's drew them.
            before: the pass over `batch` where it was made already, hidden states included.

        Returns:
            What is watched.
        """
        if before is None:
            before = self.look(batch, with_hidden=True, with_variances=self._drawn.wants(log_weights))
            self._drawn.take(before.statistics, batch)
        entropies, mask = before.statistics.entropies, batch.completion_mask
        features, fold = token_features(entropies, mask, before.hidden), prompt_folds(batch, self._critic.folds)
        self._critic.observe(features, entropies, mask, fold, self._steps_since)
        self._steps_since = 0
        self._values = self._critic.values(features, mask, fold)
        self._seen = Observation(batch, before.statistics, log_weights)
        h = self._seen.entropy().value
        self._explained = explained_variance(centred(self._values, h), entropies, mask, h)
        return self._seen

    def why_no_parts(self, optimizer: torch.optim.Optimizer) -> str | None:
        """Why trial moves cannot split this optimizer's step; None where they can."""
        if is_spread(self._model):
            return "weights are spread over processes"
        return why_not_split(trainable_parameters(self._model), optimizer)

    def parts_bytes(self) -> int:
        """What `try_parts` holds at most beside a forward pass: three parts of the update and a copy of the weights."""
        return sum(4 * p.numel() * max(p.element_size(), 4) for p in trainable_parameters(self._model).values())

    def try_parts(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at the policy with the batch's part of the coming step alone, and with momentum as well; gradients must be final.

        Raises:
            UserError: an optimizer whose step has no known parts.
            KeyboardInterrupt: after the weights are back, where Ctrl-C was pressed meanwhile.
        """
        if self._seen is None:
            return
        parameters = trainable_parameters(self._model)
        update = upcoming_step(parameters, optimizer, "actual")
        if update is None:
            return
        found = []
        with TrialMoves(parameters).begin() as trial:
            for part in (update.batch, update.momentum):
                trial.move(part)
                found.append(self.look(self._seen.batch).statistics)
        self._trials, self._foretold = found, ForetoldStep(parameters, update)

    @property
    def seen(self) -> Observation | None:
        """What was seen before the step that is being taken."""
        return self._seen

    def objective(self, statistics: TokenStatistics, batch: SequenceBatch, weights: Tensor | None) -> TokenCoefficients:
        """What `after_step` will measure, to be differentiated: of the batch of `before_step`, once it was called."""
        return change_coefficients(statistics, batch, self._values, self._config.advantage_decay, weights)

    def derivative(self, direction: Mapping[str, Tensor]) -> TokenRatioChange:
        """What `after_step` would measure along a direction, to first order, of the batch of `before_step`.

        Args:
            direction: name -> tensor, over all trained parameters, which must be those of `before_step`.

        Returns:
            The derivative with its error over prompts.

        Raises:
            RuntimeError: where nothing was seen.
        """
        return self.derivatives(direction)[0]

    def derivatives(self, direction: Mapping[str, Tensor]) -> tuple[TokenRatioChange, Tensor]:
        """`derivative`, and the (N,) derivatives of the sequences' log-probabilities. ValueError: in all processes or in none."""
        if self._seen is None:
            raise RuntimeError("derivatives are of the sequences that before_step was given: call it first")
        batch, statistics = self._seen.batch, self._seen.statistics
        mine = self._sharing.my_sequences(batch.prompt_index)
        logprobs, entropies = torch.zeros_like(statistics.logprobs), torch.zeros_like(statistics.entropies)
        trouble: ValueError | RuntimeError | None = None
        if len(mine):
            try:
                # As the gradient: through norms that DoRA holds fixed.
                with PassState(self._model, true_derivatives=True):
                    found = token_derivatives(self._model, batch.select(mine), direction)
                logprobs[mine], entropies[mine] = found.logprobs.to(logprobs), found.entropies.to(entropies)
            except (ValueError, RuntimeError) as error:  # what ends one process alone would leave the others waiting
                trouble = error
        if self._sharing.any(trouble is not None, batch.device):
            raise ValueError(str(trouble or "another process could not take derivatives of its sequences")) from trouble
        along = TokenStatistics(self._sharing.sum(logprobs), self._sharing.sum(entropies))
        decay = self._config.advantage_decay
        change = token_ratio_derivative(statistics, along, batch, self._values, decay, self._seen.log_weights)
        return change, along.scores()

    def after_step(self, with_hidden: bool = False, steps: int = 1) -> WatchedChange | None:
        """Look at the policy after so many steps of the optimizer.

        Args:
            with_hidden: keep the pass in `after`.
            steps: of the optimizer since `before_step`.

        Returns:
            None where nothing was seen before.
        """
        self._steps_since += steps
        seen, values, explained = self._seen, self._values, self._explained
        trials = self._trials if self._as_foretold(steps) else []
        self.forget_step()
        if seen is None:
            return None
        passed = self.look(seen.batch, with_hidden)
        after = passed.statistics
        if with_hidden:
            self.after = passed
        decay = self._config.advantage_decay

        def change(to: TokenStatistics, decay: float) -> TokenRatioChange:
            return token_ratio_change(seen.statistics, to, seen.batch, values, decay, seen.log_weights)

        quiet, reference = change(after, decay), change(after, 1.0)
        pair = PairedEstimates.from_left_out(quiet.change, quiet.left_out, reference.change, reference.left_out)
        h, units = seen.entropy().value, prompt_names(seen.batch)
        total = self._sum.add(quiet.change, quiet.left_out, units)
        corrected = _alone(pair)
        if self._correction is not None:
            corrected, total = self._correction.add(pair), self._correction.total()
        ratios = after.scores() - seen.statistics.scores()
        return WatchedChange(
            change=corrected,
            steps=steps,
            cumulative=total,
            entropy=h,
            quiet=quiet,
            pair=pair,
            bias=corrected.value - quiet.change,
            explained=explained,
            effective_size=effective_sample_size(normalized_weights(ratios)),
            deviations=by_fold(quiet.left_out, units),
            filtered=self._level.add(corrected.scaled(1 / steps), h),
            parts=_parts([*(change(trial, decay) for trial in trials), quiet]) if trials else {},
        )

    def _as_foretold(self, steps: int) -> bool:
        """Whether the trial moves were those of the step taken; said once where they were not."""
        if self._foretold is None or steps != 1:
            return steps == 1
        off = self._foretold.off(trainable_parameters(self._model))
        if off is not None and not self._said_other:
            self._said_other = True
            warnings.warn(
                "the entropy probe: the optimizer took another step than its state and gradients foretold (relative difference "
                f"{off:.2g}): gradients changed after they were read, or a gradient scaler had not divided them yet; `measured` "
                "of such a step has no parts (batch, momentum, decay)",
                RuntimeWarning,
                stacklevel=3,
            )
        return off is None

    # ------------------------------------------------------------------ for a trainer's state
    def state(self) -> dict[str, Any]:
        """What the critic has learned, as small tensors; for `load`."""
        return self._critic.state() | {"steps_since": self._steps_since, "sum": self._sum.state()}

    def load(self, state: dict[str, Any], past: Iterable[tuple[PairedEstimates, float, int]]) -> None:
        """Go on from `state`, with the pairs of all that was watched so far, the entropies before (nats per token), and over how
        many steps each was.

        Raises:
            ValueError: a state that is not one of this class.
        """
        since = state.get("steps_since")
        if not isinstance(since, int) or isinstance(since, bool) or since < 0:
            raise ValueError("the watch's steps since its last look must be a number of steps")
        total = RunningSum()
        total.load(state.get("sum") or {})
        self._critic.load(state)
        self._sum, self._steps_since = total, since
        self._level = LocalLevel()
        keep = self._config.bias_keep
        self._correction = None if keep is None else BiasCorrection(keep)
        for pair, entropy, steps in past:
            found = _alone(pair) if self._correction is None else self._correction.add(pair)
            self._level.add(found.scaled(1 / steps), entropy)


def _alone(pair: PairedEstimates) -> Estimate:
    """The change without correction, from what is recorded of it."""
    return Estimate(pair.quiet, math.sqrt(pair.quiet_variance), pair.freedom)


def _parts(way: list[TokenRatioChange]) -> dict[str, Estimate]:
    """Differences between changes along the way from the weights before to those after, with paired errors."""
    out: dict[str, Estimate] = {}
    value, left_out = 0.0, torch.zeros_like(way[0].left_out)
    for name, there in zip(PARTS, way, strict=True):
        error = jackknife_standard_error(there.left_out - left_out)
        out[name] = Estimate(there.change - value, error, max(1, len(left_out) - 1))
        value, left_out = there.change, there.left_out
    return out

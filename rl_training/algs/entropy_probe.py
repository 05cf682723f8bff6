"""The entropy probe: first-order prediction of what an optimizer step does to entropy, beside what it did.

    predicted   dh = <g, dtheta> = <g, dtheta_batch> + <g, dtheta_momentum> + <g, dtheta_decay>     (entropy_core.adamw)
    measured    h(theta_after) - h(theta_before) on the same tokens, reweighted                     (entropy_core.measurement)

Of an optimizer whose step has no known parts the total alone is predicted, <g, theta_after - theta_before>.

g is a running average of gradients of entropy per token, each taken on a few sequences of the policy (weighted to today's
policy where an earlier one drew them); under `rollouts: current`, <g, dtheta_batch> takes the average before this step's
sequences entered it. Knows no trainer: a model, a batch, an optimizer. It reads parameters, gradients and
moments, and writes nothing that training uses. Standard errors are the spread over folds of prompts.

    probe = SimpleEntropyProbe(EntropyProbeConfig(mode="simple"), model)
    probe.observe(batch)                 # sequences drawn from the policy as it is now
    loss.backward(); clip_grad_norm_()
    probe.before_step(optimizer); optimizer.step(); change = probe.after_step()

Source: docs/theory/adamw-step.md, docs/theory/entropy-gradient.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from entropy_core.adamw import AdamWUpdate
from entropy_core.batch import SequenceBatch
from entropy_core.directional import weights_moved
from entropy_core.entropy import normalized_weights
from entropy_core.fold_gradients import FoldGradients
from entropy_core.gradients import trainable_parameters
from entropy_core.measurement import fixed_prefix_entropy_change, snis_entropy_change
from entropy_core.processes import Processes
from entropy_core.scores import TokenStatistics
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.probe.change import EntropyChange, StepParts
from rl_training.probe.derivative_check import DerivativeCheck
from rl_training.probe.memory_limit import refuse_beyond
from rl_training.probe.observation import Observation, joint_log_weights
from rl_training.probe.observed_passes import ObservedPasses
from rl_training.probe.probe_state import ProbeState
from rl_training.probe.running_gradient import RunningGradient, keep_those_of, known
from rl_training.probe.score_term import FusedScore
from rl_training.probe.shares import SAME_GRADIENT, VECTORS, TrainingSequences, attribute_sequences, clip_coefficient
from rl_training.probe.step_errors import Along
from rl_training.probe.step_parts import (
    copies,
    counterfactual,
    effect_metric,
    has_stepped,
    moved_unseen,
    opened,
    step_per_gradient,
    turn_into_difference,
    unexplained,
    upcoming_step,
    why_not_split,
)
from rl_training.probe.step_prediction import (
    NO_CHANGE,
    PER_COMPLETION,
    PER_TOKEN,
    SCORE_FUNCTION,
    SCORE_TERM,
    Objective,
    StepPrediction,
    add_errors,
    coefficients_of,
    folds_of,
    objectives_of,
    of_completions,
    predicted_parts,
    token_predictors,
    without_critic,
)
from rl_training.probe.step_prices import PRICE_VECTORS
from rl_training.probe.surprisal import DrawnSequences


class SimpleEntropyProbe:
    """See the module's docstring for its use; EntropyProbeConfig for its settings.

    sharing: for several processes that each hold the model and are given the same batches. gradient_tolerance: relative error
    of the loss gradient, rebuilt from the sequences' weights, that the run's precision explains. check_sampler: whether to hold
    sequences that today's policy is said to have drawn against that (rl_training.probe.surprisal). Memory, from `observe` to the
    end of `after_step`: `memory_bytes()`; between steps the running average alone.
    """

    def __init__(
        self,
        config: EntropyProbeConfig | None,
        model: nn.Module,
        sharing: Processes | None = None,
        gradient_tolerance: float = SAME_GRADIENT,
        check_sampler: bool = True,
    ) -> None:
        self._config = config or EntropyProbeConfig(mode="simple")
        self._model, self._gradient_tolerance = model, gradient_tolerance
        self._sharing = sharing or Processes()
        self._said, self._drawn = set[str](), DrawnSequences(off=not check_sampler)
        self._check = DerivativeCheck(model, self._sharing, self._say_once)
        self.folds = folds_of(self._config, sum(p.numel() for p in trainable_parameters(model).values()))
        self._take = ObservedPasses(model, self._sharing, self.folds, self._say_once)
        self.prefixes = self._take.prefixes
        if self._config.takes_gradients:
            refuse_beyond(self._config.memory_limit, self.memory_bytes(), *self._config.gradients_and_remedy)
        self.reset()

    def reset(self) -> None:
        """Forget everything observed, averages included, and free it."""
        self._observation: Observation | None = None
        self._newest: dict[str, FoldGradients] = {}
        self._averages: dict[str, RunningGradient] = {}
        self._steps_since = 0
        self._prediction: StepPrediction | None = None
        self._critic: Objective = without_critic
        self._no_parts: str | None = None

    def state(self) -> ProbeState:
        """Between two steps, what later predictions rest on; no averages where each takes a gradient of its own."""
        return ProbeState(self._averages if self._config.keeps_gradients else {}, self._steps_since, self._no_parts)

    def load(self, state: ProbeState) -> None:
        """Go on from `state`."""
        self.reset()
        self._averages, self._steps_since, self._no_parts = state.averages, state.steps_since, state.no_parts

    def memory_bytes(self) -> int:
        """The most held beside activations: gradients in folds (newest, average), the step's parts, what shares need but rows."""
        size = sum(p.numel() * max(p.element_size(), 4) for p in trainable_parameters(self._model).values())
        averages = 2 if self._config.averaging else 1
        shares = max(VECTORS if self._config.wants_shares else 0, PRICE_VECTORS if self._config.prices_every else 0)
        return size * (averages * max(1, self.folds) * len(objectives_of(self._config)) + 5 + shares)

    # ------------------------------------------------------------------ one call
    def compute_delta_h_fast(
        self,
        rollouts: SequenceBatch,
        advantages: Tensor | None,
        param_update: AdamWUpdate | Mapping[str, Tensor],
        drawn_scores: Tensor | None = None,
    ) -> EntropyChange:
        """First-order change of entropy along an update of today's model; nothing is measured, averaged or kept.

        rollouts: sequences of today's policy, or of another one of which drawn_scores (N,) are the log-probabilities S.
        param_update: dtheta, in AdamW's parts (entropy_core.adamw.split_adamw_update) or as one name -> tensor. P is not
        applied to it: an AdamW update holds it already. advantages: (N,) where the rollouts are the update's own sequences,
        else None; the predictors of the literature are then added, at learning rate 1.
        """
        wanted = {PER_TOKEN: (self._config.estimator, True), PER_COMPLETION: (of_completions(self._config), False)}
        seen, gradients = self._take.gradients(rollouts, drawn_scores, None, wanted)
        whole = not isinstance(param_update, AdamWUpdate)

        def along(key: str) -> StepParts:
            found = gradients[key]
            return StepParts.only_total(found.predict(param_update)) if whole else predicted_parts(found, param_update)

        change = self._change(seen, along(PER_TOKEN), along(PER_COMPLETION))
        if advantages is None:
            return change
        return replace(change, predictors=token_predictors(seen.statistics, rollouts, advantages, 1.0))

    # ------------------------------------------------------------------ around a step
    def statistics(self, batch: SequenceBatch, with_variances: bool = False) -> TokenStatistics:
        """Token statistics under the model as it is now, e.g. to remember `scores()` of sequences it has just drawn."""
        return self._take.statistics(batch, with_variances)

    def observe(
        self,
        batch: SequenceBatch,
        drawn_scores: Tensor | None = None,
        prior_log_weights: Tensor | None = None,
        with_variances: bool = False,
        gradient: bool = True,
        critic: Objective = without_critic,
    ) -> Observation:
        """Take the gradient of entropy on `batch` under the model as it is now, and watch its tokens across the next step.

        drawn_scores: (N,) log-probabilities under the policy that drew them; None where that is today's. prior_log_weights: (N,)
        further ones, e.g. minus the log of the probability with which a prompt was drawn. with_variances: the statistics hold
        `surprisal_variances`. gradient: false watches the tokens alone. critic: what `estimator: critic` differentiates.
        """
        with_variances, self._critic = with_variances or self._drawn.wants(drawn_scores), critic
        if gradient and not self._config.averaging:
            self._averages = {}
        if gradient:
            self._observation, self._newest = self._take.gradients(
                batch, drawn_scores, prior_log_weights, objectives_of(self._config), with_variances, critic
            )
        else:
            seen = self.statistics(batch, with_variances)
            self._observation = Observation(batch, seen, joint_log_weights(seen, drawn_scores, prior_log_weights))
        if self._drawn.wants(drawn_scores):
            self._drawn.take(self._observation.statistics, batch)
        return self._observation

    def before_step(
        self,
        optimizer: torch.optim.Optimizer,
        training: TrainingSequences | None = None,
        score: FusedScore | None = None,
        along: Along | None = None,
    ) -> None:
        """Predict the step that `optimizer` is about to take; its gradients must be final (clipped, not yet stepped).

        training: the sequences of the step, for `mode: attribution` and `predictors`. score: under `fused`, the step's score
        term (rl_training.probe.score_term); the observed sequences then give the fixed-prefix term alone. along: derivatives of
        what was observed, whose errors are used in place of those of folds (rl_training.probe.step_errors).

        Raises UserError where no trained parameter has a gradient here (the optimizer steps elsewhere), or where `fused` or
        `preconditioning` ask for what this optimizer's step does not have; ValueError for a loss that cannot be attributed.
        """
        parameters, how = trainable_parameters(self._model), self._config.preconditioning
        keep_those_of(parameters, self._averages, self._newest)
        why = self.examine(optimizer)
        if not (self._newest or self._averages):
            return
        if all(p.grad is None for p in parameters.values()):
            raise UserError(
                "no trained parameter has a gradient before the optimizer steps: an optimizer that steps during the backward "
                "pass (layer-wise, LOMO), or a sharded one, cannot be watched; choose one that steps after it"
            )
        rivals: dict[str, float] = {}
        if self._config.predictors and training is not None:
            rate, statistics = float(opened(optimizer).param_groups[0]["lr"]), self.statistics(training.batch)
            rivals = token_predictors(statistics, training.batch, training.advantages, rate)
        if why is not None:
            if score is not None:
                raise UserError(f"fused=true needs the parts of an AdamW step ({why}): set fused=false")
            self._prediction = StepPrediction(copies(parameters), rivals, along=along)
            return
        update = upcoming_step(parameters, optimizer, how)
        if update is None:
            self._take_in_newest()
            return
        total = update.total()
        same_tokens = math.nan
        if self._newest and score is None:
            same_tokens = float(self._newest[PER_TOKEN].along(total).sum())
            if along is None:  # else its own derivatives are held against it
                self._hold_derivative(same_tokens, total)
        # Along the batch's own part earlier gradients speak, where there are any: its sequences would meet themselves (t = t').
        lagged = self._config.rollouts in ("current", None) and bool(self._averages)
        of_batch: dict[str, Tensor] = {}
        shares = effects = None
        if not lagged:
            self._take_in_newest()
        for key, average in self._averages.items():
            of_batch[key] = known(average).along(update.batch)
        if score is not None:
            self._newest[SCORE_TERM] = score.gradient
            # At the optimizer's first step P is one over this very gradient, and products across folds have no bounds: there
            # the term meets itself, as everything does that has no earlier step to rest on.
            if SCORE_TERM not in of_batch and has_stepped(parameters, optimizer):
                scale = step_per_gradient(parameters, optimizer, how)
                clip = clip_coefficient(parameters, score.update.total(), self._gradient_tolerance)
                of_batch[SCORE_TERM] = score.across_folds(scale, clip)
        if training is not None and self._config.wants_shares:
            shares, effects = self._attributed(parameters, optimizer, training)
        self._take_in_newest()
        parts = {
            key: predicted_parts(known(average), update, of_batch.get(key)) for key, average in self._averages.items()
        }
        if score is not None:
            parts[PER_TOKEN] = parts[PER_TOKEN] + parts.pop(SCORE_TERM)
        left_out = add_errors(parts, update, total, along, self._observation, self._say_once)
        self._prediction = StepPrediction(
            copies(parameters), rivals, parts, total, same_tokens, shares, effects, along, left_out
        )

    def examine(self, optimizer: torch.optim.Optimizer) -> str | None:
        """Why the steps of this optimizer have no known parts, said once; None where they have.

        Raises UserError where `preconditioning` asks for a step that it does not take.
        """
        parameters, how = trainable_parameters(self._model), self._config.preconditioning
        for word in (counterfactual(parameters, optimizer, how), moved_unseen(self._model, optimizer)):
            if word is not None:
                self._say_once(word)
        if how != "actual":
            return None
        why = why_not_split(parameters, optimizer) or self._no_parts
        if why is not None:
            self._say_no_parts(why)
        return why

    def _say_no_parts(self, why: str) -> None:
        self._say_once(
            f"{why}: `predicted` is the total along the step that is taken, without parts (batch, momentum, decay)"
            + ("; there are no shares of training sequences" if self._config.wants_shares else "")
        )

    def _attributed(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, training: TrainingSequences
    ) -> tuple[Tensor, Tensor | None]:
        gradient, how = known(self._averages[PER_TOKEN]).total(), self._config.preconditioning
        scales = [make(parameters, optimizer, how) for make in (step_per_gradient, effect_metric)]
        limits = (self._sharing, self._take.rows, self._gradient_tolerance)
        found = attribute_sequences(self._model, training, gradient, scales[0] or {}, *limits, metric=scales[1])
        slow = self._take.rows.failure and (
            f"{self._take.rows.failure}; shares take a backward pass for each of {len(training.batch)} sequences "
            "a step: use mode=simple if that is too long"
        )
        for word in filter(None, (slow, found.no_effects)):
            self._say_once(word)
        return found.shares, found.effects

    def _take_in_newest(self) -> None:
        for key, gradient in self._newest.items():
            self._averages.setdefault(key, RunningGradient(self._config.averaging)).add(gradient, self._steps_since)
        self._steps_since = 0 if self._newest else self._steps_since
        self._newest = {}

    def after_step(self, measure: bool = True, steps: int | None = None) -> EntropyChange | None:
        """Predicted and, where tokens were observed (and if `measure`), measured change of the step just taken; None if nothing
        was predicted. steps: of the optimizer since the last call, where not `log_every`.
        """
        seen, made = self._observation, self._prediction
        self._observation = self._prediction = None
        self._steps_since += steps or self._config.log_every
        if made is None:
            return None
        made = self._of_step_taken(made, seen)
        parts, predictors = made.parts, dict(made.predictors)
        if self._config.predictors:
            predictors["score_function"] = parts[SCORE_FUNCTION].total.value
            predictors["without_momentum"] = parts[PER_TOKEN].batch.value
        change = replace(
            self._change(seen, parts[PER_TOKEN], parts.get(PER_COMPLETION)),
            same_tokens=made.same_tokens,
            predictors=predictors,
            shares=made.shares,
            effects=made.effects,
            left_out=made.left_out,
        )
        if seen is None or not measure:
            return change
        both = (seen.statistics, self.statistics(seen.batch), seen.batch, True, seen.log_weights)
        snis, fixed = snis_entropy_change(*both), fixed_prefix_entropy_change(*both)
        return replace(change, measured=snis, measured_fixed_prefix=fixed)

    def _of_step_taken(self, made: StepPrediction, seen: Observation | None) -> StepPrediction:
        """What was predicted, held against the step taken: where that is another one, its total alone, without shares."""
        after, off = trainable_parameters(self._model), None
        if made.parts and self._config.preconditioning == "actual":
            off = unexplained(made.before, after, made.step)
        if made.parts and off is None:
            return made
        made = replace(made, shares=None, effects=None, left_out=None)
        taken, lagged = made.before, self._config.rollouts in ("current", None) and bool(self._averages)
        moved = turn_into_difference(taken, after)
        if off is not None and not moved:  # a scaler that met an overflow, say: there was no step
            return replace(made, parts=dict.fromkeys(made.parts, NO_CHANGE), same_tokens=0.0)
        if off is not None:
            self._no_parts = (
                f"the optimizer did not take the AdamW step that its state and gradients give (relative difference {off:.2g}): "
                "another optimizer inside, weights in less than float32, or gradients that changed after they were read"
            )
            self._say_no_parts(self._no_parts)
        same_tokens = math.nan  # the newest gradient is in the average already, where the step was split
        if self._newest:
            same_tokens = float(self._newest[PER_TOKEN].along(taken).sum())
            if made.along is None:
                with weights_moved(self._model, taken, -1.0):
                    self._hold_derivative(same_tokens, taken, seen)
        # As along a batch's own part: where there is an earlier gradient, this step's sequences do not meet themselves.
        if not lagged:
            self._take_in_newest()
        parts = {key: StepParts.only_total(known(a).predict(taken)) for key, a in self._averages.items()}
        if SCORE_TERM in parts:
            both = (parts[PER_TOKEN].total, parts.pop(SCORE_TERM).total)
            parts[PER_TOKEN] = StepParts.only_total(both[0] + both[1])
        self._take_in_newest()
        left_out = None
        if made.along is not None:
            with weights_moved(self._model, taken, -1.0):  # back to where the derivatives are of
                left_out = add_errors(parts, None, taken, made.along, seen, self._say_once)
        return replace(made, parts=parts, same_tokens=same_tokens, left_out=left_out)

    # ------------------------------------------------------------------ pieces
    def _hold_derivative(self, value: float, step: Mapping[str, Tensor], seen: Observation | None = None) -> None:
        """seen: what the newest gradient was taken on, where it is no longer at hand here."""
        if (seen := seen or self._observation) is not None:
            wanted, weights = objectives_of(self._config)[PER_TOKEN], seen.log_weights
            of = (seen.statistics, seen.batch, None if weights is None else normalized_weights(weights), self._critic)
            self._check.hold(value, seen, lambda: coefficients_of([wanted], *of)[0], step)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(f"the entropy probe: {text}", RuntimeWarning, stacklevel=4)

    def _change(self, seen: Observation | None, of_token: StepParts, of_completion: StepParts | None) -> EntropyChange:
        return EntropyChange.predicted(self._config.estimator, seen, of_token, of_completion)

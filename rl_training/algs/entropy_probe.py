"""The entropy probe: first-order prediction of what an optimizer step does to entropy, beside what it did.

    predicted   dh = <g, dtheta> = <g, dtheta_batch> + <g, dtheta_momentum> + <g, dtheta_decay>     (entropy_core.adamw)
    measured    h(theta_after) - h(theta_before) on the same tokens, reweighted                     (entropy_core.measurement)

g is a running average of gradients of entropy per token, each taken on a few sequences of the policy (weighted to today's
policy where an earlier one drew them); under `rollouts: current`, <g, dtheta_batch> takes the average before this step's
sequences entered it. Knows no trainer: a model, a batch, an optimizer. It reads parameters, gradients and
moments, and writes nothing that training uses. Standard errors are the spread over folds of prompts.

    probe = SimpleEntropyProbe(config, model)
    probe.observe(batch)                 # sequences drawn from the policy as it is now
    loss.backward(); clip_grad_norm_()
    probe.before_step(optimizer); optimizer.step(); change = probe.after_step()

Source: docs/theory/adamw-step.md, docs/theory/entropy-gradient.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from entropy_core.adamw import AdamWUpdate
from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.entropy import (
    Estimator,
    TokenCoefficients,
    effective_sample_size,
    entropy_coefficients,
    normalized_weights,
)
from entropy_core.fold_gradients import Buckets, FoldGradients, fold_estimate, fold_gradients, shared_statistics
from entropy_core.gradients import trainable_parameters
from entropy_core.measurement import fixed_prefix_entropy_change, snis_entropy_change
from entropy_core.predictors import covariance_predictor, steer_predictor
from entropy_core.scores import TokenStatistics
from entropy_core.shared_prefix import shared_prefix_buckets, shares_prefixes
from entropy_core.work_sharing import WorkSharing
from rl_training.algs.entropy_change import ESTIMANDS, EntropyChange, StepParts
from rl_training.algs.fused_score import FusedScore
from rl_training.algs.running_gradient import RunningGradient
from rl_training.algs.step_attribution import TrainingSequences, clip_coefficient, step_shares
from rl_training.algs.step_parts import check_step_taken, has_stepped, step_per_gradient, upcoming_step
from rl_training.config import EntropyProbeConfig

_PER_TOKEN, _PER_COMPLETION, _SCORE_FUNCTION, _SCORE_TERM = "token", "completion", "score function", "score term"

# Beyond so many trained weights fewer folds are kept by default.
_MANY_WEIGHTS = 50_000_000


@dataclass(frozen=True)
class _Observation:
    """Tokens that are watched across one step. log_weights: (N,) today's policy against the law that drew them, or None."""

    batch: SequenceBatch
    statistics: TokenStatistics
    log_weights: Tensor | None


@dataclass(frozen=True)
class _Prediction:
    """What was predicted before the step, and what the step is checked against."""

    parts: dict[str, StepParts]
    same_tokens: float
    predictors: dict[str, float]
    shares: Tensor | None
    before: dict[str, Tensor]
    step: dict[str, Tensor]


class SimpleEntropyProbe:
    """See the module's docstring for its use; EntropyProbeConfig for its settings.

    sharing: for several processes that each hold the model and are given the same batches. Memory, from `observe` to the
    end of `after_step`: `memory_bytes()`; between steps the running average alone.
    """

    def __init__(self, config: EntropyProbeConfig | None, model: nn.Module, sharing: WorkSharing | None = None) -> None:
        self._config = config or EntropyProbeConfig()
        self._model = model
        self._sharing = sharing or WorkSharing()
        self._share_prefixes: bool | None = None
        self._longest_tried = 0
        self.folds = self._config.standard_error_folds
        if self.folds is None:
            trained = sum(p.numel() for p in trainable_parameters(model).values())
            self.folds = 4 if trained <= _MANY_WEIGHTS else 2
        self.reset()

    def reset(self) -> None:
        """Forget everything observed, averages included, and free it."""
        self._observation: _Observation | None = None
        self._newest: dict[str, FoldGradients] = {}
        self._averages: dict[str, RunningGradient] = {}
        self._prediction: _Prediction | None = None

    def memory_bytes(self) -> int:
        """The most that the probe holds beside activations: gradients in folds (newest and average) and the step's parts."""
        size = sum(p.numel() * max(p.element_size(), 4) for p in trainable_parameters(self._model).values())
        return size * (2 * max(1, self.folds) * len(self._objectives()) + 5)

    # ------------------------------------------------------------------ one call
    def compute_delta_h_fast(
        self,
        rollouts: SequenceBatch,
        advantages: Tensor | None,
        param_update: AdamWUpdate | Mapping[str, Tensor],
        drawn_scores: Tensor | None = None,
    ) -> EntropyChange:
        """First-order change of entropy along an update of the model as it is now; nothing is measured, averaged or kept.

        rollouts: sequences of today's policy, or of another one of which drawn_scores (N,) are the log-probabilities S.
        param_update: dtheta, in AdamW's parts (entropy_core.adamw.split_adamw_update) or as one name -> tensor. P is not
        applied to it: an AdamW update holds it already. advantages: (N,) where the rollouts are the update's own sequences,
        else None; the predictors of the literature are then added, at learning rate 1.
        """
        wanted = {_PER_TOKEN: (self._config.estimator, True), _PER_COMPLETION: (self._config.estimator, False)}
        seen, gradients = self._gradients(rollouts, drawn_scores, None, wanted)
        whole = not isinstance(param_update, AdamWUpdate)

        def along(key: str) -> StepParts:
            if whole:
                return StepParts.only_total(gradients[key].predict(param_update))
            return predicted_parts(gradients[key], param_update)

        change = self._change(seen, along(_PER_TOKEN), along(_PER_COMPLETION))
        if advantages is None:
            return change
        return replace(change, predictors=token_predictors(seen.statistics, rollouts, advantages, 1.0))

    # ------------------------------------------------------------------ around a step
    def statistics(self, batch: SequenceBatch) -> TokenStatistics:
        """Token statistics under the model as it is now, e.g. to remember `scores()` of sequences it has just drawn."""
        return shared_statistics(self._model, batch, self._buckets(batch), self._sharing)

    def observe(
        self, batch: SequenceBatch, drawn_scores: Tensor | None = None, prior_log_weights: Tensor | None = None
    ) -> None:
        """Take the gradient of entropy on `batch` under the model as it is now, and watch its tokens across the next step.

        drawn_scores: (N,) log-probabilities under the policy that drew them; None where that is today's.
        prior_log_weights: (N,) further log-weights, e.g. minus the log of the probability with which a prompt was drawn.
        """
        self._observation, self._newest = self._gradients(batch, drawn_scores, prior_log_weights, self._objectives())

    def before_step(
        self,
        optimizer: torch.optim.Optimizer,
        training: TrainingSequences | None = None,
        score: FusedScore | None = None,
    ) -> None:
        """Predict the step that `optimizer` is about to take; its gradients must be final (clipped, not yet stepped).

        training: the sequences of the step, for `mode: attribution` and `predictors`. score: under `fused`, the step's score
        term (rl_training.algs.fused_score); the observed sequences then give the fixed-prefix term alone.

        Raises ValueError for an optimizer that is not AdamW, or a loss that cannot be attributed.
        """
        parameters, how = trainable_parameters(self._model), self._config.preconditioning
        update = upcoming_step(parameters, optimizer, how)
        if update is None or not (self._newest or self._averages):
            self._take_in_newest()
            return
        total = update.total()
        same_tokens = math.nan
        if self._newest and score is None:
            same_tokens = float(self._newest[_PER_TOKEN].along(total).sum())
        # Along the batch's own part of the step only gradients of earlier steps' sequences speak, where there are some:
        # the batch's sequences would meet themselves in it (t = t').
        lagged = self._config.rollouts == "current" and bool(self._averages)
        of_batch: dict[str, Tensor] = {}
        shares = None
        if not lagged:
            self._take_in_newest()
        for key, average in self._averages.items():
            of_batch[key] = _value(average).along(update.batch)
        if score is not None:
            self._newest[_SCORE_TERM] = score.gradient
            # At the optimizer's first step P is one over this very gradient, and products across folds have no bounds: there
            # the term meets itself, as everything does that has no earlier step to rest on.
            if _SCORE_TERM not in of_batch and has_stepped(parameters, optimizer):
                scale = step_per_gradient(parameters, optimizer, how)
                of_batch[_SCORE_TERM] = score.across_folds(scale, clip_coefficient(parameters, score.update.total()))
        if training is not None and self._config.mode == "attribution":
            gradient = _value(self._averages[_PER_TOKEN]).total()
            scale = step_per_gradient(parameters, optimizer, how)
            shares = step_shares(self._model, training, gradient, scale, self._sharing)
        self._take_in_newest()
        parts = {
            key: predicted_parts(_value(average), update, of_batch.get(key)) for key, average in self._averages.items()
        }
        if score is not None:
            parts[_PER_TOKEN] = parts[_PER_TOKEN] + parts.pop(_SCORE_TERM)
        predictors = self._rivals(parts, training, optimizer) if self._config.predictors else {}
        before = {name: p.detach().clone() for name, p in parameters.items()}
        self._prediction = _Prediction(parts, same_tokens, predictors, shares, before, total)

    def _rivals(
        self, parts: dict[str, StepParts], training: TrainingSequences | None, optimizer: torch.optim.Optimizer
    ) -> dict[str, float]:
        out = {
            "score_function": parts[_SCORE_FUNCTION].total.value,
            "without_momentum": parts[_PER_TOKEN].batch.value,
        }
        if training is not None:
            rate = float(optimizer.param_groups[0]["lr"])
            statistics = self.statistics(training.batch)
            out.update(token_predictors(statistics, training.batch, training.advantages, rate))
        return out

    def _take_in_newest(self) -> None:
        for key, gradient in self._newest.items():
            self._averages.setdefault(key, RunningGradient(self._config.averaging)).add(gradient)
        self._newest = {}

    def after_step(self) -> EntropyChange | None:
        """Predicted and, where tokens were observed, measured change of the step just taken; None if nothing was predicted."""
        seen, made = self._observation, self._prediction
        self._observation = self._prediction = None
        if made is None:
            return None
        if self._config.preconditioning == "actual":
            check_step_taken(made.before, trainable_parameters(self._model), made.step)
        change = replace(
            self._change(seen, made.parts[_PER_TOKEN], made.parts.get(_PER_COMPLETION)),
            same_tokens=made.same_tokens,
            predictors=made.predictors,
            shares=made.shares,
        )
        if seen is None:
            return change
        after = self.statistics(seen.batch)
        return replace(
            change,
            measured=snis_entropy_change(seen.statistics, after, seen.batch, True, seen.log_weights),
            measured_fixed_prefix=fixed_prefix_entropy_change(
                seen.statistics, after, seen.batch, True, seen.log_weights
            ),
        )

    # ------------------------------------------------------------------ pieces
    def _objectives(self) -> dict[str, tuple[Estimator, bool]]:
        main: Estimator = "fixed_prefix" if self._config.fused else self._config.estimator
        wanted: dict[str, tuple[Estimator, bool]] = {_PER_TOKEN: (main, True)}
        if self._config.per_completion:
            wanted[_PER_COMPLETION] = (self._config.estimator, False)
        if self._config.predictors:
            wanted[_SCORE_FUNCTION] = ("score_function", True)
        return wanted

    def _gradients(
        self,
        batch: SequenceBatch,
        drawn_scores: Tensor | None,
        prior_log_weights: Tensor | None,
        wanted: Mapping[str, tuple[Estimator, bool]],
    ) -> tuple[_Observation, dict[str, FoldGradients]]:
        log_weights: Tensor | None = None

        def objectives(statistics: TokenStatistics) -> list[TokenCoefficients]:
            nonlocal log_weights
            parts = [] if prior_log_weights is None else [prior_log_weights.double()]
            if drawn_scores is not None:
                parts.append(statistics.scores() - drawn_scores.double())
            log_weights = torch.stack(parts).sum(0) if parts else None
            weights = None if log_weights is None else normalized_weights(log_weights)
            return [entropy_coefficients(statistics, batch, e, per_token, weights) for e, per_token in wanted.values()]

        found, statistics = fold_gradients(
            self._model, batch, objectives, self._buckets(batch), self.folds, self._sharing
        )
        return _Observation(batch, statistics, log_weights), dict(zip(wanted, found, strict=True))

    def _buckets(self, batch: SequenceBatch) -> Buckets:
        longest = int(batch.scored_lengths.max())
        untried = self._share_prefixes is not False and longest > self._longest_tried
        if untried and len(batch.prompt_index.unique()) < len(batch):
            self._longest_tried = longest
            ours = shares_prefixes(self._model, batch)
            self._share_prefixes = not self._sharing.any(not ours, batch.device)
        known = self._share_prefixes and longest <= self._longest_tried
        return shared_prefix_buckets if known else length_buckets

    def _change(
        self,
        seen: _Observation | None,
        per_token: StepParts,
        per_completion: StepParts | None,
    ) -> EntropyChange:
        sequences, ess, entropy = 0, math.nan, math.nan
        if seen is not None:
            sequences = len(seen.batch)
            weights = torch.ones(sequences, dtype=torch.float64)
            if seen.log_weights is not None:
                weights = normalized_weights(seen.log_weights).cpu()
            ess = effective_sample_size(weights)
            sums, lengths = seen.statistics.entropy_sums().cpu(), seen.batch.completion_lengths.cpu()
            entropy = float((weights * sums).sum() / (weights * lengths).sum())
        name = self._config.estimator
        return EntropyChange(per_token, per_completion, name, ESTIMANDS[name], sequences, ess, entropy)


def _value(average: RunningGradient) -> FoldGradients:
    assert average.value is not None  # an average exists once a gradient has entered it
    return average.value


def token_predictors(
    statistics: TokenStatistics, batch: SequenceBatch, advantages: Tensor, learning_rate: float
) -> dict[str, float]:
    """Rivals that need token statistics of the training sequences alone (entropy_core.predictors)."""
    mask = batch.completion_mask
    return {
        "covariance": covariance_predictor(statistics.logprobs, mask, advantages, learning_rate),
        "steer": steer_predictor(statistics.logprobs, statistics.entropies, mask, advantages, learning_rate),
    }


def predicted_parts(gradient: FoldGradients, update: AdamWUpdate, of_batch: Tensor | None = None) -> StepParts:
    """Each part of the step along the gradient, with its error; of_batch: (F,) that of the batch part from elsewhere."""
    batch = gradient.along(update.batch) if of_batch is None else of_batch
    momentum, decay = gradient.along(update.momentum), gradient.along(update.weight_decay)
    shares = gradient.shares
    of_sum = shares if len(batch) == len(momentum) else None
    estimates = [fold_estimate(batch, of_sum), fold_estimate(momentum, shares), fold_estimate(decay, shares)]
    if len(batch) == len(momentum):
        return StepParts(fold_estimate(batch + momentum + decay, shares), *estimates)
    return StepParts(estimates[0] + fold_estimate(momentum + decay, shares), *estimates)

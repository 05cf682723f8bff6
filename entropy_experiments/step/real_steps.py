"""What a training batch with other weights does to entropy: measured by real AdamW steps, and the shares that predict it.

    g(a) = -sum_i a_i w_i dS_i  ->  dtheta(a) by torch's own optimizer  ->  measured  h(theta + dtheta(a)) - h(theta)

a_i = 0 leaves sequence i out; N and lengths in w_i stay what they were. Momentum and decay act in full; clip coefficient
and second moments are those of g(a). Held against this are, for F(a) = <grad h, dtheta(a)>,

    shares      sum_i a_i dh_i + <grad h, momentum + decay>           P_t and c frozen at the whole batch's, a = 1
    response    const + sum_i a_i r_i,  r_i = mean of dF/da_i         P_t and c move along; linear over random halves

With grad h by the split estimator on the evaluation tokens, F is the exact first order of the measurement: prediction and
measurement then share estimand and tokens. Symbols: w loss weights, c clip coefficient, P_t the step's preconditioner.
Source: docs/analyses/intervention.md, docs/theory/adamw-step.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from entropy_core.adamw import Moments, after_gradient, preconditioner, second_moments
from entropy_core.batch import SequenceBatch
from entropy_core.cut_weights import total_of
from entropy_core.directional import sequence_derivatives, weights_moved
from entropy_core.formed import dot, elementwise
from entropy_core.gradients import trainable_parameters
from entropy_core.measurement import EntropyMeasurement, snis_entropy_change
from entropy_core.passes.settings import DEFAULT_PASSES, PassSettings
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_experiments.step.gradient_rows import TrainingRows
from entropy_experiments.step.optimizer_step import (
    NextStep,
    clip_coefficient,
    plain_step,
    take_next_step,
)
from rl_training.errors import UserError


@dataclass(frozen=True)
class ResponseShares:
    """shares: (n_train,) float64 r_i, nats per token; rest: the constant term. They predict a half-subset's change."""

    shares: Tensor
    rest: float


class StepMeasurement:
    """Real steps with other weights, from one checkpoint; model and optimizer are bit by bit as before after each.

    rows: of the training sequences, over all trainable parameters. optimizer: None for plain
    gradient steps of `learning_rate`; otherwise learning_rate, where given, is taken in place of every group's own.
    eval_statistics: of eval_batch under the model as it stands. log_weights: as in `snis_entropy_change`; measure: that
    function, or `fixed_prefix_entropy_change` where evaluation sequences were not drawn from the policy.
    lowest_effective_sample_size: the smallest of all measurements so far, None before the first.

    Raises UserError without an optimizer and a learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Moments | None,
        rows: TrainingRows,
        eval_batch: SequenceBatch,
        eval_statistics: TokenStatistics,
        *,
        max_grad_norm: float | None = 1.0,
        learning_rate: float | None = None,
        log_weights: Tensor | None = None,
        measure: Callable[..., EntropyMeasurement] = snis_entropy_change,
        passes: PassSettings = DEFAULT_PASSES,
    ) -> None:
        if optimizer is None and not learning_rate:
            raise UserError("without optimizer state the step's size is unknown: give a learning rate")
        self._model, self._optimizer, self._rows = model, optimizer, rows
        self._eval_batch, self._before = eval_batch, eval_statistics
        self._max_grad_norm, self._learning_rate = max_grad_norm, learning_rate
        self._log_weights, self._measure, self._passes = log_weights, measure, passes
        self.sequences = rows.sequences
        self.lowest_effective_sample_size: float | None = None

    def gradient(self, weights: Tensor) -> dict[str, Tensor]:
        """-sum_i w_i dS_i for (n_train,) weights, name -> tensor. Raises ValueError for another number of weights."""
        if weights.shape != (self.sequences,):
            raise ValueError(f"the weights are {tuple(weights.shape)}, but there are {self.sequences} rows")
        return self._rows.weighted_gradient(weights)

    def clip(self, weights: Tensor) -> float:
        """The clip coefficient c of a step with these weights; no step is taken."""
        return clip_coefficient(self.gradient(weights), self._max_grad_norm)[0]

    def step(self, weights: Tensor) -> Mapping[str, Tensor]:
        """theta_after - theta_before of the step that these weights cause, formed when it is read."""
        gradient = self.gradient(weights)
        if self._optimizer is not None:
            return take_next_step(
                self._model, self._optimizer, gradient, self._max_grad_norm, self._learning_rate
            ).parameter_delta
        return plain_step(gradient, self._max_grad_norm, self._learning_rate).parameter_delta

    def measure(self, weights: Tensor) -> EntropyMeasurement:
        """Entropy on the evaluation tokens before and after the step that these (n_train,) weights cause, nats per token."""
        with weights_moved(self._model, self.step(weights), 1.0):
            after = token_statistics(self._model, self._eval_batch, self._passes)
        found = self._measure(self._before, after, self._eval_batch, log_weights=self._log_weights)
        lowest = self.lowest_effective_sample_size
        self.lowest_effective_sample_size = min(found.effective_sample_size, lowest or found.effective_sample_size)
        return found

    def change(self, weights: Tensor) -> float:
        """The measured change alone, nats per token."""
        return self.measure(weights).change

    def first_order(self, gradient_of_h: Mapping[str, Tensor], weights: Tensor) -> float:
        """<grad h, dtheta> of the step that these weights cause, with its own clip coefficient and second moments."""
        return dot(gradient_of_h, self.step(weights))

    def response_shares(self, gradient_of_h: Mapping[str, Tensor], weights: Tensor, subsets: Tensor) -> ResponseShares:
        """r_i = mean of dF/da_i over (draws, n_train) 0/1 `subsets`: the best linear prediction of F over such subsets.

        F is not linear in a, since second moments and clipping follow the gradient; over random subsets its mean slope is
        what a linear regression on a would find (Stein's lemma, for a Gaussian gradient), here without measuring anything.
        subsets: some 16 random halves (analyses.intervention.half_subsets), other ones than those to be predicted.

        Raises UserError without an optimizer: a plain step has no moments, and its shares are linear but for clipping.
        """
        moments = self._optimizer
        if moments is None:
            raise UserError("response shares follow AdamW's second moments: there are none without an optimizer")
        parameters = trainable_parameters(self._model)
        direction = {name: torch.zeros_like(p) for name, p in parameters.items()}
        members = subsets.double().cpu()

        def follow(row: Tensor) -> float:
            gradient = self.gradient(row * weights.double().cpu())
            step = take_next_step(self._model, moments, gradient, self._max_grad_norm, self._learning_rate)
            return _add_derivative(direction, 1 / len(members), gradient_of_h, step, self._max_grad_norm)

        # a function, so that one step's gradient is gone before the next is formed
        predicted = [follow(row) for row in members]
        shares = -weights.double().cpu() * self._rows.products(direction)
        return ResponseShares(shares, float((torch.tensor(predicted, dtype=torch.float64) - members @ shares).mean()))


def _add_derivative(
    direction: Mapping[str, Tensor],
    factor: float,
    gradient_of_h: Mapping[str, Tensor],
    step: NextStep,
    max_norm: float | None,
) -> float:
    """F = <grad h, dtheta>; adds factor times dF/dg at the unclipped loss gradient g, through clipping and both moments.

    dF/dg = c s - (c / (|g| + 1e-6)) <s, g> g / |g| ,    s = dF/d(c g) with c held; the second term where c < 1
    """
    total = through_clip = 0.0
    for name in direction:
        value, slope = _parameter_derivative(gradient_of_h[name], step, name)
        total += value
        through_clip += dot({name: slope}, {name: step.gradient[name]})
        direction[name].add_(slope, alpha=factor * step.clip)
    if max_norm is not None and step.clip < 1.0:
        norm = step.gradient_norm
        along = step.clip / (norm + 1e-6) * through_clip / norm
        for name, part in direction.items():
            part.add_(step.gradient[name], alpha=-factor * along)
    return total


def _parameter_derivative(gradient_of_h: Tensor, step: NextStep, name: str) -> tuple[float, Tensor]:
    """One parameter's part of F, and its derivative by the clipped gradient."""
    clipped, state = step.gradient[name] * step.clip, step.state[name]
    totals = []

    def form(
        clipped: Tensor, along: Tensor, theta: Tensor, m: Tensor, v: Tensor, largest: Tensor | None = None
    ) -> Tensor:
        with torch.enable_grad():
            leaf = clipped.detach().clone().requires_grad_(True)
            s = after_gradient(replace(state, exp_avg=m, exp_avg_sq=v, max_exp_avg_sq=largest), leaf)
            moved_by = -s.lr / (1 - s.beta1**s.step) * preconditioner(s) * s.exp_avg
            moved_by = moved_by - s.lr * s.weight_decay * theta
            total = (along * moved_by).sum()
            totals.append(float(total.detach().double()))
            slope = torch.autograd.grad(total, [leaf])[0]
        # Where neither this batch nor an earlier one had a gradient, sqrt(v) has no derivative, and no row has an entry.
        return slope.nan_to_num(0.0, 0.0, 0.0)

    theta = step.parameters[name].detach()
    slope = elementwise(form, clipped, gradient_of_h, theta, state.exp_avg, *second_moments(state))
    return total_of(sum(totals))[0], slope


def token_shares(
    model: nn.Module,
    train_batch: SequenceBatch,
    direction: Mapping[str, Tensor],
    weights: Tensor,
    clip: float,
    passes: PassSettings = DEFAULT_PASSES,
) -> Tensor:
    """(n_train, L) float64 share of every completion token, nats per token of h, 0 elsewhere; a row adds up to dh_i.

    direction: of the step's `share_direction`. One pass over the training sequences (entropy_core.directional).
    """
    tokens = sequence_derivatives(model, train_batch, direction, passes).tokens.double()
    return clip * weights.double().to(tokens.device)[:, None] * tokens


@dataclass(frozen=True)
class MeasuredCurve:
    """h(theta + s d) - h(theta) at (S,) scales, nats per token, float64.

    left_out: (G, S) the same with each of the G prompts left out; None with one prompt.
    standard_errors, effective_sample_sizes: (S,), of `sequences`.
    """

    scales: Tensor
    changes: Tensor
    standard_errors: Tensor
    effective_sample_sizes: Tensor
    left_out: Tensor | None
    sequences: int


def measure_curve(
    model: nn.Module,
    direction: Mapping[str, Tensor],
    scales: Sequence[float],
    eval_batch: SequenceBatch,
    eval_statistics: TokenStatistics,
    log_weights: Tensor | None = None,
    passes: PassSettings = DEFAULT_PASSES,
    known: Mapping[float, TokenStatistics] | None = None,
) -> MeasuredCurve:
    """The reweighted change of entropy on the same tokens along a direction, forwards and backwards (negative scales).

    log_weights: as in `snis_entropy_change`. known: statistics at some of the scales. The model is restored bit by bit.
    """
    prompts, index = eval_batch.prompt_index.unique(return_inverse=True)
    count = len(prompts)
    kept = [(index != prompt).nonzero().flatten() for prompt in range(count)] if count > 1 else []
    everything = torch.arange(len(eval_batch), device=eval_batch.device)
    before = _totals(eval_statistics)
    measured: list[EntropyMeasurement] = []
    left_out = torch.zeros((count, len(scales)), dtype=torch.float64)
    for column, scale in enumerate(scales):
        if known is not None and scale in known:
            after = _totals(known[scale])
        else:
            with weights_moved(model, direction, scale):
                after = _totals(token_statistics(model, eval_batch, passes))
        for row, rows in enumerate([everything, *kept]):
            found = snis_entropy_change(
                _select(before, rows),
                _select(after, rows),
                eval_batch.select(rows),
                log_weights=None if log_weights is None else log_weights[rows],
            )
            if row == 0:
                measured.append(found)
            else:
                left_out[row - 1, column] = found.change
    return MeasuredCurve(
        scales=torch.tensor(list(scales), dtype=torch.float64),
        changes=torch.tensor([m.change for m in measured], dtype=torch.float64),
        standard_errors=torch.tensor([m.standard_error for m in measured], dtype=torch.float64),
        effective_sample_sizes=torch.tensor([m.effective_sample_size for m in measured], dtype=torch.float64),
        left_out=left_out if kept else None,
        sequences=len(eval_batch),
    )


def _totals(statistics: TokenStatistics) -> TokenStatistics:
    """Sequence totals in place of tokens, float64: all that the reweighted entropy needs."""
    return TokenStatistics(statistics.scores()[:, None], statistics.entropy_sums()[:, None])


def _select(statistics: TokenStatistics, rows: Tensor) -> TokenStatistics:
    return TokenStatistics(statistics.logprobs[rows], statistics.entropies[rows])

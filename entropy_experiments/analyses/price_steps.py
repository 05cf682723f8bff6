"""The step that each intervention makes, and what it is along the gradients of the evaluation sequences.

    g' = run's g + coefficient x term's g, or of weights, or of token coefficients  ->  dtheta'  ->  <row_t, dtheta'>

One forward pass over the training sequences serves all objectives that are no weights of sequences, and one pass over the
evaluation sequences all steps, as many as memory holds; of a model whose rows are as large as itself one at a time. The bonus
that holds entropy is the coefficient c of <grad h, dtheta'(c)> = 0 (entropy_core.bonus): its gradient is linear in c, its step is
not.
Source: docs/analyses/prices.md; steps: step/what_if.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from entropy_core.bonus import solve_bonus
from entropy_core.cut_weights import total_of
from entropy_core.directional import weights_moved
from entropy_core.entropy import TokenCoefficients, effective_sample_size, normalized_weights
from entropy_core.formed import Formed, dot
from entropy_core.gradients import batch_gradients
from entropy_core.interventions import Added, Intervention, Objective, TrainingTokens
from entropy_core.measurement import snis_entropy_change
from entropy_core.passes.prefix_sharing import PrefixSharing
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import token_statistics
from entropy_experiments.kernel.contraction import RowKind
from entropy_experiments.records.price_results import MeasuredStep
from entropy_experiments.step.evaluation_products import EvaluationSide
from entropy_experiments.step.gradient_rows import KeptRows, RecomputedRows, TrainingRows
from entropy_experiments.step.row_products import products_with_steps, rows_are_large
from entropy_experiments.step.what_if import StepMaker

_STEPS_HELD = 2**30  # bytes of steps beside each other; of gradients as many again
_LARGEST_BONUS = 100.0
_USUAL_BONUS = 0.1
# Adam divides small gradients by small moments: rounding of float32 gradients grows to this in entries that hardly move.
_SAME_STEP = 1e-2


@dataclass(frozen=True)
class PriceInputs:
    """rows: of the training sequences. gradient_of_h: name -> tensor, by the estimand's estimator on the evaluation sequences.

    rewards: (n_eval,) float64, NaN where unknown. judged: (n_eval,) bool, the sequences that the costliest training sequences
    were not chosen on. measured_on: sequences and rewards that real steps are measured on; None: the evaluation sequences.
    measured_part: of each step that is taken, the change divided by it: the smaller, the less curvature.
    """

    model: nn.Module
    steps: StepMaker
    tokens: TrainingTokens
    rows: TrainingRows
    evaluation: EvaluationSide
    gradient_of_h: Mapping[str, Tensor]
    rewards: Tensor
    judged: Tensor
    passes: PassSettings
    measured_on: tuple[EvaluationSide, Tensor] | None = None
    measured_part: float = 1.0


@dataclass(frozen=True)
class Priced:
    """An intervention whose step was made. coefficient: one that was solved for; measured: what the real step did."""

    one: Intervention
    coefficient: float | None = None
    measured: MeasuredStep | None = None


class _Gradients:
    """Loss gradients before clipping; those of token coefficients come from one forward pass for all objectives that are made
    ready together, and are held until others are. That of the run is the analysed step's, where no rows are kept to sum up.
    """

    def __init__(self, inputs: PriceInputs) -> None:
        self._inputs = inputs
        again = isinstance(inputs.rows, KeptRows)
        self._sharing = inputs.rows.sharing if isinstance(inputs.rows, RecomputedRows) else PrefixSharing(inputs.model)
        self.run = inputs.rows.weighted_gradient(inputs.tokens.weights) if again else inputs.steps.step.gradient
        self._of_term: dict[int, dict[str, Tensor]] = {}

    def ready(self, objectives: Iterable[Objective | None]) -> None:
        """Make what these objectives need beside the run's gradient."""
        inputs, found = self._inputs, {id(t): t for one in objectives if (t := _term(one)) is not None}
        if found and found.keys() <= self._of_term.keys():
            return
        self._of_term.clear()
        losses = [term.scaled(-1.0) for term in found.values()]
        batch, passes = inputs.tokens.batch, inputs.passes
        made = batch_gradients(inputs.model, batch, losses, passes, True, self._sharing) if losses else []
        self._of_term.update(zip(found, made, strict=True))

    def of(self, objective: Objective) -> Mapping[str, Tensor]:
        if objective is self._inputs.tokens.weights:
            return self.run
        if isinstance(objective, Tensor):
            return self._inputs.rows.weighted_gradient(objective)
        if isinstance(objective, TokenCoefficients):
            return self._of_term[id(objective)]
        assert objective.coefficient is not None
        return self.plus(objective.term, objective.coefficient)

    def plus(self, term: TokenCoefficients, coefficient: float) -> Mapping[str, Tensor]:
        """The run's gradient plus `coefficient` times that of a term's loss, formed when it is read."""
        of_term = self._of_term[id(term)]
        return Formed(self.run, lambda name: self.run[name] + coefficient * of_term[name])

    def solved(self, term: TokenCoefficients) -> float | str:
        """The coefficient with which the predicted change of entropy is 0, or why there is none: the gradient is linear in it,
        the step is not."""

        def change(coefficient: float) -> float:
            delta = self._inputs.steps.delta(self.plus(term, coefficient))
            return dot(self._inputs.gradient_of_h, delta)

        found = solve_bonus(change, 0.0, 0.0, _LARGEST_BONUS, _USUAL_BONUS)
        if found.without >= 0:
            return "the step as trained does not lower entropy"
        return f"no coefficient up to {_LARGEST_BONUS:g} was found that does" if found.saturated else found.coefficient


def _term(objective: Objective | None) -> TokenCoefficients | None:
    if isinstance(objective, Added):
        return objective.term
    return objective if isinstance(objective, TokenCoefficients) else None


def _check(inputs: PriceInputs, delta: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the step as trained, made here, is not the analysed step."""
    off = length = 0.0
    for name, part in inputs.steps.step.parameter_delta.items():
        off += float((delta[name] - part).double().square().sum())
        length += float(part.double().square().sum())
    off, length = total_of(off, length)
    if not off <= _SAME_STEP**2 * length:
        raise ValueError(
            f"the step as trained, made from the list, is off by {(off / length) ** 0.5:.1e} of the analysed step"
        )


# ---- products of evaluation rows with steps


def steps_and_products(
    inputs: PriceInputs, listed: list[Intervention], measure: bool
) -> tuple[list[Priced], dict[RowKind, Tensor], dict[str, str]]:
    """Make every step and take the evaluation rows' products with it.

    Args:
        inputs: the analysed step and both sides.
        listed: what is to be priced, the step as trained first.
        measure: measure each step as well.

    Returns:
        Who was priced; kind -> (n_eval, as many) products of evaluation rows with their steps; name -> why it was not priced.

    Raises:
        ValueError: where the step as trained, made here, is not the analysed one.
    """
    wanted = [one for one in listed if one.objective is not None]
    (size,) = total_of(sum(p.numel() * p.element_size() for p in inputs.steps.parameters.values()))
    many = 1 if rows_are_large(inputs.model) else max(1, int(_STEPS_HELD // max(1, size)))
    gradients = _Gradients(inputs)
    priced: list[Priced] = []
    parts: list[dict[RowKind, Tensor]] = []
    refused: dict[str, str] = {}
    for start in range(0, len(wanted), many):
        some = wanted[start : start + many]
        gradients.ready(one.objective for one in some)
        deltas: list[Mapping[str, Tensor]] = []
        for one in some:
            found = _solved(one, gradients)
            if isinstance(found, str):
                refused[one.name] = found
                continue
            assert found.one.objective is not None
            gradient = gradients.of(found.one.objective)
            deltas.append(inputs.steps.delta(gradient, one.learning_rate_factor, one.keeps_momentum))
            del gradient  # of a model that is as large as its rows one vector more
            if one.name == "run":
                _check(inputs, deltas[-1])
            priced.append(replace(found, measured=_measured(inputs, deltas[-1]) if measure else None))
        if many > 1:
            gradients.ready(())
        if deltas:
            parts.append(products_with_steps(inputs.model, inputs.evaluation, deltas, inputs.passes))
    return priced, {kind: torch.cat([part[kind] for part in parts], 1) for kind in parts[0]}, refused


def _solved(one: Intervention, gradients: _Gradients) -> Priced | str:
    """With its coefficient, where that is to be solved for; or why there is none."""
    added = one.objective
    if not isinstance(added, Added) or added.coefficient is not None:
        return Priced(one)
    found = gradients.solved(added.term)
    if isinstance(found, str):
        return found
    label = f"{one.label} ({found:.2g})"
    return Priced(replace(one, label=label, objective=Added(added.term, found)), found)


def _measured(inputs: PriceInputs, delta: Mapping[str, Tensor]) -> MeasuredStep:
    side, rewards = inputs.measured_on or (inputs.evaluation, inputs.rewards)
    with weights_moved(inputs.model, delta, inputs.measured_part):
        after = token_statistics(inputs.model, side.batch, inputs.passes)
    weights = normalized_weights((after.scores() - side.statistics.scores()).cpu())
    reward = float((weights * rewards).mean() - rewards.mean()) / inputs.measured_part
    return MeasuredStep(
        entropy=snis_entropy_change(side.statistics, after, side.batch).change / inputs.measured_part,
        reward=reward if np.isfinite(reward) else None,
        effective_sample_size=effective_sample_size(weights),
    )

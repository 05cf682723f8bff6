"""What would each intervention do to entropy and to reward, in the very step that is analysed?

    dh = <grad h, dtheta'>        dJ = <grad J, dtheta'> = Cov_t( r_t, <dS_t, dtheta'> )        t over evaluation sequences

dtheta' is the exact step with the intervention's loss or optimizer: clipping, momentum and P answer to it (step.what_if). Rows of
the evaluation sequences pass once for as many steps as memory holds, and give both for every sequence and step. Cov divides by
n - 1: the policy gradient of reward with the mean of the other sequences as its baseline, on prompts that the step has not seen.

    price = (dJ' - dJ) / (dh' - dh)        change of reward for a nat kept, against the step as trained

All interventions are judged on the same sequences, so differences are paired: jackknife over evaluation prompts, everything that
depends on the batch recomputed without each. A price needs a denominator whose 95% interval is above 0. Leaving out the
sequences of highest cost is judged on other prompts than they were chosen on, as is the step as trained that it is compared with.
Source: docs/analyses/prices.md; the list: interventions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from entropy_core.directional import weights_moved
from entropy_core.entropy import TokenCoefficients, effective_sample_size, normalized_weights
from entropy_core.gradients import batch_gradients, stream_rows
from entropy_core.measurement import snis_entropy_change
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_core.uncertainty import jackknife_standard_error
from entropy_experiments.analyses.interventions import (
    BONUS_THAT_HOLDS,
    LEFT_OUT,
    Intervention,
    TrainingTokens,
    bonus,
    interventions,
)
from entropy_experiments.kernel.contraction import RowKind
from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.price_results import MeasuredStep, PriceRow, PricesResult
from entropy_experiments.statistics.jackknife_interval import ends_of
from entropy_experiments.step.evaluation_products import EvaluationProducts, EvaluationSide
from entropy_experiments.step.gradient_rows import TrainingRows
from entropy_experiments.step.what_if import StepMaker

KEEPS = 0.25
"""Part of the entropy that the step as trained loses which an intervention keeps at least, to be compared by its price."""
_STEPS_HELD = 2**31  # bytes of steps beside each other
_LARGEST_BONUS = 100.0
_HALVINGS = 24
# Adam divides small gradients by small moments: rounding of float32 gradients grows to this in entries that hardly move.
_SAME_STEP = 1e-2

Reference = Callable[[], TokenStatistics] | str
"""Token statistics of the training batch under the reference policy, or why there are none."""
_Series = tuple[float, np.ndarray]
"""A value, and (B,) values with each prompt left out."""


@dataclass(frozen=True)
class PriceInputs:
    """rows: of the training sequences. gradient_of_h: name -> tensor, by the estimand's estimator on the evaluation sequences.

    rewards: (n_eval,) float64, NaN where unknown. judged: (n_eval,) bool, the sequences that the costliest training sequences
    were not chosen on.
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


@dataclass(frozen=True)
class _Priced:
    """An intervention whose step was made. coefficient: one that was solved for; measured: what the real step did."""

    one: Intervention
    coefficient: float | None
    measured: MeasuredStep | None


def price_list(inputs: PriceInputs, reference: Reference, measure: bool = False) -> PricesResult:
    """The table.

    Args:
        inputs: the analysed step and both sides.
        reference: as in `interventions`.
        measure: take every step and measure entropy and reward after it; a forward pass each.

    Returns:
        The record that summary.json holds, the step as trained first.

    Raises:
        ValueError: where the step as trained, made here, is not the analysed one.
    """
    listed = list(_with_solved_bonus(inputs, reference))
    priced, products = _products(inputs, listed, measure)
    note = _no_reward(inputs.rewards)
    masks = {"all": torch.ones_like(inputs.judged), "judged": inputs.judged}
    changes = {kept: _changes(inputs, products, mask, note is None) for kept, mask in masks.items() if bool(mask.any())}
    rows: dict[str, PriceRow] = {}
    prices: dict[str, _Series] = {}
    for column, found in enumerate(priced):
        one = changes["judged" if _apart(found.one.name) else "all"]
        rows[found.one.name], price = _row(found, one, column)
        if price is not None and not _apart(found.one.name):
            prices[found.one.name] = price
    lost = -changes["all"].entropy[0][0]
    comparable = {name: price for name, price in prices.items() if _kept(rows[name]) >= KEEPS * lost > 0}
    prompts = inputs.evaluation.batch.prompt_index
    return PricesResult(
        rows=[rows.get(one.name) or PriceRow(name=one.name, label=one.label, reason=one.reason) for one, _ in listed],
        alike=_alike(comparable),
        keeps=KEEPS,
        reward_note=note,
        n_eval=len(prompts),
        eval_prompts=len(prompts.unique()),
        judged_prompts=len(prompts[inputs.judged.to(prompts.device)].unique()),
    )


def _kept(row: PriceRow) -> float:
    found = row.entropy_minus_run
    return -np.inf if found is None or found.value is None else found.value


def _apart(name: str) -> bool:
    """Whether an intervention was chosen by what it does to entropy, and is judged on other prompts than it was chosen on."""
    return name in {f"without_{count}" for count in LEFT_OUT}


def _no_reward(rewards: Tensor) -> str | None:
    known = rewards[torch.isfinite(rewards)]
    if len(known) < len(rewards):
        return "not all evaluation sequences have rewards"
    return None if len(known.unique()) > 1 else "the evaluation sequences' rewards are all equal"


# ---- the steps


def _with_solved_bonus(inputs: PriceInputs, reference: Reference) -> Iterator[tuple[Intervention, float | None]]:
    """The interventions, those with the run's own weights told so, and before the KL terms the solved entropy bonus."""
    solved = False
    for one in interventions(inputs.tokens, reference):
        if not solved and one.name.startswith("kl_"):
            solved = True
            yield _bonus_that_holds(inputs)
        changes_weights = one.keeps_momentum and one.learning_rate_factor == 1.0 and one.name != "run"
        if changes_weights and isinstance(one.objective, Tensor):
            if torch.allclose(one.objective, inputs.tokens.weights, rtol=1e-9, atol=0.0):
                yield Intervention(one.name, one.label, reason="its weights are those of the step as trained"), None
                continue
        yield one, None


def _gradient(inputs: PriceInputs, objective: Tensor | TokenCoefficients) -> dict[str, Tensor]:
    """Of the loss -objective, before clipping."""
    if isinstance(objective, Tensor):
        return inputs.rows.weighted_gradient(objective)
    return batch_gradients(inputs.model, inputs.tokens.batch, [objective.scaled(-1.0)], inputs.passes, True)[0]


def _bonus_that_holds(inputs: PriceInputs) -> tuple[Intervention, float | None]:
    """The entropy bonus with which the predicted change is 0: its gradient is linear in the coefficient, the step is not."""
    label = "entropy bonus that holds entropy"
    run = _gradient(inputs, inputs.tokens.weights)
    unit = {name: g - run[name] for name, g in _gradient(inputs, bonus(inputs.tokens, 1.0)).items()}

    def change(coefficient: float) -> float:
        delta = inputs.steps.delta({name: run[name] + coefficient * unit[name] for name in run})
        return sum(float((inputs.gradient_of_h[name] * part).sum(dtype=torch.float64)) for name, part in delta.items())

    if change(0.0) >= 0:
        return Intervention(BONUS_THAT_HOLDS, label, reason="the step as trained does not lower entropy"), None
    low, high = 0.0, 1e-4
    while change(high) < 0 and high < _LARGEST_BONUS:
        low, high = high, 4 * high
    if change(high) < 0:
        return Intervention(BONUS_THAT_HOLDS, label, reason=f"no coefficient up to {_LARGEST_BONUS:g} does"), None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if change(middle) < 0 else (low, middle)
    return Intervention(BONUS_THAT_HOLDS, f"{label} ({high:.2g})", bonus(inputs.tokens, high)), high


def _check(inputs: PriceInputs, delta: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the step as trained, made here, is not the analysed step."""
    off = length = 0.0
    for name, part in inputs.steps.step.parameter_delta.items():
        off += float((delta[name] - part).double().square().sum())
        length += float(part.double().square().sum())
    if not off <= _SAME_STEP**2 * length:
        raise ValueError(
            f"the step as trained, made from the list, is off by {(off / length) ** 0.5:.1e} of the analysed step"
        )


# ---- products of evaluation rows with steps


def _products(
    inputs: PriceInputs, listed: list[tuple[Intervention, float | None]], measure: bool
) -> tuple[list[_Priced], dict[RowKind, Tensor]]:
    """Who was priced, and kind -> (n_eval, as many) products of evaluation rows with their steps."""
    wanted = [(one, coefficient) for one, coefficient in listed if one.objective is not None]
    size = sum(p.numel() * p.element_size() for p in inputs.steps.parameters.values())
    many = max(1, _STEPS_HELD // max(1, size))
    priced: list[_Priced] = []
    parts: list[dict[RowKind, Tensor]] = []
    for start in range(0, len(wanted), many):
        deltas = []
        for one, coefficient in wanted[start : start + many]:
            assert one.objective is not None
            gradient = _gradient(inputs, one.objective)
            deltas.append(inputs.steps.delta(gradient, one.learning_rate_factor, one.keeps_momentum))
            if one.name == "run":
                _check(inputs, deltas[-1])
            measured = _measured(inputs, deltas[-1]) if measure else None
            priced.append(_Priced(one, coefficient, measured))
        parts.append(_of_rows(inputs, deltas))
    return priced, {kind: torch.cat([part[kind] for part in parts], 1) for kind in parts[0]}


def _of_rows(inputs: PriceInputs, deltas: list[dict[str, Tensor]]) -> dict[RowKind, Tensor]:
    """kind -> (n_eval, len(deltas)) float64, from one pass over the evaluation sequences."""
    coefficients, batch = inputs.evaluation.coefficients(), inputs.evaluation.batch
    vectors = {name: torch.stack([delta[name].flatten() for delta in deltas], 1) for name in deltas[0]}
    found = [torch.zeros(len(batch), len(deltas), dtype=torch.float64, device=batch.device) for _ in coefficients]

    def sink(number: int, name: str, indices: Tensor, part: Tensor) -> None:
        products = part.flatten(1) @ vectors[name].to(part)
        found[number].index_add_(0, indices.to(batch.device), products.double().to(batch.device))

    def restart() -> None:
        for products in found:
            products.zero_()

    stream_rows(inputs.model, batch, list(coefficients.values()), sink, inputs.passes, restart)
    return dict(zip(coefficients, found, strict=True))


def _measured(inputs: PriceInputs, delta: Mapping[str, Tensor]) -> MeasuredStep:
    side = inputs.evaluation
    with weights_moved(inputs.model, delta, 1.0):
        after = token_statistics(inputs.model, side.batch, inputs.passes)
    weights = normalized_weights((after.scores() - side.statistics.scores()).cpu())
    reward = float((weights * inputs.rewards).mean() - inputs.rewards.mean())
    return MeasuredStep(
        entropy=snis_entropy_change(side.statistics, after, side.batch).change,
        reward=reward if np.isfinite(reward) else None,
        effective_sample_size=effective_sample_size(weights),
    )


# ---- numbers of the table


@dataclass(frozen=True)
class _Changes:
    """dh and dJ of every step: (M,) values and (B, M) values without each prompt. reward: None where there is none."""

    entropy: tuple[np.ndarray, np.ndarray]
    reward: tuple[np.ndarray, np.ndarray] | None

    def of(self, column: int) -> tuple[_Series, _Series | None]:
        def series(both: tuple[np.ndarray, np.ndarray]) -> _Series:
            return float(both[0][column]), both[1][:, column]

        return series(self.entropy), None if self.reward is None else series(self.reward)


def _changes(inputs: PriceInputs, products: Mapping[RowKind, Tensor], kept: Tensor, with_reward: bool) -> _Changes:
    """Judged on the sequences `kept`, as a batch of their own."""
    side, estimator = EvaluationProducts(inputs.evaluation, products), inputs.evaluation.estimand.gradient
    rows = kept.nonzero().flatten().to(inputs.evaluation.batch.device)
    prompts = inputs.evaluation.batch.prompt_index[rows]
    subsets = [rows[prompts != prompt] for prompt in prompts.unique()]
    scores, rewards = products["score"].cpu().numpy(), inputs.rewards.numpy()

    def entropy(some: Tensor) -> np.ndarray:
        return side.contributions(some, estimator, True).double().mean(0).cpu().numpy()

    def reward(some: Tensor) -> np.ndarray:
        at = some.cpu().numpy()
        centred = rewards[at] - rewards[at].mean()
        return centred @ scores[at] / (len(at) - 1)

    def of(formula: Callable[[Tensor], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        value = formula(rows)
        nothing = np.full_like(value, np.nan)
        return value, np.stack([formula(some) if len(some) > 1 else nothing for some in subsets])

    return _Changes(of(entropy), of(reward) if with_reward and len(rows) > 1 else None)


def _row(found: _Priced, changes: _Changes, column: int) -> tuple[PriceRow, _Series | None]:
    """The row, and its price with the values without each prompt, where there is one."""
    (entropy, reward), (run_entropy, run_reward) = changes.of(column), changes.of(0)
    row = PriceRow(name=found.one.name, label=found.one.label, entropy=_estimate(*entropy))
    numbers: dict[str, object] = {"coefficient": found.coefficient, "measured": found.measured}
    price = None
    if reward is not None:
        numbers["reward"] = _estimate(*reward)
    if column > 0:
        kept = _minus(entropy, run_entropy)
        numbers["entropy_minus_run"] = estimate = _estimate(*kept)
        if reward is not None and run_reward is not None:
            paid = _minus(reward, run_reward)
            numbers["reward_minus_run"] = _estimate(*paid)
            numbers["covariance"] = _jackknife_covariance(kept[1], paid[1])
            if estimate.low is not None and estimate.low > 0:
                price = (paid[0] / kept[0], paid[1] / kept[1])
            numbers["reward_per_nat"] = _NO_PRICE if price is None else _estimate(*price)
    return row.model_copy(update={name: value for name, value in numbers.items() if value is not None}), price


_NO_PRICE = StudentEstimate(
    value=None,
    standard_error=None,
    degrees_of_freedom=None,
    reason="it is not predicted to keep entropy: the 95% interval of what it keeps is not above 0",
)


def _minus(left: _Series, right: _Series) -> _Series:
    return left[0] - right[0], left[1] - right[1]


def _estimate(value: float, left_out: np.ndarray) -> StudentEstimate:
    error = jackknife_standard_error(torch.from_numpy(left_out.copy()))
    if not np.isfinite(error):
        reason = "no standard error: too few prompts to leave one out"
        return StudentEstimate(value=value, standard_error=None, degrees_of_freedom=None, reason=reason)
    return StudentEstimate(value=value, standard_error=float(error), **ends_of(value, left_out))


def _jackknife_covariance(left: np.ndarray, right: np.ndarray) -> float | None:
    count = len(left)
    found = (count - 1) / count * float((left - left.mean()) @ (right - right.mean()))
    return found if np.isfinite(found) else None


def _alike(prices: Mapping[str, _Series]) -> list[str]:
    """The best price, and after it, by price, those whose paired difference to it has an interval that reaches 0."""
    order = sorted(prices, key=lambda name: -prices[name][0])
    found = []
    for name in order:
        low = None if name == order[0] else _estimate(*_minus(prices[order[0]], prices[name])).low
        if low is None or low <= 0:
            found.append(name)
    return found

"""What would each intervention do to entropy and to reward, in the very step that is analysed?

    dh = <grad h, dtheta'>        dJ = <grad J, dtheta'> = Cov_t( r_t, <dS_t, dtheta'> )        t over evaluation sequences

dtheta' is the exact step with the intervention's loss or optimizer: clipping, momentum and P answer to it (price_steps.py). Cov
divides by n - 1: the policy gradient of reward with the mean of the other sequences as its baseline, on prompts that the step
has not seen.

    price = (dJ' - dJ) / (dh' - dh)        change of reward for a nat kept, against the step as trained

All interventions are judged on the same sequences, so differences are paired: jackknife over evaluation prompts, everything that
depends on the batch recomputed without each. A price needs a denominator whose 95% interval is above 0. Leaving out the
sequences of highest cost is judged on other prompts than they were chosen on, as is the step as trained that it is compared with.
Source: docs/analyses/prices.md; the list: interventions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entropy_core.interventions import LEFT_OUT, Intervention, interventions
from entropy_core.reward import reward_derivative
from entropy_core.scores import TokenStatistics
from entropy_core.uncertainty import jackknife_standard_error
from entropy_experiments.analyses.price_steps import Priced, PriceInputs, steps_and_products
from entropy_experiments.kernel.contraction import RowKind
from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.price_results import PriceRow, PricesResult
from entropy_experiments.statistics.jackknife_interval import ends_of
from entropy_experiments.step.evaluation_products import EvaluationProducts

KEEPS = 0.25
"""Part of the entropy that the step as trained loses which an intervention keeps at least, to be compared by its price."""

_SAME_WEIGHTS = 1e-5  # a run records weights in float32

Reference = Callable[[], TokenStatistics] | str
"""Token statistics of the training batch under the reference policy, or why there are none."""
_Series = tuple[float, np.ndarray]
"""A value, and (B,) values with each prompt left out."""


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
    listed = [_unless_as_trained(inputs, one) for one in interventions(inputs.tokens, reference)]
    priced, products, refused = steps_and_products(inputs, listed, measure)
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
        rows=[
            rows.get(one.name) or PriceRow(name=one.name, label=one.label, reason=one.reason or refused.get(one.name))
            for one in listed
        ],
        alike=_alike(comparable),
        keeps=KEEPS,
        reward_note=note,
        n_eval=len(prompts),
        eval_prompts=len(prompts.unique()),
        judged_prompts=len(prompts[inputs.judged.to(prompts.device)].unique()),
    )


def _unless_as_trained(inputs: PriceInputs, one: Intervention) -> Intervention:
    """The intervention, told so where its weights are the run's own."""
    changes_weights = one.keeps_momentum and one.learning_rate_factor == 1.0 and one.name != "run"
    if changes_weights and isinstance(one.objective, Tensor):
        if torch.allclose(one.objective, inputs.tokens.weights, rtol=_SAME_WEIGHTS, atol=0.0):
            return Intervention(one.name, one.label, reason="its weights are those of the step as trained")
    return one


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
    scores, rewards = products["score"].cpu(), inputs.rewards

    def entropy(some: Tensor) -> np.ndarray:
        return side.contributions(some, estimator, True).double().mean(0).cpu().numpy()

    def reward(some: Tensor) -> np.ndarray:
        return reward_derivative(rewards[some.cpu()], scores[some.cpu()]).numpy()

    def of(formula: Callable[[Tensor], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        value = formula(rows)
        nothing = np.full_like(value, np.nan)
        return value, np.stack([formula(some) if len(some) > 1 else nothing for some in subsets])

    return _Changes(of(entropy), of(reward) if with_reward and len(rows) > 1 else None)


def _row(found: Priced, changes: _Changes, column: int) -> tuple[PriceRow, _Series | None]:
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

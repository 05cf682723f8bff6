"""What would each intervention do to entropy and to reward, in the very step that is analysed?

    dh = <grad h, dtheta'>        dJ = <grad J, dtheta'> = Cov_t( r_t, <dS_t, dtheta'> )        t over evaluation sequences

dtheta' is the exact step with the intervention's loss or optimizer: clipping, momentum and P answer to it (step.what_if). One
forward-mode pass along dtheta' gives both for every evaluation sequence. Cov divides by n - 1: the policy gradient of reward with
the mean of the other sequences as its baseline, on prompts that took no part in the step.

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
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.directional import entropy_derivatives, token_derivatives, weights_moved
from entropy_core.entropy import Estimator, TokenCoefficients, effective_sample_size, normalized_weights
from entropy_core.gradients import batch_gradients
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
from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.price_results import MeasuredStep, PriceRow, PricesResult
from entropy_experiments.statistics.jackknife_interval import ends_of
from entropy_experiments.step.what_if import StepMaker

KEEPS = 0.25
"""Part of the entropy that the step as trained loses which an intervention keeps at least, to be compared by its price."""
_LARGEST_BONUS = 100.0
_HALVINGS = 24
# Adam divides small gradients by small moments: rounding of float32 gradients grows to this in entries that hardly move.
_SAME_STEP = 1e-2


@dataclass(frozen=True)
class PriceInputs:
    """gradient_of_h: name -> tensor, by `estimator` on the evaluation sequences. rewards: (n_eval,) float64, NaN where unknown.

    judged: (n_eval,) bool, the sequences that the costliest training sequences were not chosen on.
    """

    model: nn.Module
    steps: StepMaker
    tokens: TrainingTokens
    evaluation: SequenceBatch
    statistics: TokenStatistics
    estimator: Estimator
    gradient_of_h: Mapping[str, Tensor]
    rewards: Tensor
    judged: Tensor
    passes: PassSettings


@dataclass(frozen=True)
class _Change:
    """(value, (B,) values without each prompt) of dh and dJ; reward None where there is none."""

    entropy: tuple[float, np.ndarray]
    reward: tuple[float, np.ndarray] | None


def price_list(
    inputs: PriceInputs, reference: Callable[[], TokenStatistics] | str, measure: bool = False
) -> PricesResult:
    """The table.

    Args:
        inputs: the analysed step and both sides.
        reference: as in `interventions`.
        measure: take every step and measure entropy and reward after it; a forward pass each.

    Returns:
        The record that summary.json holds, the step as trained first.
    """
    note = _no_reward(inputs.rewards)
    everything = torch.ones_like(inputs.judged)
    as_trained: TokenCoefficients | None = None
    runs: dict[bool, _Change] = {}
    rows: list[PriceRow] = []
    prices: dict[str, tuple[float, np.ndarray]] = {}
    for one, coefficient in _with_solved_bonus(inputs, reference):
        if one.objective is None:
            rows.append(PriceRow(name=one.name, label=one.label, reason=one.reason))
            continue
        same = as_trained is not None and one.keeps_momentum and one.learning_rate_factor == 1.0
        if same and torch.allclose(one.objective.logprob, as_trained.logprob, rtol=1e-9, atol=0.0):
            if torch.equal(one.objective.entropy, as_trained.entropy):
                rows.append(
                    PriceRow(name=one.name, label=one.label, reason="its weights are those of the step as trained")
                )
                continue
        as_trained = as_trained or one.objective
        apart = _apart(one.name)
        delta = _delta(inputs, one)
        if one.name == "run":
            _check(inputs, delta)
        along = token_derivatives(inputs.model, inputs.evaluation, delta, inputs.passes)
        change = _change(inputs, along, inputs.judged if apart else everything, note is None)
        if one.name == "run":
            runs = {False: change, True: _change(inputs, along, inputs.judged, note is None)}
        row, price = _row(one, coefficient, change, runs[apart])
        if price is not None:
            prices[one.name] = price
        rows.append(row.model_copy(update={"measured": _measured(inputs, delta)}) if measure else row)
    index = inputs.evaluation.prompt_index
    lost = -runs[False].entropy[0]
    comparable = [
        row.name
        for row in rows
        if row.entropy_minus_run is not None
        and not _apart(row.name)
        and (row.entropy_minus_run.value or 0.0) >= KEEPS * lost > 0
    ]
    return PricesResult(
        rows=rows,
        alike=_alike({name: price for name, price in prices.items() if name in comparable}),
        keeps=KEEPS,
        reward_note=note,
        n_eval=len(index),
        eval_prompts=len(index.unique()),
        judged_prompts=len(index[inputs.judged.to(index.device)].unique()),
    )


def _apart(name: str) -> bool:
    """Whether an intervention was chosen by what it does to entropy, and is judged on other prompts than it was chosen on."""
    return name in {f"without_{count}" for count in LEFT_OUT}


def _check(inputs: PriceInputs, delta: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the step as trained, made here from token weights, is not the analysed step."""
    known = inputs.steps.step.parameter_delta
    off = sum(float((delta[name] - part).double().square().sum()) for name, part in known.items()) ** 0.5
    length = sum(float(part.double().square().sum()) for part in known.values()) ** 0.5
    if not off <= _SAME_STEP * length:
        raise ValueError(
            f"the step as trained, made from token weights, is off by {off / length:.1e} of the analysed step"
        )


def _no_reward(rewards: Tensor) -> str | None:
    known = rewards[torch.isfinite(rewards)]
    if len(known) < len(rewards):
        return "not all evaluation sequences have rewards"
    return None if len(known.unique()) > 1 else "the evaluation sequences' rewards are all equal"


def _with_solved_bonus(inputs: PriceInputs, reference: Callable[[], TokenStatistics] | str):
    """The interventions, and after the fixed entropy bonuses the one that holds entropy, with its coefficient."""
    solved = False
    for one in interventions(inputs.tokens, reference):
        if not solved and one.name.startswith("kl_"):
            solved = True
            yield _bonus_that_holds(inputs)
        yield one, None


def _bonus_that_holds(inputs: PriceInputs) -> tuple[Intervention, float | None]:
    """The entropy bonus with which the predicted change is 0: its gradient is linear in the coefficient, the step is not."""
    label = "entropy bonus that holds entropy"
    ascent = _gradient(inputs, bonus(inputs.tokens, 1.0))
    run = _gradient(inputs, bonus(inputs.tokens, 0.0))
    unit = {name: ascent[name] - run[name] for name in run}

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


def _gradient(inputs: PriceInputs, objective: TokenCoefficients) -> dict[str, Tensor]:
    """Of the loss -objective, before clipping."""
    return batch_gradients(inputs.model, inputs.tokens.batch, [objective.scaled(-1.0)], inputs.passes, True)[0]


def _delta(inputs: PriceInputs, one: Intervention) -> dict[str, Tensor]:
    assert one.objective is not None
    return inputs.steps.delta(_gradient(inputs, one.objective), one.learning_rate_factor, one.keeps_momentum)


def _change(inputs: PriceInputs, along: TokenStatistics, kept: Tensor, with_reward: bool) -> _Change:
    rows = kept.nonzero().flatten()
    batch = inputs.evaluation.select(rows.tolist())
    statistics, along = inputs.statistics.select(rows), along.select(rows)
    index, rewards, scores = batch.prompt_index, inputs.rewards[rows.cpu()], along.scores().double().cpu()

    def entropy(some: Tensor) -> float:
        part = batch.select(some.tolist())
        return float(
            entropy_derivatives(statistics.select(some), along.select(some), part, inputs.estimator).double().mean()
        )

    def reward(some: Tensor) -> float:
        r, s = rewards[some.cpu()], scores[some.cpu()]
        return float((r - r.mean()) @ s / (len(r) - 1)) if len(r) > 1 else float("nan")

    subsets = [(index != prompt).nonzero().flatten() for prompt in index.unique()]
    whole = torch.arange(len(batch), device=index.device)

    def of(formula: Callable[[Tensor], float]) -> tuple[float, np.ndarray]:
        left_out = [formula(some) if len(some) > 1 else float("nan") for some in subsets]
        return formula(whole), np.array(left_out)

    return _Change(of(entropy), of(reward) if with_reward else None)


def _row(
    one: Intervention, coefficient: float | None, change: _Change, run: _Change
) -> tuple[PriceRow, tuple[float, np.ndarray] | None]:
    """The row, and its price with the values without each prompt, where there is one."""
    found: dict[str, object] = {"entropy": _estimate(*change.entropy)}
    if change.reward is not None:
        found["reward"] = _estimate(*change.reward)
    if coefficient is not None:
        found["coefficient"] = coefficient
    price = None
    if one.name != "run":
        kept = _minus(change.entropy, run.entropy)
        found["entropy_minus_run"] = _estimate(*kept)
        if change.reward is not None and run.reward is not None:
            paid = _minus(change.reward, run.reward)
            found["reward_minus_run"] = _estimate(*paid)
            found["covariance"] = _jackknife_covariance(kept[1], paid[1])
            lowest = found["entropy_minus_run"].low  # type: ignore[attr-defined]
            if lowest is not None and lowest > 0:
                price = (paid[0] / kept[0], paid[1] / kept[1])
                found["reward_per_nat"] = _estimate(*price)
            else:
                why = "it is not predicted to keep entropy: the 95% interval of what it keeps is not above 0"
                found["reward_per_nat"] = StudentEstimate(
                    value=None, standard_error=None, degrees_of_freedom=None, reason=why
                )
    return PriceRow(name=one.name, label=one.label, **found), price  # type: ignore[arg-type]


def _minus(left: tuple[float, np.ndarray], right: tuple[float, np.ndarray]) -> tuple[float, np.ndarray]:
    return left[0] - right[0], left[1] - right[1]


def _estimate(value: float, left_out: np.ndarray) -> StudentEstimate:
    error = jackknife_standard_error(torch.from_numpy(left_out))
    if not np.isfinite(error):
        reason = "no standard error: too few prompts to leave one out"
        return StudentEstimate(value=value, standard_error=None, degrees_of_freedom=None, reason=reason)
    return StudentEstimate(value=value, standard_error=float(error), **ends_of(value, left_out))


def _jackknife_covariance(left: np.ndarray, right: np.ndarray) -> float | None:
    count = len(left)
    found = (count - 1) / count * float((left - left.mean()) @ (right - right.mean()))
    return found if np.isfinite(found) else None


def _alike(prices: Mapping[str, tuple[float, np.ndarray]]) -> list[str]:
    """The best price, and after it, by price, those whose paired difference to it has an interval that reaches 0."""
    order = sorted(prices, key=lambda name: -prices[name][0])
    found = []
    for name in order:
        if name == order[0]:
            found.append(name)
            continue
        low = _estimate(*_minus(prices[order[0]], prices[name])).low
        if low is None or low <= 0:
            found.append(name)
    return found


def _measured(inputs: PriceInputs, delta: Mapping[str, Tensor]) -> MeasuredStep:
    with weights_moved(inputs.model, delta, 1.0):
        after = token_statistics(inputs.model, inputs.evaluation, inputs.passes)
    found = snis_entropy_change(inputs.statistics, after, inputs.evaluation)
    weights = normalized_weights((after.scores() - inputs.statistics.scores()).cpu())
    rewards = inputs.rewards
    reward = float((weights * rewards).mean() - rewards.mean())
    return MeasuredStep(
        entropy=found.change,
        reward=reward if np.isfinite(reward) else None,
        effective_sample_size=effective_sample_size(weights),
    )

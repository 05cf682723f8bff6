"""Checks of what analyses and sweeps print beside the numbers of a step: each function returns name -> {shape: rate}.

Every interval, rule and frequency is the product's own, of buffers drawn from laws whose truth is known: gradients of evaluation
sequences with heavy tails, rewards that go with them, curves of entropy along a step, rewards over training.
"""

from __future__ import annotations

import numpy as np
import torch

from entropy_experiments.analyses.arrays import KernelArrays, SequenceLabels
from entropy_experiments.analyses.candidate_weights import most_lowering
from entropy_experiments.analyses.higher_order import measure_orders
from entropy_experiments.analyses.intervention import linear_datamodelling_score
from entropy_experiments.analyses.weighting_schemes import weighting_schemes
from entropy_experiments.analyses.who_was_first import bootstrap_counts, numbers_of_draws, who_was_first
from entropy_experiments.records.estimate_entries import ratio_estimate
from entropy_experiments.records.law_results import FittedLaw, Forecast
from entropy_experiments.records.training_course import Column, course
from entropy_experiments.records.zero_or_one import of_zeros_and_ones
from entropy_experiments.statistics.confidence import Known
from entropy_experiments.statistics.jackknife_interval import carried_by_few, effective_degrees_of_freedom
from entropy_experiments.statistics.largest_part import largest_part
from entropy_experiments.step.effects_of_leaving_out import Contributions
from entropy_experiments.sweep.evolution.entropy_law import law_over_training
from entropy_experiments.sweep.evolution.reward_price import price_between

Rates = dict[str, dict[str, float]]
Held = dict[str, list[bool]]


def _note(held: Held, name: str, number: Known | None, truth: float) -> None:
    """Whether the interval of a number holds the truth; nothing where it has none."""
    if number is not None and number.low is not None and number.high is not None:
        held.setdefault(name, []).append(number.low <= truth <= number.high)


def _collect(found: Rates, shape: str, held: Held) -> None:
    for name, hits in held.items():
        if len(hits) >= 50:
            found.setdefault(name, {})[shape] = float(np.mean(hits))


def weighting_tests(repeats: int) -> Rates:
    """Intervals of other weightings' changes, gains and costs over evaluation prompts, and of what is spared by leaving out."""
    found: Rates = {}
    dimensions, train = 6, 16
    for prompts, each in ((8, 4), (16, 2), (64, 1)):
        rng = np.random.default_rng((11, prompts))
        of_train = np.repeat(np.arange(4), 4)
        rows = rng.normal(size=(train, dimensions))
        reward = np.tile([1.0, 0.0, 0.0, 1.0], 4)
        rows += 1.5 * (reward[:, None] - 0.5)
        length = rng.integers(3, 9, train)
        training = SequenceLabels(
            of_train, reward, length, 1.0 * length, -1.0 * length, [f"p{p}" for p in of_train], [f"c{i}" for i in range(train)]
        )  # fmt: skip
        weights = (reward - 0.5) / train
        slope, of_reward = rng.normal(size=dimensions), np.full(dimensions, 2.0)
        inner = rows @ rows.T
        own = np.repeat(np.arange(prompts), each)
        held: Held = {}
        for _ in range(repeats):
            reward_seen = (rng.random(len(own)) < 0.4).astype(float)
            of_prompt = rng.standard_t(5, size=(prompts, dimensions))[own]
            heavy = rng.exponential(size=(len(own), 1)) * rng.standard_t(5, size=(len(own), dimensions))
            scores = of_reward * (reward_seen[:, None] - 0.4) + 0.5 * heavy
            entropies = slope + 0.7 * of_prompt + 0.7 * heavy
            evaluation = SequenceLabels(
                own, reward_seen, np.full(len(own), 5), np.ones(len(own)), -np.ones(len(own)),
                [f"e{p}" for p in own], [f"d{i}" for i in range(len(own))],
            )  # fmt: skip
            kh = entropies @ rows.T
            products = kh.mean(0)
            arrays = KernelArrays(
                evaluation=evaluation, training=training, weights=weights, advantages=reward - 0.5,
                shares=weights * products, products=products, step_factor=1.0,
                fisher=scores @ rows.T, entropy_fisher=kh, train_fisher=inner, train_entropy_fisher=inner,
            )  # fmt: skip
            table = weighting_schemes(arrays, 8, drop_top=(1,))
            run = np.asarray(table.weights["run"])
            for row in table.rows:
                if row.name not in ("grpo", "reinforce", "positives_only", "drop_top_1") or row.delta_h is None:
                    continue
                w = np.asarray(table.weights[row.name])
                dh, gain = float(slope @ rows.T @ w), float(0.24 * of_reward @ rows.T @ w)
                dh_run, gain_run = float(slope @ rows.T @ run), float(0.24 * of_reward @ rows.T @ run)
                assert row.scale is not None and row.scale.equal_length is not None and row.minus_run is not None
                scale = row.scale.equal_length
                _note(
                    held,
                    "coverage of a weighting's change at equal length",
                    row.delta_h.equal_length.known(),
                    dh * scale,
                )
                _note(
                    held, "coverage of a weighting's gain of reward", row.reward_gain and row.reward_gain.known(), gain
                )
                _note(
                    held,
                    "coverage of a weighting's cost in entropy",
                    row.entropy_cost_per_reward and row.entropy_cost_per_reward.known(),
                    -dh / gain,
                )
                _note(
                    held,
                    "coverage of a weighting's change at equal gain",
                    row.delta_h.equal_gain.known(),
                    dh * gain_run / gain,
                )
                difference = dh * gain_run / gain - dh_run
                _note(
                    held,
                    "coverage of a weighting minus the run's, equal gain",
                    row.minus_run.equal_gain.known(),
                    difference,
                )
                if row.spared is not None:
                    place = own % prompts
                    true = [
                        -(weights[c] * (slope @ rows[c].T)).sum()
                        for half in (0, 1)
                        for c in [most_lowering((kh * weights)[place % 2 == half].mean(0), 1)]
                    ]
                    _note(
                        held,
                        "coverage of what leaving out the costliest spares",
                        row.spared.known(),
                        float(np.mean(true)),
                    )
        _collect(found, f"{prompts} prompts x {each}", held)
    return found


def law_tests(repeats: int) -> Rates:
    """R = b - a e^H over training: independent noise, and noise that neighbours share."""
    found: Rates = {}
    for steps in (12, 30):
        for label, alike in (("", 0.0), (" of noise that neighbours share", 0.6)):
            rng = np.random.default_rng((12, steps))
            held: Held = {}
            for _ in range(2 * repeats):
                entropy = np.linspace(1.2, 0.3, steps) + 0.05 * rng.normal(size=steps)
                noise = rng.normal(size=steps)
                for t in range(1, steps):
                    noise[t] = alike * noise[t - 1] + np.sqrt(1 - alike**2) * noise[t]
                law = law_over_training(range(steps), entropy, 0.9 - 0.2 * np.exp(entropy) + 0.05 * noise)
                assert isinstance(law.fit, FittedLaw) and isinstance(law.forecast, Forecast)
                _note(held, f"coverage of the law's slope{label}", law.fit.a.known(), 0.2)
                _note(held, f"coverage of reward at zero entropy{label}", law.fit.at_zero_entropy.known(), 0.7)
                inside = law.forecast.held_out.mean_error_inside
                held.setdefault(f"level of a forecast called outside{label}", []).append(not inside)
            _collect(found, f"{steps} steps", held)
    return found


def order_tests(repeats: int) -> Rates:
    """Second order of a measured curve, and where both orders are equal in size."""
    found: Rates = {}
    half = np.array([0.125, 0.25, 0.5, 0.75, 1.0])
    scales = np.concatenate([-half[::-1], half])
    powers = np.stack([scales**k for k in (1, 2, 3, 4)])
    mean = np.array([-1.0, 0.4, 0.1, 0.05])
    for prompts in (8, 16, 64):
        rng = np.random.default_rng((13, prompts))
        held: Held = {}
        for _ in range(repeats):
            draws = mean + np.array([0.8, 0.5, 0.2, 0.1]) * (rng.gamma(1.0, size=(prompts, 4)) - 1)
            curves = draws @ powers
            left_out = (curves.sum(0) - curves) / (prompts - 1)
            result = measure_orders(scales, curves.mean(0), left_out)
            second = result.second_order
            told = None if second.value is None else Known(second.value, second.low, second.high)
            _note(held, "coverage of the second order", told, mean[1])
            _note(held, "coverage of the first order of the curve", result.first_order.known(), mean[0])
            at, truth = result.equal_at, abs(mean[0] / mean[1])
            low, high = at.low or 0.0, np.inf if at.high is None else at.high
            held.setdefault("coverage of where both orders are equal", []).append(low <= truth <= high)
        _collect(found, f"{prompts} prompts", held)
    return found


def price_tests(repeats: int) -> Rates:
    """Entropy paid for a unit of reward between two checkpoints, where the change of reward is told from 0."""
    found: Rates = {}
    for prompts, each in ((8, 8), (16, 4), (64, 1)):
        rng = np.random.default_rng((14, prompts))
        held: Held = {}
        for _ in range(repeats):
            sums, tendency = [], rng.gamma(2.0, size=prompts) / 2
            for entropy, rate in ((1.0, 0.2), (0.6, 0.7)):
                tokens = rng.integers(4, 9, (prompts, each))
                spent = (entropy * tendency[:, None] * rng.gamma(4.0, size=(prompts, each)) / 4 * tokens).sum(1)
                right = (rng.random((prompts, each)) < rate).sum(1)
                sums.append([spent, tokens.sum(1), right, np.full(prompts, float(each))])
            price = price_between(np.array(sums, np.float64), 0, 1)
            _note(held, "coverage of a change of mean reward between checkpoints", price.reward_change.known(), 0.5)
            _note(held, "coverage of the price of reward in entropy", price.price.known(), 0.4 / 0.5)
        _collect(found, f"{prompts} prompts x {each}", held)
    return found


def reward_tests(repeats: int) -> Rates:
    """The mean of rewards of 0 and 1, of prompts that differ in difficulty, where few are solved and where half are."""
    found: Rates = {}
    for prompts, each in ((8, 8), (16, 4), (64, 1)):
        rng = np.random.default_rng((19, prompts))
        index = torch.arange(prompts).repeat_interleave(each)
        held: Held = {}
        for rate in (0.05, 0.5):
            name = f"coverage of a mean reward of zeros and ones, {rate:.0%} solved"
            for _ in range(repeats):
                chances = rng.beta(2 * rate, 2 * (1 - rate), size=prompts).repeat(each)
                rewards = torch.tensor(rng.random(prompts * each) < chances).double()
                mean = of_zeros_and_ones(ratio_estimate(rewards, index), len(rewards), prompts)
                _note(held, name, mean.known(), rate)
        _collect(found, f"{prompts} prompts x {each}", held)
    return found


def first_tests(repeats: int) -> Rates:
    """Which training sequence is named first, by its frequency in bootstraps over prompts, and the set of nine in ten."""
    found: Rates = {}
    train = 12
    for prompts in (8, 16, 64):
        rng = np.random.default_rng((15, prompts))
        held: Held = {}
        for _ in range(repeats):
            true = -rng.gamma(2.0, size=train)
            seen = true + 3.0 * rng.exponential(size=(prompts, 1)) * rng.standard_t(5, size=(prompts, train))
            ones = np.ones(prompts)
            parts = Contributions(torch.from_numpy(seen), None)
            counts = bootstrap_counts(prompts, 200, int(rng.integers(2**31)))
            draws = numbers_of_draws(counts, parts, np.arange(prompts), ones, ones)
            left_out = (seen.sum(0) - seen) / (prompts - 1)
            units = {"sequence": np.arange(train)}
            result = who_was_first(seen.mean(0), draws, units, left_out)["sequence"]["lowering"]
            lowest = int(true.argmin())
            members = [row for rows in result["set"]["rows"] for row in rows]
            held.setdefault("the set named first holds the first (asked: 90%)", []).append(lowest in members)
            if result["first_in"] > 0.5:
                held.setdefault("one that is named first is the first (asked: above half)", []).append(
                    result["rows"] == [lowest]
                )
        _collect(found, f"{prompts} prompts", held)
    return found


def largest_part_tests(repeats: int) -> Rates:
    """Two parts of equal size, of like and of opposite sign, that share most of their noise; and one half as large again."""
    found: Rates = {}
    for prompts in (8, 16, 64):
        rng = np.random.default_rng((16, prompts))
        held: Held = {}
        for _ in range(4 * repeats):
            shared = rng.gamma(1.0, size=prompts) - 1
            for name, second in (("level of naming the largest of two equal parts", 1.0), ("power at 1.5 to 1", 1.5)):
                sign = rng.choice([-1.0, 1.0])
                parts = {}
                for part, mean in (("momentum", 1.0), ("batch", sign * second), ("weight_decay", 0.02)):
                    draws = mean * (1 + shared) + 0.3 * rng.standard_t(5, size=prompts)
                    parts[part] = float(draws.mean()), (draws.sum() - draws) / (prompts - 1)
                decided = largest_part(parts)
                label = (
                    name
                    if name.startswith("level")
                    else f"power of naming the largest part, {name.removeprefix('power ')}"
                )
                held.setdefault(label, []).append(decided is not None and decided.certain)
        _collect(found, f"{prompts} prompts", held)
    return found


def course_tests(repeats: int) -> Rates:
    """What a quantity did over training: last third minus first, by the steps' own errors and by their scatter."""
    found: Rates = {}
    for steps in (6, 12, 30):
        rng = np.random.default_rng((18, steps))
        held: Held = {}
        for _ in range(4 * repeats):
            true = 1.0 - 0.5 * np.arange(steps) / (steps - 1)
            draws = true[:, None] * rng.gamma(4.0, size=(steps, 16)) / 4
            third, gap = steps // 3, 0.5 * (steps - steps // 3) / (steps - 1)
            flat = draws - true[:, None]
            errors = draws.std(axis=1, ddof=1) / 4
            for label, values, se, truth in (
                ("errors of steps", draws.mean(1), errors, -gap),
                ("scatter", flat.mean(1), np.full(steps, np.nan), 0.0),
            ):
                column = Column(np.arange(steps, dtype=float), values, se, np.full(steps, 15.0), True)
                change = course(column)
                assert change is not None and third >= 2
                _note(held, f"coverage of a change over training, by the {label}", change.change, truth)
        _collect(found, f"{steps} steps", held)
    return found


def response_tests(repeats: int) -> Rates:
    """Slope and intercept of the response over halves, whose noise is larger for some subsets."""
    found: Rates = {}
    for subsets in (20, 40):
        rng = np.random.default_rng((19, subsets))
        held: Held = {}
        for _ in range(repeats // 4):  # each makes 2,000 bootstraps of its rank correlation besides
            halves = np.array([rng.permutation(16) < 8 for _ in range(subsets)])
            shares = rng.normal(size=16)
            predicted = halves @ shares
            noise = 0.3 * (0.5 + np.abs(predicted)) * rng.standard_t(5, size=subsets)
            score = linear_datamodelling_score(halves, shares, 0.1 + 0.8 * predicted + noise, seed=1)
            for name, truth in (("slope", 0.8), ("intercept", 0.1)):
                low, high = getattr(score, f"{name}_interval")
                held.setdefault(f"coverage of the {name} of the response over halves", []).append(low <= truth <= high)
        _collect(found, f"{subsets} subsets", held)
    return found


def few_prompts_tests(repeats: int) -> Rates:
    """How often it is said that few prompts carry an error: of laws that it is a false alarm for, and of heavy ones."""
    found: Rates = {}
    laws = {
        "normal": lambda rng, size: rng.normal(size=size),
        "exponential": lambda rng, size: rng.exponential(size=size),
        "of lognormal, skewness 33,": lambda rng, size: rng.lognormal(sigma=1.5, size=size),
    }
    for prompts in (16, 32, 64):
        rng = np.random.default_rng((17, prompts))
        for name, law in laws.items():
            freedoms = effective_degrees_of_freedom(law(rng, (5 * repeats, prompts)))
            rate = float(np.mean([carried_by_few(float(f), prompts) for f in freedoms]))
            found.setdefault(f"few prompts said to carry an error, {name} influence", {})[f"{prompts} prompts"] = rate
    return found


ANALYSES = (
    weighting_tests,
    law_tests,
    order_tests,
    price_tests,
    reward_tests,
    first_tests,
    largest_part_tests,
    course_tests,
    response_tests,
    few_prompts_tests,
)

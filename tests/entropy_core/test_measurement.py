"""The measured entropy change: exact where the batch is the distribution, and with the right slope on any
batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import entropy_coefficients, normalized_weights
from entropy_core.gradients import batch_gradients, dot, entropy_gradient
from entropy_core.measurement import fixed_prefix_entropy_change, snis_entropy_change
from entropy_core.scores import TokenStatistics, token_statistics
from tests.entropy_core.support import distribution_as_batch, right_padded
from tests.oracle.comparison import assert_close
from tests.oracle.enumeration import ExactPolicy, entropies_along, flatten, solve
from tests.oracle.model_cases import ModelCase, parameters_of, random_sequences
from tests.oracle.policy import DyadicPolicy


def random_direction(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    """A direction of length one over all trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    raw = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in parameters_of(model).items()
    }
    length = float(flatten(raw).norm())
    return {name: value / length for name, value in raw.items()}


def statistics_at(
    model: nn.Module, batch: SequenceBatch, direction: dict[str, Tensor], scale: float
) -> TokenStatistics:
    """Statistics under θ + scale·direction; the model is put back bit for bit."""
    parameters = parameters_of(model)
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(scale * direction[name])
        moved = token_statistics(model, batch)
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])
    return moved


@pytest.fixture(scope="module")
def dyadic_batch(dyadic_exact: ExactPolicy) -> SequenceBatch:
    return distribution_as_batch(dyadic_exact, 512)


@pytest.mark.parametrize("scale", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
def test_reweighting_the_distribution_is_exact(
    dyadic_policy: DyadicPolicy,
    dyadic_exact: ExactPolicy,
    dyadic_batch: SequenceBatch,
    per_token: bool,
    scale: float,
) -> None:
    """On the batch that is the distribution, SNIS has no sampling error: it is h(θ') − h(θ) at any step
    size."""
    direction = random_direction(dyadic_policy)
    before = token_statistics(dyadic_policy, dyadic_batch)
    after = statistics_at(dyadic_policy, dyadic_batch, direction, scale)
    measured = snis_entropy_change(before, after, dyadic_batch, per_token)
    which = int(per_token)
    start = entropies_along(dyadic_policy, dyadic_exact.space, direction, 0.0)[which]
    end = entropies_along(dyadic_policy, dyadic_exact.space, direction, scale)[which]
    fixed = fixed_prefix_entropy_change(before, after, dyadic_batch, per_token).change
    assert_close(measured.before, start, 1e-10, "entropy before the update")
    assert_close(measured.after, end, 1e-10, "entropy after the update")
    assert_close(
        measured.change,
        end - start,
        1e-9,
        "the reweighted change is not the exact one",
        {"ω is uniform (fixed prefix)": fixed, "the sign": start - end},
    )
    lengths = dyadic_batch.completion_lengths.double()
    mean_change = (after.entropy_sums() - before.entropy_sums()).mean() / (lengths.mean() if per_token else 1.0)
    assert_close(fixed, float(mean_change), 1e-10, "the fixed-prefix change is unweighted")


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
def test_the_slope_of_the_measurement_is_the_split_gradient(case: ModelCase, per_token: bool) -> None:
    """d/ds SNIS at 0 equals the split estimator on the same batch, and the fixed-prefix change its own
    gradient."""
    model = case.make()
    batch = right_padded(random_sequences(case.vocabulary), 0.9)
    gradients = {
        estimator: entropy_gradient(model, batch, estimator, per_token)
        for estimator in ("split", "fixed_prefix", "rao_blackwell")
    }
    # Mostly along the gradient itself, so that the slope does not vanish by accident; partly anywhere.
    anywhere, length = random_direction(model), float(flatten(gradients["split"]).norm())
    direction = {name: 0.2 * anywhere[name] + g / length for name, g in gradients["split"].items()}
    slopes = {estimator: dot(gradient, direction) for estimator, gradient in gradients.items()}
    before = token_statistics(model, batch)
    for estimator, measure in (("split", snis_entropy_change), ("fixed_prefix", fixed_prefix_entropy_change)):
        slope = slopes[estimator]

        def change(scale: float, measure=measure) -> float:
            return measure(before, statistics_at(model, batch, direction, scale), batch, per_token).change

        smell = f"the {estimator} measurement has another slope than its gradient: a sign or a normaliser"
        # One-sided the error is of the order of the step, centred of its square; float64 rounds at 1e-10 of
        # the change.
        errors = [abs(change(scale) / scale - slope) / abs(slope) for scale in (1e-3, 1e-4, 1e-5)]
        assert errors[-1] < 1e-3, f"{smell}: {errors}"
        assert errors[-1] < max(errors[0] / 10, 1e-6), f"the error does not shrink with the step: {errors}"
        assert_close((change(1e-5) - change(-1e-5)) / 2e-5, slope, 1e-6, smell)
        for other in set(slopes) - {estimator}:
            gap = abs(slopes[other] - slope) / abs(slope)
            assert gap > 1e-2, f"{estimator} and {other} cannot be told apart on this batch: the test is blind"


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
def test_first_order_over_exact_change_goes_to_one(
    dyadic_policy: DyadicPolicy, dyadic_exact: ExactPolicy, dyadic_batch: SequenceBatch, per_token: bool
) -> None:
    """The library's gradient times a step, over the exact change: the error halves as the step does."""
    direction = random_direction(dyadic_policy, seed=6)
    start = entropies_along(dyadic_policy, dyadic_exact.space, direction, 0.0)[int(per_token)]
    predicted = dot(entropy_gradient(dyadic_policy, dyadic_batch, "rao_blackwell", per_token), direction)
    errors = []
    for scale in (2.0**-5, 2.0**-6, 2.0**-7):
        actual = entropies_along(dyadic_policy, dyadic_exact.space, direction, scale)[int(per_token)] - start
        errors.append(abs(predicted * scale / actual - 1))
    assert errors[-1] < 0.05, f"first order over actual does not go to one: {errors}"
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2, f"not second order: {errors}"


def synthetic(scores: list[float], entropies: list[float], batch: SequenceBatch) -> TokenStatistics:
    """Statistics whose sums are given, each put on the first completion token."""
    logprobs = torch.zeros(batch.input_ids.shape, dtype=torch.float64)
    token_entropies = torch.zeros_like(logprobs)
    first = batch.completion_mask.long().argmax(1)
    rows = torch.arange(len(batch))
    logprobs[rows, first] = torch.tensor(scores, dtype=torch.float64)
    token_entropies[rows, first] = torch.tensor(entropies, dtype=torch.float64)
    return TokenStatistics(logprobs, token_entropies)


BEFORE = ([-3.0, -2.0, -9.0, -1.0, -4.0, -5.0, -6.0], [2.0, 1.0, 6.0, 0.5, 2.0, 3.0, 4.0])
AFTER = ([-2.5, -2.1, -9.9, -0.7, -4.0, -5.5, -5.2], [1.5, 1.2, 5.0, 0.6, 1.0, 2.5, 4.5])


def reweighted(rows: list[int], lengths: list[float], per_token: bool) -> tuple[float, float]:
    """(entropy before, entropy after) of some sequences, in plain Python."""
    ratios = {n: torch.tensor(AFTER[0][n] - BEFORE[0][n], dtype=torch.float64).exp().item() for n in rows}
    units = {n: lengths[n] if per_token else 1.0 for n in rows}
    after = sum(ratios[n] * AFTER[1][n] for n in rows) / sum(ratios[n] * units[n] for n in rows)
    before = sum(BEFORE[1][n] for n in rows) / sum(units[n] for n in rows)
    return before, after


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
def test_measurement_by_hand_with_its_error_and_sample_size(per_token: bool) -> None:
    lists = random_sequences(37)
    batch = right_padded(lists)
    lengths = [float(len(c)) for c in lists.completion_ids]
    measured = snis_entropy_change(synthetic(*BEFORE, batch), synthetic(*AFTER, batch), batch, per_token)
    before, after = reweighted(list(range(7)), lengths, per_token)
    assert_close(measured.before, before, 1e-12, "before")
    assert_close(measured.after, after, 1e-12, "after")
    assert_close(measured.change, after - before, 1e-12, "change", {"the sign": before - after})
    prompts = sorted(set(lists.prompt_index))
    left_out = []
    for prompt in prompts:
        rest = [n for n in range(7) if lists.prompt_index[n] != prompt]
        without = reweighted(rest, lengths, per_token)
        left_out.append(without[1] - without[0])
    assert measured.left_out is not None
    assert_close(
        measured.left_out, torch.tensor(left_out, dtype=torch.float64), 1e-12, "the change without each prompt"
    )
    mean = sum(left_out) / len(prompts)
    squares = sum((value - mean) ** 2 for value in left_out)
    wanted = (squares * (len(prompts) - 1) / len(prompts)) ** 0.5
    assert_close(
        measured.standard_error,
        wanted,
        1e-10,
        "jackknife over prompts",
        {"the spread of the leave-one-out values": (squares / len(prompts)) ** 0.5},
    )
    ratios = torch.tensor([a - b for a, b in zip(AFTER[0], BEFORE[0], strict=True)], dtype=torch.float64).exp()
    assert_close(measured.effective_sample_size, float(ratios.sum() ** 2 / ratios.square().sum()), 1e-12, "ESS")
    assert measured.sequences == 7 and measured.trustworthy


def test_nothing_changes_without_an_update() -> None:
    batch = right_padded(random_sequences(37))
    before = synthetic(*BEFORE, batch)
    measured = snis_entropy_change(before, before, batch)
    assert abs(measured.change) < 1e-14 and abs(measured.standard_error) < 1e-14
    assert_close(measured.effective_sample_size, 7.0, 1e-12, "without an update every sequence counts")


def test_large_log_ratios_do_not_overflow_and_are_not_trusted() -> None:
    batch = right_padded(random_sequences(37))
    before = synthetic([-2000.0] * 7, BEFORE[1], batch)
    after = synthetic([-1.0] + [-1500.0] * 6, AFTER[1], batch)
    measured = snis_entropy_change(before, after, batch)
    assert_close(measured.effective_sample_size, 1.0, 1e-12, "one sequence holds all the weight")
    assert_close(measured.after, 1.5 / 4, 1e-12, "log-ratios are exponentiated before their maximum is taken off")
    assert not measured.trustworthy


def test_log_ratios_are_summed_in_float64() -> None:
    """Single-precision sums of −2000-ish scores would lose a log-ratio of 1e-5 altogether."""
    batch = right_padded(random_sequences(37))
    scores = torch.zeros(batch.input_ids.shape)
    for n in range(7):
        at = batch.completion_mask[n].nonzero().flatten()
        scores[n, at] = -1.0
        scores[n, at[0]] = -2000.0
    moved = scores.clone()
    last = batch.completion_mask[1].nonzero().flatten()[-1]
    moved[1, last] += 1e-5
    statistics = [
        TokenStatistics(values, torch.ones_like(values) * batch.completion_mask) for values in (scores, moved)
    ]
    ratio = statistics[1].scores() - statistics[0].scores()
    assert_close(float(ratio[1]), 1e-5, 2e-2, "scores are summed in float32")


def test_broken_statistics_are_refused() -> None:
    batch = right_padded(random_sequences(37))
    broken = synthetic([float("-inf"), *AFTER[0][1:]], AFTER[1], batch)
    with pytest.raises(ValueError, match="sequence 0"):
        snis_entropy_change(synthetic(*BEFORE, batch), broken, batch)


def test_the_oracle_knows_both_estimands(policy, space) -> None:
    exact = solve(policy, space)
    fixed = exact.expectation(exact.entropy_gradients.sum(1))
    assert float((fixed - exact.sequence_entropy_gradient).norm() / exact.sequence_entropy_gradient.norm()) > 0.2


LOG_WEIGHTS = torch.tensor([0.5, -1.0, 0.2, 1.3, 0.0, -0.4, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
def test_the_slope_of_a_weighted_measurement_is_the_weighted_gradient(case: ModelCase, per_token: bool) -> None:
    """Central differences of SNIS with log-weights against the split estimator with the same weights, to 1e-6."""
    model = case.make()
    batch = right_padded(random_sequences(case.vocabulary), 0.9)
    before = token_statistics(model, batch)
    weights = normalized_weights(LOG_WEIGHTS)

    def gradient(estimator: str, weights: Tensor | None) -> dict[str, Tensor]:
        coefficients = entropy_coefficients(before, batch, estimator, per_token, weights).scaled(1 / len(batch))
        return batch_gradients(model, batch, [coefficients])[0]

    for estimator, measure in (("split", snis_entropy_change), ("fixed_prefix", fixed_prefix_entropy_change)):
        own, unweighted = gradient(estimator, weights), gradient(estimator, None)
        # Mostly along what weights change, so that a measurement without them has another slope.
        odd = {name: own[name] - unweighted[name] for name in own}
        anywhere = random_direction(model)
        length = float(flatten(odd).norm())
        direction = {name: 0.2 * anywhere[name] + o / length for name, o in odd.items()}

        def slope(log_weights: Tensor | None, measure=measure, direction=direction, step: float = 1e-4) -> float:
            changes = {
                k: measure(
                    before, statistics_at(model, batch, direction, k * step), batch, per_token, log_weights
                ).change
                for k in (-2, -1, 1, 2)
            }
            return (8 * (changes[1] - changes[-1]) - (changes[2] - changes[-2])) / (12 * step)

        assert_close(
            slope(LOG_WEIGHTS),
            dot(own, direction),
            1e-6,
            f"the weighted {estimator} measurement has another slope than the weighted gradient",
            {"weights are left out": slope(None)},
        )


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
def test_weighted_measurement_by_hand(per_token: bool) -> None:
    """The weights of `before` in the entropy before; with the ratio on top in the entropy after and in ESS."""
    lists = random_sequences(37)
    batch = right_padded(lists)
    units = [float(len(c)) if per_token else 1.0 for c in lists.completion_ids]
    start = [float(w) for w in LOG_WEIGHTS.exp()]
    end = [
        w * torch.tensor(a - b, dtype=torch.float64).exp().item()
        for w, a, b in zip(start, AFTER[0], BEFORE[0], strict=True)
    ]

    def by_hand(rows: list[int], weights_after: list[float]) -> tuple[float, float]:
        before = sum(start[n] * BEFORE[1][n] for n in rows) / sum(start[n] * units[n] for n in rows)
        after = sum(weights_after[n] * AFTER[1][n] for n in rows) / sum(weights_after[n] * units[n] for n in rows)
        return before, after

    statistics = synthetic(*BEFORE, batch), synthetic(*AFTER, batch)
    everyone = list(range(7))
    for measure, weights in ((snis_entropy_change, end), (fixed_prefix_entropy_change, start)):
        measured = measure(*statistics, batch, per_token, LOG_WEIGHTS)
        before, after = by_hand(everyone, weights)
        assert_close(
            measured.before, before, 1e-12, "entropy before", {"unweighted": reweighted(everyone, units, True)[0]}
        )
        assert_close(measured.after, after, 1e-12, "entropy after")
        assert_close(measured.change, after - before, 1e-11, "change")
        assert_close(
            measured.effective_sample_size, sum(weights) ** 2 / sum(w * w for w in weights), 1e-12, "ESS of the weights"
        )
        left_out = []
        for prompt in sorted(set(lists.prompt_index)):
            b, a = by_hand([n for n in everyone if lists.prompt_index[n] != prompt], weights)
            left_out.append(a - b)
        mean = sum(left_out) / len(left_out)
        wanted = (sum((v - mean) ** 2 for v in left_out) * (len(left_out) - 1) / len(left_out)) ** 0.5
        assert_close(measured.standard_error, wanted, 1e-10, "jackknife over prompts of the weighted change")


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
def test_a_batch_of_an_earlier_policy_measures_exactly_too(
    dyadic_policy: DyadicPolicy, dyadic_exact: ExactPolicy, dyadic_batch: SequenceBatch, per_token: bool
) -> None:
    """Drawn at θ0, weighted to θ1, measured across the step from θ1 to θ2: h(θ2) − h(θ1)."""
    direction = random_direction(dyadic_policy)
    scores = [statistics_at(dyadic_policy, dyadic_batch, direction, scale) for scale in (0.0, 0.7, 1.1)]
    log_weights = scores[1].scores() - scores[0].scores()
    measured = snis_entropy_change(scores[1], scores[2], dyadic_batch, per_token, log_weights)
    start, end = (
        entropies_along(dyadic_policy, dyadic_exact.space, direction, scale)[int(per_token)] for scale in (0.7, 1.1)
    )
    unweighted = snis_entropy_change(scores[1], scores[2], dyadic_batch, per_token).change
    assert_close(measured.before, start, 1e-10, "entropy of the policy before the step")
    assert_close(measured.change, end - start, 1e-9, "change", {"weights are left out": unweighted})

"""Entropies and the four estimators of their gradient, against exact enumeration.

The dyadic policy's distribution is a batch of 1024 rows, so that a sample mean *is* the expectation, also
inside h and the baselines: estimators must then give the exact gradient, with no sampling error to hide
behind.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from entropy_core.entropy import (
    ESTIMATORS,
    effective_sample_size,
    entropy_coefficients,
    entropy_estimate,
    leave_one_out_mean,
    normalized_weights,
    score_coefficients,
)
from entropy_core.gradients import batch_gradients, entropy_gradient, entropy_rows
from entropy_core.scores import token_statistics
from tests.entropy_core.support import distribution_as_batch, right_padded, whole_space
from tests.oracle.comparison import assert_close, relative_error
from tests.oracle.enumeration import (
    ExactPolicy,
    detached_parameters,
    enumerate_completions,
    flatten,
    flatten_rows,
    solve,
)
from tests.oracle.model_cases import TokenLists, random_sequences
from tests.oracle.policy import DyadicPolicy, RecurrentPolicy, Task

EXACT = 1e-10
COPIES = 512


@pytest.fixture(scope="module")
def dyadic_batch(dyadic_exact: ExactPolicy):
    return distribution_as_batch(dyadic_exact, COPIES)


def test_entropies_equal_enumeration(dyadic_policy: DyadicPolicy, dyadic_exact: ExactPolicy, dyadic_batch) -> None:
    estimate = entropy_estimate(token_statistics(dyadic_policy, dyadic_batch), dyadic_batch)
    assert_close(estimate.per_completion, dyadic_exact.sequence_entropy, EXACT, "H is E[Σ_k H_k]")
    assert_close(estimate.surprisal, dyadic_exact.sequence_entropy, EXACT, "−E[S] is H as well")
    lengths = dyadic_exact.space.lengths
    assert_close(
        estimate.per_token,
        dyadic_exact.token_entropy,
        EXACT,
        "h is E[ΣH]/E[T]",
        suspects={"mean of ratios": dyadic_exact.expectation(dyadic_exact.entropies.sum(1) / lengths)},
    )


def test_token_statistics_equal_enumeration(policy: RecurrentPolicy, space, exact: ExactPolicy) -> None:
    batch = whole_space(space)
    statistics = token_statistics(policy, batch)
    assert_close(statistics.scores(), exact.scores, EXACT, "scores differ from the enumeration")
    assert_close(statistics.entropy_sums(), exact.entropies.sum(1), EXACT, "entropies differ from the enumeration")


def wrong_answers(exact: ExactPolicy, per_token: bool) -> dict[str, torch.Tensor]:
    """Gradients that known mistakes would give."""
    unit = exact.mean_length if per_token else 1.0
    uncentred = exact.expectation(exact.rao_blackwell_rows()) / exact.mean_length
    right = exact.token_entropy_gradient if per_token else exact.sequence_entropy_gradient
    answers = {
        "the sign is turned": -right,
        "only the fixed-prefix half": exact.expectation(exact.entropy_gradients.sum(1)) / unit,
        "ΣH_k over the whole sequence is differentiated, the score term is lost twice": 2 * right,
    }
    if per_token:
        answers["the entropy to go is not centred by h"] = uncentred
        answers["∇H where ∇h was asked"] = exact.sequence_entropy_gradient
        answers["∇H / E[T], without the gradient of the denominator"] = (
            exact.sequence_entropy_gradient / exact.mean_length
        )
        answers["not divided by E[T]"] = right * exact.mean_length
    else:
        answers["∇h where ∇H was asked"] = exact.token_entropy_gradient
        answers["divided by E[T]"] = right / exact.mean_length
    # Where two mistakes give one number (uncentred = ∇H/E[T]) the first name stands for both.
    return answers


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
@pytest.mark.parametrize("estimator", ["rao_blackwell", "split", "score_function"])
def test_estimators_give_the_exact_gradient(
    dyadic_policy, dyadic_exact: ExactPolicy, dyadic_batch, estimator: str, per_token: bool
) -> None:
    wanted = dyadic_exact.token_entropy_gradient if per_token else dyadic_exact.sequence_entropy_gradient
    gradient = flatten(entropy_gradient(dyadic_policy, dyadic_batch, estimator, per_token))
    if estimator == "score_function":
        # Leaving oneself out of the baseline divides by n − 1 where the expectation divides by n.
        gradient = gradient * (COPIES - 1) / COPIES
    assert_close(gradient, wanted, EXACT, f"{estimator} is not the gradient", wrong_answers(dyadic_exact, per_token))
    assert all(parameter.grad is None for parameter in dyadic_policy.parameters()), "p.grad was touched"


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
def test_fixed_prefix_is_its_own_estimand(dyadic_policy, dyadic_exact: ExactPolicy, dyadic_batch, per_token) -> None:
    gradient = flatten(entropy_gradient(dyadic_policy, dyadic_batch, "fixed_prefix", per_token))
    unit = dyadic_exact.mean_length if per_token else 1.0
    wanted = dyadic_exact.expectation(dyadic_exact.entropy_gradients.sum(1)) / unit
    assert_close(gradient, wanted, EXACT, "the fixed-prefix gradient is E[Σ_k ∇H_k], over E[T] per token")
    assert relative_error(gradient, dyadic_exact.token_entropy_gradient) > 0.05


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("estimator", ["rao_blackwell", "split"])
def test_rows_weighted_by_exact_probabilities(policy, space, estimator: str, temperature: float) -> None:
    exact = solve(policy, space, temperature)
    rows = entropy_rows(policy, whole_space(space, temperature), estimator, per_token=False)
    other = solve(policy, space, 1.7).sequence_entropy_gradient
    assert_close(
        exact.expectation(flatten_rows(rows)),
        exact.sequence_entropy_gradient,
        EXACT,
        f"E[E_t] is not ∇H for {estimator} at temperature {temperature}",
        {
            "the fixed-prefix half alone": exact.expectation(exact.entropy_gradients.sum(1)),
            "no 1/τ in the backward pass": exact.sequence_entropy_gradient * (temperature if temperature != 1 else 1.7),
            "another temperature": other,
        },
    )


def test_rao_blackwell_rows_are_those_of_the_oracle(policy, space, exact: ExactPolicy) -> None:
    rows = flatten_rows(entropy_rows(policy, whole_space(space), "rao_blackwell", per_token=False))
    assert_close(
        rows,
        exact.rao_blackwell_rows(),
        EXACT,
        "E_t = Σ_k ∇H_k + Σ_k G_k ∇log π_k row by row",
        {
            "the entropy that has gone, not the one to go": exact.entropy_gradients.sum(1)
            + (exact.entropies.cumsum(1)[:, :, None] * exact.logprob_gradients).sum(1),
            "the sequence's whole entropy on every token (the split form)": exact.entropy_gradients.sum(1)
            + exact.entropies.sum(1)[:, None] * exact.score_rows,
        },
    )


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mean_of_the_rows_is_the_gradient(case, estimator: str, per_token: bool) -> None:
    model, batch = case.make(), right_padded(random_sequences(case.vocabulary), 0.9)
    rows = entropy_rows(model, batch, estimator, per_token)
    gradient = entropy_gradient(model, batch, estimator, per_token)
    assert list(rows) == list(gradient)
    mean = {name: row.mean(0) for name, row in rows.items()}
    assert_close(flatten(mean), flatten(gradient), EXACT, "Σ rows ≠ N·gradient: hooks miss a use of a parameter")


def test_per_token_rows_are_centred_by_the_batch(policy, space) -> None:
    """On any batch: ∇h's rows are (E_t with H_k − h in place of H_k) / mean length."""
    chosen = list(range(0, 363, 17))
    exact = solve(policy, space)
    batch = whole_space(space).select(chosen)
    lengths = space.lengths[chosen]
    h = float(exact.entropies[chosen].sum() / lengths.sum())
    wanted = exact.rao_blackwell_rows(centre=h)[chosen] / lengths.mean()
    rows = flatten_rows(entropy_rows(policy, batch, "rao_blackwell", per_token=True))
    uncentred = exact.rao_blackwell_rows()[chosen] / lengths.mean()
    assert_close(rows, wanted, EXACT, "per-token rows", {"the entropy to go is not centred by h": uncentred})


def test_the_score_function_is_unbiased_with_two_samples(dyadic_policy, dyadic_exact: ExactPolicy) -> None:
    """Over every pair of completions of one prompt, weighted by its probability: exactly ∇H of that
    prompt."""
    own = (dyadic_exact.space.prompt_index == 0).nonzero().flatten().tolist()
    probabilities = dyadic_exact.probabilities[own] * dyadic_exact.space.prompts
    scores, score_rows = dyadic_exact.scores[own], dyadic_exact.score_rows[own]
    wanted = -torch.einsum("i,i,id->d", probabilities, scores, score_rows)
    space = dyadic_exact.space
    total = torch.zeros_like(wanted)
    for first, second in itertools.combinations_with_replacement(range(len(own)), 2):
        lists = TokenLists(
            [space.prompt_ids[own[first]]] * 2,
            [space.completion_ids[own[n]] for n in (first, second)],
            [0, 0],
        )
        weight = probabilities[first] * probabilities[second] * (1 if first == second else 2)
        batch = right_padded(lists)
        total += weight * flatten(entropy_gradient(dyadic_policy, batch, "score_function", per_token=False))
    assert_close(total, wanted, EXACT, "the baseline is biased", {"a sequence stands in its own baseline": wanted / 2})


def test_leave_one_out_mean() -> None:
    values = torch.tensor([1.0, 4.0, 2.0, 8.0, 16.0, 3.0], dtype=torch.float64)
    index = torch.tensor([7, 2, 7, 2, 2, 5])
    wanted = []
    for n in range(6):
        same = [float(values[m]) for m in range(6) if m != n and index[m] == index[n]]
        others = same or [float(values[m]) for m in range(6) if m != n]
        wanted.append(sum(others) / len(others))
    assert_close(
        leave_one_out_mean(values, index),
        torch.tensor(wanted, dtype=torch.float64),
        1e-12,
        "the baseline is the mean of the prompt's *other* completions; of all others where there are none",
    )
    with pytest.raises(ValueError):
        leave_one_out_mean(values[:1], index[:1])


def test_score_coefficients_weigh_sequences(space) -> None:
    batch = whole_space(space).select([0, 40, 300])
    weights = torch.tensor([1.0, -2.0, 0.5])
    coefficients = score_coefficients(batch, weights)
    assert torch.equal(coefficients.logprob.sum(1), weights.double() * batch.completion_lengths)
    assert not coefficients.entropy.any()


def test_unknown_estimators_are_refused(policy, space) -> None:
    batch = whole_space(space).select([0, 1])
    with pytest.raises(ValueError, match="rao_blackwell"):
        entropy_coefficients(token_statistics(policy, batch), batch, "full_softmax")


def test_known_statistics_give_the_same_gradient(policy, space) -> None:
    batch = whole_space(space).select([3, 77, 200, 201])
    statistics = token_statistics(policy, batch)
    again = entropy_gradient(policy, batch, statistics=statistics)
    assert_close(flatten(again), flatten(entropy_gradient(policy, batch)), 1e-14, "given statistics change the answer")
    assert list(again) == list(detached_parameters(policy))


def moved_copy(policy: DyadicPolicy, seed: int = 5, size: float = 0.3) -> DyadicPolicy:
    """Another policy over the same completions: the target, where `policy` drew the batch."""
    other = DyadicPolicy()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own, parameter in zip(policy.parameters(), other.parameters(), strict=True):
            parameter.copy_(own + size * torch.randn(own.shape, generator=generator, dtype=torch.float64))
    return other


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
@pytest.mark.parametrize("estimator", ["rao_blackwell", "split", "score_function"])
def test_importance_weights_give_the_gradient_of_the_policy_that_did_not_draw(
    dyadic_policy, dyadic_exact: ExactPolicy, dyadic_batch, estimator: str, per_token: bool
) -> None:
    """The batch is the distribution of the drawing policy, so weighted means are expectations under the target."""
    target = moved_copy(dyadic_policy)
    exact = solve(target, dyadic_exact.space)
    drawn = token_statistics(dyadic_policy, dyadic_batch).scores()
    statistics = token_statistics(target, dyadic_batch)
    weights = normalized_weights(statistics.scores() - drawn)

    def gradient(weights: torch.Tensor | None) -> torch.Tensor:
        coefficients = entropy_coefficients(statistics, dyadic_batch, estimator, per_token, weights)
        factor = (COPIES - 1) / COPIES if estimator == "score_function" else 1.0
        scaled = coefficients.scaled(factor / len(dyadic_batch))
        return flatten(batch_gradients(target, dyadic_batch, [scaled])[0])

    wanted = exact.token_entropy_gradient if per_token else exact.sequence_entropy_gradient
    assert_close(
        gradient(weights),
        wanted,
        EXACT,
        "not the target's gradient",
        {
            "weights are left out": gradient(None),
            "ratios are turned over": gradient(normalized_weights(drawn - statistics.scores())),
            "weights are squared": gradient(weights.square()),
        },
    )
    assert_close(effective_sample_size(weights), len(weights) / float(weights.square().mean()), 1e-12, "ESS")
    assert effective_sample_size(weights) < 0.9 * len(weights), "the two policies are too alike for this test"


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
@pytest.mark.parametrize("estimator", ["rao_blackwell", "split", "fixed_prefix"])
def test_prior_weights_undo_the_way_prompts_were_drawn(
    dyadic_policy, dyadic_exact: ExactPolicy, dyadic_batch, estimator: str, per_token: bool
) -> None:
    """The first prompt was drawn three times as often, under another policy as well."""
    target = moved_copy(dyadic_policy)
    exact = solve(target, dyadic_exact.space)
    times = torch.where(dyadic_batch.prompt_index == 0, 3, 1)
    batch = dyadic_batch.select(torch.repeat_interleave(torch.arange(len(dyadic_batch)), times))
    chance = torch.tensor([0.75, 0.25], dtype=torch.float64)[batch.prompt_index]
    statistics = token_statistics(target, batch)
    ratio = statistics.scores() - token_statistics(dyadic_policy, batch).scores()
    weights = normalized_weights(ratio - chance.log())
    coefficients = entropy_coefficients(statistics, batch, estimator, per_token, weights).scaled(1 / len(batch))
    wanted = exact.token_entropy_gradient if per_token else exact.sequence_entropy_gradient
    if estimator == "fixed_prefix":
        wanted = exact.expectation(exact.entropy_gradients.sum(1)) / (exact.mean_length if per_token else 1.0)
    unequal = entropy_coefficients(statistics, batch, estimator, per_token, normalized_weights(ratio))
    assert_close(
        flatten(batch_gradients(target, batch, [coefficients])[0]),
        wanted,
        EXACT,
        "not the gradient under evenly drawn prompts",
        {
            "prompts keep their uneven share": flatten(
                batch_gradients(target, batch, [unequal.scaled(1 / len(batch))])[0]
            )
        },
    )


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_weights_change_nothing(policy, space, estimator: str, per_token: bool) -> None:
    batch = whole_space(space).select([3, 77, 200, 201, 300])
    statistics = token_statistics(policy, batch)
    plain = entropy_coefficients(statistics, batch, estimator, per_token)
    weighted = entropy_coefficients(statistics, batch, estimator, per_token, torch.ones(5))
    assert torch.equal(plain.entropy, weighted.entropy) and torch.equal(plain.logprob, weighted.logprob)


def test_weights_have_mean_one_and_do_not_overflow() -> None:
    logs = torch.tensor([-2000.0, -2001.0, -1999.0])
    weights = normalized_weights(logs)
    assert weights.dtype == torch.float64
    assert_close(weights, torch.softmax(torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64), 0) * 3, 1e-12, "weights")
    assert_close(normalized_weights(logs + 3000.0), weights, 1e-6, "a constant in the log-weights is a normaliser")
    assert torch.equal(normalized_weights(torch.zeros(4)), torch.ones(4, dtype=torch.float64))


def test_effective_sample_size_by_hand() -> None:
    assert effective_sample_size(torch.ones(7)) == 7.0
    assert effective_sample_size(torch.tensor([0.0, 5.0, 0.0])) == 1.0
    assert effective_sample_size(torch.tensor([1.0, 1.0, 2.0])) == pytest.approx(16 / 6)
    assert effective_sample_size(torch.tensor([0.1, 0.1, 0.2])) == pytest.approx(16 / 6), "the scale must not matter"


def test_the_splits_centre_holds_the_sequence_itself_as_the_measurements_mean_does() -> None:
    """Over all pairs of completions with their probabilities, the score term is half of its expectation: 1 - 1/n at n = 2."""
    policy = RecurrentPolicy(vocabulary=3, seed=1)
    space = enumerate_completions(Task(prompts=((1,),), vocabulary=3, max_completion_length=2))
    batch = whole_space(space)
    statistics = token_statistics(policy, batch)
    chance, sums = statistics.scores().exp(), statistics.entropy_sums()
    assert float(chance.sum()) == pytest.approx(1.0)
    derivative = torch.randn(len(batch), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    derivative -= (chance * derivative).sum()  # as scores have: E[dS] = 0
    found = torch.zeros((), dtype=torch.float64)
    for i in range(len(batch)):
        for j in range(len(batch)):
            pair = torch.tensor([i, j])
            c = entropy_coefficients(statistics.select(pair), batch.select([i, j]), "split", per_token=False)
            found += chance[i] * chance[j] * (c.logprob.amax(1) + c.logprob.amin(1)) @ derivative[pair] / 2
    exact = (chance * (sums - (chance * sums).sum()) * derivative).sum()
    assert float(found) == pytest.approx(0.5 * float(exact), rel=1e-9)

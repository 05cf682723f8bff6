"""Advantages of the entropy to go, the critic behind them and the change by token ratios, against the enumerated policy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.critic import (
    EntropyCritic,
    centred,
    explained_variance,
    hidden_projection,
    prompt_folds,
    token_features,
)
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_core.temporal_differences import entropy_advantages, temporal_difference_advantages
from entropy_core.token_ratios import sequence_sums, token_ratio_change
from tests.entropy_core.support import whole_space
from tests.entropy_core.test_measurement import random_direction, statistics_at
from tests.oracle.comparison import assert_close
from tests.oracle.enumeration import CompletionSpace, ExactPolicy, entropies_along, exact_entropies
from tests.oracle.environment import solve_episodes, talkative, trajectories
from tests.oracle.policy import RecurrentPolicy

EXACT = 1e-10
DECAYS = [0.0, 0.5, 0.9, 1.0]


def prefixes(space: CompletionSpace) -> list[list[tuple[int, ...]]]:
    """The prefix c_k of every token of every completion, prompt number first."""
    index = space.prompt_index.tolist()
    return [[(p, *c[:k]) for k in range(len(c))] for p, c in zip(index, space.completion_ids, strict=True)]


def of_prefixes(space: CompletionSpace, value: dict[tuple[int, ...], float]) -> Tensor:
    out = torch.zeros_like(space.mask)
    for n, row in enumerate(prefixes(space)):
        for k, prefix in enumerate(row):
            out[n, k] = value[prefix]
    return out


def any_values(space: CompletionSpace, seed: int = 1) -> Tensor:
    """A value for each prefix that has nothing to do with the entropy."""
    names = sorted({p for row in prefixes(space) for p in row})
    drawn = torch.randn(len(names), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return of_prefixes(space, dict(zip(names, drawn.tolist(), strict=True)))


def true_values(exact: ExactPolicy) -> Tensor:
    """V*(c_k) = E[G_k | c_k], by summing over all completions with that prefix."""
    to_go = exact.entropy_to_go(exact.token_entropy)
    mass: dict[tuple[int, ...], float] = {}
    sums: dict[tuple[int, ...], float] = {}
    for n, row in enumerate(prefixes(exact.space)):
        for k, prefix in enumerate(row):
            p = float(exact.probabilities[n])
            mass[prefix] = mass.get(prefix, 0.0) + p
            sums[prefix] = sums.get(prefix, 0.0) + p * float(to_go[n, k])
    return of_prefixes(exact.space, {prefix: sums[prefix] / mass[prefix] for prefix in mass})


def gradient(exact: ExactPolicy, advantages: Tensor) -> Tensor:
    """E[sum_k grad H_k + A_k grad log pi_k] / E[T], an exact expectation."""
    rows = exact.entropy_gradients.sum(1) + (advantages[..., None] * exact.logprob_gradients).sum(1)
    return exact.expectation(rows) / exact.mean_length


def advantages_of(exact: ExactPolicy, values: Tensor | None, decay: float, own: bool = True) -> Tensor:
    return entropy_advantages(exact.entropies, exact.space.mask.bool(), exact.token_entropy, values, decay, own)


@pytest.mark.parametrize("own", [True, False], ids=["own", "without own"])
@pytest.mark.parametrize("valued", [True, False], ids=["any V", "no V"])
def test_with_decay_one_any_value_of_the_prefix_gives_the_exact_gradient(
    exact: ExactPolicy, valued: bool, own: bool
) -> None:
    values = any_values(exact.space) if valued else None
    found = gradient(exact, advantages_of(exact, values, 1.0, own))
    assert_close(found, exact.token_entropy_gradient, EXACT, "biased although decay is 1")


@pytest.mark.parametrize("decay", DECAYS)
def test_with_the_true_value_every_decay_is_exact(exact: ExactPolicy, decay: float) -> None:
    found = gradient(exact, advantages_of(exact, true_values(exact), decay))
    assert_close(found, exact.token_entropy_gradient, EXACT, f"biased at decay {decay} with the true value")


@pytest.mark.parametrize("decay", DECAYS)
def test_the_bias_below_one_is_that_of_the_formula(exact: ExactPolicy, decay: float) -> None:
    """(1 - decay) sum_j decay^(j-1) (V - V*)(c_{k+j}), by plain loops."""
    space, wrong = exact.space, any_values(exact.space) - true_values(exact)
    later = torch.zeros_like(space.mask)
    for k in range(space.mask.shape[1]):
        for j in range(1, space.mask.shape[1] - k):
            later[:, k] += (1 - decay) * decay ** (j - 1) * wrong[:, k + j] * space.mask[:, k + j]
    bias = exact.expectation((later[..., None] * exact.logprob_gradients).sum(1)) / exact.mean_length
    found = gradient(exact, advantages_of(exact, any_values(space), decay)) - exact.token_entropy_gradient
    assert float((found - bias).norm()) < EXACT * float(exact.token_entropy_gradient.norm())
    assert decay == 1.0 or float(bias.norm()) > 0.05 * (1 - decay) * float(exact.token_entropy_gradient.norm()), (
        "the test is blind"
    )


def test_a_value_that_sees_the_token_is_seen_by_these_tests(exact: ExactPolicy) -> None:
    leaking = any_values(exact.space) + exact.logprobs
    found = gradient(exact, advantages_of(exact, leaking, 1.0))
    assert float((found - exact.token_entropy_gradient).norm()) > 0.05 * float(exact.token_entropy_gradient.norm())


def test_foreign_tokens_are_passed_over() -> None:
    generator = torch.Generator().manual_seed(2)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1], [1, 1, 0, 1, 0, 0, 0, 0]]).bool()
    rewards, values = torch.randn(2, 2, 8, generator=generator, dtype=torch.float64)
    found = temporal_difference_advantages(rewards, mask, values, 0.7)
    for n in range(2):
        own = mask[n]
        alone = temporal_difference_advantages(
            rewards[n, own][None], torch.ones(1, int(own.sum())).bool(), values[n, own][None], 0.7
        )
        assert_close(found[n, own], alone[0], EXACT, "a foreign token counts")
        assert not found[n, ~own].any()


def test_a_decay_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match="decay"):
        temporal_difference_advantages(torch.zeros(1, 1), torch.ones(1, 1).bool(), None, 1.1)


# --- the change by token ratios ------------------------------------------------------------------------------


def batch_values(space: CompletionSpace, batch: SequenceBatch, entropy: Tensor, length: Tensor) -> Tensor:
    """(n, T) values of the space as (N, L, 2) of its batch."""
    out = torch.zeros((*batch.input_ids.shape, 2), dtype=torch.float64)
    kept = space.mask.bool()
    out[batch.completion_mask] = torch.stack([entropy[kept], length[kept]], 1)
    return out


@pytest.mark.parametrize("valued", [True, False], ids=["any V", "no V"])
def test_the_change_by_token_ratios_is_exact_to_first_order(
    policy: RecurrentPolicy, exact: ExactPolicy, space: CompletionSpace, valued: bool
) -> None:
    batch, direction = whole_space(space), random_direction(policy)
    values = batch_values(space, batch, any_values(space), any_values(space, 5)) if valued else None
    start = token_statistics(policy, batch)
    off = []
    for scale in (0.02, 0.01):
        moved = statistics_at(policy, batch, direction, scale)
        found = token_ratio_change(start, moved, batch, values, 1.0, exact.probabilities.log())
        truth = entropies_along(policy, space, direction, scale)[1] - exact.token_entropy
        off.append(abs(found.change - truth))
        assert off[-1] < 0.1 * abs(truth)
    assert 3 < off[0] / off[1] < 5, "what is left over is not of second order"


def test_centring_and_the_length_after_the_step_are_in_it(
    policy: RecurrentPolicy, exact: ExactPolicy, space: CompletionSpace
) -> None:
    batch, direction, scale = whole_space(space), random_direction(policy), 1e-3
    start, moved = token_statistics(policy, batch), statistics_at(policy, batch, direction, scale)
    values = batch_values(space, batch, any_values(space), any_values(space, 5))
    weights = exact.probabilities / exact.probabilities.sum()
    entropy, tokens, fixed, ratio, length = (weights @ sequence_sums(start, moved, batch, values, 1.0)).tolist()
    after = {name: p.detach() + scale * direction[name] for name, p in policy.named_parameters()}
    mean_length = float(exact_entropies(policy, space, parameters=after)[2])
    assert length == pytest.approx(mean_length - tokens, rel=1e-2) and abs(length) > 1e-6
    truth = entropies_along(policy, space, direction, scale)[1] - exact.token_entropy
    found = token_ratio_change(start, moved, batch, values, 1.0, exact.probabilities.log()).change
    assert found == pytest.approx(truth, rel=1e-2)
    assert found == pytest.approx((entropy + fixed + ratio) / (tokens + length) - entropy / tokens, rel=1e-6)
    assert abs((fixed + ratio) / tokens - truth) > 0.05 * abs(truth), "the test is blind to centring"


def test_the_change_beside_an_environment_is_that_of_drawn_tokens(policy: RecurrentPolicy) -> None:
    episodes = trajectories([[1], [2, 3]], talkative, vocabulary=4, max_drawn=3)
    batch = SequenceBatch.from_sequences(
        [t.prompt for t in episodes], [t.completion for t in episodes], [t.prompt_index for t in episodes], 0,
        drawn=[t.drawn for t in episodes],
    )  # fmt: skip
    solved = solve_episodes(policy, episodes)
    direction, scale = random_direction(policy), 1e-4
    gradients = torch.autograd.grad(solved.token_entropy, list(policy.parameters()))
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction.values(), strict=True))
    start, moved = token_statistics(policy, batch), statistics_at(policy, batch, direction, scale)
    found = token_ratio_change(start, moved, batch, None, 1.0, solved.probabilities.detach().log())
    assert found.change == pytest.approx(scale * slope, rel=1e-2)
    assert abs(found.fixed_prefix - scale * slope) > 0.05 * abs(scale * slope), "the test is blind to ratios"


def test_its_error_is_that_of_leaving_prompts_out(policy: RecurrentPolicy, space: CompletionSpace) -> None:
    chosen = torch.arange(0, len(space.tokens), 3).tolist()
    batch = whole_space(space).select(chosen)
    start, moved = token_statistics(policy, batch), statistics_at(policy, batch, random_direction(policy), 0.05)
    weights = torch.randn(len(batch), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.randn((*batch.input_ids.shape, 2), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = token_ratio_change(start, moved, batch, values, 0.5, weights)
    by_hand = []
    for prompt in batch.prompt_index.unique():
        rows = (batch.prompt_index != prompt).nonzero()[:, 0]
        parts = (start.select(rows), moved.select(rows), batch.select(rows), values[rows], 0.5, weights[rows])
        by_hand.append(token_ratio_change(*parts).change)
    assert_close(found.left_out, torch.tensor(by_hand, dtype=torch.float64), EXACT, "left-out values")
    n = len(by_hand)
    spread = torch.tensor(by_hand, dtype=torch.float64)
    assert found.standard_error == pytest.approx(float(((n - 1) / n * (spread - spread.mean()).square().sum()).sqrt()))


def test_a_log_probability_that_is_not_finite_is_named(policy: RecurrentPolicy, space: CompletionSpace) -> None:
    batch = whole_space(space).select([0, 5])
    start = token_statistics(policy, batch)
    broken = start.logprobs.clone()
    broken[1, int(batch.completion_mask[1].long().argmax())] = float("-inf")
    with pytest.raises(ValueError, match="sequence 1"):
        token_ratio_change(start, TokenStatistics(broken, start.entropies), batch)


# --- the critic ----------------------------------------------------------------------------------------------


def drawn_batch(seed: int, prompts: int = 12, each: int = 3) -> tuple[SequenceBatch, TokenStatistics, Tensor]:
    """Completions of random lengths whose entropies hang on a number in their hidden state; (N, L, 4) of these."""
    generator = torch.Generator().manual_seed(seed)
    heads = [[7, 100 * seed + p, 3] for p in range(prompts) for _ in range(each)]
    lengths = torch.randint(2, 9, (len(heads),), generator=generator).tolist()
    batch = SequenceBatch.from_sequences(heads, [[1] * n for n in lengths], [i // each for i in range(len(heads))], 0)
    state = torch.randn((*batch.input_ids.shape, 4), generator=generator, dtype=torch.float64).cumsum(1)
    noise = torch.randn(batch.input_ids.shape, generator=generator, dtype=torch.float64)
    entropies = (1.0 + state[..., 0] + 0.1 * noise) * batch.completion_mask
    return batch, TokenStatistics(entropies, entropies), state


def fed(critic: EntropyCritic, seed: int) -> tuple[Tensor, Tensor, SequenceBatch, Tensor]:
    batch, statistics, state = drawn_batch(seed)
    features = token_features(statistics.entropies, batch.completion_mask, state)
    fold = prompt_folds(batch, critic.folds)
    critic.observe(features, statistics.entropies, batch.completion_mask, fold)
    return features, fold, batch, statistics.entropies


def test_the_critic_is_the_ridge_regression_on_other_folds() -> None:
    critic = EntropyCritic(6, folds=3, keep=1.0, ridge=0.2)
    parts = [fed(critic, seed) for seed in range(2)]
    features, fold, batch, _ = parts[-1]
    found = critic.values(features, batch.completion_mask, fold)
    for f in fold.unique().tolist():
        rows, targets = [], []
        for phi, of, b, entropies in parts:
            for n in (of != f).nonzero()[:, 0].tolist():
                own = b.completion_mask[n]
                rows.append(phi[n, own])
                h, count = entropies[n, own], int(own.sum())
                targets += [[float(h[k:].sum()), count - k] for k in range(count)]
        x, y = torch.cat(rows), torch.tensor(targets, dtype=torch.float64)
        z = (x - x.mean(0)) / x.std(0, correction=0)
        penalised = torch.cat([z, (0.2 * len(z)) ** 0.5 * torch.eye(6, dtype=torch.float64)])
        slopes = torch.linalg.lstsq(
            penalised, torch.cat([y - y.mean(0), torch.zeros(6, 2, dtype=torch.float64)])
        ).solution
        for n in (fold == f).nonzero()[:, 0].tolist():
            own = batch.completion_mask[n]
            wanted = (features[n, own] - x.mean(0)) / x.std(0, correction=0) @ slopes + y.mean(0)
            assert_close(found[n, own], wanted, 1e-8, "not the ridge regression on the other folds")


def test_the_critic_explains_what_can_be_known() -> None:
    critic = EntropyCritic(6, keep=1.0, ridge=0.01)
    for seed in range(4):
        features, fold, batch, entropies = fed(critic, seed)
    values = centred(critic.values(features, batch.completion_mask, fold), 1.0)
    assert explained_variance(values, entropies, batch.completion_mask, 1.0) > 0.3


def test_no_completion_of_a_prompt_is_in_its_own_value() -> None:
    """Whatever a prompt's completions are, now and in an earlier step, their values stay, and those of others move."""
    found = []
    for changed in (False, True):
        critic = EntropyCritic(6, folds=4, keep=0.9)
        for _ in range(2):  # the same sequences twice, as where they are trained on again
            batch, statistics, state = drawn_batch(0)
            fold = prompt_folds(batch, 4)
            features = token_features(statistics.entropies, batch.completion_mask, state)
            own = (batch.prompt_index == 0)[:, None] & batch.completion_mask
            targets = (
                torch.where(own, statistics.entropies + 5.0, statistics.entropies) if changed else statistics.entropies
            )
            critic.observe(features, targets, batch.completion_mask, fold)
        found.append(critic.values(features, batch.completion_mask, fold))
    same = fold == fold[0]
    assert bool((batch.prompt_index[same] != 0).any()) and not bool(same.all())
    torch.testing.assert_close(found[0][same], found[1][same], rtol=0, atol=0)
    assert not torch.allclose(found[0][~same], found[1][~same])


def test_a_prompt_has_one_fold_in_every_batch() -> None:
    batch, _, _ = drawn_batch(3)
    fold = prompt_folds(batch, 4)
    assert len(fold.unique()) > 1
    for prompt in batch.prompt_index.unique():
        assert len(fold[batch.prompt_index == prompt].unique()) == 1
    shuffled = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    again = SequenceBatch.from_sequences(  # laid out otherwise, numbered otherwise, beside a longer prompt
        [[7, 300 + int(batch.prompt_index[n]), 3] for n in shuffled] + [[9] * 30],
        [[1, 1]] * (len(batch) + 1),
        [*(99 - batch.prompt_index[shuffled]).tolist(), 500],
        0,
    )
    assert torch.equal(prompt_folds(again, 4)[:-1], fold[shuffled])


def test_a_critic_without_other_prompts_says_nothing() -> None:
    critic = EntropyCritic(6)
    batch, statistics, state = drawn_batch(0, prompts=1)
    features, fold = token_features(statistics.entropies, batch.completion_mask, state), prompt_folds(batch, 4)
    critic.observe(features, statistics.entropies, batch.completion_mask, fold)
    assert not critic.values(features, batch.completion_mask, fold).any()
    assert critic.tokens == float(batch.completion_mask.sum())


def test_the_critic_forgets_per_step() -> None:
    forgetful, fresh = EntropyCritic(6, keep=0.5), EntropyCritic(6, keep=0.5)
    batch, statistics, state = drawn_batch(0)
    features, fold = token_features(statistics.entropies, batch.completion_mask, state), prompt_folds(batch, 4)
    fed(forgetful, 1)
    held = forgetful.tokens
    forgetful.observe(features, statistics.entropies, batch.completion_mask, fold, steps=3)
    fresh.observe(features, statistics.entropies, batch.completion_mask, fold)
    assert forgetful.tokens == pytest.approx(0.5**3 * held + fresh.tokens)


def test_the_scale_of_a_feature_does_not_matter() -> None:
    found = []
    for scale in (1.0, 1e4):
        critic = EntropyCritic(6, keep=1.0)
        batch, statistics, state = drawn_batch(0)
        features = token_features(statistics.entropies, batch.completion_mask, state * scale + 3 * scale)
        fold = prompt_folds(batch, 4)
        critic.observe(features, statistics.entropies, batch.completion_mask, fold)
        found.append(critic.values(features, batch.completion_mask, fold))
    assert_close(found[0], found[1], 1e-6, "the scale of a hidden state changes the critic")


def test_a_critic_goes_on_from_its_state_and_refuses_another() -> None:
    critic, other = EntropyCritic(6), EntropyCritic(6)
    features, fold, batch, _ = fed(critic, 0)
    other.load(critic.state())
    args = (features, batch.completion_mask, fold)
    torch.testing.assert_close(other.values(*args), critic.values(*args), rtol=0, atol=0)
    broken = critic.state()["sums"].clone()
    broken[0, 0, 0] = float("nan")
    for bad in ({}, {"sums": torch.zeros(2, 2)}, {"sums": broken}, {"sums": -critic.state()["sums"]}, {"sums": "x"}):
        with pytest.raises(ValueError, match="critic"):
            other.load(bad)


def test_the_projection_is_one_and_the_same() -> None:
    torch.manual_seed(5)
    assert torch.equal(hidden_projection(48), hidden_projection(48)) and hidden_projection(48).shape == (48, 64)
    lengths = (torch.ones(1, 480) @ hidden_projection(480)).square().mean()
    assert float(lengths) == pytest.approx(1.0, rel=0.5)

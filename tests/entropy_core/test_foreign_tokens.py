"""Tokens that the policy did not draw (tool results, user turns): conditioned on, never scored.

First against an exact enumeration of a policy that talks with an environment, which answers by rule and by chance; then every
way through the library against one sequence at a time.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.directional import sequence_derivatives, token_derivatives, weights_moved
from entropy_core.entropy import TokenCoefficients, entropy_coefficients, entropy_estimate, score_coefficients
from entropy_core.fold_gradients import fold_gradients, shared_statistics
from entropy_core.gradients import batch_gradients, per_sequence_gradients
from entropy_core.kernel import compute_cross_fisher_kernel
from entropy_core.measurement import snis_entropy_change
from entropy_core.passes.settings import PassSettings
from entropy_core.passes.shared_prefix import common_prefix_buckets, shared_prefix_buckets, shares_prefixes
from entropy_core.scores import token_statistics
from tests.oracle.comparison import assert_close, assert_named_close
from tests.oracle.enumeration import fisher_kernel, flatten, flatten_rows, unflatten
from tests.oracle.environment import drawn_terms, solve_episodes, talkative, trajectories
from tests.oracle.model_cases import CASES, PAD_TOKEN, VOCABULARY, ModelCase, parameters_of
from tests.oracle.policy import RecurrentPolicy

EXACT = 1e-10
EPISODES = trajectories([[1], [2, 3]], talkative, vocabulary=4, max_drawn=3)
KINDS = ("llama_tied_lora", "qwen2_biases", "gpt2_conv1d_tied", "recurrent_policy")


def everything(batch: SequenceBatch) -> SequenceBatch:
    """The mistake: foreign tokens taken for drawn ones."""
    mask = batch.attention_mask & ~batch.prompt_mask
    return SequenceBatch(batch.input_ids, batch.attention_mask, mask, batch.prompt_index, batch.temperature)


@pytest.fixture(scope="module")
def episodes() -> SequenceBatch:
    assert any(not t.drawn[-1] for t in EPISODES) and any(t.chance < 1 for t in EPISODES), "the test is blind"
    return SequenceBatch.from_sequences(
        [t.prompt for t in EPISODES],
        [t.completion for t in EPISODES],
        [t.prompt_index for t in EPISODES],
        PAD_TOKEN,
        drawn=[t.drawn for t in EPISODES],
    )


def gradient(model: nn.Module, batch: SequenceBatch, weights: Tensor, estimator: str, per_token: bool) -> Tensor:
    c = entropy_coefficients(token_statistics(model, batch), batch, estimator, per_token, weights)
    return flatten(batch_gradients(model, batch, [c.scaled(1 / len(batch))])[0])


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
@pytest.mark.parametrize("estimator", ["rao_blackwell", "split"])
def test_estimators_are_the_exact_gradient_beside_an_environment(
    policy: RecurrentPolicy, episodes: SequenceBatch, estimator: str, per_token: bool
) -> None:
    exact = solve_episodes(policy, EPISODES)
    assert_close(exact.probabilities.sum(), 1.0, 1e-12, "the enumeration has gaps")
    assert_close(exact.expected_token_entropies, exact.entropy, 1e-12, "−E[S] = E[Σ_k H_k] over drawn tokens")
    target = exact.token_entropy if per_token else exact.entropy
    wanted = flatten(
        dict(zip(parameters_of(policy), torch.autograd.grad(target, list(policy.parameters())), strict=True))
    )
    weights = exact.probabilities.detach() * len(EPISODES)
    scored = gradient(policy, everything(episodes), weights, estimator, per_token)
    found = gradient(policy, episodes, weights, estimator, per_token)
    assert_close(found, wanted, EXACT, "not the gradient of H", {"foreign tokens are scored": scored, "sign": -wanted})


def test_score_function_and_values_beside_an_environment(policy: RecurrentPolicy, episodes: SequenceBatch) -> None:
    exact, statistics = solve_episodes(policy, EPISODES), token_statistics(policy, episodes)
    probabilities = exact.probabilities.detach()
    sums, lengths = statistics.entropy_sums(), episodes.completion_lengths.double()
    h = float((probabilities * sums).sum() / (probabilities * lengths).sum())
    assert_close(h, exact.token_entropy, EXACT, "h over drawn tokens")
    assert_close((probabilities * lengths).sum(), exact.mean_length, EXACT, "T counts foreign tokens")
    values = -probabilities * (statistics.scores() + h * lengths) / float(exact.mean_length.detach())
    found = batch_gradients(policy, episodes, [score_coefficients(episodes, values)])[0]
    wanted = torch.autograd.grad(exact.token_entropy, list(policy.parameters()))
    assert_close(flatten(found), torch.cat([g.flatten() for g in wanted]), EXACT, "−E[(S + hT) ∇S] / E[T]")
    plain = entropy_estimate(statistics, episodes)
    assert plain.per_token == pytest.approx(float(sums.sum() / lengths.sum()))


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_ratios_are_over_drawn_tokens_alone(policy: RecurrentPolicy, episodes: SequenceBatch, scale: float) -> None:
    """The environment's own probabilities cancel, so that reweighting the whole distribution is exact."""
    generator = torch.Generator().manual_seed(1)
    direction = {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in parameters_of(policy).items()
    }
    before, exact = token_statistics(policy, episodes), solve_episodes(policy, EPISODES)
    wrong = everything(episodes)
    wrong_before = token_statistics(policy, wrong)
    with weights_moved(policy, direction, scale):
        after, moved = token_statistics(policy, episodes), solve_episodes(policy, EPISODES)
        wrong_after = token_statistics(policy, wrong)
    wanted = float((moved.token_entropy - exact.token_entropy).detach())
    log_weights = exact.probabilities.detach().log()
    found = snis_entropy_change(before, after, episodes, log_weights=log_weights)
    mistake = snis_entropy_change(wrong_before, wrong_after, wrong, log_weights=log_weights)
    assert_close(found.change, wanted, EXACT, "not h(θ') − h(θ)", {"foreign tokens in the ratio": mistake.change})


def test_layouts_and_errors() -> None:
    drawn = [[True, False, False, True, False], None]
    batch = SequenceBatch.from_sequences([[7, 8], [9]], [[1, 2, 3, 4, 5], [1, 2]], [0, 1], 0, drawn=drawn)
    assert batch.completion_lengths.tolist() == [2, 2] and batch.prompt_mask.sum(1).tolist() == [2, 1]
    assert batch.scored_lengths.tolist() == [6, 3], "the trailing foreign token predicts nothing"
    (bucket,) = length_buckets(batch)
    assert bucket.input_ids.shape == (2, 5) and 5 not in bucket.input_ids
    assert sorted(bucket.targets.tolist()) == [1, 1, 2, 4]
    assert left_padded(batch).scored_lengths.tolist() == [6, 3], "padding on the left counts for nothing"
    for bad in ([[True] * 4, None], [[False] * 5, None], [None]):
        with pytest.raises(ValueError):
            SequenceBatch.from_sequences([[7, 8], [9]], [[1, 2, 3, 4, 5], [1, 2]], [0, 1], 0, drawn=bad)


# ---------------------------------------------------------------- every way through the library
def several_runs(vocabulary: int) -> tuple[list[list[int]], list[list[int]], list[int], list[list[bool]]]:
    """Two prompts with three completions each, in one to three runs; some begin or end with a foreign token."""
    generator = torch.Generator().manual_seed(11)

    def draw(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    masks = ["1101", "10011", "1", "110010", "0110", "101100"]
    prompts, index = [draw(5), draw(3)], [0, 1, 0, 1, 1, 0]
    return [prompts[i] for i in index], [draw(len(m)) for m in masks], index, [[c == "1" for c in m] for m in masks]


def left_padded(batch: SequenceBatch) -> SequenceBatch:
    width = batch.input_ids.shape[1]
    shifts = (width - batch.attention_mask.sum(1)).tolist()
    parts = [
        torch.stack([row.roll(shift) for row, shift in zip(tensor, shifts, strict=True)])
        for tensor in (batch.input_ids, batch.attention_mask, batch.completion_mask)
    ]
    return SequenceBatch(*parts, batch.prompt_index, batch.temperature)


@pytest.fixture(scope="module", params=[c for c in CASES if c.name in KINDS], ids=lambda c: c.name)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, SequenceBatch, list]:
    """The model, the batch, and of each sequence (logprobs, entropies, ∇S) found alone."""
    kind: ModelCase = request.param
    model, lists = kind.make(), several_runs(min(kind.vocabulary, VOCABULARY))
    batch = SequenceBatch.from_sequences(*lists[:3], PAD_TOKEN, 0.8, lists[3])
    found = []
    for prompt, completion, _, drawn in zip(*lists, strict=True):
        logprobs, entropies = drawn_terms(model, prompt, completion, drawn, 0.8)
        rows = torch.autograd.grad(logprobs.sum(), list(parameters_of(model).values()), allow_unused=True)
        row = {
            n: torch.zeros_like(p) if r is None else r
            for (n, p), r in zip(parameters_of(model).items(), rows, strict=True)
        }
        found.append((logprobs.detach(), entropies.detach(), row))
    return model, batch, found


def test_statistics_in_every_layout(case) -> None:
    model, batch, found = case
    wanted = torch.cat([torch.stack(f[:2]) for f in found], 1)
    kinds = [length_buckets, shared_prefix_buckets, lambda b: shared_prefix_buckets(b, 14), common_prefix_buckets]
    for layout in (batch, left_padded(batch)):
        plain = token_statistics(model, layout, passes=PassSettings(20))
        assert_close(
            torch.stack([plain.logprobs, plain.entropies])[:, layout.completion_mask], wanted, EXACT, "buckets"
        )
        assert not bool(plain.logprobs[~layout.completion_mask].any()), "a foreign token is scored"
    if not isinstance(model, RecurrentPolicy):
        assert shares_prefixes(model, batch)
        for buckets in kinds:
            s = shared_statistics(model, batch, buckets)
            assert_close(torch.stack([s.logprobs, s.entropies])[:, batch.completion_mask], wanted, EXACT, "shared rows")


def test_rows_products_and_folds(case) -> None:
    model, batch, found = case
    names = list(parameters_of(model))
    rows = {name: torch.stack([f[2][name] for f in found]) for name in names}
    for layout in (batch, left_padded(batch)):
        assert_named_close(per_sequence_gradients(model, layout, passes=PassSettings(20)), rows, 1e-9, "rows of ∇S")
    flat = flatten_rows(rows)
    like = {name: parameters_of(model)[name].detach() for name in names}
    direction = unflatten(flat[0] - 2 * flat[3], like)
    along = flatten(direction)
    assert_close(sequence_derivatives(model, batch, direction).sequences, flat @ along, 1e-9, "<∇S, u>")
    central = token_derivatives(model, batch, direction, method="central").scores()
    assert_close(central, flat @ along, 1e-6, "central differences of S")
    kernel = compute_cross_fisher_kernel(model, batch.select([0, 1, 2]), batch.select([3, 4, 5]))
    assert_close(kernel, fisher_kernel(flat[:3], flat[3:]), 1e-6, "K1, kept in float32")
    buckets = length_buckets if isinstance(model, RecurrentPolicy) else shared_prefix_buckets

    def objectives(_statistics: object) -> list[TokenCoefficients]:
        return [score_coefficients(batch)]

    (folds,), _ = fold_gradients(model, batch, objectives, buckets, folds=2)
    by_prompt = torch.stack([flat[batch.prompt_index == p].sum(0) for p in (0, 1)]) / len(batch)
    assert_close(flatten_rows({n: folds.folds[n] for n in names}), by_prompt, 1e-9, "folds of ∇S")

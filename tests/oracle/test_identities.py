"""The identities of theory sections 1, 2, 4, 6 and 7, by exact enumeration in float64, to 1e-10.

No code under test runs here: these tests say that the formulas are right, so that the others need only show
that `entropy_core` computes them.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.oracle.comparison import assert_close, cosine, relative_error
from tests.oracle.enumeration import (
    CompletionSpace,
    ExactPolicy,
    detached_parameters,
    entropies_along,
    enumerate_completions,
    fisher_kernel,
    flatten,
    solve,
    token_terms,
    unflatten,
)
from tests.oracle.policy import DYADIC_TASK, RECURRENT_TASK, DyadicPolicy, RecurrentPolicy

EXACT = 1e-10
"""float64 sums of a few thousand terms round at 1e-13; the rest is room."""


@pytest.fixture(scope="module")
def policy() -> RecurrentPolicy:
    return RecurrentPolicy()


@pytest.fixture(scope="module")
def space() -> CompletionSpace:
    return enumerate_completions(RECURRENT_TASK)


@pytest.fixture(scope="module", params=[1.0, 0.7], ids=["tau1", "tau0.7"])
def exact(request: pytest.FixtureRequest, policy: RecurrentPolicy, space: CompletionSpace) -> ExactPolicy:
    return solve(policy, space, request.param)


def per_prompt_mean(exact: ExactPolicy, values: torch.Tensor) -> torch.Tensor:
    """E[values | p], spread back over the rows."""
    index = exact.space.prompt_index
    sums = torch.zeros(exact.space.prompts, dtype=torch.float64).index_add(0, index, exact.probabilities * values)
    return (sums * exact.space.prompts)[index]


def positive_preconditioner(size: int) -> torch.Tensor:
    """A diagonal over three decades, the spread of a real AdamW state."""
    return 10.0 ** (3 * torch.rand(size, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 1)


# --- section 1: policy, scores, entropy ---------------------------------------------------------------------


def test_every_completion_is_enumerated_once(space: CompletionSpace) -> None:
    keys = {(int(p), tuple(c)) for p, c in zip(space.prompt_index, space.completion_ids, strict=True)}
    per_prompt = sum(3**length for length in range(3)) + 3**3 * 4
    assert len(keys) == len(space.completion_ids) == 3 * per_prompt


def test_the_cut_process_is_a_distribution(exact: ExactPolicy) -> None:
    totals = torch.zeros(exact.space.prompts, dtype=torch.float64)
    totals.index_add_(0, exact.space.prompt_index, exact.probabilities * exact.space.prompts)
    assert_close(totals, torch.ones_like(totals), EXACT, "completions are missing or counted twice")


def test_score_gradient_has_mean_zero(exact: ExactPolicy) -> None:
    size = exact.expectation(exact.score_rows.abs()).norm()
    assert exact.expectation(exact.score_rows).norm() / size < EXACT, "E[∇S] ≠ 0: the enumeration is not normalised"


def test_surprisal_and_token_entropies_have_one_mean(exact: ExactPolicy) -> None:
    assert_close(-exact.expectation(exact.scores), exact.sequence_entropy, EXACT, "H is not −E[S]")
    summed = exact.expectation(exact.entropies.sum(1))
    assert_close(summed, exact.sequence_entropy, EXACT, "E[Σ_k H_k] is not H: wrong positions or temperature")


def test_token_entropy_is_a_ratio_of_means(exact: ExactPolicy) -> None:
    summed, lengths = exact.entropies.sum(1), exact.space.lengths
    ratio = exact.expectation(summed) / exact.expectation(lengths)
    mean_of_ratios = exact.expectation(summed / lengths)
    assert_close(ratio, exact.token_entropy, EXACT, "h is E[ΣH]/E[T]", suspects={"mean of ratios": mean_of_ratios})


# --- section 2: the gradient of the entropy -----------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["none", "global", "per_prompt"])
def test_score_function_gradient(exact: ExactPolicy, baseline: str) -> None:
    zero = torch.zeros_like(exact.scores)
    centre = {
        "none": zero,
        "global": zero + exact.expectation(exact.scores),
        "per_prompt": per_prompt_mean(exact, exact.scores),
    }[baseline]
    gradient = -exact.expectation((exact.scores - centre)[:, None] * exact.score_rows)
    assert_close(gradient, exact.sequence_entropy_gradient, EXACT, "∇H = −E[(S − b) ∇S] fails: sign or baseline")


@pytest.mark.parametrize("own_entropy", [True, False], ids=["with_H_k", "without_H_k"])
def test_rao_blackwell_gradient(exact: ExactPolicy, own_entropy: bool) -> None:
    gradient = exact.expectation(exact.rao_blackwell_rows(own_entropy=own_entropy))
    assert_close(gradient, exact.sequence_entropy_gradient, EXACT, "the entropy to go starts at the wrong token")


@pytest.mark.parametrize("own_entropy", [True, False], ids=["with_H_k", "without_H_k"])
def test_token_entropy_gradient_centres_the_entropy_to_go(exact: ExactPolicy, own_entropy: bool) -> None:
    rows = exact.rao_blackwell_rows(centre=exact.token_entropy, own_entropy=own_entropy)
    if not own_entropy:
        # Only H_k may be dropped from G̃_k: the −h of token k is a function of nothing but also has mean zero.
        assert relative_error(exact.expectation(rows), exact.mean_length * exact.token_entropy_gradient) < EXACT
        return
    uncentred = exact.expectation(exact.rao_blackwell_rows()) / exact.mean_length
    assert_close(
        exact.expectation(rows) / exact.mean_length,
        exact.token_entropy_gradient,
        EXACT,
        "E[T] ∇h is not the centred Rao–Blackwell form",
        suspects={"the entropy to go is not centred by h (the denominator's gradient is lost)": uncentred},
    )


def test_leaving_out_the_centring_is_wrong(exact: ExactPolicy) -> None:
    uncentred = exact.expectation(exact.rao_blackwell_rows()) / exact.mean_length
    assert relative_error(uncentred, exact.token_entropy_gradient) > 0.1


def test_fixed_prefix_is_another_estimand(exact: ExactPolicy) -> None:
    fixed = exact.expectation(exact.entropy_gradients.sum(1))
    assert relative_error(fixed, exact.sequence_entropy_gradient) > 0.2
    assert cosine(fixed, exact.sequence_entropy_gradient) < 0.97


def test_split_form(exact: ExactPolicy) -> None:
    weight = exact.entropies.sum(1) - exact.token_entropy * exact.space.lengths
    gradient = exact.expectation(exact.entropy_gradients.sum(1) + weight[:, None] * exact.score_rows)
    assert_close(gradient / exact.mean_length, exact.token_entropy_gradient, EXACT, "the split form fails")
    whole = exact.expectation(exact.entropy_gradients.sum(1) + exact.entropies.sum(1)[:, None] * exact.score_rows)
    assert_close(whole, exact.sequence_entropy_gradient, EXACT, "the split form per completion fails")


# --- section 4: the Fisher kernel ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel_side(exact: ExactPolicy) -> tuple[torch.Tensor, torch.Tensor]:
    """Training rows (a handful of completions) and a preconditioner."""
    chosen = torch.arange(0, len(exact.scores), 29)
    return exact.score_rows[chosen], positive_preconditioner(exact.score_rows.shape[1])


def test_kernel_forms_of_the_entropy_change(exact: ExactPolicy, kernel_side) -> None:
    train_rows, preconditioner = kernel_side
    wanted = train_rows @ (preconditioner * exact.sequence_entropy_gradient)
    score_kernel = fisher_kernel(exact.score_rows, train_rows, preconditioner)
    centred = exact.scores - exact.expectation(exact.scores)
    assert_close(
        -exact.expectation(centred[:, None] * score_kernel),
        wanted,
        EXACT,
        "−E[(S − S̄) K₁] is not ⟨∇H, P ∇S_i⟩",
    )
    entropy_kernel = fisher_kernel(exact.rao_blackwell_rows(), train_rows, preconditioner)
    assert_close(
        exact.expectation(entropy_kernel),
        wanted,
        EXACT,
        "E[K_H] is not ⟨∇H, P ∇S_i⟩",
        suspects={
            "P on both sides": exact.expectation(
                fisher_kernel(exact.rao_blackwell_rows(), train_rows, preconditioner**2)
            ),
            "P left out": exact.expectation(fisher_kernel(exact.rao_blackwell_rows(), train_rows)),
        },
    )


def test_kernel_of_equal_sides_is_symmetric_and_positive(exact: ExactPolicy, kernel_side) -> None:
    rows, preconditioner = kernel_side
    kernel = fisher_kernel(rows, rows, preconditioner)
    assert relative_error(kernel.T, kernel) < EXACT
    eigenvalues = torch.linalg.eigvalsh(kernel)
    assert eigenvalues.min() > -1e-12 * eigenvalues.max()


def test_first_order_is_the_slope_and_its_error_halves(policy, space, exact: ExactPolicy) -> None:
    """δH/ΔH → 1 and |δH/ΔH − 1| halves with the step: a second-order remainder and nothing else."""
    temperature = 1.0
    exact = solve(policy, space, temperature)
    parameters = detached_parameters(policy)
    generator = torch.Generator().manual_seed(11)
    direction = torch.randn(exact.score_rows.shape[1], generator=generator, dtype=torch.float64)
    named = unflatten(direction / direction.norm(), parameters)
    start = (exact.sequence_entropy, exact.token_entropy)
    for which, gradient in enumerate((exact.sequence_entropy_gradient, exact.token_entropy_gradient)):
        slope = float(gradient @ flatten(named))
        errors = []
        for scale in (2.0**-6, 2.0**-7, 2.0**-8):
            change = entropies_along(policy, space, named, scale, temperature)[which] - start[which]
            errors.append(abs(scale * slope / change - 1))
        assert errors[-1] < 0.02, f"first order over actual is off by {errors[-1]:.1e} at the smallest step"
        for larger, smaller in itertools.pairwise(errors):
            assert 1.8 < larger / smaller < 2.2, f"the error does not halve with the step: {errors}"


# --- sections 6 and 7: double sampling, reweighting ---------------------------------------------------------


def test_u_statistic_removes_the_diagonal() -> None:
    """Over all draws of B = 3 from a five-point law of correlated (X, Y), E[U] = E[X]·E[Y]; the plain product
    is biased."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    y = x + 0.3 * torch.randn(5, 2, generator=generator, dtype=torch.float64)
    wanted = float(x.mean(0) @ y.mean(0))
    unbiased, plain = [], []
    for draw in itertools.product(range(5), repeat=3):
        xs, ys = x[list(draw)], y[list(draw)]
        product = float(xs.mean(0) @ ys.mean(0))
        plain.append(product)
        unbiased.append(3 / 2 * product - float((xs * ys).sum()) / (3 * 2))
    assert_close(sum(unbiased) / len(unbiased), wanted, EXACT, "the U-statistic is biased")
    assert relative_error(sum(plain) / len(plain), wanted) > 0.1


def test_reweighting_the_whole_space_is_exact(policy, space) -> None:
    """Σ π ω ΣH(θ') / Σ π ω T with ω = exp(S' − S) is h(θ') itself: no sampling error is left to blame."""
    exact = solve(policy, space)
    parameters = detached_parameters(policy)
    generator = torch.Generator().manual_seed(1)
    direction = {n: torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in parameters.items()}
    moved = {name: value + 0.05 * direction[name] for name, value in parameters.items()}
    with torch.no_grad():
        logprobs, entropies = token_terms(policy, space, 1.0, moved)
    ratio = (logprobs.sum(1) - exact.scores).exp()
    reweighted = exact.expectation(ratio * entropies.sum(1)) / exact.expectation(ratio * space.lengths)
    wanted = entropies_along(policy, space, direction, 0.05)[1]
    assert_close(reweighted, wanted, EXACT, "the importance ratio is wrong")


def test_the_dyadic_policy_is_a_finite_batch() -> None:
    """Every probability is a whole multiple of 1/512 (of a prompt): 1024 rows are the distribution itself."""
    space = enumerate_completions(DYADIC_TASK)
    exact = solve(DyadicPolicy(), space)
    copies = exact.probabilities * space.prompts * 512
    assert_close(copies.round(), copies, 1e-12, "the dyadic policy is not dyadic")
    assert int(copies.round().sum()) == 1024
    assert cosine(exact.sequence_entropy_gradient, exact.token_entropy_gradient) < 0.999

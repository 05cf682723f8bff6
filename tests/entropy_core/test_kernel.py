"""The cross Fisher kernel against an explicit loop over pairs of one-sequence gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from entropy_core import kernel as kernel_module
from entropy_core.adamw import AdamWParameterState, split_adamw_update
from entropy_core.entropy import ESTIMATORS
from entropy_core.gradients import dot, entropy_gradient, per_sequence_gradients
from entropy_core.kernel import compute_cross_fisher_kernel, compute_kernels
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import token_statistics
from entropy_core.weighting import sequence_weights
from tests.entropy_core.support import left_padded, right_padded
from tests.oracle import brute_force
from tests.oracle.comparison import assert_close
from tests.oracle.enumeration import fisher_kernel, flatten, flatten_rows, unflatten
from tests.oracle.model_cases import CASES, ModelCase, parameters_of, random_sequences

# The kernel is float32 (6e-8 a number) also where the model is float64.
SINGLE = 1e-6
BY_NAME = {case.name: case for case in CASES}


def random_preconditioner(model: torch.nn.Module, seed: int = 5) -> dict[str, Tensor]:
    """P over three decades, as after some steps of AdamW: P², √P and no P at all give other kernels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 10.0
        ** (3 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1).to(parameter.dtype)
        for name, parameter in parameters_of(model).items()
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, SINGLE), (torch.float32, 1e-5)], ids=["64", "32"])
def test_kernels_equal_brute_force_with_the_preconditioner_once(case: ModelCase, dtype, tolerance: float) -> None:
    train_lists, eval_lists = (
        random_sequences(case.vocabulary, seed=1),
        random_sequences(case.vocabulary, seed=2),
    )
    reference = case.make()
    preconditioner = random_preconditioner(reference)
    vector = flatten(preconditioner)
    train_rows = flatten_rows(brute_force.score_rows(reference, train_lists))
    eval_batch, train_batch = right_padded(eval_lists).select([0, 2, 3, 5, 6]), right_padded(train_lists)
    model = case.make(dtype)
    kernels = compute_kernels(
        model, eval_batch, train_batch, {n: p.to(dtype) for n, p in preconditioner.items()}, per_token=False
    )
    sides = {
        "fisher": flatten_rows(brute_force.score_rows(reference, eval_lists))[[0, 2, 3, 5, 6]],
        "entropy_fisher": flatten_rows(brute_force.entropy_terms(reference, eval_lists))[[0, 2, 3, 5, 6]],
    }
    lengths = train_batch.completion_lengths.double()
    for name, eval_rows in sides.items():
        kernel = getattr(kernels, name)
        assert kernel.shape == (5, 7) and kernel.dtype == torch.float32, "the kernel is [eval, train] in float32"
        wanted = fisher_kernel(eval_rows, train_rows, vector)
        assert_close(
            kernel,
            wanted,
            tolerance,
            f"{name} is not E diag(P) Gᵀ",
            {
                "P on both sides (P²)": fisher_kernel(eval_rows, train_rows, vector**2),
                "no P at all (P⁰)": fisher_kernel(eval_rows, train_rows),
                "√P": fisher_kernel(eval_rows, train_rows, vector.sqrt()),
                "the sign": -wanted,
                "training rows divided by their length": wanted / lengths,
            },
        )


def test_cross_kernel_without_a_preconditioner(case: ModelCase) -> None:
    lists = random_sequences(case.vocabulary)
    model, batch = case.make(), right_padded(lists, 0.7)
    rows = flatten_rows(brute_force.score_rows(model, lists, 0.7))
    kernel = compute_cross_fisher_kernel(model, batch, batch.select([6, 1]))
    assert_close(kernel, fisher_kernel(rows, rows[[6, 1]]), SINGLE, "no preconditioner means P = 1, at the temperature")


@pytest.mark.parametrize("taken", [([0, 3], range(7)), (range(7), [0, 3])], ids=["2 x 7", "7 x 2"])
def test_the_smaller_sides_rows_are_stored(taken, monkeypatch) -> None:
    case = BY_NAME["llama_tied_lora"]
    model = case.make()
    sides = [right_padded(random_sequences(case.vocabulary, seed)).select(list(t)) for seed, t in enumerate(taken)]
    preconditioner, stored = random_preconditioner(model), []

    def note(model, batch, *settings):
        stored.append(len(batch))
        return per_sequence_gradients(model, batch, *settings)

    monkeypatch.setattr(kernel_module, "per_sequence_gradients", note)
    kernel = compute_cross_fisher_kernel(model, *sides, preconditioner)
    rows = [flatten_rows(per_sequence_gradients(model, side, passes=PassSettings(method="loop"))) for side in sides]
    assert_close(kernel, fisher_kernel(*rows, flatten(preconditioner)), SINGLE, "[eval, train], whichever is stored")
    assert stored == [2] and kernel.is_contiguous()


def test_equal_sides_give_a_symmetric_positive_kernel(case: ModelCase) -> None:
    model, batch = case.make(), left_padded(random_sequences(case.vocabulary))
    kernel = compute_cross_fisher_kernel(model, batch, batch, random_preconditioner(model)).double()
    assert_close(
        kernel,
        kernel.T,
        SINGLE,
        "the kernel of one batch with itself is not symmetric: P or a length on one side",
    )
    eigenvalues = torch.linalg.eigvalsh((kernel + kernel.T) / 2)
    assert eigenvalues.min() >= -1e-6 * eigenvalues.max(), "a negative eigenvalue: the two sides are not the same rows"


@pytest.mark.parametrize("name", ["llama_tied_lora", "gpt2_conv1d_tied"])
def test_layout_and_bucket_size_change_nothing(name: str) -> None:
    lists, model = random_sequences(37), BY_NAME[name].make()
    preconditioner = random_preconditioner(model)
    expected = compute_kernels(model, right_padded(lists), right_padded(lists), preconditioner)
    for token_batch_size in (1, 20):
        actual = compute_kernels(
            model,
            left_padded(lists, 9),
            left_padded(lists, 5),
            preconditioner,
            passes=PassSettings(token_batch_size),
        )
        assert_close(actual.fisher, expected.fisher, SINGLE, "padding or buckets move rows of the kernel")
        assert_close(
            actual.entropy_fisher,
            expected.entropy_fisher,
            SINGLE,
            "padding or buckets move rows of the kernel",
        )


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mean_of_a_column_is_the_entropy_gradient_along_a_row(estimator: str, per_token: bool) -> None:
    """(1/n) Σ_t K_H(t, i) = ⟨∇h, P ∇S_i⟩, whatever the estimator."""
    model = BY_NAME["qwen2_biases_lora"].make()
    eval_batch, train_batch = (
        right_padded(random_sequences(37, seed=1)),
        right_padded(random_sequences(37, seed=2)),
    )
    preconditioner = random_preconditioner(model)
    kernels = compute_kernels(model, eval_batch, train_batch, preconditioner, estimator, per_token)
    gradient = entropy_gradient(model, eval_batch, estimator, per_token)
    rows = per_sequence_gradients(model, train_batch)
    wanted = torch.tensor(
        [dot(gradient, {n: preconditioner[n] * rows[n][i] for n in rows}) for i in range(7)],
        dtype=torch.float64,
    )
    mean = kernels.entropy_fisher.double().mean(0)
    assert_close(mean, wanted, 1e-5, "K_H's rows do not average to the gradient", {"a sum, not a mean": 7 * wanted})
    if estimator == "score_function":
        assert_close(
            compute_cross_fisher_kernel(model, eval_batch, train_batch, preconditioner),
            kernels.fisher,
            SINGLE,
            "K₁",
        )


def test_score_function_form_of_the_entropy_change() -> None:
    """−(1/(n−1)) Σ_t (S_t − S̄) K₁(t, i) equals the score-function K_H, one completion a prompt: the plan's
    formula."""
    model = BY_NAME["llama_untied_lora"].make()
    lists = random_sequences(37, seed=3)
    eval_batch = replace(right_padded(lists), prompt_index=torch.arange(7))
    train_batch = right_padded(random_sequences(37, seed=4))
    kernels = compute_kernels(model, eval_batch, train_batch, estimator="score_function", per_token=False)
    scores = token_statistics(model, eval_batch).scores()
    plan = -((scores - scores.mean())[:, None] * kernels.fisher.double()).sum(0) / 6
    assert_close(kernels.entropy_fisher.double().mean(0), plan, 1e-5, "sign or baseline", {"the sign": -plan})


def test_shares_add_up_to_the_batch_part_of_the_step() -> None:
    """Σ_i η(1−β1)/(1−β1^t)·c·w_i (1/n)Σ_t K_H(t, i) = ⟨∇h, δθ_batch⟩ with P of this very step."""
    model = BY_NAME["gpt2_conv1d_tied_lora"].make()
    eval_batch, train_batch = (
        right_padded(random_sequences(37, seed=5)),
        right_padded(random_sequences(37, seed=6)),
    )
    rewards = torch.tensor([1.0, 0.0, 0.4, 1.0, 0.0, 0.2, 0.9])
    weights = sequence_weights(rewards, train_batch.prompt_index, train_batch.completion_lengths, "reinforce")
    rows = per_sequence_gradients(model, train_batch)
    clip, lr, beta1, steps_before = 0.37, 2e-3, 0.9, 11
    gradient = {name: -clip * torch.tensordot(weights, row, dims=1) for name, row in rows.items()}
    generator = torch.Generator().manual_seed(8)
    before = {
        name: AdamWParameterState(
            exp_avg=0.1 * torch.randn(g.shape, generator=generator, dtype=g.dtype),
            exp_avg_sq=torch.rand(g.shape, generator=generator, dtype=g.dtype),
            step=steps_before,
            lr=lr,
            beta1=beta1,
            beta2=0.99,
            eps=1e-6,
            weight_decay=0.1,
        )
        for name, g in gradient.items()
    }
    split = split_adamw_update(before, gradient, parameters_of(model))
    corrected = {n: (0.99 * s.exp_avg_sq + 0.01 * gradient[n] ** 2) / (1 - 0.99**12) for n, s in before.items()}
    preconditioner = {name: 1 / (v.sqrt() + 1e-6) for name, v in corrected.items()}
    kernel = compute_kernels(model, eval_batch, train_batch, preconditioner).entropy_fisher.double()
    shares = lr * (1 - beta1) / (1 - beta1**12) * clip * weights * kernel.mean(0)
    entropy_change = entropy_gradient(model, eval_batch)
    batch_part, whole = dot(entropy_change, split.batch), dot(entropy_change, split.total())
    assert_close(
        float(shares.sum()),
        batch_part,
        1e-5,
        "the shares do not add up to δh_batch",
        {
            "momentum is counted in the shares": whole,
            "the clip coefficient is missing": batch_part / clip,
            "sign": -batch_part,
        },
    )


def test_row_sums_equal_a_central_difference(case: ModelCase) -> None:
    """Σ_i w_i K₁(t, i) is the slope of S_t along P ⊙ Σ_i w_i ∇S_i: no gradient of the evaluation side is
    needed."""
    model = case.make()
    eval_batch = right_padded(random_sequences(case.vocabulary, seed=1))
    train_batch = right_padded(random_sequences(case.vocabulary, seed=2))
    preconditioner = random_preconditioner(model)
    kernel = compute_cross_fisher_kernel(model, eval_batch, train_batch, preconditioner)
    weights = torch.tensor([0.5, -1.0, 0.2, 0.0, 0.7, -0.3, 0.1], dtype=torch.float64)
    rows = per_sequence_gradients(model, train_batch)
    direction = {name: preconditioner[name] * torch.tensordot(weights, row, dims=1) for name, row in rows.items()}
    step = 1e-5 / float(flatten(direction).norm())
    scores = []
    parameters = parameters_of(model)
    for sign in (1.0, -2.0):  # to θ + step, from there to θ − step
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(sign * step * direction[name])
        scores.append(token_statistics(model, eval_batch).scores())
    slope = (scores[0] - scores[1]) / (2 * step)
    # float64 scores round at 1e-14, the difference is 1e-5 long: 1e-8 of noise, and float32 in the kernel.
    assert_close(kernel.double() @ weights, slope, 1e-5, "K₁·w is not the slope of the scores along the update")


def test_bad_preconditioners_are_refused() -> None:
    model, batch = BY_NAME["llama_untied_lora"].make(), right_padded(random_sequences(37))
    good = random_preconditioner(model)
    first = next(iter(good))
    bad = {
        "missing": {name: p for name, p in good.items() if name != first},
        "shape": {**good, first: good[first].T},
        "zero": {**good, first: torch.zeros_like(good[first])},
        "infinite": {**good, first: torch.full_like(good[first], float("inf"))},
        "nan": {**good, first: torch.full_like(good[first], float("nan"))},
    }
    for what, preconditioner in bad.items():
        with pytest.raises(ValueError, match="preconditioner"):
            compute_cross_fisher_kernel(model, batch, batch, preconditioner)
            pytest.fail(f"a preconditioner with something {what} was accepted")


def test_unflatten_is_the_inverse_of_flatten() -> None:
    named = random_preconditioner(BY_NAME["recurrent_policy"].make())
    again = unflatten(flatten(named), named)
    assert all(torch.equal(again[name], named[name]) for name in named)

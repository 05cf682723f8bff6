"""Derivatives along a direction against autograd token by token, against rows, and against the kernel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.directional import (
    entropy_derivatives,
    sequence_derivatives,
    token_derivatives,
    weights_moved,
)
from entropy_core.entropy import ESTIMATORS, score_coefficients
from entropy_core.gradients import batch_gradients, dot, entropy_gradient, per_sequence_gradients
from entropy_core.kernel import compute_cross_fisher_kernel
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import token_statistics
from tests.entropy_core.support import left_padded, right_padded
from tests.oracle import brute_force
from tests.oracle.comparison import assert_close, relative_error
from tests.oracle.enumeration import fisher_kernel, flatten, flatten_rows
from tests.oracle.model_cases import CASES, ModelCase, TokenLists, parameters_of, random_sequences, randomise

EXACT = 1e-10
SINGLE = 1e-5
"""float32 forwards of a few layers."""
CENTRAL = {torch.float64: 1e-9, torch.float32: 5e-4}
"""Fourth-order differences: 4 r² + 10 ε/√r at r = (10 ε/16)^0.4 is 4e-12 and 3e-5; the rest is room for random directions."""
BY_NAME = {case.name: case for case in CASES}


def random_direction(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """A normal direction: its scale (hundreds of nats a unit) is nothing a step could be taken along."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in parameters_of(model).items()
    }


def random_preconditioner(model: nn.Module, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (10.0 ** (3 * torch.rand(p.shape, generator=generator, dtype=torch.float64) - 1)).to(p)
        for name, p in parameters_of(model).items()
    }


def oracle_derivatives(
    model: nn.Module, lists: TokenLists, direction: dict[str, Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """D log π and D H of every completion token, in order, by one backward pass a token."""
    parameters = list(parameters_of(model).values())
    flat = flatten(direction)

    def along(value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        return torch.cat([g.reshape(-1) for g in filled]) @ flat

    logprobs, entropies = [], []
    for prompt, completion in zip(lists.prompt_ids, lists.completion_ids, strict=True):
        for logprob, entropy in zip(*brute_force.token_terms(model, prompt, completion, temperature), strict=True):
            logprobs.append(along(logprob))
            entropies.append(along(entropy))
    return torch.stack(logprobs), torch.stack(entropies)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forward_mode_equals_autograd_token_by_token(case: ModelCase, temperature: float) -> None:
    model, lists = case.make(), random_sequences(case.vocabulary)
    direction = random_direction(model)
    logprobs, entropies = oracle_derivatives(model, lists, direction, temperature)
    batch = right_padded(lists, temperature)
    found = token_derivatives(model, batch, direction)
    mask = batch.completion_mask
    suspects = {"sign": -logprobs, "not centred by the mean over the vocabulary, or of another token": logprobs.flip(0)}
    if temperature != 1.0:
        suspects["logits' derivative not divided by the temperature"] = temperature * logprobs
    assert_close(found.logprobs[mask], logprobs, EXACT, "D log π", suspects)
    assert_close(found.entropies[mask], entropies, EXACT, "D H", suspects={"sign": -entropies})
    assert not found.logprobs[~mask].any() and not found.entropies[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("method", ["forward", "central"])
def test_both_methods_in_both_precisions(case: ModelCase, method, dtype: torch.dtype) -> None:
    lists = random_sequences(case.vocabulary)
    batch = right_padded(lists)
    reference = case.make()
    expected = token_derivatives(reference, batch, random_direction(reference))
    model = case.make(dtype)
    found = token_derivatives(model, batch, random_direction(model), method=method)
    exact = EXACT if dtype == torch.float64 else SINGLE
    tolerance = CENTRAL[dtype] if method == "central" else exact
    assert_close(found.logprobs, expected.logprobs, tolerance, "the step of the difference is too long or too short")
    assert_close(found.entropies, expected.entropies, 2 * tolerance, "the step is too long or too short")


def row_sums(model, evaluation, train, weights, p=None, method="auto"):  # noqa: ANN001
    """(n_eval,) sums over i of w_i K1(t, i): derivatives of evaluation scores along P times the weighted training gradient."""
    (gradient,) = batch_gradients(model, train, [score_coefficients(train, weights)])
    direction = gradient if p is None else {name: p[name] * g for name, g in gradient.items()}
    return token_derivatives(model, evaluation, direction, method=method).scores()


def test_row_sums_equal_the_oracles_kernel(case: ModelCase) -> None:
    model, lists = case.make(), random_sequences(case.vocabulary)
    train = random_sequences(case.vocabulary, seed=3)
    p = random_preconditioner(model)
    weights = torch.randn(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows, columns = (flatten_rows(brute_force.score_rows(model, side)) for side in (lists, train))
    flat = flatten(p)
    kernel = fisher_kernel(rows, columns, flat)
    assert_close(
        row_sums(model, right_padded(lists), right_padded(train), weights, p),
        kernel @ weights,
        EXACT,
        "Σ_i w_i K₁(t, i)",
        suspects={
            "P left out": fisher_kernel(rows, columns) @ weights,
            "P twice": fisher_kernel(rows, columns, flat**2) @ weights,
            "weights left out": kernel.sum(1),
            "sign of the loss gradient": -kernel @ weights,
        },
    )


@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("name", ["llama_tied", "llama_tied_lora", "gpt2_conv1d_tied", "gpt2_conv1d_tied_lora"])
def test_row_sums_equal_the_kernel_in_float32(name: str, method) -> None:
    model = BY_NAME[name].make(torch.float32)
    evaluation = right_padded(random_sequences(37))
    train = right_padded(random_sequences(37, seed=3))
    p = random_preconditioner(model)
    weights = torch.randn(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kernel = compute_cross_fisher_kernel(model, evaluation, train, p).double()
    found = row_sums(model, evaluation, train, weights, p, method=method)
    tolerance = 1e-4 if method == "forward" else 2e-4  # a float32 difference is good to 6e-5 in the median, see CENTRAL
    assert_close(found, kernel @ weights, tolerance, "row sums and matrix disagree")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sequence_derivatives_equal_rows_times_direction(case: ModelCase, temperature: float) -> None:
    model, batch = case.make(), right_padded(random_sequences(case.vocabulary), temperature)
    direction = random_direction(model)
    rows = flatten_rows(per_sequence_gradients(model, batch))
    found = sequence_derivatives(model, batch, direction)
    assert_close(found.sequences, rows @ flatten(direction), EXACT, "⟨∇S_i, u⟩")
    assert torch.equal(found.tokens.sum(1), found.sequences), "tokens' parts do not add up to their sequence"


@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_completion"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["llama_untied_lora", "recurrent_policy"])
def test_entropy_derivatives_average_to_the_gradients_product(name: str, estimator, per_token: bool) -> None:
    case = BY_NAME[name]
    model, batch = case.make(), right_padded(random_sequences(case.vocabulary), 0.8)
    direction = random_direction(model)
    products = entropy_derivatives(
        token_statistics(model, batch), token_derivatives(model, batch, direction), batch, estimator, per_token
    )
    expected = dot(entropy_gradient(model, batch, estimator, per_token), direction)
    assert_close(float(products.mean()), expected, EXACT, "⟨∇h, u⟩ of an estimator")


@pytest.mark.parametrize("method", ["forward", "central"])
def test_layout_and_buckets_change_nothing(method) -> None:
    lists, model = random_sequences(37), BY_NAME["gpt2_conv1d_tied"].make()
    direction = random_direction(model)
    expected = sequence_derivatives(model, right_padded(lists), direction).sequences
    for token_batch_size in (1, 20):
        found = sequence_derivatives(
            model, left_padded(lists, 9), direction, PassSettings(token_batch_size), method
        ).sequences
        assert_close(found, expected, CENTRAL[torch.float64], "padding or buckets move derivatives")


@pytest.mark.parametrize("method", ["forward", "central"])
def test_a_padding_embedding_counts_as_in_training_or_truly(method) -> None:
    """The padding token has a trained embedding, tied to the output, and stands in prompts as an end-of-turn token does."""
    model = BY_NAME["llama_tied"].make()
    batch = SequenceBatch.from_sequences([[3, 5], [1, 3]], [[2, 3, 4], [6, 3]], [0, 1], pad_token_id=3)
    direction = random_direction(model)
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    embedding.padding_idx = 3
    true, trained = (
        flatten_rows(per_sequence_gradients(model, batch, as_trained=rule)) @ flatten(direction)
        for rule in (False, True)
    )
    assert relative_error(trained, true) > 0.01, "the test is blind: the padding embedding does not matter"
    for hold, expected in ((True, trained), (False, true)):
        found = sequence_derivatives(model, batch, direction, method=method, hold_padding=hold).sequences
        assert_close(found, expected, CENTRAL[torch.float64], f"hold_padding={hold}")
    assert not embedding._forward_hooks and embedding.padding_idx == 3
    weights = torch.tensor([1.0, -0.7])
    kernel = compute_cross_fisher_kernel(model, batch, batch).double()
    found = row_sums(model, batch, batch, weights, method=method)
    assert_close(
        found, kernel @ weights.double(), SINGLE, "row sums and matrix treat the padding embedding differently"
    )


def test_central_differences_of_a_model_that_rounds_to_float32_inside() -> None:
    """transformers' RMS norms compute in float32 also in a float64 model: a step fit for float64 would measure rounding."""
    model, batch = BY_NAME["llama_untied"].build().double().eval(), right_padded(random_sequences(37))
    assert next(model.parameters()).dtype == torch.float64
    randomise(model, 1)
    direction = random_direction(model)
    expected = token_derivatives(model, batch, direction)
    found = token_derivatives(model, batch, direction, method="central")
    assert_close(found.logprobs, expected.logprobs, CENTRAL[torch.float32], "the step is too short for float32")


@pytest.mark.parametrize("method", ["forward", "central"])
def test_model_is_left_as_it_was(method) -> None:
    model = BY_NAME["llama_tied_lora"].make(torch.float32).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = [module.training for module in model.modules()]
    token_derivatives(model, right_padded(random_sequences(37)), random_direction(model), method=method)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_weights_come_back_after_an_exception() -> None:
    model = BY_NAME["llama_tied"].make(torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), weights_moved(model, random_direction(model), 0.37):
        assert not torch.equal(model.get_parameter("lm_head.weight"), before["model.embed_tokens.weight"])
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("method", ["forward", "central"])
def test_directions_that_move_nothing(method) -> None:
    model, batch = BY_NAME["recurrent_policy"].make(), right_padded(random_sequences(4))
    nothing = {name: torch.zeros_like(p) for name, p in parameters_of(model).items()}
    # A constant on every logit changes no probability.
    shift = {name: torch.ones_like(p) if name == "head.bias" else nothing[name] for name, p in nothing.items()}
    for direction in (nothing, shift):
        found = token_derivatives(model, batch, direction, method=method)
        assert found.logprobs.abs().max() < 1e-9 and found.entropies.abs().max() < 1e-9


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad


class _Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Doubled.apply(x)


class _Model(nn.Module):
    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.embedding, self.odd, self.head = nn.Embedding(9, 4), _Doubling(), nn.Linear(4, 9)
        self.detached = detached
        self.double()

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        logits = self.head(self.odd(self.embedding(input_ids)) if not self.detached else self.embedding(input_ids))
        return SimpleNamespace(logits=logits.detach() if self.detached else logits)


def test_an_operation_without_forward_mode_is_named_and_central_differences_serve() -> None:
    model, lists = _Model(detached=False), random_sequences(9)
    direction = random_direction(model)
    with pytest.raises(ValueError, match=r"'odd' \(_Doubling\) has no forward-mode derivative .*method='central'"):
        token_derivatives(model, right_padded(lists), direction, method="forward")
    found = token_derivatives(model, right_padded(lists), direction, method="central")
    logprobs, entropies = oracle_derivatives(model, lists, direction, 1.0)
    mask = right_padded(lists).completion_mask
    assert_close(found.logprobs[mask], logprobs, CENTRAL[torch.float64], "D log π")
    assert_close(found.entropies[mask], entropies, CENTRAL[torch.float64], "D H")


def test_detached_logits_are_refused() -> None:
    model = _Model(detached=True)
    with pytest.raises(ValueError, match="carry no forward-mode derivative"):
        token_derivatives(model, right_padded(random_sequences(9)), random_direction(model))


def test_bad_input() -> None:
    model, batch = BY_NAME["recurrent_policy"].make(), right_padded(random_sequences(4))
    good = random_direction(model)
    name = "head.weight"
    for direction, words in (
        ({k: v for k, v in good.items() if k != name}, "the direction lacks 1 of .*'head.weight'"),
        ({**good, name: good[name].T.contiguous()}, "the direction of 'head.weight' is"),
        ({**good, name: good[name] * float("nan")}, "holds values that are not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            token_derivatives(model, batch, direction)
    with pytest.raises(ValueError, match="unknown method 'backward'"):
        token_derivatives(model, batch, good, method="backward")  # pyright: ignore[reportArgumentType]

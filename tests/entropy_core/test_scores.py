"""Token log-probabilities and entropies against one unpadded sequence at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from entropy_core.batch import SequenceBatch
from entropy_core.passes.logits import logprobs_and_entropies
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import TokenStatistics, token_statistics
from tests.entropy_core.support import alone, left_padded, padded, right_padded
from tests.oracle import brute_force
from tests.oracle.comparison import assert_close
from tests.oracle.model_cases import CASES, ModelCase, random_sequences
from tests.oracle.policy import RecurrentPolicy

DTYPES = [(torch.float64, 1e-11), (torch.float32, 1e-5)]
"""float64 rounds at 1e-15 a term and float32 at 6e-8: a few hundred terms, and room for another order of
summation."""


def completion_values(statistics: TokenStatistics, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of the completion tokens, sequence by sequence, whatever the layout."""
    return statistics.logprobs[batch.completion_mask], statistics.entropies[batch.completion_mask]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_statistics_equal_brute_force(case: ModelCase, temperature: float, dtype, tolerance: float) -> None:
    lists = random_sequences(case.vocabulary)
    reference = case.make(torch.float64)
    expected = brute_force.statistics(reference, lists, temperature)
    other = brute_force.statistics(reference, lists, 1.0 if temperature != 1.0 else 1.3)
    batch = right_padded(lists, temperature)
    statistics = token_statistics(case.make(dtype), batch)
    assert statistics.logprobs.dtype == statistics.entropies.dtype == dtype
    logprobs, entropies = completion_values(statistics, batch)
    for which, actual in enumerate((logprobs, entropies)):
        assert_close(
            actual,
            torch.cat([terms[which] for terms in expected]),
            tolerance,
            "positions off by one, a wrong mask, or position ids",
            suspects={"the temperature is not applied": torch.cat([terms[which] for terms in other])},
        )
    outside = ~batch.completion_mask
    assert not statistics.logprobs[outside].any() and not statistics.entropies[outside].any(), (
        "not zero off completions"
    )
    scores = torch.stack([terms[0].sum() for terms in expected])
    sums = torch.stack([terms[1].sum() for terms in expected])
    assert_close(statistics.scores(), scores, tolerance, "S(t) is a sum over the completion, not a mean")
    assert_close(statistics.entropy_sums(), sums, tolerance, "Σ_k H_k is a sum over the completion, not a mean")
    assert statistics.scores().dtype == statistics.entropy_sums().dtype == torch.float64


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["float64", "float32"])
def test_padding_changes_nothing(case: ModelCase, dtype, tolerance: float) -> None:
    lists = random_sequences(case.vocabulary)
    model = case.make(dtype)
    batch = right_padded(lists, 0.8)
    expected = completion_values(token_statistics(model, batch), batch)
    noise = case.vocabulary - 1
    layouts = {
        "left padding": left_padded(lists, noise, 0.8),
        "both sides": padded(lists, [3, 0, 1, 5, 2, 0, 4], [1, 2, 6, 0, 0, 3, 1], noise, 0.8),
    }
    for name, layout in layouts.items():
        actual = completion_values(token_statistics(model, layout), layout)
        for value, wanted in zip(actual, expected, strict=True):
            assert_close(value, wanted, tolerance, f"{name} changes the numbers: position ids or attention to pads")
    singles = [completion_values(token_statistics(model, alone(lists, n, 0.8)), alone(lists, n, 0.8)) for n in range(7)]
    for which, wanted in enumerate(expected):
        value = torch.cat([single[which] for single in singles])
        assert_close(
            value,
            wanted,
            tolerance,
            "a sequence alone and in a batch differ: it sees its neighbours or padding",
        )


@pytest.mark.parametrize("pad_token", [-100, 10**6])
def test_padding_may_hold_any_number(case: ModelCase, pad_token: int) -> None:
    """−100 and its like are no token of any vocabulary: they must never reach the embedding."""
    lists, model = random_sequences(case.vocabulary), case.make()
    batch = right_padded(lists)
    expected = completion_values(token_statistics(model, batch), batch)
    layout = padded(lists, [3, 0, 1, 5, 2, 0, 4], [1, 2, 6, 0, 0, 3, 1], pad_token)
    for value, wanted in zip(completion_values(token_statistics(model, layout), layout), expected, strict=True):
        assert_close(value, wanted, 1e-11, "padding ids reach the model")


@pytest.mark.parametrize("token_batch_size", [1, 11, 30])
def test_statistics_do_not_depend_on_the_bucket_size(case: ModelCase, token_batch_size: int) -> None:
    batch = left_padded(random_sequences(case.vocabulary))
    model = case.make()
    expected, actual = (
        token_statistics(model, batch),
        token_statistics(model, batch, passes=PassSettings(token_batch_size)),
    )
    assert_close(actual.logprobs, expected.logprobs, 1e-12, "buckets scatter their tokens to the wrong rows")
    assert_close(actual.entropies, expected.entropies, 1e-12, "buckets scatter their tokens to the wrong rows")


def test_dropout_is_off_and_the_mode_comes_back(case: ModelCase) -> None:
    batch = right_padded(random_sequences(case.vocabulary))
    model = case.make()
    expected = token_statistics(model, batch)
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    frozen.eval()
    flags = [module.training for module in model.modules()]
    actual = token_statistics(model, batch)
    assert [module.training for module in model.modules()] == flags, (
        "the training flags of single modules are not restored"
    )
    assert_close(actual.logprobs, expected.logprobs, 1e-12, "dropout is on: scores are noise")
    assert_close(actual.entropies, expected.entropies, 1e-12, "dropout is on: entropies are noise")


class Breaking(nn.Module):
    """A model that fails in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, input_ids: torch.Tensor) -> None:
        raise RuntimeError("broken on purpose")


def test_the_mode_comes_back_after_a_failure() -> None:
    model = Breaking().train()
    with pytest.raises(RuntimeError, match="on purpose"):
        token_statistics(model, right_padded(random_sequences(4)))
    assert all(module.training for module in model.modules()), "a failed forward leaves the model in evaluation mode"


def test_no_gradient_is_kept() -> None:
    model = CASES[0].make()
    statistics = token_statistics(model, right_padded(random_sequences(CASES[0].vocabulary)))
    assert not statistics.logprobs.requires_grad and all(p.grad is None for p in model.parameters())


def test_broken_weights_are_named() -> None:
    model = CASES[0].make()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="(?i)nan"):
        token_statistics(model, right_padded(random_sequences(CASES[0].vocabulary)))


def test_logprobs_and_entropies_have_the_right_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, 7, generator=generator, dtype=torch.float64)).requires_grad_(True)
    targets = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(lambda z: logprobs_and_entropies(z, targets), (logits,))


def test_a_token_that_is_ruled_out_costs_nothing() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0]], dtype=torch.float64, requires_grad=True)
    logprob, entropy = logprobs_and_entropies(logits, torch.tensor([2]))
    sampling_config = torch.softmax(torch.tensor([0.0, 1.0], dtype=torch.float64), 0)
    assert_close(entropy[0], -(sampling_config * sampling_config.log()).sum(), 1e-12, "0·log 0 is not taken as 0")
    gradient = torch.autograd.grad(logprob.sum() + entropy.sum(), logits)[0]
    assert torch.isfinite(gradient).all() and gradient[0, 1] == 0, "a token at −inf receives a gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_large_weight_on_the_entropy_beside_a_ruled_out_token(dtype: torch.dtype) -> None:
    """3·dH/dz where one logit is −inf: the largest negative number times three is −inf, and 0·inf is no
    derivative."""
    logits = torch.tensor([[0.0, float("-inf"), 1.0]], dtype=dtype, requires_grad=True)
    _, entropy = logprobs_and_entropies(logits, torch.tensor([2]))
    once, thrice = (torch.autograd.grad(w * entropy.sum(), logits, retain_graph=True)[0] for w in (1.0, 3.0))
    assert_close(thrice, 3 * once, 1e-6, "the backward pass overflows beside a token at −inf")


class WithVirtualTokens(nn.Module):
    """As prompt tuning does: its logits begin with positions that are not in the input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        logits = self.model(input_ids=input_ids).logits
        return SimpleNamespace(logits=torch.cat([logits[:, :2], logits], dim=1))


def test_logits_of_another_length_are_refused() -> None:
    model = WithVirtualTokens(RecurrentPolicy())
    with pytest.raises(ValueError):
        token_statistics(model, right_padded(random_sequences(4)))
        pytest.fail("logits with two more positions than tokens were read at the wrong positions, silently")


class WithoutLogits(nn.Module):
    """As a transformers model with `return_dict=False`, or one that gives its logits alone."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.model, self.wrap = RecurrentPolicy(), wrap

    def forward(self, input_ids: torch.Tensor):
        return self.wrap(self.model(input_ids=input_ids).logits)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x,), lambda x: {"logits": x}], ids=["tensor", "tuple", "dict"]
)
def test_a_model_that_gives_no_logits_is_refused_with_the_remedy(wrap) -> None:
    with pytest.raises(ValueError, match=r"without `.logits`: set model.config.return_dict = True, or wrap"):
        token_statistics(WithoutLogits(wrap), right_padded(random_sequences(4)))


@pytest.mark.parametrize("place", ["prompt", "last token"])
@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.name)
def test_a_token_beyond_the_vocabulary_is_named(case: ModelCase, place: str) -> None:
    """On a CPU torch says that an index is out of range, on a GPU the process is lost."""
    model, count = case.make(), case.vocabulary
    prompt, completion = ([count], [3, 4]) if place == "prompt" else ([5], [3, count])
    batch = SequenceBatch.from_sequences([[1, 2], prompt], [[3], completion], [0, 1], 0)
    with pytest.raises(ValueError, match=f"token {count} is beyond the model's vocabulary of {count}"):
        token_statistics(model, batch)


def test_a_huge_margin_stays_finite() -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    logprob, entropy = logprobs_and_entropies(logits, torch.tensor([2]))
    gradient = torch.autograd.grad(logprob.sum() + entropy.sum(), logits)[0]
    assert logprob.item() == -400.0 and entropy.item() >= 0.0 and torch.isfinite(gradient).all()

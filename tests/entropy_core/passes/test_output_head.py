"""The head that keeps no logits gives the numbers and gradients of the head that does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from entropy_core.batch import Bucket, SequenceBatch, length_buckets
from entropy_core.passes import frozen_head as output_head
from entropy_core.passes.forward import completion_logits
from entropy_core.passes.frozen_head import completion_values
from entropy_core.passes.logits import logprobs_and_entropies, surprisal_variances
from entropy_core.scores import token_statistics


class Toy(nn.Module):
    """Embedding, a trained layer, a frozen head; `cap` does to logits what some models do after their head."""

    def __init__(self, vocabulary: int = 11, width: int = 5, bias: bool = True, cap: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocabulary, width)
        self.mixer = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=bias)
        self.cap = cap
        self.double()
        self.head.requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        logits = self.head(self.mixer(self.table(input_ids)).tanh().cumsum(1))
        return SimpleNamespace(logits=logits if self.cap is None else self.cap * torch.tanh(logits / self.cap))


def a_bucket() -> Bucket:
    generator = torch.Generator().manual_seed(1)
    lengths = [(2, 3), (1, 5), (4, 1)]
    prompts, completions = (
        [torch.randint(0, 11, (pair[k],), generator=generator).tolist() for pair in lengths] for k in (0, 1)
    )
    return length_buckets(SequenceBatch.from_sequences(prompts, completions, [0, 1, 2], 0))[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 25, 10**6])
def test_values_and_gradients_are_those_of_the_ordinary_head(
    monkeypatch: pytest.MonkeyPatch, temperature: float, bias: bool, chunk: int
) -> None:
    monkeypatch.setattr(output_head, "_CHUNK_ELEMENTS", chunk)
    model, bucket = Toy(bias=bias), a_bucket()
    coefficients = torch.randn(2, len(bucket.targets), dtype=torch.float64)
    logits = completion_logits(model, bucket, temperature)
    expected = logprobs_and_entropies(logits, bucket.targets)
    found = completion_values(model, bucket, temperature, with_variances=True)
    assert found.entropies is not None and found.variances is not None
    torch.testing.assert_close(found.logprobs, expected[0])
    torch.testing.assert_close(found.entropies, expected[1])
    torch.testing.assert_close(found.variances, surprisal_variances(logits.detach(), expected[1].detach()))
    weights = [model.mixer.weight, model.mixer.bias, model.table.weight]
    objective = coefficients[0] @ found.logprobs + coefficients[1] @ found.entropies
    reference = coefficients[0] @ expected[0] + coefficients[1] @ expected[1]
    for a, b in zip(torch.autograd.grad(objective, weights), torch.autograd.grad(reference, weights), strict=True):
        torch.testing.assert_close(a, b)


def test_scores_alone_have_the_same_gradient_and_no_entropies() -> None:
    model, bucket = Toy(), a_bucket()
    found = completion_values(model, bucket, 0.9, with_entropies=False)
    assert found.entropies is None
    expected = logprobs_and_entropies(completion_logits(model, bucket, 0.9), bucket.targets)[0]
    gradients = [torch.autograd.grad(v.sum(), model.mixer.weight)[0] for v in (found.logprobs, expected)]
    torch.testing.assert_close(*gradients)


def no_large_tensor_is_saved(model: Toy, bucket: Bucket) -> bool:
    """Whether autograd keeps no tensor of (tokens, vocabulary) for the backward pass."""
    sizes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        completion_values(model, bucket, 1.0)
    return (len(bucket.targets), 11) not in sizes


def test_a_frozen_head_keeps_no_logits() -> None:
    assert no_large_tensor_is_saved(Toy(), a_bucket())


@pytest.mark.parametrize("why", ["soft-capped logits", "a trained head"])
def test_other_heads_go_the_ordinary_way(why: str) -> None:
    model, bucket = Toy(cap=2.0 if why == "soft-capped logits" else None), a_bucket()
    if why == "a trained head":
        model.head.requires_grad_(True)
    assert not no_large_tensor_is_saved(model, bucket)
    expected = logprobs_and_entropies(completion_logits(model, bucket, 1.0), bucket.targets)
    found = completion_values(model, bucket, 1.0)
    torch.testing.assert_close(found.logprobs, expected[0])
    torch.testing.assert_close(found.entropies, expected[1])


def test_ruled_out_tokens_are_no_error_and_nan_names_its_sequence() -> None:
    model, bucket = Toy(), a_bucket()
    unused = (set(range(11)) - set(bucket.targets.tolist())).pop()
    with torch.no_grad():
        model.head.bias[unused] = -torch.inf
    found = completion_values(model, bucket, 1.0)
    expected = logprobs_and_entropies(completion_logits(model, bucket, 1.0), bucket.targets)
    torch.testing.assert_close(found.entropies, expected[1])
    assert found.entropies is not None and bool(torch.isfinite(found.entropies).all())
    token = int(bucket.input_ids[1, 0])
    with torch.no_grad():
        model.table.weight[token] = torch.nan
    with pytest.raises(ValueError, match="sequence .*NaN or infinite logits"):
        completion_values(model, bucket, 1.0)


def test_entropies_of_a_nearly_uniform_policy_keep_their_differences() -> None:
    """In float32: entropies within a hundredth of log V, of which K_H takes the differences."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 30_011, bias=False).requires_grad_(False)
    layer.weight.mul_(0.1)
    hidden = torch.randn(12, 16, requires_grad=True)
    targets = torch.arange(12)
    _, entropies, _, variances = output_head._FrozenHead.apply(hidden, layer, targets, 1.0, True, True)
    logprobs = torch.log_softmax(hidden.detach().double() @ layer.weight.double().T, 1)
    expected = -(logprobs.exp() * logprobs).sum(1)
    spread = expected.std()
    assert spread < 0.01 * expected.mean()
    assert (entropies - expected).abs().max() < 4e-5 * spread
    assert (expected.float().double() - expected).abs().max() > 4e-4 * spread  # float32 cannot hold it
    of_surprisal = (logprobs.exp() * (logprobs + expected[:, None]).square()).sum(1)
    torch.testing.assert_close(variances.double(), of_surprisal, rtol=1e-5, atol=0.0)


def test_a_clamp_that_spares_the_first_tokens_is_seen_all_the_same() -> None:
    """Logits of the tokens that are looked at lie within its bounds; those of others do not."""

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False).requires_grad_(False)
            with torch.no_grad():
                self.embedding.weight[:3].mul_(1e-2)
                self.embedding.weight[3:].mul_(1e2)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.head(self.embedding(input_ids)).clamp(-1.0, 1.0))

    model = Clamped()
    batch = SequenceBatch.from_sequences([[0], [1]], [[1, 2, 4], [2, 5, 3]], [0, 1], 0)
    found = token_statistics(model, batch)
    logits = model(batch.input_ids).logits.detach()
    expected = logits.log_softmax(-1)[:, :-1].gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(found.logprobs[:, 1:], expected)

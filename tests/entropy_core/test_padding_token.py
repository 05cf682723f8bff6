"""A policy that draws its padding token: torch masks that embedding's gradient, entropy moves with it all the same."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core import (
    SequenceBatch,
    compute_cross_fisher_kernel,
    entropy_gradient,
    fixed_prefix_entropy_change,
    per_sequence_gradients,
    token_statistics,
)
from entropy_core.entropy import score_coefficients
from entropy_core.gradients import batch_gradients, dot
from entropy_core.passes.settings import PassSettings


def setting() -> tuple[LlamaForCausalLM, SequenceBatch]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    batch = SequenceBatch.from_sequences([[3, 0], [4]], [[0, 5, 0, 2], [0, 0, 1]], [0, 1], pad_token_id=0)
    return model, batch


def test_entropy_gradient_is_the_true_derivative():
    model, batch = setting()
    gradient = entropy_gradient(model, batch, "fixed_prefix")
    direction = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    direction["model.embed_tokens.weight"][0] = torch.randn(16, dtype=torch.float64)
    before = token_statistics(model, batch)
    changes = []
    for sign in (1, -1):
        with torch.no_grad():
            model.model.embed_tokens.weight.add_(direction["model.embed_tokens.weight"], alpha=sign * 3e-3)
        changes.append(fixed_prefix_entropy_change(before, token_statistics(model, batch), batch).change)
        with torch.no_grad():
            model.model.embed_tokens.weight.sub_(direction["model.embed_tokens.weight"], alpha=sign * 3e-3)
    slope = (changes[0] - changes[1]) / 6e-3
    assert abs(dot(gradient, direction) - slope) < 1e-3 * abs(slope), "the padding row's input gradient is missing"


@pytest.mark.parametrize("method", ["hooks", "loop"])
def test_rows_are_true_derivatives_and_those_of_the_step_keep_to_torchs_rule(method):
    """The embedding's row of the padding token: what plain autograd gives with padding_idx and without it."""
    model, batch = setting()
    embedding, name = model.model.embed_tokens, "model.embed_tokens.weight"

    def score(n: int) -> torch.Tensor:
        row = batch.input_ids[n][batch.attention_mask[n]]
        logprobs = torch.log_softmax(model(input_ids=row[None]).logits[0], -1)
        places = batch.completion_mask[n][batch.attention_mask[n]].nonzero()[:, 0]
        return logprobs[places - 1, row[places]].sum()

    trained = torch.stack([torch.autograd.grad(score(n), embedding.weight)[0] for n in range(2)])
    embedding.padding_idx = None
    true = torch.stack([torch.autograd.grad(score(n), embedding.weight)[0] for n in range(2)])
    embedding.padding_idx = 0
    assert (true - trained).norm() > 0.01 * true.norm(), "this policy does not read its padding token"
    torch.testing.assert_close(per_sequence_gradients(model, batch, passes=PassSettings(method=method))[name], true)
    torch.testing.assert_close(
        per_sequence_gradients(model, batch, passes=PassSettings(method=method), as_trained=True)[name], trained
    )
    score = [score_coefficients(batch)]
    torch.testing.assert_close(batch_gradients(model, batch, score)[0][name], true.sum(0))
    torch.testing.assert_close(batch_gradients(model, batch, score, as_trained=True)[0][name], trained.sum(0))
    assert embedding.padding_idx == 0


def test_the_kernel_of_equal_sides_is_symmetric():
    model, batch = setting()
    kernel = compute_cross_fisher_kernel(model, batch, batch)
    torch.testing.assert_close(kernel, kernel.T)
    assert model.model.embed_tokens.padding_idx == 0


def test_gradients_that_are_scaled_by_a_tokens_frequency_are_the_true_ones_all_the_same():
    model, batch = setting()
    expected = per_sequence_gradients(model, batch, passes=PassSettings(method="loop"))
    model.model.embed_tokens.scale_grad_by_freq = True
    for method in ("hooks", "loop"):
        found = per_sequence_gradients(model, batch, passes=PassSettings(method=method))
        torch.testing.assert_close(found["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
    assert model.model.embed_tokens.scale_grad_by_freq


def test_an_embedding_that_rescales_itself_is_refused():
    model, batch = setting()
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(ValueError, match="max_norm"):
        per_sequence_gradients(model, batch)

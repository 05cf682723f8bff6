"""A policy that draws its padding token: torch masks that embedding's gradient, entropy moves with it all the same."""

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
from entropy_core.gradients import dot


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


def test_loss_rows_keep_to_torchs_rule_and_the_kernel_stays_symmetric():
    model, batch = setting()
    rows = per_sequence_gradients(model, batch)
    loop = per_sequence_gradients(model, batch, method="loop")
    torch.testing.assert_close(rows["model.embed_tokens.weight"], loop["model.embed_tokens.weight"])
    kernel = compute_cross_fisher_kernel(model, batch, batch)
    torch.testing.assert_close(kernel, kernel.T)
    assert model.model.embed_tokens.padding_idx == 0

"""Linear layers whose weight is computed from other parameters at each use: trained, though the layer itself holds none.

Taken for frozen, they have a gradient of zeros, and no check of rows against autograd sees it where autograd's own pass went
through the layer that was replaced.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import score_coefficients
from entropy_core.gradients import batch_gradients, per_sequence_gradients, trainable_parameters
from entropy_core.passes import token_plan
from entropy_core.passes.lora import is_frozen_linear
from entropy_core.scores import token_statistics


class Scaled(nn.Module):
    """W * exp(s), s trained and W frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(0.1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.s.exp()


def scaled(layer: nn.Linear) -> None:
    parametrize.register_parametrization(layer, "weight", Scaled())


def old_weight_norm(layer: nn.Linear) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)


WAYS: dict[str, Any] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "scaled": scaled,
    "old_weight_norm": old_weight_norm,
}


def llama(way: str, layer: str) -> nn.Module:
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for p in model.parameters():
            p.data.copy_(torch.randn(p.shape) * 0.3)
        model = model.double().requires_grad_(False)
        computed = model.get_submodule(layer)
        WAYS[way](computed)
    for name, p in computed.named_parameters():
        p.requires_grad_(way != "scaled" or name.endswith("s"))
    return model.double().eval()


@pytest.mark.parametrize("layer", ["model.layers.0.mlp.up_proj", "lm_head"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_go_through_a_computed_weight(monkeypatch: pytest.MonkeyPatch, way: str, layer: str) -> None:
    monkeypatch.setattr(token_plan, "COPYING", 0)
    model = llama(way, layer)
    prompts, completions = [[5, 9, 11, 4]] * 3 + [[5, 9, 12]], [[3, 4, 5], [3, 4], [9, 10, 3], [7]]
    batch = SequenceBatch.from_sequences(prompts, completions, [0, 0, 0, 1], pad_token_id=0)
    assert not is_frozen_linear(model.get_submodule(layer))
    parameters = trainable_parameters(model)

    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logprobs = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        scores.append(sum(logprobs[len(prompt) - 1 + k, token] for k, token in enumerate(completion)))
    expected = torch.autograd.grad(torch.stack(scores).sum(), list(parameters.values()))
    whole = batch_gradients(model, batch, [score_coefficients(batch)])[0]
    rows = per_sequence_gradients(model, batch)
    assert token_statistics(model, batch).scores().tolist() == pytest.approx([float(s) for s in scores], rel=1e-9)
    for name, gradient in zip(parameters, expected, strict=True):
        assert gradient.abs().max() > 0
        assert torch.allclose(whole[name], gradient, rtol=1e-8), f"{name}: the layer was taken for frozen"
        assert torch.allclose(rows[name].sum(0), gradient, rtol=1e-8), f"{name}: rows"

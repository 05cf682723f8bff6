"""Sequences longer than a table of positions are one clear line, before any pass; models without a table have no limit."""

from __future__ import annotations

import pytest
import torch

from entropy_core.batch import SequenceBatch
from entropy_core.directional import token_derivatives
from entropy_core.gradients import entropy_gradient, per_sequence_gradients, trainable_parameters
from entropy_core.passes.position_table import longest_sequence
from entropy_core.scores import token_statistics
from tests.entropy_core.policy_table import PolicyCase

TABLES = [
    ("gpt2", "full"),
    ("gpt2", "lora, biases of the model trained"),
    ("opt", "full"),
    ("gptj", "full"),
    ("gpt_neo", "full"),
]


def batch(tokens: int) -> SequenceBatch:
    return SequenceBatch.from_sequences([[3, 4], [5]], [[6, 7], [8] * (tokens - 1)], [0, 1], pad_token_id=0)


@pytest.mark.parametrize(("architecture", "adapter"), TABLES)
def test_the_longest_sequence_passes_and_one_longer_is_refused(architecture: str, adapter: str) -> None:
    model = PolicyCase(architecture, adapter).make(torch.float32)
    assert longest_sequence(model) == 64
    token_statistics(model, batch(65))  # the last token is predicted, not read
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    direction = {name: torch.ones_like(p) for name, p in trainable_parameters(model).items()}
    for call in (token_statistics, entropy_gradient, per_sequence_gradients):
        with pytest.raises(
            ValueError, match="sequence of 65 tokens does not fit into the model's table of 64 positions"
        ):
            call(model, batch(66))
    with pytest.raises(ValueError, match="table of 64 positions"):
        token_derivatives(model, batch(66), direction)
    assert not passes, "short sequences passed before the long one was noticed"


@pytest.mark.parametrize("architecture", ["llama", "bloom", "qwen2", "mamba"])
def test_models_without_a_table_have_no_limit(architecture: str) -> None:
    model = PolicyCase(architecture, "full").make(torch.float32)
    assert longest_sequence(model) is None
    assert token_statistics(model, batch(80)).logprobs.isfinite().all()

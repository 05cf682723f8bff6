"""Gradients of sums over sequences, with each prompt passed once for all its completions where the model lets it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from entropy_core.entropy import TokenCoefficients, entropy_coefficients, score_coefficients
from entropy_core.gradients import batch_gradients
from entropy_core.passes.prefix_sharing import PrefixSharing
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import token_statistics
from tests.entropy_core.attention_policy import DistanceAttention
from tests.entropy_core.passes.test_shared_prefix import EXACT, TEMPERATURE, TRANSFORMERS, groups
from tests.entropy_core.support import right_padded
from tests.oracle.comparison import assert_named_close
from tests.oracle.model_cases import VOCABULARY, ModelCase
from tests.oracle.policy import RecurrentPolicy


def tokens_passed(model: nn.Module) -> list[int]:
    """Grows by the tokens of each call of the model."""
    found: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: found.append(given["input_ids"].numel()), with_kwargs=True)
    return found


@pytest.mark.parametrize("token_batch_size", [4096, 14])
@pytest.mark.parametrize("as_trained", [False, True])
@pytest.mark.parametrize("case", TRANSFORMERS, ids=lambda case: case.name)
def test_shared_prompts_give_the_same_gradients_from_fewer_tokens(
    case: ModelCase, as_trained: bool, token_batch_size: int
) -> None:
    model, batch = case.make(), right_padded(groups(), TEMPERATURE)
    statistics = token_statistics(model, batch)
    objectives = [score_coefficients(batch), entropy_coefficients(statistics, batch, "rao_blackwell")]
    passes, sharing = PassSettings(token_batch_size), PrefixSharing(model)
    apart = batch_gradients(model, batch, objectives, passes, as_trained)
    assert sharing.shares(batch)
    passed = tokens_passed(model)
    shared = batch_gradients(model, batch, objectives, passes, as_trained, sharing)
    ours = sum(passed)
    batch_gradients(model, batch, objectives, passes, as_trained)
    assert ours < sum(passed) - ours, "no prompt passed once for its completions"
    for one, other in zip(shared, apart, strict=True):
        assert_named_close(one, other, EXACT, "a token's cotangent reached another completion")


@pytest.mark.parametrize(
    "model",
    [DistanceAttention(VOCABULARY, 0.5, by_position_ids=False), RecurrentPolicy(VOCABULARY)],
    ids=["distance", "recurrent"],
)
def test_a_model_that_mixes_completions_gets_plain_rows(model: nn.Module) -> None:
    model = model.double()
    batch, sharing = right_padded(groups(), TEMPERATURE), PrefixSharing(model)
    objective = [score_coefficients(batch)]
    shared = batch_gradients(model, batch, objective, sharing=sharing)[0]
    assert not sharing.shares(batch)
    assert_named_close(shared, batch_gradients(model, batch, objective)[0], EXACT, "rows were shared all the same")


def test_coefficients_that_depend_on_the_batch_do_not_share() -> None:
    model, batch = TRANSFORMERS[0].make(), right_padded(groups(), TEMPERATURE)

    def coefficients(known) -> list[TokenCoefficients]:
        return [entropy_coefficients(known, batch, "rao_blackwell")]

    found = batch_gradients(model, batch, coefficients, PassSettings(14), sharing=PrefixSharing(model))[0]
    known = coefficients(token_statistics(model, batch))
    assert_named_close(
        found, batch_gradients(model, batch, known, PassSettings(14))[0], EXACT, "statistics of shared rows"
    )
    assert torch.is_grad_enabled()

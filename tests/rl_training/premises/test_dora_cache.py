"""peft can keep DoRA's norms of one evaluation pass for the next (`DoraCaching`): weights move in between, and nothing of ours
may go by the old ones.
"""

import copy

import peft
import pytest
import torch
from peft.helpers import DoraCaching
from peft.tuners.lora import dora

from rl_training.config import EntropyProbeConfig
from rl_training.integrations.trl import attach_entropy_probe
from tests.rl_training.premises.test_sampling_words import llama
from tests.rl_training.sampling_setting import make_trainer


@pytest.fixture
def model():
    found = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(llama(), found)


def changes(model, folder, caching):
    trainer = make_trainer(model, folder, max_steps=2, learning_rate=1e-3)
    config = EntropyProbeConfig(on_error="raise", mode="simple", preset="accurate", eval_sequences=16)
    callback = attach_entropy_probe(trainer, config, console=False)
    with DoraCaching(enabled=caching):
        trainer.train()
        assert dora.ENABLE_DORA_CACHING == caching, "the user's choice stays"
    assert dora.ENABLE_DORA_CACHING is False
    return [(change.same_tokens, change.measured.change) for change in callback.history]


def test_predicted_and_measured_changes_are_those_without_the_cache(model, tmp_path):
    plain = changes(copy.deepcopy(model), tmp_path / "plain", False)
    cached = changes(model, tmp_path / "cached", True)
    for (predicted, measured), (predicted_too, measured_too) in zip(plain, cached, strict=True):
        assert predicted != 0 and predicted_too == pytest.approx(predicted, rel=1e-4)
        assert measured != 0 and measured_too == pytest.approx(measured, rel=1e-3, abs=1e-7)

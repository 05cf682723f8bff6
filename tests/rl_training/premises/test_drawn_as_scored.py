"""Models whose `generate` draws by another distribution than one forward pass gives are found without their names."""

from __future__ import annotations

import pytest
import torch
import transformers
from trl import GRPOTrainer

from rl_training.algs.dr_grpo import DrGRPOTrainer
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.premises.drawn_as_scored import generation_finding
from tests.rl_training.sampling_setting import make_trainer, tiny_model, vocabulary

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_ENCODER = {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ALIKE = {
    "LlamaConfig": {},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "MistralConfig": {"sliding_window": 2},
    "RobertaConfig": _ENCODER,
    "MambaConfig": {},
}
OTHERWISE = {
    "XLMConfig": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True, "dropout": 0.0, "attention_dropout": 0.0},
    "XLNetConfig": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "dropout": 0.0},
    "CpmAntConfig": {
        **{"prompt_length": 4, "dim_head": 8, "dim_ff": 48},
        **{"position_bias_num_buckets": 16, "position_bias_max_distance": 64},
    },
}


def model_of(name: str) -> torch.nn.Module:
    """Tiny; OTHERWISE's start a generation with tokens, or read positions, that a forward pass does not."""
    settings = {**_COMMON, "vocab_size": vocabulary(), **ALIKE.get(name, OTHERWISE.get(name, {}))}
    if name == "XLNetConfig":  # it has no longest sequence
        del settings["max_position_embeddings"]
    return tiny_model(getattr(transformers, name)(**settings))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", ALIKE)
def test_what_is_drawn_as_it_is_scored_is_not_spoken_of(name, temperature):
    state = torch.get_rng_state()
    assert generation_finding(model_of(name), [5, 9, 20, 7, 8, 11, 40, 6], temperature) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", OTHERWISE)
def test_another_distribution_is_found(name):
    found = generation_finding(model_of(name), [5, 9, 20, 7, 8, 11, 40, 6], 1.0)
    assert found is not None and "draws by another distribution" in found


def test_our_trainer_refuses_and_the_probe_warns(tmp_path):
    with pytest.raises(UserError, match="draws by another distribution.*train a model that"):
        make_trainer(model_of("XLMConfig"), tmp_path / "ours", DrGRPOTrainer).train()
    trainer = make_trainer(model_of("XLMConfig"), tmp_path / "theirs", GRPOTrainer, top_k=0, max_steps=1)
    probe = EntropyProbeConfig(rollouts="current", predict_every=None)
    attach_entropy_probe(trainer, probe, console=False)
    with pytest.warns(UserWarning, match="draws by another distribution"):
        trainer.train()

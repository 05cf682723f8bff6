"""Positions: models that padding changes are found, given positions where that helps, and refused where it does not."""

import warnings

import pytest
import torch
from transformers import BloomConfig, GPT2Config, LlamaConfig, MambaConfig, OPTConfig, TrainerCallback

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import score_coefficients
from entropy_core.gradients import batch_gradients, trainable_parameters
from rl_training.algs.dr_grpo import DrGRPOTrainer
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.prompts.left_padding import pass_positions, positions_matter
from rl_training.run.rollouts import read_rollouts
from tests.rl_training.sampling_setting import make_trainer, tiny_model, vocabulary

IDS = {"vocab_size": vocabulary(), "bos_token_id": 1, "eos_token_id": 1}
MODELS = {
    "GPT-2": (GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **IDS), "positions"),
    "Llama": (
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, **IDS), "none"
    ),
    "OPT": (
        OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
            word_embed_proj_dim=32, dropout=0.0, pad_token_id=0, **IDS,
        ),
        "none",
    ),
    "Bloom": (BloomConfig(hidden_size=32, n_layer=2, n_head=2, **IDS), "none"),
}  # fmt: skip


def gpt2():
    model = tiny_model(MODELS["GPT-2"][0], 4.0)
    for module in model.modules():  # TRL zeroes dropout for its own trainer alone
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.requires_grad_(True)


@pytest.mark.parametrize("name", MODELS)
def test_what_padding_does_to_a_model_is_seen(name):
    config, kind = MODELS[name]
    model = tiny_model(config, 3.0)
    before = torch.get_rng_state()
    assert positions_matter(model, range(5, 20), 0).kind == kind
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_sees_padding_whatever_it_is_told_is_refused_on_prompts_of_unequal_length_alone(tmp_path):
    """A recurrent model whose mask is left out of account."""
    config = MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=1, expand=1, time_step_rank=4, **IDS)
    model = tiny_model(config, 2.0).requires_grad_(True)
    original = model.backbone.forward
    model.backbone.forward = lambda *args, **kwargs: original(*args, **{**kwargs, "attention_mask": None})
    assert positions_matter(model, range(5, 20), 0).kind == "always"
    with pytest.raises(UserError, match=r"positions: .*prompts of one length"):
        make_trainer(model, tmp_path, DrGRPOTrainer, prompts=["=" * n for n in range(1, 25)], max_steps=1).train()


class FirstGradient(TrainerCallback):
    def __init__(self, model):
        self.model, self.real, self.weights = model, {}, {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.real:
            for name, p in trainable_parameters(self.model).items():
                self.real[name], self.weights[name] = p.grad.clone(), p.detach().clone()


def test_the_trainers_gradient_is_that_of_the_unpadded_sequences(tmp_path):
    """Without positions it was off by 0.8 of its norm."""
    trainer = make_trainer(gpt2(), tmp_path, DrGRPOTrainer, max_steps=1, max_grad_norm=1e9)
    spy = FirstGradient(trainer.model)
    trainer.add_callback(spy)
    trainer.train()
    rows = [row for row in read_rollouts(tmp_path, 1) if row.status != "rejected"]
    assert len({len(row.prompt_ids) for row in rows}) > 1, "nothing is padded, so this shows nothing"
    with torch.no_grad():
        for name, p in trainable_parameters(trainer.model).items():
            p.copy_(spy.weights[name])
    batch = SequenceBatch.from_sequences(
        [r.prompt_ids for r in rows], [r.completion_ids for r in rows], [r.prompt_index for r in rows], 0
    )
    weights = torch.tensor([r.weight for r in rows], dtype=torch.float64)
    ours = batch_gradients(trainer.model, batch, [score_coefficients(batch, -weights)])[0]
    left = torch.cat([g.flatten() for g in spy.real.values()]).double()
    right = torch.cat([ours[name].flatten() for name in spy.real]).double()
    assert right.norm() > 0
    assert float((left - right).norm() / right.norm()) < 1e-4, "positions count from the padding"


def test_the_probe_names_positions_in_plain_grpo(tmp_path):
    trainer = make_trainer(gpt2(), tmp_path, max_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach_entropy_probe(trainer, EntropyProbeConfig(mode="simple", on_error="raise"), console=False)
        trainer.train()
    told = [str(w.message) for w in caught if "left padding" in str(w.message)]
    assert len(told) == 1 and "GPT2LMHeadModel" in told[0] and "position_ids" in told[0]
    assert "pass_positions(trainer.model)" in told[0]


@pytest.mark.parametrize("way", ["prompts of one length", "passed positions"])
def test_the_probe_says_nothing_of_positions_where_padding_changes_nothing(tmp_path, way):
    """Both remedies of its warning."""
    prompts = ["1+1=", "2+2=", "3+4=", "5+6="] if way == "prompts of one length" else None
    trainer = make_trainer(gpt2(), tmp_path, prompts=prompts, max_steps=1)
    if way == "passed positions":
        pass_positions(trainer.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach_entropy_probe(trainer, EntropyProbeConfig(mode="simple", on_error="raise"), console=False)
        trainer.train()
    assert [str(w.message) for w in caught if "entropy probe" in str(w.message)] == []

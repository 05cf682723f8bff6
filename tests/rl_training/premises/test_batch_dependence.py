"""Models whose output for a sequence depends on the longest one of its batch: found by what they do."""

import warnings

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig
from trl import GRPOTrainer

from rl_training.algs.dr_grpo import DrGRPOTrainer
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.premises.batch_dependence import LongestSequence, longest_dependence
from tests.rl_training.sampling_setting import make_trainer, tiny_model, vocabulary

CONTEXT, ORIGINAL = 24, 12
BASE = {"rope_theta": 10_000.0, "factor": 4.0}
SCALED = {"original_max_position_embeddings": ORIGINAL}
BY_BATCH = {
    "dynamic": {"rope_type": "dynamic", **BASE},
    "longrope": {
        "rope_type": "longrope", **BASE, **SCALED, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
}  # fmt: skip
BY_SEQUENCE = {
    "plain": None,
    "linear": {"rope_type": "linear", **BASE},
    "yarn": {"rope_type": "yarn", **BASE, **SCALED},
    "llama3": {"rope_type": "llama3", **BASE, **SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
# Beyond these lengths one sequence's logits are others beside a long one.
EXTENDED_FROM = {"dynamic": CONTEXT, "longrope": ORIGINAL}


def rotary(rope, kind=LlamaConfig, **more):
    config = kind(
        vocab_size=vocabulary(), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=1, **more,
        **({} if rope is None else {"rope_parameters": rope}),
    )  # fmt: skip
    return tiny_model(config)


def beside_a_long_one(model, short, length):
    """Logits of a short sequence in a batch that is padded on the right to `length` tokens."""
    ids = torch.full((2, length), 5)
    ids[0, : len(short)] = torch.tensor(short)
    mask = torch.ones_like(ids)
    mask[0, len(short) :] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[0, : len(short)]


@pytest.mark.parametrize("name", [*BY_BATCH, *BY_SEQUENCE])
def test_the_answer_is_that_of_real_long_batches(name):
    model, short = rotary({**BY_BATCH, **BY_SEQUENCE}[name]), list(range(5, 13))
    with torch.no_grad():
        alone = model(torch.tensor([short])).logits[0]
    changed = float((beside_a_long_one(model, short, 60) - alone).abs().max()) > 1e-3
    assert changed == (name in BY_BATCH)
    watch = LongestSequence(model, short)
    limit = EXTENDED_FROM.get(name, 60)
    assert watch.finding(limit) is None
    assert (watch.finding(60) is not None) == changed
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([short])).logits[0], alone), "frequencies are left as they were found"


def test_a_position_table_is_not_left_and_windows_are_no_dependence():
    gpt2 = GPT2Config(vocab_size=vocabulary(), n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT)
    assert longest_dependence(tiny_model(gpt2), range(5, 13), 60) == 0
    assert longest_dependence(rotary(None, MistralConfig, sliding_window=8), range(5, 13), 60) == 0


@pytest.mark.parametrize("name", ["dynamic", "longrope", "yarn"])
def test_our_trainer_refuses_and_the_probe_warns_once_where_a_batch_gets_that_long(tmp_path, name):
    rope = {**BY_BATCH, **BY_SEQUENCE}[name]
    for kind in (GRPOTrainer, DrGRPOTrainer):
        # Prompts of up to 15 tokens: beyond both limits with 12 more.
        trainer = make_trainer(rotary(rope).requires_grad_(True), tmp_path, kind, max_completion_length=12, max_steps=2)
        trainer.generation_config.eos_token_id = None
        if kind is DrGRPOTrainer:
            if name == "yarn":
                continue
            with pytest.raises(UserError, match="depend on the longest one of its batch.*linear, yarn, llama3"):
                trainer.train()
            continue
        attach_entropy_probe(
            trainer, EntropyProbeConfig(on_error="raise", mode="simple", preset="accurate"), console=False
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        told = [str(w.message) for w in caught if "longest one of its batch" in str(w.message)]
        assert len(told) == (name != "yarn")


@pytest.mark.parametrize("name", BY_BATCH)
def test_runs_that_stay_within_the_plain_context_are_not_warned_of(tmp_path, name):
    trainer = make_trainer(
        rotary(BY_BATCH[name]).requires_grad_(True), tmp_path, DrGRPOTrainer,
        prompts=["1+1=", "2+2="] * 8, max_completion_length=6,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [w for w in caught if "longest one" in str(w.message)]

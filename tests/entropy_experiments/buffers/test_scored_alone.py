"""A model whose log-probabilities of a sequence depend on its batch is refused before anything is computed of it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, XLMConfig, XLMWithLMHeadModel

from entropy_core import SequenceBatch
from entropy_experiments.buffers.scored_alone import refuse_dependence, refuse_other_drawing
from rl_training.errors import UserError

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
CONTEXT = 16
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 7.0]}


def llama(**settings):
    return _scaled(LlamaForCausalLM(LlamaConfig(**SIZES, **settings)))


def rope(kind, **settings):
    return {"rope_type": kind, "rope_theta": 10000.0, **settings}


def _scaled(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(5.0)
    return model.eval()


class Centred(torch.nn.Module):
    """Takes the mean over the batch out of hidden states, as statistics of a batch would."""

    def forward(self, hidden):
        return hidden - 0.1 * hidden.mean((0, 1), keepdim=True)


def longrope():
    parameters = rope("longrope", original_max_position_embeddings=CONTEXT, **FACTORS)
    lengths = {"max_position_embeddings": 4 * CONTEXT, "original_max_position_embeddings": CONTEXT}
    return _scaled(Phi3ForCausalLM(Phi3Config(**SIZES, **lengths, rope_parameters=parameters)))


def by_the_batch():
    model = llama(max_position_embeddings=4 * CONTEXT)
    norm = model.model.norm
    model.model.norm = torch.nn.Sequential(norm, Centred())
    return model


def noisy():
    model = llama(max_position_embeddings=4 * CONTEXT)
    model.model.norm.register_forward_hook(lambda _module, _args, out: out + 0.01 * torch.randn_like(out))
    return model


MODELS = {
    "plain": lambda: llama(max_position_embeddings=4 * CONTEXT),
    "yarn": lambda: llama(
        max_position_embeddings=4 * CONTEXT,
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=CONTEXT),
    ),
    "dynamic": lambda: llama(max_position_embeddings=CONTEXT, rope_parameters=rope("dynamic", factor=4.0)),
    "longrope": longrope,
    "by the batch": by_the_batch,
    "noisy": noisy,
}


def batch(*lengths):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 50, (n,), generator=generator).tolist() for n in lengths]
    return SequenceBatch.from_sequences([s[:4] for s in ids], [s[4:] for s in ids], list(range(len(ids))), 0)


@pytest.mark.parametrize("kind", MODELS)
def test_what_depends_on_its_batch_is_refused(kind):
    """Phi-3's LongRoPE scored a sequence 0.14 nats off beside a long one, and the long one a nat off what it was drawn at."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    sides = [batch(14, 12, 9), batch(40, 14)]
    if kind in ("plain", "yarn"):
        refuse_dependence(model, sides)
        refuse_dependence(model, [batch(14)])
        return
    wanted = "longest one of its batch.*max_completion_length" if kind in ("dynamic", "longrope") else "nats in a batch"
    with pytest.raises(UserError, match=wanted):
        refuse_dependence(model, sides)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_inside_the_context_that_is_not_extended_nothing_is_refused(kind):
    torch.manual_seed(0)
    refuse_dependence(MODELS[kind](), [batch(14, 12, 9), batch(CONTEXT, 12)])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_sequences_of_one_length_beyond_it_are_refused_too(kind):
    """Scored alike, but not as they were drawn, token by token."""
    torch.manual_seed(0)
    with pytest.raises(UserError, match="another distribution than it was drawn from"):
        refuse_dependence(MODELS[kind](), [batch(40, 40), batch(40, 40)])


def test_a_model_that_draws_otherwise_than_it_is_scored_is_refused():
    """XLM's `generate` puts a token behind what it has, at which it reads the next one."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": 0, "mask_token_id": 2}
    xlm = _scaled(XLMWithLMHeadModel(XLMConfig(**sizes, causal=True, dropout=0.0, attention_dropout=0.0)))
    refuse_other_drawing(MODELS["plain"](), batch(14, 12))
    with pytest.raises(UserError, match="draws by another distribution.*train a model with a plain cache"):
        refuse_other_drawing(xlm, batch(14, 12))

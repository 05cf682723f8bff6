"""A model that computes something else under a gradient than it computes is found by forward passes, and only such a one."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch

from rl_training.config import EntropyProbeConfig
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.models.load import load_model_and_tokenizer
from tests.rl_training import sampling_setting
from tests.rl_training.integrations.test_trl_integration import logged, make_trainer


class Doubled(torch.autograd.Function):
    """The identity, whose derivative is given as 2."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def run(tiny_policy, folder, doubled, **settings):
    """(what was said of derivatives, logged rows)."""
    trainer = make_trainer(tiny_policy, folder, **settings)
    if doubled:
        trainer.model.model.layers[1].mlp.register_forward_hook(lambda _m, _args, output: Doubled.apply(output))
    config = EntropyProbeConfig(mode="simple", preset="accurate", on_error="raise")
    attach_entropy_probe(trainer, config, console=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(w.message) for w in caught if "derivative" in str(w.message)], logged(trainer)


@pytest.mark.parametrize("optim", ["adamw_torch", "rmsprop"])
def test_a_gradient_that_is_no_derivative_is_said_once(tiny_policy, tmp_path, optim):
    said, entries = run(tiny_policy, tmp_path, True, optim=optim)
    assert len(said) == 1 and "go by that" in said[0], said
    off = [abs(e["same_tokens"] - e["measured"]) > 0.05 * abs(e["measured"]) for e in entries]
    assert any(off), "the gradient was right: the test is void"


@pytest.mark.parametrize(
    "settings",
    [{}, {"optim": "rmsprop"}, {"lora": True}, {"num_iterations": 2, "learning_rate": 1e-3}],
    ids=lambda s: "-".join(s) or "plain",
)
def test_a_gradient_that_is_one_is_not_spoken_of(tiny_policy, tmp_path, settings):
    assert run(tiny_policy, tmp_path, False, max_steps=4, **settings)[0] == []


@pytest.mark.parametrize(
    "mode",
    [{"mode": "simple", "preset": "accurate"}, {"mode": "watch", "predict_every": 1, "measure_every": 1}],
    ids=["simple", "watch"],
)
def test_a_norm_that_training_holds_fixed_moves_on_both_sides(tiny_policy, tmp_path, mode):
    """DoRA's: autograd's gradient leaves it out, the probe's does not, nor does the derivative that is held against it."""
    model, tokenizer = load_model_and_tokenizer(str(tiny_policy), device="cpu")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.2)
    trainer = sampling_setting.make_trainer(model, tmp_path, tokenizer=tokenizer, top_k=0)
    attach_entropy_probe(trainer, EntropyProbeConfig(**mode, on_error="raise", eval_sequences=8), console=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [str(w.message) for w in caught if "derivative" in str(w.message)]

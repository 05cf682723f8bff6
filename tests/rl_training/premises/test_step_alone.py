"""What another callback does to the policy between the probe's two looks at a step is named, and left out where it can be."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import TrainerCallback

from rl_training.config import EntropyProbeConfig
from rl_training.integrations.trl import attach_entropy_probe
from tests.rl_training.integrations.test_trl_integration import logged, make_trainer

MODES = {
    "watch": {"measure_every": 1, "predict_every": None, "eval_sequences": 16},
    "simple": {"mode": "simple", "preset": "accurate"},
}


class Quiet(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        pass

    def on_optimizer_step(self, args, state, control, **kwargs):
        pass


class ShrinkAfter(Quiet):
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.99)


class ShrinkBefore(Quiet):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.99)


def run(tiny_policy, folder, mode, earlier=(), later=()):
    """(what was said of callbacks, measured changes) of steps that move the policy by next to nothing."""
    trainer = make_trainer(tiny_policy, folder, learning_rate=1e-9)
    for callback in earlier:
        trainer.add_callback(callback)
    attach_entropy_probe(trainer, EntropyProbeConfig(**MODES[mode], on_error="raise"), console=False)
    for callback in later:
        trainer.add_callback(callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in caught if "moves the policy in on_" in str(w.message)]
    return said, [abs(entry["measured"]) for entry in logged(trainer)]


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("callback", [ShrinkAfter, ShrinkBefore])
def test_a_callback_between_the_two_looks_is_named_once_and_the_remedy_helps(tiny_policy, tmp_path, mode, callback):
    between = {"earlier" if callback is ShrinkAfter else "later": [callback()]}
    said, measured = run(tiny_policy, tmp_path / "between", mode, **between)
    assert len(said) == 1 and callback.__name__ in said[0] and "hold what it does as well" in said[0]
    assert min(measured) > 1e-4, "the callback did nothing: the test is void"
    assert f"add that callback {'after' if callback is ShrinkAfter else 'before'} the probe" in said[0]
    outside = {"later" if callback is ShrinkAfter else "earlier": [callback()]}
    said, measured = run(tiny_policy, tmp_path / "outside", mode, **outside)
    assert not said and max(measured) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_callback_that_moves_nothing_is_not_spoken_of(tiny_policy, tmp_path, mode):
    said, measured = run(tiny_policy, tmp_path, mode, [Quiet()], [Quiet()])
    assert not said and max(measured) < 1e-5


class Bare(torch.optim.Optimizer):
    """A wrapper as many a Lookahead is: an optimizer of torch's by name, which never began as one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


def test_an_optimizer_that_keeps_no_hooks_does_not_end_training(tiny_policy, tmp_path):
    trainer = make_trainer(tiny_policy, tmp_path, learning_rate=1e-5)
    trainer.optimizer = Bare(torch.optim.AdamW(trainer.model.parameters(), lr=1e-5))
    trainer.add_callback(Quiet())
    attach_entropy_probe(trainer, EntropyProbeConfig(**MODES["simple"], on_error="raise"), console=False)
    trainer.train()
    entries = logged(trainer)
    assert len(entries) == 3
    assert all(e["same_tokens"] == pytest.approx(e["measured"], rel=0.1, abs=5e-7) for e in entries)

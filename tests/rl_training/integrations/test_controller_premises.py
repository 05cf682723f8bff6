"""What makes the entropy controller's numbers those of another policy or of another step is said, or ends the run."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import TrainerCallback

from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.integrations.entropy_controller import attach_entropy_controller
from rl_training.integrations.trl import attach_entropy_probe
from tests.rl_training.integrations.test_entropy_controller import DR_GRPO, controlled
from tests.rl_training.integrations.test_trl_integration import make_trainer
from tests.rl_training.probe.test_derivative_check import Doubled


class Quiet(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        pass


class Noise(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for p in model.parameters():
            if p.grad is not None:
                p.grad.add_(p.grad.std() * torch.randn_like(p.grad))


class Rate(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] *= 2


class Weights(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.999)


class Cooler(TrainerCallback):
    def __init__(self, trainer):
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer.temperature = self._trainer.generation_config.temperature = args.temperature = 0.5


def said(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if "entropy controller" in str(w.message)]


@pytest.mark.parametrize("callback", [Quiet, Noise, Rate, Weights])
def test_a_step_that_is_not_the_one_solved_for_is_said_once(tiny_policy, tmp_path, callback):
    trainer, controller = controlled(tiny_policy, tmp_path, target=4.6, alpha_max=100.0)
    trainer.add_callback(callback())
    told = said(trainer.train)
    assert any(step.alpha for step in controller.history)
    if callback is Quiet:
        assert told == []
    else:
        assert len(told) == 1 and "another step than the one that was solved for" in told[0], told


@pytest.mark.parametrize("doubled", [False, True], ids=["plain", "doubled"])
def test_a_gradient_of_entropy_that_is_no_derivative_is_said_once(tiny_policy, tmp_path, doubled):
    """The coefficient is solved for with it."""
    trainer, controller = controlled(tiny_policy, tmp_path, target=4.6, alpha_max=100.0)
    if doubled:
        trainer.model.model.layers[1].mlp.register_forward_hook(lambda _m, _args, output: Doubled.apply(output))
    told = said(trainer.train)
    assert any(step.alpha for step in controller.history)
    if doubled:
        assert len(told) == 1 and told[0].endswith("train without the controller"), told
    else:
        assert told == []


def test_another_sampler_is_said_by_the_controller_too_and_once_beside_the_probe(tiny_policy, tmp_path):
    def attach():
        found.append(controlled(tiny_policy, tmp_path, settings={"top_k": 5})[0])

    found = []
    told = said(attach)
    assert len(told) == 1 and "top_k=5" in told[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_entropy_probe(found[0], EntropyProbeConfig(mode="simple", on_error="raise"), console=False)


def test_a_temperature_that_changes_while_training_ends_the_run(tiny_policy, tmp_path):
    trainer, _ = controlled(tiny_policy, tmp_path)
    trainer.add_callback(Cooler(trainer))
    with pytest.raises(UserError, match="temperature changed from 1.0 to 0.5 before step 2"):
        trainer.train()


def test_prompts_that_are_rendered_otherwise_end_the_run(tiny_policy, tmp_path):
    """Held-out completions would be those of other prompts. A rendering of the user's own stays in its place."""
    trainer = make_trainer(tiny_policy, tmp_path, **DR_GRPO)
    tokenize = trainer._tokenize_prompts

    def prefixed(prompts):
        ids, *rest = tokenize(prompts)
        return [[5, *row] for row in ids], *rest

    trainer._tokenize_prompts = prefixed
    attach_entropy_controller(trainer, console=False)
    with pytest.raises(UserError, match="not what the chat template makes"):
        trainer.train()
    assert trainer._tokenize_prompts is prefixed


class Frozen(TrainerCallback):
    """Freezes a weight between its gradient and the step."""

    def __init__(self, name):
        self._name = name

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 1:
            frozen = model.get_parameter(self._name)
            frozen.requires_grad_(False)
            frozen.grad = torch.zeros_like(frozen)


def test_frozen_weights_that_the_optimizer_still_moves_are_named(tiny_policy, tmp_path):
    trainer, _ = controlled(tiny_policy, tmp_path)
    name = next(name for name, _ in trainer.model.named_parameters() if "mlp" in name)
    trainer.add_callback(Frozen(name))
    told = said(trainer.train)
    assert len(told) == 1 and f"the optimizer moves {name!r}" in told[0], told

"""What is done to gradients after the backward pass: a factor leaves the recorded weights true, anything else stops the run."""

import warnings

import pytest
import torch
from transformers import TrainerCallback

from rl_training.algs.dr_grpo import DrGRPOTrainer
from rl_training.errors import UserError
from tests.rl_training.premises.test_sampling_words import llama
from tests.rl_training.sampling_setting import make_trainer


class Change(TrainerCallback):
    """Does something to gradients before the optimizer steps, from step `first` on."""

    def __init__(self, kind: str, first: int = 1) -> None:
        self.kind, self.first = kind, first

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        if state.global_step + 1 >= self.first:
            change(self.kind, [p for p in model.parameters() if p.grad is not None])


def change(kind: str, parameters: list[torch.nn.Parameter]) -> None:
    largest = max(float(p.grad.abs().max()) for p in parameters)
    for place, p in enumerate(parameters):
        if kind == "noise":
            p.grad += 0.1 * p.grad.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(place))
        elif kind == "clipped by value":
            p.grad.clamp_(-largest / 4, largest / 4)
        elif kind == "turned":
            p.grad.neg_()
        elif kind == "one left out" and place == 3:
            p.grad = None
        elif kind == "one scaled" and place == 3:
            p.grad *= 2
        elif kind == "all scaled":
            p.grad *= 0.25


def trained(folder, callback=None, hook=None, dtype=torch.float32, **settings):
    trainer = make_trainer(llama().to(dtype), folder, DrGRPOTrainer, max_steps=4, **settings)
    if callback is not None:
        trainer.add_callback(callback)
    if hook is not None:
        optimizer = trainer.create_optimizer()
        optimizer.register_step_pre_hook(lambda opt, *_: change(hook, opt.param_groups[0]["params"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return trainer, [str(w.message) for w in caught if "is changed between" in str(w.message)]


@pytest.mark.parametrize("kind", ["noise", "clipped by value", "turned", "one left out", "one scaled"])
def test_another_gradient_stops_the_run_before_the_step(tmp_path, kind):
    with pytest.raises(UserError, match="changed between the backward pass and the optimizer's step"):
        trained(tmp_path, Change(kind))


@pytest.mark.parametrize(
    "settings", [{}, {"max_grad_norm": 1e-3}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str
)
def test_clipping_and_factors_are_no_other_gradient(tmp_path, settings):
    more = {"per_device_train_batch_size": 8} if "gradient_accumulation_steps" in settings else {}
    trainer, told = trained(tmp_path, Change("all scaled"), **settings, **more)
    assert told == [] and trainer.state.global_step == 4


def test_gradients_in_half_precision_are_rounded_when_they_are_clipped(tmp_path):
    """Each of their numbers, by up to 0.4%: a run of such weights ended in its first step as another gradient's."""
    trainer, told = trained(tmp_path / "clipped", dtype=torch.bfloat16, max_grad_norm=0.01)
    assert told == [] and trainer.state.global_step == 4
    with pytest.raises(UserError, match="changed between"):
        trained(tmp_path / "noisy", Change("noise"), dtype=torch.bfloat16)


def test_what_sets_in_later_or_in_an_optimizers_hook_is_found_too(tmp_path):
    with pytest.raises(UserError, match="changed between"):
        trained(tmp_path, Change("noise", first=3))
    with pytest.raises(UserError, match="changed between"):
        trained(tmp_path, hook="noise")


def test_warn_says_it_once_and_the_checkpoints_record_holds_it(tmp_path):
    trainer, told = trained(tmp_path, Change("noise"), on_failed_premise="warn")
    check = trainer._guard.premise.check
    assert len(told) == 1 and trainer.state.global_step == 4
    assert check.made and "changed between" in check.trouble

"""Half precision: where it makes measured changes noise, it is said once, with the remedy, which works."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

from entropy_core.fold_gradients import Estimate
from entropy_core.measurement import EntropyMeasurement
from rl_training.config import EntropyProbeConfig
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.probe.change import EntropyChange, StepParts
from rl_training.probe.rounding import RoundingNoise
from tests.rl_training.premises.test_sampling_words import llama
from tests.rl_training.sampling_setting import make_trainer


def adapters(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))


MODES = {
    "simple": {"mode": "simple", "preset": "accurate", "eval_sequences": 16},
    "watch": {"rollouts": "current", "measure_every": 1, "predict_every": 1, "eval_sequences": 16},
}


def history(model, folder, mode="simple", **settings):
    trainer = make_trainer(model, folder, max_steps=3, **{"learning_rate": 2e-5, **settings})
    config = EntropyProbeConfig(on_error="raise", **MODES[mode])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = attach_entropy_probe(trainer, config, console=False)
        trainer.train()
    return callback.history, [str(w.message) for w in caught if "rounding noise" in str(w.message)]


def noise(changes) -> float:
    """How far measured changes lie from their own derivatives, relative to these."""
    pairs = [(c.measured_change, c.same_tokens) for c in changes if c.same_tokens == c.same_tokens]
    return max(abs(measured - derivative) / abs(derivative) for measured, derivative in pairs)


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_half_precision_is_named_and_the_remedy_mends_it(tmp_path, kind, mode):
    model = llama()
    half = copy.deepcopy(model).bfloat16()
    changes, told = history(half if kind == "trained" else adapters(half), tmp_path, mode)
    assert len(told) == 1 and "bfloat16" in told[0] and "float32 (and set bf16=True" in told[0]
    assert noise(changes) > 0.5
    changes, told = history(model if kind == "trained" else adapters(model), tmp_path, mode, bf16=True)
    assert told == [] and noise(changes) < 0.1


def test_a_frozen_model_in_half_precision_whose_steps_are_larger_than_its_rounding_is_not_warned_of(tmp_path):
    changes, told = history(adapters(llama().bfloat16()), tmp_path, learning_rate=2e-3)
    assert told == [] and noise(changes) < 0.5


@pytest.mark.parametrize(
    ("measured", "derivative", "told"), [(0.02, 0.005, False), (0.002, 0.0005, True), (0.0, 0.0, False)]
)
def test_higher_orders_of_a_large_step_are_not_taken_for_rounding(measured, derivative, told):
    model = nn.Linear(2, 2).bfloat16().requires_grad_(False)
    seen = EntropyMeasurement(1.0, 1.0 + measured, measured, 0.001, 16.0, 16)
    parts = StepParts.only_total(Estimate(derivative))
    how = {"estimator": "split", "estimand": "", "sequences": 16, "effective_sample_size": 16.0, "entropy": 1.0}
    change = EntropyChange(per_token=parts, per_completion=None, **how, same_tokens=derivative, measured=seen)
    watch = RoundingNoise(model)
    assert (watch.word(change) is not None) == told
    assert watch.word(change) is None, "said once"

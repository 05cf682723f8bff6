"""attach_entropy_probe under optimizers that transformers makes by name, and under some of a user's own."""

import warnings

import pytest
import torch

from entropy_core.gradients import entropy_rows
from entropy_core.passes.settings import PassSettings
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.integrations.trl import attach_entropy_probe
from tests.rl_training.integrations.test_trl_integration import (
    STEPS,
    check_same_tokens,
    logged,
    make_trainer,
    weights_of,
)
from tests.rl_training.probe.test_step_parts import SignOfMomentum


def train_with(tiny_policy, folder, optimizer, probe=None, **settings):
    """Training whose optimizer is there before the probe is attached."""
    trainer = make_trainer(tiny_policy, folder, **settings)
    trainer.optimizer = optimizer([p for p in trainer.model.parameters() if p.requires_grad])
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1.0)
    config = EntropyProbeConfig(**{"on_error": "raise", "mode": "simple", "preset": "accurate", **(probe or {})})
    callback = attach_entropy_probe(trainer, config, console=False)
    return trainer, callback


OPTIMIZERS = {
    "sgd": {"optim": "sgd", "learning_rate": 1e-3},
    "rmsprop": {"optim": "rmsprop", "learning_rate": 1e-5},
    "adafactor": {"optim": "adafactor", "learning_rate": 1e-4},
    "adagrad": {"optim": "adagrad", "learning_rate": 1e-4},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_is_predicted_along_the_step_it_takes(tiny_policy, tmp_path, name):
    """Held-out sequences and no average: the gradient of the observed batch, taken here by the loop over sequences."""
    trainer = make_trainer(tiny_policy, tmp_path, **OPTIMIZERS[name])
    config = EntropyProbeConfig(preset="held_out", eval_sequences=8, on_error="raise")
    callback = attach_entropy_probe(trainer, config, console=False)
    probe, model = callback._probe, trainer.model
    wanted, kept = [], {}
    observe, after = probe.observe, probe.after_step

    def watching(batch, *rest, **named):
        rows = entropy_rows(model, batch, "split", passes=PassSettings(method="loop"))
        kept["gradient"] = {n: r.double().mean(0) for n, r in rows.items()}
        kept["before"] = {n: p.detach().double() for n, p in model.named_parameters()}
        return observe(batch, *rest, **named)

    def comparing(**named):
        taken = {n: p.detach().double() - kept["before"][n] for n, p in model.named_parameters()}
        wanted.append(sum(float((g * taken[n]).sum()) for n, g in kept["gradient"].items()))
        return after(**named)

    probe.observe, probe.after_step = watching, comparing
    with pytest.warns(RuntimeWarning, match="without parts"):
        trainer.train()
    entries = logged(trainer)
    assert len(entries) == STEPS and all("batch" not in entry and "momentum" not in entry for entry in entries)
    assert [entry["predicted"] for entry in entries] == pytest.approx(wanted, rel=1e-4)
    assert [entry["same_tokens"] for entry in entries] == pytest.approx(wanted, rel=1e-4)
    for entry in entries:
        assert entry["predicted_se"] > 0
        error = max(0.1 * abs(entry["measured"]), 0.05 * entry["measured_se"], 5e-7)
        assert abs(entry["same_tokens"] - entry["measured"]) < error, entry


def test_an_optimizer_of_ones_own_is_spoken_of_at_attach(tiny_policy, tmp_path):
    with pytest.warns(RuntimeWarning, match="SignOfMomentum is not AdamW.*without parts"):
        trainer, _ = train_with(tiny_policy, tmp_path, lambda p: SignOfMomentum(p, lr=1e-6))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the entropy probe")
        trainer.train()
    check = logged(trainer)
    assert len(check) == STEPS and all("predicted" in e and "momentum" not in e for e in check)
    for how in ("none", "previous_step"):
        with pytest.raises(UserError, match=f"preconditioning={how}"):
            train_with(tiny_policy, tmp_path, SignOfMomentum, {"preconditioning": how})
    alone = make_trainer(tiny_policy, tmp_path / "without")
    alone.optimizer = SignOfMomentum([p for p in alone.model.parameters() if p.requires_grad], lr=1e-6)
    alone.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(alone.optimizer, lambda step: 1.0)
    alone.train()
    weights = weights_of(trainer)
    assert all(torch.equal(weights[n], w) for n, w in weights_of(alone).items()), "the probe changed the training"


def test_rates_of_ones_own_for_each_group_are_predicted_in_parts(tiny_policy, tmp_path):
    def lora_plus(parameters):
        first, second = parameters[::2], parameters[1::2]
        return torch.optim.AdamW(
            [{"params": first, "lr": 1e-6, "weight_decay": 0.1}, {"params": second, "lr": 1.6e-5, "betas": (0.8, 0.9)}]
        )

    trainer, _ = train_with(tiny_policy, tmp_path, lora_plus, lora=True)
    trainer.train()
    check_same_tokens(logged(trainer))


@pytest.mark.parametrize("scaling", [True, False])
def test_gradients_that_a_scaler_has_not_divided_are_no_plain_step(tiny_policy, tmp_path, scaling):
    """They are 1024 times too large where nothing clips them; so was what `preconditioning: none` said of the step."""
    trainer = make_trainer(tiny_policy, tmp_path, optim="sgd", learning_rate=1e-3, max_grad_norm=0.0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaling)
    config = EntropyProbeConfig(preset="held_out", eval_sequences=8, on_error="raise", preconditioning="none")
    attach_entropy_probe(trainer, config, console=False)
    if scaling:
        with pytest.raises(ValueError, match="1024 times too large.*set max_grad_norm"):
            trainer.train()
        return
    trainer.train()
    for entry in logged(trainer):
        error = max(0.1 * abs(entry["measured"]), 0.05 * entry["measured_se"], 5e-7)
        assert abs(entry["predicted"] - entry["measured"]) < error, entry

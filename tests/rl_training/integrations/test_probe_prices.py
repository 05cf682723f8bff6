"""`mode: prices`: the list that the probe logs is that of real steps, and training stays what it is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import TrainerCallback

from entropy_core.interventions import TrainingTokens, interventions, loss_coefficients
from entropy_core.scores import token_statistics
from entropy_core.token_ratios import token_ratio_change
from rl_training.config import EntropyProbeConfig
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.probe.step_prices import PRICED
from tests.rl_training.integrations.test_trl_integration import logged, make_trainer, train

ROWS = [{"prompt": f"{a}*{b}="} for a in range(5) for b in range(5)]
PRICES = {
    "mode": "prices",
    "prices_every": 1,
    "predict_every": 1,
    "eval_sequences": 24,
    "advantage_decay": 1.0,
}
SETTINGS = {"loss_type": "dr_grpo", "scale_rewards": "none", "learning_rate": 2e-4}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_prices_are_derivatives_along_steps_that_torchs_adamw_takes(tiny_policy, tmp_path):
    """Each intervention's loss is written out, differentiated by autograd and stepped with a copy of the optimizer; the change of
    the held-out statistics along the difference of both steps is taken by a central difference."""
    trainer = make_trainer(tiny_policy, tmp_path, **SETTINGS, max_steps=2, max_grad_norm=0.1)  # clipping acts
    found, checked = [], []
    callback = attach_entropy_probe(trainer, EntropyProbeConfig(**PRICES, on_error="raise"), ROWS, console=False)
    watch = callback._watch
    priced = watch.prices

    def spied(optimizer, training, tolerance):
        metrics = priced(optimizer, training, tolerance)
        found.append(metrics)
        checked.append(_by_hand(trainer, optimizer, training, watch._watch))
        return metrics

    watch.prices = spied
    trainer.train()
    assert len(found) == 2
    for metrics, expected in zip(found, checked, strict=True):
        assert {name.split("/")[1] for name in metrics} == set(expected) and len(expected) >= 6
        for name, change in expected.items():
            value, error = metrics[f"price/{name}/entropy"], metrics[f"price/{name}/entropy_se"]
            assert value == pytest.approx(change, rel=2e-2, abs=2e-8), name
            assert 0 < error < 100 * abs(value) + 1e-6
            assert math.isfinite(metrics[f"price/{name}/reward_se"])


def _by_hand(trainer, optimizer, training, watch):
    """name -> change of the watched statistic, intervention less as trained."""
    model, seen = trainer.model, watch.seen
    mask = training.batch.completion_mask
    weights = (training.weights * mask).sum(1) / mask.sum(1)
    statistics = token_statistics(model, training.batch)
    nothing = torch.full_like(weights, torch.nan)
    tokens = TrainingTokens(training.batch, statistics, weights, training.advantages, nothing, weights != weights, None)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = copy.deepcopy(optimizer.state_dict())

    def step(one):
        model.zero_grad()
        with torch.enable_grad():
            _loss(model, training.batch, loss_coefficients(one.objective, training.batch, weights)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] *= one.learning_rate_factor
        optimizer.step()
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.load_state_dict(copy.deepcopy(state))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
        return after

    listed = {one.name: one for one in interventions(tokens, "") if one.objective is not None}
    inner = getattr(optimizer, "optimizer", optimizer)
    optimizer, found = inner, {}
    state = copy.deepcopy(inner.state_dict())
    trained = step(listed["run"])
    for name in PRICED:
        if name in listed:
            other = step(listed[name])
            found[name] = _central(model, seen, watch, {n: other[n] - trained[n] for n in other}, start)
    for name, p in model.named_parameters():
        p.grad = gradients.get(name)
    return found


def _loss(model, batch, coefficients):
    """Minus the sum of gamma log pi + alpha H, a sequence at a time and without padding."""
    total = 0.0
    for row in range(len(batch)):
        kept = batch.attention_mask[row].bool()
        ids, drawn = batch.input_ids[row][kept], batch.completion_mask[row][kept]
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1].double() / batch.temperature, -1)
        own = logprobs.gather(1, ids[1:, None])[:, 0]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        gamma, alpha = (c[row][kept][1:] for c in (coefficients.logprob, coefficients.entropy))
        total = total - ((gamma * own + alpha * entropy) * drawn[1:]).sum()
    return total


def _central(model, seen, watch, direction, start):
    def moved(scale):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name] + scale * direction[name])
            after = token_statistics(model, seen.batch)
            for name, p in model.named_parameters():
                p.copy_(start[name])
        change = token_ratio_change(
            seen.statistics, after, seen.batch, watch._values, watch._config.advantage_decay, seen.log_weights
        )
        return change.change

    size = math.sqrt(sum(float(d.square().sum()) for d in direction.values()))
    scale = 0.02 / size
    return (moved(scale) - moved(-scale)) / (2 * scale)


def test_training_is_bit_identical_and_prices_come_every_so_many_predictions(tiny_policy, tmp_path):
    trainer, _ = train(tiny_policy, tmp_path / "priced", {**PRICES, "predict_every": 2}, ROWS, **SETTINGS, max_steps=4)
    alone = make_trainer(tiny_policy, tmp_path / "alone", **SETTINGS, max_steps=4)
    alone.train()
    assert all(torch.equal(w, weights(alone)[name]) for name, w in weights(trainer).items())
    rows = logged(trainer)
    priced = [any(name.startswith("price/") for name in row) for row in rows]
    assert priced == [True, False, True, False]


def test_it_is_refused_in_words_where_it_cannot_be(tiny_policy, tmp_path):
    with pytest.raises(ValueError, match="prices_every belong to mode=watch"):
        EntropyProbeConfig(mode="simple", prices_every=1)
    with pytest.raises(ValueError, match="set predict_every"):
        EntropyProbeConfig(mode="watch", preset="light", prices_every=1)
    assert EntropyProbeConfig(mode="prices").prices_every == 4
    with pytest.warns(RuntimeWarning, match="there is no price list"):
        trainer, _ = train(tiny_policy, tmp_path, PRICES, ROWS, **{**SETTINGS, "beta": 0.1})
    priced = [any(name.startswith("price/") for name in row) for row in logged(trainer)]
    assert priced == [True, False, False], "the KL term has no gradient at the reference itself, and one from then on"


class Halved(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)


def test_a_gradient_that_a_callback_scales_has_no_price_list_and_the_cause_is_said(tiny_policy, tmp_path):
    """Interventions' gradients would have to pass the same callback."""
    trainer = make_trainer(tiny_policy, tmp_path, **SETTINGS, max_steps=1, max_grad_norm=0.0)
    trainer.add_callback(Halved())
    attach_entropy_probe(trainer, EntropyProbeConfig(**PRICES, on_error="raise"), ROWS, console=False)
    with pytest.warns(RuntimeWarning, match=r"the optimizer gets 0\.5 times the loss's gradient.*no price list"):
        trainer.train()
    assert not [name for name in trainer.state.log_history[0] if name.startswith("entropy_probe/price/")]

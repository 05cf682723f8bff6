"""The entropy controller in real trainers: the bonus that it adds, what it leaves alone, and that a resumed run goes on."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import TrainerCallback

from rl_training.config import EntropyProbeConfig
from rl_training.controller_config import EntropyControllerConfig
from rl_training.errors import UserError
from rl_training.integrations.entropy_controller import STATE_KEY, attach_entropy_controller
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.run.sidecar import read_sidecar
from rl_training.train import build_trainer, run_training
from tests.rl_training.integrations.test_trl_integration import make_trainer
from tests.tiny_policy import tiny_train_config

RATE = 1e-3
QUICK = {"eval_sequences": 8, "start_after": 0}
DR_GRPO = {"loss_type": "dr_grpo", "scale_rewards": "none", "learning_rate": RATE}


def controlled(tiny_policy, folder, target=None, lora=False, settings=None, rows=None, **controller):
    trainer = make_trainer(tiny_policy, folder, lora=lora, **{**DR_GRPO, **(settings or {})})
    config = EntropyControllerConfig(**{**QUICK, **controller})
    return trainer, attach_entropy_controller(trainer, target, config, rows, console=False)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def forced(callback, alpha):
    """Give every step this coefficient."""
    solve = callback._controller._solve

    def always(*arguments):
        found = solve(*arguments)
        return type(found)(alpha, found.change, found.without, False)

    callback._controller._solve = always


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"max_grad_norm": 0.01},
        {"max_grad_norm": 0.0},
        {"loss_type": "grpo", "scale_rewards": "group"},
        {"gradient_checkpointing": True},
        {"num_iterations": 2},
        {"lora": True},
    ],
    ids=lambda s: "-".join(s) or "plain",
)
def test_what_is_added_is_the_trainers_own_entropy_bonus(tiny_policy, tmp_path, settings):
    """A run with a forced coefficient is the run with `entropy_coef`: the same weights after three steps, clipping included."""
    lora, settings = settings.get("lora", False), {k: v for k, v in settings.items() if k != "lora"}
    trainer, callback = controlled(tiny_policy, tmp_path / "ours", lora=lora, settings=settings)
    forced(callback, 0.3)
    trainer.train()
    own = make_trainer(tiny_policy, tmp_path / "own", lora=lora, **{**DR_GRPO, **settings, "entropy_coef": 0.3})
    start = weights(own)
    own.train()
    plain = make_trainer(tiny_policy, tmp_path / "plain", lora=lora, **{**DR_GRPO, **settings})
    plain.train()

    def distance(a, b):
        return math.sqrt(sum(float((w - b[name]).square().sum()) for name, w in a.items()))

    far = distance(weights(plain), weights(own))
    assert distance(weights(trainer), weights(own)) < 0.01 * far
    assert far > 0.02 * distance(weights(own), start), "the bonus makes no difference here"


def test_under_bf16_what_is_added_is_nearer_to_the_exact_bonus_than_the_trainers_own(tiny_policy, tmp_path):
    """bf16 rounds a backward pass by 0.4%: TRL's of loss and bonus together, ours of the bonus alone, which loses less."""

    def gradient(name, coefficient, bf16, ours=False):
        settings = {**DR_GRPO, "bf16": bf16, "max_steps": 1, "entropy_coef": 0.0 if ours else coefficient}
        trainer, seen = make_trainer(tiny_policy, tmp_path / name, **settings), {}
        clip = trainer.accelerator.clip_grad_norm_

        def noted(*arguments, **options):
            seen.update({n: p.grad.detach().clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
            return clip(*arguments, **options)

        trainer.accelerator.clip_grad_norm_ = noted
        if ours:
            forced(
                attach_entropy_controller(trainer, None, EntropyControllerConfig(**QUICK), console=False), coefficient
            )
        trainer.train()
        return seen

    def difference(a, b):
        return {name: a[name].double() - b[name].double() for name in a}

    def size(a):
        return math.sqrt(sum(float(g.square().sum()) for g in a.values()))

    exact = difference(gradient("a", 0.3, False), gradient("b", 0.0, False))
    without = gradient("c", 0.0, True)
    trl = size(difference(difference(gradient("d", 0.3, True), without), exact)) / size(exact)
    ours = size(difference(difference(gradient("e", 0.3, True, ours=True), without), exact)) / size(exact)
    assert ours < 0.015 and ours < trl < 0.06, (ours, trl)


def test_inside_the_band_training_is_bit_identical(tiny_policy, tmp_path):
    trainer, callback = controlled(tiny_policy, tmp_path / "ours", band=10.0)
    trainer.train()
    alone = make_trainer(tiny_policy, tmp_path / "alone", **DR_GRPO)
    alone.train()
    assert [step.alpha for step in callback.history] == [0.0] * 3
    assert all(torch.equal(w, weights(alone)[name]) for name, w in weights(trainer).items())


def test_a_target_above_is_approached_and_each_prediction_is_of_the_step_taken(tiny_policy, tmp_path):
    """`predicted` with the bonus is the derivative along the step that was taken, which the probe reads off the weights."""
    prompts = [{"prompt": f"{a}*{b}="} for a in range(4) for b in range(4)]
    settings = {"max_steps": 6, "learning_rate": 1e-4}
    trainer, callback = controlled(
        tiny_policy,
        tmp_path,
        target=4.6,
        settings=settings,
        rows=prompts,
        horizon=1,
        alpha_min=-100.0,
        alpha_max=100.0,
        max_change=2e-4,
    )
    gradients, before = [], []
    look = callback._controller._look

    def noted(*arguments):
        seen, gradient = look(*arguments)
        gradients.append({name: g.clone() for name, g in gradient.items()})
        before.append(weights(trainer))
        return seen, gradient

    noted.coefficients = look.coefficients
    callback._controller._look = noted
    trainer.train()
    before.append(weights(trainer))
    for step, done in enumerate(callback.history):
        moved = {name: before[step + 1][name] - before[step][name] for name in gradients[step]}
        along = sum(float((g * moved[name]).sum(dtype=torch.float64)) for name, g in gradients[step].items())
        assert along == pytest.approx(done.predicted, rel=2e-3, abs=1e-8)
    solved = [step for step in callback.history if not step.saturated]
    assert len(solved) >= 4 and any(step.alpha > 0 for step in solved)
    assert all(s.predicted == pytest.approx(2e-4, rel=2e-3) for s in solved)


def test_reward_gradient_is_dr_grpos_own(tiny_policy, tmp_path):
    """First-order change of mean reward by the bonus, against a loss whose gradient is written out: of Dr. GRPO alone."""
    trainer, callback = controlled(tiny_policy, tmp_path / "a", target=4.6, alpha_max=100.0)
    trainer.train()
    assert all(math.isfinite(step.reward) for step in callback.history)
    assert any(step.reward != 0 for step in callback.history if step.alpha)
    assert "entropy_controller/reward_change" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    "settings",
    [{"loss_type": "grpo"}, {"mask_truncated_completions": True}, {"delta": 4.0}, {"num_iterations": 2}],
    ids=lambda settings: next(iter(settings)),
)
def test_the_cost_in_reward_is_left_out_where_the_loss_is_another(tiny_policy, tmp_path, settings):
    trainer, callback = controlled(tiny_policy, tmp_path, settings={"max_steps": 1, **settings})
    trainer.train()
    assert (
        all(math.isnan(step.reward) for step in callback.history) and "not known for this loss" in callback.describe()
    )
    assert "entropy_controller/reward_change" not in trainer.state.log_history[0]


def test_also_where_a_loss_is_somebodys_own_or_prompts_are_drawn_by_their_difficulty(tiny_policy, tmp_path):
    trainer, callback = controlled(tiny_policy, tmp_path)
    assert callback._reward_scale() == trainer.args.max_completion_length * 4 / 3
    for name, value in (("max_refill_rounds", 2), ("difficulty_weighting", True)):
        setattr(trainer.args, name, value)  # as the arguments of our own trainer
        assert callback._reward_scale() is None, name
        delattr(trainer.args, name)
    own = trainer._compute_loss
    trainer._compute_loss = lambda *arguments: 2 * own(*arguments)
    assert callback._reward_scale() is None


def test_a_resumed_run_takes_the_same_steps(tiny_policy, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    setting = {"target": 4.6, "settings": settings, "alpha_max": 100.0}
    whole, callback = controlled(tiny_policy, tmp_path, **setting)
    whole.train()
    again, resumed = controlled(tiny_policy, tmp_path, **setting)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.history == callback.history[2:], "level, bias, target or pool were not carried on"
    assert any(step.alpha for step in resumed.history)
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(again).items())


def test_a_damaged_state_is_refused_and_a_missing_one_said(tiny_policy, tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer, _ = controlled(tiny_policy, tmp_path, target=4.6, settings=settings)
    trainer.train()
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    for damage, expected in (
        (lambda s: s["controller"]["level"].update(value="much"), "damaged"),
        (lambda s: s.pop("pool"), "damaged"),
    ):
        broken = json.loads(json.dumps(state))
        damage(broken["stateful_callbacks"][STATE_KEY])
        path.write_text(json.dumps(broken))
        again, _ = controlled(tiny_policy, tmp_path, target=4.6, settings=settings)
        with pytest.raises(UserError, match=expected):
            again.train(resume_from_checkpoint=str(path.parent))
    del state["stateful_callbacks"][STATE_KEY]
    path.write_text(json.dumps(state))
    again, _ = controlled(tiny_policy, tmp_path, target=4.6, settings=settings)
    with pytest.warns(RuntimeWarning, match="begin anew"):
        again.train(resume_from_checkpoint=str(path.parent))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"entropy_coef": 0.1}, "entropy_coef=0"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=False"),
        ({"top_entropy_quantile": 0.5}, "set it to 1"),
    ],
)
def test_trainers_that_cannot_be_solved_for_are_refused_in_a_line(tiny_policy, tmp_path, settings, words):
    with pytest.raises(UserError, match=words) as caught:
        controlled(tiny_policy, tmp_path, settings=settings)
    assert "\n" not in str(caught.value)


def test_another_optimizer_and_half_precision_are_refused(tiny_policy, tmp_path):
    trainer, _ = controlled(tiny_policy, tmp_path, settings={"optim": "sgd"})
    with pytest.raises(UserError, match="optim=adamw_torch"):
        trainer.train()
    half = make_trainer(tiny_policy, tmp_path / "half", **DR_GRPO)
    half.model.to(torch.bfloat16)
    with pytest.raises(UserError, match="float32"):
        attach_entropy_controller(half, 4.0)


def test_the_probe_beside_it_watches_the_step_with_its_bonus(tiny_policy, tmp_path):
    trainer, callback = controlled(tiny_policy, tmp_path, target=4.6, settings={"learning_rate": 1e-5}, alpha_max=100.0)
    probe = EntropyProbeConfig(mode="simple", preset="accurate", on_error="raise", averaging=0.0)
    watching = attach_entropy_probe(trainer, probe, console=False)
    trainer.train()
    assert any(step.alpha for step in callback.history) and len(watching.history) == 3
    for change in watching.history:
        error = max(0.1 * abs(change.measured.change), 0.05 * change.measured.standard_error)
        assert abs(change.same_tokens - change.measured.change) < error, "the probe split another step than was taken"


def test_it_says_that_it_changes_training(tiny_policy, tmp_path, capsys):
    trainer = make_trainer(tiny_policy, tmp_path, **DR_GRPO)
    attach_entropy_controller(trainer, 4.0)
    said = capsys.readouterr().err
    assert "THIS CHANGES TRAINING" in said and "4 nats per token" in said


def test_the_train_command_has_it_by_configuration_and_its_checkpoints_say_so(tiny_policy, tmp_path):
    """Dr. GRPO's own guards know of what is added; a change of the gradient after it would still stop the run."""
    controller = {"enabled": True, "target": 4.6, "alpha_max": 100.0, **QUICK}
    run = tmp_path / "run"
    config = tiny_train_config(tiny_policy, run, training={"steps": 3, "save_every": 3}, entropy_controller=controller)
    run_training(config, quiet=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(row["entropy_controller/alpha"] > 0 for row in rows)
    sidecar = read_sidecar(run / "checkpoint-3")
    assert sidecar is not None and "THIS CHANGES TRAINING" in str(sidecar.entropy_controller)
    assert sidecar.gradient_premise is not None and sidecar.gradient_premise.trouble is None
    trainer, _ = build_trainer(
        tiny_train_config(tiny_policy, tmp_path / "noisy", training={"steps": 3}, entropy_controller=controller)
    )
    trainer.add_callback(_Noise(trainer.model))
    with pytest.raises(UserError, match="changed between the backward pass"):
        trainer.train()


class _Noise(TrainerCallback):
    def __init__(self, model):
        self._model = model

    def on_pre_optimizer_step(self, *_args, **_kwargs):
        for p in self._model.parameters():
            if p.grad is not None:
                p.grad.add_(torch.randn_like(p.grad))

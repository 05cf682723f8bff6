"""attach_entropy_probe on TRL's own trainer: every loss, accumulation, reuse, full and LoRA training, mixed precision.

`same_tokens` is the newest gradient alone along the step: with the split estimator the derivative of `measured`, so that the
two differ by curvature alone. What is predicted (`predicted`) comes from a running average.
"""

import math
import re
import warnings

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from rl_training.config import EntropyProbeConfig, LoraConfig
from rl_training.errors import UserError
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.models.load import add_lora, load_model_and_tokenizer
from tests.tiny_policy import even_start_reward
from tests.warm_python import warm_run

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
LINEAR_LOSSES = ["dr_grpo", "grpo", "bnpo", "dapo"]
STEPS = 3
SMALL_RUN = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": STEPS,
    "logging_steps": 1,
    "learning_rate": 1e-5,
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "max_completion_length": 6,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


def make_trainer(tiny_policy, folder, lora=False, **settings):
    model, tokenizer = load_model_and_tokenizer(str(tiny_policy), device="cpu")
    model = add_lora(model, LoraConfig(r=4)) if lora else model.requires_grad_(True)
    if settings.get("loss_type") == "luspo":
        settings = {"importance_sampling_level": "sequence", **settings}
    arguments = GRPOConfig(
        **{
            **SMALL_RUN,
            "output_dir": str(folder),
            **settings,
        }
    )
    prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(6) for b in range(4)])
    return GRPOTrainer(model, even_start_reward, args=arguments, train_dataset=prompts, processing_class=tokenizer)


def train(tiny_policy, folder, probe=None, rows=None, **settings):
    """(trainer, callback) after training; `probe` holds settings of the probe's own."""
    trainer = make_trainer(tiny_policy, folder, **settings)
    config = EntropyProbeConfig(**{"on_error": "raise", "mode": "simple", "preset": "accurate", **(probe or {})})
    callback = attach_entropy_probe(trainer, config, rows, console=False)
    trainer.train()
    return trainer, callback


def logged(trainer):
    """One dict a logged step, of the probe's own metrics without their prefix."""
    prefix = "entropy_probe/"
    entries = [
        {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return entries


def check_same_tokens(entries, count=STEPS):
    assert len(entries) == count
    for entry in entries:
        assert entry["same_tokens"] != 0
        error = max(0.1 * abs(entry["measured"]), 0.05 * entry["measured_se"], 5e-7)
        assert abs(entry["same_tokens"] - entry["measured"]) < error, entry
        total = entry["batch"] + entry["momentum"] + entry["decay"]
        assert total == pytest.approx(entry["predicted"], rel=1e-5, abs=1e-9), "parts do not sum to the total"


@pytest.mark.long
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_is_predicted(tiny_policy, tmp_path, loss_type):
    """The relative error is curvature, of the order of the step, until float32 rounds h (at 1e-7 of its 4 nats)."""
    errors = {}
    for rate in (1e-4, 1e-5):
        trainer, _ = train(tiny_policy, tmp_path / str(rate), loss_type=loss_type, learning_rate=rate, max_steps=2)
        entries = logged(trainer)
        if rate == 1e-5:
            check_same_tokens(entries, 2)
        off = sum(abs(e["same_tokens"] - e["measured"]) for e in entries)
        errors[rate] = off / sum(abs(e["measured"]) for e in entries)
    assert errors[1e-5] < 0.03, f"same tokens over measured is not one: {errors}"
    assert errors[1e-5] < 0.3 * errors[1e-4] or errors[1e-4] < 0.02, (
        f"the error does not shrink with the step: {errors}"
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"num_iterations": 2},
        {"beta": 0.05},
        {"lora": True},
        {"gradient_checkpointing": True},
        {"weight_decay": 0.1},
        {"bf16": True},
        {"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "temperature": 0.7},
        {"mask_truncated_completions": True},
        {"scale_rewards": "batch", "max_grad_norm": 0.01},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    ],
    ids=lambda s: "-".join(s),
)
def test_any_setting_is_predicted(tiny_policy, tmp_path, settings):
    """Under mixed precision the probe's own passes run in full: log-ratios in bfloat16 would be quantised."""
    entries = logged(train(tiny_policy, tmp_path, **settings)[0])
    if "warmup_steps" in settings:
        first = entries.pop(0)
        assert first["predicted"] == first["measured"] == 0.0, "the first step of a warm-up has a rate of zero"
        check_same_tokens(entries, STEPS - 1)
    else:
        check_same_tokens(entries)


# ---------------------------------------------------------------------- where the watched sequences come from
@pytest.mark.parametrize("rollouts", ["current", "previous_step", "fresh"])
def test_every_source_of_sequences(tiny_policy, tmp_path, rollouts):
    _, callback = train(tiny_policy, tmp_path, {"rollouts": rollouts, "eval_sequences": 12}, max_steps=4)
    changes = callback.history
    assert len(changes) == (3 if rollouts == "previous_step" else 4), "the first step has no step before it"
    for change in changes:
        assert change.sequences == 12 and change.measured is not None
        error = max(0.1 * abs(change.measured.change), 0.05 * change.measured.standard_error, 5e-7)
        assert abs(change.same_tokens - change.measured.change) < error
        weighted = change.effective_sample_size < 12 - 1e-9
        assert weighted == (rollouts == "previous_step"), "only sequences of an earlier policy need weights"
        assert change.effective_sample_size > 11.9, "one small step of age leaves nearly all of them"


def test_fresh_without_averaging_predicts_from_held_out_rows_alone(tiny_policy, tmp_path):
    rows = [{"prompt": f"{i}*{i}="} for i in range(4)]
    probe = {"preset": "held_out", "eval_sequences": 8}
    trainer, callback = train(tiny_policy, tmp_path, probe, rows)
    entries = logged(trainer)
    check_same_tokens(entries)
    for entry, change in zip(entries, callback.history, strict=True):
        assert entry["predicted"] == pytest.approx(entry["same_tokens"], rel=1e-6), "an average crept in"
        assert change.sequences == 8, "four prompts were not drawn from twice"
    with pytest.raises(UserError, match="no prompts"):
        train(tiny_policy, tmp_path / "none", probe, rows=[])


def test_fresh_draws_from_the_evaluation_set_where_there_is_one(tiny_policy, tmp_path, monkeypatch):
    import rl_training.integrations.fresh_prompts as integration

    drawn = []
    original = integration.draw

    def spy(model, tokenizer, rows, *rest):
        drawn.extend(row["prompt"] for row in rows)
        return original(model, tokenizer, rows, *rest)

    monkeypatch.setattr(integration, "draw", spy)
    for held_out in (None, Dataset.from_list([{"prompt": "9*9="}, {"prompt": "8*8="}])):
        trainer = make_trainer(tiny_policy, tmp_path, max_steps=1)
        trainer.eval_dataset = held_out if held_out is None else {"some": held_out}
        config = EntropyProbeConfig(
            mode="simple", preset="accurate", rollouts="fresh", on_error="raise", eval_sequences=8
        )
        attach_entropy_probe(trainer, config, console=False)
        drawn.clear()
        trainer.train()
        assert len(drawn) == 2, "eight sequences, four of a prompt"
        assert set(drawn) == {"9*9=", "8*8="} if held_out else all("+" in prompt for prompt in drawn)


# ---------------------------------------------------------------------- schedules
def test_between_refreshes_there_is_a_prediction_and_no_measurement(tiny_policy, tmp_path):
    entries = logged(train(tiny_policy, tmp_path, {"refresh_every": 2}, max_steps=5)[0])
    assert len(entries) == 5
    for number, entry in enumerate(entries):
        assert entry["predicted"] != 0 and entry["batch"] != 0
        for name in ("measured", "measured_se", "same_tokens", "ess", "entropy"):
            assert (name in entry) == (number % 2 == 0), f"{name} in step {number}"
    assert entries[4]["cumulative_predicted_where_measured"] == pytest.approx(
        sum(entries[i]["predicted"] for i in (0, 2, 4)), rel=1e-6
    )
    assert entries[4]["cumulative_predicted"] == pytest.approx(sum(e["predicted"] for e in entries), rel=1e-6)


def test_only_every_so_many_steps_are_probed(tiny_policy, tmp_path):
    for rollouts in ("current", "previous_step"):
        probe = {"log_every": 2, "rollouts": rollouts}
        trainer, callback = train(tiny_policy, tmp_path / rollouts, probe, max_steps=5)
        entries = logged(trainer)
        assert ["predicted" in entry for entry in entries] == [False, True, False, True, False]
        assert all(bool(entry) == ("predicted" in entry) for entry in entries), "something is logged of other steps"
        assert len(callback.history) == 2 and all(change.measured is not None for change in callback.history)


@pytest.mark.parametrize("preset", ["light", "default", "held_out"])
def test_presets_run(tiny_policy, tmp_path, preset):
    trainer, callback = train(tiny_policy, tmp_path, {"preset": preset}, max_steps=2)
    assert len(callback.history) == 2 and preset in callback.describe()
    adapted = any(not p.requires_grad for p in trainer.model.parameters())
    overlaps = preset != "held_out" and not adapted
    assert ("all weights are trained" in callback.describe()) == overlaps, (
        "that own sequences overstate a change is said"
    )
    assert len(callback.costs) == 2 and all(wall > 0 and cpu > 0 for wall, cpu in callback.costs)
    assert logged(trainer)[1]["seconds"] == pytest.approx(callback.costs[1][0])


# ---------------------------------------------------------------------- what is logged
def test_running_totals_are_sums_of_what_was_logged(tiny_policy, tmp_path):
    entries = logged(train(tiny_policy, tmp_path)[0])
    for kind in ("predicted", "measured"):
        sums = torch.tensor([entry[kind] for entry in entries], dtype=torch.float64).cumsum(0).tolist()
        assert [entry[f"cumulative_{kind}"] for entry in entries] == pytest.approx(sums)
    assert not any("correlation" in entry for entry in entries), "three steps say nothing of a correlation"
    assert all(entry["predicted_se"] > 0 and entry["ess"] <= 16.001 for entry in entries)


def test_what_is_asked_for_is_logged_and_nothing_that_is_unknown(tiny_policy, tmp_path):
    probe = {"predictors": True, "per_completion": True, "standard_error_folds": 0}
    for entry in logged(train(tiny_policy, tmp_path, probe)[0]):
        for name in ("score_function", "without_momentum", "covariance", "steer"):
            assert math.isfinite(entry[f"predictor_{name}"]) and entry[f"predictor_{name}"] != 0
        assert entry["predictor_without_momentum"] == pytest.approx(entry["batch"])
        parts = (entry[f"{part}_per_completion"] for part in ("batch", "momentum", "decay"))
        assert sum(parts) == pytest.approx(entry["predicted_per_completion"], rel=1e-5)
        with_errors = {name.removesuffix("_se") for name in entry if name.endswith("_se")}
        assert with_errors == {"entropy", "measured", "cumulative_measured"}, "without folds no prediction has an error"
        assert all(math.isfinite(value) for value in entry.values())


def test_counterfactual_steps_in_a_trainer(tiny_policy, tmp_path):
    """`previous_step` has no P in the first step; `none` needs no P at all."""
    for how, predicted in (("previous_step", 2), ("none", 3)):
        trainer, callback = train(tiny_policy, tmp_path / how, {"preconditioning": how})
        assert len(callback.history) == predicted
        for change in callback.history:
            assert change.total.value == change.batch.value != 0 and change.momentum.value == 0.0


# ---------------------------------------------------------------------- attribution
@pytest.mark.long
@pytest.mark.parametrize("loss_type", LINEAR_LOSSES)
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "lora": True}], ids=lambda s: "-".join(s))
def test_shares_add_up_to_the_batchs_part_for_every_linear_loss(tiny_policy, tmp_path, loss_type, settings):
    trainer, callback = train(
        tiny_policy, tmp_path, {"mode": "attribution"}, loss_type=loss_type, beta=0.0, learning_rate=1e-4, **settings
    )
    sequences = 16 * settings.get("gradient_accumulation_steps", 1)
    for change, entry in zip(callback.history, logged(trainer), strict=True):
        assert change.shares is not None and change.shares.shape == (sequences,)
        scale = float(change.shares.abs().sum())
        assert scale > 0
        assert abs(float(change.shares.sum()) - change.batch.value) < 1e-4 * max(abs(change.batch.value), 0.1 * scale)
        assert abs(entry["largest_share"]) == pytest.approx(float(change.shares.abs().max()))


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2, "learning_rate": 1e-2},
        {"num_iterations": 3, "learning_rate": 2e-4, "importance_sampling_level": "sequence", "epsilon": 0.1},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "lora": True,
         "learning_rate": 3e-2},
        {"top_entropy_quantile": 0.5},
        {"loss_type": "cispo", "num_iterations": 2, "learning_rate": 1e-2},
        {"loss_type": "sapo", "num_iterations": 2, "learning_rate": 1e-2},
        {"mask_truncated_completions": True, "max_completion_length": 24},
        {"num_iterations": 2, "learning_rate": 1e-2, "delta": 1.3, "epsilon_high": 0.4, "loss_type": "dr_grpo"},
    ],
    ids=lambda s: "-".join(s),
)  # fmt: skip
def test_shares_add_up_where_the_tokens_of_a_sequence_have_weights_of_their_own(tiny_policy, tmp_path, settings):
    """Ratios to an earlier policy, clipped or not, other losses and masks of tokens."""
    _, callback = train(tiny_policy, tmp_path, {"mode": "attribution"}, **{"beta": 0.0, "max_steps": 4, **settings})
    assert len(callback.history) == 4
    for step, change in enumerate(callback.history):
        scale = float(change.shares.abs().sum())
        assert scale > 0
        off = abs(float(change.shares.sum()) - change.batch.value) / max(abs(change.batch.value), 0.1 * scale)
        assert off < 1e-3, f"step {step}: a ratio or a mask is missing from the weights"


@pytest.mark.parametrize(
    "asked", [{"mode": "attribution"}, {"mode": "simple", "fused": True}], ids=["attribution", "fused"]
)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.05}, "KL term .beta=0.05.; set beta=0"),
        ({"entropy_coef": 0.01}, "entropy bonus .entropy_coef=0.01.; set entropy_coef=0"),
        ({"use_adaptive_entropy": True}, "entropy bonus .use_adaptive_entropy=True."),
    ],
    ids=["beta", "entropy_coef", "adaptive"],
)
def test_a_second_term_is_refused_by_its_name_before_training_starts(tiny_policy, tmp_path, settings, message, asked):
    trainer = make_trainer(tiny_policy, tmp_path, lora=True, **settings)
    with pytest.raises(UserError, match=message):
        attach_entropy_probe(trainer, EntropyProbeConfig(**asked), console=False)


# ---------------------------------------------------------------------- safety
def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "probe",
    [
        {},
        {"rollouts": "previous_step", "mode": "attribution", "predictors": True, "per_completion": True},
        {"rollouts": "fresh", "refresh_every": 2},
    ],
    ids=["default", "everything", "fresh"],
)
def test_training_is_bit_identical_with_and_without(tiny_policy, tmp_path, probe):
    trainer, _ = train(tiny_policy, tmp_path / "with", probe, learning_rate=1e-3)
    alone = make_trainer(tiny_policy, tmp_path / "without", learning_rate=1e-3)
    alone.train()
    with_probe = weights_of(trainer)
    assert all(torch.equal(with_probe[name], w) for name, w in weights_of(alone).items())


def test_a_failure_is_one_warning_frees_memory_and_leaves_training_as_it_was(tiny_policy, tmp_path, monkeypatch):
    """In the second step, after an average exists: from there on as if there were no probe."""
    trainer = make_trainer(tiny_policy, tmp_path / "with", max_steps=4, learning_rate=1e-3)
    callback = attach_entropy_probe(trainer, EntropyProbeConfig(mode="simple", preset="accurate"), console=False)
    held, calls = [], []
    original = callback._probe.before_step

    def failing(*arguments):
        calls.append(callback._trainer.state.global_step)
        if len(calls) == 2:
            held.append(len(callback._probe._averages))
            raise FloatingPointError("a made-up failure")
        original(*arguments)

    monkeypatch.setattr(callback._probe, "before_step", failing)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
    ours = [str(w.message) for w in seen if "entropy probe" in str(w.message)]
    assert len(ours) == 1 and "FloatingPointError: a made-up failure" in ours[0] and "training goes on" in ours[0]
    assert calls == [0, 1] and held == [1], "it was tried again after the failure"
    probe = callback._probe
    assert not probe._averages and not probe._newest and probe._observation is None and probe._prediction is None
    assert ["predicted" in entry for entry in logged(trainer)] == [True, False, False, False]
    alone = make_trainer(tiny_policy, tmp_path / "without", max_steps=4, learning_rate=1e-3)
    alone.train()
    weights = weights_of(trainer)
    assert all(torch.equal(weights[name], w) for name, w in weights_of(alone).items())


def test_raise_stops_the_run_and_a_step_that_is_not_taken_is_such_a_failure(tiny_policy, tmp_path):
    with pytest.raises(UserError, match="RMSprop does not take"):
        train(tiny_policy, tmp_path, {"preconditioning": "none"}, optim="rmsprop")
    with pytest.warns(RuntimeWarning, match="RMSprop does not take"):
        trainer, _ = train(
            tiny_policy, tmp_path / "warn", {"on_error": "warn", "preconditioning": "none"}, optim="rmsprop"
        )
    assert trainer.state.global_step == STEPS and not any(logged(trainer))


def test_the_newcomers_script_runs(tiny_policy, tmp_path):
    code = "import sys; sys.path.insert(0, 'examples'); import grpo_with_probe as g; "
    done = warm_run("-c", f"{code}g.main({str(tiny_policy)!r}, 2, {str(tmp_path)!r})")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r" ([12]) +\d\.\d{3} .*[+-]\d\.\d{4} ± +\d", done.stderr)
    assert rows == ["1", "2"], "a line a step"
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert b"entropy_probe/predicted" in events.read_bytes()

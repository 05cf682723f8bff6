"""`mode: watch` in real trainers: what it logs, whose pass before the step it takes, and that training goes on all the same."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from pydantic import ValidationError

from entropy_core.measurement import snis_entropy_change
from rl_training.algs.dr_grpo import DrGRPOTrainer
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.probe.watch_state import STATE_KEY
from tests.rl_training.integrations.test_trl_integration import logged, make_trainer
from tests.rl_training.premises.test_sampling_words import llama
from tests.rl_training.sampling_setting import make_trainer as make_other_trainer

RATE = 1e-3
pytestmark = pytest.mark.filterwarnings("ignore:the entropy probe. `measured` and `predicted` are of the step")


OWN = {"rollouts": "current", "measure_every": 1, "predict_every": None, "on_error": "raise", "eval_sequences": 16}


def reweighted(callback):
    """What whole sequences' weights say of every change that is measured, beside what is logged of it."""
    watch, found = callback._watch._watch, []
    after_step = watch.after_step

    def noted(with_hidden=False, steps=1):
        seen, out = watch.seen, after_step(True, steps)
        found.append(snis_entropy_change(seen.statistics, watch.after.statistics, seen.batch, True, seen.log_weights))
        return out

    watch.after_step = noted
    return found


def watched_run(trainer, **probe):
    config = EntropyProbeConfig(**{**OWN, "bias_keep": 0.9, **probe})
    callback = attach_entropy_probe(trainer, config, console=False)
    callback.reweighted = reweighted(callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return callback, logged(trainer), [str(w.message) for w in caught if "the entropy probe:" in str(w.message)]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def every_kind(tiny_policy, tmp_path_factory):
    """Four steps, predicted at every second, split by trial moves at every step."""
    trainer = make_trainer(
        tiny_policy, tmp_path_factory.mktemp("watch"), max_steps=4, learning_rate=RATE, loss_type="dr_grpo"
    )
    callback, entries, said = watched_run(trainer, predict_every=2, shares=True, parts_every=1)
    return trainer, callback, entries, said


def test_every_step_is_watched_and_every_second_predicted(every_kind):
    _, callback, entries, said = every_kind
    assert len(entries) == len(callback.history) == 4 and not said
    assert ["predicted" in entry for entry in entries] == [True, False, True, False]
    assert [change.shares is not None for change in callback.history] == [True, False, True, False]
    names = {
        "measured",
        "measured_se",
        "measured_df",
        "measured_bias",
        "measured_over",
        "critic_r2",
        "entropy",
        "seconds",
    }
    for entry, snis in zip(entries, callback.reweighted, strict=True):
        assert names <= entry.keys() and entry["measured_over"] == 1.0
        # Both are of the same tokens: they differ by lambda, the weights' second order and the critic's noise.
        assert abs(entry["measured"] - snis.change) < 3 * max(entry["measured_se"], snis.standard_error)
        if "predicted" in entry:  # both are of one step here, and of the same tokens
            assert entry["difference"] == pytest.approx(
                entry["predicted"] - entry["measured"] + entry["measured_bias"], rel=1e-5
            )
            assert entry["difference_se"] < entry["predicted_se"]
    assert entries[-1]["cumulative_measured"] == pytest.approx(sum(e["measured"] for e in entries), rel=1e-9)
    assert entries[-1]["cumulative_measured_se"] > entries[0]["cumulative_measured_se"] > 0


def test_parts_add_up_with_the_bias_to_what_is_watched(every_kind):
    for entry in every_kind[2]:
        parts = sum(entry[f"measured_{name}"] for name in ("batch", "momentum", "decay"))
        assert parts + entry["measured_bias"] == pytest.approx(entry["measured"], rel=1e-6, abs=1e-9)
    assert every_kind[2][0]["measured_momentum"] == pytest.approx(0.0, abs=1e-6), "the first step has no momentum"
    assert abs(every_kind[2][3]["measured_momentum"]) > 1e-5


def test_training_is_bit_identical_with_the_watch_and_without(every_kind, tiny_policy, tmp_path):
    alone = make_trainer(tiny_policy, tmp_path, max_steps=4, learning_rate=RATE, loss_type="dr_grpo")
    alone.train()
    assert all(torch.equal(w, weights(alone)[name]) for name, w in weights(every_kind[0]).items())


def test_the_trainers_own_pass_is_taken_and_gives_the_same_numbers(tiny_policy, tmp_path, monkeypatch):
    entries, looks = {}, {False: [], True: []}
    for own in (False, True):
        trainer = make_trainer(tiny_policy, tmp_path / str(own), max_steps=4, learning_rate=RATE, temperature=0.8)
        config = EntropyProbeConfig(**OWN)
        callback = attach_entropy_probe(trainer, config, console=False)
        look = callback._watch._watch.look

        def counted(batch, *args, own=own, look=look, **kwargs):
            looks[own].append(len(batch))
            return look(batch, *args, **kwargs)

        monkeypatch.setattr(callback._watch._watch, "look", counted)
        if own:
            callback._watch._trainer_pass.known.trouble = "not wanted here"
        trainer.train()
        entries[own] = logged(trainer)
    # Eight of ours before steps 1, 2 and 4, which the trainer's are held against, and none before step 3.
    assert looks == {False: [8, 16, 8, 16, 16, 8, 16], True: [16] * 8}
    for ours, theirs in zip(entries[True], entries[False], strict=True):
        assert theirs["measured"] == pytest.approx(ours["measured"], rel=1e-3, abs=1e-6)
        assert theirs["critic_r2"] == pytest.approx(ours["critic_r2"], abs=1e-3)


@pytest.mark.parametrize("what", ["temperature", "dropout", "half precision"])
def test_a_trainers_pass_that_is_not_the_policys_is_not_taken(tiny_policy, tmp_path, what):
    settings = {"bf16": True} if what == "half precision" else {}
    trainer = make_trainer(tiny_policy, tmp_path, max_steps=2, learning_rate=RATE, **settings)
    if what == "dropout":
        for layer in trainer.model.model.layers:
            layer.self_attn.attention_dropout = 0.3
    if what == "temperature":
        forward = trainer._get_per_token_logps_and_entropies

        def other(*args, **kwargs):
            logprobs, entropies, *more = forward(*args, **kwargs)
            return (logprobs, entropies * 1.01, *more)

        trainer._get_per_token_logps_and_entropies = other
    _, entries, said = watched_run(trainer)
    assert len(entries) == 2 and all(math.isfinite(entry["measured"]) for entry in entries)
    assert any("differ from ours" in line and "one of the probe's own" in line for line in said), said


def test_sequences_that_were_rejected_are_watched_too(tmp_path):
    trainer = make_other_trainer(
        llama(),
        tmp_path,
        DrGRPOTrainer,
        max_steps=3,
        learning_rate=RATE,
        reject_zero_advantage=True,
        max_refill_rounds=1,
    )
    callback, entries, said = watched_run(trainer, eval_sequences=24)
    assert len(entries) == 3 and not said
    assert all(change.sequences >= 16 for change in callback.history)


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2},
        {"lora": True},
        {"optim": "sgd"},
        {"optim": "adafactor"},
        {"gradient_checkpointing": True},
        {"mask_truncated_completions": True},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_any_setting_is_watched(tiny_policy, tmp_path, settings):
    trainer = make_trainer(tiny_policy, tmp_path, max_steps=3, learning_rate=RATE, **settings)
    callback, entries, said = watched_run(trainer, parts_every=1)
    assert len(entries) == 3
    for entry, snis in zip(entries, callback.reweighted, strict=True):
        assert abs(entry["measured"] - snis.change) < 4 * max(entry["measured_se"], snis.standard_error, 1e-6)
        assert ("measured_batch" in entry) == ("optim" not in settings)
    assert len(said) == ("optim" in settings), said


def test_a_resumed_run_watches_on_as_if_it_had_not_been_stopped(tiny_policy, tmp_path):
    settings = {"max_steps": 4, "learning_rate": RATE, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tiny_policy, tmp_path / "whole", **settings)
    _, wanted, _ = watched_run(whole, predict_every=3)
    again = make_trainer(tiny_policy, tmp_path / "again", **settings, restore_callback_states_from_checkpoint=True)
    callback = attach_entropy_probe(
        again, EntropyProbeConfig(**{**OWN, "predict_every": 3, "bias_keep": 0.9}), console=False
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    found = logged(again)[-2:]
    assert len(callback.history) == 2 and len(again.state.stateful_callbacks[STATE_KEY]["step"]) == 4
    for theirs, ours in zip(wanted[2:], found, strict=True):
        for name in ("measured", "measured_se", "critic_r2", "cumulative_measured", "cumulative_measured_se"):
            # The first pass after resuming is the probe's own, the undisturbed run's the trainer's: float32 rounding.
            limit = 2e-5 if name == "critic_r2" else 5e-7
            assert abs(ours[name] - theirs[name]) < limit, name
    assert ["predicted" in entry for entry in found] == [False, True], "the phase went on"


def test_memory_is_refused_before_it_is_taken(tiny_policy, tmp_path):
    trainer = make_trainer(tiny_policy, tmp_path, max_steps=1)
    for settings, remedy in (
        ({"mode": "simple"}, "mode=watch"),
        ({"mode": "attribution"}, "mode=watch"),
        ({}, "predict_every=null"),
    ):
        with pytest.raises(UserError, match=remedy):
            attach_entropy_probe(trainer, EntropyProbeConfig(memory_limit=1000, **settings), console=False)
    attach_entropy_probe(trainer, EntropyProbeConfig(memory_limit=1000, preset="light"), console=False)
    attach_entropy_probe(trainer, EntropyProbeConfig(memory_limit="1GB"), console=False)
    with pytest.raises(UserError, match="parts_every=0"):
        watched_run(make_trainer(tiny_policy, tmp_path, max_steps=1), memory_limit=1000, parts_every=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "simple", "predict_every": 2},
        {"mode": "simple", "parts_every": 2},
        {"mode": "simple", "estimator": "critic"},
        {"preset": "light", "shares": True},
        {"mode": "watch", "fused": True},
        {"mode": "watch", "preset": "held_out"},
    ],
)
def test_settings_of_another_mode_are_refused(settings):
    with pytest.raises(ValidationError, match="mode=watch|predict_every|mode=simple"):
        EntropyProbeConfig(**settings)

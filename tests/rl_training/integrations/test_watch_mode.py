"""`mode: watch` in real trainers: what it logs, whose pass before the step it takes, and that training goes on all the same."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from pydantic import ValidationError
from transformers import TrainerCallback

from rl_training.algs.dr_grpo import DrGRPOTrainer
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.probe.watch_state import STATE_KEY
from tests.rl_training.integrations.test_trl_integration import logged, make_trainer
from tests.rl_training.premises.test_sampling_words import llama
from tests.rl_training.sampling_setting import make_trainer as make_other_trainer

RATE = 1e-3


def watched_run(trainer, **probe):
    settings = {"mode": "watch", "on_error": "raise", "eval_sequences": 16, "bias_keep": 0.9, **probe}
    config = EntropyProbeConfig(**settings)
    callback = attach_entropy_probe(trainer, config, console=False)
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
    for entry in entries:
        assert {
            "watched",
            "watched_se",
            "watched_df",
            "watched_bias",
            "critic_r2",
            "measured",
            "entropy",
            "seconds",
        } <= entry.keys()
        # Both are of the same tokens: they differ by lambda, the weights' second order and the critic's noise.
        assert abs(entry["watched"] - entry["measured"]) < 3 * max(entry["watched_se"], entry["measured_se"])
    assert entries[-1]["cumulative_watched"] == pytest.approx(sum(e["watched"] for e in entries), rel=1e-9)
    assert entries[-1]["cumulative_watched_se"] > entries[0]["cumulative_watched_se"] > 0


def test_parts_add_up_with_the_bias_to_what_is_watched(every_kind):
    for entry in every_kind[2]:
        parts = sum(entry[f"watched_{name}"] for name in ("batch", "momentum", "decay"))
        assert parts + entry["watched_bias"] == pytest.approx(entry["watched"], rel=1e-6, abs=1e-9)
    assert every_kind[2][0]["watched_momentum"] == pytest.approx(0.0, abs=1e-6), "the first step has no momentum"
    assert abs(every_kind[2][3]["watched_momentum"]) > 1e-5


def test_training_is_bit_identical_with_the_watch_and_without(every_kind, tiny_policy, tmp_path):
    alone = make_trainer(tiny_policy, tmp_path, max_steps=4, learning_rate=RATE, loss_type="dr_grpo")
    alone.train()
    assert all(torch.equal(w, weights(alone)[name]) for name, w in weights(every_kind[0]).items())


def test_the_trainers_own_pass_is_taken_and_gives_the_same_numbers(tiny_policy, tmp_path, monkeypatch):
    entries, looks = {}, {False: 0, True: 0}
    for own in (False, True):
        trainer = make_trainer(tiny_policy, tmp_path / str(own), max_steps=4, learning_rate=RATE, temperature=0.8)
        config = EntropyProbeConfig(mode="watch", on_error="raise", eval_sequences=16)
        callback = attach_entropy_probe(trainer, config, console=False)
        look = callback._watch._watch.look

        def counted(*args, own=own, look=look, **kwargs):
            looks[own] += 1
            return look(*args, **kwargs)

        monkeypatch.setattr(callback._watch._watch, "look", counted)
        if own:
            callback._watch._trainer_pass.known.trouble = "not wanted here"
        trainer.train()
        entries[own] = logged(trainer)
    # Ours before steps 1, 2 and 4 (they hold the trainer's against them), and not before step 3.
    assert looks == {False: 3 + 4, True: 4 + 4}
    for ours, theirs in zip(entries[True], entries[False], strict=True):
        assert theirs["watched"] == pytest.approx(ours["watched"], rel=1e-3, abs=1e-6)
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
    assert len(entries) == 2 and all(math.isfinite(entry["watched"]) for entry in entries)
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
    _, entries, said = watched_run(trainer, parts_every=1)
    assert len(entries) == 3
    for entry in entries:
        assert abs(entry["watched"] - entry["measured"]) < 4 * max(entry["watched_se"], entry["measured_se"], 1e-6)
        assert ("watched_batch" in entry) == ("optim" not in settings)
    assert len(said) == ("optim" in settings), said


def test_a_resumed_run_watches_on_as_if_it_had_not_been_stopped(tiny_policy, tmp_path):
    settings = {"max_steps": 4, "learning_rate": RATE, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tiny_policy, tmp_path / "whole", **settings)
    _, wanted, _ = watched_run(whole, predict_every=3)
    again = make_trainer(tiny_policy, tmp_path / "again", **settings, restore_callback_states_from_checkpoint=True)
    callback = attach_entropy_probe(
        again, EntropyProbeConfig(mode="watch", on_error="raise", predict_every=3, bias_keep=0.9), console=False
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    found = logged(again)[-2:]
    assert len(callback.history) == 2 and len(again.state.stateful_callbacks[STATE_KEY]["step"]) == 4
    for theirs, ours in zip(wanted[2:], found, strict=True):
        for name in ("watched", "watched_se", "critic_r2", "cumulative_watched", "cumulative_watched_se"):
            # The first pass after resuming is the probe's own, the undisturbed run's the trainer's: float32 rounding.
            limit = 2e-5 if name == "critic_r2" else 5e-7
            assert abs(ours[name] - theirs[name]) < limit, name
    assert ["predicted" in entry for entry in found] == [False, True], "the phase went on"


def test_memory_is_refused_before_it_is_taken(tiny_policy, tmp_path):
    trainer = make_trainer(tiny_policy, tmp_path, max_steps=1)
    for settings, remedy in (
        ({"mode": "simple"}, "mode=watch"),
        ({"mode": "attribution"}, "mode=watch"),
        ({"mode": "watch", "predict_every": 4}, "predict_every"),
    ):
        with pytest.raises(UserError, match=remedy):
            attach_entropy_probe(trainer, EntropyProbeConfig(memory_limit=1000, **settings), console=False)
    attach_entropy_probe(trainer, EntropyProbeConfig(memory_limit=1000, mode="watch"), console=False)
    attach_entropy_probe(trainer, EntropyProbeConfig(memory_limit="1GB"), console=False)
    with pytest.raises(UserError, match="parts_every=0"):
        watched_run(make_trainer(tiny_policy, tmp_path, max_steps=1), memory_limit=1000, parts_every=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "simple", "predict_every": 2},
        {"mode": "simple", "parts_every": 2},
        {"mode": "watch", "shares": True},
        {"mode": "watch", "fused": True},
    ],
)
def test_settings_of_another_mode_are_refused(settings):
    with pytest.raises(ValidationError, match="mode=watch|predict_every|mode=simple"):
        EntropyProbeConfig(**settings)


# --- a pool of held-out sequences ----------------------------------------------------------------------------

ROWS = [{"prompt": f"{a}-{b}="} for a in range(5) for b in range(4)]


def pooled_run(tiny_policy, folder, steps=6, **probe):
    trainer = make_trainer(tiny_policy, folder, max_steps=steps, learning_rate=RATE)
    settings = {"mode": "watch", "rollouts": "pool", "pool_age": 4, "eval_sequences": 16, "on_error": "raise", **probe}
    callback = attach_entropy_probe(trainer, EntropyProbeConfig(**settings), ROWS, console=False)
    return trainer, callback


def test_a_pool_is_watched_and_training_is_bit_identical(tiny_policy, tmp_path):
    trainer, callback = pooled_run(tiny_policy, tmp_path / "with", predict_every=3, parts_every=2)
    pool, seen = callback._watch._pool, []
    turn, draw = pool.turn, pool._draw

    def noted(rng):
        out = turn(rng)
        seen.append((list(pool.names), [m.row for m in pool._members], out))
        return out

    pool.turn = noted
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [w for w in caught if "entropy probe" in str(w.message)]
    entries = logged(trainer)
    assert len(entries) == 6 and all("watched" in e and "watched_filtered" in e for e in entries)
    assert ["predicted" in e for e in entries] == [True, False, False, True, False, False]
    for (before, _, _), (names, rows, _) in zip(seen, seen[1:], strict=False):
        assert names[:12] == before[4:] and not set(names[12:]) & set(before), (
            "four of sixteen are replaced, the oldest"
        )
        assert len(set(rows)) == 16, "prompts are distinct"
    prompts = {tuple(s.prompt_ids) for _, _, out in seen for s in out}
    trained = {tuple(s.prompt_ids) for s in callback._trained}
    assert not prompts & trained and draw is not None
    assert entries[0]["weights_ess"] == pytest.approx(16) and entries[-1]["weights_ess"] < 16
    assert entries[-1]["cumulative_watched"] == pytest.approx(sum(e["watched"] for e in entries), rel=1e-9)
    alone = make_trainer(tiny_policy, tmp_path / "without", max_steps=6, learning_rate=RATE)
    alone.train()
    assert all(torch.equal(w, weights(alone)[name]) for name, w in weights(trainer).items())


def test_the_pass_after_a_step_is_the_next_ones_before_and_gives_the_same_numbers(tiny_policy, tmp_path, monkeypatch):
    entries, looked = {}, {False: [], True: []}
    for own in (False, True):
        trainer, callback = pooled_run(tiny_policy, tmp_path / str(own), steps=4)
        look = callback._watch._watch.look

        def counted(batch, *args, own=own, look=look, **kwargs):
            looked[own].append(len(batch))
            return look(batch, *args, **kwargs)

        monkeypatch.setattr(callback._watch._watch, "look", counted)
        if own:
            callback._watch._last_pass._known.trouble = "not wanted here"
        trainer.train()
        entries[own] = logged(trainer)
    # before and after step 1; both held against each other before steps 2 and 3; before step 4 the new ones alone
    assert looked == {False: [16, 16, 16, 16, 16, 16, 4, 16], True: [16] * 8}
    for ours, theirs in zip(entries[True], entries[False], strict=True):
        assert theirs["watched"] == pytest.approx(ours["watched"], rel=1e-3, abs=1e-6)


def test_weights_that_something_else_moved_are_noticed(tiny_policy, tmp_path):
    trainer, callback = pooled_run(tiny_policy, tmp_path, steps=3)

    class Meddler(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            with torch.no_grad():
                kwargs["model"].model.norm.weight.mul_(0.9)

    trainer.add_callback(Meddler())
    with pytest.warns(RuntimeWarning, match="the last step's .* differ from ours"):
        trainer.train()
    assert len(callback.history) == 3


def test_a_pool_on_own_sequences_is_said(tiny_policy, tmp_path):
    trainer = make_trainer(tiny_policy, tmp_path, max_steps=1)
    with pytest.warns(RuntimeWarning, match="what it learns from.*rollouts=pool"):
        attach_entropy_probe(trainer, EntropyProbeConfig(mode="watch"), console=False)
    for settings in ({"rollouts": "pool"}, {"mode": "watch", "rollouts": "pool", "bias_keep": 0.9}):
        with pytest.raises(ValidationError, match="pool"):
            EntropyProbeConfig(**settings)


@pytest.mark.parametrize("kind", ["ZeRO-3", "FSDP"])
def test_weights_spread_over_processes_are_refused(tiny_policy, tmp_path, kind):
    trainer, _ = pooled_run(tiny_policy, tmp_path, steps=1)
    if kind == "ZeRO-3":
        trainer.model.model.norm.weight.ds_id = 0
    else:
        trainer.model.model.norm.__class__ = type("FullyShardedDataParallel", (type(trainer.model.model.norm),), {})
    with pytest.raises(UserError, match="ZeRO-2"):
        trainer.train()


def test_a_pool_that_hardly_counts_is_drawn_anew_and_said(tiny_policy, tmp_path):
    trainer, callback = pooled_run(tiny_policy, tmp_path, steps=3)
    pool, names = callback._watch._pool, []
    scored = pool.scored

    def far_off(scores):
        drawn = scored(scores)
        names.append(list(pool.names))
        return drawn - 4.0 * torch.arange(len(drawn)) if len(names) == 2 else drawn

    pool.scored = far_off
    with pytest.warns(RuntimeWarning, match="less than half of the pool"):
        trainer.train()
    assert set(names[0]) & set(names[1]) and not set(names[1]) & set(names[2])

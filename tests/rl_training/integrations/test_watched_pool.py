"""A pool of held-out sequences, watched over one step or several, in real trainers: what is logged, drawn, kept and resumed."""

from __future__ import annotations

import warnings

import pytest
import torch
from pydantic import ValidationError
from transformers import TrainerCallback

from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.probe.watch_state import STATE_KEY
from tests.rl_training.integrations.test_trl_integration import logged, make_trainer

RATE = 1e-3
ROWS = [{"prompt": f"{a}-{b}="} for a in range(5) for b in range(4)]
POOL = {"pool_age": 4, "eval_sequences": 16, "measure_every": 1, "predict_every": None, "on_error": "raise"}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def pooled_run(tiny_policy, folder, steps=6, trainer=None, **probe):
    trainer = make_trainer(tiny_policy, folder, max_steps=steps, learning_rate=RATE, **(trainer or {}))
    return trainer, attach_entropy_probe(trainer, EntropyProbeConfig(**{**POOL, **probe}), ROWS, console=False)


def turns(callback):
    """(step, names, rows, sequences) of the pool each time that it is watched anew."""
    pool, seen = callback._watch._pool, []
    turn = pool.turn

    def noted(step, rng):
        out = turn(step, rng)
        seen.append((step, list(pool.names), [m.row for m in pool._members], out))
        return out

    pool.turn = noted
    return seen


def test_a_pool_is_watched_and_training_is_bit_identical(tiny_policy, tmp_path):
    trainer, callback = pooled_run(tiny_policy, tmp_path / "with", predict_every=3, parts_every=2)
    seen = turns(callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [w for w in caught if "entropy probe" in str(w.message)]
    entries = logged(trainer)
    assert len(entries) == 6 and all("measured" in e and "measured_filtered" in e for e in entries)
    assert ["predicted" in e for e in entries] == [True, False, False, True, False, False]
    assert [step for step, *_ in seen] == [0, 1, 2, 3, 4, 5]
    for (_, before, *_), (step, names, rows, _) in zip(seen, seen[1:], strict=False):
        renewed = 8 if step % 2 == 0 else 0
        assert names[: 16 - renewed] == before[renewed:], "the older half leaves at half the age"
        assert not set(names[16 - renewed :]) & set(before) and len(set(rows)) == 16, "prompts are distinct"
    assert not {tuple(s.prompt_ids) for *_, out in seen for s in out} & {tuple(s.prompt_ids) for s in callback._trained}
    assert entries[0]["weights_ess"] == pytest.approx(16) and entries[-1]["weights_ess"] < 16
    assert entries[-1]["cumulative_measured"] == pytest.approx(sum(e["measured"] for e in entries), rel=1e-9)
    alone = make_trainer(tiny_policy, tmp_path / "without", max_steps=6, learning_rate=RATE)
    alone.train()
    assert all(torch.equal(w, weights(alone)[name]) for name, w in weights(trainer).items())


def test_a_prediction_is_the_derivative_of_what_is_measured_on_the_same_tokens(tiny_policy, tmp_path):
    """At a small learning rate they agree to far less than either's standard error."""
    for rate, off in ((1e-4, 0.05), (1e-5, 0.01)):
        trainer = make_trainer(tiny_policy, tmp_path / str(rate), max_steps=3, learning_rate=rate)
        config = EntropyProbeConfig(**{**POOL, "predict_every": 1, "shares": True})
        callback = attach_entropy_probe(trainer, config, ROWS, console=False)
        trainer.train()
        for entry, change in zip(logged(trainer), callback.history, strict=True):
            assert abs(entry["predicted"] - entry["measured"]) < off * abs(entry["measured"]) + 1e-6
            assert entry["batch"] + entry["momentum"] + entry["decay"] == pytest.approx(entry["predicted"], rel=1e-5)
            assert float(change.shares.sum()) == pytest.approx(entry["batch"], rel=1e-3)


def test_a_span_measures_what_all_its_steps_did(tiny_policy, tmp_path):
    """Its one look behind the last step finds what a look behind each adds up to, and no step is left out."""
    single, _ = pooled_run(tiny_policy, tmp_path / "steps", steps=9, pool_age=100, advantage_decay=1.0)
    single.train()
    trainer, spans = pooled_run(
        tiny_policy, tmp_path / "spans", steps=9, pool_age=100, measure_every=4, predict_every=6, advantage_decay=1.0
    )
    seen = turns(spans)
    trainer.train()
    # One step alone where it is predicted (the first, the seventh), four at most, and what is left at the end.
    assert [step for step, *_ in seen] == [0, 1, 5, 6, 7]
    over = [entry["measured_over"] for entry in logged(trainer) if "measured" in entry]
    assert over == [1, 4, 1, 1, 2]
    assert {entry["watched_for"] for entry in logged(trainer) if "measured" in entry} == {100.0}
    each = [entry["measured"] for entry in logged(single)]
    found = [change.watched for change in spans.history]
    for one, first in zip(found, [0, 1, 5, 6, 7], strict=True):
        truth = sum(each[first : first + one.steps])
        assert one.change.value == pytest.approx(truth, abs=0.1 * max(map(abs, each)) + 0.25 * abs(truth))
        assert one.each.value == pytest.approx(one.change.value / one.steps)
    assert [s["measured_over"] for s in spans._steps.steps()] == over
    assert logged(trainer)[-1]["cumulative_measured"] == pytest.approx(sum(w.change.value for w in found), rel=1e-9)


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
    # before step 1 all; before steps 2 and 3 the eight that are compared, and the new half; before step 4 none
    assert looked == {False: [16, 16, 8, 16, 16, 16, 16], True: [16] * 8}
    for ours, theirs in zip(entries[True], entries[False], strict=True):
        assert theirs["measured"] == pytest.approx(ours["measured"], rel=1e-3, abs=1e-6)


class Meddler(TrainerCallback):
    """Changes the policy after some steps, by `change(model)`."""

    def __init__(self, change, steps):
        self.change, self.steps = change, steps

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            with torch.no_grad():
                self.change(model)


def _shrink(model):
    for p in model.parameters():
        p.data.mul_(1.1)  # .data: torch counts no change of the parameter


def _scale_base(model):
    for p in model.parameters():
        if not p.requires_grad:
            p.data.mul_(1.05)


def _scale_adapters(model):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 3.0


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "lora", "steps"),
    [
        (_shrink, False, (3, 6)),
        (_shrink, False, (1,)),
        (_scale_adapters, True, (3,)),
        (_scale_base, True, (3,)),
    ],
)
def test_what_something_else_does_to_the_policy_between_steps_is_not_measured(
    tiny_policy, tmp_path, change, lora, steps
):
    """It made -0.07 nats of a step that moved entropy by a millionth, at any step but the second, third and fifth."""
    trainer = make_trainer(tiny_policy, tmp_path, max_steps=8, learning_rate=1e-6, lora=lora)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.3)
    trainer.add_callback(Meddler(change, steps))
    callback = attach_entropy_probe(trainer, EntropyProbeConfig(**POOL), ROWS, console=False)
    with pytest.warns(
        RuntimeWarning, match=f"other than the optimizer changed the policy between steps {steps[0]} and"
    ):
        trainer.train()
    assert len(callback.history) == 8
    assert max(abs(e["measured"]) for e in logged(trainer)) < 1e-4
    entropies = [e["entropy"] for e in logged(trainer)]
    assert abs(entropies[steps[0]] - entropies[steps[0] - 1]) > 0.003, "nothing was changed: the test is void"


@pytest.mark.parametrize(("steps", "over"), [(8, [4, 1, 1]), (6, [4])])
def test_a_span_in_which_something_else_moved_the_policy_is_left_out(tiny_policy, tmp_path, steps, over):
    """Also where its last step is training's last, and the other came first."""
    trainer = make_trainer(tiny_policy, tmp_path, max_steps=steps, learning_rate=1e-6)
    trainer.add_callback(Meddler(_shrink, (6,)))
    config = EntropyProbeConfig(**{**POOL, "measure_every": 4, "pool_age": 100})
    callback = attach_entropy_probe(trainer, config, ROWS, console=False)
    with pytest.warns(RuntimeWarning, match="between steps 6 and 7 .* of the last 2 steps `measured` is not known"):
        trainer.train()
    assert [change.watched.steps for change in callback.history] == over
    assert max(abs(e["measured"]) for e in logged(trainer) if "measured" in e) < 1e-4


SAVED = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": True}


def test_a_resumed_run_goes_on_with_its_pool_as_if_it_had_not_been_stopped(tiny_policy, tmp_path):
    """The span ends where a checkpoint is saved, with what it has measured; its sequences are watched on."""
    probe = {"measure_every": 2, "pool_age": 8, "predict_every": 7}
    whole, watched = pooled_run(tiny_policy, tmp_path / "whole", 8, SAVED, **probe)
    seen = turns(watched)
    whole.train()
    again, callback = pooled_run(tiny_policy, tmp_path / "again", 8, SAVED, **probe)
    resumed = turns(callback)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert [step for step, *_ in seen] == [0, 1, 3, 5, 6, 7]
    assert [(s, n, r) for s, n, r, _ in resumed] == [(s, n, r) for s, n, r, _ in seen[2:]]
    assert [out for *_, out in resumed] == [out for *_, out in seen[2:]], "other sequences"
    wanted, found = watched._steps.steps(), callback._steps.steps()
    assert len(wanted) == len(found) == 6
    for theirs, ours in zip(wanted, found, strict=True):
        assert ours["measured_over"] == theirs["measured_over"]
        for name in ("measured", "measured_se", "entropy"):
            assert abs(ours[name] - theirs[name]) < 2e-6, name
    assert ["predicted" in e for e in logged(again)] == ["predicted" in e for e in logged(whole)][-len(logged(again)) :]


DAMAGE = {
    "no record": lambda s: 7,
    "no spans": lambda s: {**s, "spans": {"length": "x"}},
    "no members": lambda s: {**s, "pool": {"drawn": 3}},
    "a hole": lambda s: {**s, "pool": {**s["pool"], "members": [{"name": "0"}]}},
    "no tokens": lambda s: _with(s, completion_ids=[]),
    "no score": lambda s: _with(s, score=None),
    "no prompt": lambda s: _with(s, row=10_000),
    "no step": lambda s: _with(s, born="x"),
}


def _with(source, **changed):
    members = source["pool"]["members"]
    return {**source, "pool": {**source["pool"], "members": [{**members[0], **changed}, *members[1:]]}}


def test_a_damaged_pool_is_said_and_drawn_anew(tiny_policy, tmp_path):
    _, callback = pooled_run(tiny_policy, tmp_path, steps=1)
    callback._trainer.train()
    state = callback._trainer.state.stateful_callbacks
    for kind, damage in DAMAGE.items():
        _, fresh = pooled_run(tiny_policy, tmp_path, steps=1)
        damaged = {**state, STATE_KEY: {**state[STATE_KEY], "source": damage(state[STATE_KEY]["source"])}}
        with pytest.warns(RuntimeWarning, match="watched sequences is damaged.*drawn anew"):
            fresh._watch.begin(damaged, 1)
        assert not fresh._watch._pool._members, kind


def test_a_pool_that_hardly_counts_is_drawn_anew_before_it_is_watched(tiny_policy, tmp_path):
    trainer, callback = pooled_run(tiny_policy, tmp_path, steps=3, pool_age=100)
    pool, names = callback._watch._pool, []
    turn = pool.turn

    def far_off(step, rng):
        if step == 2:  # as if the policy had moved far from where the older half was drawn
            moved = enumerate(pool._members)
            pool._members = [
                type(m)(**{**vars(m), "score": m.score + 6.0 * (k % 8 == 0), "born": step - 2 + (k >= 8)})
                for k, m in moved
            ]
        out = turn(step, rng)
        names.append(list(pool.names))
        return out

    pool.turn = far_off
    trainer.train()
    assert names[0] == names[1] and not set(names[1]) & set(names[2])


def test_without_prompts_the_steps_own_are_watched_and_that_is_said(tiny_policy, tmp_path):
    trainer = make_trainer(tiny_policy, tmp_path, max_steps=2)
    images = [{"prompt": "1+1=", "image": object()}, {"prompt": "1+2=", "image": object()}]
    with pytest.warns(RuntimeWarning, match="more than text .*the step's own sequences") as caught:
        callback = attach_entropy_probe(trainer, EntropyProbeConfig(on_error="raise"), images, console=False)
    assert len([w for w in caught if "own sequences" in str(w.message)]) == 1
    trainer.train()
    assert callback.describe().startswith(
        "entropy probe (default): 16 sequences of current rollouts, measured every step"
    )
    assert all("measured" in entry for entry in logged(trainer))
    with pytest.raises(UserError, match="more than text"):
        attach_entropy_probe(trainer, EntropyProbeConfig(rollouts="pool"), images, console=False)
    for settings in ({"mode": "simple", "rollouts": "pool"}, {"rollouts": "pool", "bias_keep": 0.9}):
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

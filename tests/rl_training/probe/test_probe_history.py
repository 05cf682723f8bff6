"""What a report says of a run does not depend on how often its trainer logged."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from tqdm.auto import tqdm

from entropy_core.measurement import EntropyMeasurement
from entropy_core.uncertainty import Estimate
from entropy_experiments.records.history import probed_sums, stored_state, training_history
from entropy_experiments.report.figures.history import plot_training_history
from entropy_experiments.report.training_verdict import probe_sentence
from rl_training.config import EntropyProbeConfig
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.probe.change import EntropyChange, StepParts
from rl_training.probe.history import STATE_KEY, ProbeHistory
from rl_training.probe.metrics import metrics_of
from rl_training.run.console import ConsoleCallback, ProbeConsole
from tests.rl_training.integrations.test_trl_integration import logged, make_trainer

STEPS = 6
RUNNING = ("steps", "measured_steps", "cumulative_predicted", "cumulative_measured")
RUNNING += ("cumulative_predicted_se", "cumulative_measured_se")


def train(tiny_policy, folder, probe=None, resume=None, **settings):
    settings = {"max_steps": STEPS, "learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 3, **settings}
    trainer = make_trainer(tiny_policy, folder, **settings)
    config = EntropyProbeConfig(**{"on_error": "raise", "mode": "simple", "preset": "accurate", **(probe or {})})
    callback = attach_entropy_probe(trainer, config, console=False)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def reported(folder, step=STEPS):
    """The history that an analysis of the checkpoint writes."""
    checkpoint = folder / f"checkpoint-{step}"
    state = stored_state(checkpoint)
    return training_history(state["log_history"], state)


@pytest.fixture(scope="module")
def every_step(tiny_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("every")
    return folder, *train(tiny_policy, folder)


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"logging_steps": 5},
        {"logging_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"logging_strategy": "epoch"},
        {"logging_strategy": "no"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_sums_and_steps_are_those_of_every_step(tiny_policy, tmp_path, every_step, settings):
    whole_folder, whole, _ = every_step
    if "gradient_accumulation_steps" in settings:  # other micro-batches, another run
        whole_folder = tmp_path / "whole"
        whole = train(tiny_policy, whole_folder, **{**settings, "logging_steps": 1})[0]
    trainer, callback = train(tiny_policy, tmp_path / "run", **settings)
    changes = callback.history
    predicted, measured = sum(c.total.value for c in changes), sum(c.measured.change for c in changes)
    entries = [e for e in logged(trainer) if e]
    assert len(entries) < STEPS
    if entries:  # values at the window's last step, not means over it
        last = [e for e in logged(whole) if e["steps"] == entries[-1]["steps"]][0]
        for name in RUNNING:
            assert entries[-1][name] == pytest.approx(last[name], rel=1e-9), f"{name} was averaged over the window"
    rows, alone = reported(tmp_path / "run"), reported(whole_folder)
    probed = [row for row in rows if row.probe_predicted is not None]
    assert [row.step for row in probed] == list(range(1, STEPS + 1))
    for name in ("probe_predicted", "probe_measured", "probe_momentum", "probe_ess", "probe_predicted_se"):
        assert [getattr(row, name) for row in probed] == pytest.approx(
            [getattr(row, name) for row in alone], rel=1e-9
        ), name
    assert sum(row.probe_predicted for row in probed) == pytest.approx(predicted)
    sentence = probe_sentence(rows).text
    assert f"predicted {STEPS} steps" in sentence and sentence == probe_sentence(alone).text
    assert f"{predicted:+.2g}"[:4] in sentence and f"{measured:+.2g}"[:4] in sentence
    assert f"Summed over the {STEPS} steps with both" in caption(rows)


def caption(rows):
    figure = plot_training_history(rows)
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)


def test_between_probed_and_refreshed_steps(tiny_policy, tmp_path):
    probe = {"log_every": 2, "refresh_every": 2}
    trainer, callback = train(tiny_policy, tmp_path, probe, logging_steps=5, max_steps=10, save_steps=10)
    assert [c.measured is not None for c in callback.history] == [True, False, True, False, True]
    rows = [row for row in reported(tmp_path, 10) if row.probe_predicted is not None]
    assert [row.step for row in rows] == [2, 4, 6, 8, 10]
    assert [row.probe_measured is not None for row in rows] == [True, False, True, False, True]
    first, last = logged(trainer)
    assert (first["steps"], first["measured_steps"]) == (2, 1) and (last["steps"], last["measured_steps"]) == (5, 3)
    values = [c.total.value for c in callback.history]
    assert first["cumulative_predicted"] == pytest.approx(sum(values[:2]))
    assert last["cumulative_predicted"] == pytest.approx(sum(values))
    assert last["cumulative_predicted_where_measured"] == pytest.approx(sum(values[::2]))


def test_a_resumed_run_goes_on_with_the_steps_of_its_checkpoint(tiny_policy, tmp_path, every_step):
    folder, _, _ = every_step
    again = make_trainer(tiny_policy, tmp_path, max_steps=STEPS, learning_rate=1e-4, save_strategy="steps", save_steps=3,
                         restore_callback_states_from_checkpoint=True)  # fmt: skip
    callback = attach_entropy_probe(
        again, EntropyProbeConfig(mode="simple", preset="accurate", on_error="raise"), console=False
    )
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    rows, before = reported(tmp_path), reported(folder)
    assert [row.step for row in rows] == list(range(1, STEPS + 1)) and len(callback.history) == 3
    assert rows[:3] == before[:3]
    assert logged(again)[-1]["steps"] == STEPS
    assert logged(again)[-1]["cumulative_predicted"] == pytest.approx(sum(row.probe_predicted for row in rows))


def test_logs_without_each_steps_values_are_not_summed():
    """Of a trainer before the probe kept them, or a log alone."""

    def entry(step, **more):
        return {"loss": 0.1, "step": step, "entropy_probe/predicted": 0.1, "entropy_probe/measured": 0.2, **more}

    for entries in (
        [entry(5), entry(10), entry(15)],
        [entry(5, **{"entropy_probe/steps": 5.0}), entry(10, **{"entropy_probe/steps": 10.0})],
        [entry(1), entry(2), entry(7)],
    ):
        rows = training_history(entries)
        assert "means over several steps" in probe_sentence(rows).text and "means over the steps" in caption(rows)
    single = training_history([entry(1), entry(2), entry(3)])
    assert "predicted 3 steps" in probe_sentence(single).text
    counted = training_history([entry(s, **{"entropy_probe/steps": s / 5}) for s in (5, 10, 15)])
    assert "predicted 3 steps" in probe_sentence(counted).text, "log_every and logging_steps of 5: one step a row"


@pytest.mark.parametrize(
    "found",
    [None, 3, [], {}, {"step": 3}, {"step": [1, "x"], "predicted": [0.1]}, {"step": [1, 2], "predicted": ["a", {}]}],
)
def test_a_state_of_another_shape_is_no_history(found):
    rows = training_history([], {"stateful_callbacks": {STATE_KEY: found}})
    assert all(row.model_fields_set == {"step"} for row in rows)
    history = ProbeHistory()
    callbacks = {STATE_KEY: found} if not isinstance(found, dict) or found.get("step") != [1, "x"] else {}
    history.begin(callbacks, 10)
    history.add(11, {"predicted": 1.0})
    assert callbacks[STATE_KEY]["step"][-1] == 11


# ---------------------------------------------------------------------- measurements that are not to be trusted
def change(predicted: float, measured: float, ess: float) -> EntropyChange:
    unknown = StepParts.only_total(Estimate(predicted, 0.01))
    told = EntropyMeasurement(2.0, 2.0 + measured, measured, 0.01, ess, 16)
    return EntropyChange(unknown, None, "split", "entropy of the policy", 16, 16.0, 2.0, measured=told)


def test_measurements_on_a_small_effective_sample_are_in_no_sum_and_no_correlation():
    steps = [
        change(-0.01, -0.012, 15.0),
        change(-0.011, 0.317, 1.07),
        change(-0.02, -0.03, 8.0),
        change(0.02, 0.01, 9.0),
    ]
    steps.append(replace(steps[0], measured=None))
    history, callbacks = ProbeHistory(), {}
    history.begin(callbacks, 0)
    for number, step in enumerate(steps, 1):
        history.add(number, metrics_of(step))
    totals = history.totals()
    assert (totals["steps"], totals["measured_steps"], totals["low_ess_steps"]) == (5, 3, 1)
    assert totals["cumulative_measured"] == pytest.approx(-0.032)
    assert totals["cumulative_predicted_where_measured"] == pytest.approx(-0.01)
    assert totals["cumulative_predicted"] == pytest.approx(-0.031)
    assert totals["cumulative_measured_se"] == pytest.approx(0.01 * 3**0.5)
    assert totals["cumulative_predicted_se"] == pytest.approx(0.05), (
        "nothing known of what they share: the most it can be"
    )
    assert "correlation" not in totals, "three pairs determine none"
    rows = training_history([], {"stateful_callbacks": json.loads(json.dumps(callbacks))})
    assert probed_sums(rows).left_out == 1
    sentence = probe_sentence(rows).text
    assert "predicted 3 steps" in sentence and "1 further step measured on too small an effective sample" in sentence
    logs = training_history(
        [
            {"loss": 0, "step": n, **{f"entropy_probe/{k}": v for k, v in metrics_of(s).items()}}
            for n, s in enumerate(steps, 1)
        ]
    )
    assert probe_sentence(logs).text == sentence, "a log of single steps says the same"


def test_a_correlation_is_logged_from_eight_steps_on_with_its_interval_and_sums_know_what_predictions_share():
    history = ProbeHistory()
    pairs = np.random.default_rng(0).normal(size=(8, 2))
    for k, (predicted, measured) in enumerate(pairs, 1):
        told = metrics_of(change(predicted, measured, 16.0))
        history.add(k, told, (0.6, -0.8))
        totals = history.totals()
        assert ("correlation" in totals) == (k == 8)
    r = np.corrcoef(pairs.T)[0, 1]
    assert totals["correlation"] == pytest.approx(r)
    others = np.arctanh([np.corrcoef(np.delete(pairs, k, 0).T)[0, 1] for k in range(8)])
    error = np.sqrt(7 / 8 * np.square(others - others.mean()).sum())  # a jackknife over steps, Student's t on 7 degrees
    for name, sign in (("correlation_low", -1), ("correlation_high", 1)):
        assert totals[name] == pytest.approx(np.tanh(np.arctanh(r) + sign * 2.364624 * error), abs=1e-6)
    assert totals["cumulative_predicted_se"] == pytest.approx(8.0), "equal deviations add up, they do not average out"


@pytest.mark.parametrize(
    "make", [lambda: ProbeConsole("probe"), lambda: ConsoleCallback("run", True)], ids=["probe", "train"]
)
def test_the_console_marks_them(make, capsys):
    class State:
        is_world_process_zero, global_step = True, 3

    lines = []
    for step in (change(-0.01, 0.317, 1.07), change(-0.01, 0.317, 8.0)):
        console = make()
        console._console = Console(force_terminal=True, highlight=False, width=200, file=sys.stderr)
        logs = {"loss": 0.0, **{f"entropy_probe/{k}": v for k, v in metrics_of(step).items()}}
        console.on_log(None, State(), None, logs=logs)
        lines.append(capsys.readouterr().err)
    assert "low ESS" in lines[0] and "\x1b[2m" in lines[0] and "+0.3170" in lines[0]
    assert "low ESS" not in lines[1] and "\x1b[2m" not in lines[1]


def test_a_line_of_the_probe_stands_above_the_trainers_progress_bar(capsys):
    with tqdm(total=2, file=sys.stderr, desc="training", mininterval=0, ncols=60) as bar:
        callback = ProbeConsole("the probe")
        bar.update(1)
        callback.on_log(
            None, SimpleNamespace(is_world_process_zero=True, global_step=1), None, logs={"entropy_probe/entropy": 1.5}
        )
    shown = capsys.readouterr().err
    before, line, after = shown.partition("    1    1.500")
    assert line and before.endswith("\r"), "the line begins behind a half-drawn bar"
    assert "training:  50%" in before and "training:  50%" in after.split("\n", 1)[1], (
        "the bar is not drawn again below it"
    )

"""Errors of a prediction over prompts: derivatives along the step against differences of the measurement, prompt by prompt."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.calibration_world import Shape, World
from entropy_core.directional import weights_moved
from entropy_core.scores import TokenStatistics
from entropy_core.token_ratios import token_ratio_change, token_ratio_derivative
from entropy_core.uncertainty import Estimate
from rl_training.algs.entropy_probe import SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.intervals import interval
from rl_training.probe.history import FOLDS
from rl_training.probe.step_errors import disagreement, over_prompts
from rl_training.probe.watch import EntropyWatch
from tests.rl_training.probe_setting import Setting, difference

CONFIG = {"rollouts": "fresh", "predict_every": 1, "advantage_decay": 0.9}


@pytest.fixture(scope="module")
def trained() -> Setting:
    setting = Setting.fresh()
    for seed in range(3):
        setting.step(seed)
    return setting


def predicted_step(setting: Setting, slower: float = 1.0, **config: object):
    """A step that is predicted and measured; and the update it made."""
    for group in setting.optimizer.param_groups:
        group["lr"] *= slower
    config = EntropyProbeConfig(**{**CONFIG, **config})
    watch, probe = EntropyWatch(config, setting.model), SimpleEntropyProbe(config, setting.model)
    drawn = torch.zeros(len(setting.batch), dtype=torch.float64)  # each completion was taken once
    statistics = probe.statistics(setting.batch)
    watch.before_step(setting.batch, statistics.scores())
    probe.observe(setting.batch, drawn, critic=watch.objective)
    setting.backward(7)
    before = setting.values()
    along = watch.derivative if config.errors_over_prompts else None
    values = watch._values
    probe.before_step(setting.optimizer, along=along)
    setting.optimizer.step()
    change, watched = probe.after_step(measure=False), watch.after_step()
    assert change is not None and watched is not None
    return change.with_watched(watched), difference(setting.values(), before), statistics, values


def by_differences(setting: Setting, update, statistics, values):
    """(B,) change with each prompt left out, to first order: central differences of what is measured, about the old weights."""
    found = []
    with weights_moved(setting.model, update, -1.0):
        for scale in (1e-3, -1e-3):
            with weights_moved(setting.model, update, scale):
                after = SimpleEntropyProbe(EntropyProbeConfig(), setting.model).statistics(setting.batch)
            found.append(token_ratio_change(statistics, after, setting.batch, values, 0.9, statistics.scores()))
    return (found[0].left_out - found[1].left_out) / 2e-3, (found[0].change - found[1].change) / 2e-3


def test_the_error_is_the_jackknife_of_what_is_measured(trained: Setting) -> None:
    setting = trained.twin()
    change, update, statistics, values = predicted_step(setting)
    left_out, along = by_differences(setting, update, statistics, values)
    assert change.total.value == pytest.approx(along, rel=1e-5)
    assert change.left_out is not None
    torch.testing.assert_close(change.left_out, left_out, rtol=1e-5, atol=1e-9)
    count = len(left_out)
    spread = ((count - 1) / count * (left_out - left_out.mean()).square().sum()).sqrt()
    assert change.total.standard_error == pytest.approx(float(spread), rel=1e-5)
    assert change.total.degrees_of_freedom <= count - 1
    assert len(change.total.deviations) == FOLDS and sum(change.total.deviations) == pytest.approx(0.0, abs=1e-9)
    for part in (change.batch, change.momentum, change.decay):
        assert 0 < part.standard_error < math.inf


def test_the_difference_has_a_paired_error_of_second_order(trained: Setting) -> None:
    apart, errors = [], []
    for slower in (1.0, 0.25):
        change = predicted_step(trained.twin(), slower)[0]
        assert change.difference is not None and change.watched is not None
        assert change.difference.value == pytest.approx(change.total.value - change.watched.quiet.change, rel=1e-9)
        apart.append(change.difference.standard_error)
        errors.append(math.hypot(change.total.standard_error, change.watched.change.standard_error))
    assert apart[0] < 0.3 * errors[0], "both rest on the same tokens"
    assert apart[1] < 0.15 * apart[0], "sixteen times smaller where the step is four times smaller"


def test_another_optimizers_step_has_the_error_of_its_total(trained: Setting) -> None:
    setting = trained.twin()
    setting.optimizer = torch.optim.SGD(setting.model.parameters(), lr=0.05)
    with pytest.warns(RuntimeWarning, match="SGD is not AdamW"):
        change, update, statistics, values = predicted_step(setting)
    left_out, along = by_differences(setting, update, statistics, values)
    assert change.total.value == pytest.approx(along, rel=1e-5) and math.isnan(change.momentum.value)
    torch.testing.assert_close(change.left_out, left_out, rtol=1e-4, atol=1e-9)
    assert change.total.standard_error > 0


def test_folds_that_are_asked_for_are_used(trained: Setting) -> None:
    change = predicted_step(trained.twin(), standard_error_folds=3)[0]
    assert len(change.total.deviations) == 3 and change.left_out is None and change.difference is None
    assert EntropyProbeConfig(**CONFIG).errors_over_prompts


def test_a_gradient_of_something_else_is_seen() -> None:
    assert disagreement(Estimate(-1.0, 0.1), -1.01) is None
    assert disagreement(Estimate(0.0, 0.2), 0.005) is None, "nothing beside its own error"
    assert "-0.5" in (disagreement(Estimate(-1.0, 0.1), -0.5) or "")


def test_intervals_cover_in_the_exact_world() -> None:
    """250 buffers of 24 prompts: the derivative's interval holds the exact one in 91 to 99%, as fits a rate of 95%."""
    world, step, generator = World(), 0.3, torch.Generator().manual_seed(1)
    held = 0
    for _ in range(250):
        rows, units = world.draw(Shape("24 prompts", 24, (1, 1), step), generator)
        batch = replace(world.batch.select(rows), prompt_index=units)
        before, along = (TokenStatistics(s.logprobs[rows], s.entropies[rows]) for s in (world.before, world.along))
        found = token_ratio_derivative(before, along, batch)
        estimate = over_prompts(found.change, found.left_out, [])
        low, high = interval(estimate.value, estimate.standard_error, estimate.degrees_of_freedom)
        held += low <= world.slope <= high
    assert 0.91 <= held / 250 <= 0.99

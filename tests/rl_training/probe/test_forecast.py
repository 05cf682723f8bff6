"""The filtered entropy and the time to a floor: coverage on simulated runs, and what a trainer logs and stops on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rl_training.config import EntropyProbeConfig
from rl_training.integrations.entropy_alarm import StopBeforeFloor
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.probe.entropy_filter import EntropyFilter
from rl_training.probe.forecast import EntropyForecast
from tests.rl_training.integrations.test_trl_integration import logged, make_trainer

FLOOR = 0.5


def simulated(seed: int, wander: float, steps: int = 45, beyond: int = 300):
    """(h before each step, what the filter says at each) of a falling entropy; the slope wanders by `wander` a step."""
    rng = np.random.default_rng(seed)
    h, slope, watch = 2.0, -0.03 * float(rng.lognormal(0, 0.4)), EntropyFilter(FLOOR)
    truth, said = [], []
    for step in range(steps + beyond):
        truth.append(h)
        change = slope + 0.01 * rng.normal()
        if step < steps:
            said.append(watch.add(h + 0.06 * rng.normal(), 0.06, [(change + 0.02 * rng.normal(), 0.02)]))
        h, slope = h + change, slope + wander * rng.normal()
    return np.array(truth), said


@pytest.mark.long
@pytest.mark.parametrize("wander", [0.0, 0.001])
def test_bands_cover_and_the_curve_is_quieter_than_its_points(wander):
    inside = count = timely = times = 0
    errors = []
    for seed in range(40):
        truth, said = simulated(seed, wander)
        for step in range(5, len(said)):
            inside += said[step].low <= truth[step] <= said[step].high
            errors.append(said[step].entropy - truth[step])
            count += 1
        below = np.flatnonzero(truth[21:] < FLOOR)
        if len(below):
            timely += said[20].soonest <= below[0] <= said[20].latest
            times += 1
    assert 0.75 <= inside / count <= 0.85
    assert np.std(errors) < 0.6 * 0.06
    assert times > 20 and timely / times >= 0.75


def test_a_rising_entropy_has_no_time_and_one_below_the_floor_none_left():
    up, down = EntropyFilter(FLOOR), EntropyFilter(FLOOR)
    for step in range(20):
        rising = up.add(1.0 + 0.05 * step, 0.01, [(0.05, 0.01)])
        fallen = down.add(0.3, 0.01, [(0.0, 0.01)])
    assert math.isinf(rising.steps_to_floor) and rising.slope > 0
    assert fallen.steps_to_floor == fallen.soonest == 0


def test_what_is_unknown_is_left_out():
    alone = EntropyFilter()
    assert alone.add(math.nan, 0.1, [(0.1, 0.1)]) is None
    first = alone.add(1.0, 0.1, [(math.nan, 0.1), (0.1, math.nan)])
    assert first is not None and first.entropy == 1.0 and math.isnan(first.steps_to_floor)
    blind = alone.add(math.nan, math.nan, [])
    assert blind.high - blind.low > first.high - first.low


def test_a_resumed_forecast_is_the_same():
    config = EntropyProbeConfig(mode="simple", entropy_floor=FLOOR, log_every=2)
    steps = [
        {"entropy": 2 - 0.1 * i, "entropy_se": 0.05, "measured": -0.1, "measured_se": 0.02, "low_ess": float(i % 3 == 0),
         "predicted": -0.09, "predicted_se": 0.03}
        for i in range(6)
    ]  # fmt: skip
    whole, again = EntropyForecast(config), EntropyForecast(config)
    for metrics in steps[:-1]:
        whole.add(metrics)
    again.replay(steps[:-1])
    assert whole.add(steps[-1]) == again.add(steps[-1])
    assert whole.add(steps[-1])["steps_to_floor"] % 2 == 0, "counted in optimizer steps"
    assert EntropyForecast.of(EntropyProbeConfig(mode="simple")) is None


def test_a_trainer_logs_it_and_stops_on_it(tiny_policy, tmp_path):
    for floor, steps in ((4.0, 3), (100.0, 1)):
        trainer = make_trainer(tiny_policy, tmp_path / str(floor), max_steps=3, learning_rate=1e-4)
        config = EntropyProbeConfig(mode="simple", preset="accurate", entropy_floor=floor, on_error="raise")
        attach_entropy_probe(trainer, config, console=False)
        trainer.add_callback(StopBeforeFloor(within=0))
        trainer.train()
        entries = logged(trainer)
        assert trainer.state.global_step == len(entries) == steps
        assert all(e["entropy_filtered_low"] < e["entropy_filtered"] < e["entropy_filtered_high"] for e in entries)
    assert entries[0]["steps_to_floor"] == 0

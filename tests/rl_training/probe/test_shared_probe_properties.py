"""Whatever the order of the sequences and however many processes share the work: one prediction, one set of shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_core.processes import Processes
from rl_training.algs.entropy_probe import SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.probe.change import EntropyChange
from tests.rl_training.probe_setting import Setting
from tests.thread_processes import in_threads


def step(setting: Setting, order: list[int], processes: Processes) -> EntropyChange:
    config = EntropyProbeConfig(mode="attribution", preset="accurate", rollouts="fresh", averaging=0.0)
    probe = SimpleEntropyProbe(config, setting.model, processes)
    scores = setting.counting_scores()
    probe.observe(setting.batch.select(order), scores[order])
    change = setting.step(3, probe, training=True)
    assert change is not None
    return change


@pytest.mark.long
@settings(max_examples=12)
@given(data=st.data(), count=st.integers(1, 3))
def test_a_step(data, count) -> None:
    begun = Setting.fresh()
    begun.step(1)  # moments that are not zero
    order = list(range(len(begun.batch)))
    expected = step(begun.twin(), order, Processes())
    other = data.draw(st.permutations(order))
    twins = [begun.twin() for _ in range(count)]
    found = in_threads([lambda processes, twin=twin: step(twin, other, processes) for twin in twins])
    for change in found:
        assert change.total.value == pytest.approx(expected.total.value, rel=1e-9)
        assert change.total.standard_error == pytest.approx(expected.total.standard_error, rel=1e-9)
        assert change.batch.value == pytest.approx(expected.batch.value, rel=1e-9)
        assert change.measured_change == pytest.approx(expected.measured_change, rel=1e-7)
        torch.testing.assert_close(change.shares, expected.shares, rtol=1e-9, atol=1e-12)

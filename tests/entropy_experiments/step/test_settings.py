"""The settings of an analysis: the run's where a record says them, and what is assumed is said."""

import warnings
from types import SimpleNamespace

import pytest

from entropy_experiments.config import CheckpointOverrides, FisherAnalysisConfig
from entropy_experiments.kernel.options import KernelOptions
from entropy_experiments.step.settings import settings_of


def checkpoint(recorded=None):
    sidecar = None if recorded is None else SimpleNamespace(algorithm=SimpleNamespace(max_grad_norm=recorded))
    record = SimpleNamespace(sidecar=sidecar, learning_rates=(1e-5,), optimizer_record="none", path="runs/mine")
    return SimpleNamespace(record=record, optimizer=None)


def clipped_at(recorded, given=None):
    config = FisherAnalysisConfig(checkpoint=CheckpointOverrides(max_grad_norm=given))
    return settings_of(checkpoint(recorded), config, KernelOptions()).max_grad_norm


def test_an_assumed_clipping_is_said():
    with pytest.warns(
        UserWarning, match="runs/mine does not say where its gradients were clipped: 1, .*checkpoint.max_grad_norm"
    ):
        assert clipped_at(None) == 1.0


@pytest.mark.parametrize(
    ("recorded", "given", "wanted"), [(0.5, None, 0.5), (0.0, None, 0.0), (0.5, 2.0, 2.0), (None, 3.0, 3.0)]
)
def test_a_clipping_that_is_known_is_taken(recorded, given, wanted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clipped_at(recorded, given) == wanted

"""A record says how its whole run drew: where that changes, recording ends and training goes on."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback

from rl_training.integrations.step_recorder import record_steps
from rl_training.run.step_record import read_step
from tests.rl_training.integrations.test_trl_integration import make_trainer


class Cooler(TrainerCallback):
    def __init__(self, trainer):
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer.temperature = self._trainer.generation_config.temperature = args.temperature = 0.5


def test_steps_that_draw_otherwise_are_not_recorded_under_the_runs_settings(tiny_policy, tmp_path):
    trainer = make_trainer(tiny_policy, tmp_path)
    record_steps(trainer)
    trainer.add_callback(Cooler(trainer))
    with pytest.warns(RuntimeWarning, match="recorded no longer: temperature changed from 1.0 to 0.5 before step 2"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert read_step(tmp_path, 1) and read_step(tmp_path, 2) is None and read_step(tmp_path, 3) is None

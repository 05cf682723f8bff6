"""Stop a run before its entropy has gone: a callback on the probe's forecast."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopBeforeFloor(TrainerCallback):
    """Ends training once `entropy_probe/steps_to_floor` (the middle of its band) is at most
    `within` steps.

    Needs a probe with `entropy_floor`; a checkpoint is saved if the trainer saves at its end. Where
    the forecast sees no floor within its horizon nothing is logged, and nothing stops.

    Args:
        within: optimizer steps.
    """

    def __init__(self, within: float = 0.0) -> None:
        self._within = within

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Read what was logged."""
        steps = (kwargs.get("logs") or {}).get("entropy_probe/steps_to_floor")
        if steps is not None and float(steps) <= self._within:
            control.should_training_stop = True
        return control

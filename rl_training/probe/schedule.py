"""What the probe does at a step: which of predicting, watching, taking a gradient and measuring."""

from __future__ import annotations

from typing import NamedTuple

from rl_training.config import EntropyProbeConfig


class StepPlan(NamedTuple):
    """Attributes:
    predicts: a prediction is made. watches: sequences are watched across the step, or from it on. refreshes: a gradient of
    entropy is taken. measures: under the modes that predict every step, the change is measured after it. splits: trial moves of
    the step's parts. prices: a price list of the step is made.
    """

    predicts: bool
    watches: bool
    refreshes: bool
    measures: bool
    splits: bool
    prices: bool = False


NOTHING = StepPlan(False, False, False, False, False)


def phase_of(config: EntropyProbeConfig, step: int) -> int | None:
    """How many probed steps lie before `step` (counted from 0), a resumed run's earlier ones included; None if not probed."""
    return None if (step + 1) % config.log_every else (step + 1) // config.log_every - 1


def plan_of(config: EntropyProbeConfig, step: int) -> StepPlan:
    """The plan of `step`, counted from 0."""
    phase = phase_of(config, step)
    if phase is None:
        return NOTHING
    if config.mode == "watch":
        predicts = config.predict_every is not None and phase % config.predict_every == 0
        splits = config.parts_every > 0 and phase % config.parts_every == 0
        # Held-out sequences are watched on and on; a step's own are of that step.
        watches = config.rollouts in ("pool", "fresh") or phase % (config.measure_every or 1) == 0
        every = config.prices_every * (config.predict_every or 1)
        prices = predicts and every > 0 and phase % every == 0
        return StepPlan(predicts, watches or predicts or splits, predicts, False, splits, prices)
    refreshes = phase % config.refresh_every == 0
    measures = phase % (config.measure_every or config.refresh_every) == 0
    return StepPlan(True, refreshes or measures, refreshes, measures, False)

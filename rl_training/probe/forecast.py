"""The denoised entropy curve and the time to a floor, from what the probe logs of each step (entropy_filter)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from rl_training.config import EntropyProbeConfig
from rl_training.probe.entropy_filter import EntropyFilter, FilteredEntropy

FORECAST = (
    "entropy_filtered", "entropy_filtered_low", "entropy_filtered_high", "entropy_slope",
    "steps_to_floor", "steps_to_floor_low", "steps_to_floor_high",
)  # fmt: skip
"""Names of `EntropyForecast.add`: values at a step, of which a window's last one counts and no mean."""


_SHARED = 2.0
"""By how much errors of a pool's changes add up beyond those of independent ones, by replay (benchmarks/probe_replay)."""


class EntropyForecast:
    """Give it the metrics of one probed step after the other.

    Args:
        config: `entropy_floor`, `log_every`; sequences of a pool stay for several measurements, so that their entropies are not
            as many independent looks: each counts as one in so many.
    """

    def __init__(self, config: EntropyProbeConfig) -> None:
        self._every = config.log_every
        self._repeats = (
            math.sqrt(config.watched_for / (config.measure_every or 1)) if config.rollouts == "pool" else 1.0
        )
        self._shared = _SHARED if config.rollouts == "pool" else 1.0
        self._floor = config.entropy_floor
        self._filter = EntropyFilter(self._floor)

    @classmethod
    def of(cls, config: EntropyProbeConfig) -> EntropyForecast | None:
        """For a configuration that asks for one: by a floor, or by watching."""
        return cls(config) if config.entropy_floor is not None or config.mode == "watch" else None

    def replay(self, steps: Iterable[Mapping[str, float | None]]) -> None:
        """Begin with the metrics of these steps, those of a resumed run."""
        self._filter = EntropyFilter(self._floor)
        for metrics in steps:
            self.add({name: value for name, value in metrics.items() if value is not None})

    def add(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take in a step's metrics (rl_training.probe.metrics).

        Returns:
            Values by the names in `FORECAST`, nats per token and steps; those not finite are left out.
        """
        nothing = math.nan
        seen = (metrics.get("entropy", nothing), metrics.get("entropy_se", nothing) * self._repeats)
        (value, error), over, found = _change(metrics), int(metrics.get("measured_over", 1.0)), None
        error *= self._shared
        for _ in range(over):  # the mean of so many steps, as often; their errors make up that of their sum
            found = self._filter.add(*seen, [(value, error * math.sqrt(over))])
            seen = (nothing, nothing)
        return {} if found is None else _named(found, self._every)


def _change(metrics: Mapping[str, float]) -> tuple[float, float]:
    """The step's change and its error: measured on enough sequences, else predicted. They share their tokens, so only one of them
    is taken.
    """
    for name in ("measured", "predicted"):
        trusted = name != "measured" or metrics.get("low_ess", 0.0) == 0.0
        if trusted and name in metrics and f"{name}_se" in metrics:
            return metrics[name], metrics[f"{name}_se"]
    return math.nan, math.nan


def _named(found: FilteredEntropy, every: int) -> dict[str, float]:
    values = (
        found.entropy,
        found.low,
        found.high,
        found.slope / every,
        found.steps_to_floor * every,
        found.soonest * every,
        found.latest * every,
    )
    return {name: value for name, value in zip(FORECAST, values, strict=True) if math.isfinite(value)}

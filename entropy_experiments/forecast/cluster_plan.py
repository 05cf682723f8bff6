"""A plan on paper for a cluster, as it is printed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from entropy_experiments.forecast.pass_costs import PassCosts
from entropy_experiments.kernel.plan import KernelPlan

OPERATIONS = 50e12
"""Floating-point operations a second of a device in float32: three quarters of an H100's data sheet."""


@dataclass(frozen=True)
class ClusterPlan:
    """costs: of one sequence. group: devices that hold one model. workers: groups. seconds: by what they go to.

    memory: bytes of a worker; left: of these for rows. kernel: how rows are kept. gathered: where the model is cut over all
    devices (one worker, whose memory, weights and rows then are those of one device), bytes of others' weights that one holds at
    a time.
    """

    costs: PassCosts
    kernel: KernelPlan
    n_eval: int
    n_train: int
    devices: int
    bandwidth: float
    group: int
    memory: int
    left: int
    seconds: dict[str, float]
    gathered: int | None = None

    @property
    def workers(self) -> int:
        return self.devices // self.group

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    def to_json(self) -> dict[str, Any]:
        return {
            "costs": self.costs.__dict__,
            "plan": self.kernel.to_json(),
            "devices": self.devices,
            "devices_a_model": self.group,
            "memory_bytes": self.memory,
            "seconds": self.seconds,
            "limit": self.limit,
        }

    def lines(self) -> list[str]:
        """To print."""
        c = self.costs
        out = [
            f"on paper: {self.n_eval:,} evaluation x {self.n_train:,} training sequences of {c.tokens} tokens, "
            f"{self.devices} devices of {self.memory / (self.group if self.gathered is None else 1) / 2**30:.0f} GiB, "
            f"{OPERATIONS:.3g} operations and {self.bandwidth:.3g} bytes a second each",
            f"one sequence: forward {c.forward:.3g} operations, backward {c.backward:.3g} a kind of row; graph "
            f"{c.graph_bytes / 2**30:.2f} GiB",
            f"rows of {c.parameters:,} parameters: {c.row_bytes / 2**20:.0f} MiB each, "
            f"{self.n_train * c.row_bytes / 1e12:.3g} TB for the training side",
            f"{self._placed()}, {self.left / 2**30:.1f} GiB left for rows in each",
            f"strategy {self._kept()}, {self.kernel.passes:.3g} passes for the evaluation side, "
            f"{self.kernel.disk / 1e12:.3g} TB on disk",
        ]
        out += [f"  {name:<44} {_duration(value):>12}" for name, value in self.seconds.items()]
        out.append(f"limited by {self.limit}, {_duration(sum(self.seconds.values()))} in all")
        return out

    def _kept(self) -> str:
        plan = self.kernel
        if plan.strategy == "directions":
            return "directions: no row"
        if plan.strategy == "factored":
            return f"factored: rows formed of their factors for every {plan.chunk} evaluation sequences"
        return f"{plan.strategy}: {math.ceil(self.n_train / plan.tile)} tiles of {plan.tile:,} training rows"

    def _placed(self) -> str:
        weights = f"{self.costs.weight_bytes / 2**30:.3g} GiB"
        if self.gathered is not None:
            held = f"{self.gathered / 2**30:.3g} GiB gathered from the others at a time"
            return (
                f"model cut over {self.devices} devices: {weights} in each beside {held}, all at work on every sequence"
            )
        return f"model {weights} on {self.group} device{'s' * (self.group > 1)}: {self.workers} at work"


def _duration(seconds: float) -> str:
    for unit, length in (("years", 365.25 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"

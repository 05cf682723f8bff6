"""Momentum by group, and what each group did to entropy over the steps of a run.

    g_t    = sum_G g_G,t                                               loss gradient, by whose tokens it is of
    M_G,t  = beta1 M_G,t-1 + (1 - beta1) c_t g_G,t                     c_t: clipping, of the whole gradient
    u_G,t  = -lr_t P_t M_G,t / (1 - beta1^n)                           n: steps that the moments have seen
    dh_G   = sum_t <grad h_t, u_G,t>                                   nats per token

AdamW's step is sum_G u_G,t, the momentum from before the first recorded step (a group of its own) and weight decay: the shares
of a partition add up to the predicted change, whatever the partition. A batch at step s acts at t > s through beta1^(t - s), with
the gradient of entropy and the P of step t. Shares are accounting: P_t and c_t, in which every group has a part, are divided
among none. Source: docs/analyses/ledger.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from entropy_core.adamw import AdamWParameterState
from entropy_experiments.step.optimizer_step import NextStep

Key = Hashable
START, EARLIER, DECAY = "momentum from before", "earlier momentum", "weight decay"


@dataclass
class GroupMomenta:
    """M_G of each group. most_bytes: beyond it the oldest of `merges` are added up under EARLIER."""

    most_bytes: int = 2**31
    momenta: dict[Key, dict[str, Tensor]] = field(default_factory=dict)
    _last: dict[Key, int] = field(default_factory=dict)

    def start(self, state: Mapping[str, AdamWParameterState]) -> None:
        """Begin with the first moments that a checkpoint holds."""
        self.momenta = {START: {name: one.exp_avg.clone() for name, one in state.items()}}

    def turn(self, step: NextStep, gradients: Mapping[Any, Mapping[str, Tensor]], number: int) -> None:
        """M_G,t from M_G,t-1.

        Args:
            step: the step that is taken.
            gradients: group -> its part of the loss gradient before clipping.
            number: of the step.
        """
        beta = {name: state.beta1 for name, state in step.state.items()}
        for momentum in self.momenta.values():
            for name, part in momentum.items():
                part.mul_(beta[name])
        for key, gradient in gradients.items():
            mine = self.momenta.setdefault(key, {name: torch.zeros_like(g) for name, g in gradient.items()})
            self._last[key] = number
            for name, part in gradient.items():
                mine[name].add_(part.to(mine[name]), alpha=(1 - beta[name]) * step.clip)
        self._merge()

    def _merge(self) -> None:
        """Add up the groups that have been idle longest, until the rest fits."""
        if not self.momenta:
            return
        size = sum(part.numel() * part.element_size() for part in next(iter(self.momenta.values())).values())
        idle = sorted((last, str(key), key) for key, last in self._last.items() if key in self.momenta)
        for _, _, key in idle[: max(0, len(self.momenta) - max(2, self.most_bytes // size))]:
            kept = self.momenta.setdefault(
                EARLIER, {name: torch.zeros_like(p) for name, p in self.momenta[key].items()}
            )
            for name, part in self.momenta.pop(key).items():
                kept[name].add_(part)

    def steps(self, step: NextStep) -> dict[Key, dict[str, Tensor]]:
        """u_G,t of every group, and weight decay."""
        found: dict[Key, dict[str, Tensor]] = {key: {} for key in (*self.momenta, DECAY)}
        for name, state in step.state.items():
            idle = name in step.idle
            scale = state.lr * step.step_preconditioner[name] / (1 - state.beta1 ** (state.step + 1))
            for key, momentum in self.momenta.items():
                found[key][name] = torch.zeros_like(momentum[name]) if idle else -scale * momentum[name]
            theta = step.parameters[name].detach()
            found[DECAY][name] = torch.zeros_like(theta) if idle else -state.lr * state.weight_decay * theta
        return found


@dataclass
class Accounts:
    """dh_G summed over steps, and the same with each of B evaluation prompts left out of every step."""

    values: dict[Key, float] = field(default_factory=dict)
    left_out: dict[Key, Tensor] = field(default_factory=dict)

    def enter(self, keys: Iterable[Key], values: Tensor, left_out: Tensor) -> None:
        """One step's.

        Args:
            keys: of the groups.
            values: (groups,) nats per token.
            left_out: (B, groups), the prompts in the same order each time.
        """
        for column, key in enumerate(keys):
            self.values[key] = self.values.get(key, 0.0) + float(values[column])
            self.left_out[key] = self.left_out.get(key, torch.zeros_like(left_out[:, column])) + left_out[:, column]

    def total(self, keys: Iterable[Key]) -> tuple[float, Tensor]:
        """Of these groups together."""
        chosen = [key for key in keys if key in self.values]
        if not chosen:
            return 0.0, torch.zeros_like(next(iter(self.left_out.values())))
        return sum(self.values[key] for key in chosen), torch.stack([self.left_out[key] for key in chosen]).sum(0)

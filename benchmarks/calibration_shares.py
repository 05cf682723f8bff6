"""Do the intervals of accounting shares and of effects of leaving out cover? A real AdamW step in an exact world, seen by many
evaluation buffers.

A share and an effect are linear in the gradient of entropy: <grad h, u_i> with a direction u_i that the step makes, and so has
each its true value by enumeration and its values without each prompt by the sums of calibration_buffers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.calibration_buffers import columns, draw, sums, truths, with_each_left_out
from benchmarks.calibration_tests import Rates
from benchmarks.calibration_training import Setting, Trainer
from benchmarks.calibration_world import Shape, World
from entropy_experiments.statistics.jackknife_interval import jackknife_interval
from entropy_experiments.step.effects_of_leaving_out import effect_metric
from entropy_experiments.step.optimizer_step import take_next_step

SEQUENCES = 6
SHAPES = (
    Shape("8 prompts x 8", 8, (8, 8), 1.0),
    Shape("16 prompts x 4", 16, (4, 4), 1.0),
    Shape("64 prompts x 1", 64, (1, 1), 1.0),
)


def directions(trainer: Trainer, seed: int = 3) -> dict[str, list[dict[str, Tensor]]]:
    """ "share", "effect" -> u_i of the SEQUENCES training sequences that weigh most, at the optimizer's fourth step."""
    generator = torch.Generator().manual_seed(seed)
    setting = Setting("", Shape("", 8, (6, 6), 0.0), 3)
    optimizer, _ = trainer.settle(setting, generator)
    rows, weights, _ = trainer.buffer(setting.shape, generator)
    loss = rows.weighted_gradient(weights)
    step = take_next_step(trainer.model, optimizer, loss, None)
    ones = {name: torch.ones_like(g) for name, g in loss.items()}
    metrics = {"share": step.share_direction(ones), "effect": effect_metric(loss, step)}
    chosen = torch.argsort(weights.abs(), descending=True)[:SEQUENCES]
    found: dict[str, list[dict[str, Tensor]]] = {kind: [] for kind in metrics}
    for i in chosen:
        only = torch.zeros_like(weights)
        only[i] = -weights[i]
        row = rows.weighted_gradient(only)  # w_i dS_i
        for kind, metric in metrics.items():
            found[kind].append({name: metric[name] * part for name, part in row.items()})
    return found


def share_intervals(repeats: int) -> Rates:
    """Name of a check -> shape -> how often the interval holds the truth, over sequences and buffers."""
    trainer, found = Trainer(World()), {}
    names = {"share": "coverage of an accounting share", "effect": "coverage of the effect of leaving a sequence out"}
    for kind, ways in directions(trainer).items():
        held: dict[str, list[float]] = {}
        for number, direction in enumerate(ways):
            world = trainer.world.towards(direction)
            for shape in SHAPES:
                rng = np.random.default_rng((20, number, shape.prompts))
                drawn = draw(world, shape, repeats, rng)
                whole, left_out, _ = with_each_left_out(sums(columns(world, shape.step), drawn))
                interval = jackknife_interval(whole["rao_blackwell"], left_out["rao_blackwell"])
                rate = float(interval.holds(truths(world, shape.step)["rao_blackwell"]).mean())
                held.setdefault(shape.name, []).append(rate)
        found[names[kind]] = {shape: float(np.mean(rates)) for shape, rates in held.items()}
    return found

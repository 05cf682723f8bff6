"""Many buffers at once: the numbers of an analysis as functions of sums over prompts, (buffers, prompts) each.

Every number that commands print of a buffer is a function of a few sums over its sequences, so that leaving a prompt out is a
subtraction, and a thousand buffers take a second. tests/test_calibration.py holds these functions equal to the product's own.

    h = sum A / sum T,                      A, T, S: sum of token entropies, length, score of a completion
    rao_blackwell    sum (C - h R) / sum T          C: its term per completion,  R = sum_k (T - k + 1) D log pi_k
    split            sum (E + A D - h T D) / sum T  D: derivative of S along the step,  E: of A on given tokens
    score_function   -sum (V - b) D / sum T         V = S + h T,  b: mean of V over the others of the prompt, or over all others
    fixed_prefix     sum E / sum T
    measured         sum w A' / sum w T - h         w = exp(S' - S); the prime: after the step
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.calibration_world import Shape, World

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Draws:
    """Buffers by their completions: index (R, B, m), live (R, B, m) which of them are there; counts differ between prompts."""

    index: np.ndarray
    live: np.ndarray
    prompts: np.ndarray

    def rows(self, buffer: int) -> tuple[Tensor, Tensor]:
        """(N,) completions of one buffer and the unit of each, as `World.draw` gives them."""
        unit = np.broadcast_to(np.arange(self.index.shape[1])[:, None], self.index.shape[1:])
        live = self.live[buffer]
        return torch.from_numpy(self.index[buffer][live]), torch.from_numpy(unit[live])


def draw(
    world: World, shape: Shape, buffers: int, rng: np.random.Generator, prompts: np.ndarray | None = None
) -> Draws:
    """Buffers of a shape. prompts: (R, B) those of other buffers, whose completions are drawn anew; default: drawn uniformly."""
    low, high = shape.completions
    count, each = world.by_prompt.shape
    if prompts is None:
        prompts = rng.integers(0, count, (buffers, shape.prompts))
    numbers = rng.integers(low, high + 1, prompts.shape)
    cumulated = np.cumsum(world.by_prompt.numpy(), 1)
    uniform, places = rng.random((*prompts.shape, high)), np.empty((*prompts.shape, high), dtype=np.int64)
    for prompt in range(count):
        here = prompts == prompt
        places[here] = np.searchsorted(cumulated[prompt], uniform[here] * cumulated[prompt, -1])
    index = prompts[..., None] * each + places
    live = np.arange(high) < numbers[..., None]
    return Draws(index.repeat(shape.copies, -1), live.repeat(shape.copies, -1), prompts)


def columns(world: World, step: float) -> Columns:
    """Name -> (n,) of every completion of the world, for a step of this length."""
    before, along, after = world.before, world.along, world.after(step)[0]
    mask = world.batch.completion_mask.double()
    entropies, slopes = before.entropies.double() * mask, step * along.logprobs.double() * mask
    to_go, left = (x.flip(1).cumsum(1).flip(1) for x in (entropies, mask))
    given = step * (along.entropies.double() * mask).sum(1)
    found = {
        "n": torch.ones(len(mask)), "A": entropies.sum(1), "T": mask.sum(1), "S": before.scores(), "D": slopes.sum(1),
        "E": given, "C": given + (to_go * slopes).sum(1), "R": (left * slopes).sum(1), "A2": after.entropy_sums(),
        "w": (after.scores() - before.scores()).exp(),
    }  # fmt: skip
    found |= {name: found[name[0]] * found[name[1]] for name in ("AD", "TD", "SD", "wT", "ww")}
    found["wA2"] = found["w"] * found["A2"]
    return {name: values.double().numpy() for name, values in found.items()}


def sums(values: Columns, drawn: Draws) -> Columns:
    """(R, B) sums over each prompt's completions, and what the score function's baselines of a prompt make of them."""
    out = {name: (column[drawn.index] * drawn.live).sum(-1) for name, column in values.items()}
    n, alone = out["n"], out["n"] == 1
    bessel = n / np.maximum(n - 1, 1)
    for name in ("S", "T"):  # sum of (V - mean of the others) D over a prompt, V = S and V = T
        out[f"own {name}"] = np.where(alone, 0.0, bessel * (out[f"{name}D"] - out[name] * out["D"] / n))
        out[f"alone {name}D"] = np.where(alone, out[f"{name}D"], 0.0)
    out["alone D"] = np.where(alone, out["D"], 0.0)
    return out


def numbers(t: Columns) -> Columns:
    """Every number from totals: of whole buffers, or with a prompt left out."""
    h, count = t["A"] / t["T"], t["n"]
    value, alone = t["S"] + h * t["T"], t["alone SD"] + h * t["alone TD"]
    others = np.maximum(count - 1, 1)
    score = t["own S"] + h * t["own T"] + count / others * alone - value * t["alone D"] / others
    return {
        "entropy": h,
        "entropy per completion": t["A"] / count,
        "surprisal": -t["S"] / count,
        "rao_blackwell": (t["C"] - h * t["R"]) / t["T"],
        "per completion": t["C"] / count,
        "split": (t["E"] + t["AD"] - h * t["TD"]) / t["T"],
        "score_function": -score / t["T"],
        "fixed_prefix": t["E"] / t["T"],
        "measured": t["wA2"] / t["wT"] - h,
        "measured on given tokens": (t["A2"] - t["A"]) / t["T"],
    }


def with_each_left_out(summed: Columns) -> tuple[Columns, Columns, np.ndarray]:
    """Numbers (R,), the same with each prompt left out (R, B), and the effective part (R,) of the sequences after the step."""
    totals = {name: values.sum(-1, keepdims=True) for name, values in summed.items()}
    left_out = numbers({name: totals[name] - values for name, values in summed.items()})
    whole = {name: values[:, 0] for name, values in numbers(totals).items()}
    effective = (totals["w"] ** 2 / totals["ww"] / totals["n"])[:, 0]
    return whole, left_out, effective


def truths(world: World, step: float) -> dict[str, float]:
    """What each of `numbers` estimates."""
    values = {name: torch.from_numpy(column) for name, column in columns(world, step).items()}
    mean = {name: world.expectation(column) for name, column in values.items()}
    slope, change = step * world.slope, world.after(step)[1]
    return {
        "entropy": world.token_entropy,
        "entropy per completion": mean["A"],
        "surprisal": mean["A"],
        "rao_blackwell": slope,
        "per completion": mean["C"],
        "split": slope,
        "score_function": slope,
        "fixed_prefix": mean["E"] / mean["T"],
        "measured": change,
        "measured on given tokens": (mean["A2"] - mean["A"]) / mean["T"],
    }

"""Do the errors, intervals and p-values that commands print mean what they say? Simulated in an exact world.

    python benchmarks/calibration.py [buffers]          default 400; results: benchmarks/results/calibration/

The world is a policy of which every completion is enumerated in float64 (tests/oracle), so that the truth is known: prompts are
drawn uniformly, completions from the policy, and every number is made by the product's own functions from the drawn sequences.
For each shape of a buffer:

    coverage    how often the 95% interval of an estimate holds the truth (93 to 97%; below 8 prompts 90 to 98%)
    level       how often "they do not agree" is said of a prediction that is right (3 to 7%)
    power       how often it is said of a prediction 15% too large
    folds       coverage of the probe's error over folds of unequal size
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.directional import entropy_products, token_derivatives
from entropy_core.fold_gradients import fold_estimate, fold_of_sequences, fold_shares
from entropy_core.measurement import snis_entropy_change
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_core.uncertainty import contributions_without_each_prompt, jackknife_standard_error, leave_one_prompt_out
from entropy_experiments.statistics.agreement import paired_agreement, unpaired_agreement
from entropy_experiments.step.optimizer_step import moved
from rl_training.intervals import interval
from tests.entropy_core.support import whole_space
from tests.oracle.enumeration import entropies_along, enumerate_completions, solve
from tests.oracle.policy import RecurrentPolicy, Task

RESULTS = Path("benchmarks/results/calibration")
GAP = 0.15
FOLDS = 4


@dataclass(frozen=True)
class Shape:
    """A buffer: prompts, completions of each (a range: every prompt draws its own number), and the length of the step."""

    name: str
    prompts: int
    completions: tuple[int, int]
    step: float


SHAPES = (
    Shape("4 prompts x 1", 4, (1, 1), 0.05),
    Shape("8 prompts x 8", 8, (8, 8), 0.05),
    Shape("16 prompts x 1", 16, (1, 1), 0.05),
    Shape("64 prompts x 1", 64, (1, 1), 0.05),
    Shape("16 prompts x 1 to 7", 16, (1, 7), 0.05),
    Shape("64 prompts x 1, long step", 64, (1, 1), 1.0),
)


class World:
    """The policy, its completions, and a direction; derivatives and statistics of every completion, made once a step length."""

    def __init__(self, seed: int = 4, size: float = 1.0) -> None:
        prompts = tuple(p for n in (1, 2, 3) for p in product((1, 2, 3), repeat=n))
        self.policy = RecurrentPolicy()
        self.space = enumerate_completions(Task(prompts=prompts, vocabulary=4, max_completion_length=4))
        self.exact = solve(self.policy, self.space)
        generator = torch.Generator().manual_seed(seed)
        named = {name: p.detach() for name, p in self.policy.named_parameters()}
        flat = torch.randn(sum(p.numel() for p in named.values()), generator=generator, dtype=torch.float64)
        flat *= size / flat.norm()
        pieces = flat.split([p.numel() for p in named.values()])
        self.direction = {name: piece.view_as(p) for (name, p), piece in zip(named.items(), pieces, strict=True)}
        self.slope = float(self.exact.token_entropy_gradient @ flat)
        self.batch = whole_space(self.space)
        self.before = token_statistics(self.policy, self.batch)
        self.along = token_derivatives(self.policy, self.batch, self.direction)
        self.by_prompt = self.exact.probabilities.view(len(prompts), -1) * len(prompts)
        self._after: dict[float, tuple[TokenStatistics, float]] = {}

    def after(self, step: float) -> tuple[TokenStatistics, float]:
        """Statistics after `step` times the direction, and the true change of entropy, nats per token."""
        if step not in self._after:
            with moved(self.policy, self.direction, step):
                statistics = token_statistics(self.policy, self.batch)
            change = entropies_along(self.policy, self.space, self.direction, step)[1] - self.exact.token_entropy
            self._after[step] = statistics, float(change)
        return self._after[step]

    def draw(self, shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(N,) completions of a buffer and the number of the draw (the unit) that each belongs to."""
        low, high = shape.completions
        prompts = torch.randint(0, len(self.by_prompt), (shape.prompts,), generator=generator)
        counts = torch.randint(low, high + 1, (shape.prompts,), generator=generator)
        drawn = [
            p * self.by_prompt.shape[1] + torch.multinomial(self.by_prompt[p], int(n), True, generator=generator)
            for p, n in zip(prompts.tolist(), counts, strict=True)
        ]
        return torch.cat(drawn), torch.repeat_interleave(torch.arange(shape.prompts), counts)


def simulate(world: World, shape: Shape, buffers: int, seed: int = 0) -> dict[str, float]:
    """Name of a check -> its rate over `buffers` simulated buffers."""
    generator = torch.Generator().manual_seed(seed)
    after, change = world.after(shape.step)
    truth = {"entropy": world.exact.token_entropy, "predicted": shape.step * world.slope, "measured": change}
    counts: dict[str, list[bool]] = {}
    for _ in range(buffers):
        for name, hit in _one(world, shape, truth, after, generator):
            counts.setdefault(name, []).append(hit)
    return {name: float(np.mean(hits)) for name, hits in counts.items()}


def _one(
    world: World, shape: Shape, truth: dict[str, float], after: TokenStatistics, generator: torch.Generator
) -> Iterator[tuple[str, bool]]:
    rows, unit = world.draw(shape, generator)
    batch: SequenceBatch = replace(world.batch.select(rows.tolist()), prompt_index=unit)
    before, along = world.before.select(rows), world.along.select(rows)
    freedom = shape.prompts - 1
    sums, lengths = before.entropy_sums(), batch.completion_lengths.double()
    entropy = float(sums.sum() / lengths.sum())
    contributions = shape.step * entropy_products(before, along, batch, "rao_blackwell", True)
    predicted = float(contributions.mean())

    def parts_of(kept: Tensor) -> Tensor:
        some = batch.select(kept.tolist())
        return shape.step * entropy_products(before.select(kept), along.select(kept), some, "rao_blackwell", True)

    measured = snis_entropy_change(before, after.select(rows), batch)
    assert measured.left_out is not None
    left_out = {
        "entropy": leave_one_prompt_out(sums, unit, lengths),
        "predicted": contributions_without_each_prompt(unit, parts_of),
        "measured": measured.left_out,
    }
    values = {"entropy": entropy, "predicted": predicted, "measured": measured.change}
    errors = {name: jackknife_standard_error(series) for name, series in left_out.items()}
    for name, value in values.items():
        low, high = interval(value, errors[name], freedom)
        yield f"coverage of {name}", low <= truth[name] <= high
        yield f"2 standard errors of {name}", abs(value - truth[name]) <= 2 * errors[name]
    # A prediction that is right: its expectation is the measured change itself, whatever the second order does.
    right = truth["measured"] / truth["predicted"]
    for name, factor in (("level", right), (f"power at a gap of {GAP:.0%}", right * (1 + GAP))):
        series = factor * left_out["predicted"] - left_out["measured"]
        compared = paired_agreement(factor * predicted - measured.change, series.numpy())
        assert compared is not None
        yield f"{name} of the agreement rule", not compared.agrees
        apart = unpaired_agreement(
            (factor * predicted, factor * errors["predicted"]), (measured.change, errors["measured"])
        )
        assert apart is not None
        yield f"{name} in quadrature, as before", apart.z > 2
    fold_of = fold_of_sequences(unit, FOLDS)
    parts = torch.zeros(FOLDS, dtype=torch.float64).index_add_(0, fold_of, contributions / len(rows))
    estimate = fold_estimate(parts, fold_shares(fold_of, FOLDS))
    low, high = interval(estimate.value, estimate.standard_error, FOLDS - 1)
    yield f"coverage of {FOLDS} folds", low <= truth["predicted"] <= high


def main(buffers: int = 400) -> None:
    world, table = World(), {}
    for shape in SHAPES:
        table[shape.name] = simulate(world, shape, buffers)
        print(shape.name, {name: round(rate, 3) for name, rate in table[shape.name].items()}, flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "rates.json").write_text(json.dumps({"buffers": buffers, "shapes": table}, indent=1) + "\n")
    names = list(next(iter(table.values())))
    lines = [
        "# Calibration in an exact world",
        "",
        f"`python benchmarks/calibration.py {buffers}`: {buffers} simulated buffers a column, so that a rate of 95% is known to "
        f"± {100 * 2 * math.sqrt(0.95 * 0.05 / buffers):.1f} points. What each line means stands at the head of that file.",
        "",
        "| | " + " | ".join(table) + " |",
        "|---|" + "---|" * len(table),
        *(f"| {name} | " + " | ".join(f"{rates[name]:.1%}" for rates in table.values()) + " |" for name in names),
    ]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))

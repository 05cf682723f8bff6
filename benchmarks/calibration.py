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
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.calibration_world import Shape, World
from entropy_core.batch import SequenceBatch
from entropy_core.directional import entropy_products
from entropy_core.fold_gradients import fold_estimate, fold_of_sequences, fold_shares
from entropy_core.measurement import snis_entropy_change
from entropy_core.scores import TokenStatistics
from entropy_core.uncertainty import contributions_without_each_prompt, jackknife_standard_error, leave_one_prompt_out
from entropy_experiments.statistics.agreement import paired_agreement, unpaired_agreement
from rl_training.intervals import interval

RESULTS = Path("benchmarks/results/calibration")
GAP = 0.15
FOLDS = 4


SHAPES = (
    Shape("4 prompts x 1", 4, (1, 1), 0.05),
    Shape("8 prompts x 8", 8, (8, 8), 0.05),
    Shape("16 prompts x 1", 16, (1, 1), 0.05),
    Shape("64 prompts x 1", 64, (1, 1), 0.05),
    Shape("16 prompts x 1 to 7", 16, (1, 7), 0.05),
    Shape("64 prompts x 1, long step", 64, (1, 1), 1.0),
)


def simulate(world: World, shape: Shape, buffers: int, seed: int = 0) -> dict[str, float]:
    """Name of a check -> its rate over `buffers` simulated buffers."""
    generator = torch.Generator().manual_seed(seed)
    after, change = world.after(shape.step)
    truth = {"entropy": world.token_entropy, "predicted": shape.step * world.slope, "measured": change}
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

"""The quick part of `make calibrate`: errors, intervals and the rule of agreement in a world whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import calibration_analyses, calibration_shares, calibration_tests
from benchmarks.calibration import SHAPES, WORLDS, World, simulate
from benchmarks.calibration_buffers import columns, draw, sums, truths, with_each_left_out
from benchmarks.calibration_page import write_page
from benchmarks.calibration_tests import alignment_tests, buffer_tests, structure_tests
from benchmarks.calibration_world import Shape
from entropy_core.batch import SequenceBatch
from entropy_core.directional import entropy_derivatives
from entropy_core.entropy import Estimator
from entropy_core.measurement import fixed_prefix_entropy_change, snis_entropy_change
from entropy_core.scores import TokenStatistics
from entropy_core.uncertainty import contributions_without_each_prompt, leave_one_prompt_out

BUFFERS = 600
LOWEST = {"64 prompts x 1": 0.93, "16 prompts x 1 to 7": 0.93, "8 prompts x 8": 0.90, "4 prompts x 1": 0.90}
LOWEST_OF_SUMS = LOWEST | {"8 prompts x 8": 0.85}
"""Coverage that benchmarks/results/calibration shows to be reached; the aim is 93%, below 8 prompts 90%. Of 8 prompts 43% of
buffers hold none of the four that carry half of the variance."""


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def shape_of(name: str) -> Shape:
    return next(shape for shape in SHAPES if shape.name == name)


def contributions(
    batch: SequenceBatch,
    before: TokenStatistics,
    along: TokenStatistics,
    estimator: Estimator,
    step: float,
    kept: torch.Tensor,
) -> torch.Tensor:
    """(m,) of some sequences as a batch of their own."""
    some = batch.select(kept.tolist())
    return step * entropy_derivatives(before.select(kept), along.select(kept), some, estimator, True)


@pytest.mark.parametrize(
    "shape", [Shape("", 5, (1, 4), 0.3), Shape("", 6, (1, 1), 0.3), Shape("", 4, (2, 2), 0.3, copies=2)]
)
def test_numbers_of_many_buffers_are_the_products_own(world: World, shape: Shape) -> None:
    """Whole, and with each prompt left out, by the functions that an analysis calls."""
    drawn = draw(world, shape, 2, np.random.default_rng(0))
    whole, left_out, effective = with_each_left_out(sums(columns(world, shape.step), drawn))
    for r in range(2):
        rows, unit = drawn.rows(r)
        batch = replace(world.batch.select(rows.tolist()), prompt_index=unit)
        before, along = world.before.select(rows), world.along.select(rows)
        after = world.after(shape.step)[0].select(rows)
        estimators: tuple[Estimator, ...] = ("rao_blackwell", "split", "score_function", "fixed_prefix")
        for name in estimators:
            parts = partial(contributions, batch, before, along, name, shape.step)
            assert whole[name][r] == pytest.approx(float(parts(torch.arange(len(rows))).mean()), rel=1e-10)
            wanted = contributions_without_each_prompt(unit, parts).numpy()
            assert left_out[name][r] == pytest.approx(wanted, rel=1e-9), name
        measured = snis_entropy_change(before, after, batch)
        given = fixed_prefix_entropy_change(before, after, batch)
        for name, found in (("measured", measured), ("measured on given tokens", given)):
            assert found.left_out is not None and whole[name][r] == pytest.approx(found.change, rel=1e-9)
            assert left_out[name][r] == pytest.approx(found.left_out.numpy(), rel=1e-9)
        assert effective[r] == pytest.approx(measured.effective_sample_size / len(rows))
        entropy = leave_one_prompt_out(before.entropy_sums(), unit, batch.completion_lengths.double())
        assert left_out["entropy"][r] == pytest.approx(entropy.numpy(), rel=1e-10)


@pytest.mark.long
def test_the_truths_are_those_of_the_enumerated_world(world: World) -> None:
    found, exact = truths(world, 0.5), world.exact
    direction = torch.cat([d.flatten() for d in world.direction.values()])
    assert found["split"] == pytest.approx(0.5 * float(exact.token_entropy_gradient @ direction))
    assert found["per completion"] == pytest.approx(0.5 * float(exact.sequence_entropy_gradient @ direction))
    assert found["entropy"] == pytest.approx(exact.token_entropy)
    assert world.at(0.5).token_entropy - world.token_entropy == pytest.approx(found["measured"])


@pytest.mark.long
@pytest.mark.parametrize("name", list(LOWEST))
def test_intervals_cover_and_the_rule_rejects_at_its_level(world: World, name: str) -> None:
    """Bounds are what 600 buffers of a rate inside the stated range give in all but 1 of 1000 repetitions."""
    rates = simulate(world, shape_of(name), BUFFERS, seed=1)
    least = stats.binom.ppf(0.001, BUFFERS, LOWEST[name]) / BUFFERS
    for quantity in ("entropy", "predicted", "measured", "predicted by split", "4 folds"):
        rate = rates[f"coverage of {quantity}"]
        assert least <= rate <= 0.995, f"{quantity}: {rate:.1%}"
    for quantity in ("entropy", "predicted", "measured", "4 folds"):
        before = rates[f"coverage of {quantity}, by Student's t alone, as before"]
        assert rates[f"coverage of {quantity}"] >= before
        if name == "4 prompts x 1" and quantity in ("predicted", "measured"):
            assert before < 0.85, "Student's t alone would do: the check is blind"
    sums_of = [rate for label, rate in rates.items() if label.startswith("coverage of a")]
    assert len(sums_of) == 9
    assert min(sums_of) >= stats.binom.ppf(0.001, BUFFERS, LOWEST_OF_SUMS[name]) / BUFFERS
    level = rates["level of the agreement rule"]
    assert 0.005 <= level <= stats.binom.ppf(0.999, BUFFERS, 0.07) / BUFFERS, (
        f"{level:.1%}: below, predictions are held at the whole batch's entropy without a prompt; above, an error is too small"
    )
    assert rates["level in quadrature, as before"] <= 0.01, "quadrature never rejects: this is what the rule replaced"
    if name == "64 prompts x 1":
        assert rates["power at a gap of 15% of the agreement rule"] >= 0.5


@pytest.mark.long
def test_a_second_world_that_no_rule_was_chosen_in() -> None:
    other = World(**WORLDS["another policy, 5 tokens"])
    rates = simulate(other, shape_of("16 prompts x 1"), BUFFERS, seed=2)
    least = stats.binom.ppf(0.001, BUFFERS, 0.93) / BUFFERS
    for quantity in ("entropy", "predicted", "measured", "4 folds"):
        assert rates[f"coverage of {quantity}"] >= least


@pytest.mark.long
def test_p_values_are_uniform_also_with_duplicates() -> None:
    repeats = 60
    most = stats.binom.ppf(0.9999, repeats, 0.05) / repeats
    for test in (structure_tests, buffer_tests, alignment_tests):
        for name, row in test(repeats).items():
            assert all(np.isnan(rate) or rate <= most for rate in row.values()), (name, row)
            assert not all(np.isnan(rate) for rate in row.values()), f"{name}: never tested"


def test_the_page_marks_what_is_out_of_range(tmp_path) -> None:
    row = {
        "coverage of entropy": 0.951,
        "coverage of predicted": 0.912,
        "level of the agreement rule": 0.02,
        "coverage of entropy, by Student's t alone, as before": 0.80,
    }
    worlds = {name: {"8 prompts x 8": row, "4 prompts x 1": row} for name in ("", *WORLDS)}
    write_page(
        tmp_path, {"buffers": 10, "worlds": worlds, "tests": {"level of x": {"8 prompts": 0.1, "9 prompts": np.nan}}}
    )
    text = (tmp_path / "README.md").read_text()
    assert "| coverage of predicted | **91.2%** | 91.2% |" in text, "below 8 prompts from 90% on"
    assert "**2.0%**" in text and "| 95.1% | 95.1% |" in text and "**10.0%**" in text and "9 prompts" not in text
    assert "**80.0%**" not in text and (tmp_path / "coverage.png").stat().st_size > 10_000


PARTS = [
    (module, name)
    for module in (calibration_tests, calibration_analyses, calibration_shares)
    for name, part in vars(module).items()
    if getattr(part, "__module__", "") == module.__name__
    and getattr(part, "__annotations__", {}).get("return") == "Rates"
]


@pytest.mark.long
@pytest.mark.parametrize(("module", "name"), PARTS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_part_of_make_calibrate_runs(module, name) -> None:
    """On four buffers a cell, where rates say nothing yet and some are withheld."""
    rates = [rate for cells in getattr(module, name)(4).values() for rate in cells.values()]
    assert all(0.0 <= rate <= 1.0 or np.isnan(rate) for rate in rates)

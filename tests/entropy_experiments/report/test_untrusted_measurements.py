"""A measurement on less than half of its sequences has no known error: tiles, tables, figures and the console print none."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from entropy_experiments.console.tables import outcome_facts, print_outcomes
from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.price_results import MeasuredStep, PriceRow, PricesResult
from entropy_experiments.records.record import validated
from entropy_experiments.records.summary import Summary
from entropy_experiments.records.weighting_results import MeasuredChange
from entropy_experiments.report.analysis_tables import TABLES
from entropy_experiments.report.cells import estimate_cell, explained, thousandths_with_error
from entropy_experiments.report.figures.history import history_panels
from entropy_experiments.report.outcome import analysis_outcome
from entropy_experiments.report.tables import estimator_table, headline
from entropy_experiments.statistics.confidence import DOUBTED_MEANS, UNTRUSTED, measured_cell
from tests.entropy_experiments.results_fixture import make_history, make_run, make_sequences, make_summary
from tests.entropy_experiments.whole_summary import results_of


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    return make_summary(make_sequences(np.random.default_rng(0))[0])


def doubted(given: dict[str, Any]) -> dict[str, Any]:
    summary = copy.deepcopy(given)
    summary["actual"]["snis"] |= {"effective_sample_size": 9.0, "trustworthy": False}
    summary["actual"]["snis"] |= dict.fromkeys(("low", "high", "degrees_of_freedom"))
    return summary


def record(summary: dict[str, Any]) -> Summary:
    return validated(Summary, summary, "summary.json")


def test_a_cell_is_marked_and_has_no_error() -> None:
    assert measured_cell(-0.27, 0.03, False) == "−0.270 (untrusted)"
    assert measured_cell(-0.27, 0.03, True) == measured_cell(-0.27, 0.03, None) == "−0.270 ± 0.030"
    assert measured_cell(None, None, False) == "not known"
    assert explained("Caption.", [["a", "−0.270 (untrusted)"]]) == f"Caption. {DOUBTED_MEANS}"
    assert explained("Caption.", [["a", "−0.270 ± 0.030"]]) == "Caption."


def test_the_tile_and_the_table_of_a_report(given: dict[str, Any]) -> None:
    def measured(summary: dict[str, Any]) -> tuple[Any, Any]:
        tile = next(tile for tile in headline(record(summary), ()) if tile.label == "Measured change")
        return tile, estimator_table(record(summary))

    tile, table = measured(given)
    assert "±" in tile.value and tile.tone == "" and "ntrusted" not in f"{table.caption}{table.texts}"
    tile, table = measured(doubted(given))
    assert tile.value.endswith("(untrusted)") and "±" not in tile.value + tile.unit and tile.tone == "warning"
    cells = {row[0]: row[-2] for row in table.texts}
    assert [text.endswith("(untrusted)") for label, text in cells.items() if "Fixed prefix" not in label] == [True] * 3
    assert DOUBTED_MEANS in table.caption


@pytest.mark.parametrize("terminal", [True, False])
def test_the_consoles_tables(given: dict[str, Any], terminal: bool) -> None:
    def outcome(summary: dict[str, Any]) -> Any:
        return analysis_outcome(results_of(summary, make_history(), make_run()["self_checks"], ()))

    def shown(summary: dict[str, Any]) -> str:
        console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
        print_outcomes(console, [outcome(summary)])
        return " ".join(console.file.getvalue().split())

    assert "untrusted" not in shown(given).lower()
    text = shown(doubted(given))
    assert "−0.0800 (untrusted)" in text and DOUBTED_MEANS in text and "−0.080 ±" not in text
    facts = {name: (value, tone) for name, value, tone in outcome_facts(outcome(doubted(given)))}
    assert facts["Measured change"] == (f"−0.0800 (no interval) nats per token; {UNTRUSTED}", "warning")


def change(trusted: bool | None) -> MeasuredChange:
    return MeasuredChange(value=-0.02, standard_error=0.003, ratio=1.0, z=None, trustworthy=trusted)


def test_measured_steps_of_weightings() -> None:
    assert thousandths_with_error(change(False)) == "−20.0 (untrusted)" and estimate_cell(change(False)).endswith(
        "ted)"
    )
    assert thousandths_with_error(change(True)) == thousandths_with_error(change(None)) == "−20.0 ± 3.0"
    doubtful, known = change(False).known(), change(True).known()
    assert doubtful is not None and doubtful.low is None and known is not None and known.low is not None


def prices(effective: float | None) -> PricesResult:
    def estimate(value: float) -> StudentEstimate:
        return StudentEstimate(value=value, standard_error=0.01, degrees_of_freedom=7.0)

    did = None if effective is None else MeasuredStep(entropy=-0.16, reward=0.05, effective_sample_size=effective)
    row = PriceRow(name="run", label="as trained", entropy=estimate(-0.18), reward=estimate(0.07), measured=did)
    return PricesResult(rows=(row,), alike=(), keeps=0.25, reward_note=None, n_eval=8, eval_prompts=8, judged_prompts=4)


def test_measured_prices() -> None:
    """`--measure` took every step, and printed none."""
    (_, taken) = TABLES["prices"](prices(4.0))
    assert taken.texts == [["as trained", "−0.180", "+0.0700", "−0.160", "+0.0500", "4"]]
    (_, taken) = TABLES["prices"](prices(3.9))
    assert taken.texts[0][3:5] == ["−0.160 (untrusted)", "+0.0500 (untrusted)"] and DOUBTED_MEANS in taken.caption
    assert len(TABLES["prices"](prices(None))) == 1


def test_the_history_draws_no_interval() -> None:
    row = {"step": 1, "probe/measured": -0.1, "probe/measured_se": 0.02, "probe/measured_df": 9.0}
    rows = [HistoryRow.model_validate(row | {"step": step, "probe/low_ess": low}) for step, low in ((1, 0.0), (2, 1.0))]
    measured = next(line for line in history_panels(rows)[2].lines if line.name == "measured change")
    assert measured.bars is not None and np.isfinite(measured.bars).all(axis=0).tolist() == [True, False]

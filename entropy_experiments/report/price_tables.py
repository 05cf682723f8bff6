"""Tables of what could be done in place of the step: other weightings of its sequences, and the price list."""

from __future__ import annotations

from entropy_experiments.records.price_results import PricesResult
from entropy_experiments.records.weighting_results import WeightingResult
from entropy_experiments.report.cells import estimate_cell, note_cell, table_of, thousandths_with_error
from entropy_experiments.report.content import Table
from entropy_experiments.statistics.confidence import measured_cell
from entropy_experiments.text.numbers import plain, signed


def weighting_tables(result: WeightingResult) -> list[Table]:
    """A row a weighting: predicted changes, the measured one at equal length, and the cost of reward."""
    rows = []
    for row in result.rows:
        if row.delta_h is None:
            rows.append([row.label, note_cell(f"no weights: {row.reason or 'not known'}"), *[""] * 5])
            continue
        cost = row.entropy_cost_per_reward
        rows.append(
            [
                row.label,
                thousandths_with_error(row.delta_h.raw),
                thousandths_with_error(row.delta_h.equal_length),
                thousandths_with_error((row.actual or {}).get("equal_length")),
                thousandths_with_error(row.delta_h.equal_gain),
                estimate_cell(row.reward_gain),
                "–" if cost is None or cost.value is None else estimate_cell(cost),
            ]
        )
    headings = (
        "Weights", "δh as it is", "δh at equal length", "the same, measured", "δh at equal gain", "Gain of mean reward",
        "Cost: nats per token for one unit of reward",
    )  # fmt: skip
    return table_of("Batch part of the change, ×10⁻³ nats per token.", headings, rows)


def price_tables(result: PricesResult) -> list[Table]:
    """A row an intervention; below it what the real steps did, where they were taken."""
    rows = []
    for row in result.rows:
        if row.entropy is None:
            rows.append([row.label, note_cell(f"not priced: {row.reason or 'not known'}"), *[""] * 4])
            continue
        price, shown = row.reward_per_nat, (row.entropy, row.entropy_minus_run, row.reward, row.reward_minus_run)
        cells = ["–" if one is None else one.shown() for one in shown]
        rows.append([row.label, *cells, "–" if price is None or price.value is None else price.shown()])
    headings = ("In place of the step", "δh", "δh less as trained", "δJ", "δJ less as trained", "Reward for a nat kept")
    predicted = table_of(
        "Predicted change of entropy, δh (nats per token), and of mean reward, δJ, in this step. “Less as trained”: minus that "
        "of the step as trained. Reward for a nat kept: the quotient of these two differences. Brackets: 95% intervals.",
        headings,
        rows,
    )
    return predicted + _real_steps(result)


def _real_steps(result: PricesResult) -> list[Table]:
    """Of `price --measure`: what each step did, beside what it was predicted to do; none where no step was taken."""
    rows = []
    for row in result.rows:
        did = row.measured
        if did is None:
            continue
        trusted = did.trusted(result.n_eval)
        rows.append(
            [
                row.label,
                *("–" if one is None else signed(one.value) for one in (row.entropy, row.reward)),
                *(_one_number(value, trusted) for value in (did.entropy, did.reward)),
                plain(did.effective_sample_size),
            ]
        )
    headings = ("Real step", "δh predicted", "δJ predicted", "δh measured", "δJ measured", "Effective sample")
    return table_of(
        f"The same steps, taken and measured on the {result.n_eval} evaluation sequences, reweighted to the policy after each. "
        "Measured numbers have no errors here.",
        headings,
        rows,
    )


def _one_number(value: float | None, trusted: bool | None) -> str:
    """Without an error, which is not known."""
    return "–" if value is None else measured_cell(value, None, False) if trusted is False else signed(value)

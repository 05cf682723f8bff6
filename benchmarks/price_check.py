"""Predicted prices beside real steps: every intervention of a price list is taken and measured, at several checkpoints.

    python benchmarks/price_check.py RUN/checkpoint-2 RUN/checkpoint-4 RUN/checkpoint-6

Each checkpoint is priced with --measure into RUN/prices/ (kept, and read again another time); the table goes to
benchmarks/results/prices/README.md. Measured changes are on the same evaluation sequences, reweighted; predictions and
measurements share sequences, so what differs is curvature, and the noise of reweighting.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from entropy_experiments.console.analyze import analyze_with_progress
from entropy_experiments.console.price import price_config, prices_of
from entropy_experiments.records.price_results import PriceRow, PricesResult
from rl_training.files import write_whole
from rl_training.intervals import correlation_interval

RESULTS = Path(__file__).parent / "results" / "prices" / "README.md"
SIZES = ("entropy_analysis.eval_batch_size=48", "entropy_analysis.train_batch_size=48")


def priced(checkpoint: Path) -> PricesResult:
    """The price list of a checkpoint, with measured steps."""
    folder = checkpoint.parent / "prices" / checkpoint.name
    if not folder.exists():
        analyze_with_progress(checkpoint, price_config(None, list(SIZES), True), folder=folder, table=False)
    return prices_of(folder)


def line(checkpoint: Path, result: PricesResult) -> str:
    """One row of the table; differences to the step as trained for rank and slope, changes themselves for signs."""
    rows = [row for row in result.rows if row.measured is not None and row.entropy_minus_run is not None]
    run = result.rows[0].measured
    assert run is not None and run.entropy is not None and run.reward is not None
    predicted = np.array([_value(row.entropy_minus_run) for row in rows])
    measured = np.array(
        [row.measured.entropy - run.entropy for row in rows if row.measured and row.measured.entropy is not None]
    )
    low, high = correlation_interval(np.argsort(np.argsort(predicted)) * 1.0, np.argsort(np.argsort(measured)) * 1.0)
    slope = float(predicted @ measured / (predicted @ predicted))
    rewards = [
        (_value(row.reward_minus_run), row.measured.reward - run.reward, _told(row))
        for row in rows
        if row.measured and row.measured.reward is not None
    ]
    told = [(p, m) for p, m, clear in rewards if clear]
    agree = sum(np.sign(p) == np.sign(m) for p, m in told)
    rank = float(spearmanr(predicted, measured).statistic)
    shown = result.rows[0].entropy.shown() if result.rows[0].entropy else ""
    return (
        f"| {checkpoint.name} | {len(rows)} | {shown} | {run.entropy:+.3f} | {rank:.2f} [{low:.2f}, {high:.2f}] | {slope:.2f} "
        f"| {agree} of {len(told)} |"
    )


def _value(estimate: object) -> float:
    found = getattr(estimate, "value", None)
    return float("nan") if found is None else float(found)


def _told(row: PriceRow) -> bool:
    known = None if row.reward_minus_run is None else row.reward_minus_run.known()
    return known is not None and known.holds_zero is False


def main(checkpoints: list[Path]) -> None:
    """Prices every checkpoint and writes the table."""
    lines = [line(checkpoint, priced(checkpoint)) for checkpoint in checkpoints]
    text = [
        "# Prices beside real steps",
        "",
        "By `python benchmarks/price_check.py "
        + " ".join(str(c) for c in checkpoints)
        + "`; SmolLM2-135M, LoRA, the demo's run,",
        "48 evaluation and 48 training sequences. Differences to the step as trained, predicted and measured (the real AdamW",
        "step, the same evaluation sequences reweighted); brackets: 95% intervals, of rank correlations over interventions.",
        "Slope: of measured on predicted, through 0. Sign of δJ: among differences whose predicted interval excludes 0.",
        "",
        "| checkpoint | interventions | δh as trained, predicted | measured | rank correlation of δh | slope | δJ's sign |",
        "|---|---|---|---|---|---|---|",
        *lines,
        "",
    ]
    write_whole(RESULTS, "\n".join(text))
    print("\n".join(lines))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])

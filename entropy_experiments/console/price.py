"""What `price` runs and prints: an analysis that asks one question, its sentence and its table."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_experiments.checkpoints.folder import checkpoint_step, resolve_checkpoint
from entropy_experiments.config import AnalysisConfig, FisherAnalysisConfig
from entropy_experiments.records.analysis_results import Failed, Skipped, finished
from entropy_experiments.records.price_results import PricesResult
from entropy_experiments.records.reader import read_results_folder
from entropy_experiments.records.record import json_of
from entropy_experiments.report.analysis_tables import TABLES
from entropy_experiments.report.findings import FINDINGS
from rl_training.configuration import load_config
from rl_training.errors import UserError

# No kernel is needed, nor any other question; what the user gives comes after and wins.
_ALONE = (
    "entropy_analysis.fisher_kernel.compute_full=false",
    *(
        f"entropy_analysis.analysis.{name}=false"
        for name, field in AnalysisConfig.model_fields.items()
        if field.annotation is bool and name not in ("prices", "price_steps")
    ),
)


def price_config(config: Path | None, overrides: list[str], measure: bool) -> FisherAnalysisConfig:
    """The configuration of an analysis that asks for prices alone, unless `overrides` ask for more."""
    steps = f"entropy_analysis.analysis.price_steps={'true' if measure else 'false'}"
    return load_config(
        FisherAnalysisConfig, config, [*_ALONE, steps, *overrides, "entropy_analysis.analysis.prices=true"]
    )


def price_folder(checkpoint: Path, config: FisherAnalysisConfig) -> Path:
    """`<output_dir>/prices_<today>/<run>_checkpoint-<step>`."""
    path = resolve_checkpoint(checkpoint)
    name = f"{path.resolve().parent.name}_checkpoint-{checkpoint_step(path)}"
    return Path(config.output_dir) / f"prices_{datetime.date.today().isoformat()}" / name


def prices_of(folder: Path) -> PricesResult:
    """The price list of a results folder. Raises UserError where there is none."""
    entry = read_results_folder(folder).summary.analyses.prices
    found = finished(entry)
    if found is None:
        why = {Skipped: "skipped", Failed: "error"}.get(type(entry), "")
        raise UserError(f"{folder} holds no price list: {getattr(entry, why, 'it was not asked for')}")
    return found


def price_outcome(result: PricesResult) -> dict[str, Any]:
    """The list as plain data, with its sentence."""
    return {"sentence": FINDINGS["prices"](result), **json_of(result)}


def print_prices(console: Console, result: PricesResult) -> None:
    """The sentence and the table; plain lines where the console is no terminal."""
    console.print(FINDINGS["prices"](result), markup=False, soft_wrap=True)
    for table in TABLES["prices"](result):
        if not console.is_terminal:
            for row in table.texts:
                named = zip(table.columns[1:], row[1:], strict=True)
                cells = "; ".join(
                    f"{heading} {cell}" if cell[:1] in "+−–0" else cell for (heading, _), cell in named if cell
                )
                console.print(f"{row[0]}: {cells}", markup=False, soft_wrap=True)
            continue
        drawn = Table(box=box.SIMPLE_HEAD, title=table.caption, title_justify="left", pad_edge=False)
        for heading, number in table.columns:
            drawn.add_column(heading, justify="right" if number else "left", overflow="fold")
        for row in table.texts:
            drawn.add_row(*(Text(cell) for cell in row))
        console.print(drawn)

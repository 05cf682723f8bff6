"""What `price` runs and prints: an analysis that asks one question, its sentence and its table."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from entropy_experiments.checkpoints.folder import checkpoint_step, resolve_checkpoint
from entropy_experiments.config import AnalysisConfig, FisherAnalysisConfig
from entropy_experiments.records.analysis_results import Failed, Skipped, finished
from entropy_experiments.records.price_results import PricesResult
from entropy_experiments.records.reader import read_results_folder
from entropy_experiments.records.record import json_of
from entropy_experiments.report.analysis_tables import TABLES
from entropy_experiments.report.content import Table
from entropy_experiments.report.findings import FINDINGS
from entropy_experiments.statistics.confidence import few_prompts_sentence
from rl_training.configuration import load_config
from rl_training.errors import UserError

_LABEL, _GAP = 16, 3
"""Characters that a row's name takes at least, and that lie between columns."""
_DIFFERENCES = "less as trained"

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
    """The sentence, what few prompts make of it, and the tables; plain lines where the console is no terminal."""
    console.print(FINDINGS["prices"](result), markup=False, soft_wrap=True)
    if warning := few_prompts_sentence(result.eval_prompts):
        console.print(warning, markup=False, soft_wrap=True)
    for table in TABLES["prices"](result):
        if console.is_terminal:
            _draw(console, table)
        else:
            _print_lines(console, table)


def _print_lines(console: Console, table: Table) -> None:
    """What the columns are, then a line a row."""
    console.print(table.caption, markup=False, soft_wrap=True)
    for label, *cells in table.cells:
        named = zip(table.columns[1:], cells, strict=True)
        words = [
            cell.text if cell.look == "note" else f"{heading} {cell.text}" for (heading, _), cell in named if cell.text
        ]
        console.print(f"{label.text}: {'; '.join(words)}", markup=False, soft_wrap=True)


def _fits(table: Table, shown: Sequence[int], width: int) -> bool:
    """Whether the columns of numbers have room in one line each, beside the rows' names."""
    texts = [[cell.text for cell in row] for row in table.cells if not any(cell.look == "note" for cell in row)]
    longest = (max(len(text) for text in (table.columns[k][0], *(row[k] for row in texts))) for k in shown[1:])
    return _LABEL + sum(one + _GAP for one in longest) <= width


def _draw(console: Console, table: Table) -> None:
    """On a narrow terminal without the differences; rows without numbers stand below, by their reason."""
    shown, caption = list(range(len(table.columns))), table.caption
    if not _fits(table, shown, console.width):
        shown = [place for place in shown if not table.columns[place][0].endswith(_DIFFERENCES)]
    if len(shown) < len(table.columns):
        caption += " A wider terminal shows the differences, and so does the report."
    fits = _fits(table, shown, console.width)
    drawn = RichTable(box=box.SIMPLE_HEAD, title=caption, title_justify="left", pad_edge=False)
    for place in shown:
        heading, number = table.columns[place]
        drawn.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=number and fits)
    without: dict[str, list[str]] = {}
    for row in table.cells:
        reason = next((cell.text for cell in row if cell.look == "note"), None)
        if reason is None:
            texts = [row[place].text for place in shown]
            drawn.add_row(*(Text(text if fits else text.replace(" [", "\n[")) for text in texts))
        else:
            without.setdefault(reason, []).append(row[0].text)
    console.print(drawn)
    for reason, labels in without.items():
        console.print(Text(f"{', '.join(labels)}: {reason}"))

"""Synthetic results folders that can be compared: every number known prompt by prompt, as leave_one_out.parquet has it."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entropy_experiments.records.record import json_of
from entropy_experiments.records.sweep_record import SweepEntry
from tests.entropy_experiments.results_fixture import build_results
from tests.entropy_experiments.whole_summary import estimate, sweep_record

PARTS = ("total", "batch", "momentum", "weight_decay")


def leave_out_means(values: np.ndarray) -> np.ndarray:
    """(B,) means with one value left out, by a loop."""
    return np.array([np.mean([v for j, v in enumerate(values) if j != i]) for i in range(len(values))])


def add_prompt_values(folder: Path, effects: dict[str, np.ndarray], order: np.ndarray | None = None) -> None:
    """Make summary.json and leave_one_out.parquet say the means of `effects`: column name -> one value per prompt.

    order: the file's order of prompts, to see that rows are matched by text and not by place.
    """
    rows = pq.read_table(folder / "sequences.parquet").to_pylist()
    texts = [row["prompt"] for row in rows if row["buffer"] == "evaluation"]
    order = np.arange(len(texts)) if order is None else order
    summary = json.loads((folder / "summary.json").read_text())
    table = {"prompt_index": order, "prompt": [texts[i] for i in order]}
    for name, values in effects.items():
        left_out = leave_out_means(values)
        table[name] = left_out[order]
        spread = np.sqrt((len(values) - 1) / len(values) * np.sum((left_out - left_out.mean()) ** 2))
        *path, last = name.split(".")
        node = summary
        for key in path:
            node = node.setdefault(key, {})
        node[last] = (node.get(last) or {}) | estimate(float(values.mean()), float(spread), len(values) - 1.0)
    pq.write_table(pa.table(table), folder / "leave_one_out.parquet")
    (folder / "summary.json").write_text(json.dumps(summary))


def prompt_effects(
    seed: int, shift: float = 0.0, common: np.ndarray | None = None, count: int = 32
) -> dict[str, np.ndarray]:
    """Values per prompt: what the prompt does to every side (`common`), and noise of this side's own."""
    generator = np.random.default_rng(seed)
    common = np.random.default_rng(99).normal(0, 0.1, count) if common is None else common
    values = {"entropy.per_token": 0.8 + common + generator.normal(0, 0.01, count)}
    values["actual.snis"] = -0.08 + shift + common + generator.normal(0, 0.02, count)
    for part, size in zip(PARTS, (1.0, 0.3, 0.7, 0.0), strict=True):
        values[f"predicted.rao_blackwell.{part}"] = size * (-0.07 + shift + common + generator.normal(0, 0.01, count))
    return values


def build_side(folder: Path, seed: int = 0, shift: float = 0.0, step: int = 8, **options) -> Path:
    """A results folder whose prompts are those of `build_results`; other `seed`s differ in their numbers alone."""
    build_results(folder, 0)
    # The fixture repeats prompts; here each is its own, so that one can be told from another.
    rows = pq.read_table(folder / "sequences.parquet").to_pylist()
    for row in rows:
        if row["buffer"] == "evaluation":
            row["prompt"] = f"{row['prompt']} ({options.get('prompts', 'same')} {row['row']})"
    pq.write_table(pa.Table.from_pylist(rows), folder / "sequences.parquet")
    add_prompt_values(folder, options.get("effects") or prompt_effects(seed, shift), options.get("order"))
    summary = json.loads((folder / "summary.json").read_text())
    summary["checkpoint"]["step"] = step
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def edit_summary(folder: Path, change) -> Path:
    """Apply `change(summary)` to the folder's summary.json."""
    summary = json.loads((folder / "summary.json").read_text())
    change(summary)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def build_sweep(
    folder: Path, shifts: dict[int, float], run: str = "run", failed: tuple[int, ...] = (), seed: int = 0
) -> Path:
    """A sweep's folder as `sweep` leaves it: an analysis a step, and sweep.json."""
    entries = []
    for step in (*shifts, *failed):
        name = f"{run}_checkpoint-{step}"
        known = {"checkpoint": f"runs/{run}/checkpoint-{step}", "folder": f"checkpoints/{name}", "seconds": None}
        status, error = ("done", None) if step in shifts else ("failed", "no optimizer.pt")
        entries.append(SweepEntry(name=name, run=run, step=step, status=status, error=error, **known))
        if step in shifts:
            build_side(folder / "checkpoints" / name, seed + step, shifts[step], step)
    (folder / "sweep.json").write_text(json.dumps(json_of(sweep_record(entries, {run: f"runs/{run}"}, {}))))
    return folder

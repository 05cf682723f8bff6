"""Predicted prices beside real steps: every intervention of a price list is taken and measured, at several checkpoints.

    python benchmarks/price_check.py small               trains the small policy and prices three of its checkpoints; minutes
    python benchmarks/price_check.py run NAME RUN/checkpoint-3 RUN/checkpoint-6 ...       a run's own checkpoints
    python benchmarks/price_check.py page                the table, from the rows that both keep under benchmarks/results/prices/

    same sequences     predicted and measured on the same evaluation sequences, reweighted: what differs is curvature
    fresh sequences    measured on others, drawn with another seed (`small` alone)

All prices of a checkpoint are of one training buffer, the one that its last step used, so that interventions are the same ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.probe_replay.small_policy import make_policy
from entropy_experiments.console.analyze import analyze_with_progress
from entropy_experiments.console.price import price_config, prices_of
from entropy_experiments.records.price_results import PricesResult
from rl_training.config import TrainConfig
from rl_training.configuration import load_config
from rl_training.files import write_whole
from rl_training.intervals import correlation_interval
from rl_training.train import run_training

RESULTS = Path(__file__).parent / "results" / "prices"
ROOT = Path("runs/price_check")
CONFIG = Path(__file__).parents[1] / "rl_training" / "cfg" / "testconfig.yaml"
SMALL_STEPS = (5, 20, 40)
SEQUENCES, FRESH = 2048, 512
OF_RUN = 64
KEEPS_SIGN = ("reward", "reward_minus_run")


def small_run() -> Path:
    """The small policy's run, 60 steps with a checkpoint at each; one that is there is left alone."""
    folder, policy = ROOT / "small", make_policy(ROOT / "small-policy")
    if (folder / "checkpoint-60").exists():
        return folder
    overrides = (
        "training.report_to=[]",
        "training.steps=60",
        "training.save_every=1",
        "training.seed=40",
        f"training.output_dir={folder}",
        "entropy_probe.enabled=false",
        "training_buffer.max_refill_rounds=0",
        "lora.enabled=false",
        f"model.name={policy}",
        "task.source=jsonl",
        "task.name=sums",
        "task.arguments={}",
        "task.system_prompt=null",
        f"task.path={policy / 'problems.jsonl'}",
        "task.size=512",
        f"task.heldout_size={SEQUENCES}",
        "optimizer.learning_rate=5e-4",
        "optimizer.weight_decay=0.01",
        "optimizer.micro_batch_size=64",
        "rollouts.max_completion_length=24",
    )
    return run_training(load_config(TrainConfig, CONFIG, list(overrides)), True, False)


def priced(checkpoint: Path, sequences: int, seed: int = 0) -> PricesResult:
    """The price list of a checkpoint, with measured steps; one that is there is read again."""
    folder = ROOT / "lists" / checkpoint.resolve().parent.name / f"{checkpoint.name}-{sequences}-{seed}"
    if not folder.exists():
        settings = (
            f"seed={seed}",
            f"entropy_analysis.eval_batch_size={sequences}",
            "entropy_analysis.sampling.train_prompts=from_run",
        )
        config = price_config(None, list(settings), True)
        analyze_with_progress(checkpoint, config, folder=folder, table=False, quiet=True, trust=True)
    return prices_of(folder)


def rows_of(result: PricesResult) -> dict[str, dict[str, Any]]:
    """name -> what is kept of a row: estimates as [value, low, high], measured changes, or why there is none."""
    kept: dict[str, dict[str, Any]] = {}
    for row in result.rows:
        if row.reason is not None:
            kept[row.name] = {"reason": row.reason}
            continue
        found: dict[str, Any] = {"label": row.label}
        for name in ("entropy", "reward", "entropy_minus_run", "reward_minus_run"):
            estimate = getattr(row, name)
            if estimate is not None:
                found[name] = [estimate.value, estimate.low, estimate.high]
        assert row.measured is not None
        found["measured"] = {"entropy": row.measured.entropy, "reward": row.measured.reward}
        found["effective_sample_size"] = row.measured.effective_sample_size
        kept[row.name] = found
    return kept


def keep(name: str, checkpoint: Path, sequences: int, fresh: int | None) -> None:
    """Price one checkpoint and write its rows."""
    content: dict[str, Any] = {"run": name, "checkpoint": checkpoint.name, "sequences": sequences}
    content["rows"] = rows_of(priced(checkpoint, sequences, seed=0 if fresh is None else 1))
    if fresh is not None:
        content["fresh_sequences"] = fresh
        found = rows_of(priced(checkpoint, fresh))
        content["fresh"] = {key: row["measured"] for key, row in found.items() if "measured" in row}
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_whole(RESULTS / f"{name}-{checkpoint.name}.json", json.dumps(content, indent=1) + "\n")


# ---- the table


def agreement(rows: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """Cells: interventions, rank correlation, slope, signs of dJ and of dJ less the run's among those told from zero."""
    names = [name for name in rows if "entropy_minus_run" in rows[name] and name in measured]
    predicted = np.array([rows[name]["entropy_minus_run"][0] for name in names])
    real = np.array([measured[name]["entropy"] - measured["run"]["entropy"] for name in names])
    ranks = [np.argsort(np.argsort(values)) * 1.0 for values in (predicted, real)]
    low, high = correlation_interval(*ranks)
    rank = float(spearmanr(predicted, real)[0])
    slope = float(predicted @ real / (predicted @ predicted))
    signs = []
    for key in KEEPS_SIGN:
        told = [n for n in names if key in rows[n] and rows[n][key][1] is not None and _clear(rows[n][key])]
        base = measured["run"]["reward"] if key == "reward_minus_run" else 0.0
        right = sum(np.sign(rows[n][key][0]) == np.sign(measured[n]["reward"] - base) for n in told)
        signs.append(f"{right} of {len(told)}")
    return f"{len(names)} | {rank:.2f} [{low:.2f}, {high:.2f}] | {slope:.2f} | " + " | ".join(signs)


def _clear(estimate: Sequence[float]) -> bool:
    return estimate[1] > 0 or estimate[2] < 0


def page() -> str:
    """The page of the table, from the rows that are kept."""
    lines, single = [], []
    for path in sorted(RESULTS.glob("*.json"), key=lambda p: (p.stem.split("-")[0], int(p.stem.rsplit("-", 1)[1]))):
        kept = json.loads(path.read_text())
        rows = kept["rows"]
        same = {name: row["measured"] for name, row in rows.items() if "measured" in row}
        value, low, high = rows["run"]["entropy"]
        head = f"| {kept['run']}, step {kept['checkpoint'].split('-')[1]} | {value:+.3f} [{low:+.3f}, {high:+.3f}] | "
        for kind, measured, sequences in (
            ("same", same, kept["sequences"]),
            ("fresh", kept.get("fresh"), kept.get("fresh_sequences")),
        ):
            if measured:
                cell = f"{measured['run']['entropy']:+.3f} | {kind} {sequences} | "
                lines.append(f"{head}{cell}{agreement(rows, measured)} |")
        single += _each(kept, same)
    return _TEXT.format(lines="\n".join(lines), rows="\n".join(single))


def _each(kept: Mapping[str, Any], same: Mapping[str, Any]) -> list[str]:
    """One checkpoint's interventions, a line each: predicted and measured, differences to the step as trained."""
    out = [f"\n## {kept['run']}, {kept['checkpoint']}\n", _HEADING]
    for name, row in kept["rows"].items():
        if "entropy_minus_run" not in row:
            continue
        measured = [same[name][key] - same["run"][key] for key in ("entropy", "reward")]
        cells = []
        for key, real in zip(("entropy_minus_run", "reward_minus_run"), measured, strict=True):
            value, low, high = row[key]
            cells.append(f"{value:+.4f} [{low:+.4f}, {high:+.4f}] | {real:+.4f}")
        out.append(f"| {row['label']} | {cells[0]} | {cells[1]} |")
    return out


_HEADING = "| intervention | δh − run, predicted | measured | δJ − run, predicted | measured |\n|---|---|---|---|---|"
_TEXT = """# Prices beside real steps

Every intervention of the [price list](../../../docs/analyses/prices.md) is taken as a real AdamW step and measured, by
`python benchmarks/price_check.py small` and `... run NAME CHECKPOINT...`; the rows are beside this page. *small*: the
[small policy](../../probe_replay/small_policy.py), all weights trained; *demo*: SmolLM2-135M, LoRA, `make demo`. Rank
correlation and slope (of measured on predicted, through 0) are of δh less that of the step as trained, over interventions.
Signs: of δJ, and of δJ less that of the step as trained, among those whose predicted 95% interval excludes 0. *Same*: measured
on the sequences that were predicted on; *fresh*: on others. Brackets: 95% intervals (rank correlation: over interventions,
which are not independent).

| checkpoint | δh as trained, predicted | measured | on | interventions | rank correlation | slope | sign of δJ | of δJ − run |
|---|---|---|---|---|---|---|---|---|
{lines}
{rows}
"""


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    command, *rest = arguments or ["help"]
    if command == "small" and not rest:
        run = small_run()
        for step in SMALL_STEPS:
            keep("small", run / f"checkpoint-{step}", SEQUENCES, FRESH)
    elif command == "run" and len(rest) > 1:
        for checkpoint in rest[1:]:
            keep(rest[0], Path(checkpoint), OF_RUN, None)
    elif command != "page" or rest:
        raise SystemExit("usage: price_check.py small | run NAME CHECKPOINT... | page")
    write_whole(RESULTS / "README.md", page())
    print(page().split("\n## ")[0])


if __name__ == "__main__":
    main(sys.argv[1:])

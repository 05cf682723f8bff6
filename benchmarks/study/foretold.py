"""Did prices read at step 20 foretell what the arms were at the end? `python -m benchmarks.study foretold`.

For each seed the Dr. GRPO arm is trained for 20 steps, and the price list of its next step is made as `entropy-experiments price`
makes it. A price is beside the step as trained; an arm's outcome is its final entropy and reward less those of Dr. GRPO with the
same seed. Arms that the list does not price (their gradient is Dr. GRPO's where ratios are 1) are foretold to change nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from benchmarks.study.arms import ARMS, make_trainer
from benchmarks.study.summary import by_arm
from benchmarks.study.tasks import ROOT, Task, right
from entropy_experiments.console.price import price_config, prices_of
from entropy_experiments.entropy_runner import run_fisher_analysis
from rl_training.intervals import correlation_interval

AT, SEQUENCES, HELD_OUT = 20, 128, 512
ROW_OF = {
    "controller": ("entropy_bonus_that_holds", 1.0),
    "adaptive": ("entropy_bonus_that_holds", 1.0),
    "bonus": ("entropy_bonus_0.01", 2.5),
    "grpo": ("grpo", 1.0),
    "clip_cov": ("clip_cov", 0.01),
    "rloo": ("", 0.0),
    "clip_higher": ("", 0.0),
    "kl_cov": ("", 0.0),
}
"""Arm -> the row of the list that stands for it, and how much of it: the tuned bonus is 0.025, and Clip-Cov takes 0.02% of tokens
out of the 2% that the row leaves out; RLOO's weights are Dr. GRPO's, scaled. How
many sequences the arm that leaves out takes, no row says."""


Prices = dict[str, list[float | None]]


def prices_at(task: Task, seed: int) -> Prices:
    """Row -> predicted change of entropy and of reward, less the step as trained's; made once."""
    path = ROOT / "foretold" / f"{task.name}-{seed}.json"
    if not path.exists():
        torch.set_num_threads(1)
        folder = ROOT / "work" / f"{task.name}-foretold-{seed}"
        kept = {"save_strategy": "steps", "save_steps": AT, "save_only_model": False}
        make_trainer(ARMS["dr_grpo"], task, seed, AT, folder, **kept).train()
        found = run_fisher_analysis(folder / f"checkpoint-{AT}", _config(task, folder), trust=True, keep_going=True)
        rows = {row.name: _changes(row) for row in prices_of(found.folder).rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
    return json.loads(path.read_text())


def _config(task: Task, folder: Path) -> Any:
    # The policy's template puts the mark that ends a prompt.
    lines = [{**row, "prompt": row["prompt"].removesuffix("|")} for part in task.rows() for row in part]
    random.Random(0).shuffle(lines)
    problems = folder / "problems.jsonl"
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {
        "checkpoint.max_grad_norm": 1.0,
        "checkpoint.device": "cpu",
        "checkpoint.task": f"{{source: jsonl, path: {problems}, reward: 'benchmarks.study.foretold:right_message', "
        f"size: {len(lines) - HELD_OUT}, heldout_size: {HELD_OUT}}}",
        "output_dir": folder / "results",
        "entropy_analysis.eval_batch_size": HELD_OUT,
        "entropy_analysis.train_batch_size": SEQUENCES,
        "entropy_analysis.sampling.temperature": 1.0,
        "entropy_analysis.sampling.max_completion_length": task.longest,
        "entropy_analysis.sampling.completions_per_prompt": 8,
        "entropy_analysis.sampling.max_refill_rounds": 0,
    }
    return price_config(None, [f"{key}={value}" for key, value in given.items()], measure=False)


def right_message(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """`right`, of completions that are messages."""
    return right([message[0]["content"] for message in completions], answer, **columns)


def _changes(row: Any) -> list[float | None]:
    estimates = (row.entropy_minus_run, row.reward_minus_run)
    return [None if estimate is None else estimate.value for estimate in estimates]


def made(root: Path) -> dict[str, dict[str, Prices]]:
    """Task -> seed -> prices, of those that were read."""
    found: dict[str, dict[str, Prices]] = {}
    for path in sorted((root / "foretold").glob("*.json")):
        task, _, seed = path.stem.rpartition("-")
        found.setdefault(task, {})[seed] = json.loads(path.read_text())
    return found


def section(runs: list[dict[str, Any]], read: Mapping[str, Prices]) -> list[str]:
    """Lines of the study's page. read: seed -> prices."""
    arms = by_arm(runs)
    base = arms.get("dr_grpo", {})
    prices = {int(seed): rows for seed, rows in read.items() if int(seed) in base}
    table, points = [], []
    for arm, (row, part) in ROW_OF.items():
        seeds = sorted(arms.get(arm, {}).keys() & prices.keys())
        if not seeds:
            continue
        outcome = [[arms[arm][s][name] - base[s][name] for s in seeds] for name in ("entropy", "reward")]
        foretold = [[part * (prices[s][row][k] or 0.0) if row else 0.0 for s in seeds] for k in (0, 1)]
        means = [float(np.mean(values)) for values in (*foretold, *outcome)]
        points.append(means)
        cells = [f"{means[0]:+.1e}", f"{means[1]:+.1e}", f"{means[2]:+.3f}", f"{means[3]:+.3f}"]
        named = f"{row}{'' if part == 1 else f', × {part:g}'}" if row else "0"
        table.append(f"| {arm} | {named} | {len(seeds)} | {' | '.join(cells)} |")
    said = []
    for name, foretold, outcome in (("entropy", 0, 2), ("reward", 1, 3)):
        ranks = [rankdata([point[place] for point in points]) for place in (foretold, outcome)]
        low, high = correlation_interval(*ranks)
        said.append(f"{name} {np.corrcoef(*ranks)[0, 1]:.2f} ({low:.2f} to {high:.2f})")
    return [
        f"**Did prices read at step {AT} foretell this?** The list of Dr. GRPO's step {AT + 1} ({SEQUENCES} training and "
        f"{HELD_OUT} held-out sequences, mean over seeds), beside what the arms were at the end, less Dr. GRPO of the same "
        f"seed. Rank correlation over the {len(points)} arms (95% interval): {', '.join(said)}.",
        "",
        "| arm | row of the list | seeds | foretold δh | foretold δJ | final entropy | final reward |",
        "|---|---|---|---|---|---|---|",
        *table,
        "",
    ]

"""benchmarks/results/study: the runs' rows, a table with paired tests, and the figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.study import smollm2
from benchmarks.study.advice import draw_advice
from benchmarks.study.foretold import made, section
from benchmarks.study.runs import STEPS
from benchmarks.study.summary import by_arm, distance, load, noise, paired
from benchmarks.study.tasks import ROOT, TASKS
from benchmarks.study.tuning import SEED as TUNING_SEED
from entropy_experiments.records.writer import describe_environment

RESULTS = Path("benchmarks/results/study")
PRICES = "foretold.json"
NAMES = {
    "controller": "controller (ours)",
    "adaptive": "use_adaptive_entropy (TRL)",
    "bonus": "constant bonus, tuned",
    "dr_grpo": "Dr. GRPO",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "clip_higher": "clip-higher",
    "clip_cov": "Clip-Cov",
    "kl_cov": "KL-Cov",
    "leave_out": "leaving out by r_i (ours)",
}
TITLES = {"sums": "Short sums", "chains": "Longer answers: five numbers, every partial sum shown"}
COLOURS = dict(zip(NAMES, plt.get_cmap("tab10").colors, strict=False))


def write_page() -> None:
    """Gather what is finished under runs/study, and write runs.jsonl, README.md and the figure from it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "runs").glob("*.json"))]
    if found:
        (RESULTS / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in found))
        if prices := made(ROOT):
            (RESULTS / PRICES).write_text(json.dumps(prices, indent=1) + "\n")
        (RESULTS / "environment.json").write_text(json.dumps(describe_environment(), indent=1) + "\n")
    runs = [run for run in load(RESULTS / "runs.jsonl") if run["seed"] != TUNING_SEED and run["steps"] == STEPS]
    by_task = {task: [run for run in runs if run["task"] == task] for task in TASKS}
    (RESULTS / "README.md").write_text(page({task: mine for task, mine in by_task.items() if mine}))
    read = json.loads((RESULTS / PRICES).read_text()) if (RESULTS / PRICES).exists() else {}
    for task, mine in by_task.items():
        if mine:
            draw(mine, RESULTS / f"{task}.png")
        if mine and task in read:
            draw_advice(mine, read[task], RESULTS / f"{task}-advice.png")


def page(by_task: dict[str, list[dict[str, Any]]]) -> str:
    """The page of all tasks' runs."""
    lines = [
        "# The reference study: what holds entropy, and at what reward",
        "",
        "`make study` (`python -m benchmarks.study tune`, `run`, `page`). A small policy that learned sums from worked answers, "
        f"then {STEPS} steps of reinforcement learning in real trainers of TRL; tasks and arms: `benchmarks/study/tasks.py` and "
        "`arms.py`. Entropy and reward on 256 fresh completions of held-out prompts at every tenth step. *Distance*: root mean "
        "square of h − target from step 50 on, with the error of looks. *Reward*: the last five looks and the last measurement. "
        "Mean over seeds ± standard deviation.",
        "",
    ]
    for task, runs in by_task.items():
        lines += _section(task, runs)
    return "\n".join(lines + smollm2.section())


def _section(task: str, runs: list[dict[str, Any]]) -> list[str]:
    arms, target = by_arm(runs), runs[0]["target"]
    order = [arm for arm in NAMES if arm in arms]
    floor = float(np.mean([noise(run) for run in runs if run["arm"] == order[0]]))
    lines = [
        f"## {TITLES.get(task, task)}",
        "",
        f"Target {target:g} nats per token. A run exactly at the target would have a distance of {floor:.3f}.",
        "",
        "| arm | seeds | distance | final entropy | reward | pass@4 | pass@16 | distinct of 16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in order:
        cells = [_cell([n[name] for n in arms[arm].values()]) for name in ("distance", "entropy", "reward")]
        cells += [_cell([n[name] for n in arms[arm].values()], 2) for name in ("pass_at_4", "pass_at_16", "distinct")]
        lines.append(f"| {NAMES[arm]} | {len(arms[arm])} | {' | '.join(cells)} |")
    lines += ["", *_tests(arms, order), "", f"![entropy and reward of the arms, {task}]({task}.png)", ""]
    stored = json.loads((RESULTS / PRICES).read_text()) if (RESULTS / PRICES).exists() else {}
    lines += section(runs, stored[task]) if task in stored else []
    stored = [run for run in load(RESULTS / "runs.jsonl") if run["seed"] == TUNING_SEED and run["task"] == task]
    tuning = sorted((run for run in stored if run["arm"] == "bonus"), key=lambda run: run["overrides"]["entropy_coef"])
    if tuning:
        grid = ", ".join(f"{run['overrides']['entropy_coef']:g}: {distance(run):.3f}" for run in tuning)
        lines += [
            f"The constant bonus's coefficient is that of a grid which is nearest to the target in {tuning[0]['steps']} steps of "
            f"seed {TUNING_SEED}, which no arm has (coefficient: distance): {grid}.",
            "",
        ]
    return lines


def _tests(arms: dict[str, dict[int, dict[str, float]]], order: list[str]) -> list[str]:
    lines = [
        "Differences, controller minus the other, paired by seed (95% interval, Student's t; not corrected for several "
        "comparisons):",
        "",
        "| against | seeds | distance | ratio of distances | reward | pass@16 | distinct of 16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in order:
        if arm == "controller" or "controller" not in arms:
            continue
        found = {
            name: paired(arms["controller"], arms[arm], name)
            for name in ("distance", "reward", "pass_at_16", "distinct")
        }
        common = sorted(arms["controller"].keys() & arms[arm].keys())
        if not common:
            continue
        ratio = np.mean([arms["controller"][s]["distance"] for s in common]) / np.mean(
            [arms[arm][s]["distance"] for s in common]
        )
        cells = [f"{f['mean']:+.3f}{_interval(f)}" for f in found.values()]
        lines.append(f"| {NAMES[arm]} | {len(common)} | {cells[0]} | {ratio:.2f} | {' | '.join(cells[1:])} |")
    return lines


def _interval(found: dict[str, float]) -> str:
    """Of a mean over seeds; equal differences have none."""
    if not found["low"] < found["high"]:
        return "" if found["seeds"] < 2 else " (in every seed)"
    return f" ({found['low']:+.3f} to {found['high']:+.3f})"


def _cell(values: list[float], digits: int = 3) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Entropy and reward against steps: the mean over seeds, and the band from the lowest to the highest."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for arm, name in NAMES.items():
        mine = [run["rows"] for run in runs if run["arm"] == arm]
        if not mine:
            continue
        steps = [row["step"] for row in mine[0]]
        for axis, column in zip(axes, ("entropy", "reward"), strict=True):
            values = np.array([[row[column] for row in rows] for rows in mine])
            axis.plot(steps, values.mean(0), color=COLOURS[arm], label=f"{name} ({len(mine)})", lw=1.8)
            axis.fill_between(steps, values.min(0), values.max(0), color=COLOURS[arm], alpha=0.15, lw=0)
    axes[0].axhline(runs[0]["target"], color="black", lw=0.8, ls="--")
    axes[0].set_ylabel("entropy (nats per token)")
    axes[1].set_ylabel("mean reward")
    for axis in axes:
        axis.set_xlabel("optimizer step")
    handles, labels = axes[0].get_legend_handles_labels()
    title = "arm (seeds); band: from the lowest seed to the highest"
    figure.tight_layout()
    figure.legend(
        handles,
        labels,
        fontsize=8,
        title=title,
        title_fontsize=8,
        ncols=5,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
    )
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)

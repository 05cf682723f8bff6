"""The study in one picture: the price list read at step 20, and runs that took its advice beside those that did not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.study.foretold import AT, Prices

ROWS = {
    "entropy_bonus_that_holds": "entropy bonus, solved for",
    "momentum_reset": "momentum reset",
    "lower_rate": "half the learning rate",
    "clip_cov": "Clip-Cov, all 2% of tokens",
    "without_4": "without the 4 costliest sequences",
    "entropy_bonus_0.01": "entropy bonus 0.01",
    "positives_only": "positive weights only",
    "steer": "STEER's token weights",
    "grpo": "GRPO's weights",
}
CURVES = {
    "dr_grpo": ("Dr. GRPO", "tab:gray"),
    "bonus": ("constant bonus, tuned", "tab:orange"),
    "adaptive": ("use_adaptive_entropy", "tab:green"),
    "leave_out": ("costliest sequences left out, to the target", "tab:red"),
    "controller": ("the bonus, solved for at each step", "tab:blue"),
}


def draw_advice(runs: list[dict[str, Any]], read: Mapping[str, Prices], path: Path) -> None:
    """read: seed -> prices."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.8), gridspec_kw={"width_ratios": [1, 1.4]}, layout="constrained"
    )
    _prices(left, read)
    _entropies(right, runs)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _prices(axes: Any, read: Mapping[str, Prices]) -> None:
    values = {name: np.array([rows[name][0] for rows in read.values() if rows[name][0] is not None]) for name in ROWS}
    order = sorted((name for name in ROWS if len(values[name])), key=lambda name: values[name].mean())
    spread = [values[name].std(ddof=1) if len(values[name]) > 1 else 0.0 for name in order]
    means = [values[name].mean() for name in order]
    axes.barh([ROWS[name] for name in order], means, xerr=spread, color="tab:blue", alpha=0.8, error_kw={"lw": 1})
    axes.set_xlabel("entropy kept in the next step, nats per token (bars: seeds ± sd)")
    axes.set_title(f"Price list, read at step {AT}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _entropies(axes: Any, runs: list[dict[str, Any]]) -> None:
    for arm, (label, colour) in CURVES.items():
        mine = [run for run in runs if run["arm"] == arm]
        if not mine:
            continue
        steps = [row["step"] for row in mine[0]["rows"]]
        values = np.array([[row["entropy"] for row in run["rows"]] for run in mine])
        mean, spread = values.mean(0), values.std(0, ddof=1) if len(mine) > 1 else 0.0
        axes.plot(steps, mean, color=colour, label=f"{label} ({len(mine)} seeds)")
        axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)
    axes.set_ylim(top=1.17 * axes.get_ylim()[1])  # room for the legend
    axes.axhline(runs[0]["target"], color="black", lw=0.8, ls=":")
    axes.axvline(AT, color="black", lw=0.8, ls="--")
    axes.annotate("list read", (AT, axes.get_ylim()[1]), (4, -10), textcoords="offset points", fontsize=8)
    axes.set_xlabel("training step")
    axes.set_ylabel("entropy, nats per token")
    axes.set_title("What 300 steps did (mean ± sd; dotted: the target)", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)

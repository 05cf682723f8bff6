"""The table and the figure from results/probe_replay/replay.json."""

from __future__ import annotations

import json
import math
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.probe_replay.replay import KINDS, RESULTS

GROUPS = {
    "watch": "What the probe does: a pool of held-out sequences, measured over spans, drawn anew as soon as few would count",
    "pool": "The pool step by step, never drawn early: which estimator, how many sequences",
    "own": "The step's own 64 sequences (8 prompts x 8), which it is trained on",
    "fresh": "64 fresh sequences a step: what independence and distinct prompts give, whatever the price",
    "gradient": "Running averages of gradients on the step's own sequences",
    "rival": "Rivals (formulas and sources: benchmarks/probe_replay/rivals.py)",
}
KIND_NAMES = {
    "small": "Small policy, three seeds",
    "turning": "Small policy whose entropy turns (a reward for surprisal in steps 36 to 70)",
    "aged": "Small policy, one seed, sequences of the pool watched for 16 steps in place of 8",
    "agedturning": "The turning run, sequences of the pool watched for 16 steps in place of 8",
    "all": "All of them (without the two of longer ages)",
    "smollm2": "SmolLM2-135M",
}
STEPS_IN_LOGITS = ("covariance", "covariance, natural", "S*", "STEER", "REPO")


def write_page() -> None:
    """benchmarks/results/probe_replay/README.md and replay.png."""
    found = json.loads((RESULTS / "replay.json").read_text())
    (RESULTS / "README.md").write_text(page(found))
    draw(found)


def page(found: dict[str, Any]) -> str:
    """The page as Markdown."""
    runs = found["runs"]
    steps = ", ".join(f"{name} ({run['steps']} steps)" for name, run in runs.items())
    ceilings = "; ".join(f"{kind}: r {c['r']:.2f}, partial {c['partial']:.2f}" for kind, c in found["ceilings"].items())
    lines = [
        "# Estimators and schedules of the entropy probe, replayed",
        "",
        f"`python -m benchmarks.probe_replay replay` and `page`, on {steps}. What the words mean and how to record: "
        "benchmarks/probe_replay/README.md.",
        "",
        f"What a perfect prediction would reach against this truth, given the truth's own error: {ceilings}.",
        "",
        *_run_table(runs),
        "",
        "*r*, *partial* (given the true change of the step before), *slope* (of the truth on the prediction), *sum* (predicted / "
        "true) with 95% block-bootstrap intervals over all steps of the runs of a kind; *worst*: r of its worst run; *covers*: "
        "share of steps (and of sums over ten, errors added in quadrature) whose 95% interval holds the truth; of what the probe "
        "does also that of the logged running sum, against fresh samples at its ends, and how often it passes the pool through "
        "the model; *passes*: sequences a step through a forward pass, a gradient, and the sampler; "
        "*cost*: of a step's CPU seconds. A forward pass is timed on own sequences, "
        "whose prompts pass once for all their completions; distinct prompts cost up to 1.7 times that (SmolLM2).",
        "",
    ]
    for group, title in GROUPS.items():
        rows = [row for row in found["rows"] if row["group"] == group]
        lines += [f"## {title}", ""]
        shown = ("all", *KINDS) if group == "watch" else KINDS
        kinds = [k for k in shown if any(k in row["kinds"] for row in rows)]
        for kind in kinds:
            lines += [
                f"{KIND_NAMES[kind]}:",
                "",
                *_table(rows, kind, with_costs=kind == kinds[0] and group != "watch"),
                "",
            ]
    lines += ["## The forecast", "", *_forecast_lines(found["forecasts"]), ""]
    lines += ["## Attribution by token", "", *_token_lines(found["token_r_squared"]), ""]
    lines += ["![The truth, the pool and the step's own sequences, run by run](replay.png)", ""]
    return "\n".join(lines)


def rival_table(found: dict[str, Any]) -> str:
    """Rivals and the probe's default, the highest correlation of the three seeds first: docs/study/predictors.md."""
    rows = [row for row in found["rows"] if row["group"] == "rival" or row["name"].startswith("default:")]
    lines = [
        "| predictor | small policy: r | beyond persistence | turning run: r | beyond persistence |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["kinds"]["small"]["r"]):
        cells = [_with_interval(row["kinds"][k], name) for k in ("small", "turning") for name in ("r", "partial")]
        name = f"this probe, {row['name']}" if row["group"] == "watch" else row["name"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _run_table(runs: dict[str, Any]) -> list[str]:
    lines = [
        "| run | steps | h first, last | truth's spread, error | ceiling of r, partial | step residual | CPU s a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        c = run["ceilings"]
        lines.append(
            f"| {name} | {run['steps']} | {run['entropy'][0]:.2f}, {run['entropy'][-1]:.2f} | {c['truth_spread']:.4f}, "
            f"{c['truth_error']:.4f} | {c['r']:.3f}, {c['partial']:.3f} | {run['largest_step_residual']:.0e} | "
            f"{run['cpu_seconds'].get('cpu_step', math.nan):.2g} |"
        )
    return lines


def _table(rows: list[dict[str, Any]], kind: str, with_costs: bool) -> list[str]:
    names = ["", "r", "worst", "partial", "slope", "sum", "covers", *(["passes", "cost"] if with_costs else [])]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        if kind not in row["kinds"]:
            continue
        found, logits = row["kinds"][kind], row["name"] in STEPS_IN_LOGITS
        cells = [
            row["name"],
            _with_interval(found, "r"),
            f"{found['worst_r']:.2f}",
            _with_interval(found, "partial"),
            "" if logits else _with_interval(found, "slope"),
            "" if logits else _with_interval(found, "sum"),
            "" if math.isnan(found["coverage"]) else f"{found['coverage']:.2f} ({found['windows']:.2f})",
        ]
        if "running" in found:
            cells[6] += f"; {found['running']:.2f}; {found['looks']:.2f} passes a step"
        if with_costs:
            cells += [
                _passes(row.get("passes", {})),
                ", ".join(f"{kind} {100 * share:.1f}%" for kind, share in row["cost"].items()),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _with_interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return "" if math.isnan(row[name]) else f"{row[name]:.2f} [{low:.2f}, {high:.2f}]"


def _passes(passes: dict[str, float]) -> str:
    return ", ".join(f"{count:g} {kind}" for kind, count in passes.items() if count)


def _forecast_lines(by_preset: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "`entropy`: share of spans at which the 80% band of the filtered entropy holds that of fresh sequences; `steps`: the "
        "same of the steps to a floor (benchmarks/probe_replay/forecasts.py); median absolute error of the steps, in steps:",
        "",
        "| preset | runs | entropy | steps (cases) | forecast | persistence | straight line |",
        "|---|---|---|---|---|---|---|",
    ]
    for preset, by_kind in by_preset.items():
        for kind, f in by_kind.items():
            errors = " | ".join(f"{value:.1f}" for value in f["errors"].values())
            lines.append(f"| {preset} | {kind} | {f['entropy']:.2f} | {f['steps']:.2f} ({f['cases']}) | {errors} |")
    return lines


def _token_lines(by_run: dict[str, dict[str, float]]) -> list[str]:
    known = {run: values for run, values in by_run.items() if values}
    if not known:
        return ["Not recorded."]
    names = list(next(iter(known.values())))
    lines = [
        "R² over trained tokens (mean over steps) of each token's rival with its share of the batch part's change of h, the "
        "directional derivative along P times the gradient of entropy:",
        "",
        "| run | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    return lines + [f"| {run} | " + " | ".join(f"{v[n]:.3f}" for n in names) + " |" for run, v in known.items()]


def draw(found: dict[str, Any]) -> None:
    """Run by run: the truth with its error, the filtered pool with its interval, and the step's own sequences."""
    runs = found["runs"]
    figure, axes = plt.subplots(len(runs), 1, figsize=(9, 2.4 * len(runs)), squeeze=False, layout="constrained")
    for axis, (name, run) in zip(axes[:, 0], runs.items(), strict=True):
        step = np.arange(1, run["steps"] + 1)
        truth, pool, own = np.array(run["truth"]), np.array(run["pool"]), np.array(run["own"])
        axis.errorbar(step, truth, 1.96 * np.array(run["truth_error"]), fmt="k.", ms=3, lw=0.6, label="truth, 95%")
        axis.plot(step, own[:, 0], color="#d0894a", lw=0.8, label="own 64, watched")
        low, high = pool[:, 0] - 1.96 * pool[:, 1], pool[:, 0] + 1.96 * pool[:, 1]
        axis.fill_between(step, low, high, color="#3a6ea5", alpha=0.25, lw=0)
        axis.plot(step, pool[:, 0], color="#3a6ea5", lw=1.5, label="default preset, filtered, 95%")
        reach = 1.5 * np.abs(truth).max()
        axis.set_ylim(max(-reach, truth.min() - reach), min(reach, truth.max() + reach))
        axis.axhline(0, color="0.6", lw=0.6)
        axis.set_title(f"{name}: change of h, nats per token", fontsize=9, loc="left")
    axes[0, 0].legend(fontsize=7, ncols=3)
    axes[-1, 0].set_xlabel("step")
    figure.savefig(RESULTS / "replay.png", dpi=110)
    plt.close(figure)

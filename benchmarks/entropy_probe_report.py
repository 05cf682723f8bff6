"""Table and plot of the entropy probe's cost and accuracy, from the records that entropy_probe.py left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

RESULTS = Path("benchmarks/results/entropy_probe")
SEQUENCES = {"light": 8, "8 sequences": 8, "rivals": 8, "fused": 4}  # 16 elsewhere
PREDICTORS = ("score_function", "without_momentum", "covariance", "steer")


def read(name: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `make bench-probe` first")
    return [json.loads(line) for line in path.read_text().splitlines()]


def correlation(pairs: list[tuple[float | None, float | None]]) -> float:
    values = np.array([(a, b) for a, b in pairs if a is not None and b is not None and a == a], dtype=float)
    return float(np.corrcoef(values.T)[0, 1]) if len(values) > 2 else float("nan")


def trusted(schedule: str, seen: dict[str, Any]) -> bool:
    """Whether at least half of the sequences still count after reweighting; below, the measurement itself is not believed."""
    return seen["ess"] is not None and seen["ess"] >= SEQUENCES.get(schedule, 16) / 2


def plain_steps() -> tuple[float, float]:
    """Median wall and CPU seconds of a training step without any probe."""
    rows = [row for row in read("overhead.jsonl") if row["arm"] == "off"]
    return float(np.median([row["wall"] for row in rows])), float(np.median([row["cpu"] for row in rows]))


def peaks() -> str:
    """Median of the highest resident memory in a step, by arm."""
    rows = read("overhead.jsonl")
    arms = dict.fromkeys(row["arm"] for row in rows)
    found = {arm: np.median([row["peak_gib"] for row in rows if row["arm"] == arm]) for arm in arms}
    return ", ".join(f"{value:.2f} GiB ({arm})" for arm, value in found.items())


def in_turn(arm: str) -> float:
    """Median over checkpoints of the CPU seconds that an arm adds, in percent of the plain steps beside it."""
    rows, added = read("overhead.jsonl"), []
    for checkpoint in sorted({row["checkpoint"] for row in rows}):
        here = [row for row in rows if row["checkpoint"] == checkpoint]
        off = np.mean([row["cpu"] for row in here if row["arm"] == "off"])
        added += [100 * (row["cpu"] / off - 1) for row in here if row["arm"] == arm]
    return float(np.median(added)) if added else float("nan")


def schedule_rows(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    wall, cpu = plain_steps()
    out = []
    for name in steps[-1]["schedules"]:
        seen = [(step, step["schedules"][name]) for step in steps if name in step["schedules"]]
        out.append(
            {
                "schedule": name,
                "cpu": float(np.mean([s["cpu"] for _, s in seen])),
                "wall": float(np.mean([s["wall"] for _, s in seen])),
                "of_step": 100 * float(np.mean([s["cpu"] for _, s in seen])) / cpu,
                "of_step_wall": 100 * float(np.mean([s["wall"] for _, s in seen])) / wall,
                "in_turn": in_turn(name),
                "same_tokens": correlation([(s["same_tokens"], s["measured"]) for _, s in seen]),
                "trusted": correlation([(s["same_tokens"], s["measured"]) for _, s in seen if trusted(name, s)]),
                "independent": correlation([(s["predicted"], step["independent"]) for step, s in seen]),
                "rmse": float(np.sqrt(np.mean([(s["predicted"] - step["independent"]) ** 2 for step, s in seen]))),
                "sum": float(np.sum([s["predicted"] for _, s in seen])),
                "se": float(np.mean([np.nan if s["predicted_se"] is None else s["predicted_se"] for _, s in seen])),
            }
        )
    return out


def predictor_rows(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each rival against the independent measurement, from the schedule that logs them all."""
    seen = [(step["independent"], step["schedules"]["rivals"]) for step in steps]
    rows = [{"predictor": "this probe", "independent": correlation([(s["predicted"], i) for i, s in seen])}]
    for name in PREDICTORS:
        pairs = [(s["predictors"].get(name), i) for i, s in seen]
        rows.append({"predictor": name.replace("_", " "), "independent": correlation(pairs)})
    return rows


def table(steps: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    measured = np.array([step["independent"] for step in steps])
    noise = float(np.mean([step["independent_se"] for step in steps]))
    # What a perfect prediction would correlate with a measurement of this noise.
    ceiling = float(np.sqrt(max(0.0, 1 - noise**2 / measured.var())))
    wall, cpu = plain_steps()
    lines = [
        "# The entropy probe: cost and accuracy",
        "",
        "`make bench-probe`; SmolLM2-135M, LoRA r = 16, Dr-GRPO, 64 sequences a step, learning rate 2e-4, "
        f"{len(steps)} steps; entropy {steps[0]['entropy']:.2f} → {steps[-1]['entropy']:.2f} nats per token on 256 held-out "
        "prompts. Machine and versions: environment.json; every step: steps.jsonl, overhead.jsonl.",
        "",
        f"A plain step takes {wall:.1f} s wall, {cpu:.1f} s CPU (median). *CPU*: the probe's own seconds a step, and their share "
        "of a plain step. *in turn*: CPU seconds that a first step with the probe takes more than plain steps from the same "
        "state, run in turn (median over three checkpoints; plain steps differ among themselves by 4%, and the probe's trial "
        "of the model's attention, once a run, is in it). *same tokens*: correlation of the newest gradient along the step "
        "with the change measured on its own tokens, over all refreshed steps, and over those where reweighting leaves at "
        "least half of the effective sample (below, the measurement is not believed). *independent*: correlation of the logged "
        f"prediction with the change on 256 held-out prompts, whose own standard error is {noise:.4f} nats per token (a perfect "
        f"prediction would reach {ceiling:.3f}); *error* the root mean square difference, *sum* to be held against "
        f"{measured.sum():+.3f}.",
        "",
        "| schedule | wall s | CPU s | % of step | in turn % | same tokens | of these trusted | independent | error | "
        "mean s.e. | sum |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        turn = "" if r["in_turn"] != r["in_turn"] else f"{r['in_turn']:+.1f}"
        same, believed, error = (
            "" if r[key] != r[key] else f"{r[key]:.{digits}f}"
            for key, digits in (("same_tokens", 3), ("trusted", 3), ("se", 4))
        )
        lines.append(
            f"| {r['schedule']} | {r['wall']:.2f} | {r['cpu']:.2f} | {r['of_step']:.1f} | {turn} | {same} | {believed} | "
            f"{r['independent']:.3f} | {r['rmse']:.4f} | {error} | {r['sum']:+.3f} |"
        )
    lines += ["", f"Peak memory of whole steps: {peaks()}."]
    lines += ["", "All five on the same 8 sequences a step:", "", "| predictor | independent |", "|---|---|"]
    lines += [f"| {r['predictor']} | {r['independent']:.3f} |" for r in predictor_rows(steps)]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8.6, 5.0), layout="constrained")
    axes = figure.subplots()
    for r in (row for row in rows if row["schedule"] != "rivals"):
        main = r["schedule"] in ("default", "light", "accurate")
        axes.scatter(
            r["of_step"], r["independent"], s=70, marker="D" if main else "o", color="#D55E00" if main else "#0072B2"
        )
        axes.annotate(
            r["schedule"], (r["of_step"], r["independent"]), textcoords="offset points", fontsize=9,
            xytext=(-8, -4) if r["schedule"] == "accurate" else (8, -3),
            ha="right" if r["schedule"] == "accurate" else "left",
        )  # fmt: skip
    axes.axvline(5, color="#6E6E6E", linestyle=":", label="5% of a step")
    axes.axhline(0.9, color="#6E6E6E", linestyle="--", label="correlation 0.9")
    axes.set_xlim(0, 1.25 * max(r["of_step"] for r in rows if r["schedule"] != "rivals"))
    axes.set_ylim(0, 1)
    axes.set_xlabel("CPU time of the probe (% of a training step)")
    axes.set_ylabel("correlation of prediction and change\non 256 held-out prompts")
    axes.set_title("What does a better prediction cost?", loc="left")
    axes.legend(loc="lower left")
    return figure


def main() -> None:
    steps = read("steps.jsonl")
    rows = schedule_rows(steps)
    (RESULTS / "README.md").write_text(table(steps, rows))
    plot(rows).savefig(RESULTS / "overhead_against_accuracy.png", dpi=150)
    print(table(steps, rows))


if __name__ == "__main__":
    main()

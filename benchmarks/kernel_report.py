"""Table and plots of the kernel benchmark, from the records that kernel.py left.

    python benchmarks/kernel_report.py [FOLDER]      default: benchmarks/results/kernel

Writes README.md, time.png, memory.png and peers.png beside the records.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

RESULTS = Path("benchmarks/results/kernel")
OURS, PLAIN = ("ours", "ours_both"), ("plain", "plain_walk")
LABELS = {
    "plain": "plain forward-backward",
    "plain_walk": "plain walk back alone, evaluation side",
    "ours": "ours, K1",
    "ours_both": "ours, K1 and KH",
    "vmap": "torch.func vmap",
    "opacus-cut": "opacus, logits cut",
    "backpack-cut": "backpack, logits cut",
    "vmap-cut": "torch.func, logits cut",
}
TITLES = {
    "tiny-32k": "tiny Llama, vocabulary 32,000",
    "tiny-512": "tiny Llama, vocabulary 512",
    "smollm2": "SmolLM2-135M, training side in groups of 8",
    "smollm2-apart": "SmolLM2-135M, no two of one prompt",
}
ORANGE, BLUE, GREY, RED = "#D55E00", "#0072B2", "#6E6E6E", "#CC3311"
STYLES = ["o", "s", "^", "v", "D", "P", "X", "<", ">", "*", "h", "p", "8"]


@dataclass(frozen=True)
class Row:
    """One implementation on one case and size: medians over its turns; ratios are medians of ratios within a turn.

    of_plain, of_plain_cpu: its time over the plain pass's, wall and CPU. of_ours: its wall time over K1's here. on_top: of K1
    and KH together, what that is longer than K1 alone, over the plain pass's. wrong: off the reference. failed: why it gave
    nothing, or None.
    """

    case: str
    n_rows: int
    n_columns: int
    name: str
    turns: int
    wall: float = float("nan")
    cpu: float = float("nan")
    of_plain: float = float("nan")
    of_plain_cpu: float = float("nan")
    of_ours: float = float("nan")
    on_top: float = float("nan")
    peak: float = float("nan")
    added: float = float("nan")
    error: float | None = None
    error_kh: float | None = None
    wrong: bool = False
    failed: str | None = None

    @property
    def n(self) -> int:
        """Sequences of both sides."""
        return self.n_rows + self.n_columns

    @property
    def label(self) -> str:
        return LABELS.get(self.name, self.name)


def read(folder: Path) -> list[dict[str, Any]]:
    path = folder / "measurements.jsonl"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `make bench-kernel` first")
    return [json.loads(line) for line in path.read_text().splitlines()]


def summarize(lines: list[dict[str, Any]]) -> list[Row]:
    """A row for each case, size and implementation, in the order in which they were first measured."""
    groups: dict[tuple[str, int, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for line in lines:
        group = groups.setdefault((line["case"], line["n_rows"], line["n_columns"]), {})
        group.setdefault(line["implementation"], {})[line["turn"]] = line
    return [_row(key, name, group) for key, group in groups.items() for name in group]


def _row(key: tuple[str, int, int], name: str, group: dict[str, dict[int, dict[str, Any]]]) -> Row:
    turns = group[name]
    failed = next((line["failed"] for line in turns.values() if "failed" in line), None)
    if failed is not None:
        return Row(*key, name, len(turns), failed=failed)

    def median(field: str) -> float:
        return float(np.median([line[field] for line in turns.values()]))

    def ratio(to: str, field: str) -> float:
        others = group.get(to, {})
        found = [line[field] / others[t][field] for t, line in turns.items() if field in others.get(t, {})]
        return float(np.median(found)) if found else float("nan")

    def on_top() -> float:
        plain, ours = group.get("plain", {}), group.get("ours", {})
        both = [t for t in turns if "wall_s" in plain.get(t, {}) and "wall_s" in ours.get(t, {})]
        found = [(turns[t]["wall_s"] - ours[t]["wall_s"]) / plain[t]["wall_s"] for t in both]
        return float(np.median(found)) if found else float("nan")

    errors = {
        field: max((line[field] for line in turns.values() if field in line), default=None)
        for field in ("relative_error", "relative_error_kh")
    }
    return Row(
        *key,
        name,
        len(turns),
        wall=median("wall_s"),
        cpu=median("cpu_s"),
        of_plain=ratio("plain", "wall_s"),
        of_plain_cpu=ratio("plain", "cpu_s"),
        of_ours=ratio("ours", "wall_s"),
        on_top=on_top() if name == "ours_both" else float("nan"),
        peak=median("peak_mib"),
        added=median("added_mib"),
        error=errors["relative_error"],
        error_kh=errors["relative_error_kh"],
        wrong=not all(line.get("right", True) for line in turns.values()),
    )


@dataclass(frozen=True)
class Fit:
    """seconds = start + each * n, by least squares; `worst`: the largest relative distance of a point from the line."""

    start: float
    each: float
    worst: float


def linear_fit(rows: list[Row]) -> Fit | None:
    """Wall seconds against the sequences of both sides; None below three sizes."""
    if len(rows) < 3:
        return None
    n, wall = np.array([r.n for r in rows], dtype=float), np.array([r.wall for r in rows])
    each, start = np.polyfit(n, wall, 1)
    return Fit(float(start), float(each), float(np.max(np.abs(start + each * n - wall) / wall)))


def _of(rows: list[Row], case: str, name: str) -> list[Row]:
    return sorted((r for r in rows if r.case == case and r.name == name and r.failed is None), key=lambda r: r.n)


def _in_order(values: list[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def table(rows: list[Row], environment: dict[str, Any]) -> str:
    hardware, versions = environment["hardware"], environment["versions"]
    lines = [
        "# The Fisher kernel: cost beside one plain pass and beside other libraries",
        "",
        f"`make bench-kernel`; {environment['threads']} threads of {hardware['processor']}, device {environment['device']}. "
        "Everyone computes K = G_eval diag(P) G_train^T in float32 on the same LoRA policy and the same ragged sequences. "
        "Every measurement: measurements.jsonl; machine and versions: environment.json.",
        "",
        "*wall*, *CPU*: seconds, median over turns. *of plain*: wall (CPU) time over that of one plain forward-backward over the "
        "same sequences in the same turn (length-sorted batches, logits at completion tokens, LoRA gradients). *of ours*: wall "
        "time over that of K1 here. *memory*: most MiB resident during the run, and how much more that is than with the "
        "model loaded. *error*: relative Frobenius distance to a float64 loop over sequences; above 1e-4 a result is wrong.",
        "",
        "Versions: " + ", ".join(f"{name} {v}" for name, v in versions.items() if v is not None) + ".",
    ]
    for case in _in_order([r.case for r in rows]):
        lines += ["", f"## {TITLES.get(case, case)}"]
        for n_rows, n_columns in _in_order([(r.n_rows, r.n_columns) for r in rows if r.case == case]):
            here = [r for r in rows if (r.case, r.n_rows, r.n_columns) == (case, n_rows, n_columns)]
            lines += [
                "",
                f"{n_rows} evaluation x {n_columns} training sequences",
                "",
                "| implementation | turns | wall s | CPU s | of plain (CPU) | of ours | memory MiB (added) | error |",
                "|---|---|---|---|---|---|---|---|",
                *(_line(r) for r in here),
                *_of_two_kernels(here),
            ]
        for name in OURS:
            fit = linear_fit(_of(rows, case, name))
            if fit is not None:
                lines += [
                    "",
                    f"{LABELS[name]}, n = evaluation + training sequences: {fit.start:.3f} s + {1000 * fit.each:.2f} ms n, "
                    f"largest distance of a point from the line {100 * fit.worst:.1f}%.",
                ]
    failures = [f"- {r.label}, {r.n_rows} x {r.n_columns}, {r.case}: {r.failed}" for r in rows if r.failed is not None]
    return "\n".join(lines + (["", "## Failed", "", *failures] if failures else [])) + "\n"


def _of_two_kernels(here: list[Row]) -> list[str]:
    """What KH adds, beside the least that it must."""
    on_top, walk = (
        next((value for r in here if r.name == name and not np.isnan(value := getattr(r, field))), None)
        for name, field in (("ours_both", "on_top"), ("plain_walk", "of_plain"))
    )
    if on_top is None or walk is None:
        return []
    return [
        "",
        f"KH on top of K1: {on_top:.2f} of the plain pass; one more plain walk back over the evaluation side: {walk:.2f}.",
    ]


def _line(r: Row) -> str:
    if r.failed is not None:
        return f"| {r.label} | {r.turns} | failed, see below | | | | | |"
    error = "" if r.error is None else f"{r.error:.1e}"
    error += "" if r.error_kh is None else f", KH {r.error_kh:.1e}"
    error += " **wrong**" if r.wrong else ""
    return (
        f"| {r.label} | {r.turns} | {r.wall:.3f} | {r.cpu:.3f} | {_number(r.of_plain)} ({_number(r.of_plain_cpu)}) | "
        f"{_number(r.of_ours)} | {r.peak:.0f} ({r.added:+.0f}) | {error} |"
    )


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


def against_n(rows: list[Row], field: str, what: str, title: str) -> Figure:
    """One panel a case with at least two sizes; lines are implementations, dashes our linear fit."""
    cases = [c for c in _in_order([r.case for r in rows]) if len({r.n for r in rows if r.case == c}) > 1]
    names = _in_order([r.name for r in rows if r.name != "plain_walk"])
    figure = Figure(figsize=(4.3 * max(1, len(cases)) + 2.2, 4.6), layout="constrained")
    if not cases:
        figure.text(0.5, 0.5, "no case was measured at two sizes", ha="center")
        return figure
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        for name in names:
            points = [r for r in _of(rows, case, name) if not r.wrong and getattr(r, field) > 0]
            if points:
                ours = name in OURS
                colour = ORANGE if ours else GREY if name == "plain" else BLUE
                axes.plot(
                    [r.n for r in points],
                    [getattr(r, field) for r in points],
                    marker=STYLES[names.index(name) % len(STYLES)],
                    color=colour,
                    alpha=1.0 if ours or name == "plain" else 0.65,
                    linewidth=2.0 if name == "ours" else 1.0,
                    label=LABELS.get(name, name),
                )
        fit = linear_fit(_of(rows, case, "ours")) if field == "wall" else None
        if fit is not None:
            n = np.array([min(r.n for r in rows if r.case == case), max(r.n for r in rows if r.case == case)])
            label = "ours, K1: a straight line\nthrough its points"
            axes.plot(n, fit.start + fit.each * n, linestyle="--", color="black", linewidth=1.0, zorder=5, label=label)
            note = f"points within {100 * fit.worst:.1f}% of the line"
            axes.text(0.97, 0.03, note, transform=axes.transAxes, ha="right", fontsize=8)
        axes.set_xscale("log", base=2)
        ticks = sorted({r.n for r in rows if r.case == case})
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        for side in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            side(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(axis="y", which="minor", labelsize=8)
        axes.set_xlabel("sequences of both sides (log scale)")
        axes.set_title(TITLES.get(case, case), loc="left", fontsize=10)
        axes.grid(True, which="major", alpha=0.25)
    panels[0].set_ylabel(what)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def bars(rows: list[Row]) -> Figure:
    """Each implementation's time over the plain pass's, at the largest size of every case."""
    cases = _in_order([r.case for r in rows])
    shown = {
        case: [r for r in rows if r.case == case and r.n == max(o.n for o in rows if o.case == case)] for case in cases
    }
    figure = Figure(figsize=(4.6 * len(cases), 0.34 * max(map(len, shown.values())) + 2.0), layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        done = [r for r in shown[case] if r.failed is None and r.name not in PLAIN and not np.isnan(r.of_plain)]
        done.sort(key=lambda r: r.of_plain)
        widest = max((r.of_plain for r in done), default=1.0)
        for place, r in enumerate(done):
            colour = RED if r.wrong else ORANGE if r.name in OURS else BLUE
            axes.barh(place, r.of_plain, color=colour, alpha=1.0 if r.name in OURS else 0.75)
            note = f"{r.of_plain:.2f}" + (" wrong" if r.wrong else "")
            # clear of the dashed line
            right = max(r.of_plain, 1.0) if r.of_plain > 1.0 - 0.1 * widest else r.of_plain
            axes.text(right + 0.01 * widest, place, note, va="center", fontsize=8)
        axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1.0)
        axes.set_xlim(0, 1.28 * widest)
        axes.set_yticks(range(len(done)), [r.label for r in done], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("wall time / plain forward-backward")
        n_rows, n_columns = shown[case][0].n_rows, shown[case][0].n_columns
        axes.set_title(f"{TITLES.get(case, case)}\n{n_rows} x {n_columns} sequences", loc="left", fontsize=10)
    figure.suptitle("What does the kernel cost beside one plain pass? (dashed: the plain pass)", x=0.01, ha="left")
    return figure


def main(folder: Path = RESULTS) -> None:
    rows = summarize(read(folder))
    text = table(rows, json.loads((folder / "environment.json").read_text()))
    (folder / "README.md").write_text(text)
    against_n(rows, "wall", "wall seconds (log scale)", "How does time grow with the number of sequences?").savefig(
        folder / "time.png", dpi=150
    )
    against_n(
        rows,
        "added",
        "memory beyond the loaded model (MiB, log scale)",
        "How does memory grow with the number of sequences?",
    ).savefig(folder / "memory.png", dpi=150)
    bars(rows).savefig(folder / "peers.png", dpi=150)
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)

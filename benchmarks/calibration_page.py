"""README.md and coverage.png of the calibration, from rates.json's content."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_WANTED = {"coverage": (0.93, 0.97), "level": (0.03, 0.07)}
_BEFORE = ", by Student's t alone, as before"
_REASONS = """
Why some are out of range:

- A tail that is not in the buffer. Lines *without what carries half of the variance* count such buffers: of 8 prompts x 8 in the
  world of the tests 42% hold none of the 4 prompts (of 39) that carry half of it, and 79% of intervals cover there, 99%
  elsewhere; in the last world completions of a total probability of 0.7% carry half of it, and 16 prompts x 1 hold none in 90%
  of buffers. No interval made of the buffer can know of them: it would look the same in a world where they do not exist.
  Reports say so below 12 prompts, and name errors that few prompts carry.
- Weights of a long step are heavy-tailed though their effective sample is above half, and leaving out what is not to be trusted
  is a choice by the outcome. No interval of a long step is as good as it looks.
- The score function rests on completions so rare that most buffers of few sequences hold none. Where most prompts have a single
  completion (82 to 91% would cover) no interval is made. Copies planted within a prompt are no draws of the policy, which its
  baseline takes them for: no line.
- *Few prompts said to carry the error* does not single out the buffers whose intervals miss: in those nothing is to be seen. It
  says that the number rests on a tail.
- Intervals of 4 prompts are wide, so that differences of nothing are called something less often than at 5%.
- With 4 prompts there are 24 permutations of prompts: the smallest two-sided p is 8%. With 4 a side, 70 allocations: 3%, which is
  never the 1.25% that the smallest of four p-values is held to.
- 8 of 12 prompts are most of all: errors over prompts do not know that, and are too large.
- Intervals of the law R = -a e^H + b allow for any correlation of neighbouring steps: of independent ones they are too wide, of
  12 steps by half.
"""
_SHOWN = ("entropy", "predicted", "measured", "4 folds")


def write_page(folder: Path, rates: Mapping[str, Any]) -> None:
    """rates: {"buffers", "worlds": world -> shape -> check -> rate, "tests": check -> shape -> rate}."""
    draw_coverage(folder / "coverage.png", rates["worlds"])
    buffers = rates["buffers"]
    lines = [
        "# Calibration in an exact world",
        "",
        f"`make calibrate` (`python -m benchmarks.calibration {buffers}`): {buffers} simulated buffers a column, so that a rate "
        f"of 95% is known to ± {200 * math.sqrt(0.95 * 0.05 / buffers):.1f} points (p-values: 400 buffers, ± 2.2 points). What "
        "each line means stands at the head of that file; rates outside the range that is aimed at (coverage 93 to 97%, below 8 "
        "prompts 90 to 98%; level 3 to 7%) are **bold**.",
        "",
        "![coverage before and after](coverage.png)",
        "",
        *_summary(rates),
        *_REASONS.rstrip().split("\n"),
    ]
    for world, table in rates["worlds"].items():
        lines += ["", f"## {'The world of the tests' if not world else f'Another world: {world}'}", "", *_table(table)]
    lines += [
        "",
        "## p-values and other intervals",
        "",
        "Nulls that hold exactly; the shapes differ from row to row.",
        "",
    ]
    lines += ["| | rates |", "|---|---|"]
    for name, row in rates["tests"].items():
        cells = [f"{shape}: {_cell(name, shape, rate)}" for shape, rate in row.items() if not math.isnan(rate)]
        lines.append(f"| {name} | {' · '.join(cells)} |")
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _table(table: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for rates in table.values() for name in rates))
    return [
        "| | " + " | ".join(table) + " |",
        "|---|" + "---|" * len(table),
        *(
            f"| {name} | " + " | ".join(_cell(name, shape, rates.get(name)) for shape, rates in table.items()) + " |"
            for name in names
        ),
    ]


def _cell(name: str, shape: str, rate: float | None) -> str:
    if rate is None or math.isnan(rate):
        return ""
    return f"{rate:.1%}" if _reached(name, shape, rate) else f"**{rate:.1%}**"


def _reached(name: str, shape: str, rate: float) -> bool:
    kind = name.split()[0]
    if kind not in _WANTED or "as before" in name:
        return True
    low, high = (0.90, 0.98) if kind == "coverage" and _units(shape) < 8 else _WANTED[kind]
    return low <= round(rate, 3) <= high


def _units(shape: str) -> int:
    return int(shape.split()[0])


def _summary(rates: Mapping[str, Any]) -> list[str]:
    """How many of all rates lie in their range, and the extremes, world by world."""
    lines = []
    for world, table in rates["worlds"].items():
        cells = [
            (name, shape, rate)
            for shape, row in table.items()
            for name, rate in row.items()
            if name.split()[0] in _WANTED and "as before" not in name
        ]
        reached = sum(_reached(*cell) for cell in cells)
        least = min((c for c in cells if c[0].startswith("coverage")), key=lambda cell: cell[2])
        where = "Here" if not world else f"In the world “{world}”"
        lines.append(
            f"- {where} {reached} of {len(cells)} rates lie in their range; the lowest coverage is {least[2]:.1%} "
            f"({least[0].removeprefix('coverage of ')}, {least[1]})."
        )
    return lines


def draw_coverage(path: Path, worlds: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """One panel a world: coverage of the main intervals by shape, before (hollow) and after (full), with the range aimed at."""
    figure, panels = plt.subplots(2, 2, figsize=(12, 8), sharey=True, sharex=True, constrained_layout=True)
    for panel, (world, table) in zip(panels.flat, worlds.items(), strict=True):
        shapes = [shape for shape, rates in table.items() if "coverage of entropy" in rates]
        for x, shape in enumerate(shapes):
            low, high = (0.90, 0.98) if _units(shape) < 8 else (0.93, 0.97)
            panel.fill_between([x - 0.45, x + 0.45], low, high, color="0.9", zorder=0)
        for number, name in enumerate(_SHOWN):
            places = [x + 0.18 * (number - 1.5) for x in range(len(shapes))]
            after = [table[shape].get(f"coverage of {name}", math.nan) for shape in shapes]
            before = [table[shape].get(f"coverage of {name}{_BEFORE}", math.nan) for shape in shapes]
            colour = f"C{number}"
            panel.vlines(places, before, after, color=colour, alpha=0.4)
            panel.plot(places, before, "o", mfc="white", color=colour)
            panel.plot(places, after, "o", color=colour, label=name)
        panel.axhline(0.95, color="0.4", lw=0.8)
        panel.set_title(world or "the world of the tests", fontsize=10)
        panel.set_xticks(
            range(len(shapes)), [s.replace(" prompts", "").replace(", ", "\n") for s in shapes], fontsize=8
        )
        panel.set_ylim(0.6, 1.0)
    panels[0, 0].legend(loc="lower right", fontsize=9)
    for row in panels:
        row[0].set_ylabel("share of 95% intervals that hold the truth")
    for panel in panels[1]:
        panel.set_xlabel("prompts x completions")
    figure.suptitle(
        "Coverage: hollow, Student's t alone, as before; full, today; grey, the range aimed at", fontsize=11
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)

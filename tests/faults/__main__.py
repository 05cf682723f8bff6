"""`make faults`: everything that can go wrong, tried; the summary goes to benchmarks/results/faults.

    python -m tests.faults [--kills N] [--disks N] [--commands C,C] [--rows FILE] [--part i/n] [--write NAME]

--kills, --disks: points a command (0: none). --commands: those that are interrupted; nothing else is tried then. --rows: goes on
with what an earlier call left in that file. --part: every n-th case. A case that does not end as it must is printed, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.faults import configurations, damaged_files, texts
from tests.faults.cases import Case, Outcome, run_case
from tests.faults.interruptions import Command, Interruptions, commands
from tests.faults.launches import Launches

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults"


def all_cases(scratch: Path, kills: int, disks: int, chosen: list[str]) -> Iterator[Case]:
    """Every case, those of files on a tiny run that is made here."""
    from entropy_experiments.buffers import recorded_task
    from entropy_experiments.entropy_runner import run_fisher_analysis
    from rl_training.train import run_training
    from tests.entropy_experiments.checkpoints.readers import written_formats
    from tests.entropy_experiments.small_analysis import config
    from tests.tiny_policy import save_tiny_policy, tiny_train_config
    from tests.two_processes import in_two_processes

    if not chosen:
        yield from configurations.cases()
        yield from texts.cases()
    recorded_task.why_trust_is_needed = lambda task: None
    policy = save_tiny_policy(scratch / "policy")
    run = run_training(tiny_train_config(policy, scratch / "run", training={"steps": 4, "save_every": 2}), quiet=True)
    results = run_fisher_analysis(run, config(), folder=scratch / "results").folder
    if not chosen:
        yield from damaged_files.results_cases(results)
        yield from damaged_files.rollout_cases(run, 4)
        yield from damaged_files.checkpoint_cases(run, 4)
    foreign = scratch / "foreign"
    save_tiny_policy(foreign / "policy")
    os.environ[written_formats.FOLDER] = str(foreign)
    in_two_processes(written_formats.write_formats)
    (scratch / "undisturbed").mkdir()
    (scratch / "launched").mkdir()
    found = commands(policy, run, results, foreign)
    yield from _interrupted(found, scratch, kills, disks, chosen)
    yield from _launched(found, scratch, kills, chosen)


def _interrupted(
    found: Mapping[str, Command], scratch: Path, kills: int, disks: int, chosen: list[str]
) -> Iterator[Case]:
    """At counted points of one process."""
    interruptions = Interruptions(found, scratch / "undisturbed")
    share = {"train": 1.0, "analyze": 1.0, "import": 0.5, "report": 0.5, "compare": 0.5, "sweep": 0.4}
    for name, part in share.items():
        if chosen and name not in chosen:
            continue
        if kills:
            yield from interruptions.cases(name, "kill", max(2, int(kills * part)))
        if disks:
            yield from interruptions.cases(name, "full", max(2, int(disks * part)))
            yield from interruptions.cases(name, "term", 2)
            yield from interruptions.sizes(name)
    if disks and (not chosen or "train" in chosen):
        yield from interruptions.cases("train", "torch", disks)


def _launched(found: Mapping[str, Command], scratch: Path, kills: int, chosen: list[str]) -> Iterator[Case]:
    """At random moments of one process of several, or of their launcher."""
    launches = Launches(found, scratch / "launched")
    for name in ("train", "analyze", "sweep", "import", "report"):
        if not kills or (chosen and name not in chosen):
            continue
        yield from launches.cases(name, 1, max(2, kills // 4))
        if name in ("train", "analyze", "sweep"):
            yield from launches.cases(name, 2, max(2, kills // 4))
            yield from launches.cases(name, 3, max(2, kills // 8))
    if kills and (not chosen or "launchers" in chosen):
        for name in ("train", "analyze"):
            yield from launches.launcher_cases(name, 2, max(1, kills // 20))


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.faults")
    options.add_argument("--kills", type=int, default=40)
    options.add_argument("--disks", type=int, default=10)
    options.add_argument("--commands", default="")
    options.add_argument("--part", default="1/1")
    options.add_argument("--rows", type=Path, help="where to keep what was found; what stands there is not tried again")
    options.add_argument("--write", default="", metavar="NAME", help="write benchmarks/results/faults/NAME.md")
    asked = options.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    part, parts = map(int, asked.part.split("/"))
    kept: Path | None = asked.rows
    rows = [] if kept is None or not kept.exists() else [json.loads(line) for line in kept.read_text().splitlines()]
    known = {(row["area"], row["name"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        chosen = asked.commands.split(",") if asked.commands else []
        for number, case in enumerate(all_cases(Path(folder), asked.kills, asked.disks, chosen)):
            if number % parts != part - 1 or (case.area, case.name) in known:
                continue
            rows.append(_row(run_case(case)))
            if kept is not None:
                with kept.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            if rows[-1]["trouble"]:
                print("{area} | {name}: {trouble}: {said}".format(**rows[-1]), flush=True)
    text = summary(rows)
    print(text)
    if asked.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{asked.write}.md").write_text(text)
    return int(any(row["trouble"] for row in rows))


def _row(outcome: Outcome) -> dict[str, Any]:
    case = outcome.case
    return {
        "area": case.area, "name": case.name, "trouble": outcome.trouble, "said": outcome.said if outcome.trouble else "",
        "seconds": outcome.seconds,
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> str:
    """The table by area, in Markdown."""
    version = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout
    areas: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        areas[row["area"]].append(row)
    bad = [row for row in rows if row["trouble"]]
    lines = [
        "# What was tried to break it", "",
        f"`make faults`, {datetime.date.today().isoformat()}, version {version.strip()}: {len(rows)} cases, "
        f"{len(rows) - len(bad)} ended as they must, {len(bad)} did not.", "",
        "| area | cases | as they must | seconds |", "| --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for area, found in areas.items():
        good, seconds = sum(not row["trouble"] for row in found), sum(row["seconds"] for row in found)
        lines.append(f"| {area} | {len(found)} | {good} | {seconds:.0f} |")
    if bad:
        lines += ["", "What did not end as it must:", ""]
        lines += [f"- {row['area']}, {row['name']}: {row['trouble']} ({row['said'][:160]})" for row in bad]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

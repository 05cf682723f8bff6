"""`make faults`: everything that can go wrong, tried; the summary goes to benchmarks/results/faults.

    python -m tests.faults [--kills N] [--disks N] [--commands C,C] [--write NAME]

--kills, --disks: points a command (0: none). --commands: those that are interrupted; nothing else is tried then. A case that does
not end as it must is printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.faults import configurations, damaged_files, texts
from tests.faults.cases import Case, Outcome, run_case
from tests.faults.interruptions import Interruptions, commands

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults"


def all_cases(scratch: Path, kills: int, disks: int, chosen: list[str]) -> Iterator[Case]:
    """Every case, those of files on a tiny run that is made here."""
    from entropy_experiments.buffers import recorded_task
    from entropy_experiments.entropy_runner import run_fisher_analysis
    from rl_training.train import run_training
    from tests.entropy_experiments.small_analysis import config
    from tests.tiny_policy import save_tiny_policy, tiny_train_config

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
    (scratch / "undisturbed").mkdir()
    interruptions = Interruptions(commands(policy, run, results), scratch / "undisturbed")
    share = {"train": 1.0, "analyze": 1.0, "report": 0.5, "compare": 0.5, "sweep": 0.4}
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


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.faults")
    options.add_argument("--kills", type=int, default=40)
    options.add_argument("--disks", type=int, default=10)
    options.add_argument("--commands", default="")
    options.add_argument("--write", default="", metavar="NAME", help="write benchmarks/results/faults/NAME.md")
    asked = options.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = asked.commands.split(",") if asked.commands else []
        for case in all_cases(Path(folder), asked.kills, asked.disks, chosen):
            outcomes.append(run_case(case))
            if outcomes[-1].trouble:
                print(f"{case.area} | {case.name}: {outcomes[-1].trouble}: {outcomes[-1].said}", flush=True)
    text = summary(outcomes)
    print(text)
    if asked.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{asked.write}.md").write_text(text)
    return int(any(outcome.trouble for outcome in outcomes))


def summary(outcomes: list[Outcome]) -> str:
    """The table by area, in Markdown."""
    version = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout
    areas: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        areas[outcome.case.area].append(outcome)
    bad = [outcome for outcome in outcomes if outcome.trouble]
    lines = [
        "# What was tried to break it", "",
        f"`make faults`, {datetime.date.today().isoformat()}, version {version.strip()}: {len(outcomes)} cases, "
        f"{len(outcomes) - len(bad)} ended as they must, {len(bad)} did not.", "",
        "| area | cases | as they must | seconds |", "| --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for area, found in areas.items():
        good, seconds = sum(not outcome.trouble for outcome in found), sum(outcome.seconds for outcome in found)
        lines.append(f"| {area} | {len(found)} | {good} | {seconds:.0f} |")
    if bad:
        lines += ["", "What did not end as it must:", ""]
        lines += [f"- {o.case.area}, {o.case.name}: {o.trouble} ({o.said[:160]})" for o in bad]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

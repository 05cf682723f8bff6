"""`make faults`: everything that can go wrong, tried; the summary goes to benchmarks/results/faults.

    python -m tests.faults [--kills N] [--disks N] [--commands C,C] [--rows FILE] [--kept FOLDER] [--part i/n] [--write NAME]

--kills, --disks: for each command (0: none). --commands: those that are interrupted; nothing else is tried then. --rows: goes on
with what an earlier call left in that file; --kept: with its runs. --seconds: begins no case afterwards. --part: every n-th case.
A case that does not end as it must is printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.faults import configurations, damaged_files, models, surroundings, texts
from tests.faults.cases import Case, Outcome, run_case
from tests.faults.interruptions import MOUNTS, disk_cases, point_cases, size_cases, with_mounts_of_its_own
from tests.faults.launches import kill_cases, launcher_cases, signal_cases
from tests.faults.undisturbed import Undisturbed, commands, sums

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults"
NAMES = ("train", "analyze", "sweep", "import", "report", "compare")
SEVERAL = ("train", "analyze", "sweep")
"""Commands that several processes of one launch share."""


def all_cases(kept: Path, kills: int, disks: int, chosen: list[str]) -> Iterator[Case]:
    """Every case, those of files on a tiny run. kept: a folder for that run and what belongs to it, which may hold it already."""
    names = [name for name in NAMES if not chosen or name in chosen]
    if not chosen:
        yield from configurations.cases()
        yield from texts.cases()
        yield from models.reward_cases()
    run, results = kept / "run", kept / "results" / "analysis"
    if not (kept / "made").exists():
        for left in kept.glob("*"):  # of a call that was ended while it made them
            shutil.rmtree(left)
        kept.mkdir(parents=True, exist_ok=True)
        _make(kept, run, results)
        (kept / "made").touch()
    if not chosen:
        yield from models.model_cases(kept / "policy")
        yield from damaged_files.results_cases(results)
        yield from damaged_files.rollout_cases(run, 4)
        yield from damaged_files.checkpoint_cases(run, 4)
        yield from surroundings.environment_cases(run, results)
    foreign = kept / "foreign"
    sound = Undisturbed(commands(kept / "policy", run, results, foreign), kept / "undisturbed")
    found = [] if not kills else _kills(sound, names, kills)
    if disks and os.environ.get(MOUNTS):
        found += [disk_cases(sound, name) for name in names]
    yield from _taking_turns(found)
    if kills:
        yield from surroundings.concurrency_cases(sound)
    if disks:
        yield from _taking_turns(_disks(sound, names, disks))
    if kills:
        yield from _taking_turns([point_cases(sound, name, "kill", kills) for name in names])


def _make(kept: Path, run: Path, results: Path) -> None:
    from entropy_experiments.buffers import recorded_task
    from entropy_experiments.entropy_runner import run_fisher_analysis
    from rl_training.train import run_training
    from tests.entropy_experiments.checkpoints.readers import written_formats
    from tests.entropy_experiments.small_analysis import config
    from tests.tiny_policy import save_tiny_policy, tiny_train_config
    from tests.two_processes import in_two_processes

    recorded_task.why_trust_is_needed = lambda task: None
    task, length = sums(kept / "sums.jsonl"), {"steps": 4, "save_every": 2}
    run_training(tiny_train_config(save_tiny_policy(kept / "policy"), run, training=length, task=task), quiet=True)
    run_fisher_analysis(run, config(), folder=results)
    foreign = kept / "foreign"
    save_tiny_policy(foreign / "policy")
    os.environ[written_formats.FOLDER] = str(foreign)
    in_two_processes(written_formats.write_formats)


def _kills(sound: Undisturbed, names: list[str], kills: int) -> list[Iterator[Case]]:
    """`kills` of each command at random moments of one process, fewer of two and three; of launchers; and other signals."""
    several = [name for name in names if name in SEVERAL]
    counts = {1: names, 2: several, 3: several}
    return [
        *(kill_cases(sound, name, n, max(1, kills * (4 - n) // 3)) for n, found in counts.items() for name in found),
        *(signal_cases(sound, name, max(3, kills // 4)) for name in several),
        *(launcher_cases(sound, name, 2, max(1, kills // 6)) for name in several),
    ]


def _disks(sound: Undisturbed, names: list[str], disks: int) -> list[Iterator[Case]]:
    found = [size_cases(sound, name) for name in names]
    found += [
        point_cases(sound, name, fault, count) for name in names for fault, count in (("full", disks), ("term", 2))
    ]
    return [*found, *(point_cases(sound, name, "torch", disks) for name in names if name == "train")]


def _taking_turns(found: list[Iterator[Case]]) -> Iterator[Case]:
    """One of each, then the next of each: where it ends early, every kind was tried."""
    while found:
        for cases in list(found):
            case = next(cases, None)
            if case is None:
                found.remove(cases)
            else:
                yield case


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.faults")
    options.add_argument("--kills", type=int, default=16)
    options.add_argument("--disks", type=int, default=10)
    options.add_argument("--commands", default="")
    options.add_argument("--part", default="1/1")
    options.add_argument("--rows", type=Path, help="where to keep what was found; what stands there is not tried again")
    options.add_argument(
        "--kept", type=Path, help="a folder for the runs that are interrupted; what stands there is used"
    )
    options.add_argument("--seconds", type=float, default=float("inf"), help="begin no case afterwards")
    options.add_argument("--write", default="", metavar="NAME", help="write benchmarks/results/faults/NAME.md")
    asked = options.parse_args()
    if asked.disks and not with_mounts_of_its_own():
        print("disks of ten sizes are left out: this machine lets nobody mount a file system")
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    rows = _tried(asked)
    text = summary(rows)
    print(text)
    if asked.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{asked.write}.md").write_text(text)
    return int(any(row["trouble"] for row in rows))


def _tried(asked: argparse.Namespace) -> list[dict[str, Any]]:
    part, parts = map(int, asked.part.split("/"))
    rows: list[dict[str, Any]] = []
    if asked.rows is not None and asked.rows.exists():
        rows = [json.loads(line) for line in asked.rows.read_text().splitlines()]
    known, ends, version = {(row["area"], row["name"]) for row in rows}, time.monotonic() + asked.seconds, _version()
    with contextlib.ExitStack() as stack:
        kept = asked.kept or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        chosen = asked.commands.split(",") if asked.commands else []
        for number, case in enumerate(all_cases(kept, asked.kills, asked.disks, chosen)):
            if number % parts != part - 1 or (case.area, case.name) in known:
                continue
            if time.monotonic() > ends:
                break
            rows.append(_row(run_case(case), version))
            if asked.rows is not None:
                with asked.rows.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            if rows[-1]["trouble"]:
                print("{area} | {name}: {trouble}: {said}".format(**rows[-1]), flush=True)
    return rows


def _version() -> str:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def _row(outcome: Outcome, version: str) -> dict[str, Any]:
    case = outcome.case
    return {
        "area": case.area, "name": case.name, "trouble": outcome.trouble, "said": outcome.said if outcome.trouble else "",
        "seconds": outcome.seconds, "version": version,
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> str:
    """The table by area, in Markdown."""
    areas: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        areas[row["area"]].append(row)
    bad = [row for row in rows if row["trouble"]]
    kills = [row for row in rows if "kill" in row["area"]]
    same = sum(not row["trouble"] for row in kills)
    lines = [
        "# What was tried to break it", "",
        f"`make faults`, {datetime.date.today().isoformat()}, {_versions(rows)}: {len(rows):,} cases, "
        f"{len(rows) - len(bad)} ended as they must, {len(bad)} did not. "
        f"{len(kills)} are kills: {same} of them were gone on with to the bits of an undisturbed run.", "",
        "| area | cases | as they must | seconds |", "| --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for area, found in areas.items():
        good, seconds = sum(not row["trouble"] for row in found), sum(row["seconds"] for row in found)
        lines.append(f"| {area} | {len(found)} | {good} | {seconds:.0f} |")
    if bad:
        lines += ["", "What did not end as it must:", ""]
        lines += [f"- {row['area']}, {row['name']}: {row['trouble']} ({row['said'][:160]})" for row in bad]
    return "\n".join(lines) + "\n"


def _versions(rows: list[dict[str, Any]]) -> str:
    found = Counter(row["version"] for row in rows)
    return ", ".join(f"version {version} ({count:,} cases)" for version, count in found.items())


if __name__ == "__main__":
    sys.exit(main())

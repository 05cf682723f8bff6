"""`make fuzz`: every parser that is ours, ten minutes of the processor's time by default; findings go to tests/fuzz/found, and
the exit status is 1.

python -m tests.fuzz [--seconds 600] [--targets NAME,NAME] [--seed N] [--rows FILE] [--write NAME]

Each parser has its share of the time, whichever are chosen.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.campaign import Finding, campaign, kept, read
from tests.fuzz.targets import TARGETS, Target

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults"


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.fuzz")
    options.add_argument("--seconds", type=float, default=600.0)
    options.add_argument("--targets", default="")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--rows", type=Path, help="where to keep what was found; parsers that stand there are left out"
    )
    options.add_argument("--write", default="", metavar="NAME", help="write benchmarks/results/faults/NAME.md")
    asked = options.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    rows: list[dict[str, Any]] = []
    if asked.rows is not None and asked.rows.exists():
        rows = [json.loads(line) for line in asked.rows.read_text().splitlines()]
    known = {row["name"] for row in rows}
    for target in TARGETS:
        if target.name in known or (asked.targets and target.name not in asked.targets.split(",")):
            continue
        rows.append(_row(target, asked.seconds / len(TARGETS), asked.seed))
        print("{name}: {tried} files, {taken} read, {findings}".format(**rows[-1]), flush=True)
        if asked.rows is not None:
            with asked.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    if asked.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{asked.write}.md").write_text(page(rows))
    return int(any(row["findings"] for row in rows))


def _row(target: Target, seconds: float, seed: int) -> dict[str, Any]:
    tally = campaign(target, seconds, first_seed=seed)
    for content in kept(target):
        try:
            read(target, content)
        except Finding as found:
            tally.findings.setdefault(found.mark, str(found))
    found = {
        "name": target.name,
        "seconds": seconds,
        "tried": tally.tried,
        "taken": tally.taken,
        "kept": len(kept(target)),
    }
    return {**found, "findings": list(tally.findings.values())}


def page(rows: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    version = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    tried, taken, seconds = (sum(row[name] for row in rows) for name in ("tried", "taken", "seconds"))
    bad = sum(len(row["findings"]) for row in rows)
    lines = [
        "# Changed files, read by every parser", "",
        f"`make fuzz`, {datetime.date.today().isoformat()}, version {version}, {seconds:.0f} seconds of a processor: {tried:,} "
        f"files, {tried - taken:,} refused in one line, the others read; {bad} findings are open.", "",
        "| parser | files | read | open findings | kept as tests |", "| --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    lines += [f"| {r['name']} | {r['tried']:,} | {r['taken']:,} | {len(r['findings'])} | {r['kept']} |" for r in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

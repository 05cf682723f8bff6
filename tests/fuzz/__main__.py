"""`make fuzz`: every parser that is ours, ten minutes by default; findings go to tests/fuzz/found, and the exit status is 1.

python -m tests.fuzz [--seconds 600] [--targets NAME,NAME] [--seed N] [--write NAME]
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.fuzz.campaign import Finding, Tally, campaign, kept, read
from tests.fuzz.targets import TARGETS, Target

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults"


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.fuzz")
    options.add_argument("--seconds", type=float, default=600.0)
    options.add_argument("--targets", default="")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--write", default="", metavar="NAME", help="write benchmarks/results/faults/NAME.md")
    asked = options.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    chosen = [t for t in TARGETS if not asked.targets or t.name in asked.targets.split(",")]
    rows: list[tuple[Target, Tally]] = []
    for target in chosen:
        tally = campaign(target, asked.seconds / len(chosen), first_seed=asked.seed)
        for content in kept(target):
            try:
                read(target, content)
            except Finding as found:
                tally.findings.setdefault(found.mark, str(found))
        rows.append((target, tally))
        print(f"{target.name}: {tally.tried} files, {tally.taken} read, {len(tally.findings)} findings", flush=True)
        for said in tally.findings.values():
            print(f"  {said}", flush=True)
    if asked.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{asked.write}.md").write_text(page(rows, asked.seconds))
    return int(any(tally.findings for _, tally in rows))


def page(rows: list[tuple[Target, Tally]], seconds: float) -> str:
    """The table, in Markdown."""
    version = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout
    tried, bad = sum(t.tried for _, t in rows), sum(len(t.findings) for _, t in rows)
    lines = [
        "# Changed files, read by every parser", "",
        f"`make fuzz`, {datetime.date.today().isoformat()}, version {version.strip()}, {seconds:.0f} s: {tried:,} files, "
        f"{tried - sum(t.taken for _, t in rows):,} refused in one line, the others read; {bad} findings are open.", "",
        "| parser | files | read | open findings | kept as tests |", "| --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    lines += [
        f"| {target.name} | {t.tried:,} | {t.taken:,} | {len(t.findings)} | {len(kept(target))} |" for target, t in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

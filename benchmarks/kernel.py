"""The Fisher kernel: this project against other libraries and against one plain forward-backward over the same sequences.

    python benchmarks/kernel.py measure      every implementation on every case, in turns; needs the peers' environment
    python benchmarks/kernel.py roofline     how far from a device's measured limits a kernel of 1.5B-class shapes is
    python benchmarks/kernel_report.py       table and plots from what `measure` left

`make bench-kernel` builds .venv-bench with the peers at exact versions and runs the first and the last. Results go to
benchmarks/results/kernel/: a line a measurement in measurements.jsonl, versions and machine in environment.json.

A turn runs every implementation once, one after the other, each in a process of its own; the ratio to the plain pass is taken
within a turn. A result that is off the float64 reference by more than 1e-4 is marked wrong. The slowest peers run in the
first turn alone. See docs/guides/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from kernel_parts.cases import GROUP_SIZES, SIZES, recorded_sequences
from kernel_parts.measure import Worker, compute_reference, context, write_line
from kernel_peers import IMPLEMENTATIONS, SLOW

RESULTS = Path("benchmarks/results/kernel")
WORK = Path("runs/bench-kernel")
RUNS = ("runs/bench-probe", "runs/demo", "runs/demo-1")
DEFAULT = [name for name in IMPLEMENTATIONS if name not in ("backpack-cut", "vmap-cut")]
# A machine that others share drifts within seconds: many short turns, whose ratios are of neighbours, beat a few long ones.
TURNS = {"tiny-32k": 11, "tiny-512": 11, "smollm2": 3, "smollm2-apart": 3}
PEERS = (
    "bergson", "kronfluence", "dattri", "opacus", "backpack-for-pytorch", "traker", "torch", "transformers", "peft",
)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and check Fisher kernels, or compute a roofline.")
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure", help="every implementation on every case, in turns")
    measure.add_argument("--cases", default=",".join(SIZES), help="of " + ", ".join(SIZES))
    measure.add_argument(
        "--sizes", default=None, help="instead of each case's own, e.g. 2x2,16x32 (evaluation x training)"
    )
    measure.add_argument("--implementations", default=",".join(DEFAULT), help="of " + ", ".join(IMPLEMENTATIONS))
    measure.add_argument("--turns", type=int, default=None, help="default: 11 for the tiny model, 3 for SmolLM2")
    measure.add_argument("--all-slow", action="store_true", help="slow peers in every turn, not the first alone")
    measure.add_argument(
        "--run", type=Path, default=None, help="training run of SmolLM2; default: one of " + ", ".join(RUNS)
    )
    measure.add_argument("--results", type=Path, default=RESULTS)
    roofline = commands.add_parser("roofline", help="1.5B-class shapes against the device's measured limits")
    roofline.add_argument("--shape", default="1.5b", choices=("1.5b", "tiny"))
    roofline.add_argument("--size", default="128x256", help="evaluation x training sequences")
    roofline.add_argument("--rank", type=int, default=64)
    roofline.add_argument("--tokens", default="128,256", help="prompt and completion tokens of a sequence")
    roofline.add_argument("--results", type=Path, default=RESULTS)
    for command in (measure, roofline):
        command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    return parser.parse_args()


def measure(options: argparse.Namespace) -> None:
    run = options.run or next((Path(name) for name in RUNS if (Path(name) / "rollouts").is_dir()), None)
    if set(GROUP_SIZES) & set(options.cases.split(",")) and (run is None or not run.is_dir()):
        raise SystemExit(
            "the SmolLM2 cases take their adapter, Adam's moments and sequences from a training run, and "
            f"{options.run or 'none of ' + ', '.join(RUNS)} is there: run `make demo` and name its folder with --run, or leave "
            "them out with --cases tiny-32k,tiny-512"
        )
    wanted = [(case, *size) for case in options.cases.split(",") for size in _sizes(case, options.sizes)]
    for case, n_rows, n_columns in wanted:
        if case in GROUP_SIZES and run is not None:
            recorded_sequences(run, n_rows, n_columns, GROUP_SIZES[case])  # a run that is too short ends it here
    part = options.results.with_name(options.results.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / "environment.json").write_text(json.dumps(environment(options), indent=1) + "\n")
    server = context()
    for case, n_rows, n_columns in wanted:
        task = {
            "case": case,
            "n_rows": n_rows,
            "n_columns": n_columns,
            "device": options.device,
            "threads": options.threads,
            "run": None if run is None else str(run),
            "reference": str(WORK / f"reference-{case}-{n_rows}x{n_columns}.pt"),
        }
        compute_reference(server, task)
        take_turns(server, task, options, part / "measurements.jsonl")
    options.results.mkdir(parents=True, exist_ok=True)
    for name in ("environment.json", "measurements.jsonl"):
        os.replace(part / name, options.results / name)
    part.rmdir()


def take_turns(server: Any, task: dict[str, Any], options: argparse.Namespace, path: Path) -> None:
    """All implementations on one case and size. Tiny workers live through all their turns; SmolLM2's are made anew for each."""
    names = options.implementations.split(",")
    keep = task["case"] not in GROUP_SIZES
    workers: dict[str, Worker] = {}
    failed: set[str] = set()
    for turn in range(options.turns or TURNS.get(task["case"], 3)):
        for name in names:
            if name in failed or (turn and name in SLOW and not options.all_slow):
                continue
            worker = workers.get(name) or Worker(server, {**task, "implementation": name})
            found = worker.run()
            if "failed" in found:
                failed.add(name)
            if keep and name not in failed and (name not in SLOW or options.all_slow):
                workers[name] = worker
            else:
                worker.close()
                workers.pop(name, None)
            line = {key: task[key] for key in ("case", "n_rows", "n_columns", "device", "threads")}
            line |= {"turn": turn, "implementation": name, **found}
            write_line(path, line)
            print(_told(line), flush=True)
    for worker in workers.values():
        worker.close()


def _told(line: dict[str, Any]) -> str:
    where = f"{line['case']:13} {line['n_rows']:>3} x {line['n_columns']:<3} turn {line['turn']}  {line['implementation']:13}"
    if "failed" in line:
        return f"{where} FAILED: {line['failed']}"
    error = f"  error {line['relative_error']:.1e}" if "relative_error" in line else ""
    error += f", KH {line['relative_error_kh']:.1e}" if "relative_error_kh" in line else ""
    wrong = "" if line.get("right", True) else "  WRONG"
    return (
        f"{where} {line['wall_s']:8.3f} s wall {line['cpu_s']:8.3f} s CPU "
        f"{line['peak_mib']:7.0f} MiB ({line['added_mib']:+.0f}){error}{wrong}"
    )


def environment(options: argparse.Namespace) -> dict[str, Any]:
    from entropy_experiments.records.writer import describe_environment

    found: dict[str, Any] = {"threads": options.threads, "device": options.device, **describe_environment()}
    for name in PEERS:
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            found["versions"][name] = None
    found["hardware"]["cores"] = os.cpu_count()
    found["hardware"]["processor"] = _processor() or found["hardware"]["processor"]
    return found


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _sizes(case: str, wanted: str | None) -> list[tuple[int, int]]:
    if case not in SIZES:
        raise SystemExit(f"unknown case {case!r}: choose from {', '.join(SIZES)}")
    return list(SIZES[case]) if wanted is None else [_pair(size) for size in wanted.split(",")]


def _pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition("x")
    if not (first.isdigit() and second.isdigit()):
        raise SystemExit(f"a size is written like 16x32, not {text!r}")
    return int(first), int(second)


def main() -> None:
    options = arguments()
    if options.command == "measure":
        measure(options)
    else:
        from kernel_parts.roofline import run_roofline

        run_roofline(options, *_pair(options.size))


if __name__ == "__main__":
    main()

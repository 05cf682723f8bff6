"""`python -m benchmarks.study tune | run | foretold | smollm2 | page`; see the package's docstring."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

from benchmarks.study import smollm2
from benchmarks.study.arms import ARMS
from benchmarks.study.foretold import prices_at
from benchmarks.study.page import write_page
from benchmarks.study.runs import SEEDS, STEPS, run
from benchmarks.study.tasks import TASKS
from benchmarks.study.tuning import GRID, tuned, tuning_run


def main() -> None:
    """Seeds are the outer loop, so that what is stopped early has all arms of its seeds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study")
    parser.add_argument("what", choices=("tune", "run", "foretold", "smollm2", "page"))
    parser.add_argument("--task", choices=sorted(TASKS), default="sums")
    parser.add_argument("--arms", nargs="*", choices=sorted(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, each on one core")
    given = parser.parse_args()
    if given.what == "smollm2":
        smollm2.main()
    elif given.what == "page":
        write_page()
    else:
        TASKS[given.task].policy()  # Made once, before processes ask for it.
        with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
            for done in as_completed(list(_submitted(pool, given))):
                print(done.result(), flush=True)
        if given.what == "tune":
            print(tuned(given.task))


def _submitted(pool: ProcessPoolExecutor, given: argparse.Namespace) -> Iterator[Future[Any]]:
    if given.what == "tune":
        yield from (pool.submit(tuning_run, given.task, coefficient) for coefficient in GRID)
    elif given.what == "foretold":
        yield from (pool.submit(prices_at, TASKS[given.task], seed) for seed in given.seeds)
    else:
        overrides = {"bonus": tuned(given.task)} if "bonus" in given.arms else {}
        for seed in given.seeds:
            for arm in given.arms:
                yield pool.submit(run, given.task, arm, seed, given.steps, **overrides.get(arm, {}))


if __name__ == "__main__":
    main()
